"""Optimizers on the touched rows alone.

For Adagrad and for plain SGD a zero gradient changes nothing, neither the row nor its state. So
it is exactly the dense optimizer, not an approximation, to gather the state of the rows that a
batch touched, run the transformation on these, and scatter the state back. `touched_rows` does
that with any optax transformation that treats rows alone; the cost of a step then depends on the
batch and no more on the table.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from qrhash.rowgrads import (
    RowGrads,
    check_merge_method,
    is_row_grads,
    take_same_rows,
)
from qrhash.tables import wide_dtype

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

    Accumulation over steps (`optax.MultiSteps`, `optax.apply_every`) is refused, as it would
    release only the rows of the last step: add up `RowGrads` instead.

    Args:
      tx: any optax transformation that keeps, for a table, state of one entry or one row per row.
      merge_method: how duplicates are merged, see `RowGrads.merge`.

    Returns:
      A transformation whose `init` is that of `tx`: the state is the same for dense gradients and
      for `RowGrads`, and `update` takes either at any step.

    Raises (by `update`):
      ValueError: `tx` keeps state for a table that does not go by rows (as Adafactor's columns), or
        accumulates over steps; gradients do not fit the parameters.

    >>> tx = touched_rows(adagrad(0.1))
    >>> table = jnp.ones((1000, 2))
    >>> grads = RowGrads(jnp.array([7, 7]), jnp.ones((2, 2)), num_rows=1000)
    >>> updates, state = tx.update(grads, tx.init(table), table)
    >>> print(apply_updates(table, updates)[6:8].round(3))
    [[1.    1.   ]
     [0.901 0.901]]
    """
    tx = optax.with_extra_args_support(tx)
    check_merge_method(merge_method)

    def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(grads, is_leaf=is_row_grads)
        if not any(map(is_row_grads, leaves)):
            return tx.update(grads, state, params, **extra_args)
        _refuse_accumulation(state)
        old_params = []
        if params is not None:
            same_tree = jax.tree.map(lambda _, param: param, grads, params, is_leaf=is_row_grads)
            old_params = jax.tree.leaves(same_tree)
            for leaf, param in zip(leaves, old_params, strict=True):
                if is_row_grads(leaf):
                    leaf.check(param)
        tables = [
            _Touched(leaf.merge(merge_method)) if is_row_grads(leaf) else None for leaf in leaves
        ]
        values = [
            leaf if table is None else table.values
            for leaf, table in zip(leaves, tables, strict=True)
        ]
        old, state_tree = jax.tree.flatten(state)
        owners = [None if owner is None else tables[owner] for owner in _owners(tx, grads)]
        of_params = [] if params is None else tables
        read = _read([*old_params, *old], [*of_params, *owners])
        updates, state = tx.update(
            jax.tree.unflatten(tree, values),
            jax.tree.unflatten(state_tree, read[len(of_params) :]),
            None if params is None else jax.tree.unflatten(tree, read[: len(of_params)]),
            **extra_args,
        )
        new = [
            leaf if table is None else table.write(array, leaf)
            for leaf, array, table in zip(jax.tree.leaves(state), old, owners, strict=True)
        ]
        updates = [
            leaf if table is None else table.as_grads(leaf)
            for leaf, table in zip(jax.tree.leaves(updates), tables, strict=True)
        ]
        return jax.tree.unflatten(tree, updates), jax.tree.unflatten(state_tree, new)

    return optax.GradientTransformationExtraArgs(tx.init, update)


class _Touched:
    """The rows of one table that are touched in one update."""

    def __init__(self, merged: RowGrads) -> None:
        self.values = merged.values
        self._rows = merged.rows
        self._num_rows = merged.num_rows

    def read(self, arrays: Sequence[chex.Array]) -> tuple[jax.Array, ...]:
        """The rows [m, ...] of the table, and of state that goes by its rows; only once."""
        rows, self._rows = take_same_rows(arrays, self._rows, fill_value=0.0)
        return rows

    def write(self, array: chex.Array, values: chex.Array) -> jax.Array:
        """The array with these rows in place of the old ones."""
        return array.at[self._rows].set(
            values.astype(array.dtype),
            mode="drop",
            wrap_negative_indices=False,
            unique_indices=True,
        )

    def as_grads(self, values: chex.Array) -> RowGrads:
        """Updates [m, width] of the rows."""
        return RowGrads(self._rows, values, self._num_rows, is_merged=True)


def _refuse_accumulation(state: Any) -> None:
    accumulating = (optax.MultiStepsState, optax.ApplyEvery)
    is_accumulating = lambda node: isinstance(node, accumulating)  # noqa: E731
    if any(map(is_accumulating, jax.tree.leaves(state, is_leaf=is_accumulating))):
        raise ValueError(
            "touched_rows cannot hold a transformation that accumulates over steps, such as "
            "optax.MultiSteps: add up the RowGrads of several batches, g1 + g2, instead."
        )


def _owners(tx: optax.GradientTransformation, grads: Any) -> list[int | None]:
    """For each leaf of the state, by which leaf of the gradients its rows go, if by any.

    A leaf goes by the rows of a table if it grows with the table: seen on shapes alone.
    """

    def state_shapes(more_rows: int, more_width: int) -> list[tuple[int, ...]]:
        leaves, tree = jax.tree.flatten(grads, is_leaf=is_row_grads)
        shapes = []
        for number, leaf in enumerate(leaves):
            shape = leaf.shape
            if is_row_grads(leaf):
                rows, *width = shape
                shape = (rows + more_rows * (number + 1), *(n + more_width for n in width))
            shapes.append(jax.ShapeDtypeStruct(shape, leaf.dtype))
        state = jax.eval_shape(tx.init, jax.tree.unflatten(tree, shapes))
        return [leaf.shape for leaf in jax.tree.leaves(state)]

    owners: list[int | None] = []
    for shape, longer, wider in zip(
        state_shapes(0, 0), state_shapes(1, 0), state_shapes(0, 1), strict=True
    ):
        by_rows = longer != shape
        if (by_rows and longer[1:] != shape[1:]) or (not by_rows and wider != shape):
            raise ValueError(
                f"touched_rows needs state of one entry or one row per row of a table, but this "
                f"transformation keeps an array of shape {shape} for one: train the table densely."
            )
        owners.append(longer[0] - shape[0] - 1 if by_rows else None)
    return owners


def _read(leaves: Sequence[Any], owners: Sequence[_Touched | None]) -> list[Any]:
    """The leaves, with the touched rows in place of those that go by a table's rows."""
    read = list(leaves)
    for table in {id(owner): owner for owner in owners if owner is not None}.values():
        places = [k for k, owner in enumerate(owners) if owner is table]
        for k, rows in zip(places, table.read([leaves[k] for k in places]), strict=True):
            read[k] = rows
    return read


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
