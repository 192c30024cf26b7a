"""Optimizers on the touched rows alone.

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

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from qrhash.rowgrads import RowGrads, is_row_grads
from qrhash.rows import (
    INT32_MAX,
    check_merge_method,
    read_rows,
    set_rows,
    wide_dtype,
)
from qrhash.sharding import Parcels, is_sharded_table, read_in_shards, set_in_shards
from qrhash.transformations import (
    Arguments,
    Transformation,
    check_transformation,
    decides_by_shapes,
    deciding_by_values_refused,
    refuse_what_waits,
    refusing,
)

# (initial accumulator, eps, whether eps stands inside the root)
_CONVENTIONS = {
    "optax": (0.1, 1e-7, True),
    "torch": (0.0, 1e-10, False),
    "tensorflow": (0.1, 0.0, True),
    "fbgemm": (0.0, 1e-8, False),
}


def touched_rows(
    tx: optax.GradientTransformation, *, merge_method: str | None = None
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
      merge_method: how duplicates are merged, see `RowGrads.merge`.

    Returns:
      A transformation whose `init` is that of `tx`: the state is the same for dense gradients and
      for `RowGrads`, and `update` takes either at any step.

    Raises:
      ValueError: `tx` is no transformation. By `update`, and by `init` where the parameters say
        which of them are tables (on a mesh, in `qrhash.nnx`): it is one of those refused, or keeps
        state for a table that does not go by rows (as Adafactor's columns). By `update`:
        gradients do not fit the parameters.

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
    check_merge_method(merge_method)
    # What was found right: an eager loop need not find out at every step.
    checked: set[Any] = set()

    def init(params: Any) -> Any:
        _check_at_start(tx, params)
        shardings = _state_shardings(tx, params)
        if shardings is None:
            return tx.init(params)
        # What has a table's shape alone, XLA would keep on every device.
        return jax.jit(tx.init, out_shardings=shardings)(params)

    def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if not any(map(is_row_grads, jax.tree.leaves(grads, is_leaf=is_row_grads))):
            return tx.update(grads, state, params, **extra_args)
        return _Step(tx, grads, state, params, extra_args, checked).run(merge_method)

    return optax.GradientTransformationExtraArgs(init, update)


class _Rows(NamedTuple):
    """What a transformation sees of a table: arrays [m, ...], the same rows of each."""

    gradients: Any
    param: Any  # None where the transformation gets no parameters
    state: list[Any]


class _Part(NamedTuple):
    """What a step makes of touched rows of a table: their numbers, updates and new state."""

    rows: jax.Array
    updates: jax.Array
    state: list[jax.Array]


class _Step:
    """One update of a transformation that sees the touched rows in place of tables."""

    def __init__(
        self,
        tx: optax.GradientTransformationExtraArgs,
        grads: Any,
        state: Any,
        params: Any,
        extra_args: dict[str, Any],
        checked: set[Any],
    ) -> None:
        refuse_what_waits(params, state)
        self._leaves, self._tree = jax.tree.flatten(grads, is_leaf=is_row_grads)
        self._state, self._state_tree = jax.tree.flatten(state)
        self._params: list[Any] | None = None
        if params is not None:
            self._params = _in_structure_of(grads, params)
            for leaf, param in zip(self._leaves, self._params, strict=True):
                if is_row_grads(leaf):
                    leaf.check(param)
        _refuse_parts(self._leaves)
        self._owners = _owners(tx, grads)
        self._tx, self._extra_args = tx, refusing(extra_args)
        self._check(checked)

    def _check(self, checked: set[Any]) -> None:
        """Raises a ValueError unless the transformation treats rows alone."""
        tables = {n: leaf for n, leaf in enumerate(self._leaves) if is_row_grads(leaf)}
        rows = {n: table.values.shape[-2] for n, table in tables.items()}
        params = None if self._params is None else list(map(_type_of, self._params))
        whole = Arguments(
            list(map(_type_of, self._leaves)), list(map(_type_of, self._state)), params
        )
        leaves, tree = jax.tree.flatten(tuple(whole))
        types = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = (self._tree, self._state_tree, tree, types, tuple(rows.items()))
        # Extra arguments may be anything, and decide anything.
        if key in checked and not self._extra_args:
            return
        axes = {n: int(table.sharding is not None) for n, table in tables.items()}
        transformation = Transformation(
            self._tx, self._tree, self._state_tree, axes, self._owners, self._extra_args
        )
        transformation.check(whole, rows)
        checked.add(key)

    def run(self, method: str | None) -> tuple[Any, Any]:
        """Updates and new state.

        On a mesh gradients are sent to their rows first. Where an exchange of fixed size has too
        little room, the step runs on what the other one brings: on larger arrays, hence a second
        part.
        """
        merged, parcels = {}, {}
        for number, leaf in enumerate(self._leaves):
            if is_row_grads(leaf):
                leaf.check()
                parcel = None if leaf.is_merged else leaf.parcels(method)
                if parcel is None:
                    merged[number] = leaf.merge(method)
                else:
                    parcels[number] = parcel
        if parcels:
            updates, state = self._write(*self._on_parcels(merged, parcels))
        else:
            parts, rest = self._on_rows(merged)
            updates, state = self._write({n: [part] for n, part in parts.items()}, rest)
        return jax.tree.unflatten(self._tree, updates), jax.tree.unflatten(self._state_tree, state)

    def _call(self, rows: Mapping[int, _Rows]) -> tuple[list[Any], list[Any]]:
        """Leaves of the updates and of the state, from the rows of all tables."""
        grads, state = list(self._leaves), list(self._state)
        params = None if self._params is None else list(self._params)
        for number, of_table in rows.items():
            grads[number] = of_table.gradients
            if params is not None:
                params[number] = of_table.param
            for place, each in zip(self._places(number), of_table.state, strict=True):
                state[place] = each
        updates, new = self._tx.update(
            jax.tree.unflatten(self._tree, grads),
            jax.tree.unflatten(self._state_tree, state),
            None if params is None else jax.tree.unflatten(self._tree, params),
            **self._extra_args,
        )
        return jax.tree.leaves(updates), jax.tree.leaves(new)

    def _places(self, table: int) -> list[int]:
        """Which leaves of the state go by the rows of a table."""
        return [place for place, owner in enumerate(self._owners) if owner == table]

    def _arrays(self, table: int) -> _Rows:
        """The arrays of which rows are read; no gradients."""
        param = None if self._params is None else self._params[table]
        return _Rows(None, param, [self._state[place] for place in self._places(table)])

    def _on_rows(self, merged: Mapping[int, RowGrads]) -> tuple[dict[int, _Part], Any]:
        """What comes of the rows that merged gradients name, and of all else."""
        numbers, rows = {}, {}
        for number, grads in merged.items():
            rows[number], numbers[number] = _read(grads, self._arrays(number))
        updates, state = self._call(rows)
        parts = {
            n: _Part(numbers[n], updates[n], [state[place] for place in self._places(n)])
            for n in merged
        }
        rest = (
            [None if n in merged else each for n, each in enumerate(updates)],
            [each if o is None else None for each, o in zip(state, self._owners, strict=True)],
        )
        return parts, rest

    def _on_parcels(
        self, merged: Mapping[int, RowGrads], parcels: Mapping[int, Parcels]
    ) -> tuple[dict[int, list[_Part]], Any]:
        def run_with(send: Callable[[Parcels], tuple[jax.Array, jax.Array]]) -> Any:
            sent = {n: self._leaves[n].in_shards(*send(parcel)) for n, parcel in parcels.items()}
            parts, rest = self._on_rows({**merged, **sent})
            return {n: parts.pop(n) for n in parcels}, (parts, rest)

        def few() -> Any:
            parts, others = run_with(Parcels.send)
            shapes = jax.eval_shape(lambda: run_with(Parcels.send_all)[0])
            return parts, _naming_no_rows(shapes), others

        def many() -> Any:
            parts, others = run_with(Parcels.send_all)
            return _naming_no_rows(jax.eval_shape(lambda: run_with(Parcels.send)[0])), parts, others

        overflows = functools.reduce(operator.or_, (each.overflows for each in parcels.values()))
        first, second, (parts, rest) = jax.lax.cond(overflows, many, few)
        by_table = {n: [part] for n, part in parts.items()}
        return by_table | {n: [first[n], second[n]] for n in parcels}, rest

    def _write(self, parts: Mapping[int, list[_Part]], rest: Any) -> tuple[list[Any], list[Any]]:
        """Leaves of the updates and of the state, the touched rows of tables in their places."""
        updates, state = rest
        for number, of_table in parts.items():
            grads = self._leaves[number]
            updates[number] = _as_grads(grads, of_table)
            for count, place in enumerate(self._places(number)):
                state[place] = _write(grads, self._state[place], of_table, count)
        return updates, state


def _read(grads: RowGrads, arrays: _Rows) -> tuple[_Rows, jax.Array]:
    """The touched rows of a table and of its state, and their numbers to write by."""
    leaves, tree = jax.tree.flatten(arrays)
    if not leaves:
        return arrays._replace(gradients=grads.values), grads.rows
    if grads.sharding is None:
        found, rows = read_rows(leaves, grads.rows, fill_value=0.0)
    else:
        found, rows = read_in_shards(grads.sharding, leaves, grads.rows)
    return jax.tree.unflatten(tree, found)._replace(gradients=grads.values), rows


def _naming_no_rows(shapes: dict[int, _Part]) -> dict[int, _Part]:
    """Parts of these shapes that change nothing."""
    zeros = jax.tree.map(
        lambda each: jnp.zeros(each.shape, each.dtype, device=each.sharding), shapes
    )
    return {n: part._replace(rows=part.rows + INT32_MAX) for n, part in zeros.items()}


def _as_grads(grads: RowGrads, parts: Sequence[_Part]) -> RowGrads:
    """The updates of a table, given its gradients."""
    first, *others = (
        grads.replace(rows=part.rows, values=part.updates, is_merged=True, spill=None)
        for part in parts
    )
    return first.replace(spill=others[0]) if others else first


def _write(grads: RowGrads, array: jax.Array, parts: Sequence[_Part], count: int) -> jax.Array:
    """One array of a table's state with the touched rows in place of the old ones."""
    for part in parts:
        values = part.state[count].astype(array.dtype)
        if grads.sharding is None:
            array = set_rows(array, part.rows, values)
        else:
            seldom = part is not parts[0]
            array = set_in_shards(grads.sharding, array, part.rows, values, seldom=seldom)
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
            hasattr(leaf.values, "dtype") and hasattr(leaf.rows, "dtype")
        ):
            raise ValueError(
                "RowGrads came apart on their way to touched_rows, by masks or labels given as a "
                "function outside of it: the whole optimizer goes inside, "
                "touched_rows(optax.partition(...))."
            )


class _NotByRowsError(ValueError):
    """State for a table that does not go by its rows: dense gradients may have it."""


def _check_at_start(tx: optax.GradientTransformationExtraArgs, params: Any) -> None:
    """Raises a ValueError if a transformation does not suit what says that it is a table."""

    def is_table(node: Any) -> bool:
        return is_sharded_table(node) or getattr(node, "is_large", False) is True

    nodes = jax.tree.leaves(params, is_leaf=is_table)
    marks = [mark for node in nodes for mark in [is_table(node)] * len(jax.tree.leaves(node))]
    if not any(marks):
        return
    leaves, tree = jax.tree.flatten(params)
    whole = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    state = jax.eval_shape(tx.init, jax.tree.unflatten(tree, whole))
    refuse_what_waits(params, state)
    tables = {n: leaf for n, (leaf, mark) in enumerate(zip(whole, marks, strict=True)) if mark}
    # A table is an array [rows, width], on a mesh [shards, rows, width].
    axes = {n: leaf.ndim - 2 for n, leaf in tables.items()}
    state_leaves, state_tree = jax.tree.flatten(state)
    try:
        owners = _owners_of(tx, tree, whole, axes)
    except _NotByRowsError:
        return  # As long as all gradients are dense that is nobody's business.
    transformation = Transformation(tx, tree, state_tree, axes, owners, extra_args={})
    try:
        transformation.check(Arguments(whole, state_leaves, whole), dict.fromkeys(tables, 2))
    except (TypeError, KeyError):
        return  # It needs extra arguments: what it does is seen when they are there.


def _shapes_of_state(
    tx: optax.GradientTransformation, tree: Any, shapes: Sequence[Any], leaves: Sequence[Any]
) -> list[tuple[int, ...]]:
    """Shapes of the state's leaves, if the parameters had these shapes."""
    abstract = [
        jax.ShapeDtypeStruct(shape, leaf.dtype) for shape, leaf in zip(shapes, leaves, strict=True)
    ]
    with deciding_by_values_refused():
        state = jax.eval_shape(tx.init, jax.tree.unflatten(tree, abstract))
    return [leaf.shape for leaf in jax.tree.leaves(state)]


def _state_shardings(tx: optax.GradientTransformation, params: Any) -> Any:
    """Where the state belongs: with the parameters that it goes by. None if they are on no mesh."""
    leaves, tree = jax.tree.flatten(params)
    of_params = [
        NamedSharding(node.sharding.mesh, node.sharding.table_spec(node.array.ndim))
        if is_sharded_table(node)
        else _sharding_of(node)
        for node in jax.tree.leaves(params, is_leaf=is_sharded_table)
    ]
    mesh = next((each.mesh for each in of_params if each is not None), None)
    if mesh is None:
        return None
    shapes = [leaf.shape for leaf in leaves]
    longer = [
        shape if where is None or not shape else (shape[0] + number + 1, *shape[1:])
        for number, (shape, where) in enumerate(zip(shapes, of_params, strict=True))
    ]
    # Every parameter's first axis grows by a number of its own, and with it the state beside it.
    by_growth = {
        (shape[:1], grown[:1]): where
        for shape, grown, where in zip(shapes, longer, of_params, strict=True)
    }
    shardings = []
    for shape, grown in zip(
        _shapes_of_state(tx, tree, shapes, leaves),
        _shapes_of_state(tx, tree, longer, leaves),
        strict=True,
    ):
        along_first = shape != grown and shape[1:] == grown[1:]
        owner = by_growth.get((shape[:1], grown[:1])) if along_first else None
        spec = () if owner is None else owner.spec[: len(shape)]
        shardings.append(NamedSharding(mesh, PartitionSpec(*spec)))
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(tx.init, params)), shardings)


def _sharding_of(leaf: Any) -> NamedSharding | None:
    """Where an array is that is no tracer, if that is on a mesh."""
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return None
    return leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None


def _owners(tx: optax.GradientTransformation, grads: Any) -> list[int | None]:
    """For each leaf of the state, by which leaf of the gradients its rows go, if by any."""
    leaves, tree = jax.tree.flatten(grads, is_leaf=is_row_grads)
    # Rows are along the first axis, on a mesh along the second.
    axes = {
        n: int(leaf.sharding is not None) for n, leaf in enumerate(leaves) if is_row_grads(leaf)
    }
    return _owners_of(tx, tree, leaves, axes)


def _owners_of(
    tx: optax.GradientTransformation, tree: Any, leaves: Sequence[Any], row_axes: Mapping[int, int]
) -> list[int | None]:
    """The same, given the axis of the rows of each leaf that is a table.

    A leaf goes by the rows of a table if it grows with the table: seen on shapes alone.
    """

    def state_shapes(more_rows: int, more_width: int) -> list[tuple[int, ...]]:
        shapes = [leaf.shape for leaf in leaves]
        for number in row_axes:
            *shards, rows, width = leaves[number].shape
            shapes[number] = (*shards, rows + more_rows * (number + 1), width + more_width)
        return _shapes_of_state(tx, tree, shapes, leaves)

    of_sizes = [state_shapes(0, 0), state_shapes(1, 0), state_shapes(0, 1)]
    if len(set(map(len, of_sizes))) > 1:
        raise decides_by_shapes()
    owners: list[int | None] = []
    for shape, longer, wider in zip(*of_sizes, strict=True):
        grown = [axis for axis, (a, b) in enumerate(zip(shape, longer, strict=False)) if a != b]
        owner, fits = None, wider == shape
        if grown:
            number = longer[grown[0]] - shape[grown[0]] - 1
            owner = number if number in row_axes else None
            axis = 0 if owner is None else row_axes[owner]
            is_by_rows = grown == [axis] and wider[: axis + 1] == shape[: axis + 1]
            fits = owner is not None and is_by_rows
        if not fits:
            raise _NotByRowsError(
                f"touched_rows needs state of one entry or one row per row of a table, but this "
                f"transformation keeps an array of shape {shape} for one: train the table densely."
            )
        owners.append(owner)
    return owners


def adagrad(
    learning_rate: optax.ScalarOrSchedule,
    *,
    convention: str = "optax",
    initial_accumulator_value: float | None = None,
    eps: float | None = None,
) -> optax.GradientTransformation:
    """Adagrad, with one accumulator per entry, as several libraries define it.

        a <- a + g**2,    w <- w - learning_rate * g / sqrt(a + eps)       or  / (sqrt(a) + eps)

    Args:
      learning_rate: a number or a schedule.
      convention: whose defaults, and where eps stands:
        "optax": a starts at 0.1, eps 1e-7 inside the root;
        "torch": at 0, eps 1e-10 outside (`torch.optim.Adagrad`);
        "tensorflow": at 0.1, no eps (`tf.compat.v1.train.AdagradOptimizer`, DeepRec);
        "fbgemm": at 0, eps 1e-8 outside (EXACT_ADAGRAD).
      initial_accumulator_value: where a starts, instead. With a mean loss the squared gradients of
        a row are near 1e-8, and 0.1 all but freezes the tables.
      eps: instead of the convention's.

    Returns:
      An optax transformation, for dense gradients, or inside `touched_rows`. Its accumulators are
      of the parameters' dtype, but float32 at least.

    Raises:
      ValueError: an unknown convention.

    Source: Duchi et al. 2011, "Adaptive Subgradient Methods".
    """
    scale = _scale_by_accumulated(convention, initial_accumulator_value, eps, per_row=False)
    return optax.chain(scale, optax.scale_by_learning_rate(learning_rate))


def rowwise_adagrad(
    learning_rate: optax.ScalarOrSchedule,
    *,
    convention: str = "optax",
    initial_accumulator_value: float | None = None,
    eps: float | None = None,
) -> optax.GradientTransformation:
    """Adagrad with one accumulator per row, of the mean of the row's squared gradients.

    The state is as many times smaller as a row is wide. An array of parameters [..., width] has
    accumulators [...].

    Args:
      learning_rate: a number or a schedule.
      convention: as for `adagrad`; "fbgemm" is EXACT_ROWWISE_ADAGRAD.
      initial_accumulator_value: where an accumulator starts, instead of at the convention's value.
      eps: instead of the convention's.

    Returns:
      An optax transformation, for dense gradients, or inside `touched_rows`.

    Raises:
      ValueError: an unknown convention.

    Source: FBGEMM's and TorchRec's row-wise Adagrad (Mudigere et al. 2022, arXiv 2104.05158).
    """
    scale = _scale_by_accumulated(convention, initial_accumulator_value, eps, per_row=True)
    return optax.chain(scale, optax.scale_by_learning_rate(learning_rate))


class AccumulatorState(NamedTuple):
    """State of Adagrad.

    Attributes:
      accumulators: for each parameter, sums of squared gradients.
    """

    accumulators: Any


def _scale_by_accumulated(
    convention: str, initial_accumulator_value: float | None, eps: float | None, per_row: bool
) -> optax.GradientTransformation:
    if convention not in _CONVENTIONS:
        raise ValueError(
            f"convention must be one of {', '.join(_CONVENTIONS)}, got {convention!r}."
        )
    start, usual_eps, inside = _CONVENTIONS[convention]
    start = start if initial_accumulator_value is None else initial_accumulator_value
    eps = usual_eps if eps is None else eps

    def init(params: Any) -> AccumulatorState:
        def accumulator(param: chex.Array) -> jax.Array:
            shape = param.shape[:-1] if per_row else param.shape
            return jnp.full(shape, start, wide_dtype(param.dtype))

        return AccumulatorState(jax.tree.map(accumulator, params))

    def accumulate(grad: chex.Array, sums: chex.Array) -> jax.Array:
        squares = jnp.square(grad.astype(sums.dtype))
        return sums + (_mean_over_row(squares) if per_row else squares)

    def scale(grad: chex.Array, sums: chex.Array) -> jax.Array:
        roots = jax.lax.rsqrt(sums + eps) if inside else 1 / (jnp.sqrt(sums) + eps)
        factors = jnp.where(sums > 0, roots, 0)
        factors = factors[..., None] if per_row and grad.ndim else factors
        return (grad.astype(sums.dtype) * factors).astype(grad.dtype)

    def update(grads: Any, state: AccumulatorState, params: Any = None) -> tuple[Any, Any]:
        del params
        if any(map(is_row_grads, jax.tree.leaves(grads, is_leaf=is_row_grads))):
            raise ValueError("RowGrads need the optimizer wrapped: qrhash.touched_rows(tx).")
        sums = jax.tree.map(accumulate, grads, state.accumulators)
        return jax.tree.map(scale, grads, sums), AccumulatorState(sums)

    return optax.GradientTransformation(init, update)


def _mean_over_row(squares: jax.Array) -> jax.Array:
    return jnp.mean(squares, axis=-1) if squares.ndim else squares


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
