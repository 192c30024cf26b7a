"""More rows for a table that is full: on the host, between two steps."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qrhash import tables
from qrhash.dynamic import upkeep
from qrhash.dynamic.collections import check_growing, growing, only_stacks, state_of
from qrhash.dynamic.config import DynamicConfig, check_dynamic_config
from qrhash.dynamic.embedding import Parameters, State
from qrhash.kinds import set_table_rows, whole_table
from qrhash.stacks import CollectionConfig, as_collection_config, stack, unstack


def grow(
    parameters: Parameters, state: State, config: DynamicConfig, capacity: int
) -> tuple[Parameters, State, DynamicConfig]:
    """The same table with more rows: every key keeps its row, and so its vector and its counts.

    What is jitted compiles anew, so let it double. The optimizer's state grows beside it:

        more, state, config = dynamic.grow(params, state, config, 2 * config.capacity)
        opt_state, params = qrhash.grow_rows(tx, opt_state, params, more), more

    Args:
      parameters: the `Parameters`.
      state: the `State`.
      config: the `DynamicConfig`.
      capacity: how many rows there are to be.

    Returns:
      Parameters, state, and the config of that capacity. What `assign` and `find` gave before is of
      the old one: its number for no row names a row now.

    Raises:
      ValueError: fewer rows than there are, or a table on a mesh.

    >>> from qrhash.dynamic.embedding import assign, find, init, init_state
    >>> config = DynamicConfig(2, 8)
    >>> params, state = init(jax.random.key(0), config), init_state(config)
    >>> state, _ = assign(state, [5, 7, 9], config, step=0)
    >>> params, state, config = grow(params, state, config, 4)
    >>> state, _ = assign(state, [5, 7, 9], config, step=1)
    >>> params.table.shape, find(state, [5, 7, 9], config).rows.rows.tolist()
    ((4, 8), [0, 1, 2])
    """
    check_dynamic_config(config)
    if config.layout is not None:
        raise ValueError(
            "grow needs a config without a layout: on a mesh the capacity is fixed, got "
            f"{config.layout}."
        )
    index = upkeep.grow(state.index, capacity)
    config = dataclasses.replace(config, capacity=index.capacity)
    # The key draws nothing: rows are zeros until they are given to a key.
    (table,) = tables.init(jax.random.key(0), config.own)
    old = whole_table(parameters.table)
    table = set_table_rows(table, jnp.arange(old.shape[0]), jnp.asarray(old))
    return parameters._replace(table=table), dataclasses.replace(state, index=index), config


def grow_all(
    stacks: Mapping[str, Any],
    states: Mapping[str, State],
    config: CollectionConfig,
    capacities: Mapping[str, int],
) -> tuple[dict[str, Any], dict[str, State], CollectionConfig, dict[str, Any]]:
    """The same tables, some of them with more rows; see `qrhash.dynamic.grow`.

    Other rows of the stacks move, and with them the optimizer's state:

        more, states, config, rows = dynamic.grow_all(stacks, states, config, {"item": 200_000})
        opt_state, stacks = qrhash.grow_rows(tx, opt_state, stacks, more, rows), more

    Args:
      stacks: as from `qrhash.collection.init`.
      states: as from `init_states`.
      config: the `CollectionConfig`.
      capacities: {name of a dynamic feature: how many rows there are to be}.

    Returns:
      Stacks, states, and the config of these capacities; and {stack name: where its rows are now,
      int32 [rows], or None}. What `assign_all` and `find_all` gave before is of the old config.

    Raises:
      ValueError: fewer rows than there are, a feature that has no dynamic table of its own, tables
        on a mesh, or one that becomes large.
    """
    config, grown = as_collection_config(config), dict(states)
    owned, made = growing(config), dict(config.embeddings)
    mine = only_stacks(stacks, config)
    if any(each.layout is not None for each in config.stacks):
        raise ValueError("grow_all needs a config without a layout: a mesh's capacity is fixed.")
    for name, capacity in capacities.items():
        check_growing(name, owned)
        index = upkeep.grow(state_of(states, name).index, capacity)
        grown[name] = dataclasses.replace(states[name], index=index)
        made[name] = dataclasses.replace(owned[name], capacity=index.capacity)
    more = CollectionConfig(made)
    for of_table, (name, _) in config.spans.items():
        if more.spans[of_table][0] != name:
            raise ValueError(
                f"capacities must leave every table in its stack, got one that moves that of "
                f"{of_table[0]!r} from {name} to {more.spans[of_table][0]}: build the config with "
                "another large_table_rows."
            )
    of_features = unstack(mine, config)
    for name in capacities:
        (old,) = of_features[name]
        zeros = jnp.zeros((made[name].capacity, *old.shape[1:]), old.dtype)
        of_features[name] = (zeros.at[: old.shape[0]].set(old),)
    rows = dict.fromkeys(stacks)
    for before, after in zip(config.stacks, more.stacks, strict=True):
        if before.shape != after.shape:
            moved = [
                jnp.arange(old.num_rows) + new.offset
                for old, new in zip(before.spans, after.spans, strict=True)
            ]
            rows[before.name] = jnp.concatenate(moved)
    return {**stacks, **stack(of_features, more)}, grown, more, rows
