"""The linen module: the pure core with parameters in the places where Flax looks for them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

import qrhash
from qrhash.linen import MultiHashEmbed
from support import cases, oracle
from support.cases import FAMILIES, FEATURES, OF_EACH_KIND, assert_close

AXES = ("rows", "features")
RULES = (("rows", "data"), ("features", None))


def _variables(cfg, rng):
    """Random parameters under the documented names, and the same as the core takes them."""
    tables, projection = cases.parameters(cfg, rng)
    params = {f"table_{j}": table for j, table in enumerate(tables)}
    return {"params": params | (projection._asdict() if projection else {})}, tables, projection


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operation", OF_EACH_KIND)
def test_it_looks_up_and_attends_as_the_oracle_does(operation, family, rng):
    cfg = cases.config(family, operation)
    embed = MultiHashEmbed(cfg)
    variables, tables, projection = _variables(cfg, rng)
    ids = rng.integers(-1, cfg.num_embeddings + 1, (2, 3)).astype(np.int32)
    query = rng.standard_normal((4, FEATURES)).astype(np.float32)
    every = oracle.lookup(tables, np.arange(cfg.num_embeddings), cfg, projection)
    apply = jax.jit(embed.apply)
    assert_close(apply(variables, ids), oracle.lookup(tables, ids, cfg, projection))
    assert_close(embed.apply(variables, query, method="attend"), query @ every.T)
    assert (embed.num_embeddings, embed.features) == (cfg.num_embeddings, FEATURES)


@pytest.mark.parametrize("operation", OF_EACH_KIND)
def test_init_gives_the_documented_parameters(operation):
    cfg = cases.config("mixed radix", operation, param_dtype=jnp.bfloat16)
    params = nn.unbox(MultiHashEmbed(cfg).init(jax.random.key(0), np.zeros(2, int)))["params"]
    shapes = {f"table_{j}": shape for j, shape in enumerate(cfg.table_shapes)}
    if operation == "project":
        shapes |= {"kernel": cfg.projection_shape, "bias": (FEATURES,)}
    assert {name: param.shape for name, param in params.items()} == shapes
    assert {param.dtype for param in params.values()} == {jnp.dtype(jnp.bfloat16)}
    assert cfg.num_params == sum(param.size for param in params.values())
    flat = [np.float32(param).ravel() for name, param in params.items() if name != "bias"]
    assert all(np.ptp(entries) > 0 for entries in flat)
    assert not np.array_equal(flat[0][:6], flat[1][:6])


def test_an_id_policy_that_raises():
    embed = MultiHashEmbed(cases.config("quotient-remainder", "mult", id_policy="raise"))
    with pytest.raises(ValueError, match="11"):
        embed.init(jax.random.key(0), np.array([3, 11]))


class Model(nn.Module):
    """Two ids per row; made for `nn.Embed`."""

    embed: nn.Module

    @nn.compact
    def __call__(self, ids):
        vectors = self.embed(ids)
        return nn.Dense(1)(vectors.reshape(len(ids), -1))[:, 0]


@pytest.mark.parametrize("operation", [None, *OF_EACH_KIND])
def test_it_trains_where_nn_embed_stood(operation, rng):
    embed = nn.Embed(29, FEATURES) if operation is None else None
    model = Model(embed or MultiHashEmbed(cases.config("mixed radix", operation)))
    ids = rng.integers(0, 29, (64, 2)).astype(np.int32)
    labels = np.float32(ids % 2 - ids // 10).sum(1)  # a sum over digits, as add can learn
    params = model.init(jax.random.key(0), ids)
    tx = optax.adagrad(0.3)

    @jax.jit
    def train(params):
        def loss(params):
            return ((model.apply(params, ids) - labels) ** 2).mean()

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), None, 60)

    (trained, _), losses = train(params)
    assert losses[-1] < 0.4 * losses[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), trained, params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("operation", OF_EACH_KIND)
def test_partition_metadata(operation):
    partition = qrhash.QuotientRemainder(8192, 4)
    cfg = qrhash.EmbedConfig(
        partition, FEATURES, operation, large_table_rows=2048, logical_axes=AXES
    )
    ids = jax.ShapeDtypeStruct((2,), jnp.int32)
    variables = jax.eval_shape(MultiHashEmbed(cfg).init, jax.random.key(0), ids)
    spec = {
        "table_0": PartitionSpec("rows", "features"),
        "table_1": PartitionSpec(None, "features"),
    }
    if operation == "project":
        spec |= {"kernel": PartitionSpec(None, "features"), "bias": PartitionSpec("features")}
    assert nn.get_partition_spec(variables)["params"] == spec


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("operation", ["mult", "project"])
def test_eight_devices_give_the_numbers_of_one(operation, axis_type, rng):
    """Large tables split by rows, small ones whole on every device; the gradients alike."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    partition = qrhash.QuotientRemainder(8192, 4)
    cfg = qrhash.EmbedConfig(
        partition, FEATURES, operation, large_table_rows=2048, logical_axes=AXES
    )
    embed = MultiHashEmbed(cfg)
    ids = jnp.asarray(rng.integers(-9, 8192, (64,)), jnp.int32)
    variables = embed.init(jax.random.key(0), ids)
    spec = nn.get_partition_spec(variables)
    placement = nn.logical_to_mesh_sharding(spec, mesh, RULES)

    def step(variables, ids):
        vectors = embed.apply(variables, ids)
        return jnp.where(jnp.isnan(vectors), 0, jnp.sin(vectors)).sum(), vectors

    step = jax.grad(step, has_aux=True)
    alone = jax.jit(step)(variables, ids)
    placed = jax.device_put(nn.unbox(variables), placement)
    by_batch = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        spread = jax.jit(step, out_shardings=(placement, by_batch))(
            placed, jax.device_put(ids, by_batch)
        )
    tables = placed["params"]
    assert {s.data.shape[0] for s in tables["table_0"].addressable_shards} == {2048 // 8}
    assert tables["table_1"].sharding.is_fully_replicated
    jax.tree.map(assert_close, nn.unbox(spread), nn.unbox(alone))
