"""Training by rows, by hand: rows gathered in order before their update, and their gradients.

`qrhash.value_and_grad` does both for a loss of any shape. Here are the two steps alone, for loops
that differentiate at the rows themselves.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qrhash.kinds import as_table
from qrhash.protocol import LookUps, TableLike
from qrhash.rows import device_index, fill_missing
from qrhash.types import Array
from qrhash.vectors import check_one_per_table


def take_rows(
    tables: Sequence[TableLike], indices: Sequence[Array], *, fill_value: float = jnp.nan
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Gathers rows that are to be updated in the same step; see `gather`.

    XLA copies a donated table unless every read of it is ordered before its update. Each read here
    is one branch of a conditional, which is compiled as one piece: it happens once, however many
    results are computed from its rows, and the row numbers come out of the same conditional. Where
    the update goes by these row numbers, it cannot but come later.

    Args:
      tables: k arrays [rows_j, width_j].
      indices: k integer arrays [*shape], as `EmbedConfig.indices` returns them.
      fill_value: what a row outside the table holds.

    Returns:
      k arrays [*shape, width_j], and the k arrays of row numbers to make the `RowGrads` of; those
      outside the table are now all rows_j.

    Raises:
      ValueError: as `gather`.

    >>> (rows,), (index,) = take_rows((jnp.arange(6.0).reshape(3, 2),), (jnp.array([2, -1]),))
    >>> rows.tolist(), index.tolist()
    ([[4.0, 5.0], [nan, nan]], [2, 3])
    """
    check_one_per_table(tables, indices=indices)
    taken = [_read(*pair, fill_value) for pair in zip(tables, indices, strict=True)]
    return tuple(rows for rows, _ in taken), tuple(named for _, named in taken)


def row_grads(
    tables: Sequence[TableLike], indices: Sequence[Array], values: Sequence[jax.Array]
) -> tuple[Any, ...]:
    """The gradients of tables, given those of rows gathered: what `value_and_grad` gives.

    Args:
      tables: k arrays [rows_j, width_j].
      indices: k integer arrays [*shape], as `take_rows` gives them back.
      values: k arrays [*shape, width_j], the derivatives with respect to its rows.

    Returns:
      For each table its unmerged `RowGrads`; of a `qrhash.ShardedTable`, one that holds them.

    Raises:
      ValueError: not one array of indices, and one of values, per table, or values of another
        shape than the rows.

    >>> (grads,) = row_grads((jnp.ones((3, 2)),), (jnp.array([2, 2]),), (jnp.ones((2, 2)),))
    >>> grads.to_dense().tolist()
    [[0.0, 0.0], [0.0, 0.0], [2.0, 2.0]]
    """
    check_one_per_table(tables, indices=indices, values=values)
    grads = []
    for table, index, value in zip(map(as_table, tables), indices, values, strict=True):
        on_device = [device_index(index, table.shape[0])]
        if value.shape != (wanted := (*on_device[0].shape, *table.shape[1:])):
            raise ValueError(
                f"values must be of shape {wanted}, of rows of a table of shape {table.shape} at "
                f"indices of shape {on_device[0].shape}, got {value.shape}."
            )
        look_ups = LookUps.of(on_device, table.shape[0])
        grads.append(table.row_grads(on_device, [value], look_ups).as_given())
    return tuple(grads)


def _read(table: TableLike, index: Array, fill_value: float) -> tuple[jax.Array, jax.Array]:
    num_rows, index = table.shape[0], device_index(index, table.shape[0])
    (rows,), (named,) = as_table(table).read([index], LookUps.of([index], num_rows))
    return fill_missing(rows, named == num_rows, fill_value), named
