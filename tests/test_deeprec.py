"""DeepRec's interface: its documented example, its arithmetic, and every one of its arguments."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec

import qrhash
from qrhash.deeprec import embedding_lookup, get_multihash_variable
from support import oracle
from support.cases import assert_close

ones = nn.initializers.ones
SQUARE = [[3, 4], [3, 4]]


def test_deeprecs_documented_example():
    """Ones, ids 0 to 3, loss sum(2 * embedding), TensorFlow's Adagrad(0.1): worked out by hand.

    Each row is met twice, so each entry's gradient is 4 in every step; after t steps the
    accumulator is 0.1 + 16 t and the step 0.1 * 4 / sqrt(0.1 + 16 t).
    """
    var = get_multihash_variable(
        "multihash", [[2, 2], [2, 2]], operation="concat", initializer=ones
    )
    tx = optax.adagrad(0.1, initial_accumulator_value=0.1)
    optimizer = nnx.Optimizer(var, tx, wrt=nnx.Param)
    ids = np.array([0, 1, 2, 3])
    for entry in (0.90031, 0.82971, 0.77203):
        loss = lambda var: (2 * embedding_lookup(var, ids)).sum()  # noqa: E731
        grads = nnx.grad(loss)(var)
        assert all((g == 4).all() for g in jax.tree.leaves(grads))
        optimizer.update(var, grads)
        vectors = embedding_lookup(var, ids)
        np.testing.assert_allclose(vectors, np.full((4, 4), entry), atol=1e-5)


@pytest.mark.parametrize("operation", ["add", "mul", "mult", "concat"])
def test_lookup_of_any_rank_equals_the_oracle(operation, rng):
    dims = [[3, 4], [5, 2 if operation == "concat" else 4]]
    var = get_multihash_variable("v", dims, operation=operation)
    assert [t.shape for t in var.tables] == [(3, 4), (5, dims[1][1])]
    assert var.config.partition == qrhash.deeprec.DeepRecQuotientRemainder(9, 3, 5)
    lookup = nnx.jit(embedding_lookup)
    for shape in [(), (0,), (6,), (2, 3), (2, 1, 3)]:
        ids = rng.integers(-1, 11, shape).astype(np.int32)
        assert_close(lookup(var, ids), oracle.lookup(var.tables, ids, var.config))


def test_the_arguments_are_deeprecs_in_deeprecs_order():
    parameters = inspect.signature(get_multihash_variable).parameters.values()
    by_position = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert " ".join(by_position) == (
        "name dims num_of_partitions complementary_strategy operation dtype initializer "
        "regularizer trainable collections caching_device partitioner validate_shape "
        "use_resource custom_getter constraint synchronization aggregation"
    )
    given = {"num_of_partitions": 2, "complementary_strategy": "Q-R", "operation": "add"}
    given |= {"dtype": float, "initializer": None, "trainable": None, "validate_shape": True}
    assert given.items() <= by_position.items()
    var = get_multihash_variable("v", SQUARE, 2, "Q-R", "mult", jnp.bfloat16, ones)
    assert (var.name, var.config.operation) == ("v", "mult")
    assert all((t == 1).all() and t.dtype == jnp.bfloat16 for t in var.tables)


# --- sizes that collide or run out of range ------------------------------------------------------


def test_sizes_are_refused_exactly_when_ids_collide_or_have_no_row():
    """The refusal names ids that share all their rows, or that have none."""
    for n in [*range(1, 12), 25]:
        for q, r in [(1, 1), (2, 3), (3, 2), (3, 3), (4, 1), (5, 3), (3, 5)]:
            partition = qrhash.deeprec.DeepRecQuotientRemainder(n, q, r)
            dims = [[q, 2], [r, 2]]
            if oracle.is_complementary(partition):
                var = get_multihash_variable("v", dims, num_embeddings=n)
                assert var.config.partition == partition
                continue
            with pytest.raises(ValueError) as error:  # noqa: PT011
                get_multihash_variable("v", dims, num_embeddings=n)
            named = {int(word) for word in re.findall(r"\d+", str(error.value))}
            codes = [oracle.code(partition, x) for x in range(n)]
            unfit = [(x,) for x in range(n) if codes[x] is None] or [
                (x, y) for y in range(n) for x in range(y) if codes[x] == codes[y]
            ]
            assert any(named >= set(ids) for ids in unfit), error.value


def test_deeprecs_own_unit_test_is_accepted_only_by_name():
    dims = [[5, 6], [3, 6]]
    with pytest.raises(ValueError, match=r"0 and 3\b.*allow_collisions"):
        get_multihash_variable("v", dims)
    var = get_multihash_variable("v", dims, allow_collisions=True)
    vectors = embedding_lookup(var, np.array([0, 3, 1]))
    assert_close(vectors[0], vectors[1])
    assert (vectors[0] != vectors[2]).any()


def test_its_model_zoos_sizes_run_out_of_range():
    """rows_q = floor(sqrt(n)): ids from rows_q**2 on have no row, and say so if let in."""
    dims = [[3, 2], [4, 2]]
    with pytest.raises(ValueError, match=r"\b9 to 10\b.*allow_collisions"):
        get_multihash_variable("v", dims, num_embeddings=11)
    var = get_multihash_variable("v", dims, num_embeddings=11, allow_collisions=True)
    vectors = embedding_lookup(var, np.array([8, 9, 10]))
    np.testing.assert_array_equal(np.isnan(vectors[:, 0]), [False, True, True])


# --- arguments with a meaning --------------------------------------------------------------------


def test_dtype_and_initializers():
    assert get_multihash_variable("v", SQUARE).tables[0].dtype == jnp.float32
    inits = [nn.initializers.constant(2.0), nn.initializers.constant(3.0)]
    var = get_multihash_variable("v", SQUARE, operation="mul", initializer=inits)
    assert (embedding_lookup(var, np.arange(9)) == 6).all()
    same, other = (get_multihash_variable(name, SQUARE) for name in ("v", "w"))
    again = get_multihash_variable("v", SQUARE)
    assert (same.tables[0] == again.tables[0]).all()
    assert (same.tables[0] != other.tables[0]).any()
    seeded = get_multihash_variable("v", SQUARE, rngs=nnx.Rngs(3))
    assert (same.tables[0] != seeded.tables[0]).any()
    large = get_multihash_variable("v", [[300, 64], [300, 64]], operation="mult")
    stddev = embedding_lookup(large, np.arange(0, 90000, 7)).std()
    assert abs(stddev / large.config.stddev - 1) < 0.05


def test_regularizer_and_constraint():
    var = get_multihash_variable(
        "v", SQUARE, initializer=ones, regularizer=lambda t: 0.5 * (t**2).sum(),
        constraint=lambda t: jnp.clip(t, -0.25, 0.25),
    )  # fmt: skip
    assert var.regularization_loss() == 12
    grads = nnx.grad(lambda v: v.regularization_loss())(var)
    assert all((g == 1).all() for g in jax.tree.leaves(grads))
    var.apply_constraint()
    assert all((t == 0.25).all() for t in var.tables)
    plain = get_multihash_variable("v", SQUARE, initializer=ones)
    plain.apply_constraint()
    assert plain.regularization_loss() == 0
    assert all((t == 1).all() for t in plain.tables)


def test_trainable_false_keeps_the_tables_from_the_optimizer():
    var = get_multihash_variable("v", SQUARE, initializer=ones, trainable=False)
    assert not nnx.state(var, nnx.Param)
    assert (embedding_lookup(var, np.arange(9)) == 2).all()
    grads = nnx.grad(lambda v: embedding_lookup(v, np.arange(9)).sum())(var)
    assert not jax.tree.leaves(grads)
    assert len(nnx.state(get_multihash_variable("v", SQUARE, trainable=True), nnx.Param)) == 2


@pytest.mark.parametrize("partitioner", [PartitionSpec("data", None), ("data", None)])
def test_partitioner_is_the_tables_sharding(partitioner):
    var = get_multihash_variable("v", [[64, 2], [64, 2]], partitioner=partitioner)
    mesh = jax.make_mesh((8,), ("data",))
    state = nnx.state(var, nnx.Param)
    placed = jax.device_put(state, nnx.get_named_sharding(state, mesh))
    for table in jax.tree.leaves(placed):
        assert {shard.data.shape for shard in table.addressable_shards} == {(8, 2)}


def test_custom_getter_makes_each_table():
    asked = []

    def doubled(getter, *args, **kwargs):
        asked.append((kwargs["name"], tuple(kwargs["shape"])))
        return 2 * getter(*args, **kwargs)

    var = get_multihash_variable("v", [[3, 4], [5, 4]], initializer=ones, custom_getter=doubled)
    assert all((t == 2).all() for t in var.tables)
    assert [shape for _, shape in asked] == [(3, 4), (5, 4)]
    assert all("v" in name for name, _ in asked)
    assert len({name for name, _ in asked}) == 2


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("collections", ["GLOBAL_VARIABLES"]),
        ("collections", []),
        ("caching_device", "/cpu:0"),
        ("validate_shape", False),
        ("use_resource", True),
        ("use_resource", False),
        ("synchronization", "ON_READ"),
        ("aggregation", "MEAN"),
        ("num_of_partitions", 3),
        ("complementary_strategy", "CRT"),
        ("operation", "sub"),
        ("operation", "project"),
        ("partitioner", 8),
        ("initializer", [ones]),
        ("initializer", 1.0),
        ("num_embeddings", 0),
        ("num_embeddings", 2.5),
        ("num_embeddings", 2**64),
        ("regularizer", 3),
        ("constraint", 3),
        ("custom_getter", 3),
        ("custom_getter", lambda getter, **_: jnp.zeros(3)),
        ("trainable", "no"),
        ("rngs", 0),
        ("dims", [[3, 4]]),
        ("dims", [[3, 4], [3, 4], [3, 4]]),
        ("dims", [[0, 4], [3, 4]]),
        ("dims", [[3, 4], [3, 4.5]]),
        ("dims", 3),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(argument, value):
    with pytest.raises(ValueError, match=argument):
        get_multihash_variable(**{"name": "v", "dims": SQUARE, argument: value})


def test_widths_that_do_not_fit_the_operation_are_refused():
    for operation in ("add", "mul"):
        with pytest.raises(ValueError, match=r"(widths|dims).*4.*2"):
            get_multihash_variable("v", [[3, 4], [3, 2]], operation=operation)


# --- embedding_lookup ----------------------------------------------------------------------------


def test_max_norm_scales_long_vectors_down_and_leaves_short_ones():
    inits = [lambda key, shape, dtype: jnp.arange(6.0, dtype=dtype).reshape(shape)] * 2
    var = get_multihash_variable("v", [[3, 2], [3, 2]], initializer=inits)
    ids = np.array([[0, 8]])
    plain, clipped = embedding_lookup(var, ids), embedding_lookup(var, ids, max_norm=2.5)
    norms = np.linalg.norm(plain, axis=-1)
    assert norms[0, 0] < 2.5 < norms[0, 1]
    assert_close(clipped, plain * np.minimum(1, 2.5 / norms)[..., None])
    zeros = get_multihash_variable("v", SQUARE, initializer=nn.initializers.zeros)
    grads = nnx.grad(lambda v: embedding_lookup(v, ids, max_norm=1.0).sum())(zeros)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


NO_NORMS = [0, 0.0, -1.0, -np.inf, np.nan, True, np.True_, np.array([1.0, 2.0]), "1", 1j, 10**-400]


@pytest.mark.parametrize("max_norm", NO_NORMS, ids=repr)
def test_what_is_no_norm_is_refused(max_norm):
    var = get_multihash_variable("v", SQUARE)
    with pytest.raises(ValueError, match="max_norm must be a positive number or None, got"):
        embedding_lookup(var, np.array([0]), max_norm=max_norm)


def test_a_traced_norm_is_refused():
    var = get_multihash_variable("v", SQUARE)
    with pytest.raises(ValueError, match="max_norm must be a positive number"):
        jax.jit(lambda norm: embedding_lookup(var, np.array([0]), norm))(1.0)


def _of_rows(rows, dtype):
    """A variable of these vectors."""
    rows = np.asarray(rows)
    inits = [lambda key, shape, dtype: jnp.asarray(rows, dtype), nn.initializers.zeros]
    return get_multihash_variable("v", [rows.shape, rows.shape], dtype=dtype, initializer=inits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_norm", [np.inf, 1e30, 1e300, 2, np.float64(0.5), 1e-3, 1e-30])
def test_norms_of_any_size_are_those_of_64_bits(max_norm, dtype):
    """No square leaves the range of the vectors' dtype: of float16 that of 256 does."""
    size = 1.0 if dtype == "float16" else 1e22
    rows = np.array([[0, 0], [3, 4], [300 * size, -400 * size], [2e-3, 0]])
    var = _of_rows(rows, dtype)
    ids = np.array([0, 4, 8, 12, 99])
    got = np.asarray(embedding_lookup(var, ids, max_norm), np.float64)
    plain = np.asarray(embedding_lookup(var, ids), np.float64)
    norms = np.linalg.norm(plain, axis=-1, keepdims=True)
    wanted = plain * np.minimum(1, np.divide(max_norm, norms, where=norms > 0, out=norms + 1))
    wanted[norms[:, 0] == 0] = 0
    least = float(jnp.finfo(dtype).smallest_subnormal)
    np.testing.assert_allclose(got, wanted, rtol=8 * float(jnp.finfo(dtype).eps), atol=least)
    assert np.isnan(got[-1]).all()
    grads = nnx.grad(lambda v: embedding_lookup(v, ids[:-1], max_norm).astype("float32").sum())(var)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


# --- ids of 32 and of 64 bits --------------------------------------------------------------------


@pytest.mark.parametrize("rows", [46_340, 46_341, 46_342, 60_000])
def test_the_default_vocabulary_takes_jaxs_ids(rows):
    """rows**2 leaves int32 from 46,341 rows on."""
    var = get_multihash_variable("v", [[rows, 1], [np.int64(rows), 1]], operation="concat",
                                 initializer=_row_numbers, num_embeddings=None)  # fmt: skip
    assert var.num_embeddings == min(rows**2, 2**31)
    ids = np.array([0, 1, rows, rows**2 // 2, min(rows**2, 2**31) - 1], np.int32)
    wanted = np.stack(np.divmod(ids, rows), axis=-1)
    np.testing.assert_array_equal(embedding_lookup(var, jnp.asarray(ids)), wanted)
    np.testing.assert_array_equal(jax.jit(lambda i: embedding_lookup(var, i))(ids), wanted)
    assert np.isnan(embedding_lookup(var, np.array([var.num_embeddings, -1]))).all()


def _row_numbers(key, shape, dtype):
    return jnp.arange(shape[0], dtype=dtype)[:, None]


def test_ids_beyond_32_bits_are_asked_for_by_name():
    dims = [[60_000, 1], [60_000, 1]]
    var = get_multihash_variable(
        "v", dims, operation="concat", initializer=_row_numbers, num_embeddings=60_000**2
    )
    ids = np.array([3_000_000_000, 60_000**2 - 1, 2**31])
    wanted = np.stack(np.divmod(ids, 60_000), axis=-1)
    np.testing.assert_array_equal(embedding_lookup(var, ids), wanted)
    for narrow in (jnp.array([0]), jnp.array([0], jnp.uint32), jnp.array([0], jnp.int8)):
        with pytest.raises(ValueError, match=r"num_embeddings=3600000000 needs 64 bits: give"):
            embedding_lookup(var, narrow)
        with pytest.raises(ValueError, match="num_embeddings=3600000000"):
            jax.jit(lambda ids: embedding_lookup(var, ids))(narrow)
    other = get_multihash_variable("v", dims, complementary_strategy="quotient-remainder")
    with pytest.raises(ValueError, match="num_embeddings=3600000000 needs 64 bits"):
        embedding_lookup(other, jnp.array([0]))


def test_with_ids_of_64_bits_the_default_vocabulary_is_whole():
    with jax.enable_x64(True):
        var = get_multihash_variable("v", [[60_000, 1], [60_000, 1]], initializer=_row_numbers)
        assert var.num_embeddings == 60_000**2
        vectors = embedding_lookup(var, jnp.array([3_000_000_001]))
    np.testing.assert_array_equal(vectors, [[50_001]])


def test_a_constraint_keeps_the_shape():
    var = get_multihash_variable("v", SQUARE, constraint=lambda table: table[:1])
    with pytest.raises(ValueError, match=r"constraint must return a table of shape \(3, 4\), got"):
        var.apply_constraint()


def test_id_policies_reach_the_lookup():
    ids = np.array([0, 9, -1])
    vectors = {
        policy: embedding_lookup(
            get_multihash_variable("v", SQUARE, initializer=ones, id_policy=policy), ids
        )[:, 0]
        for policy in ("nan", "zero", "clip", "wrap")
    }
    np.testing.assert_array_equal(vectors["nan"], [2, np.nan, np.nan])
    np.testing.assert_array_equal(vectors["zero"], [2, 0, 0])
    np.testing.assert_array_equal(vectors["clip"], [2, 2, 2])
    np.testing.assert_array_equal(vectors["wrap"], [2, 2, 2])
    with pytest.raises(ValueError, match=r"\b9\b"):
        embedding_lookup(get_multihash_variable("v", SQUARE, id_policy="raise"), ids)


def test_the_correct_form_in_its_place():
    """quotient-remainder divides by the remainder table's length: no sizes collide."""
    var = get_multihash_variable("v", [[5, 6], [3, 6]], complementary_strategy="quotient-remainder")
    assert var.config.partition == qrhash.QuotientRemainder(15, 3)
    vectors = jax.jit(lambda t, i: qrhash.lookup(t, i, var.config))(var.tables, np.arange(15))
    assert len(np.unique(vectors[:, 0])) == 15


# --- vocabularies of more than 32 bits, and limits of norms ---------------------------------------


@pytest.mark.parametrize("strategy", ["Q-R", "quotient-remainder"])
def test_a_vocabulary_asked_for_beyond_32_bits_takes_ids_of_the_host(strategy):
    n = 70_000**2
    var = qrhash.deeprec.get_multihash_variable(
        "big", [[70_000, 2]] * 2, 2, strategy, operation="add", num_embeddings=n
    )
    vectors = qrhash.deeprec.embedding_lookup(var, np.array([n - 1, 2**31]))
    assert np.isfinite(vectors).all()
    with pytest.raises(ValueError, match=rf"num_embeddings={n}.*NumPy ids.*jax_enable_x64"):
        qrhash.deeprec.embedding_lookup(var, jnp.array([1, 2]))


@pytest.mark.parametrize("max_norm", [np.inf, float("inf"), None, 1e30, np.float32(np.inf)])
def test_a_limit_that_none_exceeds_changes_nothing(max_norm):
    var = qrhash.deeprec.get_multihash_variable("item", [[10, 4]] * 2, operation="add")
    ids = jnp.arange(5)
    loss = lambda var: qrhash.deeprec.embedding_lookup(var, ids, max_norm).sum()  # noqa: E731
    np.testing.assert_array_equal(
        qrhash.deeprec.embedding_lookup(var, ids, max_norm),
        qrhash.deeprec.embedding_lookup(var, ids),
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.grad(loss)(var)))


def test_norms_of_very_large_and_of_zero_vectors():
    var = qrhash.deeprec.get_multihash_variable(
        "item",
        [[2, 3]] * 2,
        operation="add",
        initializer=lambda key, shape, dtype: jnp.zeros(shape),
    )
    var.table_0[...] = jnp.array([[0.0, 0, 0], [3e20, 0, 4e20]])
    loss = lambda var: qrhash.deeprec.embedding_lookup(var, ids, 1.0).sum()  # noqa: E731
    ids = jnp.array([0, 2])
    got = qrhash.deeprec.embedding_lookup(var, ids, 1.0)
    np.testing.assert_allclose(got, [[0, 0, 0], [0.6, 0, 0.8]], rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.grad(loss)(var)))
