"""Rows that change hands: their optimizer state starts anew, or there are more of them.

A row that was one key's and becomes another's must not keep the moments of the first.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qrhash.kinds import named_rows
from qrhash.optim.refusals import check_transformation
from qrhash.optim.state import owners_of
from qrhash.protocol import is_table
from qrhash.rowgrads import RowGrads
from qrhash.types import PyTree


def reset_rows(
    tx: optax.GradientTransformation, state: PyTree, params: PyTree, rows: PyTree
) -> PyTree:
    """The state of an optimizer with that of some rows as it is at the start.

    Args:
      tx: the transformation, such as of `qrhash.touched_rows`.
      state: its state; donate it, and it is updated in place.
      params: the parameters.
      rows: a prefix of their tree, with None for what is left alone; and in the place of a table
        the numbers of the rows, int32 [m], none of them twice. Those outside the table name none.

    Returns:
      The state. What does not go by rows, such as the count of the steps, is as before.

    Raises:
      ValueError: rows that are no prefix of the parameters, or stand for what is no table; or `tx`
        keeps state for a table that does not go by its rows.

    >>> from qrhash.optim.accumulators import adagrad
    >>> table = jnp.ones((4, 1))
    >>> tx = adagrad(0.1, initial_accumulator_value=0.5)
    >>> _, state = tx.update(table, tx.init(table), table)
    >>> print(jax.tree.leaves(reset_rows(tx, state, table, jnp.array([2, 4])))[0].ravel())
    [1.5 1.5 0.5 1.5]
    """
    check_transformation(tx)
    named = _named(params, rows)
    if not named:
        return state
    leaves, tree = jax.tree.flatten(params)
    axes = {number: each.storage.row_axis for number, each in named.items()}
    owners = owners_of(tx, tree, leaves, axes)
    # In place of each table, so many rows of it: their state at the start is that of any others.
    few = [named[n].values if n in named else leaf for n, leaf in enumerate(leaves)]
    fresh = jax.tree.leaves(tx.init(jax.tree.unflatten(tree, few)))
    arrays, state_tree = jax.tree.flatten(state)
    for place, owner in enumerate(owners):
        if owner is not None:
            rows_of = named[owner]
            values = fresh[place].astype(arrays[place].dtype)
            arrays[place] = rows_of.storage.set(arrays[place], rows_of.indices, values)
    return jax.tree.unflatten(state_tree, arrays)


def grow_rows(
    tx: optax.GradientTransformation,
    state: PyTree,
    params: PyTree,
    grown: PyTree,
    rows: PyTree | None = None,
) -> PyTree:
    """The state of an optimizer for parameters whose tables have more rows than before.

    Args:
      tx: the transformation, such as of `qrhash.touched_rows`.
      state: its state.
      params: the parameters before.
      grown: the parameters after, such as `qrhash.dynamic.grow` gives them: the same tree, with
        tables in it that have more rows, the first of which are those that they had.
      rows: or a tree of them with, in the place of a table, where the rows that it had are now,
        int32 [rows], such as `qrhash.dynamic.grow_all` gives it; None: they are the first ones.

    Returns:
      The state. Every row keeps its own, a row that is new has it as at the start.

    Raises:
      ValueError: the trees differ, or in more than the number of rows; or `tx` keeps state for a
        table that does not go by its rows.

    >>> from qrhash.optim.accumulators import adagrad
    >>> table = jnp.ones((2, 1))
    >>> tx = adagrad(0.1, initial_accumulator_value=0.5)
    >>> _, state = tx.update(table, tx.init(table), table)
    >>> print(jax.tree.leaves(grow_rows(tx, state, table, jnp.ones((3, 1))))[0].ravel())
    [1.5 1.5 0.5]
    """
    check_transformation(tx)

    def one_row(old: PyTree, new: PyTree) -> jax.Array | None:
        if old is None or old.shape == new.shape:
            return None
        if len(old.shape) != 2 or old.shape[1:] != new.shape[1:] or old.shape[0] > new.shape[0]:
            raise ValueError(
                f"grown must have the tables of params with more rows, got an array {new.shape} in "
                f"the place of one {old.shape}."
            )
        return jnp.arange(1)

    try:
        longer = jax.tree.map(one_row, params, grown, is_leaf=_is_node)
    except ValueError as error:
        raise ValueError(f"grown must be a tree as params are: {error}") from error
    before, after = _named(params, longer), _named(grown, longer)
    moved: dict[int, jax.Array] = {}
    if rows is not None:
        for node, numbers, first in _nodes(grown, rows):
            moved |= dict.fromkeys(range(first, first + len(jax.tree.leaves(node))), numbers)
        if moved.keys() != before.keys():
            raise ValueError(
                "rows must be given for the tables that have more of them, and no others."
            )
    leaves, tree = jax.tree.flatten(params)
    owners = owners_of(tx, tree, leaves, {n: each.storage.row_axis for n, each in before.items()})
    arrays = jax.tree.leaves(state)
    # In the structure of the new state: a table of a mesh has its number of rows there.
    fresh, state_tree = jax.tree.flatten(tx.init(grown))
    for place, owner in enumerate(owners):
        if owner is not None:
            start = fresh[place].astype(arrays[place].dtype)
            arrays[place] = _lengthened(
                arrays[place], start, before[owner], after[owner], moved.get(owner)
            )
    return jax.tree.unflatten(state_tree, arrays)


def _lengthened(
    array: jax.Array, start: jax.Array, old: RowGrads, new: RowGrads, numbers: jax.Array | None
) -> jax.Array:
    """State of a longer table.

    Args:
      array: the state of the table before.
      start: that of the longer one at the start.
      old: any gradient of the table before.
      new: any gradient of the longer one.
      numbers: where the rows of before are now [rows]; None: they are the first ones.
    """
    if numbers is None and old.storage == new.storage:
        # They stay on their devices, and in their places there.
        kept = new.storage.from_order(jnp.arange(new.num_rows)) < old.num_rows
        kept = kept.reshape(*kept.shape, *[1] * (start.ndim - kept.ndim))
        more = [(0, after - before) for before, after in zip(array.shape, start.shape, strict=True)]
        return new.storage.constrain(jnp.where(kept, jnp.pad(array, more), start))
    numbers = jnp.arange(old.num_rows) if numbers is None else numbers
    in_order = new.storage.to_order(start, new.num_rows)
    in_order = in_order.at[numbers].set(old.storage.to_order(array, old.num_rows))
    return new.storage.from_order(in_order)


def _is_node(each: PyTree) -> bool:
    return each is None or is_table(each)


def _named(params: PyTree, rows: PyTree) -> Mapping[int, RowGrads]:
    """Number of a leaf of the parameters -> the rows named of it, with values of zero."""
    found: dict[int, RowGrads] = {}
    for node, numbers, first in _nodes(params, rows):
        zeros = jnp.zeros((*numbers.shape, node.shape[1]), node.dtype)
        found |= dict(enumerate(named_rows(node, numbers, zeros), start=first))
    return found


def _nodes(params: PyTree, rows: PyTree) -> Iterator[tuple[Any, jax.Array, int]]:
    """Each table of which rows are named, their numbers, and the number of its first leaf."""
    nodes, tree = jax.tree.flatten(params, is_leaf=_is_node)
    places = jax.tree.unflatten(tree, range(len(nodes)))
    try:
        of_nodes = jax.tree.broadcast(rows, places, is_leaf=lambda each: each is None)
    except ValueError as error:
        raise ValueError(
            f"rows must be a prefix of the parameters' tree, of row numbers and None: {error}"
        ) from error
    count = 0
    for node, numbers in zip(
        nodes, jax.tree.leaves(of_nodes, is_leaf=lambda each: each is None), strict=True
    ):
        if numbers is not None:
            if len(node.shape) != 2 or numbers.ndim != 1:
                raise ValueError(
                    "rows must be numbers [m] in the place of a table [num_rows, width], got "
                    f"{numbers.shape} in that of an array {node.shape}."
                )
            yield node, numbers, count
        count += len(jax.tree.leaves(node))
