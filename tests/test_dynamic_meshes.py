"""Tables that grow, on a mesh: each shard an index of its own, and the numbers of one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import qrhash
from qrhash import EmbedConfig, KeyDigits, Keys, dynamic
from qrhash.dynamic import (
    AdmitAll,
    DynamicConfig,
    ExactCount,
    LeastUsed,
    SketchCount,
    SmallNorm,
    StepsSinceUse,
)
from support.cases import OPTIMIZED
from support.meshes import layout_2x4, make_layout

UNCHECKED_KEYS = True

CAPACITY, WIDTH, BATCH = 96, 4, 32

LAYOUTS = {
    "2x4": layout_2x4,
    "explicit": lambda: layout_2x4(AxisType.Explicit, exchange="all_to_all"),
    "8 of both": lambda: make_layout((8,), ("data",), row_axes="data", exchange="all_to_all"),
}


def _config(layout, admission, capacity=CAPACITY, **options):
    refused = EmbedConfig(KeyDigits(8, num_tables=2), WIDTH, layout=layout, large_table_rows=1)
    return DynamicConfig(
        capacity,
        WIDTH,
        admission=admission,
        refused=refused,
        layout=layout,
        large_table_rows=1,
        **options,
    )


def _train(config, batches, cotangents):
    """What a run shows to the outside, and the vectors of all keys in the end."""
    tx = qrhash.touched_rows(optax.adagrad(0.1))
    params, state = dynamic.init(jax.random.key(0), config), dynamic.init_state(config)

    def step(params, state, opt_state, keys, cotangents, number):
        state, found = dynamic.assign(state, keys, config, number)
        params, new = dynamic.start_rows(params, found, config)
        opt_state = qrhash.reset_rows(tx, opt_state, params, new)

        def loss(params):
            return jnp.sum(dynamic.lookup(params, found, config) * cotangents)

        grads = qrhash.value_and_grad(loss, dynamic.large(config))(params)[1]
        updates, opt_state = tx.update(grads, opt_state, params)
        return qrhash.apply_updates(params, updates), state, opt_state, found.rows

    step = jax.jit(step, donate_argnums=(0, 1, 2))
    evict = jax.jit(dynamic.evict, static_argnums=2)
    opt_state, seen = tx.init(params), []
    for number, (keys, of_batch) in enumerate(zip(batches, cotangents, strict=True)):
        params, state, opt_state, rows = step(
            params, state, opt_state, Keys.of(keys), of_batch, number
        )
        has_row = np.asarray(rows.rows) < config.capacity
        seen.append((has_row.tolist(), np.asarray(rows.is_new).tolist()))
        seen.append((int(rows.not_admitted), int(rows.no_room), int(state.index.num_keys)))
        if number % 4 == 3:
            state, gone = evict(state, params, config, number)
            seen.append(int(gone))
    every = np.unique(np.concatenate(batches))
    found = dynamic.find(state, every, config)
    return seen, np.asarray(dynamic.lookup(params, found, config)), state


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    batches = [rng.integers(-30, 30, BATCH) for _ in range(8)]
    return batches, [rng.normal(size=(BATCH, WIDTH)).astype(np.float32) for _ in batches]


# Where the parts of a batch are numbered otherwise than the shards, and stand on several of them.
ORDERS = {
    "8 of both": lambda **options: make_layout((8,), ("data",), row_axes="data", **options),
    "bc, ca": lambda **options: make_layout(
        (2, 2, 2), ("a", "b", "c"), row_axes=("b", "c"), batch_axes=("c", "a"), **options
    ),
    "ca, abc": lambda **options: make_layout(
        (2, 2, 2), ("a", "b", "c"), row_axes=("c", "a"), batch_axes=("a", "b", "c"), **options
    ),
}


@functools.cache
def _rows_of(order=None, exchange="reduce", capacity=None):
    """All that the index says of some batches, few and then many of whose keys are new."""
    layout = order and ORDERS[order](exchange=exchange, capacity=capacity)
    config, rng = _config(layout, AdmitAll(), 8 * CAPACITY), np.random.default_rng(0)
    assign = jax.jit(lambda *x: dynamic.assign(*x[:2], config, x[2], where=x[3]))
    state, seen = dynamic.init_state(config), []
    for number, most in enumerate((20, 20, 20, 30, 30, 500)):
        keys, where = rng.integers(-most, most, 64), rng.random(64) < 0.8
        state, found = assign(state, Keys.of(keys), number, where)
        seen.append([*map(np.asarray, found.rows), int(state.index.num_keys)])
    return seen, np.sort(state.index.counts, axis=None)


@pytest.mark.parametrize(
    ("order", "capacity"),  # of which 1 is too little room
    [("8 of both", None), ("bc, ca", None), ("bc, ca", 1), ("ca, abc", None)],
)
def test_keys_travel_by_either_exchange(order, capacity):
    got, wanted = _rows_of(order, "all_to_all", capacity), _rows_of(order)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    # A mesh says of every key what one device does, but for the numbers of the rows.
    for (rows, *others), (alone, *of_one) in zip(got[0], _rows_of()[0], strict=True):
        np.testing.assert_array_equal(rows < 8 * CAPACITY, alone < 8 * CAPACITY)
        jax.tree.map(np.testing.assert_array_equal, others, of_one)


def test_keys_by_all_to_all_copy_no_index_and_do_not_go_everywhere():
    capacity = 2**16
    config = _config(ORDERS["8 of both"](exchange="all_to_all"), AdmitAll(), capacity)
    state, keys = dynamic.init_state(config), Keys.of(np.arange(256))
    step = jax.jit(lambda state, keys: dynamic.assign(state, keys, config, 0), donate_argnums=0)
    compiled = step.lower(state, keys).compile(OPTIMIZED).as_text()
    # What goes everywhere does so in a loop that is not taken: XLA is not to hoist it.
    assert "all-gather(" in compiled
    assert "all-gather(" not in compiled[compiled.index("ENTRY") :]
    assert not re.findall(rf"u32\[(?:1,)?{capacity // 8 * 2},4\]\S* copy\(", compiled)


ADMISSIONS = {"all": AdmitAll(), "exact": ExactCount(3, 800), "sketch": SketchCount(3, 80_000)}


@pytest.mark.parametrize(
    ("mesh", "admission"), [("2x4", "exact"), ("8 of both", "sketch"), ("explicit", "exact")]
)
def test_a_mesh_trains_the_numbers_of_one_device(mesh, admission, data):
    options = {"eviction": StepsSinceUse(3)}
    policy = ADMISSIONS[admission]
    wanted, vectors, _ = _train(_config(None, policy, **options), *data)
    config = _config(LAYOUTS[mesh](), policy, **options)
    got, of_mesh, state = _train(config, *data)
    assert got == wanted
    np.testing.assert_allclose(of_mesh, vectors, rtol=1e-5, atol=1e-6)
    # The keys are spread over the shards, and so is the memory of the index.
    assert state.index.slots.sharding.shard_shape(state.index.slots.shape)[0] == 1
    used = CAPACITY // config.layout.num_shards - np.asarray(state.index.num_free)
    assert used.min() > 0


def test_a_shard_without_room_refuses_its_own_keys():
    layout = LAYOUTS["2x4"]()
    config = _config(layout, AdmitAll(), capacity=8)
    state = dynamic.init_state(config)
    state, found = dynamic.assign(state, np.arange(64), config, 0)
    rows = np.asarray(found.rows.rows)
    assert int(state.index.num_keys) == 8
    assert int(found.rows.no_room) == 56
    assert sorted(rows[rows < 8].tolist()) == list(range(8))
    again = dynamic.find(state, np.arange(64), config)
    np.testing.assert_array_equal(again.rows.rows, rows)


@pytest.mark.parametrize("eviction", [LeastUsed(5), LeastUsed(5, by="step"), SmallNorm(1.0)])
def test_evictions_of_all_shards(eviction, rng):
    config = _config(LAYOUTS["2x4"](), AdmitAll(), eviction=eviction)
    state, params = dynamic.init_state(config), dynamic.init(jax.random.key(0), config)
    table = rng.normal(size=(CAPACITY, WIDTH)).astype(np.float32)
    params = params._replace(table=qrhash.ShardedTable.from_array(table, config.layout))
    counts = rng.permutation(20) + 1
    keys = np.repeat(np.arange(20), counts)
    state, _ = dynamic.assign(state, keys, config, 0)
    rows = np.asarray(dynamic.find(state, np.arange(20), config).rows.rows)
    if isinstance(eviction, SmallNorm):
        gone = set(np.flatnonzero((table[rows] ** 2).sum(1) / 2 < 1.0).tolist())
    else:
        gone = set(np.argsort(counts)[:15].tolist())
    state, count = dynamic.evict(state, params, config, 0)
    after = np.asarray(dynamic.find(state, np.arange(20), config).rows.rows)
    lost = set(np.flatnonzero(after == CAPACITY).tolist())
    assert len(lost) == int(count) == len(gone)
    if getattr(eviction, "by", None) != "step":  # all were met at the same step
        assert lost == gone


def test_rows_need_not_divide_by_the_shards():
    """Two shards of four have a place less, and no key gets a row that is not there."""
    config = _config(LAYOUTS["2x4"](), AdmitAll(), capacity=6, eviction=StepsSinceUse(1))
    state, params = dynamic.init_state(config), dynamic.init(jax.random.key(0), config)
    assert int(state.index.num_keys) == 0
    for step in (0, 5):
        state, found = dynamic.assign(state, np.arange(64) + step, config, step)
        rows = np.asarray(found.rows.rows)
        assert sorted(rows[rows < 6].tolist()) == list(range(6))
        assert int(found.rows.no_room) == 58
        assert int(state.index.num_keys) == 6
        state, gone = dynamic.evict(state, params, config, step + 2)
        assert (int(gone), int(state.index.num_keys)) == (6, 0)
