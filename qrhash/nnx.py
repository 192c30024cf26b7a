"""The Flax NNX module: holds the arrays of a feature and calls the pure core.

The parameters are named as in `qrhash.linen`, whose docstring shows how either module takes
over the other's.
"""

from typing import Any

import chex
import jax
from flax import nnx

from qrhash import tables as core
from qrhash.combine import Projection
from qrhash.config import EmbedConfig


class Table(nnx.Param):
    """A table: an `nnx.Param` of a type of its own, so that a filter can tell tables apart."""


class MultiHashEmbed(nnx.Module):
    """A vector for every id from a few small tables; stands where `flax.nnx.Embed` does.

    The tables, attributes `table_0`, `table_1`, ..., are of type `Table` and carry logical axis
    names (`config.logical_axes`; small tables are not split by rows), which
    `nnx.get_named_sharding` maps to a mesh under `nnx.logical_axis_rules`. For operation
    "project", `kernel` and `bias` are ordinary parameters.

    Args:
      config: the feature's `EmbedConfig`.
      rngs: random number generators; the stream "params" initialises the parameters.

    >>> from qrhash import EmbedConfig, QuotientRemainder
    >>> embed = MultiHashEmbed(EmbedConfig(QuotientRemainder(1000, 4), 8), rngs=nnx.Rngs(0))
    >>> embed(jax.numpy.array([[1, 2, 3]])).shape
    (1, 3, 8)
    """

    def __init__(self, config: EmbedConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        key = rngs.params()
        for j, table in enumerate(core.init(key, config)):
            setattr(self, self._table_names[j], _annotated(Table, table, config.table_axes(j)))
        projection = core.init_projection(key, config)
        if projection is not None:
            kernel_axes, bias_axes = config.projection_axes
            self.kernel = _annotated(nnx.Param, projection.kernel, kernel_axes)
            if projection.bias is not None:
                self.bias = _annotated(nnx.Param, projection.bias, bias_axes)

    @property
    def num_embeddings(self) -> int:
        """Size of the vocabulary."""
        return self.config.num_embeddings

    @property
    def features(self) -> int:
        """Width of the vectors."""
        return self.config.features

    @property
    def dtype(self) -> jax.numpy.dtype:
        """Dtype of the maths and the vectors."""
        return self.config.vector_dtype

    @property
    def param_dtype(self) -> jax.numpy.dtype:
        """Dtype of the parameters."""
        return self.config.param_dtype

    @property
    def tables(self) -> tuple[jax.Array, ...]:
        """The tables' arrays, [rows_j, width_j] each."""
        return tuple(getattr(self, name)[...] for name in self._table_names)

    @property
    def _table_names(self) -> tuple[str, ...]:
        return tuple(f"table_{j}" for j in range(self.config.num_tables))

    @property
    def projection(self) -> Projection | None:
        """The dense parameters of operation "project"; None for the others."""
        if self.config.operation != "project":
            return None
        return Projection(self.kernel[...], self.bias[...] if self.config.use_bias else None)

    def __call__(self, inputs: chex.Array) -> jax.Array:
        """Looks up the vectors of ids; see `qrhash.lookup`.

        Args:
          inputs: integer ids [*shape].

        Returns:
          Vectors [*shape, features].
        """
        return core.lookup(self.tables, inputs, self.config, self.projection)

    def attend(self, query: chex.Array) -> jax.Array:
        """Inner products of queries with the vectors of all ids; see `qrhash.attend`.

        Args:
          query: [*shape, features].

        Returns:
          Logits [*shape, num_embeddings].
        """
        return core.attend(self.tables, query, self.config, self.projection)


def _annotated(variable: type[nnx.Param], value: chex.Array, axes: Any) -> nnx.Param:
    # Logical names need no mesh until they are mapped to one: hence not placed here and now.
    return variable(value, out_sharding=axes, eager_sharding=False)
