"""Row gradients: merging against a dictionary, `value_and_grad` against `jax.value_and_grad`."""

import collections
import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qrhash
from qrhash import RowGrads
from support.cases import assert_close, merging_by
from support.meshes import dense

UNCHECKED_KEYS = True

INT32_MAX = 2**31 - 1
METHODS = ("hash", "sort")
per_method = pytest.mark.parametrize("method", METHODS)


@functools.partial(jax.jit, static_argnums=1)
def merge(grads, method):
    with merging_by(method):
        return grads.merge()


def _grads(rows, values, num_rows):
    return RowGrads(jnp.asarray(rows, jnp.int32), jnp.asarray(values), num_rows)


def _draw(rng, m, num_rows=5, width=3, low=-1):
    """Rows with duplicates and, at either end, numbers of no row; NaN where there is no row."""
    rows = rng.integers(low, num_rows + 1 if low < 0 else num_rows, m)
    values = rng.standard_normal((m, width)).astype(np.float32)
    values[(rows < 0) | (rows >= num_rows)] = np.nan
    return _grads(rows, values, num_rows)


def _by_dictionary(grads):
    """Row number -> sum of its values in float64."""
    sums = collections.defaultdict(float)
    for row, value in zip(np.asarray(grads.indices), np.asarray(grads.values), strict=True):
        if 0 <= row < grads.num_rows:
            sums[int(row)] = sums[int(row)] + value.astype(np.float64)
    return dict(sums)


def _assert_merged(merged, grads, tolerance=1e-5):
    want = _by_dictionary(grads)
    assert merged.is_merged
    assert (merged.shape, merged.dtype) == (grads.shape, grads.dtype)
    assert merged.indices.shape == grads.indices.shape
    assert merged.indices.dtype == jnp.int32
    rows, values = np.asarray(merged.indices), np.asarray(merged.values).astype(np.float64)
    named = rows != grads.num_rows
    assert sorted(rows[named].tolist()) == sorted(want)
    assert (values[~named] == 0).all()
    if want:
        assert_close(values[named], [want[int(row)] for row in rows[named]], tolerance)


# --- merging --------------------------------------------------------------------------------------


@per_method
@given(
    num_rows=st.sampled_from([1, 5, 60, INT32_MAX]),
    m=st.sampled_from([0, 1, 2, 9, 33]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_merged_rows_are_the_sums_of_a_dictionary(method, num_rows, m, seed, data):
    near = st.integers(-2, min(num_rows + 2, INT32_MAX))
    row = near | st.integers(0, min(3, num_rows)) | st.integers(-(2**31), INT32_MAX)
    rows = np.array(data.draw(st.lists(row, min_size=m, max_size=m)), np.int64)
    values = np.random.default_rng(seed).standard_normal((m, 2)).astype(np.float32)
    values[(rows < 0) | (rows >= num_rows)] = np.nan
    grads = _grads(rows, values, num_rows)
    merged = merge(grads, method)
    _assert_merged(merged, grads)
    again = merge(merged, method)
    assert (again.indices == merged.indices).all()
    assert (again.values == merged.values).all()


def _bit_reversed(n):
    return [int(f"{i:031b}"[::-1], 2) for i in range(n)]


ROWS = {  # 512 row numbers each, below 2**31 - 1
    "consecutive": np.arange(512),
    "the last": INT32_MAX - 1 - np.arange(512),
    "all equal": np.full(512, 12345),
    "all the last": np.full(512, INT32_MAX - 1),
    "bits reversed": np.minimum(_bit_reversed(512), INT32_MAX - 1),
    "two, in turn": np.arange(512) % 2 * 2**30,
    "each twice": np.arange(512) // 2 * 2**20,
} | {f"multiples of 2**{k}": np.arange(512) % 2 ** (31 - k) << k for k in (8, 16, 20, 22, 28)}


@per_method
@pytest.mark.parametrize("rows", ROWS)
def test_rows_chosen_against_a_hash(rows, method, rng):
    rows = rng.permutation(ROWS[rows])
    for num_rows in (INT32_MAX, int(rows.max()) + 1):
        grads = _grads(rows, rng.standard_normal((512, 1)).astype(np.float32), num_rows)
        _assert_merged(merge(grads, method), grads)


@per_method
def test_bfloat16_is_summed_in_float32(method):
    """In bfloat16 itself, 256 + 1 is 256."""
    rows = np.repeat([3, 0, 7], [600, 300, 1])  # 7 is no row
    for num_rows in (7, 10**6):
        grads = _grads(rows, jnp.ones((901, 2), jnp.bfloat16), num_rows)
        merged = merge(grads, method)
        assert merged.dtype == jnp.bfloat16
        if num_rows == 7:
            _assert_merged(merged, grads, tolerance=0)
            sums = grads.to_dense()[:, 0].astype(jnp.float32)
            assert sums.tolist() == [300, 0, 0, 600, 0, 0, 0]


@per_method
def test_sums_in_no_order_are_exact_for_small_integers(method, rng):
    grads = _grads(rng.integers(0, 50, 4096), np.float32(rng.integers(-9, 9, (4096, 2))), 50)
    _assert_merged(merge(grads, method), grads, tolerance=0)


# --- arithmetic and trees -------------------------------------------------------------------------


def _dense(grads):
    dense = np.zeros(grads.shape)
    for row, value in _by_dictionary(grads).items():
        dense[row] = value
    return dense


@pytest.mark.parametrize("m", [0, 1, 12])
def test_to_dense_and_from_dense(m, rng):
    grads = _draw(rng, m)
    assert_close(grads.to_dense(), _dense(grads))
    assert_close(grads.merge().to_dense(), _dense(grads))
    full = rng.standard_normal((5, 3)).astype(np.float32)
    back = RowGrads.from_dense(full, grads.indices)
    named = np.isin(np.arange(5), grads.indices)[:, None]
    assert_close(back.to_dense(), np.where(named, full, 0), 0)
    _assert_merged(back, back)


def test_sums_and_multiples(rng):
    one, two, other = _draw(rng, 7), _draw(rng, 4), _draw(rng, 4, num_rows=6)
    total = one + two
    assert not (one.merge() + two.merge()).is_merged
    assert (total.indices.shape, total.shape) == ((11,), (5, 3))
    assert_close(total.to_dense(), _dense(one) + _dense(two))
    for half in (one * 0.5, 0.5 * one, one / 2, one * jnp.float32(0.5), jnp.float32(0.5) * one):
        assert_close(half.to_dense(), 0.5 * _dense(one))
    assert (one.merge() * 2.0).is_merged
    with pytest.raises(ValueError, match=r"\(5, 3\).*\(6, 3\)"):
        _ = one + other
    with pytest.raises(TypeError):
        _ = one + 1.0


def test_a_tree_through_jit_grad_accumulation_and_device_put(rng):
    grads = {"table": _draw(rng, 6).merge(), "bias": jnp.ones(2)}
    same = jax.jit(lambda tree: tree)(jax.device_put(grads))
    assert jax.tree.structure(same) == jax.tree.structure(grads)
    assert (same["table"].num_rows, same["table"].is_merged) == (5, True)
    np.testing.assert_array_equal(same["table"].indices, grads["table"].indices)
    np.testing.assert_array_equal(same["table"].values, grads["table"].values)
    is_rows = lambda node: isinstance(node, RowGrads)  # noqa: E731
    twice = jax.jit(lambda a: jax.tree.map(lambda x: x + x, a, is_leaf=is_rows))(grads)
    assert_close(twice["table"].to_dense(), 2 * _dense(grads["table"]))
    other = _draw(rng, 6, num_rows=6).merge()
    assert jax.tree.structure(other) != jax.tree.structure(grads["table"])


def test_global_norm_is_that_of_the_dense_gradients(rng):
    grads = {"table": _draw(rng, 9), "deep": [jnp.ones((2, 2)), _draw(rng, 4), _draw(rng, 0)]}
    is_rows = lambda node: isinstance(node, RowGrads)  # noqa: E731
    dense = jax.tree.map(lambda g: _dense(g) if is_rows(g) else g, grads, is_leaf=is_rows)
    want = np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in jax.tree.leaves(dense)))
    assert_close(qrhash.global_norm(grads), want)
    assert_close(jax.jit(qrhash.global_norm)(grads), want)
    assert qrhash.global_norm({}) == 0
    many = _grads([3] * 300, jnp.ones((300, 1), jnp.bfloat16), 5)
    assert qrhash.global_norm(many) == 300


# What people write over a tree of gradients. Row numbers must not be added, scaled or counted.
TREE_ARITHMETIC = {
    "add": lambda g: jax.tree.map(jnp.add, g, g),
    "operator": lambda g: jax.tree.map(lambda a, b: a + b, g, g),
    "subtract": lambda g: jax.tree.map(jnp.subtract, g, g),
    "twice": lambda g: jax.tree.map(lambda x: x * 2, g),
    "half": lambda g: jax.tree.map(lambda x: x * 0.5, g),
    "halves": lambda g: jax.tree.map(lambda x: x // 2, g),
    "mean of two": lambda g: jax.tree.map(lambda a, b: (a + b) / 2, g, g),
    "negative": lambda g: jax.tree.map(jnp.negative, g),
    "sign": lambda g: jax.tree.map(jnp.sign, g),
    "clip": lambda g: jax.tree.map(lambda x: jnp.clip(x, -1, 1), g),
    "maximum": lambda g: jax.tree.map(lambda x: jnp.maximum(x, 0), g),
    "square": lambda g: jax.tree.map(jnp.square, g),
    "moving average": lambda g: jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, g, g),
    "cast": lambda g: jax.tree.map(lambda x: x.astype(jnp.bfloat16), g),
    "sum": lambda g: jax.tree.map(jnp.sum, g),
    "optax.tree.add": lambda g: optax.tree.add(g, g),
    "optax.tree.scale": lambda g: optax.tree.scale(2, g),
    "optax.global_norm": optax.global_norm,
    "optax.clip": lambda g: optax.clip(1.0).update(g, optax.EmptyState())[0],
    "optax.clip_by_global_norm": lambda g: optax.clip_by_global_norm(1.0).update(g, None)[0],
    "optax.sgd": lambda g: optax.sgd(0.1).update(g, optax.sgd(0.1).init(g))[0],
    "scan carry": lambda g: jax.lax.scan(
        lambda sums, _: (jax.tree.map(jnp.add, sums, g), None), g, None, length=2
    )[0],
    "zeros, and add": lambda g: jax.tree.map(jnp.add, jax.tree.map(jnp.zeros_like, g), g),
    "psum": lambda g: jax.vmap(
        lambda _: jax.lax.psum(g, "i"), axis_name="i", out_axes=None, axis_size=2
    )(jnp.arange(2)),
    "pmean": lambda g: jax.vmap(lambda g: jax.lax.pmean(g, "i"), axis_name="i")(
        jax.tree.map(lambda x: jnp.stack([x, x]), g)
    ),
}


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", TREE_ARITHMETIC)
def test_tree_arithmetic_on_row_numbers_is_loud(name, wrap, is_merged, rng):
    grads = {"table": _draw(rng, 6, low=0), "bias": jnp.ones(2)}
    grads["table"] = grads["table"].merge() if is_merged else grads["table"]
    with pytest.raises((TypeError, NotImplementedError, AttributeError, ValueError)):
        wrap(TREE_ARITHMETIC[name])(grads)


def test_the_error_names_row_gradients_and_where_optimizers_go(rng):
    for change in (lambda x: x * 2, jnp.negative, lambda x: x + x, lambda x: jnp.clip(x, 0, 1)):
        with pytest.raises(TypeError, match=r"qrhash.RowGrads.*qrhash.touched_rows"):
            jax.tree.map(change, _draw(rng, 3))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1),
        optax.adagrad(0.1),
        optax.adam(0.1),
        optax.chain(optax.clip(1.0), qrhash.touched_rows(optax.sgd(0.1))),
        optax.chain(qrhash.touched_rows(optax.sgd(0.1)), optax.scale(0.5)),
        optax.MultiSteps(qrhash.touched_rows(optax.sgd(0.1)), 2),
    ],
    ids=["sgd", "adagrad", "adam", "clipping outside", "scaling outside", "MultiSteps outside"],
)
def test_an_optimizer_outside_of_touched_rows_is_told_where_it_goes(tx, wrap, rng):
    table = jnp.ones((5, 3))
    with pytest.raises((TypeError, ValueError), match=r"inside (of )?qrhash.touched_rows"):
        wrap(tx.update)(_draw(rng, 3, low=0), tx.init(table), table)


def test_what_moves_gradients_and_does_not_change_them_goes_on(rng):
    grads = _draw(rng, 6)
    want = _dense(grads)
    moved = {
        "jit": jax.jit(lambda g: g)(grads),
        "device_put": jax.device_put(grads, jax.devices()[1]),
        "device_get": jax.device_get(grads),
        "cond": jax.lax.cond(jnp.array(True), lambda g: g, lambda g: g, grads),
        "scan": jax.lax.scan(lambda g, _: (g, None), grads, None, length=2)[0],
        "stop_gradient": jax.tree.map(jax.lax.stop_gradient, grads),
        "where": jax.tree.map(lambda a: jnp.where(True, a, a), grads),
        "pickle": pickle.loads(pickle.dumps(grads)),
        "deepcopy": copy.deepcopy(grads),
        "eval_shape": jax.tree.map(lambda _, leaf: leaf, jax.eval_shape(lambda: grads), grads),
    }
    for name, each in moved.items():
        assert isinstance(each, RowGrads), name
        np.testing.assert_array_equal(each.indices, grads.indices, err_msg=name)
        assert_close(each.to_dense(), want)


def test_row_numbers_of_64_bits(rng):
    with jax.enable_x64(True):
        rows = jnp.array([2**40, 5, 2**40], jnp.int64)
        grads = RowGrads(rows, jnp.ones((3, 1)), 2**41)
        assert jax.jit(lambda g: g)(grads).indices.tolist() == rows.tolist()
        assert sorted(grads.merge().indices.tolist()) == [5, 2**40, 2**41]
        with pytest.raises(TypeError, match="touched_rows"):
            jax.tree.map(jnp.add, grads, grads)


def test_row_numbers_of_the_host_are_not_cut_to_32_bits():
    grads = RowGrads(np.array([2**32 + 1, 1, -(2**32) + 2]), np.ones((3, 1), np.float32), 5)
    assert grads.indices.tolist() == [5, 1, 5]
    np.testing.assert_array_equal(grads.to_dense()[:, 0], [0, 1, 0, 0, 0])


# --- microbatches ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("is_sharded", [False, True])
def test_microbatches_add_up_to_the_whole_batch(is_sharded, rng):
    """Exactly: in a loop, in a scan, and in one go."""
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=axes)
    cfg = qrhash.EmbedConfig(
        qrhash.QuotientRemainder(1000, 4),
        4,
        large_table_rows=10,
        layout=qrhash.MeshLayout(mesh=mesh) if is_sharded else None,
    )
    tables = qrhash.init(jax.random.key(0), cfg)
    batches = jnp.asarray(rng.integers(0, 1000, (3, 8)), jnp.int32)
    loss = lambda tables, ids: (qrhash.lookup(tables, ids, cfg) ** 2).sum()  # noqa: E731
    step = qrhash.value_and_grad(loss, cfg.large_tables)
    want = jax.tree.leaves(dense(step(tables, batches.reshape(-1))[1]))

    by_loop = qrhash.add_grads(*(step(tables, ids)[1] for ids in batches))
    _, stacked = jax.jit(
        lambda tables: jax.lax.scan(lambda _, ids: (None, step(tables, ids)[1]), None, batches)
    )(tables)
    mapped = jax.jit(qrhash.sum_grads)(stacked)
    for got in (by_loop, mapped):
        jax.tree.map(assert_close, jax.tree.leaves(dense(got)), want)
        assert_close(qrhash.global_norm(got), optax.global_norm(want))
    halves = [0.5 * grad for grad in mapped]
    both = [a + b for a, b in zip(halves, halves, strict=True)]
    for got in (both, [sum(pair) for pair in zip(halves, halves, strict=True)]):
        assert [type(grad) for grad in got] == [type(grad) for grad in mapped]
        jax.tree.map(assert_close, jax.tree.leaves(dense(got)), want)


def test_sums_that_do_not_fit_are_refused_in_words(rng):
    grads, dense = _draw(rng, 3), jnp.ones((5, 3))
    with pytest.raises(ValueError, match="at least one"):
        qrhash.add_grads()
    with pytest.raises(ValueError, match="one structure"):
        qrhash.add_grads({"a": grads}, {"b": grads})
    with pytest.raises(ValueError, match="to_dense"):
        qrhash.add_grads({"a": grads}, {"a": dense})
    with pytest.raises(ValueError, match=r"leading axis.*\(3,\)"):
        qrhash.sum_grads(grads)
    with pytest.raises(ValueError, match="merged"):
        qrhash.sum_grads(jax.lax.map(lambda _: grads.merge(), jnp.arange(2)))


# --- take_rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill_value", [np.nan, 0.0, -1.0])
def test_take_rows_is_gather_and_gives_the_row_numbers_back(fill_value, rng):
    tables = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 2), (4, 1))]
    first = [[0, 2, 3], [-1, 1, -3]], [7, 7], [], 2
    for one in first:
        one = np.asarray(one, np.int64)
        indices = (jnp.asarray(one, jnp.int32), one + 2**32)  # of the second table: no rows
        want = qrhash.gather(tables, indices, fill_value=fill_value)
        rows, back = qrhash.take_rows(tables, indices, fill_value=fill_value)
        for got, expected in zip(rows, want, strict=True):
            np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(back[0], np.where((one < 0) | (one >= 3), 3, one))
        np.testing.assert_array_equal(back[1], np.full_like(one, 4))


def test_take_rows_leaves_nan_in_a_table_to_its_own_row():
    table = jnp.array([[jnp.nan], [jnp.inf], [1.0]])
    (rows,), _ = qrhash.take_rows((table,), (jnp.array([2, 3, 1, 0, -1]),), fill_value=0.0)
    np.testing.assert_array_equal(rows[:, 0], [1, 0, np.inf, np.nan, 0])


def test_take_rows_refuses_what_gather_refuses():
    with pytest.raises(ValueError, match=r"2.*1"):
        qrhash.take_rows((jnp.ones((2, 1)),) * 2, (jnp.array([0]),))
    with pytest.raises(ValueError, match="integer"):
        qrhash.take_rows((jnp.ones((2, 1)),), (jnp.array([0.0]),))


@pytest.mark.parametrize(
    ("rows", "values", "word"),
    [
        (jnp.array([[1, 2], [1, 3]]), jnp.ones((2, 2, 3)), "flatten"),
        (jnp.array([1, 2]), jnp.ones(2), "values"),
        (jnp.array([1, 2]), jnp.ones((3, 3)), "values"),
        (jnp.array([1.0, 2.0]), jnp.ones((2, 3)), "integer indices"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(rows, values, word):
    grads = RowGrads(rows, values, 5)
    for use in (RowGrads.merge, RowGrads.to_dense, lambda grads: jnp.ones((5, 3)) + grads):
        with pytest.raises(ValueError, match=word):
            use(grads)


def test_an_array_plus_row_gradients_is_their_update(rng):
    """So `optax.apply_updates`, and what is built on it, applies them."""
    table, grads = jnp.ones((5, 3)), _draw(rng, 6).merge()
    want = np.asarray(table) + np.asarray(grads.to_dense())
    for got in (table + grads, np.asarray(table) + grads, optax.apply_updates(table, grads)):
        assert_close(got, want)
    with pytest.raises(ValueError, match=r"\(5, 3\).*\(6, 3\)"):
        _ = jnp.ones((6, 3)) + grads
    assert_close(sum([grads, grads]).to_dense(), 2 * np.asarray(grads.to_dense()))
    assert_close((grads - grads).to_dense(), np.zeros((5, 3)))


def test_the_product_of_two_gradients_is_refused(rng):
    grads = _draw(rng, 4)
    for product in (lambda: grads * grads, lambda: grads / grads):
        with pytest.raises(TypeError, match="unsupported operand"):
            product()
