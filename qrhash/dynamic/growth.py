"""More rows for a table that is full: on the host, between two steps."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from qrhash.dynamic import sharded, upkeep
from qrhash.dynamic.collections import check_growing, growing, only_stacks, state_of
from qrhash.dynamic.config import DynamicConfig, check_dynamic_config
from qrhash.dynamic.embedding import Parameters, State
from qrhash.kinds import lengthened
from qrhash.stacks import CollectionConfig, as_collection_config, as_stacks, unstack


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
      ValueError: fewer rows than there are.

    >>> import jax
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
    state, config = _longer(state, config, capacity)
    (is_large,) = config.own.large_tables
    table = lengthened(parameters.table, config.capacity, config.layout, is_large=is_large)
    return parameters._replace(table=table), state, config


def grow_all(
    stacks: Mapping[str, Any],
    states: Mapping[str, State],
    config: CollectionConfig,
    capacities: Mapping[str, int],
) -> tuple[dict[str, Any], dict[str, State], CollectionConfig, dict[str, Any]]:
    """The same tables, some of them with more rows; see `qrhash.dynamic.grow`.

    Other rows of the stacks move, and with them the optimizer's state; on a mesh all rows come by
    every device on the way, and have to fit one:

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
      ValueError: fewer rows than there are, a feature that has no dynamic table of its own, or a
        table that becomes large.
    """
    config, grown = as_collection_config(config), dict(states)
    owned, made = growing(config), dict(config.embeddings)
    mine = only_stacks(stacks, config)
    for name, capacity in capacities.items():
        check_growing(name, owned)
        grown[name], made[name] = _longer(state_of(states, name), owned[name], capacity)
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
        of_features[name] = (jnp.pad(old, ((0, made[name].capacity - len(old)), (0, 0))),)
    rows = dict.fromkeys(stacks)
    for before, after in zip(config.stacks, more.stacks, strict=True):
        if before.shape != after.shape:
            moved = [
                jnp.arange(old.num_rows) + new.offset
                for old, new in zip(before.spans, after.spans, strict=True)
            ]
            rows[before.name] = jnp.concatenate(moved)
    return {**stacks, **as_stacks(of_features, more)}, grown, more, rows


def _longer(state: State, config: DynamicConfig, capacity: int) -> tuple[State, DynamicConfig]:
    """A state of more rows, and the config of that capacity."""
    capacity = upkeep.check_more(capacity, config.capacity)
    longer = dataclasses.replace(config, capacity=capacity)
    if config.layout is None:
        return dataclasses.replace(state, index=upkeep.grow(state.index, capacity)), longer
    index, home = sharded.grow(
        config.layout, state.index, state.home, capacity=config.capacity, wanted=capacity
    )
    return dataclasses.replace(state, index=index, home=home), longer
