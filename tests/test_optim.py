"""Optimizers on touched rows: against loops over rows, and against optax on dense gradients."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qrhash
from qrhash import RowGrads
from support.cases import assert_close

STANDARD_PROMOTION = True  # optax's Adam and schedules add int32 and float32
UNCHECKED_KEYS = True

ROWS, WIDTH, STEPS = 7, 3, 6
RATE = 0.1


def _step(tx):
    """(params, state, gradients) -> (params, state), compiled."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return qrhash.apply_updates(params, updates), state

    return jax.jit(step)


def _draw(rng, m=5, rows=ROWS, width=WIDTH):
    """Rows with duplicates and numbers of no row, of which the values are NaN."""
    numbers = rng.integers(-1, rows + 1, m)
    values = rng.standard_normal((m, width)).astype(np.float32)
    values[(numbers < 0) | (numbers == rows)] = np.nan
    return RowGrads(jnp.asarray(numbers, jnp.int32), jnp.asarray(values), rows)


def _dense(grads):
    """`RowGrads` summed into a table by a loop; other leaves as they are."""

    def dense(grad):
        if not isinstance(grad, RowGrads):
            return grad
        table = np.zeros(grad.shape, np.float32)
        for row, value in zip(np.asarray(grad.indices), np.asarray(grad.values), strict=True):
            if 0 <= row < grad.num_rows:
                table[row] += value
        return jnp.asarray(table)

    return jax.tree.map(dense, grads, is_leaf=lambda node: isinstance(node, RowGrads))


def _on_host(tree):
    """In NumPy, where an index of another length is no other program."""
    return jax.tree.map(np.asarray, tree)


def _touched(grads):
    return sorted({row for row in np.asarray(grads.indices).tolist() if 0 <= row < grads.num_rows})


# --- every optimizer, row by row ------------------------------------------------------------------

CONVENTIONS = {  # initial accumulator, (root of the accumulator a, by convention)
    "optax": (0.1, lambda a: np.sqrt(a + 1e-7)),
    "torch": (0.0, lambda a: np.sqrt(a) + 1e-10),
    "tensorflow": (0.1, np.sqrt),
    "fbgemm": (0.0, lambda a: np.sqrt(a) + 1e-8),
}


def _accumulate(convention, mean=lambda squares: squares):
    """Adagrad of one row, in the libraries' own words: step -> new row."""
    start, root = CONVENTIONS[convention]

    def rule(row, grad, memory, count):
        del count
        memory["a"] = memory.get("a", start) + mean(grad**2)
        return row - RATE * grad / root(memory["a"])

    return rule


def _adam(row, grad, memory, count, amsgrad=False):
    m = memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * grad
    v = memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * grad**2
    v = v / (1 - 0.999**count)
    if amsgrad:
        v = memory["max"] = np.maximum(memory.get("max", 0.0), v)
    return row - RATE * m / (1 - 0.9**count) / (np.sqrt(v) + 1e-8)


def _momentum(row, grad, memory, count, nesterov=False):
    del count
    t = memory["t"] = grad + 0.9 * memory.get("t", 0.0)
    return row - RATE * (grad + 0.9 * t if nesterov else t)


def _rms(row, grad, memory, count):
    del count
    v = memory["v"] = 0.9 * memory.get("v", 0.0) + 0.1 * grad**2
    return row - RATE * grad / np.sqrt(v + 1e-8)


OPTIMIZERS = {  # (transformation, rule of one row that is touched)
    "sgd": (optax.sgd(RATE), lambda row, grad, memory, count: row - RATE * grad),
    "optax.adagrad": (optax.adagrad(RATE), _accumulate("optax")),
    **{f"adagrad, {c}": (qrhash.adagrad(RATE, convention=c), _accumulate(c)) for c in CONVENTIONS},
    **{
        f"rowwise, {c}": (qrhash.rowwise_adagrad(RATE, convention=c), _accumulate(c, np.mean))
        for c in CONVENTIONS
    },
    "adam": (optax.adam(RATE), _adam),
    "amsgrad": (
        optax.amsgrad(RATE),
        lambda row, grad, memory, count: _adam(row, grad, memory, count, amsgrad=True),
    ),
    "adamw": (
        optax.adamw(RATE, weight_decay=0.3),
        lambda row, grad, memory, count: _adam(row, grad, memory, count) - RATE * 0.3 * row,
    ),
    "momentum": (optax.sgd(RATE, momentum=0.9), _momentum),
    "nesterov": (
        optax.sgd(RATE, momentum=0.9, nesterov=True),
        lambda row, grad, memory, count: _momentum(row, grad, memory, count, nesterov=True),
    ),
    "rmsprop": (optax.rmsprop(RATE), _rms),
    "weight decay": (
        optax.chain(optax.add_decayed_weights(0.5), optax.adagrad(RATE)),
        lambda row, grad, *rest: _accumulate("optax")(row, grad + np.float64(0.5) * row, *rest),
    ),
    "schedule": (
        optax.sgd(lambda count: RATE / (1 + count)),
        lambda row, grad, memory, count: row - RATE / count * grad,
    ),
}
ALIKE_FOR_ZERO_GRADIENTS = [
    name
    for name in OPTIMIZERS
    if name.startswith(("sgd", "optax", "adagrad", "rowwise", "schedule"))
]


@pytest.mark.parametrize(
    ("name", "merge_method"),
    [(name, "hash") for name in OPTIMIZERS] + [("adam", "sort"), ("rowwise, optax", "sort")],
)
def test_it_moves_touched_rows_alone_as_a_loop_does(name, merge_method, rng, monkeypatch):
    """Lazily: neither the others nor their state. And dense, where a zero gradient is no step."""
    tx, rule = OPTIMIZERS[name]
    monkeypatch.setattr(qrhash.tuning, "merge_method", lambda _: merge_method)
    touched = qrhash.touched_rows(tx)
    step, dense_step = _step(touched), _step(tx)
    table = jnp.asarray(rng.standard_normal((ROWS, WIDTH)), jnp.float32)
    want, memories = np.float64(table), collections.defaultdict(dict)
    dense, dense_state, state = table, tx.init(table), touched.init(table)
    for count in range(1, STEPS + 1):
        grads = _draw(rng)
        before, before_state = map(_on_host, (table, state))
        table, state = step(table, state, grads)
        rows, summed = _touched(grads), np.float64(_dense(grads))
        for row in rows:
            want[row] = rule(want[row], summed[row], memories[row], count)
        assert_close(table, want)
        others = np.setdiff1d(np.arange(ROWS), rows)
        np.testing.assert_array_equal(np.asarray(table)[others], before[others])
        leaves = map(jax.tree.leaves, (_on_host(state), before_state))
        for leaf, old in zip(*leaves, strict=True):
            if leaf.shape[:1] == (ROWS,):
                np.testing.assert_array_equal(leaf[others], old[others])
        if name in ALIKE_FOR_ZERO_GRADIENTS:
            dense, dense_state = dense_step(dense, dense_state, _dense(grads))
            jax.tree.map(assert_close, (table, state), (dense, dense_state))
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_equals_the_dense_optimizer_when_all_rows_are_touched(name, rng):
    tx, _ = OPTIMIZERS[name]
    table = jnp.asarray(rng.standard_normal((ROWS, WIDTH)), jnp.float32)
    step, dense_step = _step(qrhash.touched_rows(tx)), _step(tx)
    touched, dense = (table, tx.init(table)), (table, tx.init(table))
    for _ in range(3):
        every = _draw(rng, ROWS)
        every = RowGrads(
            jnp.concatenate([every.indices, jnp.asarray(rng.permutation(ROWS), jnp.int32)]),
            jnp.concatenate([every.values, jnp.ones((ROWS, WIDTH))]),
            ROWS,
        )
        touched, dense = step(*touched, every), dense_step(*dense, _dense(every))
    jax.tree.map(assert_close, touched, dense)


# --- conventions of Adagrad -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [qrhash.adagrad, qrhash.rowwise_adagrad])
def test_goldens_by_hand(make):
    """Value 1, gradient 4, rate 0.1: 1 - 0.4 / sqrt(0.1 + 16) as DeepRec's test has it."""
    want = {"tensorflow": 0.90031, "optax": 0.90031, "torch": 0.9, "fbgemm": 0.9}
    for convention, value in want.items():
        tx = qrhash.touched_rows(make(0.1, convention=convention))
        table, grads = jnp.ones((1, 1)), RowGrads(jnp.array([0]), jnp.full((1, 1), 4.0), 1)
        updates, state = tx.update(grads, tx.init(table), table)
        assert abs(qrhash.apply_updates(table, updates).item() - value) < 5e-6
        start = 0.1 if convention in ("optax", "tensorflow") else 0
        (accumulator,) = jax.tree.leaves(state)
        np.testing.assert_allclose(accumulator.squeeze(), start + 16, rtol=1e-6)


def test_the_second_step_by_hand():
    """Row [3, 4], rate 1: per entry 1/sqrt(9) and 1/sqrt(16); per row the mean of 9 and 16."""
    grad = jnp.array([[3.0, 4.0]])
    for make, first, second in [
        (qrhash.adagrad, [-1, -1], [-(2**-0.5)] * 2),
        (qrhash.rowwise_adagrad, [-3 / 12.5**0.5, -4 / 12.5**0.5], [-3 / 5, -4 / 5]),
    ]:
        tx = make(1.0, convention="torch")
        updates, state = tx.update(grad, tx.init(grad))
        assert_close(updates, [first])
        assert_close(tx.update(grad, state)[0], [second])


@pytest.mark.parametrize("inside", [True, False])
def test_where_eps_stands(inside):
    """An eps as large as the sum tells sqrt(a + eps) from sqrt(a) + eps."""
    tx = qrhash.adagrad(
        1.0, convention="optax" if inside else "torch", initial_accumulator_value=0.0, eps=4.0
    )
    grad = jnp.array([2.0])
    want = 2 / math.sqrt(8) if inside else 2 / 6
    assert_close(tx.update(grad, tx.init(grad))[0], [-want])


@pytest.mark.parametrize(
    ("convention", "grad", "want"),
    [
        ("optax", 1e-4, 1e-4 / math.sqrt(1e-8 + 1e-7)),
        ("torch", 1e-10, 1 / 2),
        ("tensorflow", 1e-4, 1),
        ("fbgemm", 1e-8, 1 / 2),
    ],
)
@pytest.mark.parametrize("make", [qrhash.adagrad, qrhash.rowwise_adagrad])
def test_the_eps_of_a_convention(make, convention, grad, want):
    """Shown by gradients of its own size."""
    tx, grad = (
        make(1.0, convention=convention, initial_accumulator_value=0.0),
        jnp.full((1, 2), grad),
    )
    assert_close(tx.update(grad, tx.init(grad))[0], [[-want] * 2])


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("make", [qrhash.adagrad, qrhash.rowwise_adagrad])
def test_zero_gradients_from_the_start_are_no_step(make, convention):
    tx = make(1.0, convention=convention, initial_accumulator_value=0.0, eps=0.0)
    params = {"table": jnp.ones((2, 3)), "scalar": jnp.ones(()), "bias": jnp.ones(2)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params))
    assert all((u == 0).all() for u in jax.tree.leaves(updates))


def test_shapes_and_dtypes_of_accumulators():
    params = [jnp.ones((4, 3), jnp.bfloat16), jnp.ones(()), jnp.ones((2, 3, 5)), jnp.ones(6)]
    for make, cut in [(qrhash.adagrad, None), (qrhash.rowwise_adagrad, -1)]:
        tx = make(0.1)
        with jax.numpy_dtype_promotion("strict"):
            updates, state = tx.update(params, tx.init(params))
        accumulators = jax.tree.leaves(state)
        assert [a.shape for a in accumulators] == [p.shape[:cut] for p in params]
        assert {a.dtype for a in accumulators} == {jnp.dtype("float32")}
        assert [u.dtype for u in updates] == [p.dtype for p in params]


def test_adagrad_is_optax_adagrad_and_takes_schedules(rng):
    grads = [jnp.asarray(rng.standard_normal((4, 3)), jnp.float32) for _ in range(3)]
    for rate in (0.2, lambda count: 0.2 / (1 + count)):
        ours, theirs = qrhash.adagrad(rate), optax.adagrad(rate)
        state, their_state = ours.init(grads[0]), theirs.init(grads[0])
        for grad in grads:
            updates, state = ours.update(grad, state)
            want, their_state = theirs.update(grad, their_state)
            assert_close(updates, want)


@pytest.mark.parametrize("make", [qrhash.adagrad, qrhash.rowwise_adagrad])
def test_an_unknown_convention_is_refused(make):
    with pytest.raises(ValueError, match=r"convention.*tensorflow.*'caffe'"):
        make(0.1, convention="caffe")


# --- what optax can chain -------------------------------------------------------------------------


def _params(rng):
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {"embed": (draw(ROWS, WIDTH), draw(9, 2)), "kernel": draw(3, 2), "bias": draw(2)}


def _gradients(rng):
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "embed": (_draw(rng, 6), _draw(rng, 4, 9, 2)),
        "kernel": draw(3, 2),
        "bias": draw(2),
    }


def _labels(params):
    return {name: "table" if name == "embed" else "rest" for name in params}


CHAINS = {
    "clip": optax.chain(optax.clip_by_global_norm(0.7), optax.adagrad(RATE)),
    "clip entries": optax.chain(optax.clip(0.3), qrhash.rowwise_adagrad(RATE)),
    "clip and schedule": optax.chain(
        optax.clip_by_global_norm(0.7), optax.adagrad(optax.cosine_decay_schedule(RATE, 4))
    ),
    "hyperparameters": optax.inject_hyperparams(optax.adagrad)(learning_rate=RATE),
    "partition": optax.partition(
        {"table": qrhash.rowwise_adagrad(RATE), "rest": optax.adam(RATE)}, _labels
    ),
    "masked": optax.chain(
        optax.masked(optax.add_decayed_weights(0.5), lambda p: {k: k == "bias" for k in p}),
        optax.adagrad(RATE),
    ),
    "frozen": optax.partition({"table": optax.set_to_zero(), "rest": optax.sgd(RATE)}, _labels),
    "if finite": optax.apply_if_finite(optax.adagrad(RATE), 3),
    "named": optax.named_chain(("a", optax.scale_by_rss()), ("b", optax.scale(-RATE))),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_equal_themselves_on_dense_gradients(name, rng):
    tx = CHAINS[name]
    params = _params(rng)
    step, dense_step = _step(qrhash.touched_rows(tx)), _step(tx)
    touched, dense = (params, tx.init(params)), (params, tx.init(params))
    for _ in range(4):
        grads = _gradients(rng)
        touched, dense = step(*touched, grads), dense_step(*dense, _dense(grads))
    assert jax.tree.structure(touched) == jax.tree.structure(dense)
    jax.tree.map(assert_close, touched, dense)


def test_a_learning_rate_changed_between_steps(rng):
    tx = qrhash.touched_rows(optax.inject_hyperparams(optax.sgd)(learning_rate=1.0))
    params, grads, step = _params(rng), _gradients(rng), _step(tx)
    state = tx.init(params)
    state.hyperparams["learning_rate"] = jnp.float32(0.25)
    got, _ = step(params, state, grads)
    want = jax.tree.map(lambda p, g: p - 0.25 * g, params, _dense(grads))
    jax.tree.map(assert_close, got, want)


def test_extra_arguments_reach_the_transformation(rng):
    tx = qrhash.touched_rows(optax.contrib.reduce_on_plateau(patience=1, factor=0.5))
    grads, state = {"t": _draw(rng)}, None
    state = tx.init({"t": jnp.ones((ROWS, WIDTH))})
    for value in (1.0, 2.0, 2.0, 2.0):
        updates, state = tx.update(grads, state, value=jnp.float32(value))
    assert state.scale < 1
    assert_close(updates["t"].to_dense(), state.scale * _dense(grads)["t"])


def test_weight_decay_moves_touched_rows_alone(rng):
    tx = qrhash.touched_rows(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0)))
    table, grads = jnp.ones((ROWS, WIDTH)), _draw(rng, 4)
    updates, _ = tx.update(grads, tx.init(table), table)
    want = np.ones((ROWS, WIDTH), np.float32) - np.asarray(_dense(grads))
    want[_touched(grads)] -= 0.5
    assert_close(qrhash.apply_updates(table, updates), want)


def test_the_global_norm_is_that_of_dense_gradients(rng):
    grads = _gradients(rng)
    clipped, _ = qrhash.touched_rows(optax.clip_by_global_norm(0.01)).update(
        grads, optax.EmptyState()
    )
    norm = qrhash.global_norm(grads)
    assert_close(norm, optax.global_norm(_dense(grads)))
    assert_close(qrhash.global_norm(clipped), 0.01)


# --- what `touched_rows` promises -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "partition", "hyperparameters", "masked"])
def test_its_state_is_that_of_the_transformation(name, rng):
    tx = CHAINS[name]
    touched, params = qrhash.touched_rows(tx), _params(rng)
    assert isinstance(touched, optax.GradientTransformationExtraArgs)
    got, want = touched.init(params), tx.init(params)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    grads = _gradients(rng)
    got, want = touched.update(_dense(grads), got, params), tx.update(_dense(grads), want, params)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_updates_are_row_gradients_in_the_same_places(rng):
    tx = qrhash.touched_rows(optax.adagrad(RATE))
    params, grads = _params(rng), _gradients(rng)
    updates, _ = tx.update(grads, tx.init(params))
    for update, grad in zip(updates["embed"], grads["embed"], strict=True):
        assert isinstance(update, RowGrads)
        assert update.is_merged
        assert (update.shape, update.indices.shape) == (grad.shape, grad.indices.shape)
    assert updates["kernel"].shape == (3, 2)


def test_dense_and_row_gradients_may_take_turns(rng):
    """Their states are one and the same."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adagrad(RATE))
    touched, params = qrhash.touched_rows(tx), _params(rng)
    mixed, dense = (params, touched.init(params)), (params, tx.init(params))
    for turn in range(4):
        grads = _gradients(rng)
        if turn == 2:
            grads["embed"] = (grads["embed"][0], _dense(grads["embed"][1]))
        mixed = _step(touched)(*mixed, grads if turn % 2 == 0 else _dense(grads))
        dense = _step(tx)(*dense, _dense(grads))
    jax.tree.map(assert_close, mixed, dense)


@pytest.mark.parametrize("m", [0, 1])
@pytest.mark.parametrize("name", ["adam", "rowwise, fbgemm", "weight decay"])
def test_batches_of_no_row(name, m, rng):
    """Empty ones, and those of ids without rows: nothing of the table moves."""
    tx = qrhash.touched_rows(OPTIMIZERS[name][0])
    table = jnp.asarray(rng.standard_normal((ROWS, WIDTH)), jnp.float32)
    none = RowGrads(jnp.full(m, ROWS, jnp.int32), jnp.full((m, WIDTH), jnp.nan), ROWS)
    state = tx.init(table)
    got, new_state = _step(tx)(table, state, none)
    np.testing.assert_array_equal(got, table)
    for leaf, old in zip(jax.tree.leaves(new_state), jax.tree.leaves(state), strict=True):
        if leaf.ndim:
            np.testing.assert_array_equal(leaf, old)


def test_tables_of_bfloat16_keep_their_dtype(rng):
    table = jnp.asarray(rng.standard_normal((ROWS, WIDTH)), jnp.bfloat16)
    grads = _draw(rng)
    grads = RowGrads(grads.indices, grads.values.astype(jnp.bfloat16), ROWS)
    for make in (optax.adagrad, qrhash.adagrad, qrhash.rowwise_adagrad):
        tx = qrhash.touched_rows(make(RATE))
        got, _ = _step(tx)(table, tx.init(table), grads)
        want, _ = _step(make(RATE))(table, tx.init(table), _dense(grads).astype(jnp.bfloat16))
        assert got.dtype == jnp.bfloat16
        assert_close(got, np.asarray(want).astype(np.float32), 2**-7)


def test_state_that_does_not_go_by_rows_is_refused():
    """Adafactor keeps one entry per column of a wide table."""
    tx = qrhash.touched_rows(optax.adafactor(RATE))
    table = jnp.ones((256, 128))
    grads = RowGrads(jnp.array([3]), jnp.ones((1, 128)), 256)
    with pytest.raises(ValueError, match=r"per row of a table.*\(128,\).*densely"):
        tx.update(grads, tx.init(table), table)


def test_tables_of_one_shape_keep_their_states_apart(rng):
    """Also those whose number of rows is another's plus a few, and a table of one row."""
    for sizes in ([4, 4, 4], [4, 5, 6, 7], [1, 2, 1]):
        params = [jnp.asarray(rng.standard_normal((n, 2)), jnp.float32) for n in sizes]
        grads = [_draw(rng, 3, n, 2) for n in sizes]
        tx = optax.chain(qrhash.rowwise_adagrad(RATE), optax.trace(0.9))
        got = _step(qrhash.touched_rows(tx))(params, tx.init(params), grads)
        jax.tree.map(assert_close, got, _step(tx)(params, tx.init(params), _dense(grads)))


# --- apply_updates --------------------------------------------------------------------------------


def test_apply_updates_is_that_of_optax_and_adds_to_named_rows(rng):
    params, updates = _params(rng), _gradients(rng)
    got = qrhash.apply_updates(params, updates)
    jax.tree.map(assert_close, got, optax.apply_updates(params, _dense(updates)))
    dense = _dense(updates)
    jax.tree.map(
        np.testing.assert_array_equal,
        qrhash.apply_updates(params, dense),
        optax.apply_updates(params, dense),
    )


def test_no_update_is_no_change(rng):
    params, updates = _params(rng), _gradients(rng)
    same = qrhash.apply_updates(params, updates | {"kernel": None})
    np.testing.assert_array_equal(same["kernel"], params["kernel"])


def test_apply_updates_keeps_the_dtypes_of_parameters(rng):
    table = jnp.zeros((ROWS, WIDTH), jnp.bfloat16)
    got = qrhash.apply_updates({"t": table}, {"t": _draw(rng)})
    assert got["t"].dtype == jnp.bfloat16


@pytest.mark.parametrize("accumulate", [optax.apply_every(2), optax.MultiSteps(optax.sgd(1.0), 2)])
def test_accumulation_over_steps_is_refused(accumulate, rng):
    tx = qrhash.touched_rows(optax.chain(accumulate, optax.scale(1.0)))
    table = jnp.ones((ROWS, WIDTH))
    with pytest.raises(ValueError, match="add up the RowGrads"):
        tx.update(_draw(rng), tx.init(table), table)


def test_gradients_that_do_not_fit_the_parameters_are_refused(rng):
    tx = qrhash.touched_rows(optax.sgd(1.0))
    table = jnp.ones((ROWS + 1, WIDTH))
    with pytest.raises(ValueError, match=r"\(7, 3\).*\(8, 3\)"):
        tx.update(_draw(rng), tx.init(table), table)
    with pytest.raises(ValueError, match="kernel"):
        tx.update({"table": _draw(rng)}, tx.init(table), {"kernel": table})


@pytest.mark.parametrize("make", [qrhash.adagrad, qrhash.rowwise_adagrad])
def test_an_optimizer_that_is_not_wrapped_says_so(make, rng):
    tx = make(0.1)
    with pytest.raises(ValueError, match=r"qrhash\.touched_rows\(tx\)"):
        tx.update(_draw(rng), tx.init(jnp.ones((ROWS, WIDTH))))


# --- what does not treat rows alone is told by what it does ---------------------------------------

BY_SHAPE = {
    "masked": lambda f: optax.masked(optax.sgd(0.1), f),
    "masked, with state": lambda f: optax.masked(optax.adam(0.1), f),
    "frozen by a label": lambda f: _partition(f, optax.set_to_zero(), optax.sgd(0.1)),
    "two rates": lambda f: _partition(f, optax.sgd(0.2), optax.sgd(0.1)),
    "adamw": lambda f: optax.adamw(0.1, mask=f),
    "weight decay": lambda f: optax.chain(optax.clip(1.0), optax.add_decayed_weights(0.1, f)),
    "inject_hyperparams": lambda f: optax.inject_hyperparams(
        lambda rate: optax.masked(optax.sgd(rate), f)
    )(rate=0.1),
}
DECISIONS = {
    "many rows": lambda leaf: leaf.shape[0] > 100,
    "few rows": lambda leaf: leaf.shape[0] < 100,
    "size": lambda leaf: leaf.size > 300,
    "even": lambda leaf: leaf.shape[0] == 250,
}


def _partition(is_first, first, second):
    labels = lambda tree: jax.tree.map(lambda yes: "a" if yes else "b", is_first(tree))  # noqa: E731
    return optax.partition({"a": first, "b": second}, labels)


def _two_tables():
    params = {"large": jnp.ones((250, 2)), "small": jnp.ones((40, 2)), "bias": jnp.ones(3)}
    grads = {
        "large": RowGrads(jnp.array([1, 7, 1]), jnp.ones((3, 2)), 250),
        "small": RowGrads(jnp.array([5, 6]), jnp.ones((2, 2)), 40),
        "bias": jnp.ones(3),
    }
    return params, grads


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("decision", DECISIONS)
@pytest.mark.parametrize("name", BY_SHAPE)
def test_what_decides_by_shapes_is_refused(name, decision, wrap):
    """It would see the rows touched in place of tables."""
    params, grads = _two_tables()
    tx = qrhash.touched_rows(BY_SHAPE[name](lambda tree: jax.tree.map(DECISIONS[decision], tree)))
    with pytest.raises(ValueError, match=r"decides by the shapes of arrays.*trees of bools"):
        wrap(tx.update)(grads, tx.init(params), params)


def test_what_decides_by_shapes_is_refused_at_init_where_tables_are_known():
    from flax import nnx

    tx = optax.masked(optax.sgd(0.1), lambda p: jax.tree.map(lambda x: x.shape[0] > 100, p))
    config = qrhash.EmbedConfig(qrhash.QuotientRemainder(1000, 4), 2, large_table_rows=100)
    model = qrhash.nnx.MultiHashEmbed(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="decides by the shapes"):
        qrhash.nnx.Optimizer(model, tx)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    table = qrhash.ShardedTable.from_array(jnp.ones((800, 2)), qrhash.MeshLayout(mesh=mesh))
    by_shape = lambda p: jax.tree.map(lambda x: x.shape[1] == 100, p)  # noqa: E731
    with pytest.raises(ValueError, match="decides by the shapes"):
        qrhash.touched_rows(optax.masked(optax.sgd(0.1), by_shape)).init((table,))
    qrhash.touched_rows(optax.masked(optax.sgd(0.1), (True,))).init((table,))


BY_OTHERS = {
    "a tree of bools": optax.masked(optax.sgd(0.1), {"large": True, "small": False, "bias": True}),
    "ndim": optax.adamw(0.1, mask=lambda p: jax.tree.map(lambda x: jnp.ndim(x) > 1, p)),
    "dtype": optax.masked(
        optax.sgd(0.1), lambda p: jax.tree.map(lambda x: x.dtype == jnp.float32, p)
    ),
    "names": optax.partition(
        {"a": optax.set_to_zero(), "b": optax.sgd(0.1)},
        lambda p: {name: "a" if name == "large" else "b" for name in p},
    ),
}


@pytest.mark.parametrize("name", BY_OTHERS)
def test_masks_and_labels_that_do_not_ask_for_shapes_are_right(name):
    params, grads = _two_tables()
    tx = BY_OTHERS[name]
    updates, _ = qrhash.touched_rows(tx).update(grads, tx.init(params), params)
    want, _ = tx.update(_dense(grads), tx.init(params), params)
    touched = {"large": [1, 7], "small": [5, 6], "bias": [0, 1, 2]}
    for leaf, rows in touched.items():
        assert_close(_dense(updates)[leaf][np.array(rows)], want[leaf][np.array(rows)])
    if name == "names":
        assert (_dense(updates)["large"] == 0).all()


@pytest.mark.parametrize(
    ("tx", "words"),
    [
        (optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)), "parameters of earlier steps"),
        (optax.contrib.schedule_free(optax.sgd(0.1), 0.1), "parameters of earlier steps"),
        (optax.contrib.prodigy(), "parameters of earlier steps"),
        (optax.contrib.dog(), "parameters of earlier steps"),
        (optax.chain(optax.clip(1.0), optax.contrib.sam(*[optax.sgd(0.1)] * 2)), "earlier steps"),
        (optax.MultiSteps(optax.sgd(0.1), 2), "accumulates over steps.*add_grads"),
        (optax.apply_every(2), "accumulates over steps"),
    ],
    ids=["sam", "schedule_free", "prodigy", "dog", "sam in a chain", "MultiSteps", "apply_every"],
)
def test_what_goes_by_rows_of_earlier_steps_is_refused(tx, words):
    params, grads = _two_tables()
    tx = qrhash.touched_rows(tx)
    with pytest.raises(ValueError, match=words):
        tx.update(grads, tx.init(params), params)


def _average_of_params():
    """Not one of optax's: a moving average of the parameters, from zero."""
    init = lambda params: jax.tree.map(jnp.zeros_like, params)  # noqa: E731

    def update(updates, state, params):
        return updates, jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, state, params)

    return optax.GradientTransformation(init, update)


def test_transformations_of_others_are_told_by_what_they_do():
    params, grads = _two_tables()
    tx = qrhash.touched_rows(optax.chain(optax.sgd(0.1), _average_of_params()))
    with pytest.raises(ValueError, match="averages of them"):
        tx.update(grads, tx.init(params), params)
    decay = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    lazy = qrhash.touched_rows(decay)
    lazy.update(grads, lazy.init(params), params)  # its state holds gradients too: the lazy variant


def test_lookahead_is_refused_in_words():
    params, grads = _two_tables()
    tx = qrhash.touched_rows(optax.lookahead(optax.sgd(0.1), 5, 0.5))
    both = optax.LookaheadParams.init_synced(params)
    with pytest.raises(ValueError, match=r"optax\.lookahead"):
        tx.update(grads, tx.init(both), both)


def test_a_function_of_the_parameters_is_refused_when_it_is_called():
    params, grads = _two_tables()
    tx = qrhash.touched_rows(
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True, sync_period=2)
    )
    with pytest.raises(ValueError, match="function of the parameters, grad_fn"):
        tx.update(grads, tx.init(params), params, grad_fn=lambda params, _: params)


def test_masks_by_the_values_of_arrays_are_refused():
    params, grads = _two_tables()
    mask = lambda p: jax.tree.map(lambda x: bool((x > 0).all()), p)  # noqa: E731
    tx = qrhash.touched_rows(optax.masked(optax.sgd(0.1), mask))
    with pytest.raises(ValueError, match="decides by the values"):
        tx.update(grads, tx.init(params), params)


@pytest.mark.parametrize("tx", [None, optax.adagrad, 0.1, "adagrad"])
def test_what_is_no_transformation_is_refused(tx):
    with pytest.raises(ValueError, match="tx must be an optax transformation"):
        qrhash.touched_rows(tx)


def test_inside_partition_and_masked_it_works_and_by_functions_it_is_told():
    params, grads = _two_tables()
    inner = qrhash.touched_rows(optax.adagrad(0.1))
    labels = {"large": "a", "small": "a", "bias": "b"}
    tx = optax.partition({"a": inner, "b": optax.sgd(0.1)}, labels)
    updates, _ = tx.update(grads, tx.init(params), params)
    want, _ = optax.adagrad(0.1).update(_dense(grads), optax.adagrad(0.1).init(params), params)
    assert_close(_dense(updates)["large"], want["large"])
    by_leaf = lambda tree: jax.tree.map(lambda x: "a" if x.ndim > 1 else "b", tree)  # noqa: E731
    tx = optax.partition({"a": inner, "b": optax.sgd(0.1)}, by_leaf)
    with pytest.raises((ValueError, TypeError), match="touched_rows"):
        tx.update(grads, tx.init(params), params)


def test_an_eager_loop_is_checked_once(monkeypatch):
    params, grads = _two_tables()
    tx = qrhash.touched_rows(optax.adagrad(0.1))
    state = tx.init(params)
    calls = []
    check = qrhash.optim.checks.Transformation.check
    monkeypatch.setattr(
        qrhash.optim.checks.Transformation, "check", lambda *args: (calls.append(1), check(*args))
    )
    for _ in range(3):
        _, state = tx.update(grads, state, params)
    assert len(calls) == 1
