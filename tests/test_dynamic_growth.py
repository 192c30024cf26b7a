"""Tables that get more rows: every key keeps its row, its vector and its optimizer state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import qrhash
from qrhash import dynamic
from qrhash.dynamic import ExactCount, StepsSinceUse
from qrhash.kinds import put_table
from support.dynamic_training import Training, adagrad, adam, config_of, known, vectors_of
from support.meshes import layout_2x4, make_layout, whole

STANDARD_PROMOTION = True  # optax's Adam multiplies by a power of an integer
UNCHECKED_KEYS = True


@pytest.mark.parametrize("make", [adagrad, adam])
@pytest.mark.usefixtures("keys_used_once")
def test_every_key_keeps_row_vector_and_state(make):
    training = Training(config_of(20, admission=ExactCount(2, 30)), make())
    training.steps(8)
    keys, before, candidates = training.keys, training.of_keys(), training.state.admission
    assert len(keys) == 20
    training.grow(50)
    assert training.keys == keys
    assert training.of_keys() == before
    assert training.params.table.shape == (50, 4)
    same = jax.tree.map(np.array_equal, training.state.admission, candidates)
    assert all(jax.tree.leaves(same))


def test_growth_changes_nothing_but_the_room():
    """A table that grows in time is trained as one that was as long from the start."""
    growing, long = (
        Training(config_of(n, admission=ExactCount(2, 500)), adam()) for n in (30, 200)
    )
    for _ in range(3):
        growing.step()
        long.step()
    growing.grow(200)
    for _ in range(10):
        growing.step()
        long.step()
    assert len(long.keys) > 30
    assert growing.of_keys() == long.of_keys()
    assert growing.keys == long.keys
    for a, b in zip(growing.params.refused, long.params.refused, strict=True):
        np.testing.assert_array_equal(a, b)


def test_new_rows_have_the_state_of_the_start():
    training = Training(config_of(5))
    training.steps(3)
    training.grow(12)
    (accumulators,) = (x for x in jax.tree.leaves(training.opt_state) if x.shape == (12, 4))
    assert (np.asarray(accumulators)[5:] == 0.5).all()
    assert (np.asarray(accumulators)[:5] > 0.5).all()


def test_rows_that_were_free_are_given_before_the_new_ones():
    training = Training(config_of(4, eviction=StepsSinceUse(1)))
    training.step([1, 2, 3])
    training.step([2])
    training.step([2])
    assert training.evict() == 2
    training.grow(6)
    training.step([7, 8, 9, 10, 11])
    assert sorted(training.keys.values()) == list(range(6))
    rows = training.keys
    assert {rows[key] for key in (7, 8, 9)} == {0, 2, 3}


def test_keys_without_room_get_rows_once_there_are_more():
    training = Training(config_of(2))
    training.step([1, 2, 3])
    compressed = vectors_of(training.params, training.state, [3], training.config)
    training.grow(4)
    assert 3 not in training.keys
    np.testing.assert_array_equal(
        vectors_of(training.params, training.state, [3], training.config), compressed
    )
    training.step([3])
    assert training.keys[3] == 2


def test_growth_by_nothing_changes_nothing():
    training = Training(config_of(8))
    training.steps(2)
    before = training.of_keys()
    training.grow(8)
    assert training.of_keys() == before


def test_half_precision_and_counts_of_steps_are_kept():
    config = config_of(6, param_dtype=jnp.bfloat16, refused=None)
    training = Training(config, qrhash.touched_rows(optax.adam(0.1, mu_dtype=jnp.float32)))
    training.steps(2)
    before = training.of_keys()
    dtypes = [x.dtype for x in jax.tree.leaves(training.opt_state)]
    training.grow(9)
    assert training.of_keys() == before
    assert [x.dtype for x in jax.tree.leaves(training.opt_state)] == dtypes
    count = next(x for x in jax.tree.leaves(training.opt_state) if x.shape == ())
    assert int(count) == 2


# --- on a mesh ------------------------------------------------------------------------------------

LAYOUTS = {
    "2x4": layout_2x4,
    "explicit": lambda: layout_2x4(AxisType.Explicit),
    "8 of both": lambda: make_layout((8,), ("data",), row_axes="data"),
    "on every device": lambda: make_layout((8,), ("data",), row_axes=()),
    "columns": lambda: layout_2x4(column_axis="data", batch_axes=()),
}


def _numbers(of_keys):
    """Of each key its count and its last step, its vector and its state."""
    return {
        key: [count, step, *np.frombuffer(b"".join(arrays), np.float32)]
        for key, (_, count, step, *arrays) in of_keys.items()
    }


@pytest.mark.parametrize("mesh", ["on every device", "columns"])
def test_on_a_mesh_every_key_keeps_row_vector_and_state(mesh):
    training = Training(config_of(22, admission=ExactCount(2, 800), layout=LAYOUTS[mesh]()))
    training.steps(8)
    before, candidates = training.of_keys(), training.state.admission
    full = int(training.state.index.num_keys)
    like = jax.tree.map(lambda each: each.sharding, (training.params, training.opt_state))
    training.grow(51)
    assert len(before) == full > 10
    assert training.of_keys() == before
    jax.tree.map(np.testing.assert_array_equal, training.state.admission, candidates)
    # Where a table that was as long from the start would be, and its state.
    long = Training(training.config, training.tx)
    for old, grown, new in zip(
        *map(jax.tree.leaves, (like, (training.params, training.opt_state))),
        jax.tree.leaves((long.params, long.opt_state)),
        strict=True,
    ):
        assert grown.shape == new.shape
        assert grown.sharding.is_equivalent_to(old, grown.ndim)
    training.step()
    training.step(np.arange(1000, 1016))


@pytest.mark.parametrize("mesh", ["2x4", "explicit"])
def test_on_a_mesh_growth_changes_nothing_but_the_room(mesh):
    """It is trained as a table of one device, which others show to be as if long from the start."""
    options = {"admission": ExactCount(2, 800), "eviction": StepsSinceUse(4)}
    trainings = [
        Training(config_of(90, layout=LAYOUTS[mesh](), **options), adam()),
        Training(config_of(90, **options), adam()),
    ]
    for number in range(10):
        for training in trainings:
            training.step()
            if number == 3:
                training.grow(200)
            if number == 6:
                training.evict()
    on_mesh, single = (_numbers(training.of_keys()) for training in trainings)
    assert len(on_mesh) > 40
    assert on_mesh.keys() == single.keys()
    for key, numbers in single.items():
        np.testing.assert_allclose(on_mesh[key], numbers, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "capacities"),
    [
        ("2x4", (1, 2, 9)),
        ("8 of both", (6, 7, 8, 8, 31)),
        ("explicit", (5, 40)),
        ("on every device", (5, 9)),
    ],
)
def test_on_a_mesh_all_rows_are_given_in_the_end(mesh, capacities):
    """However many rows divide by the shards; those of each capacity are full before the next."""
    config = config_of(capacities[0], layout=LAYOUTS[mesh](), refused=None)
    params, state = dynamic.init(jax.random.key(0), config), dynamic.init_state(config)
    for capacity in capacities:
        params, state, config = dynamic.grow(params, state, config, capacity)
        before = known(state)
        state, _ = dynamic.assign(state, np.arange(256), config, 0)
        after = known(state)
        assert sorted(row for row, _, _ in after.values()) == list(range(capacity))
        assert {key: after[key][0] for key in before} == {
            key: row for key, (row, *_) in before.items()
        }


def test_after_another_number_of_shards_a_table_grows():
    """The rows of its places are no longer those that the shards began with."""
    training = Training(config_of(30, layout=LAYOUTS["8 of both"](), refused=None))
    training.steps(6)
    want = known(training.state)
    config = config_of(30, layout=layout_2x4(), refused=None)
    state = dynamic.reshard(training.state, config)
    table = np.asarray(whole(training.params.table))
    params = training.params._replace(table=put_table(table, config.layout, is_large=True))
    assert known(state) == want
    params, state, config = dynamic.grow(params, state, config, 45)
    assert known(state) == want
    np.testing.assert_array_equal(whole(params.table)[:30], table)
    assert not np.asarray(whole(params.table))[30:].any()
    for start in range(0, 256, 16):
        state, _ = dynamic.assign(state, np.arange(start, start + 16), config, 9)
    assert sorted(row for row, _, _ in known(state).values()) == list(range(45))


def test_a_table_becomes_large_by_growing():
    """Until then it is on every device, and then its rows are split."""
    layout = layout_2x4()
    training = Training(config_of(20, layout=layout, large_table_rows=40))
    assert not isinstance(training.params.table, qrhash.ShardedTable)
    training.steps(3)
    before = training.of_keys()
    training.grow(50)
    assert isinstance(training.params.table, qrhash.ShardedTable)
    assert training.of_keys() == before
    training.step()


# --- refusals -------------------------------------------------------------------------------------


def test_fewer_rows_are_refused():
    for layout in (None, layout_2x4()):
        training = Training(config_of(8, layout=layout))
        with pytest.raises(ValueError, match="capacity must be at least the 8 rows that there are"):
            training.grow(7)


@pytest.mark.parametrize("shape", [(3, 2), (5, 3), (5,)])
def test_state_grows_for_longer_tables_alone(shape):
    tx, table = adagrad(), jnp.ones((4, 2))
    with pytest.raises(ValueError, match="tables of params with more rows"):
        qrhash.grow_rows(tx, tx.init(table), table, jnp.ones(shape))


def test_state_grows_for_trees_of_one_form():
    tx, params = adagrad(), {"a": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="grown must be a tree as params are"):
        qrhash.grow_rows(tx, tx.init(params), params, {"b": jnp.ones((5, 2))})
