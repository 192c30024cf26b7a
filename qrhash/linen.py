"""The Flax linen modules: hold the arrays of features and call the pure core.

The parameters are named as in `qrhash.nnx`, `table_0`, `table_1`, ... and, for operation
"project", `kernel` and `bias`, so that either module's parameters fit the other's:

    nnx.update(nnx_module, nn.unbox(variables)["params"])                  # linen -> nnx
    variables = {"params": nnx.to_pure_dict(nnx.state(nnx_module))}        # nnx -> linen

For training whose cost goes by the batch and not by the tables, `large_tables` finds them:

    variables = model.init(key, ids)
    by_rows = qrhash.linen.large_tables(variables["params"])
    loss, grads = qrhash.value_and_grad(loss_fn, by_rows)(nn.unbox(variables["params"]), batch)
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax
from flax import linen as nn
from flax import struct

from qrhash import collection
from qrhash import tables as core
from qrhash.collection import CollectionConfig
from qrhash.combine import Projection
from qrhash.config import EmbedConfig


class Table(nn.LogicallyPartitioned):
    """A table as `init` returns it: with its logical axis names, until `nn.unbox` takes it out.

    Attributes:
      is_large: whether it is trained by rows.
    """

    is_large: bool = struct.field(default=False, pytree_node=False)


def large_tables(variables: Any) -> Any:
    """Finds the tables that are trained by rows: `by_rows` of `qrhash.value_and_grad`.

    Args:
      variables: variables or parameters as `model.init` returns them, not yet unboxed; also from
        `jax.eval_shape`.

    Returns:
      A tree of bools, of the structure that `nn.unbox` gives.

    Raises:
      ValueError: there is no table of qrhash in them.
    """
    is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)  # noqa: E731
    if not any(isinstance(leaf, Table) for leaf in jax.tree.leaves(variables, is_leaf=is_box)):
        raise ValueError(
            "variables hold no table of qrhash: pass them as model.init returns them, before "
            "nn.unbox, unless the model has none."
        )
    return jax.tree.map(
        lambda leaf: isinstance(leaf, Table) and leaf.is_large, variables, is_leaf=is_box
    )


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

        def table(key: chex.PRNGKey, j: int) -> Table:
            value = core.init_table(key, config, j)
            return Table(value, config.table_axes(j), is_large=config.large_tables[j])

        self.tables = tuple(self.param(f"table_{j}", table, j) for j in range(config.num_tables))
        self.projection = _projection(self, config)

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


class EmbedCollection(nn.Module):
    """Vectors for the ids of many features, from few stacked tables.

    The parameters are named as in `qrhash.nnx.EmbedCollection`: the stacks as in `config.stacks`,
    and `<feature>_kernel` and `<feature>_bias` for operation "project".

    Attributes:
      config: the `CollectionConfig`, or a mapping to make one of.

    >>> from qrhash import EmbedConfig, FullTable, QuotientRemainder
    >>> item = EmbedConfig(QuotientRemainder(1_000_000, 4), 8)
    >>> embed = EmbedCollection(CollectionConfig({"item": item, "last_item": "item"}))
    >>> ids = {"item": jax.numpy.array([1, 2]), "last_item": jax.numpy.array([3, 999_999])}
    >>> vectors, variables = embed.init_with_output(jax.random.key(0), ids)
    >>> vectors["last_item"].shape, sorted(variables["params"])
    ((2, 8), ['large_8_float32', 'small_8_float32'])
    """

    config: CollectionConfig | Mapping[str, EmbedConfig | str]

    def setup(self) -> None:
        """Declares the stacks and, for "project", the dense parameters."""
        given = self.config
        config = given if isinstance(given, CollectionConfig) else CollectionConfig(given)

        def table(key: chex.PRNGKey, stack: collection.Stack) -> Table:
            value = collection.init_stack(key, config, stack)
            return Table(value, stack.axes, is_large=stack.is_large)

        self.collection = config
        self.stacks = {stack.name: self.param(stack.name, table, stack) for stack in config.stacks}
        made = {name: _projection(self, owned, f"{name}_") for name, owned in config.owned.items()}
        self.projections = {name: each for name, each in made.items() if each is not None}

    def __call__(self, inputs: Mapping[str, chex.Array]) -> dict[str, jax.Array]:
        """Looks up the vectors of ids; see `qrhash.collection.lookup`.

        Args:
          inputs: {feature name: integer ids [*shape]}, of any of the features.

        Returns:
          {feature name: vectors [*shape, features]}.
        """
        return collection.lookup(self.stacks, inputs, self.collection, self.projections)


def _projection(module: nn.Module, config: EmbedConfig, prefix: str = "") -> Projection | None:
    """Declares the dense parameters of "project", if that is the operation."""

    def init(key: chex.PRNGKey, field: str) -> nn.LogicallyPartitioned:
        value = getattr(core.init_projection(key, config), field)
        return nn.LogicallyPartitioned(value, getattr(config.projection_axes, field))

    fields = config.projection_fields
    params = (module.param(prefix + field, init, field) for field in fields)
    return Projection(*params) if fields else None
