"""The one door to the kinds of table: what a user gives, as a `Table`, and the other way round."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qrhash.batches import replicate
from qrhash.layout import MeshLayout
from qrhash.local import LocalTable
from qrhash.protocol import LookUps, Table, TableLike
from qrhash.replicated import ReplicatedTable
from qrhash.rowgrads import RowGrads, is_row_grads
from qrhash.sharded import ShardedTable
from qrhash.types import Array


def as_table(table: TableLike, layout: MeshLayout | None = None) -> Table:
    """A table as the look-up knows it.

    Args:
      table: a `Table`, or an array [num_rows, width] of one device.
      layout: of an array that is on every device of a mesh, how the batch is split.
    """
    if isinstance(table, Table):
        table.warn_if_elsewhere()
        return table
    array = jnp.asarray(table)
    return LocalTable(array) if layout is None else ReplicatedTable(array, layout)


def whole_table(table: TableLike) -> Array:
    """A table as one array [num_rows, width], however it is kept."""
    return table.to_array() if isinstance(table, Table) else table


def put_table(array: Array, layout: MeshLayout | None, *, is_large: bool) -> Any:
    """An array [num_rows, width] as it stands in parameters.

    On a mesh a large one is split by rows, a small one is on every device.
    """
    if layout is None:
        return jnp.asarray(array)
    if not is_large:
        return replicate(jnp.asarray(array), layout)
    if not isinstance(array, np.ndarray):
        array = jnp.asarray(array)
    return ShardedTable.from_array(array, layout)


def lengthened(
    table: TableLike, num_rows: int, layout: MeshLayout | None, *, is_large: bool
) -> Any:
    """A table with more rows, of zeros, behind those that it has; see `put_table`."""
    if isinstance(table, ShardedTable):
        return table.lengthened(num_rows)
    array = whole_table(table)
    more = jnp.pad(array, ((0, num_rows - array.shape[0]), (0, 0)))
    return put_table(more, layout, is_large=is_large)


def named_rows(table: TableLike, indices: jax.Array, values: jax.Array) -> list[RowGrads]:
    """Values for some rows of a table, where its arrays have them: one for each of its arrays.

    Args:
      table: an array [num_rows, width], or a `Table`.
      indices: row numbers [m], none of them twice; those outside the table name no row.
      values: [m, width].

    Returns:
      Merged `RowGrads`.
    """
    of_table = as_table(table)
    look_ups = LookUps.of([indices], of_table.shape[0], is_distinct=True)
    named = of_table.row_grads([indices], [values], look_ups)
    return [each.merge() for each in jax.tree.leaves(named, is_leaf=is_row_grads)]


def set_table_rows(table: TableLike, indices: jax.Array, values: jax.Array) -> Any:
    """A table with other rows; see `named_rows`. In place where XLA may."""
    arrays, tree = jax.tree.flatten(table)
    named = named_rows(table, indices, values)
    made = [
        each.storage.set(array, each.indices, each.values)
        for array, each in zip(arrays, named, strict=True)
    ]
    return jax.tree.unflatten(tree, made)
