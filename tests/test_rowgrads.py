"""Row gradients: merging against a dictionary, `value_and_grad` against `jax.value_and_grad`."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import FAMILIES, FEATURES, OPERATIONS, assert_close, parameters, quick_jit
from cases import config as make_config
from hypothesis import given
from hypothesis import strategies as st

import qrhash
from qrhash import RowGrads

INT32_MAX = 2**31 - 1
METHODS = ("hash", "sort")
per_method = pytest.mark.parametrize("method", METHODS)

merge = quick_jit(lambda grads, method: grads.merge(method), static_argnums=1)


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
    for row, value in zip(np.asarray(grads.rows), np.asarray(grads.values), strict=True):
        if 0 <= row < grads.num_rows:
            sums[int(row)] = sums[int(row)] + value.astype(np.float64)
    return dict(sums)


def _assert_merged(merged, grads, tolerance=1e-5):
    want = _by_dictionary(grads)
    assert merged.is_merged
    assert (merged.shape, merged.dtype) == (grads.shape, grads.dtype)
    assert merged.rows.shape == grads.rows.shape
    assert merged.rows.dtype == jnp.int32
    rows, values = np.asarray(merged.rows), np.asarray(merged.values).astype(np.float64)
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
    assert (again.rows == merged.rows).all()
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


def test_an_unknown_method_is_refused(rng):
    with pytest.raises(ValueError, match=r"method.*hash, sort.*'sorted'"):
        _draw(rng, 3).merge("sorted")


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
    back = RowGrads.from_dense(full, grads.rows)
    named = np.isin(np.arange(5), grads.rows)[:, None]
    assert_close(back.to_dense(), np.where(named, full, 0), 0)
    _assert_merged(back, back)


def test_sums_and_multiples(rng):
    one, two, other = _draw(rng, 7), _draw(rng, 4), _draw(rng, 4, num_rows=6)
    total = one + two
    assert not (one.merge() + two.merge()).is_merged
    assert (total.rows.shape, total.shape) == ((11,), (5, 3))
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
    jax.tree.map(np.testing.assert_array_equal, same, grads)
    is_rows = lambda node: isinstance(node, RowGrads)  # noqa: E731
    twice = jax.jit(lambda a: jax.tree.map(lambda x: x + x, a, is_leaf=is_rows))(grads)
    assert_close(twice["table"].to_dense(), 2 * _dense(grads["table"]))
    other = _draw(rng, 6, num_rows=6).merge()
    assert jax.tree.structure(other) != jax.tree.structure(grads["table"])


def test_merged_values_give_the_dense_norm(rng):
    grads = {"table": _draw(rng, 9), "deep": [jnp.ones((2, 2)), _draw(rng, 4), _draw(rng, 0)]}
    is_rows = lambda node: isinstance(node, RowGrads)  # noqa: E731
    dense = jax.tree.map(lambda g: _dense(g) if is_rows(g) else g, grads, is_leaf=is_rows)
    want = np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in jax.tree.leaves(dense)))
    values = qrhash.merged_values(grads)
    assert values["table"].shape == (9, 3)
    assert_close(optax.global_norm(values), want)


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
    with pytest.raises(TypeError, match="integer"):
        qrhash.take_rows((jnp.ones((2, 1)),), (jnp.array([0.0]),))


# --- value_and_grad -------------------------------------------------------------------------------

CONFIG = make_config("mixed radix", "project", large_table_rows=3)  # rows 2, 5, 3


def _loss(params, ids, scale=1.0):
    """A masked loss, of two look-ups in the same tables."""
    tables, projection = params["embed"]
    total = 0.0
    for some in (ids, ids[:2].reshape(2, 1)):
        vectors = qrhash.lookup(tables, some, CONFIG, projection)
        good = (some >= 0) & (some < CONFIG.num_embeddings)
        total += (jnp.sin(jnp.where(good[..., None], vectors @ params["dense"], 0)) ** 2).sum()
    return scale * total


def _params(rng):
    dense = rng.standard_normal((FEATURES, 3)).astype(np.float32)
    return {"embed": parameters(CONFIG, rng), "dense": jnp.asarray(dense)}


BY_ROWS = {"embed": (CONFIG.large_tables, False), "dense": False}
IDS = jnp.array([7, -1, 28, 7, 29, 0, 8], jnp.int32)


def _to_dense(grads):
    is_rows = lambda node: isinstance(node, RowGrads)  # noqa: E731
    return jax.tree.map(lambda g: g.to_dense() if is_rows(g) else g, grads, is_leaf=is_rows)


def _assert_equal_gradients(got, want):
    (value, grads), (want_value, want_grads) = got, want
    jax.tree.map(assert_close, value, want_value)
    jax.tree.map(assert_close, _to_dense(grads), want_grads)


@pytest.mark.parametrize("wrap", [lambda f: f, quick_jit], ids=["eager", "jit"])
def test_value_and_gradients_equal_the_dense_ones(wrap, rng):
    params = _params(rng)
    want = quick_jit(jax.value_and_grad(_loss))(params, IDS, scale=2.0)
    got = wrap(qrhash.value_and_grad(_loss, BY_ROWS))(params, IDS, scale=2.0)
    _assert_equal_gradients(got, want)
    small, *large = got[1]["embed"][0]
    assert isinstance(small, jax.Array)
    for grads, table in zip(large, params["embed"][0][1:], strict=True):
        assert isinstance(grads, RowGrads)
        assert (grads.shape, grads.dtype) == (table.shape, table.dtype)
        assert grads.rows.shape == (len(IDS) + 2,)
        assert grads.rows.dtype == jnp.int32
        assert not grads.is_merged


def test_has_aux_and_positional_and_keyword_arguments(rng):
    def fun(params, ids, *, scale):
        return _loss(params, ids, scale), {"ids": ids, "scale": scale}

    params = _params(rng)
    step = quick_jit(qrhash.value_and_grad(fun, BY_ROWS, has_aux=True))
    (value, aux), grads = step(params, IDS, scale=jnp.float32(3))
    _assert_equal_gradients((value, grads), jax.value_and_grad(_loss)(params, IDS, 3.0))
    assert aux["scale"] == 3
    assert (aux["ids"] == IDS).all()


@pytest.mark.parametrize("by_rows", [True, {"a": True, "b": True}, {"a": [True, True], "b": True}])
def test_a_prefix_of_bools_and_a_table_never_looked_up(by_rows, rng):
    tables = {"a": [jnp.ones((4, 2)), jnp.ones((5, 3))], "b": {"c": jnp.ones((6, 2))}}
    loss = lambda t, i: (qrhash.gather((t["a"][1],), (i,))[0] ** 2).sum()  # noqa: E731
    value, grads = qrhash.value_and_grad(loss, by_rows)(tables, jnp.array([4, 4]))
    assert value == 6
    assert [g.rows.shape for g in (*grads["a"], grads["b"]["c"])] == [(0,), (2,), (0,)]
    assert [g.shape for g in (*grads["a"], grads["b"]["c"])] == [(4, 2), (5, 3), (6, 2)]
    _assert_equal_gradients((value, grads), jax.value_and_grad(loss)(tables, jnp.array([4, 4])))


def test_no_table_by_rows_is_the_ordinary_gradient(rng):
    params = _params(rng)
    got = qrhash.value_and_grad(_loss, False)(params, IDS)
    jax.tree.map(np.testing.assert_array_equal, got, jax.value_and_grad(_loss)(params, IDS))


def test_by_rows_that_does_not_fit_is_refused(rng):
    with pytest.raises(ValueError):  # noqa: PT011 in JAX's words
        qrhash.value_and_grad(_loss, {"embed": True})(_params(rng), IDS)


def test_ids_from_the_host_and_the_policy_that_raises():
    """Ids stay NumPy inside the function, so that the host checks them."""
    cfg = qrhash.EmbedConfig(
        qrhash.MixedRadix.balanced(2**40, 4), 2, id_policy="raise", large_table_rows=1
    )
    tables = tuple(jnp.ones((rows, 2)) for rows in cfg.partition.num_rows)
    loss = lambda tables, ids: qrhash.lookup(tables, ids, cfg).sum()  # noqa: E731
    step = qrhash.value_and_grad(loss, cfg.large_tables)
    ids = np.array([2**40 - 1, 2**32])
    value, grads = step(tables, ids)
    assert value == 4
    want = cfg.partition.indices(ids)
    assert [g.rows.tolist() for g in grads] == [w.tolist() for w in want]
    with pytest.raises(ValueError, match=str(2**40)):
        step(tables, np.array([2**40]))


TABLE = jnp.arange(10.0).reshape(5, 2)


def _gather(table, index):
    return qrhash.gather((table,), (index,))[0]


ARITHMETIC = {
    "table + 1": lambda t: t + 1.0,
    "1 - table": lambda t: 1.0 - t,
    "array * table": lambda t: TABLE * t,
    "array @ table": lambda t: TABLE.T @ t,
    "-table": lambda t: -t,
    "2 ** table": lambda t: 2.0**t,
    "table // 2": lambda t: t // 2,
    "abs": abs,
    "table > 0": lambda t: t > 0,
    "table == 0": lambda t: t == 0,
    "table[0]": lambda t: t[0],
    "table[:2]": lambda t: t[:2],
    "iteration": lambda t: sum(row.sum() for row in t),
}
FUNCTIONS = {
    "jnp.sum": jnp.sum,
    "jnp.take": lambda t: jnp.take(t, jnp.array([0]), axis=0),
    "jnp.square": jnp.square,
    "jnp.einsum": lambda t: jnp.einsum("rf->f", t),
    "jnp.asarray": jnp.asarray,
    "jnp.concatenate": lambda t: jnp.concatenate([t, TABLE]),
    "jax.nn.relu": jax.nn.relu,
    "jax.lax.sin": jax.lax.sin,
    "optax.l2_loss": optax.l2_loss,
    "np.asarray": lambda t: np.asarray(t).shape[0],
}


@pytest.mark.parametrize("use", ARITHMETIC)
def test_arithmetic_with_a_table_is_refused_in_words(use):
    loss = lambda table: jnp.sum(ARITHMETIC[use](table))  # noqa: E731
    with pytest.raises(TypeError, match=r"table of shape \(5, 2\).*can only be looked up"):
        qrhash.value_and_grad(loss, True)(TABLE)


@pytest.mark.parametrize("use", FUNCTIONS)
def test_a_function_of_a_table_is_refused(use):
    """Where the words are JAX's, they name the type."""
    loss = lambda table: jnp.float32(jnp.sum(FUNCTIONS[use](table)))  # noqa: E731
    with pytest.raises(TypeError, match=r"can only be looked up|LookedUp"):
        qrhash.value_and_grad(loss, True)(TABLE)


@pytest.mark.parametrize("use", [lambda t: t.sum(), lambda t: t.T, lambda t: t.at[0].get()])
def test_the_methods_of_an_array_are_refused_in_words(use):
    with pytest.raises((TypeError, AttributeError), match="can only be looked up"):
        qrhash.value_and_grad(lambda table: jnp.sum(use(table)), True)(TABLE)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_attend_is_refused_in_words_or_right(operation, rng):
    """For add and concat it multiplies whole tables; otherwise it looks up every id."""
    cfg = make_config("quotient-remainder", operation, large_table_rows=3)
    tables, projection = parameters(cfg, rng)

    def loss(tables):
        return jnp.sin(qrhash.attend(tables, jnp.ones(FEATURES), cfg, projection)).sum()

    step = qrhash.value_and_grad(loss, cfg.large_tables)
    if operation in ("add", "concat"):
        with pytest.raises(TypeError, match=r"can only be looked up.*large_table_rows"):
            step(tables)
    else:
        _assert_equal_gradients(step(tables), jax.value_and_grad(loss)(tables))


INSIDE = {
    "vmap": lambda t: jax.vmap(lambda i: _gather(t, i))(jnp.array([[0, 1], [1, 1]])),
    "scan": lambda t: jax.lax.scan(lambda c, i: (c, _gather(t, i)), 0, jnp.array([0, 1]))[1],
    "jit": lambda t: jax.jit(lambda i: _gather(t, i))(jnp.array([0, 1])),
    "checkpoint": lambda t: jax.checkpoint(lambda i: _gather(t, i))(jnp.array([0, 1])),
    "grad": lambda t: jax.grad(lambda x: x * _gather(t, jnp.array([0])).sum())(1.0),
    "cond": lambda t: jax.lax.cond(True, lambda: _gather(t, jnp.array([0])), lambda: TABLE[:1]),
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("inside", INSIDE)
def test_a_look_up_inside_another_transformation_is_refused_in_words(inside, wrap):
    """Its offset could not leave the transformation: one clear error, and never a wrong number."""
    loss = lambda table: jnp.sum(INSIDE[inside](table))  # noqa: E731
    with pytest.raises(TypeError, match=r"inside another JAX transformation.*look up before"):
        wrap(qrhash.value_and_grad(loss, True))(TABLE)


@pytest.mark.parametrize("inside", ["vmap", "scan", "checkpoint"])
def test_rows_taken_before_another_transformation_may_go_through_it(inside):
    through = {
        "vmap": lambda rows: jax.vmap(jnp.sin)(rows),
        "scan": lambda rows: jax.lax.scan(lambda c, row: (c + row, jnp.sin(c)), rows[0], rows)[1],
        "checkpoint": lambda rows: jax.checkpoint(jnp.sin)(rows),
    }[inside]
    loss = lambda t: through(_gather(t, jnp.array([1, 1, 4]))).sum()  # noqa: E731
    got = quick_jit(qrhash.value_and_grad(loss, True))(TABLE)
    _assert_equal_gradients(got, jax.value_and_grad(loss)(TABLE))


def test_inside_vmap_and_scan():
    """Gradients per example; and steps in a loop."""
    loss = lambda table, index: jnp.nansum(jnp.sin(_gather(table, index)))  # noqa: E731
    step, dense = qrhash.value_and_grad(loss, True), jax.value_and_grad(loss)
    batches = jnp.array([[0, 1, 1], [4, 5, -1]])
    got = quick_jit(jax.vmap(lambda index: _to_dense(step(TABLE, index))))(batches)
    jax.tree.map(assert_close, got, jax.vmap(lambda index: dense(TABLE, index))(batches))

    def descend(table, index):
        value, grads = step(table, index)
        return qrhash.apply_updates(table, -0.1 * grads), value

    got, _ = quick_jit(lambda t: jax.lax.scan(descend, t, batches))(TABLE)
    want = TABLE
    for index in batches:
        want = want - 0.1 * dense(want, index)[1]
    assert_close(got, want)


def test_the_function_runs_as_itself_again_afterwards():
    """Nothing of one call is left in the next, also after an error."""
    step = qrhash.value_and_grad(lambda t, bad: (t + 1.0 if bad else _gather(t, IDS)).sum(), True)
    with pytest.raises(TypeError):
        step(TABLE, True)
    assert step(TABLE, False)[1].rows.shape == IDS.shape


# --- small tables: dense gradients, by scatter-adds and by one-hot products -----------------------


@pytest.fixture(params=[0, 8])
def one_hot_rows(request, monkeypatch):
    """Up to how many rows gradients are one-hot products: none on the CPU, many elsewhere."""
    monkeypatch.setitem(qrhash.tables._ONE_HOT_ROWS, "cpu", request.param)
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

    got = quick_jit(jax.grad(loss))(params)
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
        return quick_jit(
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


@pytest.mark.parametrize("marks", [*itertools.product([True, False], repeat=2)], ids=str)
def test_small_tables_may_be_marked_too(marks, rng):
    """Where the rows are gathered again in the backward pass, and where they are not."""
    cfg = make_config("quotient-remainder", "mult")
    assert not any(cfg.large_tables)
    tables, _ = parameters(cfg, rng)
    ids = rng.integers(0, cfg.num_embeddings, (6,)).astype(np.int32)
    weights = rng.standard_normal((6, FEATURES)).astype(np.float32)
    loss = functools.partial(_weighted, ids=ids, weights=weights, cfg=cfg)
    _, grads = quick_jit(qrhash.value_and_grad(loss, marks))(tables)
    want, _ = oracle.gradient(tables, [ids], [weights], cfg)
    dense = tuple(g.to_dense() if mark else g for g, mark in zip(grads, marks, strict=True))
    jax.tree.map(assert_close, dense, want)


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


@pytest.mark.parametrize(
    ("rows", "values", "word"),
    [
        (jnp.array([[1, 2], [1, 3]]), jnp.ones((2, 2, 3)), "flatten"),
        (jnp.array([1, 2]), jnp.ones(2), "values"),
        (jnp.array([1, 2]), jnp.ones((3, 3)), "values"),
        (jnp.array([1.0, 2.0]), jnp.ones((2, 3)), "integer rows"),
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


def test_the_derivative_of_a_derivative():
    table = jnp.arange(10.0).reshape(5, 2) / 10
    rows = (jnp.array([1, 3, 1]),)
    loss = lambda table: jnp.sum(jnp.sin(qrhash.gather((table,), rows)[0]) ** 2)  # noqa: E731
    by_rows = qrhash.value_and_grad(loss, True)
    assert_close(jax.grad(lambda t: by_rows(t)[0])(table), jax.grad(loss)(table))
    penalty = lambda table: jnp.sum(by_rows(table)[1].to_dense() ** 2)  # noqa: E731
    assert_close(
        jax.grad(penalty)(table), jax.grad(lambda t: jnp.sum(jax.grad(loss)(t) ** 2))(table)
    )


def test_a_checkpointed_look_up_is_refused_in_words():
    loss = jax.checkpoint(lambda table: qrhash.gather((table,), (jnp.array([1]),))[0].sum())
    with pytest.raises(TypeError, match="look up before"):
        qrhash.value_and_grad(loss, True)(jnp.ones((5, 2)))


@pytest.mark.parametrize(
    ("by_rows", "word"),
    [
        (("table_0", "x"), "bools.*table_0"),
        ((True, False, True), "prefix"),
        ({"a": True}, "prefix"),
    ],
)
def test_a_by_rows_that_does_not_fit_is_refused(by_rows, word):
    tables = (jnp.ones((5, 2)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=f"by_rows must .*{word}"):
        qrhash.value_and_grad(lambda tables: 0.0, by_rows)(tables)


def test_a_jitted_loss_is_refused_in_words():
    loss = jax.jit(lambda table: qrhash.gather((table,), (jnp.array([1]),))[0].sum())
    with pytest.raises(TypeError, match="look up before"):
        qrhash.value_and_grad(loss, True)(jnp.ones((5, 2)))
