"""The look-up as an operation of JAX: its derivatives, above all of small tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qrhash
from support import oracle
from support.cases import FAMILIES, FEATURES, OPERATIONS, assert_close, parameters
from support.cases import config as make_config

UNCHECKED_KEYS = True


def _gather(table, index):
    return qrhash.gather((table,), (index,))[0]


# --- small tables: dense gradients, by scatter-adds and by one-hot products -----------------------


@pytest.fixture(params=[0, 8])
def one_hot_rows(request, monkeypatch):
    """Up to how many rows gradients are one-hot products: none on the CPU, many elsewhere."""
    monkeypatch.setattr(qrhash.tuning, "one_hot_rows", lambda _: request.param)
    return request.param


def test_one_hot_products_are_taken_where_they_are_asked_for(one_hot_rows):
    gather = lambda table: _gather(table, jnp.zeros(5, jnp.int32)).sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(gather))(jnp.ones((4, 2))))
    assert ("dot_general" in text) == (one_hot_rows > 0)
    assert ("scatter" in text) == (one_hot_rows == 0)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("rows", [1, 2, 8, 9])
@pytest.mark.usefixtures("one_hot_rows")
def test_gradients_of_small_tables_equal_the_oracle(rows, operation, rng):
    """On both sides of where one-hot products end; many look-ups for each row."""
    cfg = qrhash.EmbedConfig(qrhash.QuotientRemainder(11 * rows, rows), FEATURES, operation)
    params = tables, projection = parameters(cfg, rng)
    ids = rng.integers(-1, 11 * rows + 1, (40, 2)).astype(np.int32)
    weights = rng.standard_normal((40, 2, FEATURES)).astype(np.float32)

    def loss(params):
        good = ((ids >= 0) & (ids < 11 * rows))[..., None]
        vectors = qrhash.lookup(params[0], ids, cfg, params[1])
        return (jnp.where(good, vectors, 0) * weights).sum()

    got = jax.jit(jax.grad(loss))(params)
    want_tables, want_projection = oracle.gradient(tables, [ids], [weights], cfg, projection)
    jax.tree.map(assert_close, got[0], want_tables)
    if projection is not None:
        jax.tree.map(assert_close, tuple(got[1]), want_projection)


@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.usefixtures("one_hot_rows")
def test_a_nan_cotangent_at_an_id_without_a_row_stays_there(rows, rng):
    table = jnp.asarray(rng.standard_normal((rows, 2)), jnp.float32)
    index = jnp.array([0, rows, 3, -1, 3], jnp.int32)
    gather = lambda table: _gather(table, index)  # noqa: E731
    cotangent = jnp.ones((5, 2)).at[jnp.array([1, 3])].set(jnp.nan)
    (grad,) = jax.vjp(gather, table)[1](cotangent)
    np.testing.assert_array_equal(grad[:, 0], np.bincount([0, 3, 3], minlength=rows))


@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.usefixtures("one_hot_rows")
def test_small_tables_under_jvp_vmap_and_second_derivatives(rows, rng):
    """Held against indexing, whose derivatives are JAX's own."""
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    tables, dots = draw(3, rows, 2), draw(3, rows, 2)
    index = jnp.asarray(rng.integers(0, rows, (3, 4, 2)), jnp.int32)

    def all_derivatives(take):
        f = lambda table, index: jnp.sin(take(table, index)).sum()  # noqa: E731
        jvp = lambda t, d, i: jax.jvp(lambda t: take(t, i), (t,), (d,))  # noqa: E731
        return jax.jit(
            lambda: (
                jax.vmap(jvp)(tables, dots, index),
                jax.vmap(jvp, in_axes=(None, None, 0))(tables[0], dots[0], index),
                jax.vmap(jvp, in_axes=(0, 0, None))(tables, dots, index[0]),
                jax.vmap(jax.grad(f))(tables, index),
                jax.hessian(f)(tables[0], index[0]),
                jax.linearize(lambda t: take(t, index[0]), tables[0])[1](dots[0]),
            )
        )()

    got, want = all_derivatives(_gather), all_derivatives(lambda table, index: table[index])
    jax.tree.map(assert_close, got, want)


def test_a_look_up_in_small_tables_keeps_no_rows_for_its_derivative():
    cfg = make_config("quotient-remainder", "mult")
    tables = tuple(jnp.ones(shape) for shape in cfg.table_shapes)
    ids = jnp.arange(5)
    _, backward = jax.vjp(lambda tables: qrhash.lookup(tables, ids, cfg), tables)
    kept = [leaf.shape for leaf in jax.tree.leaves(backward)]
    assert (5, FEATURES) not in kept
    assert set(cfg.table_shapes) <= set(kept)


def test_the_gradient_without_row_gradients_is_dense_and_right(rng):
    """For who does nothing special."""
    for family in FAMILIES:
        cfg = make_config(family, "mult", large_table_rows=3)
        tables, _ = parameters(cfg, rng)
        ids = rng.integers(0, cfg.num_embeddings, (6,)).astype(np.int32)
        weights = rng.standard_normal((6, FEATURES)).astype(np.float32)
        loss = functools.partial(_weighted, ids=ids, weights=weights, cfg=cfg)
        want, _ = oracle.gradient(tables, [ids], [weights], cfg)
        jax.tree.map(assert_close, jax.grad(loss)(tables), want)


def _weighted(tables, ids, weights, cfg):
    return (qrhash.lookup(tables, ids, cfg) * weights).sum()


# --- narrow tables: sums must not end where their dtype does -------------------------------------

NARROW = {"bfloat16": 256, "float16": 2048, "float32": 2**24}  # where adding 1 changes nothing
PARAM_DTYPES = ("bfloat16", "float16")


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("param_dtype", PARAM_DTYPES)
@pytest.mark.parametrize("operation", ["add", "concat", "project"])
def test_gradients_of_narrow_tables_are_summed_in_float32(param_dtype, dtype, operation):
    """Of 4 rows and 16384 look-ups: 4096 ones for each row, far beyond where ones are lost."""
    cfg = qrhash.EmbedConfig(
        qrhash.QuotientRemainder(1_000_000, 4), 8, operation, dtype=dtype, param_dtype=param_dtype
    )
    tables = qrhash.init(jax.random.key(0), cfg)
    projection = qrhash.init_projection(jax.random.key(0), cfg)
    if projection is not None:
        # Every entry of the second table's rows then adds up to itself.
        kernel = jnp.zeros_like(projection.kernel).at[jnp.arange(2, 4), jnp.arange(2)].set(1)
        projection = projection._replace(kernel=kernel)
    ids = jnp.arange(16384)
    loss = lambda t: qrhash.lookup(t, ids, cfg, projection).astype(jnp.float32).sum()  # noqa: E731
    for gradient in (jax.grad(loss)(tables), jax.jit(jax.grad(loss))(tables)):
        assert gradient[1].dtype == param_dtype
        np.testing.assert_array_equal(np.asarray(gradient[1], np.float32), 4096)
    _, by_rows = qrhash.value_and_grad(loss, True)(tables)
    np.testing.assert_array_equal(np.asarray(by_rows[1].to_dense(), np.float32), 4096)


WAYS = {
    "scan over parts of the batch": lambda f, t, ids: jax.lax.map(
        lambda part: f(t, part), ids.reshape(4, -1)
    ),
    "vmap over the batch": lambda f, t, ids: jax.vmap(lambda part: f(t, part))(ids.reshape(-1, 2)),
    "vmap over many tables": lambda f, t, ids: jax.vmap(f, (0, None))(jnp.stack([t, t]), ids),
    "jit": lambda f, t, ids: jax.jit(f)(t, ids),
    "checkpoint": lambda f, t, ids: jax.checkpoint(f)(t, ids),
}


@pytest.mark.parametrize("one_hot_rows", [0, 8], indirect=True)
@pytest.mark.parametrize("way", WAYS)
def test_narrow_gradients_inside_other_transformations(way, one_hot_rows):
    del one_hot_rows
    if way == "scan over parts of the batch":
        # A loop adds up what its turns give in the table's dtype: these stay within it.
        table, ids, want = jnp.ones((4, 2), jnp.float16), jnp.arange(4096) % 4, 1024
    else:
        table, ids, want = jnp.ones((4, 2), jnp.bfloat16), jnp.arange(16384) % 4, 4096
    loss = lambda t: WAYS[way](_gather, t, ids).astype(jnp.float32).sum()  # noqa: E731
    gradient = jax.grad(loss)(table).astype(jnp.float32)
    np.testing.assert_array_equal(gradient, want * (1 + (way == "vmap over many tables")))


@pytest.mark.parametrize("param_dtype", PARAM_DTYPES)
def test_attended_narrow_tables(param_dtype):
    """The quotient row of many ids: a sum over them all."""
    cfg = qrhash.EmbedConfig(
        qrhash.QuotientRemainder(16384, 4), 2, "add", dtype=param_dtype, param_dtype=param_dtype
    )
    tables = qrhash.init(jax.random.key(0), cfg)
    logits = lambda t: qrhash.attend(t, jnp.ones(2, param_dtype), cfg)  # noqa: E731
    gradient = jax.grad(lambda t: logits(t).astype(jnp.float32).sum())(tables)
    np.testing.assert_array_equal(np.asarray(gradient[1], np.float32), 4096)


@pytest.mark.parametrize("module", ["linen", "nnx", "collection"])
def test_narrow_tables_of_modules(module):
    from flax import linen as nn
    from flax import nnx

    cfg = qrhash.EmbedConfig(
        qrhash.QuotientRemainder(1_000_000, 4), 8, "add", dtype="float32", param_dtype="bfloat16"
    )
    ids = jnp.arange(16384)
    if module == "linen":
        model = qrhash.linen.MultiHashEmbed(cfg)
        variables = nn.unbox(model.init(jax.random.key(0), ids))
        gradient = jax.grad(lambda v: model.apply(v, ids).sum())(variables)["params"]["table_1"]
    elif module == "nnx":
        model = qrhash.nnx.MultiHashEmbed(cfg, rngs=nnx.Rngs(0))
        gradient = nnx.grad(lambda model: model(ids).sum())(model)["table_1"].get_value()
    else:
        model = qrhash.nnx.EmbedCollection({"a": cfg, "b": "a"}, rngs=nnx.Rngs(0))
        both = {"a": ids[:8192], "b": ids[:8192]}
        grads = nnx.grad(lambda m: sum(v.sum() for v in m(both).values()))(model)
        (gradient,) = (g.get_value() for name, g in grads.items() if name.startswith("small"))
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), 4096)


def test_narrow_tables_on_a_mesh():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=auto)
    cfg = qrhash.EmbedConfig(
        qrhash.QuotientRemainder(80_000, 4),
        8,
        "add",
        dtype="float32",
        param_dtype="bfloat16",
        layout=qrhash.MeshLayout(mesh=mesh),
    )
    ids = jnp.arange(16384)
    tables = qrhash.init(jax.random.key(0), cfg)
    loss = lambda tables: qrhash.lookup(tables, ids, cfg).sum()  # noqa: E731
    large, small = jax.jit(jax.grad(loss))(tables)
    np.testing.assert_array_equal(np.asarray(small, np.float32), 4096)
    np.testing.assert_array_equal(np.asarray(large.to_array()[:4096], np.float32), 4)
    ids = jnp.zeros(16384, jnp.int32)
    large, _ = jax.jit(jax.grad(loss))(tables)
    np.testing.assert_array_equal(np.asarray(large.to_array()[0], np.float32), 16384)
