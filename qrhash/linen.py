"""The Flax linen module: holds the arrays of a feature and calls the pure core.

The parameters are named as in `qrhash.nnx`, `table_0`, `table_1`, ... and, for operation
"project", `kernel` and `bias`, so that either module's parameters fit the other's:

    nnx.update(nnx_module, nn.unbox(variables)["params"])                  # linen -> nnx
    variables = {"params": nnx.to_pure_dict(nnx.state(nnx_module))}        # nnx -> linen
"""

from typing import Any

import chex
import jax
from flax import linen as nn

from qrhash import tables as core
from qrhash.combine import Projection
from qrhash.config import EmbedConfig


class MultiHashEmbed(nn.Module):
    """A vector for every id from a few small tables; stands where `flax.linen.Embed` does.

    The tables carry logical axis names (`config.logical_axes`; small tables are not split by
    rows), which `nn.get_partition_spec` reads and `nn.logical_to_mesh_sharding` maps to a mesh.

    Attributes:
      config: the feature's `EmbedConfig`.

    >>> from qrhash import EmbedConfig, QuotientRemainder
    >>> embed = MultiHashEmbed(EmbedConfig(QuotientRemainder(1000, 4), features=8))
    >>> vectors, variables = embed.init_with_output(jax.random.key(0), jax.numpy.array([1, 2]))
    >>> vectors.shape, sorted(variables["params"])
    ((2, 8), ['table_0', 'table_1'])
    """

    config: EmbedConfig

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

    def setup(self) -> None:
        """Declares the tables and, for "project", the dense parameters."""
        config = self.config
        self.tables = tuple(
            self.param(
                f"table_{j}",
                nn.with_logical_partitioning(core.init_table, config.table_axes(j)),
                config,
                j,
            )
            for j in range(config.num_tables)
        )
        self.projection = None
        if config.operation == "project":
            names = Projection._fields if config.use_bias else ("kernel",)
            self.projection = Projection(*map(self._projection_param, names))

    def _projection_param(self, name: str) -> Any:
        def init(key: chex.PRNGKey) -> chex.Array:
            return getattr(core.init_projection(key, self.config), name)

        axes = getattr(self.config.projection_axes, name)
        return self.param(name, nn.with_logical_partitioning(init, axes))

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
