"""Tables that grow on another number of shards: every key has what it had."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import qrhash
from qrhash import EmbedConfig, KeyDigits, Keys, ShardedTable, dynamic
from qrhash.checkpoint import Checkpoints, MismatchError
from qrhash.dynamic import AdmitAll, DynamicConfig, ExactCount, SketchCount, SmallNorm, resharding
from qrhash.dynamic.sharded import owner_of
from support.dynamic_training import known
from support.meshes import layout_2x4, make_layout

pytestmark = pytest.mark.usefixtures("quickly_compiled")

WIDTH = 4

# By the number of shards.
LAYOUTS = {
    None: lambda: None,
    1: lambda: make_layout((1,), ("model",)),
    4: layout_2x4,
    8: lambda: make_layout((8,), ("data",), row_axes="data"),
}


def _config(shards, capacity=90, **options):
    layout = LAYOUTS[shards]()
    refused = EmbedConfig(KeyDigits(6, num_tables=2), WIDTH, layout=layout, large_table_rows=1)
    options = {"refused": refused, "large_table_rows": 1} | options
    return DynamicConfig(capacity, WIDTH, layout=layout, **options)


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
    return {key: (count, step) for key, count, step in zip(*map(np.ndarray.tolist, parts))}


@pytest.mark.parametrize("capacity", [96, 90])
def test_keys_keep_rows_counts_and_steps_on_any_number_of_shards(capacity):
    options = {"capacity": capacity, "admission": ExactCount(3, 400)}
    config = _config(8, **options)
    state = _assigned(config)
    want, candidates = known(state), _candidates(state)
    assert len(want) > 20
    assert len(candidates) > 10
    assert {row % 8 for row, _, _ in want.values()} == set(range(8))
    for shards in (4, 1, None, 8, None, 4):
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


@settings(max_examples=60)
@given(
    keys=st.dictionaries(
        st.integers(0, 2**64 - 1),
        st.tuples(st.integers(1, 3), st.integers(0, 3)),
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
    if want:
        columns = [np.array(each) for each in zip(*want.values(), strict=True)]
        entries = resharding._Entries(Keys.of(np.array([*want], np.uint64)), *columns[1:], columns[0])
        entries = jax.tree.map(lambda x: x.astype(np.int32) if x.dtype == np.int64 else x, entries)
        index = resharding._index_of(entries, columns[0], np.ones(CAPACITY, bool))
        state = dataclasses.replace(state, index=index)
    for shards in way:
        state = resharding.deal(state, shards, AdmitAll())
        if shards is not None:
            latest = sorted(want, key=lambda key: (-want[key][2], -want[key][1], want[key][0]))
            owner = dict(zip(want, owner_of(Keys.of(np.array([*want], np.uint64)), shards)))
            places = -(-CAPACITY // shards)
            kept = [[key for key in latest if owner[key] == s][:places] for s in range(shards)]
            want = {key: want[key] for key in itertools.chain(*kept)}
        assert known(state) == want
