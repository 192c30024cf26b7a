"""Tables that grow within collections: all that each of them does on its own, to the number."""

import dataclasses
import functools
import json
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

import qrhash
from qrhash import (
    Bag,
    CollectionConfig,
    EmbedConfig,
    FullTable,
    KeyDigits,
    Keys,
    MultiHash,
    collection,
    dynamic,
    export,
)
from qrhash.checkpoint import Checkpoints
from qrhash.dynamic import DynamicConfig, ExactCount, LeastUsed, SmallNorm, StepsSinceUse
from qrhash.parts import Shared
from support.cases import OPTIMIZED, assert_close, linen_step, nnx_step
from support.meshes import dense, layout_2x4, make_layout, whole

STANDARD_PROMOTION = True  # optax's Adam
UNCHECKED_KEYS = True

WIDTH, BATCH = 4, 16
TABLES = {"item": ("item", "last_items"), "user": ("user",)}
SHAPES = {"item": (BATCH,), "last_items": (BATCH, 2), "user": (BATCH,)}


def _config(operation="mult", layout=None, large_table_rows=1, **options):
    """Three features of keys, two of which share a table, and one of ids."""
    given = {"layout": layout, "large_table_rows": large_table_rows}
    refused = None
    if operation is not None:
        refused = EmbedConfig(KeyDigits(6, num_tables=2), WIDTH, operation, **given)
    given |= {"eviction": LeastUsed(5), **options}
    item = DynamicConfig(12, WIDTH, admission=ExactCount(2, 80), refused=refused, **given)
    return CollectionConfig(
        {
            "item": item,
            "last_items": "item",
            "user": DynamicConfig(9, WIDTH, seed=3, **given),
            "day": EmbedConfig(FullTable(7), WIDTH, layout=layout),
        }
    )


def _roomy(config):
    """With rows for all keys: on a mesh a shard is full by itself."""
    return CollectionConfig(
        {
            name: dataclasses.replace(each, capacity=96)
            if isinstance(each, DynamicConfig)
            else each
            for name, each in config.embeddings
        }
    )


def _keys(rng, shape, universe=40):
    """Skewed ones, of all 64 bits, with repetitions."""
    ranks = np.minimum(rng.zipf(1.3, shape) - 1, universe - 1).astype(np.uint64)
    return Keys.of(ranks * np.uint64(0x9E3779B97F4A7C15) + np.uint64(2**64 - 2))


def _batch(rng):
    ids = {name: _keys(rng, shape) for name, shape in SHAPES.items()}
    ids["day"] = rng.integers(0, 7, BATCH).astype(np.int32)
    weights = {
        name: rng.normal(size=(*SHAPES.get(name, (BATCH,)), WIDTH)).astype(np.float32)
        for name in ids
    }
    return ids, weights


def _loss(vectors, weights):
    return sum(
        jnp.sum(jnp.sin(vectors[name].astype(jnp.float32)) * weights[name]) for name in vectors
    )


def _updated(tx, params, opt_state, grads):
    updates, opt_state = tx.update(grads, opt_state, params)
    return qrhash.apply_updates(params, updates), opt_state


def _together(config, tx):
    """A step of the collection."""

    def step(params, states, opt_state, ids, weights, number):
        stacks, projections = params
        states, found = dynamic.assign_all(states, ids, config, number)
        stacks, new = dynamic.start_all(stacks, found, config, projections)
        opt_state = qrhash.reset_rows(tx, opt_state, (stacks, projections), (new, None))

        def loss(params):
            vectors = collection.lookup(params[0], found, config, params[1])
            return _loss(vectors, weights), vectors

        run = qrhash.value_and_grad(loss, (config.large_tables, False), has_aux=True)
        (_, vectors), grads = run((stacks, projections))
        params, opt_state = _updated(tx, (stacks, projections), opt_state, grads)
        return params, states, opt_state, vectors

    return jax.jit(step, donate_argnums=(0, 1, 2))


def _apart(config, tx):
    """The same with tables of each feature's own: the functions of one table."""
    owned = dict(config.embeddings)

    def step(params, states, opt_state, ids, weights, number):
        params, states, new, found = dict(params), dict(states), dict.fromkeys(params), {}
        for owner, names in TABLES.items():
            flat = [ids[name].reshape(-1) for name in names]
            keys = jax.tree.map(lambda *words: jnp.concatenate(words), *flat)
            states[owner], found[owner] = dynamic.assign(states[owner], keys, owned[owner], number)
            params[owner], new[owner] = dynamic.start_rows(
                params[owner], found[owner], owned[owner]
            )
        opt_state = qrhash.reset_rows(tx, opt_state, params, new)

        def loss(params):
            vectors = {"day": qrhash.lookup(params["day"], ids["day"], owned["day"])}
            for owner, names in TABLES.items():
                every, at = dynamic.lookup(params[owner], found[owner], owned[owner]), 0
                for name in names:
                    some = every[at : (at := at + ids[name].size)]
                    vectors[name] = some.reshape(*ids[name].shape, WIDTH)
            return _loss(vectors, weights), vectors

        large = {owner: dynamic.large(owned[owner]) for owner in TABLES}
        large["day"] = owned["day"].large_tables
        (_, vectors), grads = qrhash.value_and_grad(loss, large, has_aux=True)(params)
        params, opt_state = _updated(tx, params, opt_state, grads)
        return params, states, opt_state, vectors

    return jax.jit(step)


@functools.partial(jax.jit, static_argnums=0)
def _evicted_apart(config, params, states, number):
    owned = dict(config.embeddings)
    made = {
        owner: dynamic.evict(states[owner], params[owner], owned[owner], number) for owner in TABLES
    }
    return {owner: made[owner][0] for owner in made}, {owner: made[owner][1] for owner in made}


_evict_all = jax.jit(dynamic.evict_all, static_argnums=2)


def _started(config, tx, like=None):
    """Parameters, states, optimizer state; the stacks' numbers those of another config's."""
    of = config if like is None else like
    stacks = collection.init(jax.random.key(0), of)
    if like is not None:
        stacks = collection.as_stacks(collection.unstack(stacks, like), config)
    params = stacks, collection.init_projections(jax.random.key(1), config)
    return params, dynamic.init_states(config), tx.init(params)


def _started_apart(config, tx, params):
    stacks, projections = params
    tables = {owner: dynamic.parameters_in(stacks, config, owner, projections) for owner in TABLES}
    params = jax.tree.map(jnp.copy, tables | {"day": collection.unstack(stacks, config)["day"]})
    return params, dynamic.init_states(config), tx.init(params)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "large_table_rows", "tx"),
    [
        ("mult", 1, optax.adam(0.05)),
        ("concat", 20, optax.adagrad(0.1)),
        ("project", 1, optax.adagrad(0.1)),
        (None, 1, qrhash.rowwise_adagrad(0.1)),
        ("mult", 10_000, optax.adagrad(0.1)),
    ],
)
def test_training_equals_that_of_tables_apart(operation, large_table_rows, tx, rng):
    """With rows that change hands: vectors, rows and counts of every step."""
    config, tx = _config(operation, large_table_rows=large_table_rows), qrhash.touched_rows(tx)
    together, apart = _together(config, tx), _apart(config, tx)
    carry = _started(config, tx)
    other = _started_apart(config, tx, carry[0])
    counted = {"item": 0, "user": 0}
    for number in range(20):
        ids, weights = _batch(rng)
        *carry, got = together(*carry, ids, weights, number)
        *other, wanted = apart(*other, ids, weights, number)
        assert (
            set(got)
            == set(wanted)
            == set(config.configs)
            - {
                "item:refused",
                "last_items:refused",
            }
        )
        for name in wanted:
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=1e-5)
        if number % 5 == 4:
            carry[1], counts = _evict_all(carry[1], carry[0][0], config, number)
            other[1], of_tables = _evicted_apart(config, other[0], other[1], number)
            assert jax.tree.map(int, counts) == jax.tree.map(int, of_tables)
            counted = {name: counted[name] + int(of_tables[name]) for name in counted}
        jax.tree.map(np.testing.assert_array_equal, carry[1], other[1])
    assert min(counted.values()) > 2
    assert together._cache_size() == 1
    for owner in TABLES:
        parameters = dynamic.parameters_in(carry[0][0], config, owner, carry[0][1])
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, parameters, other[0][owner])


@pytest.mark.parametrize(
    "dtypes",
    [{"param_dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16, "dtype": jnp.float32}],
    ids=["bfloat16", "rows of bfloat16"],
)
def test_other_dtypes(dtypes, rng):
    refused = EmbedConfig(KeyDigits(6, num_tables=2), WIDTH, **dtypes)
    config = CollectionConfig(
        {"item": DynamicConfig(5, WIDTH, refused=refused, **dtypes), "last": "item"}
    )
    stacks, states = collection.init(jax.random.key(0), config), dynamic.init_states(config)
    ids = {"item": _keys(rng, (8,)), "last": _keys(rng, (8,))}
    states, found = dynamic.assign_all(states, ids, config, 0)
    stacks, _ = dynamic.start_all(stacks, found, config)
    got = collection.lookup(stacks, found, config)
    parameters = dynamic.parameters_in(stacks, config, "item")
    for name, each in found.items():
        wanted = dynamic.lookup(parameters, each, dict(config.embeddings)["item"])
        assert got[name].dtype == wanted.dtype == dtypes.get("dtype", jnp.bfloat16)
        np.testing.assert_array_equal(got[name], wanted)


@pytest.mark.parametrize("bits", [36, 24, None])
def test_a_step_copies_no_table(bits):
    """Rows, and the tables that new ones are copied from, in one stack or in several."""
    rows, refused = 2**20, None
    if bits is not None:
        refused = EmbedConfig(KeyDigits(bits, num_tables=2), WIDTH)
    config = CollectionConfig(
        {
            "item": DynamicConfig(rows, WIDTH, refused=refused),
            "last_items": "item",
            "user": DynamicConfig(rows, WIDTH),
            "day": EmbedConfig(FullTable(7), WIDTH),
        }
    )
    assert len(config.stacks[0].spans) == {36: 4, 24: 2, None: 2}[bits]
    tx = qrhash.touched_rows(optax.adagrad(0.1))
    carry = jax.eval_shape(lambda: _started(config, tx))
    batch = jax.tree.map(jnp.asarray, _batch(np.random.default_rng(0)))
    compiled = _together(config, tx).lower(*carry, *batch, jnp.int32(0)).compile(OPTIMIZED)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < rows
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < rows


def test_one_gather_for_each_stack(rng):
    config = _config()
    stacks, ids = collection.init(jax.random.key(0), config), _batch(rng)[0]
    found = dynamic.find_all(dynamic.init_states(config), ids, config)
    assert len(config.stacks) == 2
    jaxpr = jax.make_jaxpr(lambda *args: collection.lookup(*args, config))(stacks, found)
    assert str(jaxpr).count("= gather[") <= len(config.stacks)


# --- meshes ---------------------------------------------------------------------------------------


def _numbers(config, batches, like=None):
    """What a training of some steps shows to the outside."""
    tx = qrhash.touched_rows(optax.adagrad(0.1))
    step, carry, seen = _together(config, tx), _started(config, tx, like), []
    for number, (ids, weights) in enumerate(batches):
        *carry, vectors = step(*carry, ids, weights, number)
        carry[1], counts = _evict_all(carry[1], carry[0][0], config, number)
        keys = {name: int(state.index.num_keys) for name, state in carry[1].items()}
        seen.append((jax.tree.map(int, counts), keys, jax.tree.map(np.asarray, vectors)))
    return seen


MESHES = {
    "2x4": layout_2x4,
    "explicit": lambda: layout_2x4(AxisType.Explicit),
    "8 of both": lambda: make_layout((8,), ("data",), row_axes="data"),
}


@pytest.mark.parametrize("large_table_rows", [1, 10_000])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_trains_the_numbers_of_one_device(mesh, large_table_rows, rng):
    """All that large tables go by: rows of stacks that are split over the devices."""
    options = {"large_table_rows": large_table_rows, "eviction": StepsSinceUse(2)}
    one = _roomy(_config(**options))
    other = _roomy(_config(layout=MESHES[mesh](), **options))
    batches = [_batch(rng) for _ in range(6)]
    wanted, got = _numbers(one, batches), _numbers(other, batches, one)
    assert sum(sum(counts.values()) for counts, _, _ in wanted) > 2
    for (counts, keys, vectors), mine in zip(wanted, got, strict=True):
        assert mine[:2] == (counts, keys)
        for name in vectors:
            np.testing.assert_allclose(mine[2][name], vectors[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mesh", [None, "2x4"])
@pytest.mark.parametrize("large_table_rows", [1, 10_000])
def test_small_norms_are_those_of_the_features_own_rows(large_table_rows, mesh, rng):
    layout = None if mesh is None else MESHES[mesh]()
    given = {"layout": layout, "large_table_rows": large_table_rows}
    embeddings = {
        "before": EmbedConfig(FullTable(11), WIDTH, **given),
        "item": DynamicConfig(64, WIDTH, eviction=SmallNorm(2.0), **given),
        "user": DynamicConfig(64, WIDTH, **given),
    }
    config = CollectionConfig(embeddings)
    tables = {
        name: (rng.normal(size=owned.table_shapes[0]).astype(np.float32),)
        for name, owned in config.own_configs.items()
    }
    stacks, states = collection.as_stacks(tables, config), dynamic.init_states(config)
    states, found = dynamic.assign_all(states, {"item": np.arange(9)}, config, 0)
    norms = (tables["item"][0][np.asarray(found["item"].rows.rows)] ** 2).sum(1) / 2
    states, counts = dynamic.evict_all(states, stacks, config, 1)
    left = dynamic.find_all(states, {"item": np.arange(9)}, config)["item"].rows.rows < 64
    np.testing.assert_array_equal(left, norms >= 2.0)
    assert list(counts) == ["item"]
    assert 0 < int(counts["item"]) == 9 - left.sum()


# --- keys -----------------------------------------------------------------------------------------


def test_features_of_one_table_are_one_batch_to_it():
    """A key that both meet gets one row and both counts; the order is that of the config."""
    item = DynamicConfig(4, WIDTH, admission=ExactCount(2, 9))
    config = CollectionConfig({"item": item, "last": "item"})
    assign = jax.jit(functools.partial(dynamic.assign_all, config=config, step=0))
    ids = {"last": Keys.of(["c", "a", "b", "c"]), "item": Keys.of(["b", "d", "a"])}
    for order in (list(ids), list(ids)[::-1]):
        given = {name: ids[name] for name in order}
        states, found = assign(dynamic.init_states(config), given)
        assert found["item"].rows.rows.tolist() == [0, 4, 1]
        assert found["last"].rows.rows.tolist() == [2, 1, 0, 2]
        assert found["item"].rows.is_new.tolist() == [True, False, True]
        assert found["last"].rows.is_new.tolist() == [True, False, False, False]
        assert states["item"].index.counts.tolist() == [2, 2, 2, 0]
        assert {int(each.rows.not_admitted) for each in found.values()} == {1}
    seen = dynamic.find_all(states, ids, config)
    for name, each in found.items():
        np.testing.assert_array_equal(seen[name].rows.rows, each.rows.rows)
    states, alone = dynamic.assign_all(states, {"last": ["d"]}, config, 1)
    assert alone["last"].rows.rows.tolist() == [3]


def test_keys_that_are_not_meant_are_neither_counted_nor_have_vectors():
    config = _config(None)
    states, stacks = dynamic.init_states(config), collection.init(jax.random.key(0), config)
    where = {"user": np.array([True, False, True])}
    ids = {"user": ["a", "b", "a"], "day": np.array([1])}
    states, found = dynamic.assign_all(states, ids, config, 0, where=where)
    assert int(states["user"].index.num_keys) == 1
    stacks, _ = dynamic.start_all(stacks, found, config)
    vectors = collection.lookup(stacks, found, config)["user"]
    assert vectors.any(axis=1).tolist() == [True, False, True]
    found = dynamic.find_all(states, ids, config, where={"user": ~where["user"]})
    assert not collection.lookup(stacks, found, config)["user"].any()


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn", "max"])
@pytest.mark.parametrize("refused", ["compressed", "constant", "zero"])
def test_bags_equal_those_of_the_table_alone(combiner, refused, rng):
    """Of a feature's own combiner, and with empty ones among them."""
    options = {
        "compressed": {"refused": EmbedConfig(MultiHash((5, 7)), WIDTH)},
        "constant": {"refused_value": 0.5},
        "zero": {},
    }[refused]
    item = DynamicConfig(3, WIDTH, **options)
    bag = Shared("item", combiner=combiner)
    config = CollectionConfig({"item": item, "bag": bag, "other": Shared("item", None, "sum")})
    lists = [[1, 2, 1, 9], [], [7], [9, 3]]
    weights = None
    if combiner != "max":
        weights = [rng.uniform(0.5, 2, len(each)).tolist() for each in lists]
    given = Bag.from_lists(lists, weights=weights, capacity=9)
    stacks, states = collection.init(jax.random.key(0), config), dynamic.init_states(config)
    ids = {"item": Keys.of([[1, 7], [8, 9]]), "bag": given, "other": Bag.from_lists([[1], [4]])}
    states, found = dynamic.assign_all(states, ids, config, 0)
    assert len(np.unique(found["bag"].rows.rows)) > 2  # with rows and without
    stacks, _ = dynamic.start_all(stacks, found, config)

    def together(stacks):
        return collection.lookup(stacks, found, config)

    def apart(stacks):
        parameters = dynamic.parameters_in(stacks, config, "item")
        return {
            name: dynamic.lookup(parameters, each, config.composites[name])
            for name, each in found.items()
        }

    got, wanted = together(stacks), apart(stacks)
    assert got["bag"].shape == (4, WIDTH)
    grads = [
        jax.jit(jax.grad(lambda s, of=of: sum((x**3).sum() for x in of(s).values())))(stacks)
        for of in (together, apart)
    ]
    jax.tree.map(assert_close, got, wanted)
    jax.tree.map(assert_close, *grads)


@pytest.mark.parametrize("combiner", ["mean", "max"])
@pytest.mark.parametrize("mesh", ["2x4", "explicit"])
def test_bags_on_a_mesh(mesh, combiner, rng):
    lists = [rng.integers(0, 30, rng.integers(0, 4)).tolist() for _ in range(BATCH)]
    ids = {
        "item": _keys(rng, (BATCH,)),
        "last_items": Bag.from_lists(lists, capacity=64),
        "user": Bag.from_padded(_keys(rng, (BATCH, 4)), lengths=rng.integers(0, 5, BATCH)),
    }
    found = []
    for layout in (None, MESHES[mesh]()):
        embeddings = dict(_roomy(_config("concat", layout)).embeddings)
        embeddings["last_items"] = Shared("item", combiner=combiner)
        embeddings["user"] = dataclasses.replace(embeddings["user"], combiner=combiner)
        config = CollectionConfig(embeddings)
        stacks = collection.init(jax.random.key(0), config)

        @jax.jit
        def run(stacks, states, ids, config=config):
            states, rows = dynamic.assign_all(states, ids, config, 0)
            stacks, _ = dynamic.start_all(stacks, rows, config)

            def loss(stacks):
                vectors = collection.lookup(stacks, rows, config)
                return sum(jnp.sum(jnp.sin(each)) for each in vectors.values()), vectors

            return qrhash.value_and_grad(loss, config.large_tables, has_aux=True)(stacks)

        (_, vectors), grads = run(stacks, dynamic.init_states(config), ids)
        # A key has another row on a mesh, of one shard or another.
        found.append((vectors, jax.tree.map(lambda each: np.sort(each, axis=0), dense(grads))))
    jax.tree.map(assert_close, *found)


# --- Flax -----------------------------------------------------------------------------------------


class LinenModel(nn.Module):
    config: CollectionConfig

    @nn.compact
    def __call__(self, found):
        return qrhash.linen.EmbedCollection(self.config, name="embed")(found)


class NnxModel(nnx.Module):
    def __init__(self, config, rngs):
        self.embed = qrhash.nnx.EmbedCollection(config, rngs=rngs)

    def __call__(self, found):
        return self.embed(found)


def _train_linen(config, tx, params, batches):
    model, states = LinenModel(config), dynamic.init_states(config)
    tx = qrhash.touched_rows(tx)
    opt_state = tx.init(params)
    found = dynamic.find_all(states, batches[0][0], config)
    step = linen_step(model, dynamic.assign_all, tx, _loss, found)
    step = jax.jit(step, donate_argnums=(0, 1, 2))
    for number, (ids, weights) in enumerate(batches):
        params, states, opt_state, loss = step(params, states, opt_state, ids, weights, number)
        states, _ = _evict_all(states, params["embed"], config, number)
        yield float(loss)


def _train_nnx(config, tx, params, batches):
    model = NnxModel(config, nnx.Rngs(5))
    nnx.update(model, params)
    optimizer = qrhash.nnx.Optimizer(model, tx)
    traces = []
    step = nnx_step(_loss, traces)
    evict = nnx.jit(lambda embed, number: embed.evict(number))
    for number, (ids, weights) in enumerate(batches):
        yield float(step(model, optimizer, ids, weights, number))
        counts = evict(model.embed, number)
        assert set(counts) == set(model.embed.num_keys) == set(TABLES)
    # On a mesh what the first step is given is not yet where the steps leave it.
    assert len(traces) == (1 if config.stacks[0].layout is None else 2)


@pytest.mark.parametrize(("operation", "tx"), [("project", optax.adam(0.05)), (None, None)])
def test_both_flax_modules_train_as_the_pure_functions_do(operation, tx, rng):
    config, tx = _config(operation), tx or optax.adagrad(0.1)
    batches = [_batch(rng) for _ in range(8)]
    params = nnx.to_pure_dict(nnx.state(NnxModel(config, nnx.Rngs(7)), nnx.Param))
    of_rows = qrhash.touched_rows(tx)
    params_of = params["embed"]
    projections = {
        name: qrhash.Projection(*(params_of[f"{name}_{field}"] for field in own.projection_fields))
        for name, own in config.own_configs.items()
        if own.projection_fields
    }
    stacks = {stack.name: params_of[stack.name] for stack in config.stacks}
    carry = jax.tree.map(jnp.copy, (stacks, projections)), dynamic.init_states(config)
    carry, step, wanted = (*carry, of_rows.init(carry[0])), _together(config, of_rows), []
    for number, (ids, weights) in enumerate(batches):
        *carry, vectors = step(*carry, ids, weights, number)
        carry[1], _ = _evict_all(carry[1], carry[0][0], config, number)
        wanted.append(float(_loss(vectors, weights)))
    for train in (_train_nnx, _train_linen):
        got = list(train(config, tx, jax.tree.map(jnp.copy, params), batches))
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_module_on_a_mesh(rng):
    """Stacks and keys split over eight devices, and trained to the same numbers."""
    batches, losses = [_batch(rng) for _ in range(4)], []
    for layout in (None, layout_2x4()):
        config = _roomy(_config("concat", layout, eviction=StepsSinceUse(1)))
        model = NnxModel(config, nnx.Rngs(7))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        params = jax.tree.map(jnp.copy, params)
        losses.append(list(_train_nnx(config, optax.adagrad(0.1), params, batches)))
        if layout is not None:
            state = nnx.state(model)
            placed = jax.device_put(state, qrhash.nnx.shardings(state, layout))
            counts = placed["embed"]["state"].get_value()["item"].index.counts
            assert counts.sharding.shard_shape(counts.shape)[0] == 1
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_modules_name_their_parameters_alike_and_keep_keys_apart(rng):
    config, ids = _config("project"), _batch(rng)[0]
    embed = qrhash.nnx.EmbedCollection(config, rngs=nnx.Rngs(0))
    found = embed.assign(ids, 0)
    params = nnx.to_pure_dict(nnx.state(embed, nnx.Param))
    variables = jax.eval_shape(qrhash.linen.EmbedCollection(config).init, jax.random.key(0), found)[
        "params"
    ]
    assert sorted(params) == sorted(variables)
    assert {"item:refused_kernel", "item:refused_bias"} < set(params)
    graph, params, state = nnx.split(embed, nnx.Param, ...)
    assert all(leaf.dtype.kind in "iu" for leaf in jax.tree.leaves(state))
    copies = nnx.merge(graph, params, state), nnx.clone(embed), pickle.loads(pickle.dumps(embed))
    for copy in copies:
        jax.tree.map(np.testing.assert_array_equal, copy(copy.find(ids)), embed(found))
    plain = qrhash.nnx.EmbedCollection({"day": EmbedConfig(FullTable(7), 4)}, rngs=nnx.Rngs(0))
    assert set(nnx.to_pure_dict(nnx.state(plain))) == {"small_4_float32"}
    day = {"day": jnp.array([1, 2])}
    assert (plain.num_keys, plain.assign(day, 0)) == ({}, day)


# --- more rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tx", "make_layout"),
    [
        (optax.adam(0.05), lambda: None),
        (qrhash.rowwise_adagrad(0.1), lambda: None),
        (qrhash.rowwise_adagrad(0.1), layout_2x4),
    ],
)
def test_growth_changes_nothing_but_the_room(tx, make_layout, rng):
    """Grown in time, a table is trained as one that was as long from the start."""
    # On a mesh a shard is full by itself.
    few = {"item": 30, "user": 60} if make_layout() is None else {"item": 70, "user": 75}

    def sized(**capacities):
        embeddings = dict(_config(eviction=None, layout=make_layout()).embeddings)
        for name, capacity in capacities.items():
            embeddings[name] = dataclasses.replace(embeddings[name], capacity=capacity)
        return CollectionConfig(embeddings)

    tx, before, after = qrhash.touched_rows(tx), sized(**few), sized(item=80, user=90)
    batches = [_batch(rng) for _ in range(8)]
    carry, step = _started(before, tx), _together(before, tx)
    tables = collection.unstack(carry[0][0], before)
    for name in TABLES:
        more = after.own_configs[name].partition.num_embeddings - len(tables[name][0])
        tables[name] = (jnp.pad(tables[name][0], ((0, more), (0, 0))),)
    params = jax.tree.map(jnp.copy, (collection.as_stacks(tables, after), carry[0][1]))
    long = params, dynamic.init_states(after), tx.init(params)
    grown = _together(after, tx)
    for number, (ids, weights) in enumerate(batches):
        if number == 3:
            (stacks, projections), states, opt_state = carry
            old = collection.unstack(stacks, before)
            more, states, config, rows = dynamic.grow_all(
                stacks, states, before, {"item": 80, "user": 90}
            )
            assert config == after
            new = collection.unstack(more, config)
            for name, each in old.items():
                for a, b in zip(each, new[name], strict=True):
                    np.testing.assert_array_equal(a, b[: len(a)])
            params = more, projections
            opt_state = qrhash.grow_rows(tx, opt_state, (stacks, projections), params, (rows, {}))
            carry, step = (params, states, opt_state), grown
        *carry, got = step(*carry, ids, weights, number)
        *long, wanted = grown(*long, ids, weights, number)
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
    jax.tree.map(np.testing.assert_array_equal, carry[0], long[0])
    jax.tree.map(np.testing.assert_array_equal, whole(carry[2]), whole(long[2]))


def test_growth_that_cannot_be_is_refused():
    config = _config(large_table_rows=100)
    given = collection.init(jax.random.key(0), config), dynamic.init_states(config), config
    with pytest.raises(ValueError, match=r"leave every table in its stack.*'item'.*small.*large"):
        dynamic.grow_all(*given, {"item": 100})
    with pytest.raises(ValueError, match="capacity must be at least the 12 rows"):
        dynamic.grow_all(*given, {"item": 11})
    for name in ("last_items", "day", "other"):
        with pytest.raises(ValueError, match=f"DynamicConfig of its own, item, user, got '{name}'"):
            dynamic.grow_all(*given, {name: 20})
    tx, table = qrhash.touched_rows(optax.adagrad(0.1)), {"a": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="rows must be given for the tables"):
        qrhash.grow_rows(tx, tx.init(table), table, {"a": jnp.ones((5, 2))}, {"a": None})


# --- files ----------------------------------------------------------------------------------------


def _trained(config, rng, steps=4):
    tx = qrhash.touched_rows(optax.adagrad(0.1))
    step, carry = _together(config, tx), _started(config, tx)
    for number in range(steps):
        *carry, _ = step(*carry, *_batch(rng), number)
    return carry


@pytest.mark.parametrize("operation", ["project", None])
def test_snapshots_give_the_vectors_of_the_model(operation, rng, tmp_path):
    config = _config(operation)
    (stacks, projections), states, _ = _trained(config, rng)
    given = config, stacks, projections
    export.save(tmp_path / "s", export.of_collection(*given, states=states, version=4))
    snapshot = export.Snapshot(tmp_path / "s")
    assert set(snapshot.names) == {"item", "last_items", "user", "day"}

    def check(stacks, projections, states):
        ids = _batch(rng)[0]
        found = dynamic.find_all(states, ids, config)
        wanted = collection.lookup(stacks, found, config, projections)
        for name, vectors in snapshot.lookup_all(ids).items():
            assert_close(vectors, np.float64(wanted[name]))

    check(stacks, projections, states)
    item = dict(config.embeddings)["item"]
    parameters = dynamic.parameters_in(stacks, config, "item", projections)
    nothing = dynamic.nothing_published(item)
    _, published = dynamic.delta_since(nothing, parameters, states["item"], item, 4)
    ids = {"last_items": _keys(rng, (BATCH, 2), universe=60)}
    states, found = dynamic.assign_all(states, ids | {"item": ids["last_items"]}, config, 4)
    stacks, _ = dynamic.start_all(stacks, found, config, projections)
    parameters = dynamic.parameters_in(stacks, config, "item", projections)
    delta, _ = dynamic.delta_since(published, parameters, states["item"], item, 5, name="item")
    assert delta.keys.size
    assert snapshot.apply(delta) == 5
    check(stacks, projections, states)
    with pytest.raises(ValueError, match=r"states and version must be given.*'item'"):
        export.of_collection(*given)


@pytest.mark.parametrize("shards", [None, "8 of both"])
def test_a_checkpoint_holds_the_tables_and_their_keys(shards, rng, tmp_path):
    """Restored on another number of devices: every key keeps row, vector and optimizer state."""
    layout = None if shards is None else MESHES[shards]()
    saved, other = _config(layout=layout_2x4()), _config(layout=layout)
    params, states, opt_state = _trained(saved, rng)
    with Checkpoints(tmp_path, saved) as checkpoints:
        checkpoints.save(4, {"params": params, "states": states, "opt": opt_state})
    tx = qrhash.touched_rows(optax.adagrad(0.1))
    names = ("params", "states", "opt")
    with Checkpoints(tmp_path, other) as checkpoints:
        restored = checkpoints.restore(dict(zip(names, _started(other, tx), strict=True))).state
    ids = _batch(rng)[0]
    vectors = [
        collection.lookup(of[0], dynamic.find_all(keys, ids, config), config, of[1])
        for of, keys, config in (
            (params, states, saved),
            (restored["params"], restored["states"], other),
        )
    ]
    assert len(np.unique(dynamic.find_all(states, ids, saved)["user"].rows.rows)) > 2
    jax.tree.map(np.testing.assert_array_equal, *vectors)
    jax.tree.map(np.testing.assert_array_equal, whole(opt_state), whole(restored["opt"]))
    item = dataclasses.replace(dict(other.embeddings)["item"], capacity=99)
    another = CollectionConfig(dict(other.embeddings) | {"item": item})
    with (
        Checkpoints(tmp_path, another) as checkpoints,
        pytest.raises(qrhash.checkpoint.MismatchError, match="capacity of feature 'item'"),
    ):
        checkpoints.restore(restored)


# --- configs and refusals -------------------------------------------------------------------------


def test_a_config_as_json_also_where_nothing_is_imported_yet():
    config = _config()
    text = json.dumps(config.to_dict())
    assert CollectionConfig.from_dict(json.loads(text)) == config
    assert hash(pickle.loads(pickle.dumps(config))) == hash(config)
    code = "import json, qrhash; config = qrhash.CollectionConfig.from_dict(json.loads(input()))"
    code += "; print([stack.shape for stack in config.stacks], end='')"
    done = subprocess.run(
        [sys.executable, "-c", code], input=text, capture_output=True, text=True, check=True
    )
    assert done.stdout == str([stack.shape for stack in config.stacks])
    with pytest.raises(ValueError, match="type must be one of DynamicConfig, got 'Other'"):
        CollectionConfig.from_dict({"item": {"type": "Other"}})


def test_parts_are_ordinary_features():
    config = _config("concat")
    assert list(config.own_configs) == ["item", "item:refused", "user", "day"]
    assert config.owner_of["last_items:refused"] == "item:refused"
    assert list(config.composites) == ["item", "last_items", "user"]
    wanted = sum(each.num_params for _, each in config.embeddings if hasattr(each, "num_params"))
    assert config.num_params == wanted


ITEM = DynamicConfig(5, WIDTH, refused=EmbedConfig(MultiHash((5, 7)), WIDTH))


@pytest.mark.parametrize(
    ("embeddings", "words"),
    [
        ({"a": ITEM, "b": Shared("a", MultiHash((5, 7)))}, "'b'.*share 'a' without a partition"),
        ({"a": ITEM, "b": Shared("a", combiner="all")}, "combiner must be one of.*all"),
        ({"a": ITEM, "b": "a", "c": "b"}, "'c'.*'b'"),
        ({"a": ITEM, "a:refused": ITEM}, "'a:refused'.*another name.*part of 'a'"),
        ({"a": ITEM, "b": "a", "b:refused": "a"}, "'b:refused'.*another name.*part of 'b'"),
        (
            {"a": ITEM, "b": DynamicConfig(5, WIDTH, layout=layout_2x4())},
            "layout must agree for the tables of one stack",
        ),
    ],
)
def test_configs_that_are_refused(embeddings, words):
    with pytest.raises(ValueError, match=words):
        CollectionConfig(embeddings)


def test_a_pool_takes_no_dynamic_config():
    with pytest.raises(ValueError, match="one_pool needs an EmbedConfig"):
        CollectionConfig.one_pool(["a", "b"], ITEM)


def test_calls_that_are_refused(rng):
    config, ids = _config(), _batch(rng)[0]
    stacks, states = collection.init(jax.random.key(0), config), dynamic.init_states(config)
    found = dynamic.find_all(states, ids, config)
    embed = qrhash.nnx.EmbedCollection(config, rngs=nnx.Rngs(0))
    other = qrhash.nnx.EmbedCollection(config, rngs=nnx.Rngs(0))
    owned = dict(config.embeddings)
    parameters = dynamic.parameters_in(stacks, config, "user")
    calls = {
        r"ids\['item'\] must be keys with rows, as qrhash.dynamic.assign_all": [
            lambda: collection.lookup(stacks, ids, config),
            lambda: embed(ids),
        ],
        r"ids\['day'\] must be ids, as it is not dynamic, got Found": [
            lambda: collection.lookup(stacks, {"day": found["user"]}, config)
        ],
        r"ids\['user'\] must be keys, which are given rows here, got Found": [
            lambda: dynamic.assign_all(states, {"user": found["user"]}, config, 0),
            lambda: embed.find({"user": found["user"]}),
        ],
        r"found\['item'\] must be keys with rows, .* got Keys": [
            lambda: dynamic.start_all(stacks, ids, config)
        ],
        "ids must be of features of the collection, item, last_items, user, day, got 'items'": [
            lambda: dynamic.assign_all(states, {"items": ids["item"]}, config, 0),
            lambda: collection.lookup(stacks, {"items": found["item"]}, config),
        ],
        "got 'item:refused'": [
            lambda: collection.lookup(stacks, {"item:refused": ids["item"]}, config)
        ],
        "ids must be a mapping": [lambda: dynamic.assign_all(states, ids["item"], config, 0)],
        "where must name dynamic features of ids, got 'day'": [
            lambda: dynamic.find_all(states, ids, config, where={"day": np.ones(BATCH, bool)})
        ],
        "where must be left out with a Bag": [
            lambda: dynamic.find_all(
                states, {"user": Bag.from_lists([["a"]])}, config, where={"user": np.ones(1, bool)}
            )
        ],
        "states must be as from init_states, that of 'user' is missing": [
            lambda: dynamic.find_all({"item": states["item"]}, ids, config)
        ],
        "stacks must be as from init, large_4_float32 is missing": [
            lambda: dynamic.start_all({}, found, config),
            lambda: dynamic.evict_all(states, {}, config, 0),
        ],
        "evict_all needs a feature whose DynamicConfig has an eviction": [
            lambda: dynamic.evict_all(states, stacks, _config(eviction=None), 0)
        ],
        "DynamicConfig of its own, item, user, got 'day'": [
            lambda: dynamic.parameters_in(stacks, config, "day")
        ],
        "embed must be a DynamicEmbed of the model, or an EmbedCollection": [
            lambda: qrhash.nnx.Optimizer(other, optax.adam(0.1)).reset_rows(other, embed, found)
        ],
        "found must be keys with their rows, as qrhash.dynamic.assign or find": [
            lambda: dynamic.lookup(parameters, ids["user"], owned["user"]),
            lambda: dynamic.start_rows(parameters, ids["user"], owned["user"]),
        ],
    }
    for words, of_words in calls.items():
        for call in of_words:
            with pytest.raises(ValueError, match=words):
                call()
