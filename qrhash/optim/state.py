"""Which optimizer state goes by which parameter: seen on shapes alone.

Optax's states are trees of any form. A leaf of the state goes by the rows of a parameter if it
grows with them: every parameter is made longer by a number of its own, and wider, `tx.init` is
traced for these shapes, and what grew along tells its owner.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from qrhash.optim.refusals import decides_by_shapes, deciding_by_values_refused
from qrhash.protocol import is_table
from qrhash.types import PyTree


class NotByRowsError(ValueError):
    """State for a table that does not go by its rows: dense gradients may have it."""


class Follows(NamedTuple):
    """What a leaf of the state follows.

    Attributes:
      param: which parameter it grows with, by number; None: with none.
      axes: along which of its own axes it grows with the rows.
      wider: along which it grows with the width.
    """

    param: int | None
    axes: tuple[int, ...]
    wider: tuple[int, ...]


def follows(
    tx: optax.GradientTransformation,
    tree: Any,
    leaves: Sequence[Any],
    row_axes: Mapping[int, int],
) -> list[tuple[tuple[int, ...], Follows]]:
    """For each leaf of the state its shape, and what it follows.

    Args:
      tx: the transformation.
      tree: structure of the parameters.
      leaves: the parameters, or types of them.
      row_axes: number of a parameter -> axis of its rows, of those that are made longer.

    Raises:
      ValueError: the transformation decides by shapes, or by values.
    """

    def state_shapes(more_rows: int, times_width: int) -> list[tuple[int, ...]]:
        types = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        for number, axis in row_axes.items():
            shape = list(types[number].shape)
            shape[axis] += more_rows * (number + 1)
            if len(shape) > axis + 1:
                shape[-1] *= times_width  # by devices over which it is split, it still divides
            types[number] = jax.ShapeDtypeStruct(tuple(shape), types[number].dtype)
        with deciding_by_values_refused():
            state = jax.eval_shape(tx.init, jax.tree.unflatten(tree, types))
        return [leaf.shape for leaf in jax.tree.leaves(state)]

    shapes, longer, wider = state_shapes(0, 1), state_shapes(1, 1), state_shapes(0, 2)
    if len({len(shapes), len(longer), len(wider)}) > 1:
        raise decides_by_shapes()

    def grown(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(axis for axis, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)

    found = []
    for shape, long, wide in zip(shapes, longer, wider, strict=True):
        axes = grown(shape, long)
        number = long[axes[0]] - shape[axes[0]] - 1 if axes else None
        param = number if number in row_axes else None
        found.append((shape, Follows(param, axes, grown(shape, wide))))
    return found


def owners_of(
    tx: optax.GradientTransformation, tree: Any, leaves: Sequence[Any], row_axes: Mapping[int, int]
) -> list[int | None]:
    """For each leaf of the state, by the rows of which table it goes, if by any's.

    Args:
      tx: the transformation.
      tree: structure of the parameters.
      leaves: the parameters, or their gradients.
      row_axes: number of a leaf -> axis of its rows, for each table.

    Raises:
      NotByRowsError: there is state for a table that does not go by its rows.
      ValueError: the transformation decides by shapes, or by values.
    """
    owners: list[int | None] = []
    for shape, (owner, axes, wider) in follows(tx, tree, leaves, row_axes):
        if owner is None:
            fits = not axes and not wider
        else:
            axis = row_axes[owner]
            fits = axes == (axis,) and all(each > axis for each in wider)
        if not fits:
            raise NotByRowsError(
                f"touched_rows needs state of one entry or one row per row of a table, but this "
                f"transformation keeps an array of shape {shape} for one: train the table densely."
            )
        owners.append(owner)
    return owners


def state_shardings(tx: optax.GradientTransformation, params: PyTree) -> PyTree | None:
    """Where the state belongs: with the parameters that it goes by. None if they are on no mesh."""
    leaves, tree = jax.tree.flatten(params)
    of_params: list[NamedSharding | None] = []
    for node in jax.tree.leaves(params, is_leaf=is_table):
        here = node.shardings() if is_table(node) else None
        of_params += (
            jax.tree.leaves(here) if here is not None else map(_sharding_of, jax.tree.leaves(node))
        )
    mesh = next((each.mesh for each in of_params if each is not None), None)
    if mesh is None:
        return None
    # Every parameter's first axis grows by a number of its own, and with it the state beside it.
    row_axes = {n: 0 for n, where in enumerate(of_params) if where is not None and leaves[n].shape}
    specs = []
    for shape, (owner, axes, _) in follows(tx, tree, leaves, row_axes):
        goes_along = owner is not None and axes == (0,) and shape[:1] == leaves[owner].shape[:1]
        where = of_params[owner] if owner is not None and goes_along else None
        specs.append(() if where is None else where.spec[: len(shape)])
    state_tree = jax.tree.structure(jax.eval_shape(tx.init, params))
    return jax.tree.unflatten(
        state_tree, [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
    )


def _sharding_of(leaf: Any) -> NamedSharding | None:
    """Where an array is that is no tracer, if that is on a mesh."""
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return None
    return leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
