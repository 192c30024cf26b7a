"""The modules: hold the arrays of features and call the pure core."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qrhash import collection, dynamic
from qrhash.bags import Bag
from qrhash.config import EmbedConfig, check_config
from qrhash.dynamic.collections import new_rows_of
from qrhash.dynamic.embedding import State
from qrhash.logits import all_vectors, attend
from qrhash.nnx.variables import KeyState, Table, annotated, array_of, as_table, table_variable
from qrhash.operations import Projection, as_projection
from qrhash.stacks import CollectionConfig, as_collection_config, as_stacks, unstack
from qrhash.tables import as_tables, check_dtype, init, init_projection
from qrhash.types import Array, Scalar
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
    a feature's `<name>_kernel` and `<name>_bias` are ordinary parameters. With dynamic features,
    which have keys in place of ids, `state` is a `KeyState`; of their compressed vectors the
    features are called "<name>:refused".

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
    >>> user = dynamic.DynamicConfig(1000, 8)
    >>> embed = EmbedCollection({"user": user, "day": day}, rngs=nnx.Rngs(0))
    >>> found = embed.assign({"user": ["ann", "bob"], "day": jax.numpy.array([0, 6])}, step=0)
    >>> embed(found)["user"].shape, embed.num_keys
    ((2, 8), {'user': Array(2, dtype=int32)})
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
        if self.config.composites:
            self.state = KeyState(dynamic.init_states(self.config))

    @property
    def num_keys(self) -> dict[str, Any]:
        """How many keys have a row, int32 [], by dynamic feature that has its own table."""
        return {name: state.index.num_keys for name, state in self._states.items()}

    @property
    def _states(self) -> dict[str, State]:
        return dict(self.state.get_value()) if self.config.composites else {}

    def assign(
        self, ids: Mapping[str, Any], step: Scalar, *, where: Mapping[str, Array] | None = None
    ) -> dict[str, Any]:
        """The rows of keys in a step of the training, of which the new ones are started.

        `qrhash.dynamic.assign_all` and `start_all`. It belongs before the function that is
        differentiated; `Optimizer.reset_rows` then does the same for the optimizer's state.

        Args:
          ids: {feature name: ids; of a dynamic feature `qrhash.Keys` [*shape], or what `Keys.of`
            takes; or a `qrhash.Bag` of either}, of any of the features.
          step: the number of the step, from 0 on.
          where: {name of a dynamic feature: which of its keys are meant, bool [*shape]}.

        Returns:
          The ids, with the keys of dynamic features with their rows, as the module takes them.
        """
        states, found = dynamic.assign_all(self._states, ids, self.config, step, where=where)
        stacks, _ = dynamic.start_all(self.stacks, found, self.config, self.projections)
        if states:
            self.state.set_value(states)
        for name, table in stacks.items():
            self._stack(name).set_value(array_of(table))
        return found

    def find(
        self, ids: Mapping[str, Any], *, where: Mapping[str, Array] | None = None
    ) -> dict[str, Any]:
        """The rows of keys outside of the training; see `qrhash.dynamic.find_all`.

        Args:
          ids: as in `assign`.
          where: as in `assign`.
        """
        return dynamic.find_all(self._states, ids, self.config, where=where)

    def evict(self, step: Scalar) -> dict[str, jax.Array]:
        """Takes rows back from the keys that the features' evictions name.

        Args:
          step: the number of the step.

        Returns:
          {feature name: how many keys have lost their row, int32 []}.

        Raises:
          ValueError: no feature has an eviction.
        """
        states, counts = dynamic.evict_all(self._states, self.stacks, self.config, step)
        self.state.set_value(states)
        return counts

    def new_rows(self, found: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Name of a stack -> rows that keys have just got, as `assign` gave them."""
        return new_rows_of(found, self.config)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Looks up the vectors of ids; see `qrhash.collection.lookup`.

        Args:
          inputs: {feature name: integer ids [*shape], or a `qrhash.Bag`}, of any of the features;
            with dynamic ones as `assign` or `find` gives it.

        Returns:
          {feature name: vectors [*shape, features]}.
        """
        return collection.lookup(self.stacks, inputs, self.config, self.projections)

    def joined(self, inputs: Mapping[str, Any] | Array) -> jax.Array:
        """The vectors of ids side by side: see `qrhash.collection.lookup_joined`."""
        return collection.lookup_joined(self.stacks, inputs, self.config, self.projections)

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
