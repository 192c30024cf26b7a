"""Tables that grow on another number of shards: every key has what it had."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import qrhash
from qrhash import Keys, dynamic
from qrhash.checkpoint import Checkpoints, MismatchError
from qrhash.dynamic import AdmitAll, DynamicConfig, ExactCount, SketchCount, SmallNorm, resharding
from qrhash.dynamic.key_exchange import owner_of
from qrhash.kinds import put_table
from support.cases import OPTIMIZED
from support.dynamic_training import Training, config_of, known, vectors_of
from support.meshes import layout_2x4, make_layout

UNCHECKED_KEYS = True

WIDTH = 4

# By the number of shards.
LAYOUTS = {
    None: lambda: None,
    1: lambda: make_layout((1,), ("model",)),
    4: layout_2x4,
    8: lambda: make_layout((8,), ("data",), row_axes="data"),
}


def _config(shards, capacity=90, **options):
    return config_of(capacity, layout=LAYOUTS[shards](), **options)


def _assigned(config, steps=3, size=60):
    """A state after some steps, in each of which keys are met several times."""
    state = dynamic.init_state(config)
    for step in range(steps):
        keys = np.random.default_rng(step).integers(10 * step, 10 * step + 40, size)
        state, _ = dynamic.assign(state, Keys.of(keys), config, step)
    return state


def _candidates(state):
    """Key -> count and last step, of those that have no row."""
    index = jax.tree.map(np.asarray, state.admission)
    live = index.last_steps >= 0
    parts = index.keys.to_numpy()[live], index.counts[live], index.last_steps[live]
    return {
        key: (count, step) for key, count, step in zip(*map(np.ndarray.tolist, parts), strict=True)
    }


def test_keys_keep_rows_counts_and_steps_on_any_number_of_shards():
    capacity = 90  # which does not divide by 8, nor by 4
    options = {"capacity": capacity, "admission": ExactCount(3, 400)}
    config = _config(8, **options)
    state = _assigned(config)
    want, candidates = known(state), _candidates(state)
    assert len(want) > 20
    assert len(candidates) > 10
    assert {row % 8 for row, _, _ in want.values()} == set(range(8))
    for shards in (4, None, 8):
        config = _config(shards, **options)
        state = dynamic.reshard(state, config)
        like = dynamic.init_state(config)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
            assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
        assert known(state) == want
        assert _candidates(state) == candidates
        assert int(state.index.num_keys) == len(want)
        found = dynamic.find(state, [*want, 1000], config).rows
        assert np.asarray(found.rows).tolist() == [*(row for row, _, _ in want.values()), capacity]


def test_without_keys_the_rows_are_those_of_a_new_state():
    state = dynamic.init_state(_config(None))
    for shards in (8, 4, 1):
        config = _config(shards)
        new, got = dynamic.init_state(config), dynamic.reshard(state, config)
        np.testing.assert_array_equal(got.home, new.home)
        np.testing.assert_array_equal(got.index.num_free, new.index.num_free)
        for a, b, count in zip(got.index.free, new.index.free, new.index.num_free, strict=True):
            np.testing.assert_array_equal(a[:count], b[:count])


CAPACITY = 14
SHARDS = st.sampled_from([None, 1, 3, 4])


@settings(max_examples=25)
@given(
    keys=st.dictionaries(
        st.integers(0, 2**64 - 1),
        st.tuples(st.integers(1, 3), st.integers(0, 3)),
        min_size=CAPACITY - 4,
        max_size=CAPACITY,
    ),
    way=st.lists(SHARDS, min_size=2, max_size=4),
    seed=st.integers(0, 9),
)
@pytest.mark.filterwarnings("ignore:.*keys have lost their rows")
def test_who_loses_a_row_was_met_longest_ago(keys, way, seed):
    """Against a dictionary, over several numbers of shards; full tables too."""
    rows = np.random.default_rng(seed).permutation(CAPACITY)
    want = {key: (int(row), *of) for (key, of), row in zip(keys.items(), rows, strict=False)}
    state = dynamic.init_state(DynamicConfig(CAPACITY, WIDTH))
    columns = [np.array(each) for each in zip(*want.values(), strict=True)]
    entries = resharding._Entries(Keys.of(np.array([*want], np.uint64)), *columns[1:], columns[0])
    entries = jax.tree.map(lambda x: x.astype(np.int32) if x.dtype == np.int64 else x, entries)
    index = resharding._index_of(entries, columns[0], np.ones(CAPACITY, bool))
    state = dataclasses.replace(state, index=index)
    for shards in way:
        state = resharding.deal(state, shards, AdmitAll())
        if shards is not None:
            latest = sorted(want, key=lambda key: (-want[key][2], -want[key][1], want[key][0]))
            owner = dict(
                zip(want, owner_of(Keys.of(np.array([*want], np.uint64)), shards), strict=True)
            )
            places = -(-CAPACITY // shards)
            kept = [[key for key in latest if owner[key] == s][:places] for s in range(shards)]
            want = {key: want[key] for key in itertools.chain(*kept)}
        assert known(state) == want


# --- checkpoints ----------------------------------------------------------------------------------


def _save(training, directory):
    with Checkpoints(directory, training.config) as checkpoints:
        checkpoints.save(training.number, training.tree)


def _restored(config, directory):
    training = Training(config)
    with Checkpoints(directory, config) as checkpoints:
        restored = checkpoints.restore(training.tree)
    training.tree, training.number = restored.state, restored.step
    return training


@pytest.mark.slow
def test_a_training_goes_on_on_another_mesh(tmp_path):
    admission, eviction = ExactCount(2, 200), dynamic.StepsSinceUse(3)
    alone, on_mesh = (
        _config(shards, admission=admission, eviction=eviction) for shards in (None, 4)
    )
    whole, before = Training(alone), Training(on_mesh)
    for each in (whole, before):
        each.steps(6)
    _save(before, tmp_path)
    # On as many shards as before, it is the same to the last bit.
    same = _restored(on_mesh, tmp_path)
    for a, b in zip(jax.tree.leaves(same.tree), jax.tree.leaves(before.tree), strict=True):
        assert a.sharding == b.sharding
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    training = _restored(alone, tmp_path)
    assert training.of_keys() == before.of_keys()
    keys = [*before.of_keys(), 1, 2, 3]
    got, want = (vectors_of(x.params, x.state, keys, x.config) for x in (training, before))
    assert got.tobytes() == want.tobytes()
    assert _candidates(training.state) == _candidates(before.state)
    for each in (whole, training):
        each.evict()
        each.steps(3)
    got, want = training.of_keys(), whole.of_keys()
    assert len(got) > 10
    assert {key: each[1:3] for key, each in got.items()} == {
        key: each[1:3] for key, each in want.items()
    }
    got, want = (vectors_of(x.params, x.state, [*want, 1, 2], x.config) for x in (training, whole))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_of_a_shard_without_room_it_is_said_how_many_keys_lost_their_rows(tmp_path):
    config = _config(None, refused=None)
    params, state = dynamic.init(jax.random.key(0), config), dynamic.init_state(config)
    for step in range(3):
        keys = np.arange(30 * step, 30 * step + 30)
        state, _ = dynamic.assign(state, keys, config, step)
    before = known(state)
    owners = np.asarray(owner_of(Keys.of(np.arange(90)), 8))
    lost = [key for s in range(8) for key in sorted(np.flatnonzero(owners == s))[:-12]]
    assert lost  # 90 keys in 8 shards of 12 places; later keys were met later
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(1, {"params": params, "state": state})
    config = _config(8, refused=None)
    tree = {"params": dynamic.init(jax.random.key(0), config), "state": dynamic.init_state(config)}
    with (
        Checkpoints(tmp_path, config) as checkpoints,
        pytest.warns(UserWarning, match=f"{len(lost)} of 90 keys have lost their rows"),
    ):
        state = checkpoints.restore(tree).state["state"]
    after = known(state)
    assert before.keys() - after.keys() <= set(range(30))
    assert len(before) - len(after) == len(lost)
    assert after == {key: before[key] for key in after}
    # Their rows are free again.
    state, found = dynamic.assign(state, np.arange(1000, 1200), config, 9)
    assert int(state.index.num_keys) == 90
    assert int(found.rows.is_new.sum()) == len(lost)


def test_how_many_keys_lose_their_rows_to_8_shards():
    """What docs/checkpoints.md says of 100,000 rows."""
    keys = np.random.default_rng(0).integers(0, 2**63, 100_000)
    for num_keys, most, least in ((100_000, 0.01, 0.001), (95_000, 0.0, 0.0)):
        owners = owner_of(Keys.of(keys[:num_keys]), 8)
        lost = np.maximum(np.bincount(owners) - 100_000 // 8, 0).sum() / num_keys
        assert least <= lost <= most


def test_a_sketch_starts_anew_and_says_so():
    config = _config(4, admission=SketchCount(2, 400))
    state = dynamic.init_state(config)
    state, _ = dynamic.assign(state, [1, 1, 2], config, 0)
    alone = _config(None, admission=SketchCount(2, 400))
    with pytest.warns(UserWarning, match="SketchCount counts anew on another number of shards"):
        state = dynamic.reshard(state, alone)
    assert not np.asarray(state.admission[0]).any()
    state, found = dynamic.assign(state, [1, 2], alone, 1)
    assert (np.asarray(found.rows.rows) < 90).tolist() == [True, False]


class Model(nnx.Module):
    def __init__(self, config):
        self.embed = qrhash.nnx.DynamicEmbed(config, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_a_flax_module_restores_without_its_mesh(tmp_path):
    config, alone = (
        _config(shards, refused=None, admission=ExactCount(2, 40)) for shards in (4, None)
    )
    model, restored = Model(config), Model(alone)
    table = np.arange(90.0 * WIDTH, dtype=np.float32).reshape(90, WIDTH)
    model.embed.table.set_value(put_table(table, config.layout, is_large=True).array)
    state, _ = dynamic.assign(model.embed.state.get_value(), [1, 1, 2, 3, 3], config, 0)
    model.embed.state.set_value(state)
    with Checkpoints(tmp_path, {"a": config}) as checkpoints:
        checkpoints.save(1, nnx.state(model))
    with Checkpoints(tmp_path, {"a": alone}) as checkpoints:
        nnx.update(restored, checkpoints.restore(nnx.state(restored)).state)
    assert known(restored.embed.state.get_value()) == known(model.embed.state.get_value())
    np.testing.assert_array_equal(restored.embed.parameters.table, table)
    restored.embed.assign([2], step=1)
    assert int(restored.embed.num_keys) == 3


def test_what_does_not_fit_is_refused(tmp_path):
    state = dynamic.init_state(_config(4, admission=ExactCount(2, 40)))
    with pytest.raises(ValueError, match="capacity of the config, 80 rows, got one of 90"):
        dynamic.reshard(state, _config(None, 80, admission=ExactCount(2, 40)))
    with pytest.raises(ValueError, match=r"state.admission must be what AdmitAll\(\) remembers"):
        dynamic.reshard(state, _config(None))
    with pytest.raises(ValueError, match="config must be a qrhash"):
        dynamic.reshard(state, None)
    # Two tables of one form but for their rows, in each other's place.
    configs = {"a": _config(4, 90), "b": _config(4, 91)}
    with Checkpoints(tmp_path, configs) as checkpoints:
        checkpoints.save(1, {name: dynamic.init_state(each) for name, each in configs.items()})
    like = {"b": dynamic.init_state(_config(None, 90)), "a": dynamic.init_state(_config(None, 91))}
    with (
        Checkpoints(tmp_path, configs) as checkpoints,
        pytest.raises(
            MismatchError, match=r"array 'a.index.\S+' is .*90.* in the checkpoint, .*91"
        ),
    ):
        checkpoints.restore(like)


# --- what else goes by places ---------------------------------------------------------------------


@pytest.mark.parametrize("large_table_rows", [1, 1000])
def test_a_small_norm_is_that_of_the_keys_own_row(large_table_rows, rng):
    options = {"eviction": SmallNorm(1.0), "refused": None, "large_table_rows": large_table_rows}
    config = _config(8, **options)
    state, _ = dynamic.assign(dynamic.init_state(config), np.arange(40), config, 0)
    config = _config(4, **options)
    state = dynamic.reshard(state, config)
    table = rng.normal(size=(90, WIDTH)).astype(np.float32)
    small = {key for key, (row, _, _) in known(state).items() if (table[row] ** 2).sum() / 2 < 1.0}
    params = dynamic.Parameters(put_table(table, config.layout, is_large=large_table_rows == 1))
    after, count = dynamic.evict(state, params, config, 1)
    assert known(state).keys() - known(after).keys() == small
    assert int(count) == len(small) > 0


def test_deltas_of_a_mesh(rng):
    """From 8 shards, then 4, to a copy without any."""
    options = {"capacity": 200, "refused": None, "eviction": dynamic.StepsSinceUse(1)}
    config, alone = _config(8, **options), _config(None, **options)
    state, published = dynamic.init_state(config), dynamic.nothing_published(config)
    table = rng.normal(size=(200, WIDTH)).astype(np.float32)
    served = dynamic.nothing_served(dynamic.init(jax.random.key(0), alone), alone)
    for step, shards in enumerate((8, 8, 4)):
        config = _config(shards, **options)
        if shards == 4:
            state = dynamic.reshard(state, config)
        params = dynamic.Parameters(put_table(table, config.layout, is_large=True))
        state, found = dynamic.assign(state, np.arange(20 * step, 20 * step + 30), config, step)
        state, _ = dynamic.evict(state, params, config, step)
        rows = np.unique(np.asarray(found.rows.rows))
        table[rows] += 1
        params = dynamic.Parameters(put_table(table, config.layout, is_large=True))
        given = published, params, state, config
        delta, published = dynamic.delta_since(*given, version=step + 1)
        assert len(delta.keys) == 30
        assert sorted(delta.removed.tolist()) == (list(range(20)) if step == 2 else [])
        served = dynamic.apply_delta(served, delta, alone)
        want = {key: (*of, table[row].tobytes()) for key, (row, *of) in known(state).items()}
        copy = np.asarray(served.parameters.table)
        assert want == {
            key: (*of, copy[row].tobytes()) for key, (row, *of) in known(served.state).items()
        }


def _step(config, **options):
    """The compiled step of a config."""
    make = lambda: (dynamic.init(jax.random.key(0), config), dynamic.init_state(config))  # noqa: E731
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make()
    )

    def step(params, state, keys):
        state, found = dynamic.assign(state, keys, config, 1)
        params, _ = dynamic.start_rows(params, found, config)
        return params, state, dynamic.lookup(params, found, config)

    to = (*jax.tree.map(lambda x: x.sharding, like), None)
    words = jax.ShapeDtypeStruct((32,), jnp.uint32)
    jitted = jax.jit(step, out_shardings=to, **options)
    return jitted.lower(*like, Keys(words, words)).compile(OPTIMIZED)


def _copies(compiled):
    return re.findall(r"\[(?:1,)?32768\S* (?:copy|all-gather|all-to-all)\(", compiled.as_text())


def test_nothing_as_long_as_the_table_is_copied_or_sent_in_a_step():
    config = _config(4, capacity=4 * 2**15)
    compiled = _step(config, donate_argnums=(0, 1))
    assert not _copies(compiled)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 2**15
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4 * 2**15
    assert _copies(_step(config))
