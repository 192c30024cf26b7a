"""Collections: many features, looked up in few stacked tables.

A model of clicks has dozens of features, each with small tables of its own. One after another
they are dozens of small gathers and updates; stacked (see `qrhash.stacks`), they are one gather,
one gradient and one update for each stack: see `qrhash.plans`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qrhash import tables as of_feature
from qrhash.bag_sums import are_summed_at_once, summed_at_once
from qrhash.bags import Bag
from qrhash.initializers import Draw, create, table_initializers
from qrhash.joining import by_feature, side_by_side
from qrhash.keys import Keys
from qrhash.operations import Projection
from qrhash.parts import ids_of_parts, vectors_of_parts
from qrhash.plans import gather, plan_for, reads_of
from qrhash.spans import Span, Stack
from qrhash.stacks import (
    CollectionConfig,
    as_collection_config,
    as_stacks,
    stack,
    unstack,
)
from qrhash.types import Array, Key
from qrhash.vectors import fill_value, indices_of, vectors_of

__all__ = [
    "CollectionConfig",
    "as_stacks",
    "init",
    "init_projections",
    "lookup",
    "lookup_joined",
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
    ids: Mapping[str, Any],
    config: CollectionConfig,
    projections: Mapping[str, Projection] | None = None,
) -> dict[str, jax.Array]:
    """Looks up the vectors of many features, with one gather for each stack.

    Args:
      stacks: {stack name: array [rows, width]}, as from `init`.
      ids: {feature name: integers [*shape]}, of any of the features, each of any shape; a
        `qrhash.Bag` where there are several in one place; of a dynamic feature its keys with their
        rows, as `qrhash.dynamic.assign_all` or `find_all` gives them.
      config: the `CollectionConfig`.
      projections: as from `init_projections`, where there are any.

    Returns:
      {feature name: vectors [*shape, features]}, equal to those of `qrhash.lookup`, or
      `qrhash.dynamic.lookup`, on the feature's own tables.

    Raises:
      ValueError: ids that are not a mapping, or of a feature that is not in the collection; keys
        without rows for a dynamic feature, or with rows for another; a stack or projection is
        missing, or has another shape than the config's; or as `qrhash.lookup`.

    >>> from qrhash.config import EmbedConfig
    >>> from qrhash.families import QuotientRemainder
    >>> config = CollectionConfig({"item": EmbedConfig(QuotientRemainder(1000, 4), 8)})
    >>> stacks = init(jax.random.key(0), config)
    >>> lookup(stacks, {"item": jnp.array([[1, 2, 3]])}, config)["item"].shape
    (1, 3, 8)
    """
    config = as_collection_config(config)
    vectors = look_up_parts(stacks, _ids_of_parts(ids, config), config, projections)
    composites = config.composites
    return {
        name: vectors_of_parts(name, given, composites.get(name), vectors)
        for name, given in ids.items()
    }


def lookup_joined(
    stacks: Mapping[str, Any],
    ids: Mapping[str, Any] | Array,
    config: CollectionConfig,
    projections: Mapping[str, Projection] | None = None,
) -> jax.Array:
    """Looks up the vectors of many features, and puts them side by side, in the config's order.

    As `jnp.concatenate` of those of `lookup`, in fewer operations: neighbours that are combined in
    one go are not cut apart.

    Args:
      stacks: as in `lookup`.
      ids: as in `lookup`, of any of the features, and all of one shape [*shape], for bags that of
        the bags. Or one array of integers [*shape, embeddings], NumPy or JAX, a column for each of
        `config.embeddings`.
      config: the `CollectionConfig`.
      projections: as in `lookup`.

    Returns:
      [*shape, sum of the features' widths], in the order of `config.embeddings`, whatever that of a
      mapping is: `jax.jit` sorts the names of a dictionary it is given. The k vectors of operation
      "features" are side by side too. Vectors of several dtypes are promoted as JAX promotes them:
      bfloat16 beside float32 is float32.

    Raises:
      ValueError: no ids, or ids of several shapes; an array that has not one column for each of the
        embeddings, or for a collection with features of keys; or as `lookup`.

    >>> from qrhash.config import EmbedConfig
    >>> from qrhash.families import FullTable, QuotientRemainder
    >>> item, day = EmbedConfig(QuotientRemainder(1000, 4), 8), EmbedConfig(FullTable(7), 3)
    >>> config = CollectionConfig({"item": item, "day": day})
    >>> stacks = init(jax.random.key(0), config)
    >>> lookup_joined(stacks, jnp.array([[999, 0], [1, 6]]), config).shape
    (2, 11)
    >>> lookup_joined(stacks, {"day": jnp.array([6])}, config).shape
    (1, 3)
    """
    config = as_collection_config(config)
    given: Mapping[str, Any] = by_feature(ids, config)
    groups = look_up_groups(stacks, _ids_of_parts(given, config), config, projections)
    configs, composites = config.configs, config.composites
    ordinary = given.keys() - composites.keys()
    joined: list[tuple[Sequence[str], jax.Array]] = []
    apart: dict[str, jax.Array] = {}
    for names, vectors in groups:
        if not ordinary.issuperset(names):
            apart |= _taken_apart(names, vectors)
            continue
        shape = configs[names[0]].vector_shape
        of_places = vectors.shape[: vectors.ndim - len(shape)]
        joined.append((names, vectors.reshape(*of_places, math.prod(shape))))
    for name in given:
        if name in apart:
            made = vectors_of_parts(name, given[name], composites.get(name), apart)
            joined.append(((name,), made[None]))
    return side_by_side(joined, list(given))


def _ids_of_parts(ids: Mapping[str, Any], config: CollectionConfig) -> dict[str, Any]:
    """What is looked up in the ordinary features that those of the ids come down to."""
    check_features(ids, config)
    composites = config.composites
    of_parts: dict[str, Any] = {}
    for name, given in ids.items():
        of_parts |= ids_of_parts(name, given, composites.get(name))
    return of_parts


def look_up_parts(
    stacks: Mapping[str, Any],
    ids: Mapping[str, Array | Keys | Bag],
    config: CollectionConfig,
    projections: Mapping[str, Projection] | None,
) -> dict[str, jax.Array]:
    """See `lookup`; of ordinary features, parts among them."""
    vectors: dict[str, jax.Array] = {}
    for names, of_group in look_up_groups(stacks, ids, config, projections):
        vectors |= _taken_apart(names, of_group)
    return vectors


def _taken_apart(names: Sequence[str], vectors: jax.Array) -> dict[str, jax.Array]:
    """The vectors [features, *shape, ...] of a group, by feature."""
    # The transpose of a split is one concatenation; that of slices, a padded array for each.
    parts = jax.lax.split(vectors, [1] * len(names))
    return dict(zip(names, (part[0] for part in parts), strict=True))


def look_up_groups(
    stacks: Mapping[str, Any],
    ids: Mapping[str, Array | Keys | Bag],
    config: CollectionConfig,
    projections: Mapping[str, Projection] | None,
) -> Iterator[tuple[Sequence[str], jax.Array]]:
    """Names of ordinary features that are alike, and their vectors [features, *shape, ...]."""
    projections = {} if projections is None else projections
    _check(stacks, ids, config, projections)
    configs = config.configs
    indices, bags = {}, {}
    for name, of_name in ids.items():
        indices[name], bags[name] = indices_of(of_name, configs[name])
    plan = plan_for(config, indices, bags)
    reads = reads_of(config, stacks, plan, indices)
    together = [_bags_of(names, bags) for names in plan.groups]
    at_once = {
        number
        for number, (names, bag) in enumerate(zip(plan.groups, together, strict=True))
        if bag is not None
        and are_summed_at_once([each.table for each in reads[number]], configs[names[0]], bag)
    }
    rows = gather(config, plan, reads, leaving_out=at_once)
    # One combination for each group of features that are alike.
    for number, (names, bag) in enumerate(zip(plan.groups, together, strict=True)):
        first, projection = configs[names[0]], projections.get(config.owner_of[names[0]])
        of_group, found = reads[number], reads[number][0].found
        fills = [fill_value(indices[name][0], configs[name]) for name in names]
        fill = fills[0] if isinstance(fills[0], float) else jnp.stack(fills)
        if bag is not None:
            found = found.reshape(-1)
            fill = fill if isinstance(fill, float) else fill.reshape(-1, 1)
        if bag is not None and number in at_once:
            tables = [each.table for each in of_group]
            places = [each.index.reshape(-1) for each in of_group]
            combined = summed_at_once(tables, places, found, first, projection, bag)
        else:
            taken = [rows[number, table] for table in range(first.num_tables)]
            if bag is not None:
                taken = [each.reshape(-1, each.shape[-1]) for each in taken]
            combined = vectors_of(taken, found, first, projection, fill, bag)
        yield names, combined


def _bags_of(names: Sequence[str], bags: Mapping[str, Bag | None]) -> Bag | None:
    """The bags of features that are alike, behind each other; None for single ids."""
    found = [bag for name in names if (bag := bags[name]) is not None]
    return Bag.together(found) if found else None


def check_features(ids: Any, config: CollectionConfig) -> None:
    """Raises a ValueError unless ids are a mapping of features of the collection."""
    _check_mapping("ids", ids)
    features = dict(config.embeddings)
    unknown = [name for name in ids if name not in features]
    if unknown:
        raise ValueError(
            f"ids must be of features of the collection, {', '.join(features)}, got {unknown[0]!r}."
        )


def _check_mapping(name: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        what = "stack" if name == "stacks" else "feature"
        raise ValueError(f"{name} must be a mapping of {what} names, got {type(given)}.")


def _check(
    stacks: Mapping[str, Any],
    ids: Mapping[str, Any],
    config: CollectionConfig,
    projections: Mapping[str, Projection],
) -> None:
    """Raises a ValueError unless everything is there, and of the shapes that the config gives."""
    _check_mapping("stacks", stacks)
    _check_mapping("projections", projections)
    configs = config.configs
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
