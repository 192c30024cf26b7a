"""The pure core against the oracle: look-up, gradients, id policies, initialisers, attend."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import checkify

import qrhash
from support import oracle
from support.cases import (
    CASES,
    DTYPES,
    FAMILIES,
    FEATURES,
    OF_EVERY_DTYPE,
    OPERATIONS,
    OPTIMIZED,
    POLICIES,
    assert_close,
    ids_of_every_shape,
    parameters,
)
from support.cases import config as make_config

UNCHECKED_KEYS = True  # but where tables are drawn

per_operation = pytest.mark.parametrize("operation", OPERATIONS)
per_family = pytest.mark.parametrize("family", FAMILIES)
per_policy = pytest.mark.parametrize("policy", POLICIES)


def _weights(ids, rng):
    return [rng.standard_normal((*i.shape, FEATURES)).astype(np.float32) for i in ids]


def _assert_gradients(got, want, tolerance=1e-5):
    (tables, projection), (want_tables, want_projection) = got, want
    for g, w in zip(tables, want_tables, strict=True):
        assert_close(g, w, tolerance)
    if want_projection is not None:
        for g, w in zip(projection, want_projection, strict=True):
            assert_close(g, w, tolerance)


# --- look-up and gradients ------------------------------------------------------------------------


def test_any_two_choices_meet_in_a_case():
    of = {"family": OF_EVERY_DTYPE, "operation": OPERATIONS, "dtypes": DTYPES}
    for a, b in itertools.combinations(of, 2):
        met = {(getattr(case, a), getattr(case, b)) for case in CASES}
        assert met >= set(itertools.product(of[a], of[b]))
    assert {case[:2] for case in CASES} == set(itertools.product(FAMILIES, OPERATIONS))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lookup_and_gradients_equal_the_oracle(case, rng):
    """All ranks of ids at once, in one compilation; and NumPy ids, eagerly."""
    cfg, (of_vectors, of_gradients) = case.config, case.tolerances
    params = tables, projection = parameters(cfg, rng)

    def loss(params, ids, weights):
        vectors = [qrhash.lookup(params[0], i, cfg, params[1]) for i in ids]
        pairs = zip(vectors, weights, strict=True)
        return sum((v.astype(jnp.float32) * w).sum() for v, w in pairs), vectors

    grad = jax.grad(loss, has_aux=True)
    jitted = jax.jit(grad)
    for step in (jitted, jitted, grad) if case.dtypes == "f32" else (jitted, jitted):
        ids = ids_of_every_shape(cfg, rng)
        ids = ids if step is jitted else ids[3:4]
        weights = _weights(ids, rng)
        gradients, vectors = step(params, ids, weights)
        for v, i in zip(vectors, ids, strict=True):
            assert v.dtype == (cfg.dtype or cfg.param_dtype)
            assert_close(v, oracle.lookup(tables, i, cfg, projection), of_vectors)
        assert all(g.dtype == cfg.param_dtype for g in jax.tree.leaves(gradients))
        want = oracle.gradient(tables, ids, weights, cfg, projection)
        _assert_gradients(gradients, want, of_gradients)
    assert jitted._cache_size() == 1


@per_operation
def test_gradients_equal_those_of_one_hot_matmuls(operation, rng):
    configs = [make_config(family, operation) for family in FAMILIES]
    params = [parameters(cfg, rng) for cfg in configs]
    ids = [rng.integers(0, cfg.num_embeddings, (3, 4)) for cfg in configs]

    def dense(params, ids, cfg):
        tables, projection = params
        numbers = zip(oracle.indices(cfg.partition, ids), tables, strict=True)
        rows = [np.eye(len(t), dtype=np.float32)[i.astype(int)] @ t for i, t in numbers]
        match operation:
            case "add":
                return sum(rows)
            case "mult":
                return functools.reduce(jnp.multiply, rows)
            case "concat":
                return jnp.concatenate(rows, -1)
            case "path":
                vector, *maps = sorted(rows, key=lambda row: row.shape[-1] > 2)
                for row in maps:
                    lines = row.reshape(*ids.shape, 3, -1)
                    vector = jnp.einsum("...i,...io->...o", vector, lines[..., :-1, :])
                    vector += lines[..., -1, :]
                return vector
        product = [functools.reduce(jnp.multiply, rows)] * (len(rows) > 1)
        vectors = jnp.concatenate(rows + product, -1) @ projection.kernel
        return vectors + projection.bias[None, None]

    def ours(params, ids, cfg):
        return qrhash.lookup(params[0], ids, cfg, params[1])

    def gradients(vectors):
        """Of one loss over all families: one compilation."""

        def loss(params):
            return sum((jnp.sin(v) ** 2).sum() for v in map(vectors, params, ids, configs))

        return jax.jit(jax.grad(loss))(params)

    close = functools.partial(assert_close, tolerance=1e-4)
    jax.tree.map(close, gradients(ours), gradients(dense))


@per_operation
def test_one_compilation_for_equal_configs_and_repeated_shapes(operation, rng):
    lookup = jax.jit(lambda *args: qrhash.lookup(*args), static_argnums=2)
    for shape, count in [((5,), 1), ((5,), 1), ((), 2), ((), 2), ((5,), 2)]:
        cfg = make_config("mixed radix", operation)
        tables, projection = parameters(cfg, rng)
        ids = jnp.asarray(rng.integers(0, cfg.num_embeddings, shape), jnp.int32)
        got = lookup(tables, ids, cfg, projection)
        assert_close(got, oracle.lookup(tables, ids, cfg, projection))
        assert lookup._cache_size() == count


@per_operation
def test_vmap_over_ids_and_over_tables(operation, rng):
    cfg = make_config("quotient-remainder", operation)
    params = [parameters(cfg, rng) for _ in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    ids = rng.integers(-2, cfg.num_embeddings + 2, (2, 3)).astype(np.int32)
    got = jax.vmap(lambda p, i: qrhash.lookup(p[0], i, cfg, p[1]))(stacked, ids)
    want = [oracle.lookup(p[0], i, cfg, p[1]) for p, i in zip(params, ids, strict=True)]
    assert_close(got, want)


def test_a_bare_kernel_serves_as_projection_without_bias(rng):
    cfg = make_config("quotient-remainder", "project", use_bias=False)
    tables, (kernel, _) = parameters(cfg, rng)
    want = oracle.lookup(tables, [3, 4], cfg, (kernel, None))
    assert_close(qrhash.lookup(tables, np.array([3, 4]), cfg, kernel), want)


@pytest.mark.parametrize(
    "partition",
    [
        qrhash.FullTable(1),
        qrhash.QuotientRemainder(1),
        qrhash.QuotientRemainder(5, 1),
        qrhash.QuotientRemainder(5, 5),
        qrhash.MixedRadix(4, (1, 4, 1)),
    ],
)
@per_operation
def test_one_row_tables(operation, partition, rng):
    cfg = qrhash.EmbedConfig(partition, FEATURES, operation)
    params = tables, projection = parameters(cfg, rng)
    ids = [np.append(np.arange(partition.num_embeddings), 0)]
    weights = _weights(ids, rng)

    def loss(params):
        vectors = qrhash.lookup(params[0], ids[0], cfg, params[1])
        return (vectors * weights[0]).sum(), vectors

    got, vectors = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert_close(vectors, oracle.lookup(tables, ids[0], cfg, projection))
    _assert_gradients(got, oracle.gradient(tables, ids, weights, cfg, projection))


# --- ids outside the vocabulary -------------------------------------------------------------------

BAD = {
    "int32": [-1, -2, 11, 29, 2**31 - 1, -(2**31)],
    "uint32": [11, 29, 2**31, 2**32 - 1],
    "int8": [-1, -2, 11, 29, 127, -128],
    "uint8": [11, 29, 128, 255],
    "int64": [-1, 2**31, 2**32, 2**40 + 3, 2**63 - 1, -(2**63)],
    "uint64": [29, 2**32, 2**32 + 1, 2**63, 2**64 - 1],
}


def _bad_and_good(dtype, n):
    """Eight ids: those above that are outside [0, n), then the last and the first inside."""
    bad = [x for x in BAD[dtype] if not 0 <= x < n]
    return np.array([*(bad * 3)[:6], n - 1, 0], dtype)


def _lookups(cfg, rng):
    """The library's and the oracle's, on the same random tables."""
    tables, projection = parameters(cfg, rng)
    options = {"projection": projection}
    return (
        functools.partial(qrhash.lookup, tables, config=cfg, **options),
        functools.partial(oracle.lookup, tables, cfg=cfg, **options),
    )


@per_policy
@per_operation
def test_policies_for_every_family(operation, policy, rng):
    """NumPy ids on the host and, where nothing is raised, traced ids."""
    configs = [make_config(family, operation, id_policy=policy) for family in FAMILIES]
    lookups = [_lookups(cfg, rng) for cfg in configs]
    for cfg, (lookup, want) in zip(configs, lookups, strict=True):
        ids = _bad_and_good("int64", cfg.num_embeddings)
        if policy == "raise":
            with pytest.raises(ValueError, match=rf"{ids[0]}\b"):
                lookup(ids)
            ids = np.resize(ids[-2:], 8)
        assert_close(lookup(ids), want(ids))
    if policy != "raise":
        ids = [_bad_and_good("int32", cfg.num_embeddings) for cfg in configs]
        traced = jax.jit(lambda ids: [f(i) for (f, _), i in zip(lookups, ids, strict=True)])
        for got, (_, want), i in zip(traced(ids), lookups, ids, strict=True):
            assert_close(got, want(i))


@per_policy
@pytest.mark.parametrize("dtype", BAD)
def test_policies_for_every_dtype_of_ids(dtype, policy, rng):
    cfg = make_config("mixed radix", "add", id_policy=policy)
    lookup, want = _lookups(cfg, rng)
    ids = _bad_and_good(dtype, cfg.num_embeddings)
    on_device = "64" not in dtype  # JAX has no ids of 64 bits without x64
    for concrete in [ids, jnp.asarray(ids)] if on_device else [ids]:
        if policy == "raise":
            with pytest.raises(ValueError, match="num_embeddings=29") as error:
                lookup(concrete)
            assert f" {ids[0]} " in str(error.value)
        else:
            assert_close(lookup(concrete), want(ids))
    if on_device and policy != "raise":
        assert_close(jax.jit(lookup)(ids), want(ids))


def _checked(lookup, ids):
    """The vectors of a look-up inside jit; its checks are thrown as an error."""
    error, vectors = jax.jit(checkify.checkify(lookup))(ids)
    error.throw()
    return vectors


@per_operation
def test_policy_raise_inside_jit_goes_through_checkify(operation, rng):
    cfg = make_config("quotient-remainder", operation, id_policy="raise")
    lookup, want = _lookups(cfg, rng)
    for bad in (-1, cfg.num_embeddings, 2**31 - 1, -(2**31)):
        with pytest.raises(checkify.JaxRuntimeError, match=rf"{bad}\b.*num_embeddings"):
            _checked(lookup, jnp.array([[1, bad, 3]], jnp.int32))
    for good in ([3, 0, 10], 4, np.zeros((0, 2))):
        good = jnp.asarray(good, jnp.int32)
        assert_close(_checked(lookup, good), want(good))
    with pytest.raises(ValueError, match="checkify"):
        jax.jit(lookup)(jnp.array([1], jnp.int32))


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_policy_raise_for_ids_that_are_constants_of_a_jitted_function(asarray, rng):
    """They are concrete, so the host checks them and no checkify is needed."""
    cfg = make_config("quotient-remainder", "mult", id_policy="raise")
    tables, _ = parameters(cfg, rng)
    for ids in ([3, 10], [3, 11]):
        ids = asarray(np.int32(ids))
        lookup = jax.jit(lambda tables, ids=ids: qrhash.lookup(tables, ids, cfg))
        if ids[1] == 11:
            with pytest.raises(ValueError, match=r"\b11\b"):
                lookup(tables)
        else:
            assert_close(lookup(tables), oracle.lookup(tables, ids, cfg))


def test_python_ids(rng):
    cfg = make_config("quotient-remainder", "mult")
    tables, _ = parameters(cfg, rng)
    for ids in (3, [3, -1], [[10], [11]], []):
        want = oracle.lookup(tables, np.array(ids, int), cfg)
        assert_close(qrhash.lookup(tables, ids, cfg), want)


@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=8, max_size=8))
def test_the_default_gives_no_finite_vector_for_a_bad_id(ids):
    for operation in OPERATIONS:
        cfg = make_config("mixed radix", operation)
        assert cfg.id_policy == "nan"
        tables, projection = parameters(cfg, np.random.default_rng(0))
        vectors = qrhash.lookup(tables, np.array(ids), cfg, projection)
        good = np.array([0 <= x < cfg.num_embeddings for x in ids])
        np.testing.assert_array_equal(np.isnan(vectors), np.broadcast_to(~good[:, None], (8, 8)))


@pytest.mark.parametrize("masked", [False, True], ids=["squares", "masked"])
@pytest.mark.parametrize("policy", ["nan", "zero"])
@per_operation
def test_no_gradient_comes_from_a_bad_id(operation, policy, masked, rng):
    """Neither where its cotangent is NaN nor where the loss masks its vector out."""
    ids = np.array([3, -1, 0, 2**31 - 1, 3, 29, 10], np.int32)
    configs = [make_config(family, operation, id_policy=policy) for family in FAMILIES]
    params = [parameters(cfg, rng) for cfg in configs]

    def loss(params, ids):
        total = 0.0
        for (tables, projection), cfg in zip(params, configs, strict=True):
            vectors = qrhash.lookup(tables, ids, cfg, projection)
            good = (ids >= 0) & (ids < cfg.num_embeddings)
            total += ((jnp.where(good[:, None], vectors, 0) if masked else vectors) ** 2).sum()
        return total

    gradients = jax.jit(jax.grad(loss))(params, ids)
    for got, (tables, projection), cfg in zip(gradients, params, configs, strict=True):
        weights = 2 * oracle.lookup(tables, ids, cfg, projection)
        want = oracle.gradient(tables, [ids], [weights], cfg, projection)
        _assert_gradients(got, want)


@per_policy
def test_numpy_ids_of_a_vocabulary_beyond_int32(policy, rng):
    p = qrhash.MixedRadix.balanced(2**40, 4)
    cfg = qrhash.EmbedConfig(p, FEATURES, id_policy=policy)
    tables, _ = parameters(cfg, rng)
    good = np.array([0, 2**31, 2**32, 2**32 + 1, 2**40 - 1])
    bad = np.array([2**40, -1, 2**40 + 2**32, -(2**63), 2**63 - 1])
    assert_close(qrhash.lookup(tables, good, cfg), oracle.lookup(tables, good, cfg))
    if policy == "raise":
        with pytest.raises(ValueError, match=str(2**40)):
            qrhash.lookup(tables, bad, cfg)
    else:
        assert_close(qrhash.lookup(tables, bad, cfg), oracle.lookup(tables, bad, cfg))
    for ids in (jnp.array([1], jnp.int32), jnp.array([1], jnp.uint32)):
        with pytest.raises(ValueError, match="64"):
            qrhash.lookup(tables, ids, cfg)


@per_policy
@pytest.mark.parametrize("n", [2**31 - 1, 2**31])
def test_the_largest_vocabularies_of_int32_ids(n, policy, rng):
    cfg = qrhash.EmbedConfig(qrhash.MixedRadix.balanced(n, 4), FEATURES, id_policy=policy)
    tables, _ = parameters(cfg, rng)
    ids = np.array([0, n - 1, n - 2] + [-1, 2**31 - 1, -(2**31)] * (policy != "raise"), np.int32)
    assert_close(qrhash.lookup(tables, jnp.asarray(ids), cfg), oracle.lookup(tables, ids, cfg))


# --- gather ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_gather_fills_what_lies_outside_the_table(asarray):
    tables = (jnp.arange(6.0).reshape(3, 2), jnp.arange(4.0).reshape(4, 1))
    indices = ([[0, 2, 3], [-1, 1, -3]], [[3, 4, 0], [1, -1, 0]])
    indices = tuple(asarray(np.int32(i)) for i in indices)
    first, second = qrhash.gather(tables, indices)
    nan = [np.nan, np.nan]
    np.testing.assert_array_equal(first, [[[0, 1], [4, 5], nan], [nan, [2, 3], nan]])
    np.testing.assert_array_equal(second[..., 0], [[3, np.nan, 0], [1, np.nan, 0]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_multiplied", [False, True])
def test_gathered_rows_are_the_same_multiplied(is_multiplied, dtype, monkeypatch):
    monkeypatch.setattr(qrhash.tuning, "multiplies_gathered", lambda *_: is_multiplied)
    table = jnp.asarray([[1, 2, 3, 4], [jnp.nan, jnp.inf, -jnp.inf, 0]], dtype)
    gather = jax.jit(lambda table, index: qrhash.gather((table,), (index,), fill_value=0))
    (got,) = gather(table, jnp.asarray([1, 2, -1, 0]))
    zeros = jnp.zeros(4, dtype)
    want = jnp.stack([table[1], zeros, zeros, table[0]])
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


def test_gather_takes_host_row_numbers_of_64_bits_without_truncation():
    rows = qrhash.gather((jnp.ones((3, 1)),), (np.array([1, 2**32, 2**32 + 1, -(2**32)]),))[0]
    np.testing.assert_array_equal(rows[:, 0], [1, np.nan, np.nan, np.nan])


def test_what_does_not_fit_together_is_refused(rng):
    cfg = make_config("quotient-remainder", "mult")
    tables, _ = parameters(cfg, rng)
    with pytest.raises(ValueError, match=r"2.*1"):
        qrhash.gather(tables, (np.zeros(2, int),))
    with pytest.raises(ValueError, match="integer"):
        qrhash.lookup(tables, jnp.ones(2), cfg)
    for wrong in (tables[:1], tables[::-1], [t[:, :-1] for t in tables]):
        with pytest.raises((AssertionError, ValueError)):
            qrhash.lookup(wrong, np.zeros(2, int), cfg)
    with pytest.raises(ValueError, match="projection"):
        qrhash.lookup(tables, np.zeros(2, int), cfg, jnp.ones((3, 8)))


# --- initialisers ---------------------------------------------------------------------------------

WIDE = {  # enough rows and features for a sample variance that is good to a percent or two
    1: (qrhash.FullTable(2000), 128),
    2: (qrhash.QuotientRemainder(10**6), 128),
    3: (qrhash.MixedRadix.balanced(8 * 10**6, 3), 512),
}


@pytest.mark.parametrize(
    ("k", "stddev", "param_dtype"),
    [*((k, None, jnp.float32) for k in WIDE), (3, 8.0, jnp.float32), (2, None, jnp.bfloat16)],
    ids=[*map(str, WIDE), "3-8", "2-bf16"],
)
@pytest.mark.usefixtures("keys_used_once")
@per_operation
def test_combined_vectors_start_as_a_full_table_would(operation, k, stddev, param_dtype):
    partition, features = WIDE[k]
    cfg = qrhash.EmbedConfig(
        partition, features, operation, init_stddev=stddev, param_dtype=param_dtype,
        dtype=jnp.float32,
    )  # fmt: skip
    tables = qrhash.init(jax.random.key(1), cfg)
    projection = qrhash.init_projection(jax.random.key(2), cfg)
    assert [(t.shape, t.dtype) for t in tables] == [(s, param_dtype) for s in cfg.table_shapes]
    ids = np.random.default_rng(0).integers(0, partition.num_embeddings, 2000)
    vectors = np.asarray(_lookup(tables, partition.indices(ids), cfg, projection), np.float64)
    sigma = 0.03 if stddev is None else stddev
    per_entry = vectors.var(axis=0)
    assert abs(vectors.var() / sigma**2 - 1) < 0.05
    assert per_entry.min() / sigma**2 > 0.3
    assert per_entry.max() / sigma**2 < 3
    assert abs(vectors.mean()) < 0.012 * sigma
    assert abs(np.median(vectors)) < 0.03 * sigma
    assert abs((vectors**3).mean()) < 0.1 * sigma**3


@functools.partial(jax.jit, static_argnums=2)
def _lookup(tables, indices, cfg, projection):
    rows = [row.astype(cfg.dtype) for row in qrhash.gather(tables, indices)]
    if projection is not None:
        projection = jax.tree.map(lambda x: x.astype(cfg.dtype), projection)
    return qrhash.combine(rows, cfg.operation, projection)


@pytest.mark.usefixtures("keys_used_once")
@per_operation
def test_tables_and_projection_differ_from_each_other_and_by_key(operation):
    cfg = qrhash.EmbedConfig(qrhash.QuotientRemainder(16), FEATURES, operation)
    one, two = (
        jax.tree.leaves((qrhash.init(key, cfg), qrhash.init_projection(key, cfg)))
        for key in (jax.random.key(0), jax.random.key(1))
    )
    drawn = [table[table != 0] for table in (*one[:2], *two[:2])]  # what "path" adds starts at zero
    for a, b in itertools.combinations(drawn, 2):
        # The signs of "mult" are rounded, so that a few of them may meet by chance.
        assert np.isin(a, b).mean() < (0.2 if operation == "mult" else 1e-9)
    again = qrhash.init(jax.random.key(0), cfg)
    assert all((a == b).all() for a, b in zip(again, one[:2], strict=True))
    assert (qrhash.init_projection(jax.random.key(0), cfg) is None) == (operation != "project")


@pytest.mark.usefixtures("keys_used_once")
@per_operation
def test_a_flax_initializer_in_place_of_ours(operation):
    cfg = make_config("mixed radix", operation, embedding_init=nn.initializers.ones)
    assert all((t == 1).all() for t in qrhash.init(jax.random.key(0), cfg))
    inits = tuple(nn.initializers.constant(float(j)) for j in range(3))
    cfg = make_config("mixed radix", operation, embedding_init=inits, param_dtype=jnp.bfloat16)
    for j, table in enumerate(qrhash.init(jax.random.key(0), cfg)):
        assert table.dtype == jnp.bfloat16
        assert (table == j).all()


@pytest.mark.usefixtures("keys_used_once")
def test_without_bias_there_is_none():
    cfg = make_config("full", "project", use_bias=False)
    assert qrhash.init_projection(jax.random.key(0), cfg).bias is None
    cfg = make_config("full", "project", param_dtype=jnp.bfloat16)
    kernel, bias = qrhash.init_projection(jax.random.key(0), cfg)
    assert kernel.shape == cfg.projection_shape
    assert kernel.dtype == bias.dtype == jnp.bfloat16
    assert bias.shape == (FEATURES,)


# --- attend ---------------------------------------------------------------------------------------


@per_family
@per_operation
def test_attend_is_the_query_times_the_vectors_of_all_ids(operation, family, rng):
    cfg = make_config(family, operation, id_policy="raise")
    tables, projection = parameters(cfg, rng)
    vectors = oracle.lookup(tables, np.arange(cfg.num_embeddings), cfg, projection)
    shapes = [(FEATURES,), (5, FEATURES), (2, 3, FEATURES)]
    queries = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    attend = jax.jit(lambda *params: [qrhash.attend(params[0], q, cfg, params[1]) for q in queries])
    for got, query in zip(attend(tables, projection), queries, strict=True):
        assert_close(got, query @ vectors.T)


@pytest.mark.parametrize("policy", ["nan", "zero"])
@per_operation
def test_attend_agrees_with_lookup_on_ids_without_rows(operation, policy, rng):
    partition = qrhash.deeprec.DeepRecQuotientRemainder(11, 3, 4)  # 9 and 10 have no quotient row
    cfg = qrhash.EmbedConfig(partition, FEATURES, operation, id_policy=policy)
    tables, projection = parameters(cfg, rng)
    query = rng.standard_normal((2, FEATURES)).astype(np.float32)
    vectors = oracle.lookup(tables, np.arange(11), cfg, projection)
    assert_close(qrhash.lookup(tables, np.arange(11), cfg, projection), vectors)
    assert_close(qrhash.attend(tables, query, cfg, projection), query @ vectors.T)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_attend_computes_in_dtype(param_dtype, rng):
    cfg = make_config("quotient-remainder", "mult", dtype=jnp.bfloat16, param_dtype=param_dtype)
    tables, _ = parameters(cfg, rng)
    query = jnp.asarray(rng.standard_normal((4, FEATURES)), jnp.float32)
    got = qrhash.attend(tables, query, cfg)
    vectors = oracle.lookup(tables, np.arange(cfg.num_embeddings), cfg)
    assert got.dtype == jnp.bfloat16
    assert_close(got, np.asarray(query) @ vectors.T, 2**-5)


def test_attend_refuses_a_query_of_another_width(rng):
    cfg = make_config("quotient-remainder", "mult")
    with pytest.raises((AssertionError, ValueError)):
        qrhash.attend(parameters(cfg, rng)[0], jnp.ones((2, 7)), cfg)


@pytest.mark.usefixtures("keys_used_once")
def test_a_long_table_is_drawn_in_blocks():
    """Uniform as a short one, up to its last row, and another in every block."""
    cfg = qrhash.EmbedConfig(qrhash.FullTable(2**21 + 5), 9, init_stddev=1.0)
    (table,) = qrhash.init(jax.random.key(0), cfg)
    table = np.asarray(table)
    assert abs(table.std() - 1) < 1e-3
    assert abs(table[-5:]).min() > 0
    assert not (table[:1000] == table[-1000:]).any()


@pytest.mark.usefixtures("keys_used_once")
def test_a_table_on_a_mesh_is_created_where_it_lives():
    """No device draws, gathers or holds more than its own part, and that times a few."""
    mesh = jax.make_mesh((8,), ("model",))
    layout = qrhash.MeshLayout(mesh=mesh)
    cfg = qrhash.EmbedConfig(qrhash.FullTable(2**21), 16, layout=layout)
    init = jax.jit(lambda key: qrhash.init(key, cfg))
    compiled = init.lower(jax.random.key(0)).compile(OPTIMIZED)
    assert "all-gather" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2**21 * 16 * 4 / 8


@pytest.mark.usefixtures("keys_used_once")
def test_a_table_that_is_split_by_its_logical_axes_is_created_where_it_lives():
    """The same without a `MeshLayout`, as Flax does it; with the same numbers."""
    mesh = jax.make_mesh((8,), ("model",))
    by_rows = jax.NamedSharding(mesh, jax.P("model", None))
    cfg = qrhash.EmbedConfig(qrhash.FullTable(2**20), 16)
    init = lambda key: qrhash.init(key, cfg)  # noqa: E731
    lowered = jax.jit(init, out_shardings=by_rows).lower(jax.random.key(0))
    compiled = lowered.compile(OPTIMIZED)
    assert "all-gather" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2**20 * 16 * 4 / 8
    got = compiled(jax.random.key(0))
    want = jax.jit(init, compiler_options=OPTIMIZED)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, got, want)
