"""`value_and_grad` against `jax.value_and_grad`, wherever the look-ups stand in the function."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import qrhash
from qrhash import RowGrads
from support import oracle
from support.cases import FEATURES, OPERATIONS, assert_close, parameters
from support.cases import config as make_config

UNCHECKED_KEYS = True

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


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_value_and_gradients_equal_the_dense_ones(wrap, rng):
    params = _params(rng)
    want = jax.jit(jax.value_and_grad(_loss))(params, IDS, scale=2.0)
    got = wrap(qrhash.value_and_grad(_loss, BY_ROWS))(params, IDS, scale=2.0)
    _assert_equal_gradients(got, want)
    small, *large = got[1]["embed"][0]
    assert isinstance(small, jax.Array)
    for grads, table in zip(large, params["embed"][0][1:], strict=True):
        assert isinstance(grads, RowGrads)
        assert (grads.shape, grads.dtype) == (table.shape, table.dtype)
        assert grads.indices.shape == (len(IDS) + 2,)
        assert grads.indices.dtype == jnp.int32
        assert not grads.is_merged


def test_has_aux_and_positional_and_keyword_arguments(rng):
    def fun(params, ids, *, scale):
        return _loss(params, ids, scale), {"ids": ids, "scale": scale}

    params = _params(rng)
    step = jax.jit(qrhash.value_and_grad(fun, BY_ROWS, has_aux=True))
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
    assert [g.indices.shape for g in (*grads["a"], grads["b"]["c"])] == [(0,), (2,), (0,)]
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
    assert [g.indices.tolist() for g in grads] == [w.tolist() for w in want]
    with pytest.raises(ValueError, match=str(2**40)):
        step(tables, np.array([2**40]))


TABLE = jnp.arange(10.0).reshape(5, 2)


def _gather(table, index):
    return qrhash.gather((table,), (index,))[0]


TABLE = jnp.arange(10.0).reshape(5, 2) / 7


def _gather(table, index):
    return qrhash.gather((table,), (jnp.asarray(index),), fill_value=0.0)[0]


def _assert_right(loss, *args, is_by_rows=True, wrap=jax.jit):
    """The same numbers as JAX's own, of this kind."""
    got = wrap(qrhash.value_and_grad(loss, True))(TABLE, *args)
    _assert_equal_gradients(got, jax.value_and_grad(loss)(TABLE, *args))
    assert isinstance(got[1], RowGrads) == is_by_rows
    return got[1]


# Look-ups inside of other transformations, with as many row numbers as they name in all.
INSIDE = {
    "jit": (lambda t: jax.jit(lambda i: _gather(t, i))([0, 1]), 2),
    "jit, the table an argument": (lambda t: jax.jit(_gather)(t, jnp.array([0, 1])), 2),
    "jit that returns the table": (
        lambda t: _gather(jax.jit(lambda t: (t, _gather(t, [3])))(t)[0], [1, 2, 1]),
        3,
    ),
    "vmap": (lambda t: jax.vmap(lambda i: _gather(t, i))(jnp.array([[0, 1], [1, 1]])), 4),
    "vmap of two indices": (
        lambda t: jax.vmap(lambda i, j: _gather(t, i) * _gather(t, j), (1, None))(
            jnp.array([[0, 1, 2], [1, 4, 9]]), jnp.array([2, 2])
        ),
        8,
    ),
    "vmap of vmap": (
        lambda t: jax.vmap(jax.vmap(lambda i: _gather(t, i)))(jnp.array([[0, 1], [4, 1]])),
        4,
    ),
    "scan": (
        lambda t: jax.lax.scan(
            lambda c, i: (c * _gather(t, i + 1).sum(), _gather(t, i) * c), 1.0, jnp.array([0, 1, 3])
        )[1],
        6,
    ),
    "scan, backwards and of two turns at once": (
        lambda t: jax.lax.scan(
            lambda c, i: (c + _gather(t, i).sum(), c), 1.0, jnp.arange(4), reverse=True, unroll=2
        )[1],
        4,
    ),
    "scan of scan": (
        lambda t: jax.lax.scan(
            lambda c, i: jax.lax.scan(
                lambda c, j: (jnp.sin(c + _gather(t, i + j).sum()), c), c, jnp.arange(2)
            ),
            1.0,
            jnp.array([0, 2, 3]),
        )[0],
        6,
    ),
    "map": (lambda t: jax.lax.map(lambda i: _gather(t, i), jnp.array([[4, 4], [1, 7]])), 4),
    "checkpoint": (lambda t: jax.checkpoint(lambda t: jnp.sin(_gather(t, [0, 1])))(t), 2),
    "checkpoint that keeps nothing": (
        lambda t: jax.checkpoint(
            lambda i: jnp.sin(_gather(t, i)), policy=jax.checkpoint_policies.nothing_saveable
        )(jnp.array([0, 1])),
        2,
    ),
    "checkpoint that returns the table": (
        lambda t: (lambda same, rows: _gather(same, [3]) * rows)(
            *jax.checkpoint(lambda t: (t, _gather(t, [1])))(t)
        ),
        2,
    ),
    "cond": (
        lambda t: jax.lax.cond(jnp.array(3) > 2, lambda: _gather(t, [0]), lambda: jnp.ones((1, 2))),
        1,
    ),
    "switch": (
        lambda t: jax.lax.switch(
            jnp.array(1),
            [
                lambda: _gather(t, [0]),
                lambda: _gather(t, [1]) * _gather(t, [2]),
                lambda: _gather(t, [[3], [4]])[0],
            ],
        ),
        5,
    ),
    "all at once": (
        lambda t: jax.vmap(
            jax.jit(
                jax.checkpoint(
                    lambda i: jax.lax.scan(lambda c, j: (c, _gather(t, i + j)), 0, jnp.arange(3))[1]
                )
            )
        )(jnp.array([[0, 1], [1, 2]])),
        12,
    ),
    "a derivative": (lambda t: jax.grad(lambda x: jnp.sin(x * _gather(t, [0]).sum()))(1.0), 1),
    "a function of its own derivative beside it": (lambda t: jax.nn.relu(_gather(t, [0]) - 0.1), 1),
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("inside", INSIDE)
def test_look_ups_inside_other_transformations(inside, wrap):
    use, named = INSIDE[inside]
    grads = _assert_right(lambda t: jnp.sum(jnp.cos(use(t)) ** 2), wrap=wrap)
    assert grads.indices.shape == (named,)


ARRAY_USES = {
    "table + 1": lambda t: t + 1.0,
    "array @ table": lambda t: TABLE.T @ t,
    "table[0]": lambda t: t[0],
    "iteration": lambda t: sum(row.sum() for row in t),
    "jnp.take": lambda t: jnp.take(t, jnp.array([0]), axis=0),
    "jnp.asarray": jnp.asarray,
    "jax.nn.relu": jax.nn.relu,
    "the method sum": lambda t: t.sum(),
    "an array beside a look-up": lambda t: t.mean() * _gather(t, [0, 1]),
    "an array inside jit": lambda t: jax.jit(lambda t: t.mean() * _gather(t, [0]))(t),
    "an array inside scan": lambda t: jax.lax.scan(lambda c, _: (c + t, c), t, None, length=3)[0],
    "carried through scan": lambda t: jax.lax.scan(
        lambda t, i: (0.5 * t, _gather(t, i)), t, jnp.arange(3)
    )[1],
    "scanned over": lambda t: jax.lax.scan(lambda c, r: (c, r), 0, t)[1],
    "chosen by cond": lambda t: jax.lax.cond(t.sum() > 0, lambda: t, lambda: 2 * t),
    "many tables in one": lambda t: jax.vmap(lambda t, i: _gather(t[None], i))(
        t, jnp.zeros((5, 2), jnp.int32)
    ),
}


@pytest.mark.parametrize("use", ARRAY_USES)
def test_a_table_used_as_an_array_gets_an_array(use):
    _assert_right(lambda t: jnp.sum(jnp.sin(ARRAY_USES[use](t))), is_by_rows=False)


def test_what_is_computed_in_vain_costs_no_gradient_as_large_as_the_table():
    both = lambda t: (jnp.sin(t), _gather(t, [0, 1]).sum())  # noqa: E731
    for fun in (both, jax.jit(both)):
        grads = _assert_right(lambda t, fun=fun: fun(t)[1])
        assert grads.indices.shape == (2,)


NOWHERE = {
    "while": lambda t: jax.lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] + _gather(t, [0]).sum()), (0, 0.0)
    )[1],
    "custom_vjp_call": lambda t: _with_own_derivative(t),
}


@jax.custom_vjp
def _with_own_derivative(table):
    return _gather(table, [0]).sum()


_with_own_derivative.defvjp(lambda t: (_with_own_derivative(t), t), lambda t, g: (t * g,))


@pytest.mark.parametrize("name", NOWHERE)
def test_where_rows_cannot_be_told_apart_the_message_names_the_table_and_the_way_out(name):
    params = {"users": TABLE}
    loss = lambda params: NOWHERE[name](params["users"])  # noqa: E731
    with pytest.raises(
        ValueError, match=rf"users.*trained by rows.*{name}.*look up before.*large_table"
    ):
        qrhash.value_and_grad(loss, True)(params)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_attended_tables_get_dense_gradients(operation, rng):
    """One behaviour for all operations, beside look-ups too; and none if it is in vain."""
    cfg = make_config("quotient-remainder", operation, large_table_rows=1)
    tables, projection = parameters(cfg, rng)

    def loss(tables, is_used):
        logits = jnp.sin(qrhash.attend(tables, jnp.ones(FEATURES), cfg, projection)).sum()
        vectors = qrhash.lookup(tables, jnp.array([1, 1]), cfg, projection)
        return (vectors**2).sum() + (logits if is_used else 0.0)

    step = qrhash.value_and_grad(loss, cfg.large_tables)
    for is_used in (True, False):
        got = step(tables, is_used)
        _assert_equal_gradients(got, jax.value_and_grad(loss)(tables, is_used))
        assert [isinstance(g, RowGrads) for g in got[1]] == [not is_used] * len(tables)


def test_attend_refuses_a_vocabulary_too_large_before_it_builds_anything():
    cfg = qrhash.EmbedConfig(qrhash.MixedRadix.balanced(2**40, 4), 2)
    tables = tuple(jnp.ones((rows, 2)) for rows in cfg.partition.num_rows)
    with pytest.raises(ValueError, match=r"num_embeddings must be.*1099511627776"):
        qrhash.attend(tables, jnp.ones(2), cfg)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    """Devices that share a table and split a batch: with the check on, as the dense gradient is."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), axis_types=auto, devices=jax.devices()[:4])
    ids = jnp.arange(8) % 6
    loss = lambda t, i: (jnp.sin(_gather(t, i)) ** 2).sum()  # noqa: E731

    def step(table, ids, differentiate):
        value, grads = differentiate(loss)(table, ids)
        dense = grads.to_dense() if isinstance(grads, RowGrads) else grads
        if not check_vma:
            dense = jax.lax.psum(dense, "data")
        return jax.lax.psum(value, "data"), dense

    split = PartitionSpec("data")
    for differentiate in (jax.value_and_grad, lambda f: qrhash.value_and_grad(f, True)):
        value, dense = jax.jit(
            jax.shard_map(
                functools.partial(step, differentiate=differentiate),
                mesh=mesh,
                in_specs=(PartitionSpec(), split),
                out_specs=(PartitionSpec(), PartitionSpec()),
                check_vma=check_vma,
            )
        )(TABLE, ids)
        want = jax.value_and_grad(loss)(TABLE, ids)
        jax.tree.map(assert_close, (value, dense), want)


@pytest.mark.slow
def test_a_step_for_any_batch_can_be_exported():
    cfg = qrhash.EmbedConfig(qrhash.QuotientRemainder(1000, 4), 8, large_table_rows=1)
    tx = qrhash.touched_rows(qrhash.adagrad(0.1))
    tables = qrhash.init(jax.random.key(0), cfg)
    state = tx.init(tables)

    def step(tables, state, ids):
        loss = lambda tables: (qrhash.lookup(tables, ids, cfg) ** 2).sum()  # noqa: E731
        value, grads = qrhash.value_and_grad(loss, cfg.large_tables)(tables)
        updates, state = tx.update(grads, state, tables)
        return qrhash.apply_updates(tables, updates), state, value

    (batch,) = jax.export.symbolic_shape("batch")
    ids = jax.ShapeDtypeStruct((batch,), jnp.int32)
    like = lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype)  # noqa: E731
    exported = jax.export.export(jax.jit(step))(*jax.tree.map(like, (tables, state)), ids)
    for ids in ([5], [1, 5, 999, 1, 3], np.arange(1000) // 3):
        ids = jnp.asarray(ids, jnp.int32)
        got, want = exported.call(tables, state, ids), step(tables, state, ids)
        jax.tree.map(assert_close, got, want)


def test_the_function_is_traced_once_and_aux_may_hold_anything():
    calls = []

    def fun(table, ids):
        calls.append(ids)
        return _gather(table, ids).sum(), {"ids": ids, "name": "x", "rows": _gather(table, ids)}

    ids = np.array([1, 2])
    (_, aux), _ = qrhash.value_and_grad(fun, True, has_aux=True)(TABLE, ids)
    assert calls == [ids]
    assert aux["ids"] is ids
    assert aux["name"] == "x"
    assert_close(aux["rows"], TABLE[1:3])
    with pytest.raises(ValueError, match="pair"):
        qrhash.value_and_grad(lambda t: _gather(t, ids).sum(), True, has_aux=True)(TABLE)
    with pytest.raises(TypeError, match="scalar"):
        qrhash.value_and_grad(lambda t: _gather(t, ids), True)(TABLE)


def test_inside_vmap_and_scan():
    """Gradients per example; and steps in a loop."""
    loss = lambda table, index: jnp.nansum(jnp.sin(_gather(table, index)))  # noqa: E731
    step, dense = qrhash.value_and_grad(loss, True), jax.value_and_grad(loss)
    batches = jnp.array([[0, 1, 1], [4, 5, -1]])
    got = jax.jit(jax.vmap(lambda index: _to_dense(step(TABLE, index))))(batches)
    jax.tree.map(assert_close, got, jax.vmap(lambda index: dense(TABLE, index))(batches))

    def descend(table, index):
        value, grads = step(table, index)
        return qrhash.apply_updates(table, -0.1 * grads), value

    got, _ = jax.jit(lambda t: jax.lax.scan(descend, t, batches))(TABLE)
    want = TABLE
    for index in batches:
        want = want - 0.1 * dense(want, index)[1]
    assert_close(got, want)


@pytest.mark.parametrize("marks", [*itertools.product([True, False], repeat=2)], ids=str)
def test_small_tables_may_be_marked_too(marks, rng):
    """Where the rows are gathered again in the backward pass, and where they are not."""
    cfg = make_config("quotient-remainder", "mult")
    assert not any(cfg.large_tables)
    tables, _ = parameters(cfg, rng)
    ids = rng.integers(0, cfg.num_embeddings, (6,)).astype(np.int32)
    weights = rng.standard_normal((6, FEATURES)).astype(np.float32)
    loss = functools.partial(_weighted, ids=ids, weights=weights, cfg=cfg)
    _, grads = jax.jit(qrhash.value_and_grad(loss, marks))(tables)
    want, _ = oracle.gradient(tables, [ids], [weights], cfg)
    dense = tuple(g.to_dense() if mark else g for g, mark in zip(grads, marks, strict=True))
    jax.tree.map(assert_close, dense, want)


def _weighted(tables, ids, weights, cfg):
    return (qrhash.lookup(tables, ids, cfg) * weights).sum()


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
    with pytest.raises(ValueError, match=f"large must .*{word}"):
        qrhash.value_and_grad(lambda tables: 0.0, by_rows)(tables)
