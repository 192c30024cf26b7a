"""The NNX module: the pure core with variables that NNX filters, optimizers and meshes know."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import qrhash
from qrhash.nnx import MultiHashEmbed, Optimizer, Table, as_table
from support import cases, oracle
from support.cases import FAMILIES, FEATURES, OPERATIONS, assert_close

AXES = ("rows", "features")
RULES = (("rows", "data"), ("features", None))


def _module(cfg, rng):
    """A module with random parameters, and the same as the core takes them."""
    tables, projection = cases.parameters(cfg, rng)
    embed = MultiHashEmbed(cfg, rngs=nnx.Rngs(0))
    params = {f"table_{j}": table for j, table in enumerate(tables)}
    nnx.update(embed, params | (projection._asdict() if projection else {}))
    return embed, tables, projection


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_it_looks_up_and_attends_as_the_oracle_does(operation, family, rng):
    cfg = cases.config(family, operation)
    embed, tables, projection = _module(cfg, rng)
    ids = rng.integers(-1, cfg.num_embeddings + 1, (2, 3)).astype(np.int32)
    query = rng.standard_normal((4, FEATURES)).astype(np.float32)
    every = oracle.lookup(tables, np.arange(cfg.num_embeddings), cfg, projection)
    jitted = nnx.jit(lambda embed, ids: embed(ids))
    assert_close(jitted(embed, ids), oracle.lookup(tables, ids, cfg, projection))
    assert_close(embed.attend(query), query @ every.T)
    assert (embed.num_embeddings, embed.features) == (cfg.num_embeddings, FEATURES)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_its_state_has_the_documented_names_and_types(operation):
    cfg = cases.config("mixed radix", operation, param_dtype=jnp.bfloat16)
    embed = MultiHashEmbed(cfg, rngs=nnx.Rngs(0))
    tables = nnx.to_pure_dict(nnx.state(embed, Table))
    rest = nnx.to_pure_dict(nnx.state(embed, nnx.Not(Table)))
    assert {n: t.shape for n, t in tables.items()} == {
        f"table_{j}": shape for j, shape in enumerate(cfg.table_shapes)
    }
    assert set(rest) == ({"kernel", "bias"} if operation == "project" else set())
    assert len(nnx.state(embed, nnx.Param)) == len(tables) + len(rest)
    assert {a.dtype for a in jax.tree.leaves([tables, rest])} == {jnp.dtype(jnp.bfloat16)}
    again, other = (MultiHashEmbed(cfg, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    assert (again.table_0[...] == embed.table_0[...]).all()
    assert (other.table_0[...] != embed.table_0[...]).any()


def test_without_a_bias_there_is_none(rng):
    cfg = cases.config("full", "project", use_bias=False)
    embed = MultiHashEmbed(cfg, rngs=nnx.Rngs(0))
    assert set(nnx.state(embed)) == {"table_0", "kernel"}
    want = oracle.lookup(embed.tables, [1, 2], cfg, (embed.kernel[...], None))
    assert_close(embed(np.array([1, 2])), want)


def test_an_id_policy_that_raises():
    cfg = cases.config("quotient-remainder", "mult", id_policy="raise")
    with pytest.raises(ValueError, match="11"):
        MultiHashEmbed(cfg, rngs=nnx.Rngs(0))(np.array([3, 11]))


class Model(nnx.Module):
    """Two ids per row; made for `nnx.Embed`."""

    def __init__(self, embed, rngs):
        self.embed = embed
        self.dense = nnx.Linear(2 * FEATURES, 1, rngs=rngs)

    def __call__(self, ids):
        return self.dense(self.embed(ids).reshape(len(ids), -1))[:, 0]


@pytest.mark.parametrize("operation", [None, *OPERATIONS])
def test_it_trains_where_nnx_embed_stood(operation, rng):
    rngs = nnx.Rngs(0)
    if operation is None:
        embed = nnx.Embed(29, FEATURES, rngs=rngs)
    else:
        embed = MultiHashEmbed(cases.config("mixed radix", operation), rngs=rngs)
    model = Model(embed, rngs)
    optimizer = nnx.Optimizer(model, optax.adagrad(0.3), wrt=nnx.Param)
    ids = rng.integers(0, 29, (64, 2)).astype(np.int32)
    labels = np.float32(ids % 2 - ids // 10).sum(1)  # a sum over digits, as add can learn
    start = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: ((m(ids) - labels) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer) for _ in range(60)]
    assert losses[-1] < 0.4 * losses[0]
    end = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), start, end)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_parameters_pass_between_linen_and_nnx_by_name(operation, rng):
    """As documented in `qrhash.linen`; then both train to the same parameters."""
    cfg = cases.config("mixed radix", operation)
    linen, embed = qrhash.linen.MultiHashEmbed(cfg), MultiHashEmbed(cfg, rngs=nnx.Rngs(7))
    ids = rng.integers(0, 29, (16,)).astype(np.int32)
    variables = nn.unbox(linen.init(jax.random.key(0), ids))
    nnx.update(embed, variables["params"])
    assert_close(embed(ids), linen.apply(variables, ids))
    tx = optax.adagrad(0.1)

    @jax.jit
    def train(params, vectors_of):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: jnp.cos(3 * vectors_of(p)).sum())(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, 3)[0][0]

    graph, state = nnx.split(embed)
    trained = train(state, jax.tree_util.Partial(lambda s: nnx.merge(graph, s)(ids)))
    by_linen = train(variables, jax.tree_util.Partial(lambda v: linen.apply(v, ids)))
    back = {"params": nnx.to_pure_dict(trained)}
    jax.tree.map(assert_close, back, by_linen)
    nnx.update(embed, trained)
    assert_close(linen.apply(back, ids), embed(ids))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_partition_metadata(operation):
    partition = qrhash.QuotientRemainder(8192, 4)
    cfg = qrhash.EmbedConfig(
        partition, FEATURES, operation, large_table_rows=2048, logical_axes=AXES
    )
    state = nnx.state(nnx.eval_shape(lambda: MultiHashEmbed(cfg, rngs=nnx.Rngs(0))))
    spec = {
        "table_0": PartitionSpec("rows", "features"),
        "table_1": PartitionSpec(None, "features"),
    }
    if operation == "project":
        spec |= {"kernel": PartitionSpec(None, "features"), "bias": PartitionSpec("features")}
    assert nnx.to_pure_dict(nnx.get_partition_spec(state)) == spec


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("operation", ["mult", "project"])
def test_eight_devices_give_the_numbers_of_one(operation, axis_type, rng):
    """Large tables split by rows, small ones whole on every device; the gradients alike."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    partition = qrhash.QuotientRemainder(8192, 4)
    cfg = qrhash.EmbedConfig(
        partition, FEATURES, operation, large_table_rows=2048, logical_axes=AXES
    )
    graph, state = nnx.split(MultiHashEmbed(cfg, rngs=nnx.Rngs(0)))
    ids = jnp.asarray(rng.integers(-9, 8192, (64,)), jnp.int32)
    with nnx.logical_axis_rules(RULES):
        placement = nnx.get_named_sharding(state, mesh)

    def step(state, ids):
        vectors = nnx.merge(graph, state)(ids)
        return jnp.where(jnp.isnan(vectors), 0, jnp.sin(vectors)).sum(), vectors

    step = jax.grad(step, has_aux=True)
    alone = jax.jit(step)(state, ids)
    placed = jax.device_put(state, placement)
    by_batch = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        spread = jax.jit(step, out_shardings=(placement, by_batch))(
            placed, jax.device_put(ids, by_batch)
        )
    large, small = placed["table_0"][...], placed["table_1"][...]
    assert {shard.data.shape[0] for shard in large.addressable_shards} == {2048 // 8}
    assert small.sharding.is_fully_replicated
    jax.tree.map(assert_close, jax.tree.leaves(spread), jax.tree.leaves(alone))


@pytest.mark.parametrize("tx", [optax.adagrad(0.1), optax.adafactor(0.1)], ids=["adagrad", "other"])
def test_only_state_in_the_layout_of_a_table_is_a_table(tx):
    """Adafactor keeps arrays (1,) too, with the table's metadata."""
    layout = qrhash.MeshLayout(mesh=jax.make_mesh((8,), ("model",)))
    partition = qrhash.FullTable(1003)
    cfg = qrhash.EmbedConfig(partition, FEATURES, large_table_rows=5, layout=layout)
    state = nnx.state(Optimizer(MultiHashEmbed(cfg, rngs=nnx.Rngs(0)), tx))
    held = [as_table(variable) for _, variable in nnx.to_flat_state(state)]
    tables = [each for each in held if isinstance(each, qrhash.ShardedTable)]
    assert [table.shape for table in tables] == [(1003, FEATURES)]
    assert all(each.ndim < 2 for each in held if each not in tables)
    where = qrhash.nnx.shardings(nnx.eval_shape(lambda: state), layout)
    jax.device_put(state, where)
