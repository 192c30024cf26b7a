"""Pooling: the vectors of a bag's ids -> one vector.

The combiners, on vectors v_i with weights w_i, which are 1 where none are given:

    sum     sum_i w_i v_i
    mean    sum_i w_i v_i / sum_i w_i
    sqrtn   sum_i w_i v_i / sqrt(sum_i w_i^2)
    max     the greatest v_i, entry by entry; no weights

An empty bag has the vector of zeros, and so has one whose divisor is zero. `mean` and `sqrtn` are
TensorFlow's `embedding_lookup_sparse`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qrhash.bags import Bag
from qrhash.rows import across
from qrhash.types import wide_dtype

COMBINERS = ("sum", "mean", "sqrtn", "max")


def pool(vectors: jax.Array, bag: Bag, combiner: str) -> jax.Array:
    """Pools the vectors of bags.

    Args:
      vectors: [n, features], one for each place of the bags.
      bag: which of them is in which bag, and with which weight; its ids do not matter.
      combiner: "sum", "mean", "sqrtn" or "max".

    Returns:
      [num_bags, features], of the vectors' dtype; summed up in float32 at least.

    Raises:
      ValueError: an unknown combiner, weights with "max", or vectors of another shape.

    >>> bag = Bag.from_lists([[7], [], [8, 9]])
    >>> pool(jnp.array([[1.0], [2.0], [6.0]]), bag, "mean").tolist()
    [[1.0], [0.0], [4.0]]
    """
    if combiner not in COMBINERS:
        raise ValueError(f"combiner must be one of {', '.join(COMBINERS)}, got {combiner!r}.")
    if vectors.shape[:-1] != bag.segments.shape:
        raise ValueError(
            f"vectors must have shape [{bag.capacity}, features], one for each place of the bags, "
            f"got {vectors.shape}."
        )
    if combiner == "max":
        if bag.weights is not None:
            raise ValueError("weights go with sum, mean and sqrtn, got some with combiner 'max'.")
        return _greatest(vectors, bag)
    dtype, wide = vectors.dtype, wide_dtype(vectors.dtype)
    weights = None if bag.weights is None else jnp.asarray(bag.weights).astype(wide)
    vectors = vectors.astype(wide)
    if weights is not None:
        # What stands in places of no bag may be NaN, which would reach their weights' gradients.
        vectors = jnp.where(bag.in_bag[:, None], vectors, 0) * weights[:, None]
    return divided(_sums(vectors, bag), bag, combiner).astype(dtype)


def divided(sums: jax.Array, bag: Bag, combiner: str) -> jax.Array:
    """The sums of bags [num_bags, features], weighted, by what "mean" and "sqrtn" divide."""
    if combiner == "sum":
        return sums
    by = _divisors(bag, combiner, sums.dtype)
    return jnp.where(by[:, None] != 0, sums / jnp.where(by == 0, 1, by)[:, None], 0)


def _divisors(bag: Bag, combiner: str, dtype: Any) -> jax.Array:
    """What the sums of bags are divided by, [num_bags], for "mean" and "sqrtn"."""
    if bag.weights is None:
        sums = bag.counts().astype(dtype)
    else:
        weights = jnp.asarray(bag.weights).astype(dtype)
        sums = _sums(weights if combiner == "mean" else weights**2, bag)
    if combiner == "mean":
        return sums
    # The root has no derivative at zero, and is not used there.
    return jnp.where(sums > 0, jnp.sqrt(jnp.where(sums > 0, sums, 1)), 0)


def _sums(values: jax.Array, bag: Bag) -> jax.Array:
    """The sums [num_bags, ...] of values [n, ...]."""
    if bag.length is None:
        zeros = jnp.zeros((bag.num_bags, *values.shape[1:]), values.dtype)
        return zeros.at[bag.ends()].add(values, mode="drop")
    # Nothing is scattered, and bags that are split over devices stay where they are.
    values = jnp.where(across(jnp.asarray(bag.in_bag), values), values, 0)
    return values.reshape(bag.num_bags, bag.length, *values.shape[1:]).sum(axis=1)


def _greatest(vectors: jax.Array, bag: Bag) -> jax.Array:
    """The greatest of each entry; of equal ones the first has the gradient."""
    n, fixed = vectors.shape[0], jax.lax.stop_gradient(vectors)
    if n == 0 or bag.num_bags == 0:
        return jnp.zeros((bag.num_bags, *vectors.shape[1:]), vectors.dtype)
    segments = bag.ends()
    lowest = jnp.full((bag.num_bags, vectors.shape[1]), -jnp.inf, vectors.dtype)
    best = lowest.at[segments].max(fixed, mode="drop")
    # NaN equals nothing: the first NaN of a bag stands for it.
    is_best = (fixed == best.at[segments].get(mode="clip")) | jnp.isnan(fixed)
    positions = jnp.where(is_best, jnp.arange(n, dtype=jnp.int32)[:, None], n)
    first = jnp.full(best.shape, n, jnp.int32).at[segments].min(positions, mode="drop")
    found = jnp.take_along_axis(vectors, jnp.minimum(first, n - 1), axis=0)
    return jnp.where(first < n, found, 0)
