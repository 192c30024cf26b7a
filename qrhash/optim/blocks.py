"""Many touched rows, updated some thousand at a time.

Most transformations do to each row the same, whatever the others are. Then a large batch need not
be read, transformed and written as a whole, by arrays of all its rows: block by block they stay in
the cache, and positions behind the last row named cost nothing. What looks at all rows together, as
clipping by a global norm does, cannot go so: the traced program says which it is.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jax.extend.core.primitives import jit_p

from qrhash import tuning
from qrhash.optim.checks import Arguments, Transformation
from qrhash.rowgrads import RowGrads
from qrhash.rows import apart, read_rows, set_rows, varying_beside

_ELEMENTWISE = {"add", "sub", "mul", "div", "neg", "abs", "sign", "square", "max", "min", "rem"}
_ELEMENTWISE |= {"sqrt", "rsqrt", "integer_pow", "pow", "exp", "log", "log1p", "expm1", "tanh"}
_ELEMENTWISE |= {"logistic", "select_n", "clamp", "convert_element_type", "is_finite", "copy"}
_ELEMENTWISE |= {"xor", "shift_right_logical", "shift_left", "bitcast_convert_type"}
_ELEMENTWISE |= {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "add_any", "cbrt"}
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or"}


class Updated(NamedTuple):
    """What comes of a table's rows.

    Attributes:
      updates: of the rows named by its gradient, [m, width].
      state: the arrays of its state, with new rows.
    """

    updates: jax.Array
    state: list[jax.Array]


def is_row_wise(tx: Transformation, whole: Arguments) -> bool:
    """Whether every row is treated alike, and alone.

    Args:
      tx: the transformation, of tables whose rows are along the first axis.
      whole: types of what it takes, of whole tables.
    """
    tables = range(len(whole.grads))
    marks = [n in tx.row_axes for n in tables]
    marks += [owner is not None for owner in tx.owners]
    marks += marks[: len(tables)] * (whole.params is not None)
    jaxpr = tx.program(whole).jaxpr
    rows = {each for each, is_rows in zip(jaxpr.invars, marks, strict=True) if is_rows}
    results = _followed(jaxpr, rows)
    # Nothing else may be computed from rows.
    return results is not None and all(
        is_rows or not of_rows for is_rows, of_rows in zip(marks, results, strict=False)
    )


def _followed(jaxpr: Any, rows: set[Any]) -> list[bool] | None:
    """Which results are computed from rows, each from its own; None: from other rows, perhaps."""
    rows = set(rows)
    for equation in jaxpr.eqns:
        of_rows = [isinstance(each, Var) and each in rows for each in equation.invars]
        if not any(of_rows):
            continue
        if equation.primitive is jit_p:
            inner = equation.params["jaxpr"].jaxpr
            named = {each for each, mark in zip(inner.invars, of_rows, strict=True) if mark}
            results = _followed(inner, named)
            if results is None:
                return None
        elif _keeps_rows(equation, of_rows):
            results = [True] * len(equation.outvars)
        else:
            return None
        rows |= {each for each, mark in zip(equation.outvars, results, strict=True) if mark}
    return [isinstance(each, Var) and each in rows for each in jaxpr.outvars]


def _keeps_rows(equation: Any, of_rows: Sequence[bool]) -> bool:
    """Whether row i of the result depends on row i of the operands alone."""
    name, params = equation.primitive.name, equation.params
    if len(equation.outvars) != 1:
        return False  # A conditional, a sort: of several results at once.
    (result,) = equation.outvars
    operands = [each for each, mark in zip(equation.invars, of_rows, strict=True) if mark]
    if not result.aval.shape or any(
        each.aval.shape[:1] != result.aval.shape[:1] for each in operands
    ):
        return False
    if name in _REDUCTIONS:
        return 0 not in params["axes"]
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][:1] == (0,)
    if name == "squeeze":
        return 0 not in params["dimensions"]
    return name in _ELEMENTWISE or name == "reshape"


def goes_in_blocks(grads: RowGrads) -> bool:
    """Whether merged gradients name so many rows of one device's table that blocks are faster."""
    m = grads.values.shape[0]
    is_local = grads.storage.row_axis == 0 and grads.spill is None
    # How many rows an exported program will be given is not known.
    return is_local and isinstance(m, int) and tuning.updates_in_blocks(tuning.traced_for(), m)


def without_rows(tx: Transformation, arguments: Arguments, tables: Collection[int]) -> Arguments:
    """What a transformation takes, with a row of zeros in place of some tables."""

    def cut(leaf: Any, table: int | None) -> Any:
        if table is None or table not in tables:
            return leaf
        return jnp.zeros((1, *leaf.shape[1:]), leaf.dtype)

    leaves = range(len(arguments.grads))
    return Arguments(
        list(map(cut, arguments.grads, leaves)),
        list(map(cut, arguments.state, tx.owners)),
        None if arguments.params is None else list(map(cut, arguments.params, leaves)),
    )


def update_in_blocks(
    tx: Transformation, arguments: Arguments, number: int, grads: RowGrads
) -> Updated:
    """Runs a row-wise transformation on the rows of one table, block by block.

    Args:
      tx: the transformation.
      arguments: what it takes; of other tables nothing matters.
      number: which of the leaves the table is.
      grads: its gradient, merged.
    """
    places = tx.state_of(number)
    others = without_rows(tx, arguments, [n for n in tx.row_axes if n != number])
    m, size = grads.values.shape[0], tuning.ROWS_AT_ONCE
    is_named = grads.indices < grads.num_rows
    last = jnp.max(jnp.where(is_named, jnp.arange(m, dtype=jnp.int32), -1))

    def transformed(values: jax.Array, rows: Sequence[jax.Array]) -> Any:
        """The updates of some rows, and their new state; behind rows of state, the parameter's."""
        of_tables, of_state = list(others.grads), list(others.state)
        of_tables[number] = values
        for place, each in zip(places, rows, strict=False):
            of_state[place] = each
        params = None
        if others.params is not None:
            params = list(others.params)
            params[number] = rows[-1]
        updates, new = tx(Arguments(of_tables, of_state, params))
        return updates[number], [new[place] for place in places]

    def block(first: Any, size: int, updated: Updated) -> Updated:
        index = jax.lax.dynamic_slice_in_dim(grads.indices, first, size)
        arrays: list[jax.Array] = [*updated.state, *of_params]
        rows: Sequence[jax.Array] = ()
        if arrays:
            rows, index = read_rows(arrays, index)
        of_updates = updated.updates if is_in_place else grads.values

        def cut_and_transformed() -> Any:
            values = jax.lax.dynamic_slice_in_dim(of_updates, first, size)
            return transformed(values, rows)

        updates, rows = apart(cut_and_transformed, jnp.any(index < grads.num_rows))
        return Updated(
            jax.lax.dynamic_update_slice_in_dim(updated.updates, updates, first, axis=0),
            [set_rows(array, index, new) for array, new in zip(updated.state, rows, strict=True)],
        )

    of_params = [] if arguments.params is None else [arguments.params[number]]
    given = [arguments.state[place] for place in places]
    # What the loop carries must vary from the start over the mesh axes that its results do.
    beside = (grads.indices, grads.values, *given, *of_params)
    state = [varying_beside(each, *beside) for each in given]
    of_block = [
        jax.ShapeDtypeStruct((size, *each.shape[1:]), each.dtype)
        for each in (grads.values, *state, *of_params)
    ]
    dtype = jax.eval_shape(transformed, of_block[0], of_block[1:])[0].dtype
    # Mostly updates are of the gradients' dtype, and take their place.
    is_in_place = dtype == grads.values.dtype
    updates = grads.values if is_in_place else jnp.zeros(grads.values.shape, dtype)
    updates = varying_beside(updates, *beside)
    full, rest = divmod(m, size)
    turns = jnp.minimum((last + size) // size, full)
    updated = jax.lax.fori_loop(
        0, turns, lambda turn, updated: block(turn * size, size, updated), Updated(updates, state)
    )
    if not rest:
        return updated
    # The rows behind the last full block: in a loop of one turn, or of none.
    is_in_rest = (last >= full * size).astype(jnp.int32)
    return jax.lax.fori_loop(
        0, is_in_rest, lambda _, updated: block(full * size, rest, updated), updated
    )
