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
from typing import Any, NamedTuple, Self

import chex
import jax
import jax.numpy as jnp
import numpy as np

from qrhash import tables as core
from qrhash.arithmetic import as_fields
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
      axes: axis names of its array, or None, see `EmbedConfig.table_axes`.
      places: the tables in it, from the first row on.
      sharding: how the batch is split over a mesh and, if it is large, the stack.
    """

    name: str
    is_large: bool
    width: int
    dtype: np.dtype
    axes: tuple[Any, ...] | None
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

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON has it; see `EmbedConfig.to_dict`."""
        return {
            name: value if isinstance(value, str) else value.to_dict()
            for name, value in self.features
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, devices: Sequence[Any] | None = None) -> Self:
        """The config of which `to_dict` made these values; see `EmbedConfig.from_dict`."""
        features = {
            name: value if isinstance(value, str) else EmbedConfig.from_dict(value, devices=devices)
            for name, value in as_fields("config", values).items()
        }
        return cls(features)


def as_collection_config(config: Any) -> CollectionConfig:
    """A config of many features, also from a mapping."""
    return config if isinstance(config, CollectionConfig) else CollectionConfig(config)


def init(key: chex.PRNGKey, config: CollectionConfig) -> dict[str, Any]:
    """Creates the stacked tables: those that `qrhash.init` gives for each feature, stacked.

    Args:
      key: a JAX random key.
      config: the `CollectionConfig`.

    Returns:
      {stack name: array [rows, width]}; with `sharding`, large ones are `ShardedTable`s.
    """
    keys = _table_keys(key, config)
    return {stack.name: _init_stack(keys, config, stack) for stack in config.stacks}


def init_stack(key: chex.PRNGKey, config: CollectionConfig, stack: Stack) -> Any:
    """Creates one stack."""
    return _init_stack(_table_keys(key, config), config, stack)


def _table_keys(key: chex.PRNGKey, config: CollectionConfig) -> dict[str, Any]:
    """For each feature the keys of its tables, each used once."""
    keys = _feature_keys(key, config)
    return {
        name: jax.random.split(keys[name], owned.num_tables) for name, owned in config.owned.items()
    }


def _init_stack(keys: Mapping[str, Any], config: CollectionConfig, stack: Stack) -> Any:
    """Creates one stack part by part into its place, so that the parts never exist twice."""
    owned = config.owned

    def part(place: Place) -> core.Part:
        initializer = core.table_initializers(owned[place.feature])[place.table]
        key = keys[place.feature][place.table]
        return core.Part(key, initializer, place.offset, place.rows)

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
    # Tables are drawn of the same keys: split and folded in, these do not meet.
    keys = _feature_keys(jax.random.clone(key), config)
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
      ValueError: ids of a feature that is not in the collection; a stack or projection is missing,
        or has another shape than the config's.
      TypeError: ids that are not a mapping.
      ValueError, TypeError: as `qrhash.lookup`.

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
        got = getattr(stacks[stack.name], "shape", None)
        if got != stack.shape:
            raise ValueError(
                f"stacks[{stack.name!r}] must be of shape {stack.shape}, as from init, got {got}."
            )
    for name in dict.fromkeys(owners[name] for name in ids):
        configs[name].check_projection((projections or {}).get(name))
    indices = {
        name: core.as_batch(core.row_numbers(of_name, configs[name]), configs[name])
        for name, of_name in ids.items()
    }
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
        fills = [core.fill_value(indices[name][0], configs[name]) for name in names]
        combined = core.combine_found(
            [rows[names[0], table] for table in range(first.num_tables)],
            found[names[0]],
            first,
            (projections or {}).get(owners[names[0]]),
            fills[0] if isinstance(fills[0], float) else jnp.stack(fills),
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
      ValueError: a feature is missing or unknown, a table has another number of rows, or tables of
        one stack differ in width or dtype.
    """
    if not isinstance(tables, Mapping):
        raise ValueError(f"tables must be a mapping of features to tables, got {type(tables)}.")
    unknown = [name for name in tables if name not in config.owned]
    if unknown:
        raise ValueError(
            f"tables must be of features that have their own, {', '.join(config.owned)}, got "
            f"{unknown[0]!r}."
        )
    for name, owned in config.owned.items():
        of_feature = tables.get(name, ())
        if hasattr(of_feature, "shape"):
            raise ValueError(
                f"tables[{name!r}] must be a tuple of {owned.num_tables} arrays, got one array of "
                f"shape {of_feature.shape}."
            )
        if not isinstance(of_feature, Sequence) or not all(
            hasattr(table, "shape") for table in of_feature
        ):
            raise ValueError(
                f"tables[{name!r}] must be a tuple of {owned.num_tables} arrays, got "
                f"{of_feature!r}."
            )
        got = tuple(table.shape[0] for table in of_feature)
        if got != owned.partition.num_rows:
            raise ValueError(
                f"tables[{name!r}] must have {owned.partition.num_rows} rows, got {got}."
            )
    stacks: dict[str, Any] = {}
    for each in config.stacks:
        parts = [whole_table(tables[place.feature][place.table]) for place in each.places]
        _check_alike(each, parts)
        # On the host where the parts are: from there every device gets its own rows alone.
        xp = np if all(isinstance(part, np.ndarray) for part in parts) else jnp
        table = xp.concatenate(parts)
        sharding = each.sharding if each.is_large else None
        if sharding is not None:
            stacks[each.name] = ShardedTable.from_array(table, sharding)
        else:
            stacks[each.name] = jnp.asarray(table)
    return stacks


def as_stacks(
    tables: Mapping[str, tuple[chex.Array, ...]], config: CollectionConfig
) -> dict[str, Any]:
    """The stacks made of given tables, such as pre-trained ones, in place of `init`.

    Args:
      tables: {feature name: k arrays [rows_j, width_j] of `param_dtype`}, as `qrhash.as_tables`
        takes them, of all features that have tables of their own.
      config: the `CollectionConfig`.

    Returns:
      {stack name: array [rows, width]}, as from `init`.

    Raises:
      ValueError: a feature is missing or unknown, or a table has another shape or dtype.
    """
    stacks = stack(tables, config)
    for each in config.stacks:
        made = stacks[each.name]
        dtype = jax.dtypes.canonicalize_dtype(made.dtype)
        if (made.shape, dtype) != (each.shape, each.dtype):
            raise ValueError(
                f"tables must stack up to {each.dtype} {each.shape} in {each.name!r}, got "
                f"{dtype} {made.shape}."
            )
        if each.sharding is not None and not each.is_large:
            stacks[each.name] = each.sharding.replicate(made)
    return stacks


def _check_alike(stack: Stack, parts: Sequence[Any]) -> None:
    """Raises a ValueError unless the tables of a stack are alike but for their rows."""
    kinds = [(part.shape[1:], jax.dtypes.canonicalize_dtype(part.dtype)) for part in parts]
    for place, (shape, dtype) in zip(stack.places, kinds, strict=True):
        if (shape, dtype) != kinds[0]:
            first = stack.places[0]
            raise ValueError(
                f"tables[{place.feature!r}][{place.table}] must be of width and dtype of the other "
                f"tables in stack {stack.name!r}, {kinds[0][1]} {kinds[0][0]} of "
                f"tables[{first.feature!r}][{first.table}], got {dtype} {shape}."
            )


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
        _fill_kind(config),
        owner if config.operation == "project" else None,
    )


def _fill_kind(config: EmbedConfig) -> str:
    """Which of its values `fill_value` gives."""
    if config.id_policy == "nan" and config.padding_id is not None:
        return "both"
    return str(core.fill_value(np.zeros(0, np.int32), config))


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
