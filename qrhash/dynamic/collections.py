"""The tables that grow of a collection: what `qrhash.dynamic` does with one, for all of them.

Of a dynamic feature the stacks hold the keys' own rows and the tables of compressed vectors, as
those of two ordinary features. States are {name of the feature that has the table: `State`};
features that share a table share its index, to which their keys are one batch, in the order of the
config. A step of the training is

    states, found = dynamic.assign_all(states, ids, config, step)
    stacks, new = dynamic.start_all(stacks, found, config)
    opt_state = qrhash.reset_rows(tx, opt_state, stacks, new)
    loss, grads = qrhash.value_and_grad(loss_fn, config.large_tables)(stacks, found)
    ...

with `qrhash.collection.lookup(stacks, found, config)` in the loss. Ids of other features are passed
on as they are.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qrhash.batches import everywhere
from qrhash.collection import check_features, look_up_parts
from qrhash.dynamic.config import REFUSED, DynamicConfig
from qrhash.dynamic.embedding import (
    Parameters,
    State,
    assign,
    evicted,
    find,
    init_state,
    write_new,
)
from qrhash.dynamic.found import Found, as_keys, keys_of
from qrhash.dynamic.index import Rows, flat_keys
from qrhash.keys import Keys
from qrhash.layout import MeshLayout
from qrhash.operations import Projection
from qrhash.parts import part_name
from qrhash.stacks import CollectionConfig, as_collection_config, tables_of
from qrhash.types import Array, PyTree, Scalar


def init_states(config: CollectionConfig) -> dict[str, State]:
    """The states before any key is known.

    Args:
      config: the `CollectionConfig`.

    Returns:
      {feature name: `State`}, of the dynamic features that have a table of their own.
    """
    return {name: init_state(each) for name, each in growing(as_collection_config(config)).items()}


def assign_all(
    states: Mapping[str, State],
    ids: Mapping[str, Any],
    config: CollectionConfig,
    step: Scalar,
    *,
    where: Mapping[str, Array] | None = None,
) -> tuple[dict[str, State], dict[str, Any]]:
    """The rows of keys in a step of the training; see `qrhash.dynamic.assign`.

    Args:
      states: as from `init_states`; donate them, and they are updated in place.
      ids: {feature name: ids}, of any of the features; of dynamic ones `Keys` [*shape], or what
        `Keys.of` takes, or a `qrhash.Bag` of such.
      config: the `CollectionConfig`.
      step: the number of the step, from 0 on.
      where: {name of a dynamic feature: which of its keys are meant, bool [*shape]}.

    Returns:
      The states, and ids as `qrhash.collection.lookup` and `start_all` take them: a `Found` in
      place of keys. How many keys have no row is counted by table, all its features together.

    Raises:
      ValueError: ids of no feature, or a state is missing.

    >>> config = CollectionConfig({"item": DynamicConfig(9, 4), "last": "item"})
    >>> keys = {"last": ["hats", "socks"], "item": ["shoes", "hats"]}
    >>> states, found = assign_all(init_states(config), keys, config, step=0)
    >>> {name: each.rows.rows.tolist() for name, each in found.items()}
    {'last': [1, 2], 'item': [0, 1]}
    """
    config = as_collection_config(config)
    owned, changed = growing(config), dict(states)

    def ask(name: str, keys: Keys, meant: jax.Array) -> Rows:
        state = state_of(states, name)
        changed[name], found = assign(state, keys, owned[name], step, where=meant)
        return found.rows

    return changed, _found(ask, ids, config, where)


def find_all(
    states: Mapping[str, State],
    ids: Mapping[str, Any],
    config: CollectionConfig,
    *,
    where: Mapping[str, Array] | None = None,
) -> dict[str, Any]:
    """The rows of keys outside of the training; see `qrhash.dynamic.find`.

    Args:
      states: as from `init_states`.
      ids: as in `assign_all`.
      config: the `CollectionConfig`.
      where: as in `assign_all`.

    Raises:
      ValueError: as in `assign_all`.
    """
    config = as_collection_config(config)
    owned = growing(config)

    def ask(name: str, keys: Keys, meant: jax.Array) -> Rows:
        return find(state_of(states, name), keys, owned[name], where=meant).rows

    return _found(ask, ids, config, where)


def start_all(
    stacks: Mapping[str, Any],
    found: Mapping[str, Any],
    config: CollectionConfig,
    projections: Mapping[str, Projection] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes the rows of new keys; see `qrhash.dynamic.start_rows`.

    Args:
      stacks: as from `qrhash.collection.init`; donate them, and they are updated in place.
      found: as `assign_all` gives it.
      config: the `CollectionConfig`.
      projections: as from `qrhash.collection.init_projections`, where there are any.

    Returns:
      The stacks; and {stack name: the numbers of the rows written, int32 [n], or None}, as
      `qrhash.reset_rows` takes them.

    Raises:
      ValueError: keys of a dynamic feature that were not assigned, or a stack is missing.
    """
    config = as_collection_config(config)
    mine, started = only_stacks(stacks, config), dict(stacks)
    for owner, of_table in _assigned(found, config).items():
        name, _ = config.spans[owner, 0]
        rows = _new_rows(owner, of_table, config)
        if rows.size:
            layout = growing(config)[owner].layout
            keys = _together([each.flat_keys for each in of_table], layout)
            is_new = _together([each.rows.is_new.reshape(-1) for each in of_table], layout)
            given = mine | {name: started[name]}, projections or {}, keys, is_new, rows
            started[name] = _with_new_rows(*given, config, owner)
    return started, dict.fromkeys(stacks) | new_rows_of(found, config)


# Jitted for its cache: outside of `jax.jit`, the loop would compile anew at every call.
@functools.partial(jax.jit, static_argnames=("config", "owner"))
def _with_new_rows(
    stacks: dict[str, Any],
    projections: Mapping[str, Projection],
    keys: Keys,
    is_new: jax.Array,
    rows: jax.Array,
    config: CollectionConfig,
    owner: str,
) -> Any:
    """The stack of the feature's own rows, with those of new keys [n] written."""
    name, _ = config.spans[owner, 0]
    part = part_name(owner, REFUSED)

    def compressed(table: Any, keys: Keys) -> jax.Array:
        # In the same stack there may be tables of compressed vectors: as it is by now.
        return look_up_parts({**stacks, name: table}, {part: keys}, config, projections)[part]

    return write_new(stacks[name], keys, is_new, rows, growing(config)[owner], compressed)


def new_rows_of(found: Mapping[str, Any], config: CollectionConfig) -> dict[str, jax.Array]:
    """Stack name -> rows of it that keys have just got, int32 [n]; else its number of rows."""
    config = as_collection_config(config)
    numbers: dict[str, list[jax.Array]] = {}
    layouts = {each.name: each.layout for each in config.stacks}
    for owner, of_table in _assigned(found, config).items():
        numbers.setdefault(config.spans[owner, 0][0], []).append(_new_rows(owner, of_table, config))
    return {name: _together(of_stack, layouts[name]) for name, of_stack in numbers.items()}


def _new_rows(owner: str, found: Sequence[Found], config: CollectionConfig) -> jax.Array:
    """The rows of its stack that keys of a table have just got."""
    name, span = config.spans[owner, 0]
    end = next(each.shape[0] for each in config.stacks if each.name == name)
    table = growing(config)[owner]
    rows = _together([each.new_rows(table) for each in found], table.layout)
    return jnp.where(rows < span.num_rows, rows + span.offset, end)


def evict_all(
    states: Mapping[str, State], stacks: Mapping[str, Any], config: CollectionConfig, step: Scalar
) -> tuple[dict[str, State], dict[str, jax.Array]]:
    """Takes back the rows of keys that the features' evictions name; see `qrhash.dynamic.evict`.

    Args:
      states: as from `init_states`; donate them, and they are updated in place.
      stacks: as from `qrhash.collection.init`; they do not change.
      config: the `CollectionConfig`.
      step: the number of the step.

    Returns:
      The states, and {feature name: how many keys have lost their row}, of those with an eviction.

    Raises:
      ValueError: no feature has an eviction, or a state or a stack is missing.
    """
    config = as_collection_config(config)
    evicting = {name: each for name, each in growing(config).items() if each.eviction is not None}
    if not evicting:
        raise ValueError(
            "evict_all needs a feature whose DynamicConfig has an eviction, such as "
            "StepsSinceUse(1000), got none."
        )
    changed, counts, mine = dict(states), {}, only_stacks(stacks, config)
    for owner, each in evicting.items():
        (name, span), state = config.spans[owner, 0], state_of(states, owner)
        before = state.index.num_keys
        changed[owner] = evicted(state, mine[name], each, step, offset=span.offset)
        counts[owner] = before - changed[owner].index.num_keys
    return changed, counts


def parameters_in(
    stacks: Mapping[str, Any],
    config: CollectionConfig,
    name: str,
    projections: Mapping[str, Projection] | None = None,
) -> Parameters:
    """The parameters of one dynamic feature, as the functions of `qrhash.dynamic` take them.

    Args:
      stacks: as from `qrhash.collection.init`.
      config: the `CollectionConfig`.
      name: of a feature that has its own table.
      projections: as from `qrhash.collection.init_projections`, where there are any.

    Returns:
      Its `Parameters`, copied from the stacks; the config that goes with them is the feature's.

    Raises:
      ValueError: it is none, or a stack is missing.
    """
    config = as_collection_config(config)
    owned, stacks = growing(config), only_stacks(stacks, config)
    check_growing(name, owned)
    (table,) = tables_of(stacks, config, name)
    if owned[name].refused is None:
        return Parameters(table)
    part = part_name(name, REFUSED)
    return Parameters(table, tables_of(stacks, config, part), (projections or {}).get(part))


def growing(config: CollectionConfig) -> dict[str, DynamicConfig]:
    """Feature name -> config, of the dynamic features that have a table of their own."""
    return {name: each for name, each in config.embeddings if isinstance(each, DynamicConfig)}


def check_growing(name: str, owned: Mapping[str, DynamicConfig]) -> None:
    """Raises a ValueError unless it is the name of one of these features."""
    if name not in owned:
        raise ValueError(
            "there must be a feature of this name with a DynamicConfig of its own, "
            f"{', '.join(owned) or 'none'}, got {name!r}."
        )


def state_of(states: Mapping[str, State], name: str) -> State:
    """The state of a feature's table.

    Raises:
      ValueError: it is missing.
    """
    if not isinstance(states, Mapping) or not isinstance(states.get(name), State):
        raise ValueError(f"states must be as from init_states, that of {name!r} is missing.")
    return states[name]


def only_stacks(stacks: Mapping[str, Any], config: CollectionConfig) -> dict[str, Any]:
    """The stacks alone, of a mapping that may hold more."""
    missing = [each.name for each in config.stacks if each.name not in stacks]
    if missing:
        raise ValueError(f"stacks must be as from init, {missing[0]} is missing.")
    return {each.name: stacks[each.name] for each in config.stacks}


def _by_table(given: Mapping[str, Any], config: CollectionConfig) -> dict[str, list[str]]:
    """The dynamic features among these by the one whose table they have, in the config's order."""
    check_features(given, config)
    owner_of, by_table = config.owner_of, dict[str, list[str]]()
    for name in config.composites:
        if name in given:
            by_table.setdefault(owner_of[name], []).append(name)
    return by_table


def _assigned(found: Mapping[str, Any], config: CollectionConfig) -> dict[str, list[Found]]:
    """What was found for the features of each table."""
    by_table = _by_table(found, config)
    for name, each in config.composites.items():
        if name in found and not isinstance(found[name], Found):
            got = type(found[name]).__name__
            raise ValueError(f"found[{name!r}] must be {each.given}, got {got}.")
    return {owner: [found[name] for name in names] for owner, names in by_table.items()}


def _found(
    ask: Callable[[str, Keys, jax.Array], Rows],
    ids: Mapping[str, Any],
    config: CollectionConfig,
    where: Mapping[str, Array] | None,
) -> dict[str, Any]:
    """The ids, with a `Found` in place of the keys of dynamic features.

    Args:
      ask: name of the table's feature, keys [m], which of them are meant -> their rows.
      ids: as in `assign_all`.
      config: the `CollectionConfig`.
      where: as in `assign_all`.
    """
    by_table, where, made = _by_table(ids, config), where or {}, dict(ids)
    extra = [name for name in where if name not in ids or name not in config.composites]
    if extra:
        raise ValueError(f"where must name dynamic features of ids, got {extra[0]!r}.")
    for owner, of_table in by_table.items():
        keys = {name: as_keys(_raw(ids, name), where.get(name)) for name in of_table}
        flat = [flat_keys(keys_of(each), meant) for each, meant in keys.values()]
        layout = growing(config)[owner].layout
        together = [_together([each[j] for each in flat], layout) for j in (0, 1)]
        rows, start = ask(owner, *together), 0
        if len(flat) > 1:
            rows = everywhere(rows, layout)
        for (name, (each, meant)), (some, _, shape) in zip(keys.items(), flat, strict=True):
            here = slice(start, start := start + some.size)
            part = rows._replace(rows=rows.rows[here], is_new=rows.is_new[here])
            made[name] = Found(each, part.in_shape(shape), meant)
    return made


def _raw(ids: Mapping[str, Any], name: str) -> Any:
    if isinstance(ids[name], Found):
        raise ValueError(f"ids[{name!r}] must be keys, which are given rows here, got Found.")
    return ids[name]


def _together(parts: Sequence[PyTree], layout: MeshLayout | None) -> Any:
    """Arrays behind each other."""
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *each: jnp.concatenate(each), *everywhere(parts, layout))
