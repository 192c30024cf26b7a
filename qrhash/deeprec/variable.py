"""`MultiHashVariable` and `EmbeddingVariable`, and the look-up in either."""

import functools
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qrhash.bags import Bag
from qrhash.config import EmbedConfig
from qrhash.dynamic import DynamicConfig, Found
from qrhash.keys import Keys
from qrhash.nnx import DynamicEmbed, MultiHashEmbed
from qrhash.types import Array, Scalar

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


class EmbeddingVariable(DynamicEmbed):
    """What `get_embedding_variable` returns: a `qrhash.nnx.DynamicEmbed` with a name.

    In a step of the training, `assign` counts keys and gives them rows, before the look-up;
    DeepRec does it within. `evict` takes rows back; DeepRec does it when it saves a checkpoint.

    Attributes:
      name: the variable's name.
      config: its `qrhash.dynamic.DynamicConfig`.
    """

    def __init__(
        self,
        name: str,
        config: DynamicConfig,
        *,
        trainable: bool = True,
        has_state: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, has_state=has_state, rngs=rngs)
        self.name = name
        if not trainable:
            for attribute, variable in list(vars(self).items()):
                if isinstance(variable, nnx.Param):
                    frozen = FrozenTable(variable.get_value(), **variable.get_metadata())
                    setattr(self, attribute, frozen)


class DynamicDimensionEmbeddingVariable(nnx.Module):
    """What `get_dynamic_dimension_embedding_variable` returns: blocks of the width, by key.

    A key with the block number b has rows in the first b blocks, and zeros in the others.

    Attributes:
      name: the variable's name.
      blocks: an `EmbeddingVariable` for each block.
    """

    def __init__(self, name: str, blocks: Sequence[EmbeddingVariable]) -> None:
        self.name = name
        self.blocks = nnx.List(blocks)

    def assign(self, ids: Any, blocknums: Array, step: Scalar) -> tuple[Found, ...]:
        """The rows of keys in a step of the training, of each block; see `DynamicEmbed.assign`.

        Args:
          ids: keys [*shape].
          blocknums: how many blocks each has, integers [*shape]; 0: none, a vector of zeros.
          step: the number of the step, from 0 on.

        Returns:
          For each block what its `assign` gives; `Optimizer.reset_rows` takes block and rows.
        """
        ids = Keys.of(ids)
        return tuple(
            block.assign(ids, step, where=jnp.asarray(blocknums) > number)
            for number, block in enumerate(self.blocks)
        )

    def find(self, ids: Any, blocknums: Array) -> tuple[Found, ...]:
        """The same outside of the training: nothing is counted, and no key gets a row."""
        ids = Keys.of(ids)
        return tuple(
            block.find(ids, where=jnp.asarray(blocknums) > number)
            for number, block in enumerate(self.blocks)
        )

    def evict(self, step: Scalar) -> jax.Array:
        """Takes rows back in each block; returns how many, int32 []."""
        return jnp.sum(jnp.stack([block.evict(step) for block in self.blocks]))

    def __call__(self, inputs: Sequence[Found]) -> jax.Array:
        """The vectors of keys [*shape, blocks * width of a block], of what `assign` gives."""
        pairs = zip(self.blocks, inputs, strict=True)
        return jnp.concatenate([block(found) for block, found in pairs], axis=-1)


_VARIABLES = (MultiHashVariable, EmbeddingVariable, DynamicDimensionEmbeddingVariable)


def embedding_lookup(
    params: MultiHashVariable | EmbeddingVariable | DynamicDimensionEmbeddingVariable,
    ids: Any,
    max_norm: float | None = None,
    *,
    blocknums: Array | None = None,
) -> jax.Array:
    """Looks up the vectors of ids, of any rank.

    Args:
      params: a multi-hash variable, or an embedding variable.
      ids: integers [*shape]. For an embedding variable, in the training what its `assign` gives;
        keys themselves are looked up and not counted, as in DeepRec's inference. For one in tiers,
        what its `ahead` or `look` gives, and no others.
      max_norm: vectors with a larger Euclidean norm are scaled down to it; None or infinite: none.
      blocknums: of a variable of dynamic dimension, with keys: how many blocks each of them has.

    Returns:
      Vectors [*shape, features].

    Raises:
      ValueError: `params` is neither variable, `max_norm` is no positive number, JAX ids
        have too few bits for the vocabulary, an id breaks the variable's policy, or keys are given
        for a variable in tiers.
    """
    if not isinstance(params, _VARIABLES):
        raise ValueError(
            "params must be what get_multihash_variable or get_embedding_variable returns, got "
            f"{type(params).__name__}."
        )
    limit = math.inf if max_norm is None else _positive("max_norm", max_norm)
    vectors = params(_found(params, ids, blocknums))
    return vectors if limit == math.inf else _scaled_down(vectors, limit)


def _found(params: Any, ids: Any, blocknums: Array | None) -> Any:
    """What a variable takes: ids as they are, and keys with their rows."""
    by_block = isinstance(params, DynamicDimensionEmbeddingVariable)
    all_found = isinstance(ids, Sequence) and all(isinstance(each, Found) for each in ids)
    if (blocknums is not None) != (by_block and not all_found):
        raise ValueError(
            "blocknums must be given for the keys of a variable of dynamic dimension, and for "
            f"nothing else, got {blocknums!r}."
        )
    if blocknums is not None:
        return params.find(ids, blocknums)
    is_missing = isinstance(params, EmbeddingVariable) and not isinstance(ids, Found)
    return params.find(ids) if is_missing else ids


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
