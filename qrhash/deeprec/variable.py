"""`MultiHashVariable`, and the look-up in it."""

import functools
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qrhash.bags import Bag
from qrhash.config import EmbedConfig
from qrhash.nnx import MultiHashEmbed
from qrhash.types import Array

MOST_OF_32_BITS = 2**31  # ids from 0 on that an int32 can hold


class FrozenTable(nnx.Variable):
    """A table made with `trainable=False`: not an `nnx.Param`, so no optimizer sees it."""


class MultiHashVariable(MultiHashEmbed):
    """What `get_multihash_variable` returns: a `qrhash.nnx.MultiHashEmbed` with a name.

    Attributes:
      name: the variable's name.
      config: its `EmbedConfig`.
      regularizer: function of a table, summed by `regularization_loss`; or None.
      constraint: function from a table to the table it may be, used by `apply_constraint`; or
        None.
    """

    def __init__(
        self,
        name: str,
        config: EmbedConfig,
        *,
        regularizer: Callable[[jax.Array], jax.Array] | None = None,
        constraint: Callable[[jax.Array], jax.Array] | None = None,
        trainable: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, rngs=rngs)
        self.name = name
        self.regularizer = regularizer
        self.constraint = constraint
        if not trainable:
            for variable in self._table_names:
                table = getattr(self, variable)
                setattr(self, variable, FrozenTable(table.get_value(), **table.get_metadata()))

    def __call__(self, inputs: Array | Bag, *options: Any, **named: Any) -> jax.Array:
        """Looks up the vectors of ids; see `qrhash.nnx.MultiHashEmbed`.

        Raises:
          ValueError: JAX ids of 32 bits for a vocabulary that needs more; or as there.
        """
        n = self.config.num_embeddings
        if isinstance(inputs, jax.Array) and inputs.dtype.itemsize <= 4 and n > MOST_OF_32_BITS:
            raise ValueError(
                f"ids are {inputs.dtype} JAX integers, but num_embeddings={n} needs 64 bits: give "
                f"get_multihash_variable num_embeddings={MOST_OF_32_BITS} or less, and dims to "
                "match, pass NumPy ids, or set jax_enable_x64."
            )
        return super().__call__(inputs, *options, **named)

    def regularization_loss(self) -> jax.Array:
        """The regularizer summed over the tables, a scalar to add to the loss; 0 without one."""
        if self.regularizer is None:
            return jnp.zeros(())
        return functools.reduce(operator.add, map(self.regularizer, self.tables))

    def apply_constraint(self) -> None:
        """Replaces each table by its constraint's value; call it after the optimizer's update."""
        if self.constraint is None:
            return
        for variable in self._table_names:
            table = getattr(self, variable)
            table[...] = checked_shape("constraint", self.constraint(table[...]), table.shape)


def embedding_lookup(
    params: MultiHashVariable, ids: Array, max_norm: float | None = None
) -> jax.Array:
    """Looks up the vectors of ids, of any rank.

    Args:
      params: a multi-hash variable.
      ids: integers [*shape].
      max_norm: vectors with a larger Euclidean norm are scaled down to it; None or infinite: none.

    Returns:
      Vectors [*shape, features].

    Raises:
      ValueError: `params` is no multi-hash variable, `max_norm` is no positive number, JAX ids
        have too few bits for the vocabulary, or an id breaks the variable's policy.
    """
    if not isinstance(params, MultiHashVariable):
        raise ValueError(
            f"params must be what get_multihash_variable returns, got {type(params).__name__}."
        )
    limit = math.inf if max_norm is None else _positive("max_norm", max_norm)
    vectors = params(ids)
    return vectors if limit == math.inf else _scaled_down(vectors, limit)


def _positive(name: str, value: Any) -> float:
    """A number above zero, infinity included, as a Python float."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
    if not is_number and isinstance(value, (np.ndarray, jax.Array)) and value.ndim == 0:
        is_number = not isinstance(value, jax.core.Tracer) and value.dtype.kind in "iuf"
    if not is_number or not float(value) > 0:
        raise ValueError(f"{name} must be a positive number or None, got {value!r}.")
    return float(value)


def _scaled_down(vectors: jax.Array, max_norm: float) -> jax.Array:
    """Vectors [*shape, features], of a norm of at most `max_norm`."""
    wide = vectors.astype(jnp.float32) if vectors.dtype.itemsize < 4 else vectors
    limit = min(max_norm, float(jnp.finfo(wide.dtype).max))
    # In units of the largest entry no square leaves the range of floats.
    fixed = jax.lax.stop_gradient(wide)
    unit = jnp.max(jnp.abs(fixed), axis=-1, keepdims=True)
    unit = jnp.where(unit > 0, unit, 1)
    squared = jnp.sum((fixed / unit) ** 2, axis=-1, keepdims=True)
    is_longer = squared > (limit / unit) ** 2
    # Other vectors are left alone: the gradient of a norm of zero is infinite.
    part = wide / jnp.where(is_longer, unit, 1)
    squared = jnp.where(is_longer, jnp.sum(part**2, axis=-1, keepdims=True), 1)
    scaled = part * jax.lax.rsqrt(squared) * jnp.where(is_longer, limit, 1)
    return jnp.where(is_longer, scaled, wide).astype(vectors.dtype)


def checked_shape(name: str, array: Any, shape: tuple[int, ...]) -> Any:
    """The array; raises a ValueError unless it is of this shape."""
    if jnp.shape(array) != tuple(shape):
        raise ValueError(
            f"{name} must return a table of shape {tuple(shape)}, got {jnp.shape(array)}."
        )
    return array
