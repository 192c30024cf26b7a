"""Collections: many features, looked up in few stacked tables.

A model of clicks has dozens of features, each with small tables of its own. One after another
they are dozens of small gathers and updates; stacked (see `qrhash.stacks`), they are one gather,
one gradient and one update for each stack. How the look-ups of a batch go to the stacks depends on
the config and the shapes of the ids alone: it is planned once.
"""

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qrhash import tables as of_feature
from qrhash.bags import Bag
from qrhash.config import EmbedConfig
from qrhash.initializers import Draw, create, table_initializers
from qrhash.kinds import as_table
from qrhash.operations import Projection
from qrhash.policies import fill_kind
from qrhash.protocol import LookUps, Segment, TableLike
from qrhash.rows import device_index
from qrhash.stacks import (
    CollectionConfig,
    Span,
    Stack,
    as_collection_config,
    as_stacks,
    stack,
    unstack,
)
from qrhash.take import take
from qrhash.types import INT32_MAX, Array, Key
from qrhash.vectors import fill_value, indices_of, vectors_of

__all__ = [
    "CollectionConfig",
    "as_stacks",
    "init",
    "init_projections",
    "lookup",
    "stack",
    "unstack",
]


def init(key: Key, config: CollectionConfig) -> dict[str, Any]:
    """Creates the stacked tables: those that `qrhash.init` gives for each feature, stacked.

    Args:
      key: a JAX random key.
      config: the `CollectionConfig`.

    Returns:
      {stack name: array [rows, width]}; with `layout`, large ones are `ShardedTable`s.
    """
    config = as_collection_config(config)
    keys = _table_keys(key, config)
    return {stack.name: _init_stack(keys, config, stack) for stack in config.stacks}


def init_stack(key: Key, config: CollectionConfig, stack: Stack) -> Any:
    """Creates one stack."""
    return _init_stack(_table_keys(key, config), config, stack)


def _table_keys(key: Key, config: CollectionConfig) -> dict[str, Any]:
    """For each feature the keys of its tables, each used once."""
    keys = _feature_keys(key, config)
    return {
        name: jax.random.split(keys[name], owned.num_tables)
        for name, owned in config.own_configs.items()
    }


def _init_stack(keys: Mapping[str, Any], config: CollectionConfig, stack: Stack) -> Any:
    """Creates one stack part by part into its place, so that the parts never exist twice."""
    owned = config.own_configs

    def draw(span: Span) -> Draw:
        initializer = table_initializers(owned[span.feature])[span.table]
        key = keys[span.feature][span.table]
        return Draw(key, initializer, span.offset, span.num_rows)

    draws = [draw(span) for span in stack.spans]
    return create(draws, stack.shape, stack.dtype, stack.layout, is_large=stack.is_large)


def init_projections(key: Key, config: CollectionConfig) -> dict[str, Projection]:
    """Creates the dense parameters of the features with operation "project".

    Args:
      key: a JAX random key; may be the one given to `init`.
      config: the `CollectionConfig`.

    Returns:
      {feature name: Projection}, of the features that have tables of their own.
    """
    # Tables are drawn of the same keys: split and folded in, these do not meet.
    config = as_collection_config(config)
    keys = _feature_keys(jax.random.clone(key), config)
    projections = {
        name: of_feature.init_projection(keys[name], owned)
        for name, owned in config.own_configs.items()
    }
    return {name: made for name, made in projections.items() if made is not None}


def _feature_keys(key: Key, config: CollectionConfig) -> dict[str, Key]:
    owned = config.own_configs
    return dict(zip(owned, jax.random.split(key, len(owned)), strict=True))


def lookup(
    stacks: Mapping[str, Any],
    ids: Mapping[str, Array | Bag],
    config: CollectionConfig,
    projections: Mapping[str, Projection] | None = None,
) -> dict[str, jax.Array]:
    """Looks up the vectors of many features, with one gather for each stack.

    Args:
      stacks: {stack name: array [rows, width]}, as from `init`.
      ids: {feature name: integers [*shape]}, of any of the features, each of any shape; a
        `qrhash.Bag` where there are several in one place.
      config: the `CollectionConfig`.
      projections: as from `init_projections`, where there are any.

    Returns:
      {feature name: vectors [*shape, features]}, equal to those of `qrhash.lookup` on the
      feature's own tables.

    Raises:
      ValueError: ids that are not a mapping, or of a feature that is not in the collection; a stack
        or projection is missing, or has another shape than the config's; or as `qrhash.lookup`.

    >>> from qrhash.families import QuotientRemainder
    >>> config = CollectionConfig({"item": EmbedConfig(QuotientRemainder(1000, 4), 8)})
    >>> stacks = init(jax.random.key(0), config)
    >>> lookup(stacks, {"item": jnp.array([[1, 2, 3]])}, config)["item"].shape
    (1, 3, 8)
    """
    config = as_collection_config(config)
    projections = {} if projections is None else projections
    _check(stacks, ids, config, projections)
    configs = config.configs
    indices, bags = {}, {}
    for name, of_name in ids.items():
        indices[name], bags[name] = indices_of(of_name, configs[name])
    kinds = ((name, of[0].shape, _kind(bags[name], configs[name])) for name, of in indices.items())
    plan = plan_of(config, tuple(kinds))
    # One gather for each stack.
    rows: dict[tuple[int, int], jax.Array] = {}
    found: dict[int, jax.Array] = {}
    for each in config.stacks:
        blocks = plan.blocks.get(each.name, ())
        for block, *taken in _read_stack(each, stacks[each.name], blocks, indices):
            rows[block.group, block.table], found[block.group] = taken
    # One combination for each group of features that are alike.
    vectors: dict[str, jax.Array] = {}
    for number, names in enumerate(plan.groups):
        first = configs[names[0]]
        fills = [fill_value(indices[name][0], configs[name]) for name in names]
        fill = fills[0] if isinstance(fills[0], float) else jnp.stack(fills)
        of_group = [rows[number, table] for table in range(first.num_tables)]
        together = _bags_of(names, bags)
        if together is not None:
            of_group = [each.reshape(-1, each.shape[-1]) for each in of_group]
            found[number] = found[number].reshape(-1)
            fill = fill if isinstance(fill, float) else fill.reshape(-1, 1)
        projection = projections.get(config.owner_of[names[0]])
        combined = vectors_of(of_group, found[number], first, projection, fill, together)
        # The transpose of a split is one concatenation; that of slices, a padded array for each.
        parts = jax.lax.split(combined, [1] * len(names))
        vectors.update(zip(names, (part[0] for part in parts), strict=True))
    return {name: vectors[name] for name in ids}


def _kind(bag: Bag | None, config: EmbedConfig) -> tuple[Any, ...] | None:
    """What features of bags must have in common to be pooled in one go."""
    if bag is None:
        return None
    is_weighted = bag.weights is not None
    return bag.shape, bag.length, is_weighted, config.combiner, config.pool_rows


def _bags_of(names: Sequence[str], bags: Mapping[str, Bag | None]) -> Bag | None:
    """The bags of features that are alike, behind each other; None for single ids."""
    found = [bag for name in names if (bag := bags[name]) is not None]
    return Bag.together(found) if found else None


def _check(
    stacks: Mapping[str, Any],
    ids: Any,
    config: CollectionConfig,
    projections: Mapping[str, Projection],
) -> None:
    """Raises a ValueError unless everything is there, and of the shapes that the config gives."""
    named = {"ids": ids, "stacks": stacks, "projections": projections}
    for name, given in named.items():
        if not isinstance(given, Mapping):
            what = "stack" if name == "stacks" else "feature"
            raise ValueError(f"{name} must be a mapping of {what} names, got {type(given)}.")
    configs = config.configs
    unknown = [name for name in ids if name not in configs]
    if unknown:
        raise ValueError(
            f"ids must be of features of the collection, {', '.join(configs)}, got {unknown[0]!r}."
        )
    owners = dict.fromkeys(config.owner_of[name] for name in ids)
    missing = [stack.name for stack in config.stacks if stack.name not in stacks]
    missing += [
        f"the projection of {name!r}"
        for name in owners
        if configs[name].projection_fields and name not in projections
    ]
    if missing:
        raise ValueError(f"stacks and projections must be as from init, {missing[0]} is missing.")
    for each in config.stacks:
        got = getattr(stacks[each.name], "shape", None)
        if got != each.shape:
            raise ValueError(
                f"stacks[{each.name!r}] must be of shape {each.shape}, as from init, got {got}."
            )
    for name in owners:
        configs[name].check_projection(projections.get(name))


# --- the plan -------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Look-ups of the features of a group in one of their tables, next to each other in a stack.

    Attributes:
      group: number of the group.
      table: number of the table, of each of its features.
      reads: for each feature its name, and where its table stands in the stack.
    """

    group: int
    table: int
    reads: tuple[tuple[str, Span], ...]


class Plan(NamedTuple):
    """How the look-ups of a batch go to the stacks.

    Attributes:
      groups: names of features that are alike, and are read and combined in one go.
      blocks: stack name -> what is read from it.
    """

    groups: tuple[tuple[str, ...], ...]
    blocks: dict[str, list[Block]]


@functools.lru_cache(maxsize=256)
def plan_of(config: CollectionConfig, kinds: tuple[tuple[str, tuple[int, ...], Any], ...]) -> Plan:
    """The plan for ids of these features, shapes and kinds of bags."""
    configs, owner_of = config.configs, config.owner_of
    alike: dict[Any, list[str]] = collections.defaultdict(list)
    for name, shape, kind in kinds:
        alike[shape, kind, *_group_of(config, name, configs[name])].append(name)
    groups = tuple(map(tuple, alike.values()))
    blocks: dict[str, list[Block]] = collections.defaultdict(list)
    for number, names in enumerate(groups):
        for table in range(configs[names[0]].num_tables):
            spans = [config.spans[owner_of[name], table] for name in names]
            stack = spans[0][0]  # of all of them
            reads = tuple((name, span) for name, (_, span) in zip(names, spans, strict=True))
            blocks[stack].append(Block(number, table, reads))
    return Plan(groups, dict(blocks))


def _group_of(collection: CollectionConfig, name: str, config: EmbedConfig) -> tuple[Any, ...]:
    """What features must have in common, besides their ids' shape, to be combined in one go."""
    owner = collection.owner_of[name]
    return (
        tuple(collection.spans[owner, table][0] for table in range(config.num_tables)),
        config.operation,
        config.vector_dtype,
        fill_kind(config.id_policy, config.padding_id),
        owner if config.operation == "project" else None,
    )


def _read_stack(
    stack: Stack,
    table: TableLike,
    blocks: Sequence[Block],
    indices: Mapping[str, Sequence[Array]],
) -> list[tuple[Block, jax.Array, jax.Array]]:
    """One gather for all reads of a stack.

    Returns, for each block of n reads of ids [*shape], its rows [n, *shape, width] and whether they
    were found [n, *shape].
    """
    if not blocks:
        return []
    num_rows = stack.shape[0]
    dtype = jnp.int32 if num_rows <= INT32_MAX else jnp.int64

    def in_stack(index: Array, span: Span) -> jax.Array:
        index = device_index(index, span.num_rows).astype(dtype)
        has_row = (index >= 0) & (index < span.num_rows)
        return jnp.where(has_row, index + span.offset, num_rows)

    together = [
        jnp.stack([in_stack(indices[name][block.table], span) for name, span in block.reads])
        for block in blocks
    ]
    segments = tuple(
        Segment(span.offset, span.num_rows, index.size // index.shape[0])
        for block, index in zip(blocks, together, strict=True)
        for _, span in block.reads
    )
    # [features, batch, ...]: the batch is the second axis.
    look_ups = LookUps(segments=segments, batch_axis=1)
    rows = take(as_table(table, stack.layout), together, look_ups)
    found = [index < num_rows for index in together]
    return list(zip(blocks, rows, found, strict=True))
