"""The modules: hold the arrays of features and call the pure core."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from qrhash import collection
from qrhash.bags import Bag
from qrhash.config import EmbedConfig, check_config
from qrhash.linen.variables import boxed
from qrhash.logits import all_vectors, attend
from qrhash.operations import Projection, as_projection
from qrhash.spans import Stack
from qrhash.stacks import CollectionConfig, as_collection_config, as_stacks
from qrhash.tables import as_tables, init_projection, init_table
from qrhash.types import Array, Key
from qrhash.vectors import lookup


def params_from_tables(
    tables: Any, config: EmbedConfig | CollectionConfig, projections: Any = None
) -> dict[str, Any]:
    """The parameters of a module made of given arrays, such as pre-trained tables.

    Args:
      tables: for an `EmbedConfig` as in `qrhash.as_tables`; for a `CollectionConfig` {feature name:
        such tables}, of all features that have their own.
      config: the module's config.
      projections: for "project" the `Projection`; of a collection {feature name: Projection}.

    Returns:
      {name: array}, as in `nn.unbox(model.init(...))["params"]`.

    Raises:
      ValueError: as `qrhash.as_tables`; or a projection is missing, or has another shape.

    >>> from qrhash import FullTable
    >>> config = EmbedConfig(FullTable(10), features=2)
    >>> params = params_from_tables([jax.numpy.ones((10, 2))], config)
    >>> MultiHashEmbed(config).apply({"params": params}, jax.numpy.array([9])).tolist()
    [[1.0, 1.0]]
    """
    if isinstance(config, EmbedConfig):
        config.check_projection(projections)
        made = {f"table_{j}": each for j, each in enumerate(as_tables(tables, config))}
        return made | _named(projections, config)
    config = as_collection_config(config)
    made = dict(as_stacks(tables, config))
    for name, owned in config.own_configs.items():
        projection = (projections or {}).get(name)
        owned.check_projection(projection)
        made |= _named(projection, owned, f"{name}_")
    return made


def _named(projection: Any, config: EmbedConfig, prefix: str = "") -> dict[str, Any]:
    fields = config.projection_fields
    return {prefix + field: getattr(as_projection(projection), field) for field in fields}


class MultiHashEmbed(nn.Module):
    """A vector for every id from a few small tables; stands where `flax.linen.Embed` does.

    Its parameters are plain arrays, as those of `nn.Embed`, but for a box around large tables, by
    which `large_tables` finds them. Given `config.logical_axes`, all carry axis names (small tables
    are not split by rows), which `nn.get_partition_spec` reads and `nn.logical_to_mesh_sharding`
    maps to a mesh; large tables with a `config.layout` come out of both where that says.

    Attributes:
      config: the feature's `EmbedConfig`.

    >>> from qrhash import EmbedConfig, QuotientRemainder
    >>> embed = MultiHashEmbed(EmbedConfig(QuotientRemainder(1000, 4), features=8))
    >>> vectors, variables = embed.init_with_output(jax.random.key(0), jax.numpy.array([1, 2]))
    >>> vectors.shape, sorted(variables["params"])
    ((2, 8), ['table_0', 'table_1'])
    """

    config: EmbedConfig

    def __post_init__(self) -> None:
        check_config(self.config)
        super().__post_init__()

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

        def table(key: Key, j: int) -> Any:
            value = init_table(key, config, j)
            return boxed(value, config.table_axes(j), is_large=config.large_tables[j])

        self.tables = tuple(self.param(f"table_{j}", table, j) for j in range(config.num_tables))
        self.projection = projection_params(self, config)

    @property
    def embedding(self) -> jax.Array:
        """The vectors of all ids, [num_embeddings, features], computed anew; of a bound module."""
        if self.scope is None:
            raise ValueError(
                "embedding is of a bound module: module.bind(variables).embedding, or inside apply."
            )
        return all_vectors(self.tables, self.config, self.projection)

    def __call__(self, inputs: Array | Bag, out_sharding: Any = None) -> jax.Array:
        """Looks up the vectors of ids; see `qrhash.lookup`.

        Args:
          inputs: integer ids [*shape], or a `qrhash.Bag`.
          out_sharding: where the vectors are to be, on a mesh.

        Returns:
          Vectors [*shape, features].
        """
        return lookup(self.tables, inputs, self.config, self.projection, out_sharding=out_sharding)

    def attend(self, query: Array, out_sharding: Any = None) -> jax.Array:
        """Inner products of queries with the vectors of all ids; see `qrhash.attend`.

        Args:
          query: [*shape, features].
          out_sharding: where the logits are to be, on a mesh.

        Returns:
          Logits [*shape, num_embeddings].
        """
        return attend(self.tables, query, self.config, self.projection, out_sharding=out_sharding)


class EmbedCollection(nn.Module):
    """Vectors for the ids of many features, from few stacked tables.

    The parameters are named as in `qrhash.nnx.EmbedCollection`: the stacks as in `config.stacks`,
    and `<feature>_kernel` and `<feature>_bias` for operation "project". Which keys of dynamic
    features have which rows is not of the module, see `qrhash.linen.DynamicEmbed`.

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

    config: CollectionConfig | Mapping[str, Any]

    def __post_init__(self) -> None:
        # A module is hashed by its attributes, and a mapping has no hash.
        object.__setattr__(self, "config", as_collection_config(self.config))
        super().__post_init__()

    def setup(self) -> None:
        """Declares the stacks and, for "project", the dense parameters."""
        config = as_collection_config(self.config)

        def table(key: Key, stack: Stack) -> Any:
            value = collection.init_stack(key, config, stack)
            return boxed(value, stack.axes, is_large=stack.is_large)

        self.collection = config
        self.stacks = {stack.name: self.param(stack.name, table, stack) for stack in config.stacks}
        made = {
            name: projection_params(self, owned, f"{name}_")
            for name, owned in config.own_configs.items()
        }
        self.projections = {name: each for name, each in made.items() if each is not None}

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Looks up the vectors of ids; see `qrhash.collection.lookup`.

        Args:
          inputs: {feature name: integer ids [*shape], or a `qrhash.Bag`}, of any of the features;
            of dynamic ones as `qrhash.dynamic.assign_all` or `find_all` gives it.

        Returns:
          {feature name: vectors [*shape, features]}.
        """
        return collection.lookup(self.stacks, inputs, self.collection, self.projections)

    def joined(self, inputs: Mapping[str, Any] | Array) -> jax.Array:
        """The vectors of ids side by side: see `qrhash.collection.lookup_joined`."""
        return collection.lookup_joined(self.stacks, inputs, self.collection, self.projections)


def projections_of(params: Mapping[str, Any], config: CollectionConfig) -> dict[str, Projection]:
    """The projections among the parameters of an `EmbedCollection`, unboxed."""
    return {
        name: Projection(*(params[f"{name}_{field}"] for field in owned.projection_fields))
        for name, owned in config.own_configs.items()
        if owned.projection_fields
    }


def projection_params(
    module: nn.Module, config: EmbedConfig, prefix: str = ""
) -> Projection | None:
    """Declares the dense parameters of "project", if that is the operation."""

    def init(key: Key, field: str) -> Any:
        value = getattr(init_projection(key, config), field)
        axes = getattr(config.projection_axes, field)
        return value if axes is None else nn.LogicallyPartitioned(value, axes)

    fields = config.projection_fields
    params = (module.param(prefix + field, init, field) for field in fields)
    return Projection(*params) if fields else None
