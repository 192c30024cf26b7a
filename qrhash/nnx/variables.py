"""`Table`: the variable that holds a table, and what it says of it."""

from typing import Any

import jax
from flax import nnx

from qrhash.dynamic.sharded import shard_sharding
from qrhash.layout import MeshLayout, mesh_axes
from qrhash.sharded import ShardedTable
from qrhash.types import Array


class Table(nnx.Param):
    """A table: an `nnx.Param` of a type of its own, so that a filter can tell tables apart.

    Its metadata `is_large` says whether it is trained by rows. On a mesh a large table's value is
    the array of a `qrhash.ShardedTable`, and the metadata hold its `num_rows` and its `layout`.
    """

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        table = as_table(self)
        if isinstance(table, ShardedTable):
            self.set_value(table.in_place().array)


class KeyState(nnx.Variable):
    """The `qrhash.dynamic.State` of a module: no `nnx.Param`, so no gradient is taken of it."""


def is_variable(node: Any) -> bool:
    """Whether a node of a tree is a variable: `is_leaf` of `jax.tree.map`."""
    return isinstance(node, nnx.Variable)


def is_large(path: Any, value: Any) -> bool:
    """Whether a variable holds a table that is trained by rows: a filter of `nnx`."""
    del path
    return isinstance(value, Table) and getattr(value, "is_large", False)


def as_table(variable: nnx.Variable) -> Any:
    """What a variable holds: a table on a mesh, or state in its layout, as a `ShardedTable`."""
    # Of the metadata alone: an attribute of this name is also one of JAX's arrays.
    value, layout = variable.get_value(), variable.get_metadata().get("layout")
    if layout is None:
        return value
    of_table = (layout.num_shards, layout.rows_per_shard(variable.num_rows))
    # Optimizers keep state of other shapes too, with the metadata of the table it is for.
    is_other = getattr(value, "shape", of_table)[:2] != of_table
    return value if is_other else ShardedTable(value, variable.num_rows, layout)


def shardings(state: Any, layout: MeshLayout) -> Any:
    """A state with, in place of its values, where they belong: `out_shardings` of `jax.jit`.

    Tables are split by rows as they say, and so is which key has which row; all else is on every
    device of the mesh.
    """

    def of(variable: nnx.Variable) -> nnx.Variable:
        if isinstance(variable, KeyState):
            state = variable.get_value()
            return variable.replace(jax.tree.map(lambda _: shard_sharding(layout), state))
        return variable.replace(array_of(layout.shardings(as_table(variable))))

    return jax.tree.map(of, state, is_leaf=is_variable)


def array_of(table: Any) -> Any:
    """The inverse: what the variable of a table holds."""
    return table.array if isinstance(table, ShardedTable) else table


def table_variable(value: Any, axes: Any, *, is_large: bool) -> Table:
    """The variable of a table, with its axis names or None."""
    if not isinstance(value, ShardedTable):
        return annotated(Table, value, axes, is_large=is_large)
    metadata = {"num_rows": value.num_rows, "layout": value.layout}
    return annotated(Table, value.array, mesh_axes(axes), is_large=is_large, **metadata)


def annotated(variable: type[nnx.Param], value: Array, axes: Any, **metadata: Any) -> Any:
    """A variable with axis names, if there are any."""
    if axes is None:
        return variable(value, **metadata)
    # Logical names need no mesh until they are mapped to one: hence not placed here and now.
    return variable(value, out_sharding=axes, eager_sharding=False, **metadata)
