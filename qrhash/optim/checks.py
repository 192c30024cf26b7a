"""What a transformation of gradients does, read off its program.

`qrhash.touched_rows` shows a transformation m rows in place of a table of N. That is right for what
treats rows alone. Some transformations do not: they decide by the shape that they see, as a mask
given as a function may, or keep parameters of earlier steps in their state and go back to them.
Functions stand in closures, out of sight; but JAX traces what optax chains, and the traced program
says what depends on what.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Var
from jax.extend.core.primitives import jit_p

from qrhash.optim.refusals import (
    INSTEAD,
    decides_by_shapes,
    deciding_by_values_refused,
    refuse_what_waits,
)
from qrhash.optim.state import NotByRowsError, owners_of
from qrhash.protocol import is_table
from qrhash.types import PyTree

# Numbers of rows for which a transformation is compared with that of whole tables, besides those of
# the batch: so a refusal does not wait for a batch of a certain size.
_TRIAL_ROWS = (2, 3)


class Arguments(NamedTuple):
    """What `tx.update` takes, as leaves.

    Attributes:
      grads: of the gradients, arrays or types.
      state: of the state.
      params: of the parameters; None where there are none.
    """

    grads: Sequence[Any]
    state: Sequence[Any]
    params: Sequence[Any] | None


class Transformation(NamedTuple):
    """A transformation with the structure of what it is applied to.

    Attributes:
      tx: the optax transformation.
      tree: structure of gradients and parameters.
      state_tree: structure of the state.
      row_axes: number of a leaf -> axis of its rows, for each table.
      owners: for each leaf of the state, the table by whose rows it goes, if any.
      extra_args: of `tx.update`.
    """

    tx: Any
    tree: Any
    state_tree: Any
    row_axes: Mapping[int, int]
    owners: Sequence[int | None]
    extra_args: Mapping[str, Any]

    def __call__(self, arguments: Arguments) -> tuple[list[Any], list[Any]]:
        """Leaves of the updates and of the new state."""
        grads, state, params = arguments
        updates, new = self.tx.update(
            jax.tree.unflatten(self.tree, grads),
            jax.tree.unflatten(self.state_tree, state),
            None if params is None else jax.tree.unflatten(self.tree, params),
            **self.extra_args,
        )
        return jax.tree.leaves(updates), jax.tree.leaves(new)

    def state_of(self, table: int) -> list[int]:
        """Which leaves of the state go by the rows of a table."""
        return [place for place, owner in enumerate(self.owners) if owner == table]

    def check(self, whole: Arguments, rows: Mapping[int, int]) -> None:
        """Raises a ValueError unless the transformation treats rows alone.

        Args:
          whole: types of what it takes, of whole tables.
          rows: how many rows of each table it is to be shown.
        """
        self._check_copies(whole)
        program = self.program(whole)
        self._check_averages(program, whole)
        trials: list[Mapping[int, int]] = [dict.fromkeys(rows, trial) for trial in _TRIAL_ROWS]
        # Of no rows at all, JAX makes other programs, and nothing comes of them; how many there are
        # in a program exported for any batch is not known.
        trials += [rows] * all(isinstance(number, int) and number for number in rows.values())
        for trial in trials:
            self._check_shapes(program, whole, trial)

    def program(self, arguments: Arguments) -> Any:
        """Its program, for arguments of these types."""
        leaves, tree = jax.tree.flatten(tuple(arguments))

        def flat(*leaves: Any) -> Any:
            return self(Arguments(*jax.tree.unflatten(tree, leaves)))

        with deciding_by_values_refused():
            return jax.make_jaxpr(flat)(*leaves)

    def _check_copies(self, whole: Arguments) -> None:
        """A state that starts as parameters is there to go back to them, or to average them."""

        def init(*params: Any) -> list[Any]:
            return jax.tree.leaves(self.tx.init(jax.tree.unflatten(self.tree, params)))

        program = jax.make_jaxpr(init)(*(whole.grads if whole.params is None else whole.params))
        names = [{"params"} if n in self.row_axes else set() for n in range(len(whole.grads))]
        self._refuse_copies("params" in each for each in _dependence(program.jaxpr, names))

    def _check_averages(self, program: Any, whole: Arguments) -> None:
        """The same of a state that takes up parameters in a step, without a gradient."""
        if whole.params is None:
            return
        tables = range(len(whole.grads))
        of_grads = [{"grads"} if n in self.row_axes else set() for n in tables]
        of_params = [{"params"} if n in self.row_axes else set() for n in tables]
        of_state: list[set[str]] = [set() for _ in whole.state]
        results = _dependence(program.jaxpr, [*of_grads, *of_state, *of_params])
        state = results[len(results) - len(whole.state) :]
        self._refuse_copies("params" in each and "grads" not in each for each in state)

    def _refuse_copies(self, copies: Iterator[bool]) -> None:
        found = zip(self.owners, copies, strict=True)
        if any(owner is not None and is_copy for owner, is_copy in found):
            raise ValueError(
                "touched_rows cannot hold a transformation that keeps parameters of earlier steps, "
                "or averages of them, in its state, such as optax.contrib.sam or schedule_free: "
                "rows touched in other steps would be left out when it goes back to them: "
                f"{INSTEAD}"
            )

    def _check_shapes(self, program: Any, whole: Arguments, rows: Mapping[int, int]) -> None:
        shown = self._cut(whole, rows)
        sizes = {whole.grads[n].shape[axis] for n, axis in self.row_axes.items()}
        ratios = {size / count for size in sizes for count in rows.values()}
        try:
            agrees = _agree(program.jaxpr, self.program(shown).jaxpr, ratios)
        except Exception:  # whatever comes of state that does not fit what is decided now
            agrees = False
        if not agrees:
            raise decides_by_shapes()

    def _cut(self, whole: Arguments, rows: Mapping[int, int]) -> Arguments:
        """Types for so many rows of each table."""

        def cut(leaf: Any, table: int | None) -> Any:
            if table is None or table not in self.row_axes:
                return leaf
            axis = self.row_axes[table]
            shape = (*leaf.shape[:axis], rows[table], *leaf.shape[axis + 1 :])
            return jax.ShapeDtypeStruct(shape, leaf.dtype)

        tables = range(len(whole.grads))
        return Arguments(
            list(map(cut, whole.grads, tables)),
            list(map(cut, whole.state, self.owners)),
            None if whole.params is None else list(map(cut, whole.params, tables)),
        )


def check_at_start(tx: optax.GradientTransformationExtraArgs, params: PyTree) -> None:
    """Raises a ValueError if a transformation does not suit what says that it is a table."""

    def is_large(node: Any) -> bool:
        return is_table(node) or getattr(node, "is_large", False) is True

    nodes = jax.tree.leaves(params, is_leaf=is_large)
    marks = [mark for node in nodes for mark in [is_large(node)] * len(jax.tree.leaves(node))]
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
        owners = owners_of(tx, tree, whole, axes)
    except NotByRowsError:
        return  # As long as all gradients are dense that is nobody's business.
    transformation = Transformation(tx, tree, state_tree, axes, owners, extra_args={})
    try:
        transformation.check(Arguments(whole, state_leaves, whole), dict.fromkeys(tables, 2))
    except (TypeError, KeyError):
        return  # It needs extra arguments: what it does is seen when they are there.


def _dependence(jaxpr: Any, names: Sequence[set[str]]) -> list[set[str]]:
    """Names of the arguments that each result of a program is computed from."""
    known: dict[Any, set[str]] = dict(zip(jaxpr.invars, names, strict=True))
    known |= {each: set() for each in jaxpr.constvars}

    def of(atom: Any) -> set[str]:
        return known[atom] if isinstance(atom, Var) else set()

    for equation in jaxpr.eqns:
        operands = [of(each) for each in equation.invars]
        if equation.primitive is jit_p:
            results = _dependence(equation.params["jaxpr"].jaxpr, operands)
        else:
            results = [set().union(*operands)] * len(equation.outvars)
        known.update(zip(equation.outvars, results, strict=True))
    return [of(each) for each in jaxpr.outvars]


def _agree(first: Any, second: Any, ratios: set[float]) -> bool:
    """Whether two programs do the same but for the lengths of arrays.

    A constant may follow the number of rows, as the divisor of a mean does: by one of the ratios.
    """
    if len(first.invars) != len(second.invars) or len(first.eqns) != len(second.eqns):
        return False
    twins = dict(zip(first.invars, second.invars, strict=True))
    twins |= dict(zip(first.constvars, second.constvars, strict=False))

    def alike(one: Any, other: Any) -> bool:
        if isinstance(one, Var) or isinstance(other, Var):
            return isinstance(one, Var) and twins.get(one) is other
        return _same_constant(one.val, other.val, ratios)

    for one, other in zip(first.eqns, second.eqns, strict=True):
        same = one.primitive is other.primitive and len(one.invars) == len(other.invars)
        if not same or not all(map(alike, one.invars, other.invars)):
            return False
        inside = zip(_programs_in(one), _programs_in(other), strict=True)
        if not all(_agree(*pair, ratios) for pair in inside):
            return False
        twins.update(zip(one.outvars, other.outvars, strict=True))
    results = zip(first.outvars, second.outvars, strict=True)
    return len(first.outvars) == len(second.outvars) and all(alike(*pair) for pair in results)


def _programs_in(equation: Any) -> list[Any]:
    values = (v if isinstance(v, tuple) else (v,) for v in equation.params.values())
    return [getattr(e, "jaxpr", e) for each in values for e in each if hasattr(e, "eqns")]


def _same_constant(one: Any, other: Any, ratios: set[float]) -> bool:
    if np.array_equal(one, other, equal_nan=True):
        return True
    if jnp.ndim(one) or jnp.ndim(other) or not float(one) or not float(other):
        return False
    quotient = abs(float(one) / float(other))
    powers = (1.0, -1.0, 0.5, -0.5)
    return any(math.isclose(quotient, r**p, rel_tol=1e-5) for r in ratios for p in powers)
