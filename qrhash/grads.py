"""Sums and norms of trees of gradients, with `RowGrads` among them."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from qrhash.rowgrads import RowGrads, is_row_grads
from qrhash.types import wide_dtype


def global_norm(grads: Any) -> jax.Array:
    """The Euclidean norm of a tree of gradients, that of the dense ones: `optax.global_norm`.

    Args:
      grads: a tree of arrays and `RowGrads`.

    Returns:
      A scalar: the root of the sum of all squares, rows named several times summed first.

    >>> grads = RowGrads(jnp.array([1, 1]), jnp.array([[1.0], [2.0]]), num_rows=4)
    >>> global_norm({"table": grads, "bias": jnp.array([4.0])}).item()
    5.0
    """

    def squares(grad: Any) -> jax.Array:
        merged = grad.merge() if is_row_grads(grad) else grad
        values = merged.values if is_row_grads(merged) else jnp.asarray(merged)
        wide = values.astype(wide_dtype(values.dtype))
        return jnp.sum(jnp.square(jnp.abs(wide)))

    total = map(squares, jax.tree.leaves(grads, is_leaf=is_row_grads))
    return jnp.sqrt(sum(total, start=jnp.zeros(())))


def add_grads(*grads: Any) -> Any:
    """Adds up trees of gradients, of several batches for instance.

    The sum over microbatches of their gradients is the gradient of the sum of their losses.

    Args:
      *grads: trees of one structure, of arrays and `RowGrads` (inside `ShardedTable`s too).

    Returns:
      The tree of their sums. A `RowGrads` of the sum names the rows of each.

    Raises:
      ValueError: no trees, or trees of other structures, or gradients of other kinds at one
        place.

    >>> one = {"table": RowGrads(jnp.array([1]), jnp.ones((1, 2)), num_rows=4), "bias": 1.0}
    >>> total = add_grads(one, one)
    >>> total["table"].to_dense()[1].tolist(), total["bias"]
    ([2.0, 2.0], 2.0)
    """
    if not grads:
        raise ValueError("add_grads takes at least one tree of gradients, got none.")
    leaves, tree = jax.tree.flatten(grads[0], is_leaf=is_row_grads)
    others: list[tuple[list[Any], Any]]
    others = [jax.tree.flatten(other, is_leaf=is_row_grads) for other in grads[1:]]
    for number, (_, of_other) in enumerate(others, start=1):
        if of_other != tree:
            raise ValueError(
                f"add_grads takes trees of one structure, but tree {number} is {of_other}, and "
                f"tree 0 is {tree}."
            )
    for leaf, *rest in zip(leaves, *(each for each, _ in others), strict=True):
        if len({is_row_grads(each) for each in (leaf, *rest)}) > 1:
            raise ValueError(
                "add_grads met RowGrads and a dense gradient for one table: make the former dense "
                "with to_dense()."
            )
    sums = [
        functools.reduce(operator.add, of_leaf)
        for of_leaf in zip(leaves, *(each for each, _ in others), strict=True)
    ]
    return jax.tree.unflatten(tree, sums)


def sum_grads(stacked: Any) -> Any:
    """The sum over a leading axis, as `jax.lax.scan` and `jax.vmap` stack what they return.

    So gradients are accumulated over microbatches in a loop: return those of each turn, and sum
    them up afterwards. (A carry cannot add them up, as every turn names other rows.)

        losses, grads = jax.lax.map(lambda batch: step(params, batch), batches)
        grads = qrhash.sum_grads(grads)

    Args:
      stacked: a tree of arrays [n, ...] and of unmerged `RowGrads` with indices [n, m] and values
        [n, m, width].

    Returns:
      The tree of sums: arrays [...], and `RowGrads` of n * m row numbers.

    Raises:
      ValueError: `RowGrads` without such an axis, or merged ones.

    >>> one = RowGrads(jnp.array([1, 2]), jnp.ones((2, 1)), num_rows=4)
    >>> _, stacked = jax.lax.scan(lambda _, __: (None, one), None, length=3)
    >>> sum_grads(stacked).to_dense()[:, 0].tolist()
    [0.0, 3.0, 3.0, 0.0]
    """

    def total(grad: Any) -> Any:
        if not is_row_grads(grad):
            return jnp.sum(grad, axis=0)
        indices = grad.indices
        if jnp.ndim(indices) != 2 or grad.is_merged:
            raise ValueError(
                "sum_grads takes unmerged RowGrads stacked along a leading axis, of indices "
                "[n, m], got "
                f"{'merged ones' if grad.is_merged else f'indices of shape {jnp.shape(indices)}'}."
            )
        indices, values = grad.storage.flatten([indices], [grad.values], batch_axis=1)
        return RowGrads(indices, values, grad.num_rows, storage=grad.storage)

    return jax.tree.map(total, stacked, is_leaf=is_row_grads)
