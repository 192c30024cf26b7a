"""`touched_rows`: optimizers on the touched rows alone.

For Adagrad and for plain SGD a zero gradient changes nothing, neither the row nor its state. So
it is exactly the dense optimizer, not an approximation, to gather the state of the rows that a
batch touched, run the transformation on these, and scatter the state back. `touched_rows` does
that with any optax transformation that treats rows alone; the cost of a step then depends on the
batch and no more on the table.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qrhash.arithmetic import INT32_MAX
from qrhash.optim.blocks import goes_in_blocks, is_row_wise, update_in_blocks, without_rows
from qrhash.optim.checks import Arguments, Transformation, check_at_start
from qrhash.optim.refusals import check_transformation, refuse_what_waits, refusing
from qrhash.optim.state import owners_of, state_shardings
from qrhash.protocol import Packed
from qrhash.rowgrads import RowGrads, is_row_grads
from qrhash.types import PyTree


def touched_rows(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation take `RowGrads` for tables, and ordinary gradients elsewhere.

    Duplicates are merged, the state of the rows touched is gathered, `tx` runs on arrays [m, width]
    in place of the tables, and the state is scattered back. What `tx` sees are gradients, so that
    anything that optax can chain may stand in it: clipping by the global norm (of all gradients,
    as if they were dense), schedules, `inject_hyperparams`, weight decay, `partition`, `masked`.

    Equal to `tx` on dense gradients where a zero gradient leaves a row and its state alone: SGD,
    Adagrad, row-wise Adagrad, clipping by the global norm. Otherwise it is the *lazy* variant:

    * momentum, Adam, AMSGrad: a row's moments decay, and the row moves on, only in the steps that
      touch it. Bias correction counts all steps.
    * weight decay: only the rows touched decay.
    * transformations over whole tables (a table's own norm or root mean square, as in LARS or LAMB)
      see the rows touched as if they were the table.

    What goes by rows of earlier steps would leave out those that a step does not touch, and is
    refused: accumulation (`optax.MultiSteps`, `optax.apply_every`; add up `RowGrads` instead),
    state that keeps parameters or averages of them (`optax.contrib.sam`, `schedule_free`,
    `optax.lookahead`), functions of the parameters (line searches). So is what decides by the
    shapes that it sees, as a mask or labels given as a function may: it sees the rows touched.

    Args:
      tx: any optax transformation that keeps, for a table, state of one entry or one row per row.

    Returns:
      A transformation whose `init` is that of `tx`: the state is the same for dense gradients and
      for `RowGrads`, and `update` takes either at any step.

    Raises:
      ValueError: `tx` is no transformation. By `update`, and by `init` where the parameters say
        which of them are tables (on a mesh, in `qrhash.nnx`): it is one of those refused, or keeps
        state for a table that does not go by rows (as Adafactor's columns). By `update`:
        gradients do not fit the parameters.

    >>> from qrhash.optim.accumulators import adagrad
    >>> tx = touched_rows(adagrad(0.1))
    >>> table = jnp.ones((1000, 2))
    >>> grads = RowGrads(jnp.array([7, 7]), jnp.ones((2, 2)), num_rows=1000)
    >>> updates, state = tx.update(grads, tx.init(table), table)
    >>> print(apply_updates(table, updates)[6:8].round(3))
    [[1.    1.   ]
     [0.901 0.901]]
    """
    check_transformation(tx)
    tx = optax.with_extra_args_support(tx)
    # What was found right: an eager loop need not find out at every step.
    checked: dict[Any, bool] = {}

    def init(params: PyTree) -> PyTree:
        check_at_start(tx, params)
        shardings = state_shardings(tx, params)
        if shardings is None:
            return tx.init(params)
        # What has a table's shape alone, XLA would keep on every device.
        return jax.jit(tx.init, out_shardings=shardings)(params)

    def update(
        grads: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        if not any(map(is_row_grads, jax.tree.leaves(grads, is_leaf=is_row_grads))):
            return tx.update(grads, state, params, **extra_args)
        transformation, arguments = _prepare(tx, grads, state, params, extra_args)
        is_row_wise = _check_once(transformation, arguments, checked)
        updates, new = _update(transformation, arguments, is_row_wise=is_row_wise)
        tree, state_tree = transformation.tree, transformation.state_tree
        return jax.tree.unflatten(tree, updates), jax.tree.unflatten(state_tree, new)

    return optax.GradientTransformationExtraArgs(init, update)


def _prepare(
    tx: optax.GradientTransformationExtraArgs,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    extra_args: Mapping[str, Any],
) -> tuple[Transformation, Arguments]:
    """The transformation with the structure of what it is applied to, and that as leaves."""
    refuse_what_waits(params, state)
    leaves, tree = jax.tree.flatten(grads, is_leaf=is_row_grads)
    state_leaves, state_tree = jax.tree.flatten(state)
    of_params: list[Any] | None = None
    if params is not None:
        of_params = _in_structure_of(grads, params)
        for leaf, param in zip(leaves, of_params, strict=True):
            if is_row_grads(leaf):
                leaf.check(param)
    _refuse_parts(leaves)
    row_axes = {n: leaf.storage.row_axis for n, leaf in enumerate(leaves) if is_row_grads(leaf)}
    owners = owners_of(tx, tree, leaves, row_axes)
    transformation = Transformation(tx, tree, state_tree, row_axes, owners, refusing(extra_args))
    return transformation, Arguments(leaves, state_leaves, of_params)


def _check_once(
    transformation: Transformation, arguments: Arguments, checked: dict[Any, bool]
) -> bool:
    """Raises a ValueError unless the transformation treats rows alone.

    Returns:
      Whether it also treats every row alike, whatever the others are.
    """
    grads, state, params = arguments
    whole = Arguments(
        list(map(_type_of, grads)),
        list(map(_type_of, state)),
        None if params is None else list(map(_type_of, params)),
    )
    rows = {n: arguments.grads[n].values.shape[-2] for n in transformation.row_axes}
    leaves, tree = jax.tree.flatten(tuple(whole))
    types = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    trees = (transformation.tree, transformation.state_tree, tree)
    key = (*trees, types, tuple(rows.items()))
    # Extra arguments may be anything, and decide anything.
    if key not in checked or transformation.extra_args:
        transformation.check(whole, rows)
        # Asked only where it matters: it traces the transformation once more.
        are_many = any(goes_in_blocks(grads[number]) for number in transformation.row_axes)
        checked[key] = are_many and is_row_wise(transformation, whole)
    return checked[key]


# --- one step -------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """What a transformation sees of a table: arrays [m, ...], the same rows of each."""

    gradients: Any
    param: Any  # None where the transformation gets no parameters
    state: list[Any]


class _Part(NamedTuple):
    """What a step makes of touched rows of a table: their numbers, updates and new state."""

    indices: jax.Array
    updates: jax.Array
    state: list[jax.Array]


def _update(
    tx: Transformation, arguments: Arguments, *, is_row_wise: bool
) -> tuple[list[Any], list[Any]]:
    """Leaves of the updates and of the new state.

    On a mesh gradients are sent to their rows first. Where an exchange of fixed size has too little
    room, the step runs on what the other one brings: on larger arrays, hence a second part.
    """
    tables = {n: arguments.grads[n] for n in tx.row_axes}
    packed = {n: pack for n, grads in tables.items() if (pack := grads.pack()) is not None}
    merged = {n: grads.merge() for n, grads in tables.items() if n not in packed}
    blocks = {n: grads for n, grads in merged.items() if is_row_wise and goes_in_blocks(grads)}
    merged = {n: grads for n, grads in merged.items() if n not in blocks}
    whole, arguments = arguments, without_rows(tx, arguments, blocks)
    if packed:
        parts, rest = _on_packed(tx, arguments, merged, packed)
    else:
        touched, rest = _on_rows(tx, arguments, merged)
        parts = {n: [part] for n, part in touched.items()}
    updates, state = rest
    for number, of_table in parts.items():
        grads = tables[number]
        updates[number] = _as_grads(grads, of_table)
        for count, place in enumerate(tx.state_of(number)):
            state[place] = _write(grads, arguments.state[place], of_table, count)
    for number, grads in blocks.items():
        made = update_in_blocks(tx, whole, number, grads)
        updates[number] = grads.as_merged(grads.indices, made.updates)
        for place, array in zip(tx.state_of(number), made.state, strict=True):
            state[place] = array
    return updates, state


def _on_rows(
    tx: Transformation, arguments: Arguments, merged: Mapping[int, RowGrads]
) -> tuple[dict[int, _Part], Any]:
    """What comes of the rows that merged gradients name, and of all else."""
    grads, state = list(arguments.grads), list(arguments.state)
    params = None if arguments.params is None else list(arguments.params)
    indices = {}
    # 1. In place of each table, the touched rows of its gradient, of itself and of its state.
    for number, of_table in merged.items():
        param = None if params is None else params[number]
        places = tx.state_of(number)
        arrays = _Rows(None, param, [state[place] for place in places])
        rows, indices[number] = _read(of_table, arrays)
        grads[number] = rows.gradients
        if params is not None:
            params[number] = rows.param
        for place, each in zip(places, rows.state, strict=True):
            state[place] = each
    # 2. The transformation, on these.
    updates, new = tx(Arguments(grads, state, params))
    # 3. What it made of tables, and the rest.
    parts = {
        n: _Part(indices[n], updates[n], [new[place] for place in tx.state_of(n)]) for n in merged
    }
    rest = (
        [None if n in merged else each for n, each in enumerate(updates)],
        [each if o is None else None for each, o in zip(new, tx.owners, strict=True)],
    )
    return parts, rest


def _on_packed(
    tx: Transformation,
    arguments: Arguments,
    merged: Mapping[int, RowGrads],
    packed: Mapping[int, Packed],
) -> tuple[dict[int, list[_Part]], Any]:
    """The same where some gradients are yet to be sent; two parts of each of their tables.

    Both branches of a conditional must give arrays of the same shapes, but where all gradients go
    everywhere there are more rows than where each goes to its owner. So each branch has a part of
    either shape, and the one that it does not fill names no rows.
    """

    def run_with(send: Callable[[Packed], tuple[jax.Array, jax.Array]]) -> Any:
        sent = {n: arguments.grads[n].as_merged(*send(each)) for n, each in packed.items()}
        parts, rest = _on_rows(tx, arguments, {**merged, **sent})
        return {n: parts.pop(n) for n in packed}, (parts, rest)

    few = functools.partial(run_with, lambda each: each.send())
    many = functools.partial(run_with, lambda each: each.send_all())
    of_few, of_many = (jax.eval_shape(lambda run=run: run()[0]) for run in (few, many))

    def fits() -> Any:  # the usual way
        parts, others = few()
        return parts, _naming_no_rows(of_many), others

    def overflows() -> Any:  # too little room: everything, everywhere
        parts, others = many()
        return _naming_no_rows(of_few), parts, others

    overflow = functools.reduce(operator.or_, (each.overflows for each in packed.values()))
    first, second, (parts, rest) = jax.lax.cond(overflow, overflows, fits)
    by_table = {n: [part] for n, part in parts.items()}
    return by_table | {n: [first[n], second[n]] for n in packed}, rest


def _read(grads: RowGrads, arrays: _Rows) -> tuple[_Rows, jax.Array]:
    """The touched rows of a table and of its state, and their numbers to write by."""
    leaves, tree = jax.tree.flatten(arrays)
    if not leaves:
        return arrays._replace(gradients=grads.values), grads.indices
    found, indices = grads.storage.read(leaves, grads.indices)
    return jax.tree.unflatten(tree, found)._replace(gradients=grads.values), indices


def _naming_no_rows(shapes: dict[int, _Part]) -> dict[int, _Part]:
    """Parts of these shapes that change nothing."""
    zeros = jax.tree.map(
        lambda each: jnp.zeros(each.shape, each.dtype, device=each.sharding), shapes
    )
    return {n: part._replace(indices=part.indices + INT32_MAX) for n, part in zeros.items()}


def _as_grads(grads: RowGrads, parts: Sequence[_Part]) -> RowGrads:
    """The updates of a table, given its gradients."""
    first, *others = (grads.as_merged(part.indices, part.updates) for part in parts)
    return first.replace(spill=others[0]) if others else first


def _write(grads: RowGrads, array: jax.Array, parts: Sequence[_Part], count: int) -> jax.Array:
    """One array of a table's state with the touched rows in place of the old ones."""
    for part in parts:
        values = part.state[count].astype(array.dtype)
        seldom = part is not parts[0]
        array = grads.storage.set(array, part.indices, values, seldom=seldom)
    return array


def _type_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array; of `RowGrads` those of the table."""
    leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _in_structure_of(grads: Any, params: Any) -> list[Any]:
    """Leaves of the parameters, one for each of the gradients."""
    try:
        same_tree = jax.tree.map(lambda _, param: param, grads, params, is_leaf=is_row_grads)
    except ValueError as error:
        raise ValueError(
            f"touched_rows needs parameters in the structure of the gradients: {error}"
        ) from error
    return jax.tree.leaves(same_tree)


def _refuse_parts(leaves: Sequence[Any]) -> None:
    """Raises a ValueError if something outside has taken `RowGrads` for a tree of arrays."""
    for leaf in leaves:
        if is_row_grads(leaf) and not (
            hasattr(leaf.values, "dtype") and hasattr(leaf.indices, "dtype")
        ):
            raise ValueError(
                "RowGrads came apart on their way to touched_rows, by masks or labels given as a "
                "function outside of it: the whole optimizer goes inside, "
                "touched_rows(optax.partition(...))."
            )


def apply_updates(params: Any, updates: Any) -> Any:
    """`optax.apply_updates` that also takes `RowGrads`: these change only the rows they name.

    Under `jax.jit` with donated parameters, tables are updated in place.

    Args:
      params: a tree of parameters.
      updates: a tree of the same structure, with arrays, `RowGrads`, or None for no change.

    Returns:
      The tree of new parameters, each of its old dtype.
    """

    def apply(update: Any, param: Any) -> Any:
        # An array + `RowGrads` is the array with these rows updated.
        return param if update is None else optax.apply_updates(param, update)

    return jax.tree.map(apply, updates, params, is_leaf=lambda u: u is None or is_row_grads(u))
