"""Tables on a mesh: the numbers of one device, while only rows of the batch are moved."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qrhash
from qrhash import CollectionConfig, EmbedConfig, MeshLayout, RowGrads, ShardedTable, collection
from qrhash.sharded import MeshStorage
from support import oracle
from support.cases import FEATURES, OPTIMIZED, assert_close, parameters
from support.meshes import BOTH, dense, layout_2x4, make_layout, whole

UNCHECKED_KEYS = True

LAYOUTS = {
    "8 model": make_layout((8,), ("model",)),
    "8 data": make_layout((8,), ("data",)),
    "8 data, all rows": make_layout((8,), ("data",), row_axes=()),
    "reduce": layout_2x4(exchange="reduce"),
    "all to all": layout_2x4(exchange="all_to_all"),
    "overflow": layout_2x4(exchange="all_to_all", capacity=1),
    "both": layout_2x4(row_axes=BOTH, batch_axes=BOTH, exchange="all_to_all"),
    "columns": make_layout((2, 2, 2), (*BOTH, "c"), column_axis="c", exchange="all_to_all"),
}
per_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)

NUM_IDS = 1003
PARTITIONS = {
    2: qrhash.QuotientRemainder(NUM_IDS, 3),
    3: qrhash.MixedRadix(NUM_IDS, (41, 5, 5)),  # Of 5 rows, not every shard has one.
}


def _config(layout, k=2, operation="mult", **options):
    """Of two tables one is small; of three none."""
    options = {"id_policy": "zero", "large_table_rows": 5, "layout": layout} | options
    return EmbedConfig(PARTITIONS[k], FEATURES, operation, **options)


def _on_mesh(tables, cfg):
    layouts = map(cfg.table_layout, range(cfg.num_tables))
    return tuple(
        table if layout is None else ShardedTable.from_array(table, layout)
        for table, layout in zip(tables, layouts, strict=True)
    )


def _is_sharded(node):
    return isinstance(node, ShardedTable)


def _scan(step, params, state, batches, layout):
    """Parameters, state and losses, from one program: XLA's host devices, which share their
    threads, can block each other when several steps are in flight.
    """
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    if layout is not None:
        place = lambda leaf: NamedSharding(layout.mesh, layout.batch_spec(leaf.ndim, 1))  # noqa: E731
        batches = jax.device_put(batches, jax.tree.map(place, batches))

    @jax.jit
    def run(params, state, batches):
        body = lambda carry, batch: ((out := step(*carry, *batch))[:2], out[2])  # noqa: E731
        (params, state), losses = jax.lax.scan(body, (params, state), batches)
        return whole(params), losses

    return run(params, state, batches)


# --- the layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "rows", "batch"),
    [
        (("model",), ("model",), ()),
        (("data",), ("data",), ("data",)),
        (BOTH, ("model",), ("data",)),
        (("x", "y"), ("x", "y"), ()),
    ],
)
def test_rows_go_over_model_and_the_batch_over_data(names, rows, batch):
    layout = make_layout((1,) * len(names), names)
    assert (layout.row_axes, layout.batch_axes, layout.column_axis) == (rows, batch, None)
    assert (layout.exchange, layout.capacity) == ("auto", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_axes": "x"}, "row_axes must be.* 'x'"),
        ({"batch_axes": ("data", "x")}, "batch_axes must be.* 'x'"),
        ({"column_axis": "x"}, "column_axis must be.* 'x'"),
        ({"row_axes": ("model", "model")}, r"row_axes must.* \('model', 'model'\)"),
        ({"batch_axes": ("data", "data")}, r"batch_axes must.* \('data', 'data'\)"),
        ({"column_axis": "model"}, "column_axis must be.* 'model'"),
        ({"column_axis": "data"}, "column_axis must be.* 'data'"),
        ({"exchange": "ring"}, "exchange must be one of auto, reduce, all_to_all, got 'ring'"),
        ({"capacity": 0}, "capacity must be.* 0"),
        ({"row_axes": 5}, "row_axes must be.* got 5"),
        ({"batch_axes": 5}, "batch_axes must be.* got 5"),
    ],
)
def test_what_a_sharding_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        layout_2x4(**options)


@pytest.mark.parametrize("mesh", ["data", None])
def test_a_sharding_takes_nothing_but_a_mesh(mesh):
    with pytest.raises(ValueError, match=rf"mesh must be a jax\.sharding\.Mesh, got {mesh!r}"):
        MeshLayout(mesh=mesh)


def test_a_config_takes_no_other_sharding():
    with pytest.raises(ValueError, match=r"layout must be a qrhash\.MeshLayout, got .*Mesh"):
        _config(LAYOUTS["reduce"].mesh)
    with pytest.raises(ValueError, match=r"width .*2 devices.*'c'.* 7"):
        EmbedConfig(PARTITIONS[2], 7, large_table_rows=5, layout=LAYOUTS["columns"])


def test_equal_shardings_are_one_key_and_none_can_be_changed():
    layout = LAYOUTS["overflow"]
    assert {layout: 1}[layout_2x4(exchange="all_to_all", capacity=1)] == 1
    assert layout not in {layout_2x4(exchange="all_to_all", capacity=2): 2}
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.capacity = 2


@pytest.mark.parametrize("num_rows", [1, 8, 29])
@per_layout
def test_row_r_is_row_r_div_s_of_shard_r_mod_s(layout, num_rows):
    table = np.arange(num_rows * FEATURES, dtype=np.float32).reshape(num_rows, FEATURES)
    sharded = ShardedTable.from_array(table, layout)
    shards = layout.num_shards
    assert (sharded.shape, sharded.dtype, sharded.ndim) == (table.shape, table.dtype, 2)
    assert sharded.array.shape == (shards, -(-num_rows // shards), FEATURES)
    array = np.asarray(sharded.array)
    for r, row in enumerate(table):
        np.testing.assert_array_equal(array[r % shards, r // shards], row)
    np.testing.assert_array_equal(jax.jit(whole)(sharded), table)
    assert jax.tree.leaves(sharded) == [sharded.array]


def _assert_split(array, layout):
    """[S, R, ...]: no device holds more than its own shard, or part of it."""
    shards, rows, *width = array.shape
    columns = 1 if layout.column_axis is None else layout.mesh.shape[layout.column_axis]
    local = (shards // layout.num_shards, rows, *(each // columns for each in width))
    assert {shard.data.shape for shard in array.addressable_shards} == {local}
    assert array.sharding.device_set == set(layout.mesh.devices.flat)


@per_layout
@pytest.mark.usefixtures("keys_used_once")
def test_init_gives_the_numbers_of_one_device_and_each_device_its_shard(layout):
    cfg = _config(layout)
    tables = qrhash.init(jax.random.key(0), cfg)
    want = qrhash.init(jax.random.key(0), _config(None))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(whole)(tables), want)
    large, small = tables
    assert isinstance(large, ShardedTable)
    assert isinstance(small, jax.Array)
    _assert_split(large.array, layout)
    where = NamedSharding(layout.mesh, cfg.table_specs[0])
    assert where.is_equivalent_to(large.array.sharding, large.array.ndim)
    assert cfg.table_specs[1] == PartitionSpec(None, None)


@pytest.mark.parametrize("name", ["both", "columns"])
@pytest.mark.usefixtures("keys_used_once")
def test_custom_initializers_fill_their_tables(name):
    constant = nn.initializers.constant
    for embedding_init, want in [(constant(3.0), (3, 3)), ((constant(1.0), constant(2.0)), (1, 2))]:
        cfg = _config(LAYOUTS[name], embedding_init=embedding_init, large_table_rows=3)
        tables = qrhash.init(jax.random.key(0), cfg)
        assert all(map(_is_sharded, tables))
        for table in tables:
            _assert_split(table.array, LAYOUTS[name])
        for table, shape, value in zip(jax.jit(whole)(tables), cfg.table_shapes, want, strict=True):
            np.testing.assert_array_equal(table, np.full(shape, value))


def test_a_random_initializer_draws_every_row_anew():
    cfg = _config(LAYOUTS["columns"], embedding_init=nn.initializers.normal(1.0))
    table = np.asarray(jax.jit(whole)(qrhash.init(jax.random.key(0), cfg)[0]))
    assert len(np.unique(table)) == table.size
    assert abs(table.std() - 1) < 0.1


@pytest.mark.parametrize(
    "embedding_init", [None, nn.initializers.normal(1.0)], ids=["default", "normal"]
)
def test_no_device_ever_holds_a_whole_table(embedding_init):
    """Compiled, not run: 2**24 rows."""
    layout = LAYOUTS["8 model"]
    partition = qrhash.FullTable(2**24)
    cfg = EmbedConfig(partition, FEATURES, embedding_init=embedding_init, layout=layout)
    init = functools.partial(qrhash.init, config=cfg)
    to = layout.shardings(jax.eval_shape(init, jax.random.key(0)))
    lowered = jax.jit(init, out_shardings=to).lower(jax.random.key(0))
    compiled = lowered.compile(OPTIMIZED)
    memory, shard = compiled.memory_analysis(), 4 * FEATURES * 2**24 // 8
    assert memory.output_size_in_bytes == pytest.approx(shard, rel=0.01)
    assert memory.temp_size_in_bytes < 4 * shard


def test_zipf_ids_load_all_shards_alike():
    """Distinct rows of a batch; contiguous blocks would put most of them on one shard."""
    num_rows, batch, shards = 10**6, 65536, 8
    weights = np.arange(1, num_rows + 1) ** -1.05
    ids = np.random.default_rng(0).choice(num_rows, batch, p=weights / weights.sum())
    rows = np.unique(ids)
    numbers = ShardedTable.from_array(np.arange(num_rows)[:, None], LAYOUTS["8 model"])
    served = np.isin(np.asarray(numbers.array), rows).sum((1, 2))
    assert served.sum() == len(rows)
    assert served.max() <= 1.2 * served.mean()
    blocks = np.bincount(rows // (num_rows // shards), minlength=shards)
    assert blocks.max() > 1.2 * blocks.mean()


# --- batches --------------------------------------------------------------------------------------


@per_layout
def test_a_batch_is_split_over_the_batch_axes(layout):
    batch = {"ids": np.arange(16), "bags": np.ones((16, 3), np.float32)}
    assert qrhash.batches.process_rows(16, layout) == slice(0, 16)
    qrhash.batches.check_batch(16, layout)
    put = qrhash.batches.put_batch(batch, 16, layout)
    parts = math.prod(layout.mesh.shape[axis] for axis in layout.batch_axes)
    for name, array in put.items():
        np.testing.assert_array_equal(array, batch[name])
        shapes = {shard.data.shape for shard in array.addressable_shards}
        assert shapes == {(16 // parts, *batch[name].shape[1:])}


@pytest.mark.parametrize(
    "refuse",
    [
        lambda layout: qrhash.batches.check_batch(12, layout),
        lambda layout: qrhash.batches.process_rows(12, layout),
        lambda layout: qrhash.batches.put_batch(np.arange(12), 12, layout),
    ],
    ids=["check_batch", "process_rows", "put_batch"],
)
def test_a_batch_that_does_not_divide_is_refused(refuse):
    with pytest.raises(ValueError, match="8 devices of mesh axes data, model, got 12"):
        refuse(LAYOUTS["both"])


@pytest.mark.parametrize(
    ("batch", "shape"),
    [(np.arange(8), r"\(8,\)"), (3, r"\(\)"), ({"a": np.ones(16), "b": [1.0] * 16}, r"\(\)")],
    ids=["other rows", "scalar", "list"],
)
def test_a_batch_of_other_rows_is_refused(batch, shape):
    with pytest.raises(
        ValueError, match=f"arrays of 16 rows, .* 0 to 16 of 16.* got shape {shape}"
    ):
        qrhash.batches.put_batch(batch, 16, LAYOUTS["both"])


# --- look-ups and gradients -----------------------------------------------------------------------

SHAPES = ((), (7,), (8, 2))  # 8 divides by all batch axes, 7 by none.


@pytest.mark.parametrize(
    ("name", "k", "operation", "policy"),
    [
        ("8 model", 3, "add", "nan"),
        ("8 data", 2, "project", "zero"),
        ("8 data, all rows", 2, "mult", "nan"),
        ("reduce", 3, "concat", "zero"),
        ("all to all", 2, "mult", "nan"),
        ("overflow", 3, "add", "zero"),
        ("both", 2, "concat", "nan"),
        ("columns", 2, "project", "zero"),
    ],
)
def test_look_ups_and_gradients_are_those_of_loops_over_ids(name, k, operation, policy, rng):
    """Ids with duplicates, some outside the vocabulary; gradients dense and by rows."""
    cfg = _config(LAYOUTS[name], k, operation, id_policy=policy, large_table_rows=6)
    tables, projection = parameters(cfg, rng)
    ids = [rng.integers(-2, 9, shape, np.int32) * (NUM_IDS // 7) for shape in SHAPES]
    weights = [rng.standard_normal((*shape, FEATURES)).astype(np.float32) for shape in SHAPES]

    def loss(params, ids):
        vectors = [qrhash.lookup(params[0], each, cfg, params[1]) for each in ids]
        pairs = zip(vectors, weights, strict=True)
        return sum((jnp.where(jnp.isnan(v), 0, v) * w).sum() for v, w in pairs), vectors

    @jax.jit
    def both_ways(params, ids):
        want, vectors = jax.grad(loss, has_aux=True)(params, ids)
        by_rows = qrhash.value_and_grad(loss, (cfg.large_tables, False), has_aux=True)
        (_, again), grads = by_rows(params, ids)
        return (vectors, whole(want)), (again, dense(grads))

    grads, of_projection = oracle.gradient(tables, ids, weights, cfg, projection)
    for vectors, got in both_ways((_on_mesh(tables, cfg), projection), ids):
        for each, some in zip(vectors, ids, strict=True):
            assert_close(each, oracle.lookup(tables, some, cfg, projection))
        jax.tree.map(assert_close, jax.tree.leaves(got), [*grads, *(of_projection or ())])


@pytest.mark.parametrize("name", ["reduce", "overflow", "columns"])
def test_gather_counts_no_row_from_the_end(name):
    table = np.arange(10 * FEATURES, dtype=np.float32).reshape(10, FEATURES)
    sharded = ShardedTable.from_array(table, LAYOUTS[name])
    index = np.array([[9, -1], [0, 10], [9, 2**31], [3, 3]])
    want = np.where((index >= 0) & (index < 10), index, 10)
    fills = (np.nan, 0.0, -1.0)
    found = jax.jit(lambda t: [qrhash.gather((t,), (index,), fill_value=f) for f in fills])
    for (rows,), fill in zip(found(sharded), fills, strict=True):
        padded = np.append(table, np.full((1, FEATURES), fill, np.float32), 0)
        np.testing.assert_array_equal(rows, padded[want])


@pytest.mark.parametrize("operation", ["add", "concat", "mult"])
@pytest.mark.parametrize("name", ["all to all", "columns"])
def test_attend_is_the_product_with_all_vectors(name, operation, rng):
    cfg = _config(LAYOUTS[name], 2, operation)
    tables, _ = parameters(cfg, rng)
    query = jnp.asarray(rng.standard_normal((3, FEATURES)), jnp.float32)
    attend = jax.jit(functools.partial(qrhash.attend, config=cfg))
    vectors = oracle.lookup(tables, np.arange(NUM_IDS), cfg)
    assert_close(attend(_on_mesh(tables, cfg), query), query @ vectors.T.astype(np.float32))


@pytest.mark.parametrize("name", ["overflow", "columns"])
def test_row_gradients_add_up_and_have_the_norm_of_dense_ones(name, rng):
    """Of one batch that the devices share, and of one that they do not; -1 names no row."""
    table = rng.standard_normal((29, FEATURES)).astype(np.float32)
    index = [rng.integers(-1, 9, shape, np.int32) for shape in [(8, 2), (3,)]]
    tx = qrhash.touched_rows(optax.sgd(-1.0))

    def loss(table, index):
        return ((qrhash.gather((table,), (index,), fill_value=0.0)[0] + 1) ** 2).sum()

    @jax.jit
    def algebra(table, *index):
        a, b = (whole(jax.grad(loss)(table, each)) for each in index)
        g, h = (qrhash.value_and_grad(loss, True)(table, each)[1].array for each in index)
        with pytest.raises(ValueError, match="before they are merged"):
            g.merge() + h
        updates = lambda g: tx.update(table.with_array(g), tx.init(table), table)[0].array  # noqa: E731
        pairs = [
            *[(g + h, a + b), (h + g, a + b), (g + g, 2 * a), (sum([g, h, h]), a + 2 * b)],
            *[((table.with_array(g) + table.with_array(h)).array, a + b)],
            *[((0.5 * table.with_array(g)).array, a / 2)],
            *[(sum([table.with_array(g), -table.with_array(h) / 2]).array, a - b / 2)],
            *[(g - h, a - b), (-g, -a), (2 * g, 2 * a), (g * 0.5, a / 2), (h / 2, b / 2)],
            *[(g.merge(), a), (g.merge().merge(), a), (2 * (g + h).merge(), 2 * (a + b))],
            *[
                (updates(g.merge()), a),
                (updates(2 * (g + h)) / 2, a + b),
                (-updates(g + h), -a - b),
            ],
        ]
        got, want = ([*each] for each in zip(*pairs, strict=True))
        norms = [qrhash.global_norm((table.with_array(g), a)), optax.global_norm((a, a))]
        return ([dense(table.with_array(each)) for each in got], want), norms

    for got, want in algebra(ShardedTable.from_array(table, LAYOUTS[name]), *index):
        jax.tree.map(assert_close, got, want)


# --- collections ----------------------------------------------------------------------------------


def _collection(layout):
    day = EmbedConfig(qrhash.FullTable(3), FEATURES, layout=layout)
    page = _config(layout, 3, "add", large_table_rows=6)
    return CollectionConfig({"item": _config(layout), "last": "item", "page": page, "day": day})


def _pooled(stacks, ids, config):
    vectors = collection.lookup(stacks, ids, config)
    return sum(v.sum(1) if v.ndim == 3 else v for _, v in sorted(vectors.items()))


@pytest.mark.parametrize("name", ["overflow", "columns"])
def test_a_collection_is_made_and_trained_as_on_one_device(name, rng):
    ids = {
        "item": rng.integers(-1, NUM_IDS, (10, 16)),
        "last": rng.integers(-1, NUM_IDS, (10, 16, 3)),
        "page": rng.integers(-1, 9, (10, 16)),
        "day": rng.integers(0, 3, (10, 16)),
    }
    batches = [({name: np.int32(each[t]) for name, each in ids.items()},) for t in range(10)]
    ends = []
    for layout in (None, LAYOUTS[name]):
        config, tx = _collection(layout), qrhash.touched_rows(optax.adagrad(0.1))
        stacks = collection.init(jax.random.key(0), config)
        assert any(map(_is_sharded, stacks.values())) == (layout is not None)

        def step(stacks, state, ids, config=config, tx=tx):
            loss = lambda stacks: ((_pooled(stacks, ids, config) - 1) ** 2).sum()  # noqa: E731
            value, grads = qrhash.value_and_grad(loss, config.large_tables)(stacks)
            updates, state = tx.update(grads, state, stacks)
            return qrhash.apply_updates(stacks, updates), state, value

        ends.append(_scan(step, stacks, tx.init(stacks), batches, layout))
    jax.tree.map(assert_close, *reversed(ends))


@pytest.mark.parametrize("name", ["reduce", "columns"])
def test_a_stack_on_a_mesh_comes_apart_and_together(name, rng):
    config = _collection(LAYOUTS[name])
    tables = {name: parameters(cfg, rng)[0] for name, cfg in config.own_configs.items()}
    stacks = collection.stack(tables, config)
    made = jax.eval_shape(functools.partial(collection.init, config=config), jax.random.key(0))
    assert jax.tree.structure(stacks) == jax.tree.structure(made)
    apart = jax.jit(functools.partial(collection.unstack, config=config))(stacks)
    jax.tree.map(np.testing.assert_array_equal, apart, tables)


# --- training -------------------------------------------------------------------------------------


def _squares(vectors, targets):
    return ((vectors - targets) ** 2).sum() / 8


def _step(cfg, tx, by_rows, criterion=_squares):
    """(tables, state, ids, targets) -> (tables, state, loss)."""

    def step(tables, state, ids, targets):
        def loss(tables):
            return criterion(qrhash.lookup(tables, ids, cfg), targets)

        if by_rows:
            value, grads = qrhash.value_and_grad(loss, cfg.large_tables)(tables)
            updates, state = qrhash.touched_rows(tx).update(grads, state, tables)
            return qrhash.apply_updates(tables, updates), state, value
        value, grads = jax.value_and_grad(loss)(tables)
        updates, state = tx.update(grads, state, tables)
        return optax.apply_updates(tables, updates), state, value

    return step


@functools.cache
def _start(k):
    return parameters(_config(None, k), np.random.default_rng(0))[0]


@functools.cache
def _skewed(steps=50, rows=16):
    """Ids [rows, 3] and targets; few ids are most of a batch, and one is none."""
    rng = np.random.default_rng(0)
    ids = rng.zipf(1.2, (steps, rows, 3)) % (NUM_IDS + 1) - 1
    targets = rng.standard_normal((*ids.shape, FEATURES)).astype(np.float32)
    return list(zip(ids.astype(np.int32), targets, strict=True))


def _init(cfg, tx):
    tables = qrhash.init(jax.random.key(0), cfg)
    return tables, qrhash.touched_rows(tx).init(tables)


def _train(cfg, k, tx, by_rows, batches):
    """Tables and losses."""
    tables = _on_mesh(_start(k), cfg)
    state = qrhash.touched_rows(tx).init(tables)
    return _scan(_step(cfg, tx, by_rows), tables, state, batches, cfg.layout)


@functools.cache
def _on_one_device(k):
    return _train(_config(None, k), k, optax.adagrad(0.1), False, _skewed())


def _assert_same_end(got, want):
    jax.tree.map(assert_close, got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)


@pytest.mark.parametrize("by_rows", [True, False], ids=["by rows", "dense"])
@pytest.mark.parametrize(
    ("name", "k"),
    [(name, 3 if name in ("8 data", "all to all", "overflow") else 2) for name in LAYOUTS],
)
def test_fifty_steps_of_adagrad_end_where_one_device_ends(name, k, by_rows):
    got = _train(_config(LAYOUTS[name], k), k, optax.adagrad(0.1), by_rows, _skewed())
    _assert_same_end(got, _on_one_device(k))
    assert all((a != b).any() for a, b in zip(got[0], _start(k), strict=True))


def _now_and_then(steps=10):
    """Of every second batch all rows are on one shard."""
    rng = np.random.default_rng(0)
    for t in range(steps):
        rows = np.repeat(np.arange(24), 2) * (1, 4)[t % 2] + rng.integers(200)
        targets = rng.standard_normal((16, 3, FEATURES)).astype(np.float32)
        yield 3 * rows.reshape(16, 3).astype(np.int32), targets


NOW_AND_THEN = layout_2x4(exchange="all_to_all", capacity=2)


def test_an_exchange_overflows_now_and_then():
    cfg = _config(NOW_AND_THEN)

    @jax.jit
    def overflows(tables, ids):
        loss = lambda tables: qrhash.lookup(tables, ids, cfg).sum()  # noqa: E731
        grads, _ = qrhash.value_and_grad(loss, cfg.large_tables)(tables)[1]
        return grads.array.pack().overflows

    tables = _on_mesh(_start(2), cfg)
    assert [overflows(tables, ids).item() for ids, _ in _now_and_then()] == [False, True] * 5


@pytest.mark.parametrize(
    "tx",
    [
        qrhash.rowwise_adagrad(0.1),
        optax.sgd(0.02),
        optax.chain(optax.clip_by_global_norm(0.5), optax.adagrad(0.1)),
    ],
    ids=["rowwise", "sgd", "clip"],
)
def test_other_optimizers_end_where_one_device_ends(tx):
    batches = list(_now_and_then())
    want = _train(_config(None), 2, tx, False, batches)
    _assert_same_end(_train(_config(NOW_AND_THEN), 2, tx, True, batches), want)


@pytest.mark.parametrize("tx", [optax.adagrad(0.1), qrhash.rowwise_adagrad(0.1)])
@pytest.mark.parametrize("name", ["reduce", "both", "columns"])
def test_state_is_laid_out_as_the_tables_are(name, tx):
    tables, state = _init(_config(LAYOUTS[name]), tx)
    want = tx.init(tables)
    assert jax.tree.structure(state) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, state, want)
    sharded = [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_sharded) if _is_sharded(leaf)]
    assert len(sharded) == 1
    _assert_split(sharded[0].array, LAYOUTS[name])


@pytest.mark.parametrize(
    ("tx", "num_rows", "width"),
    [
        (optax.adafactor(0.1), 1024, 128),  # A shard as long as it is wide
        (optax.adafactor(0.1), 1016, 128),  # One row more, and it keeps other state
        (optax.adafactor(0.1), 1600, 127),  # One column more, and it does
        (optax.flatten(optax.adagrad(0.1)), NUM_IDS, FEATURES),
    ],
    ids=["adafactor", "adafactor, longer", "adafactor, wider", "flatten"],
)
def test_state_that_does_not_go_by_rows_is_made_and_refused(tx, num_rows, width):
    layout = LAYOUTS["8 model"]
    cfg = EmbedConfig(qrhash.FullTable(num_rows), width, large_table_rows=5, layout=layout)
    tables, tx = qrhash.init(jax.random.key(0), cfg), qrhash.touched_rows(tx)
    state = tx.init(tables)
    grads = RowGrads(jnp.arange(8), jnp.ones((8, width)), num_rows, storage=MeshStorage(layout))
    with pytest.raises(ValueError, match=r"one row per row of a table.*densely"):
        tx.update((tables[0].with_array(grads),), state, tables)


# --- an overflow is noticed -----------------------------------------------------------------------


def _of_one_shard(rng):
    """What a look-up and a step of plain descent make of ids that all go to shard 0: got, want."""
    cfg = _config(NOW_AND_THEN)
    tables, tx = _start(2), qrhash.touched_rows(optax.sgd(-1.0))
    ids = 12 * rng.permutation(64).astype(np.int32)
    weights = rng.standard_normal((64, FEATURES)).astype(np.float32)

    @jax.jit
    def run(tables, ids):
        loss = lambda tables: (qrhash.lookup(tables, ids, cfg) * weights).sum()  # noqa: E731
        _, grads = qrhash.value_and_grad(loss, cfg.large_tables)(tables)
        updates, _ = tx.update(grads, tx.init(tables), tables)
        blank = jax.tree.map(jnp.zeros_like, tables)
        after = whole(qrhash.apply_updates(blank, updates))
        return qrhash.lookup(tables, ids, cfg), after, dense(updates)

    rows = [np.asarray(t)[i] for t, i in zip(tables, (ids // 3, ids % 3), strict=True)]
    grads, _ = oracle.gradient(tables, [ids], [weights], cfg)
    got = run(_on_mesh(tables, cfg), ids)
    return got, (rows[0] * rows[1], grads, grads)


def test_an_overflow_loses_nothing(rng):
    jax.tree.map(assert_close, *_of_one_shard(rng))


def _updates_of_an_overflow(tx, rng):
    """(Norm, updates) of a table, and its gradient."""
    (table, _), index = _start(2), 4 * rng.permutation(64).astype(np.int32)
    with_none = np.append(index, [-1, len(table)] * 4).astype(np.int32)

    @jax.jit
    def run(table):
        gather = functools.partial(qrhash.gather, fill_value=1.0)
        loss = lambda table: (gather((table,), (with_none,))[0] ** 2).sum()  # noqa: E731
        _, grads = qrhash.value_and_grad(loss, True)(table)
        updates, _ = tx.update(grads, tx.init(table), table)
        return qrhash.global_norm(updates), dense(updates)

    want = np.zeros(table.shape, np.float32)
    want[index] = 2 * np.asarray(table)[index]
    return *run(ShardedTable.from_array(table, NOW_AND_THEN)), want


def test_updates_of_an_overflow_have_their_norm(rng):
    norm, updates, gradient = _updates_of_an_overflow(qrhash.touched_rows(optax.sgd(-1.0)), rng)
    assert_close(updates, gradient)
    assert_close(norm, np.linalg.norm(gradient))


def test_updates_of_an_overflow_can_be_transformed_again(rng):
    tx = [qrhash.touched_rows(optax.sgd(rate)) for rate in (-1.0, -2.0)]
    _, updates, gradient = _updates_of_an_overflow(optax.chain(*tx), rng)
    assert_close(updates, 2 * gradient)


def test_an_overflow_that_nobody_notices_would_be_seen(rng, monkeypatch):
    claim = qrhash.exchange.claim_slots
    for room in (qrhash.exchange, qrhash.exchange_grads):
        blind = lambda *args: (claim(*args)[0], jnp.bool_(False))  # noqa: E731
        monkeypatch.setattr(room, "claim_slots", blind)
    (vectors, tables, _), want = _of_one_shard(rng)
    for got, wanted in [(vectors, want[0]), (tables[0], want[1][0])]:
        lost = ~np.isclose(got, wanted, atol=1e-5).all(-1)
        assert 0 < lost.sum() < 64
        assert not np.asarray(got)[lost].any()


# --- what is moved --------------------------------------------------------------------------------

LONG = qrhash.QuotientRemainder(3 * 40_003, 3)
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"),
    *("ragged-all-to-all", "collective-broadcast"),
)
_BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4}


@dataclasses.dataclass
class Instruction:
    """One line of HLO: its name, the shapes of its result, its operation and the rest."""

    name: str
    shapes: list
    operation: str
    rest: str

    @property
    def is_collective(self):
        return self.operation.removesuffix("-start") in COLLECTIVES


def _computations(text):
    """{name: its instructions}; the main one is the last."""
    computations, here = {}, None
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            here = computations[head[1]] = []
        elif match := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)", line):
            shapes = [
                (dtype, math.prod(int(d) for d in dims.split(",") if d))
                for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[2])
            ]
            here.append(Instruction(match[1], shapes, match[3], match[4]))
    return computations


def _sizes_moved(text):
    """For each collective (operation, elements of its operands or its results)."""
    instructions = list(itertools.chain(*_computations(text).values()))
    sizes = {each.name: sum(size for _, size in each.shapes) for each in instructions}
    for each in filter(lambda each: each.is_collective, instructions):
        operands = re.findall(r"%([\w.-]+)", each.rest.split(")")[0])
        yield each.operation, max(sizes[each.name], sum(sizes[name] for name in operands))


def _assert_moves_no_table(text, elements):
    assert [moved for moved in _sizes_moved(text) if moved[1] >= elements] == []


def _compiled(layout, batch, options=OPTIMIZED):
    """A step by rows on a table of 40,003 rows, of a batch's shape alone.

    The loss is linear: nothing but the library's care orders the reads before the updates.
    """
    cfg = EmbedConfig(LONG, FEATURES, layout=layout)
    tx = optax.adagrad(0.1)
    batch = (jnp.zeros(batch, jnp.int32), jnp.zeros((batch, FEATURES)))
    place = lambda leaf: NamedSharding(layout.mesh, layout.batch_spec(leaf.ndim))  # noqa: E731
    shapes = jax.eval_shape(functools.partial(_init, cfg, tx))
    args = jax.tree.map(
        lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to),
        (*shapes, *batch),
        (*layout.shardings(shapes), *map(place, batch)),
    )
    step = _step(cfg, tx, by_rows=True, criterion=jnp.vdot)
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile(options)


def _copies(text, rows):
    return re.findall(rf"= \(?f32\[(?:1,)?{rows},{FEATURES}\]\S* copy(?:-start)?\(", text)


@pytest.mark.parametrize("exchange", ["reduce", "all_to_all"])
def test_a_step_moves_and_copies_no_table(exchange):
    layout = layout_2x4(exchange=exchange)
    compiled = _compiled(layout, 64)
    text, rows = compiled.as_text(), layout.rows_per_shard(40_003)
    _assert_moves_no_table(text, rows)
    operations = {operation for operation, _ in _sizes_moved(text)}
    assert ("all-to-all" in operations) == (exchange == "all_to_all")
    assert not _copies(text, rows)
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text)[1]
    for number in (0, 2):  # The large table, and its state behind the two tables.
        assert re.search(rf"\({number}, \{{\}}", aliases)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * rows * FEATURES
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4 * rows


def test_the_check_sees_the_copy_of_reads_in_no_order(monkeypatch):
    def plain(arrays, index):
        return tuple(a.at[index].get(mode="fill", fill_value=0) for a in arrays), index

    monkeypatch.setattr(qrhash.exchange, "read_rows", plain)
    layout = layout_2x4(exchange="reduce")
    assert _copies(_compiled(layout, 64).as_text(), layout.rows_per_shard(40_003))


def test_the_check_sees_a_table_that_is_gathered():
    layout = LAYOUTS["reduce"]
    table = ShardedTable.from_array(np.zeros((40_003, FEATURES), np.float32), layout)
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    lowered = jax.jit(ShardedTable.to_array, out_shardings=everywhere).lower(table)
    compiled = lowered.compile(OPTIMIZED)
    with pytest.raises(AssertionError):
        _assert_moves_no_table(compiled.as_text(), layout.rows_per_shard(40_003))


def _collectives(computations, name):
    """Those of a computation that run unless an exchange overflows, which is then by all-to-all."""
    found = []
    for each in computations[name]:
        called = re.findall(r"(?:calls|to_apply|body|condition)=%([\w.-]+)", each.rest)
        if each.operation == "conditional":
            branches = re.search(r"(?:branch_computations=\{|true_computation=)(.*)", each.rest)[1]
            names = [n for n in re.findall(r"%([\w.-]+)", branches) if n in computations]
            choices = [_collectives(computations, n) for n in names]
            found += max(choices, key=lambda each: any(c.operation == "all-to-all" for c in each))
        elif each.is_collective:
            found.append(each)
        else:
            found += itertools.chain(*(_collectives(computations, n) for n in called))
    return found


def test_a_device_receives_the_less_the_more_devices_there_are():
    received = []
    for devices in (2, 4, 8):
        layout = make_layout((devices,), ("data",), exchange="all_to_all")
        computations = _computations(_compiled(layout, 4096, None).as_text())
        collectives = _collectives(computations, list(computations)[-1])
        assert sum(each.operation == "all-to-all" for each in collectives) >= 4
        shapes = itertools.chain(*(each.shapes for each in collectives))
        received.append(sum(_BYTES[dtype] * size for dtype, size in shapes))
    assert received[0] > 1.5 * received[1] > 1.5**2 * received[2]


COMPILATIONS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: "backend_compile" in event and COMPILATIONS.append(event)
)


@pytest.mark.parametrize("large_table_rows", [3, 5], ids=["all large", "one small"])
@pytest.mark.parametrize("name", ["reduce", "all to all"])
def test_batches_of_one_shape_need_one_compilation(name, large_table_rows):
    layout = LAYOUTS[name]
    cfg = _config(layout, large_table_rows=large_table_rows)
    tx, batches = optax.adagrad(0.1), _skewed()[:4]
    one = _config(None)
    want = _scan(_step(one, tx, by_rows=False), *_init(one, tx), batches, None)
    tables, state = _init(cfg, tx)
    step, losses = jax.jit(_step(cfg, tx, by_rows=True), donate_argnums=(0, 1)), []
    COMPILATIONS.clear()
    for batch in batches:
        batch = qrhash.batches.put_batch(batch, 16, layout)
        tables, state, loss = jax.block_until_ready(step(tables, state, *batch))
        losses.append(loss)
    assert len(COMPILATIONS) == 1
    _assert_same_end((jax.jit(whole)(tables), np.array(losses)), want)


def test_place_says_where_a_jitted_init_puts_tables_and_state():
    layout = LAYOUTS["reduce"]
    init = functools.partial(_init, _config(layout), optax.adagrad(0.1))
    to = layout.shardings(jax.eval_shape(init))
    made = jax.jit(init, out_shardings=to, compiler_options=OPTIMIZED)()
    want = jax.jit(init, compiler_options=OPTIMIZED)()  # as optimized, hence the same bits
    jax.tree.map(lambda array, where: array.sharding == where or pytest.fail(str(where)), made, to)
    nodes = jax.tree.leaves(made, is_leaf=_is_sharded)
    assert [_is_sharded(node) for node in nodes] == [True, False, True, False]
    for node in nodes:
        if _is_sharded(node):
            _assert_split(node.array, layout)
        else:
            assert node.sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, made, want)
    jax.tree.map(lambda *both: assert_close(*both, 1e-6), whole(made), whole(init()))


# --- explicit axes --------------------------------------------------------------------------------


def _on_host(table):
    """Rows in their order, without JAX."""
    if not _is_sharded(table):
        return table
    rows = np.swapaxes(np.asarray(table.array), 0, 1)
    return rows.reshape(-1, FEATURES)[: table.num_rows]


def _pure_step(cfg, tx):
    """On gathered rows, of tables that are all large."""

    def step(tables, state, ids, targets):
        rows, indices = qrhash.take_rows(tables, cfg.indices(ids))
        loss = lambda rows: _squares(qrhash.combine_rows(rows, indices, cfg), targets)  # noqa: E731
        value, of_rows = jax.value_and_grad(loss)(rows)
        grads = qrhash.row_grads(tables, indices, of_rows)
        updates, state = qrhash.touched_rows(tx).update(grads, state, tables)
        return qrhash.apply_updates(tables, updates), state, value

    return step


@pytest.mark.parametrize("exchange", ["reduce", "all_to_all"])
@pytest.mark.parametrize(
    ("make", "large_table_rows"),
    [(_pure_step, 3), (functools.partial(_step, by_rows=True), 5)],
    ids=["pure, all large", "one small"],
)
def test_explicit_axes_give_the_same_vectors_and_steps(make, large_table_rows, exchange, rng):
    layout = layout_2x4(kind=AxisType.Explicit, exchange=exchange)
    ids = rng.integers(0, NUM_IDS, 16, np.int32)
    targets = rng.standard_normal((16, FEATURES)).astype(np.float32)
    ends = []
    for where in (layout, None):
        cfg, tx = _config(where, large_table_rows=large_table_rows), optax.adagrad(0.1)
        batch = (
            (ids, targets) if where is None else qrhash.batches.put_batch((ids, targets), 16, where)
        )

        @jax.jit
        def run(tables, state, *batch, cfg=cfg, tx=tx):
            return qrhash.lookup(tables, batch[0], cfg), make(cfg, tx)(tables, state, *batch)

        vectors, (tables, _, value) = run(*_init(cfg, tx), *batch)
        ends.append((vectors, [_on_host(table) for table in tables], value))
    jax.tree.map(assert_close, *ends)


def test_explicit_axes_give_the_gradients_of_a_collection(rng):
    """Of stacks that are split, and of those that are on every device."""
    ids = {"item": rng.integers(0, 40, 16, np.int32), "day": rng.integers(0, 7, 16, np.int32)}
    found = []
    for where in (layout_2x4(kind=AxisType.Explicit), None):
        options = {"layout": where, "large_table_rows": 10}
        sizes = {"item": 40, "day": 7}
        config = qrhash.CollectionConfig(
            {n: qrhash.EmbedConfig(qrhash.FullTable(s), 4, **options) for n, s in sizes.items()}
        )
        assert sorted(config.large_tables.values()) == [False, True]

        def loss(stacks, ids, config=config):
            vectors = qrhash.collection.lookup(stacks, ids, config)
            return sum(jnp.sum(jnp.sin(each)) for each in vectors.values())

        stacks = qrhash.collection.init(jax.random.key(0), config)
        run = jax.jit(qrhash.value_and_grad(loss, config.large_tables))
        found.append(dense(run(stacks, jax.tree.map(jnp.asarray, ids))))
    jax.tree.map(assert_close, *found)


def test_explicit_axes_give_the_whole_table(rng):
    table = rng.standard_normal((29, FEATURES)).astype(np.float32)
    sharded = ShardedTable.from_array(table, layout_2x4(kind=AxisType.Explicit))
    np.testing.assert_array_equal(sharded.to_array(), table)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2,), {"row_axes": "data", "batch_axes": "data"}),
        ((4,), {"row_axes": "data", "batch_axes": "data"}),
        ((2, 2), {}),
        ((2, 4), {}),
        ((8,), {"row_axes": "data", "batch_axes": ()}),
    ],
)
def test_by_default_the_exchange_is_taken_that_moves_less(shape, options):
    """Counted by hand: what comes from other devices, forward and backward."""
    layout = make_layout(shape, BOTH[: len(shape)], **options)
    lookups, row_bytes = 4096, 64
    size = lambda axes: math.prod(layout.mesh.shape[axis] for axis in axes)  # noqa: E731
    rows, batch = set(layout.row_axes), set(layout.batch_axes)
    alone, copies, shards = size(rows - batch), size(batch - rows), size(rows)
    buffer = qrhash.exchange.capacity_of(layout, -(-lookups // alone)) * (row_bytes + 4)
    by_all_to_all = 2 * (shards - 1) * buffer + (copies - 1) * shards * buffer
    by_all_to_all += (alone - 1) * -(-lookups // alone) * row_bytes
    received = qrhash.exchange.bytes_received(layout, lookups, row_bytes)
    assert received["all_to_all"] == by_all_to_all
    taken = qrhash.exchange.exchange_for(layout, lookups, row_bytes)
    assert received[taken] == min(received.values())


def test_on_two_devices_rows_go_to_their_owners():
    layout = make_layout((2,), ("data",), row_axes="data", batch_axes="data")
    assert qrhash.exchange.exchange_for(layout, 8192, 64) == "all_to_all"


@pytest.mark.parametrize(
    "use",
    [
        lambda mesh: qrhash.batches.put_batch(np.zeros(8), 8, mesh),
        lambda mesh: ShardedTable.from_array(np.zeros((8, 2)), mesh),
    ],
)
def test_a_mesh_is_no_layout(use):
    with pytest.raises(ValueError, match=r"layout must be a qrhash\.MeshLayout"):
        use(LAYOUTS["reduce"].mesh)
