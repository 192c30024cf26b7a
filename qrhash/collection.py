"""Collections: many features in few stacked tables.

A model of clicks has dozens of features, each with small tables of its own. One after another
they are dozens of small gathers and updates; put on top of each other, all tables of one width,
dtype and kind (large and trained by rows, or small and dense) are one table, from which all
features of a batch are gathered, differentiated and updated together. Which rows of the stack are
a feature's own is known when the config is built; exports still speak of features and tables.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from qrhash import tables as core
from qrhash.combine import Projection
from qrhash.config import EmbedConfig
from qrhash.rows import INT32_MAX
from qrhash.sharding import ShardedTable, Sharding, whole_table
from qrhash.take import Segment


class Place(NamedTuple):
    """Where a table of a feature stands.

    Attributes:
      feature: name of the feature.
      table: number of the table among the feature's.
      offset: its first row in the stack.
      rows: its number of rows.
    """

    feature: str
    table: int
    offset: int
    rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """A table made of other tables, on top of each other.

    Attributes:
      name: "large_" or "small_", width and dtype, such as "large_16_float32".
      is_large: whether it is trained by rows: what `qrhash.value_and_grad` asks for.
      width: width of its rows.
      dtype: of its entries.
      axes: axis names of its array, see `EmbedConfig.table_axes`.
      places: the tables in it, from the first row on.
      sharding: how the batch is split over a mesh and, if it is large, the stack.
    """

    name: str
    is_large: bool
    width: int
    dtype: np.dtype
    axes: tuple[Any, ...]
    places: tuple[Place, ...]
    sharding: Sharding | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, width]."""
        return (self.places[-1].offset + self.places[-1].rows, self.width)


@dataclasses.dataclass(frozen=True)
class CollectionConfig:
    """The embeddings of many features.

    Attributes:
      features: feature name -> its `EmbedConfig`, or the name of another feature, whose tables and
        projection it then shares. A mapping, kept as a tuple of pairs.

    Raises:
      ValueError: a feature shares with one that is not there, or that itself shares; or tables of
        one stack differ in their logical axes.

    >>> from qrhash.partitions import FullTable, QuotientRemainder
    >>> item = EmbedConfig(QuotientRemainder(1_000_000, 4), 16)
    >>> day = EmbedConfig(FullTable(7), 16)
    >>> config = CollectionConfig({"item": item, "last_item": "item", "day": day})
    >>> config.large_tables  # by_rows of `qrhash.value_and_grad`
    {'large_16_float32': True, 'small_16_float32': False}
    >>> [(stack.name, stack.shape) for stack in config.stacks]
    [('large_16_float32', (250000, 16)), ('small_16_float32', (11, 16))]
    """

    features: Any

    def __post_init__(self) -> None:
        if not isinstance(self.features, (Mapping, tuple)):
            raise ValueError(
                f"features must be a mapping of names to EmbedConfigs, got {self.features!r}."
            )
        pairs = self.features.items() if isinstance(self.features, Mapping) else self.features
        features = dict(pairs)
        for name, value in features.items():
            if not isinstance(name, str):
                raise ValueError(f"features must have names, got {name!r}.")
            shared = features.get(value) if isinstance(value, str) else value
            if not isinstance(shared, EmbedConfig):
                raise ValueError(
                    f"features[{name!r}] must be an EmbedConfig or the name of a feature that has "
                    f"one, got {value!r}."
                )
        object.__setattr__(self, "features", tuple(features.items()))
        object.__setattr__(self, "_stacks", tuple(_stacks(self.owned)))

    @property
    def owned(self) -> dict[str, EmbedConfig]:
        """Feature name -> config, of the features that have tables of their own."""
        return {name: value for name, value in self.features if isinstance(value, EmbedConfig)}

    @property
    def owners(self) -> dict[str, str]:
        """Feature name -> name of the feature whose tables it uses: its own, or shared."""
        return {name: value if isinstance(value, str) else name for name, value in self.features}

    @property
    def configs(self) -> dict[str, EmbedConfig]:
        """Feature name -> config, of every feature."""
        owned = self.owned
        return {name: owned[owner] for name, owner in self.owners.items()}

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacked tables: one per width, dtype and kind."""
        return self._stacks  # type: ignore[attr-defined]

    @property
    def large_tables(self) -> dict[str, bool]:
        """Stack name -> whether it is trained by rows: `by_rows` of `qrhash.value_and_grad`."""
        return {stack.name: stack.is_large for stack in self.stacks}

    @property
    def num_params(self) -> int:
        """Parameters in all, tables and projections."""
        return sum(config.num_params for config in self.owned.values())


def init(key: chex.PRNGKey, config: CollectionConfig) -> dict[str, Any]:
    """Creates the stacked tables: those that `qrhash.init` gives for each feature, stacked.

    Args:
      key: a JAX random key.
      config: the `CollectionConfig`.

    Returns:
      {stack name: array [rows, width]}; with `sharding`, large ones are `ShardedTable`s.
    """
    return {stack.name: init_stack(key, config, stack) for stack in config.stacks}


def init_stack(key: chex.PRNGKey, config: CollectionConfig, stack: Stack) -> Any:
    """Creates one stack; part by part into its place, so that the parts never exist twice."""
    owned, keys = config.owned, _feature_keys(key, config)

    def part(place: Place) -> core.Part:
        of_feature = owned[place.feature]
        table_keys = jax.random.split(keys[place.feature], of_feature.num_tables)
        initializer = core.table_initializers(of_feature)[place.table]
        return core.Part(table_keys[place.table], initializer, place.offset, place.rows)

    parts = [part(place) for place in stack.places]
    return core.init_parts(parts, stack.shape, stack.dtype, stack.sharding, is_large=stack.is_large)


def init_projections(key: chex.PRNGKey, config: CollectionConfig) -> dict[str, Projection]:
    """Creates the dense parameters of the features with operation "project".

    Args:
      key: a JAX random key; may be the one given to `init`.
      config: the `CollectionConfig`.

    Returns:
      {feature name: Projection}, of the features that have tables of their own.
    """
    keys = _feature_keys(key, config)
    projections = {
        name: core.init_projection(keys[name], owned) for name, owned in config.owned.items()
    }
    return {name: made for name, made in projections.items() if made is not None}


def lookup(
    stacks: Mapping[str, Any],
    ids: Mapping[str, chex.Array],
    config: CollectionConfig,
    projections: Mapping[str, Projection] | None = None,
) -> dict[str, jax.Array]:
    """Looks up the vectors of many features, with one gather for each stack.

    Args:
      stacks: {stack name: array [rows, width]}, as from `init`.
      ids: {feature name: integers [*shape]}, of any of the features, each of any shape.
      config: the `CollectionConfig`.
      projections: as from `init_projections`, where there are any.

    Returns:
      {feature name: vectors [*shape, features]}, equal to those of `qrhash.lookup` on the
      feature's own tables.

    Raises:
      ValueError: ids of a feature that is not in the collection; a stack or projection is missing.
      TypeError: ids that are not a mapping.
      ValueError, TypeError: as `qrhash.lookup`.
      AssertionError: stacks of other shapes than the config's.

    >>> from qrhash.partitions import QuotientRemainder
    >>> config = CollectionConfig({"item": EmbedConfig(QuotientRemainder(1000, 4), 8)})
    >>> stacks = init(jax.random.key(0), config)
    >>> lookup(stacks, {"item": jnp.array([[1, 2, 3]])}, config)["item"].shape
    (1, 3, 8)
    """
    if not isinstance(ids, Mapping):
        raise TypeError(f"ids must be a mapping of feature names to arrays, got {type(ids)}.")
    configs, owners = config.configs, config.owners
    unknown = [name for name in ids if name not in configs]
    if unknown:
        raise ValueError(
            f"ids must be of features of the collection, {', '.join(configs)}, got {unknown[0]!r}."
        )
    missing = [stack.name for stack in config.stacks if stack.name not in stacks]
    missing += [
        f"the projection of {name!r}"
        for name in dict.fromkeys(owners[name] for name in ids)
        if configs[name].projection_fields and name not in (projections or {})
    ]
    if missing:
        raise ValueError(f"stacks and projections must be as from init, {missing[0]} is missing.")
    for stack in config.stacks:
        chex.assert_shape(
            stacks[stack.name], stack.shape, custom_message=f"Stack {stack.name!r} does not fit."
        )
    indices = {name: core.row_numbers(of_name, configs[name]) for name, of_name in ids.items()}
    places = {
        (place.feature, place.table): (stack.name, place)
        for stack in config.stacks
        for place in stack.places
    }
    groups: dict[Any, list[str]] = collections.defaultdict(list)
    for name in ids:
        shape = indices[name][0].shape
        groups[shape, *_group_of(configs[name], owners[name], places)].append(name)
    blocks: dict[str, list[_Block]] = collections.defaultdict(list)
    for names in groups.values():
        for table in range(configs[names[0]].num_tables):
            stack_name, _ = places[owners[names[0]], table]
            reads = [_Read(places[owners[name], table][1], indices[name][table]) for name in names]
            blocks[stack_name].append(_Block(names[0], table, reads))
    rows, found = {}, {}
    for stack in config.stacks:
        for block, *taken in _take(stack, stacks[stack.name], blocks[stack.name]):
            rows[block.name, block.table], found[block.name] = taken

    vectors: dict[str, jax.Array] = {}
    for names in groups.values():
        first = configs[names[0]]
        combined = core.combine_found(
            [rows[names[0], table] for table in range(first.num_tables)],
            found[names[0]],
            first,
            (projections or {}).get(owners[names[0]]),
        )
        # The transpose of a split is one concatenation; that of slices, a padded array for each.
        parts = jax.lax.split(combined, [1] * len(names))
        vectors.update(zip(names, (part[0] for part in parts), strict=True))
    return {name: vectors[name] for name in ids}


def unstack(
    stacks: Mapping[str, Any], config: CollectionConfig
) -> dict[str, tuple[chex.Array, ...]]:
    """The tables of each feature.

    Args:
      stacks: {stack name: array [rows, ...]}: stacked tables, or optimizer state laid out as they
        are.
      config: the `CollectionConfig`.

    Returns:
      {feature name: k arrays [rows_j, ...]}, of the features that have tables of their own.
    """
    whole = {name: whole_table(table) for name, table in stacks.items()}
    parts = {
        (place.feature, place.table): whole[stack.name][place.offset : place.offset + place.rows]
        for stack in config.stacks
        for place in stack.places
    }
    return {
        name: tuple(parts[name, j] for j in range(owned.num_tables))
        for name, owned in config.owned.items()
    }


def stack(tables: Mapping[str, tuple[chex.Array, ...]], config: CollectionConfig) -> dict[str, Any]:
    """The stacks of the features' tables: the inverse of `unstack`.

    Args:
      tables: {feature name: k arrays [rows_j, ...]}, of all features that have tables of their own.
      config: the `CollectionConfig`.

    Returns:
      {stack name: array [rows, ...]}.

    Raises:
      ValueError: a feature is missing or unknown, or a table has another number of rows.
    """
    unknown = [name for name in tables if name not in config.owned]
    if unknown:
        raise ValueError(
            f"tables must be of features that have their own, {', '.join(config.owned)}, got "
            f"{unknown[0]!r}."
        )
    for name, owned in config.owned.items():
        got = tuple(table.shape[0] for table in tables.get(name, ()))
        if got != owned.partition.num_rows:
            raise ValueError(
                f"tables[{name!r}] must have {owned.partition.num_rows} rows, got {got}."
            )
    stacks: dict[str, Any] = {}
    for each in config.stacks:
        table = jnp.concatenate([tables[place.feature][place.table] for place in each.places])
        sharding = each.sharding if each.is_large else None
        stacks[each.name] = table if sharding is None else ShardedTable.from_array(table, sharding)
    return stacks


class _Read(NamedTuple):
    """The look-ups of one feature in one of its tables."""

    place: Place
    row_numbers: chex.Array


class _Block(NamedTuple):
    """The same of all features of a group, next to each other; named after the first one."""

    name: str
    table: int
    reads: list[_Read]


def _group_of(
    config: EmbedConfig, owner: str, places: Mapping[tuple[str, int], tuple[str, Place]]
) -> tuple[Any, ...]:
    """What features must have in common, besides their ids' shape, to be combined in one go."""
    return (
        tuple(places[owner, table][0] for table in range(config.num_tables)),
        config.operation,
        config.vector_dtype,
        config.id_policy == "zero",
        owner if config.operation == "project" else None,
    )


def _take(
    stack: Stack, table: Any, blocks: Sequence[_Block]
) -> Iterator[tuple[_Block, jax.Array, jax.Array]]:
    """One gather for all reads of a stack.

    Yields, for each block of n reads of ids [*shape], its rows [n, *shape, width] and whether they
    were found [n, *shape].
    """
    if not blocks:
        return
    num_rows = stack.shape[0]
    dtype = jnp.int32 if num_rows <= INT32_MAX else jnp.int64

    def in_stack(read: _Read) -> jax.Array:
        index = core.device_index(read.row_numbers, read.place.rows).astype(dtype)
        has_row = (index >= 0) & (index < read.place.rows)
        return jnp.where(has_row, index + read.place.offset, num_rows)

    segments = tuple(
        Segment(read.place.offset, read.place.rows, math.prod(read.row_numbers.shape))
        for block in blocks
        for read in block.reads
    )
    indices = [jnp.stack([in_stack(read) for read in block.reads]) for block in blocks]
    rows = core.take_segments(table, indices, segments, batch_axis=1, sharding=stack.sharding)
    yield from zip(blocks, rows, (index < num_rows for index in indices), strict=True)


def _stacks(owned: Mapping[str, EmbedConfig]) -> Iterator[Stack]:
    groups: dict[str, list[tuple[str, int]]] = {}
    sizes: collections.Counter[str] = collections.Counter()
    for name, config in owned.items():
        for j, (rows, width) in enumerate(config.table_shapes):
            kind = "large" if config.large_tables[j] else "small"
            key = base = f"{kind}_{width}_{config.param_dtype.name}"
            # Row numbers are 32 bits wide: what grows beyond that starts another stack.
            for count in itertools.count(2):
                if not sizes[key] or sizes[key] + rows <= INT32_MAX:
                    break
                key = f"{base}_{count}"
            groups.setdefault(key, []).append((name, j))
            sizes[key] += rows
    for key, members in sorted(groups.items()):
        first, j = members[0]
        axes = {owned[name].table_axes(i) for name, i in members}
        shardings = {owned[name].sharding for name, _ in members}
        if len(shardings) > 1:
            raise ValueError(
                f"sharding must agree for the tables of one stack, {key}, got "
                f"{' and '.join(sorted(map(repr, shardings)))}."
            )
        if len(axes) > 1:
            raise ValueError(
                f"logical_axes must agree for the tables of one stack, {key}, got "
                f"{' and '.join(map(str, sorted(axes, key=str)))}."
            )
        places, offset = [], 0
        for name, i in members:
            places.append(Place(name, i, offset, owned[name].partition.num_rows[i]))
            offset += places[-1].rows
        yield Stack(
            name=key,
            is_large=owned[first].large_tables[j],
            width=owned[first].table_shapes[j][1],
            dtype=owned[first].param_dtype,
            axes=axes.pop(),
            places=tuple(places),
            sharding=shardings.pop(),
        )


def _feature_keys(key: chex.PRNGKey, config: CollectionConfig) -> dict[str, chex.PRNGKey]:
    owned = config.owned
    return dict(zip(owned, jax.random.split(key, len(owned)), strict=True))
