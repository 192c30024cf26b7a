"""More rows for a table that is full: on the host, between two steps."""

import dataclasses

import jax
import jax.numpy as jnp

from qrhash import tables
from qrhash.dynamic import upkeep
from qrhash.dynamic.config import DynamicConfig, check_dynamic_config
from qrhash.dynamic.embedding import Parameters, State
from qrhash.kinds import set_table_rows, whole_table


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
