"""k rows -> one vector, for every operation, number of tables and rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qrhash
from support import oracle
from support.cases import OPERATIONS, SHAPES, assert_close

BAD = [
    (2, "sum", False, ["operation", "add", "mult", "concat", "project", "'sum'"]),
    (0, "add", False, ["rows", "none"]),
    (2, "project", False, ["projection", "without"]),
    (2, "mult", True, ["projection", "'mult'"]),
]


def _operands(rng, k, operation, shape, bias=True):
    widths = {"concat": [3, 2, 4], "path": [8, 3, 15]}.get(operation, [3] * 3)  # path: 3 -> 2 -> 5
    widths = widths[:k] if (operation, k) != ("path", 1) else [3]
    rows = tuple(jnp.asarray(rng.standard_normal((*shape, w)), jnp.float32) for w in widths)
    if operation != "project":
        return rows, None
    kernel = rng.standard_normal((3 * (k + 1) if k > 1 else 3, 5)).astype(np.float32)
    return rows, qrhash.Projection(kernel, rng.standard_normal(5).astype(np.float32) * bias)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_combine_equals_the_oracle(operation, k, rng):
    jitted = jax.jit(qrhash.combine, static_argnames="operation")
    for shape in [s for s in SHAPES if 0 not in s]:
        rows, projection = _operands(rng, k, operation, shape)
        want = oracle.combine(rows, operation, projection)
        for combine in (qrhash.combine, jitted):
            assert_close(combine(rows, operation, projection), want)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_of_the_host_stay_there_in_their_dtype(operation, rng):
    rows, projection = _operands(rng, 2, operation, (2, 3))
    of_host = jax.tree.map(lambda each: np.asarray(each).astype(np.float64), (rows, projection))
    found = qrhash.combine(of_host[0], operation, of_host[1])
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float64
    assert_close(found, oracle.combine(rows, operation, projection))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_empty_batch_and_a_list_of_rows(operation, rng):
    rows, projection = _operands(rng, 2, operation, (0, 4))
    features = {"concat": 5, "project": 5, "path": 2}.get(operation, 3)
    assert qrhash.combine(list(rows), operation, projection).shape == (0, 4, features)


def test_project_takes_a_bare_kernel_or_none_for_the_bias(rng):
    rows, (kernel, _) = _operands(rng, 2, "project", (4,), bias=False)
    want = oracle.combine(rows, "project", (kernel, None))
    assert_close(qrhash.combine(rows, "project", kernel), want)
    assert_close(qrhash.combine(rows, "project", qrhash.Projection(kernel, None)), want)


@pytest.mark.parametrize(("k", "operation", "projection", "words"), BAD)
def test_arguments_that_make_no_sense_are_refused(k, operation, projection, words):
    rows = (jnp.ones((4, 3)),) * k
    with pytest.raises(ValueError, match=words[0]) as error:
        qrhash.combine(rows, operation, jnp.ones((9, 5)) if projection else None)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("shapes", "operation"),
    [
        ([(4, 3), (4, 2)], "add"),
        ([(4, 3), (4, 1)], "mult"),
        ([(4, 3), (1, 3)], "mult"),
        ([(4, 3), (5, 3)], "concat"),
        ([(4, 2), (4, 2)], "project"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_and_not_broadcast(shapes, operation):
    projection = jnp.ones((9, 5)) if operation == "project" else None
    with pytest.raises((AssertionError, ValueError)):
        qrhash.combine([jnp.ones(shape) for shape in shapes], operation, projection)
