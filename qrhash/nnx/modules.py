"""The modules: hold the arrays of features and call the pure"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qrhash import collection
from qrhash.bags import Bag
from qrhash.config import EmbedConfig, check_config
from qrhash.logits import all_vectors, attend
from qrhash.nnx.variables import Table, annotated, array_of, as_table, table_variable
from qrhash.operations import Projection, as_projection
from qrhash.stacks import CollectionConfig, as_collection_config, as_stacks, unstack
from qrhash.tables import as_tables, check_dtype, init, init_projection
from qrhash.types import Array
from qrhash.vectors import lookup


class MultiHashEmbed(nnx.Module):
    """A vector for every id from a few small tables; stands where `flax.nnx.Embed` does.

    The tables, attributes `table_0`, `table_1`, ..., are of type `Table`; for operation "project",
    `kernel` and `bias` are ordinary parameters. Given `config.logical_axes`, they carry axis names
    (small tables are not split by rows), which `nnx.get_named_sharding` maps to a mesh under
    `nnx.logical_axis_rules`; large tables with a `config.layout` come out where that says.

    Args:
      config: the feature's `EmbedConfig`.
      rngs: random number generators; the stream "params" initialises the parameters.

    >>> from qrhash import EmbedConfig, QuotientRemainder
    >>> embed = MultiHashEmbed(EmbedConfig(QuotientRemainder(1000, 4), 8), rngs=nnx.Rngs(0))
    >>> embed(jax.numpy.array([[1, 2, 3]])).shape
    (1, 3, 8)
    """

    def __init__(self, config: EmbedConfig, *, rngs: nnx.Rngs) -> None:
        check_config(config)
        self.config = config
        key = rngs.params()
        for j, table in enumerate(init(key, config)):
            setattr(
                self,
                self._table_names[j],
                table_variable(table, config.table_axes(j), is_large=config.large_tables[j]),
            )
        projection = init_projection(key, config)
        for field in config.projection_fields:
            axes = getattr(config.projection_axes, field)
            setattr(self, field, annotated(nnx.Param, getattr(projection, field), axes))

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
    def tables(self) -> tuple[Any, ...]:
        """The tables, [rows_j, width_j] each; on a mesh, large ones are `ShardedTable`s."""
        return tuple(as_table(getattr(self, name)) for name in self._table_names)

    @property
    def _table_names(self) -> tuple[str, ...]:
        return tuple(f"table_{j}" for j in range(self.config.num_tables))

    @property
    def projection(self) -> Projection | None:
        """The dense parameters of operation "project"; None for the others."""
        fields = self.config.projection_fields
        return Projection(*(getattr(self, field)[...] for field in fields)) if fields else None

    @property
    def embedding(self) -> jax.Array:
        """The vectors of all ids, [num_embeddings, features], computed anew."""
        return all_vectors(self.tables, self.config, self.projection)

    def set_tables(self, tables: Sequence[Array], projection: Any = None) -> None:
        """Takes over tables [rows_j, width_j], for instance pre-trained ones.

        Args:
          tables: as in `qrhash.as_tables`.
          projection: for "project" its `Projection`, or None: it stays as it is.

        Raises:
          ValueError: as `qrhash.as_tables`; or a projection of another shape.
        """
        made = as_tables(tables, self.config)
        if projection is not None:
            self.config.check_projection(projection)
            given = as_projection(projection)
            for field in self.config.projection_fields:
                check_dtype(field, getattr(given, field), self.param_dtype)
                getattr(self, field).set_value(jnp.asarray(getattr(given, field)))
        for name, table in zip(self._table_names, made, strict=True):
            getattr(self, name).set_value(array_of(table))

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


class EmbedCollection(nnx.Module):
    """Vectors for the ids of many features, from few stacked tables.

    The stacks are attributes of type `Table` named as in `config.stacks`. For operation "project"
    a feature's `<name>_kernel` and `<name>_bias` are ordinary parameters.

    Args:
      config: the `CollectionConfig`, or a mapping to make one of.
      rngs: random number generators; the stream "params" initialises the parameters.

    >>> from qrhash import EmbedConfig, FullTable, QuotientRemainder
    >>> item = EmbedConfig(QuotientRemainder(1_000_000, 4), 8)
    >>> day = EmbedConfig(FullTable(7), 8)
    >>> embed = EmbedCollection({"item": item, "day": day}, rngs=nnx.Rngs(0))
    >>> vectors = embed({"item": jax.numpy.array([1, 999_999]), "day": jax.numpy.array([0, 6])})
    >>> vectors["item"].shape, vectors["day"].shape
    ((2, 8), (2, 8))
    """

    def __init__(self, config: CollectionConfig | Mapping[str, Any], *, rngs: nnx.Rngs) -> None:
        self.config = as_collection_config(config)
        key = rngs.params()
        stacks = collection.init(key, self.config)
        for stack in self.config.stacks:
            table = table_variable(stacks.pop(stack.name), stack.axes, is_large=stack.is_large)
            setattr(self, stack.name, table)
        configs = self.config.configs
        for name, projection in collection.init_projections(key, self.config).items():
            axes = configs[name].projection_axes
            for field in configs[name].projection_fields:
                param = annotated(nnx.Param, getattr(projection, field), getattr(axes, field))
                setattr(self, f"{name}_{field}", param)

    def __call__(self, inputs: Mapping[str, Array | Bag]) -> dict[str, jax.Array]:
        """Looks up the vectors of ids; see `qrhash.collection.lookup`.

        Args:
          inputs: {feature name: integer ids [*shape], or a `qrhash.Bag`}, of any of the features.

        Returns:
          {feature name: vectors [*shape, features]}.
        """
        return collection.lookup(self.stacks, inputs, self.config, self.projections)

    @property
    def stacks(self) -> dict[str, Any]:
        """The stacked tables, as `qrhash.collection.init` gives them."""
        return {stack.name: as_table(self._stack(stack.name)) for stack in self.config.stacks}

    @property
    def tables(self) -> dict[str, tuple[Array, ...]]:
        """The tables [rows_j, width_j] of each feature that has its own."""
        return unstack(self.stacks, self.config)

    @property
    def projections(self) -> dict[str, Projection]:
        """The projections of the features with operation "project" that have their own."""
        return {
            name: Projection(
                *(getattr(self, f"{name}_{field}")[...] for field in config.projection_fields)
            )
            for name, config in self.config.own_configs.items()
            if config.projection_fields
        }

    def set_tables(self, tables: Mapping[str, tuple[Array, ...]]) -> None:
        """Takes over the tables of each feature, as `tables` gives them.

        Raises:
          ValueError: a feature is missing or unknown, or a table has another shape or dtype.
        """
        for name, table in as_stacks(tables, self.config).items():
            self._stack(name).set_value(array_of(table))

    def _stack(self, name: str) -> Table:
        return getattr(self, name)
