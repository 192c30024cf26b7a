"""Combining: the k rows of an id -> one vector.

The operations of Shi et al. 2020, section 4.1, on rows z_1, ..., z_k gathered from k tables:

    add       e = z_1 + ... + z_k
    mult      e = z_1 * ... * z_k             (elementwise)
    concat    e = [z_1; ...; z_k]
    project   e = W [z_1; ...; z_k; z_1 * ... * z_k] + b

`project` keeps the rows narrow, so that the same memory holds more of them, and lets one small
matrix, shared by all ids of a feature, widen them to the vector.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax.numpy as jnp

OPERATIONS = ("add", "mult", "concat", "project")


class Projection(NamedTuple):
    """The dense parameters of operation "project", shared by all ids of a feature.

    Attributes:
      kernel: W transposed, [num_inputs, features]. `num_inputs` is (k + 1) * width for k > 1
        rows of that width, and the row's width for k = 1.
      bias: b, [features], or None.
    """

    kernel: chex.Array
    bias: chex.Array | None = None


def combine(
    rows: Sequence[chex.Array],
    operation: str,
    projection: Projection | chex.Array | None = None,
) -> chex.Array:
    """Combines the k rows of each id into its vector.

    Args:
      rows: k arrays [*shape, width_j] of one dtype; equal widths but for "concat".
      operation: "add", "mult", "concat" or "project".
      projection: for "project" alone, its `Projection` or just the kernel.

    Returns:
      Vectors [*shape, features]; features is the common width, for "concat" the sum of the
      widths, for "project" the kernel's.

    Raises:
      ValueError: unknown operation, no rows, or a projection missing or out of place.
      AssertionError: shapes that do not fit together.

    Source: Shi et al. 2020, section 4.1 (operation-based compositional embeddings).

    >>> q, r = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
    >>> combine((q, r), "mult").tolist(), combine((q, r), "concat").tolist()
    ([3.0, 8.0], [1.0, 2.0, 3.0, 4.0])
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}.")
    if not rows:
        raise ValueError("rows must hold the rows of at least one table, got none.")
    if (operation == "project") != (projection is not None):
        raise ValueError(
            f"projection goes with operation 'project' alone, got operation {operation!r} "
            f"{'without' if projection is None else 'with'} a projection."
        )
    if operation == "concat":
        chex.assert_equal_shape_prefix(list(rows), rows[0].ndim - 1)
        return jnp.concatenate(rows, axis=-1)
    chex.assert_equal_shape(list(rows))
    if operation == "add":
        return functools.reduce(operator.add, rows)
    product = functools.reduce(operator.mul, rows)
    if operation == "mult":
        return product
    assert projection is not None
    kernel, bias = as_projection(projection)
    inputs = jnp.concatenate((*rows, product), axis=-1) if len(rows) > 1 else product
    chex.assert_shape(kernel, (inputs.shape[-1], None))
    vectors = inputs @ kernel
    return vectors if bias is None else vectors + bias


def as_projection(projection: Projection | chex.Array) -> Projection:
    """A projection, also from just its kernel."""
    return projection if isinstance(projection, Projection) else Projection(projection)
