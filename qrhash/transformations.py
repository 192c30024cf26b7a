"""What a transformation of gradients does, read off its program.

`qrhash.touched_rows` shows a transformation m rows in place of a table of N. That is right for what
treats rows alone. Some transformations do not: they decide by the shape that they see, as a mask
given as a function may, or keep parameters of earlier steps in their state and go back to them.
Functions stand in closures, out of sight; but JAX traces what optax chains, and the traced program
says what depends on what.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Var
from jax.extend.core.primitives import jit_p

_INSTEAD = "train the tables densely with it, with a larger large_table_rows."

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

    def check(self, whole: Arguments, rows: Mapping[int, int]) -> None:
        """Raises a ValueError unless the transformation treats rows alone.

        Args:
          whole: types of what it takes, of whole tables.
          rows: how many rows of each table it is to be shown.
        """
        self._check_copies(whole)
        program = self._program(whole)
        self._check_averages(program, whole)
        trials: list[Mapping[int, int]] = [dict.fromkeys(rows, trial) for trial in _TRIAL_ROWS]
        # Of no rows at all, JAX makes other programs, and nothing comes of them; how many there are
        # in a program exported for any batch is not known.
        trials += [rows] * all(isinstance(number, int) and number for number in rows.values())
        for trial in trials:
            self._check_shapes(program, whole, trial)

    def _program(self, arguments: Arguments) -> Any:
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
                f"{_INSTEAD}"
            )

    def _check_shapes(self, program: Any, whole: Arguments, rows: Mapping[int, int]) -> None:
        shown = self._cut(whole, rows)
        sizes = {whole.grads[n].shape[axis] for n, axis in self.row_axes.items()}
        ratios = {size / count for size in sizes for count in rows.values()}
        try:
            agrees = _agree(program.jaxpr, self._program(shown).jaxpr, ratios)
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


@contextlib.contextmanager
def deciding_by_values_refused() -> Iterator[None]:
    """Turns what JAX says of a function that asks for the values of arrays into a ValueError."""
    try:
        yield
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            "touched_rows cannot hold a transformation that decides by the values of arrays, "
            "as a mask or label function of them does: give masks and labels as trees of bools "
            "and labels."
        ) from error


def decides_by_shapes() -> ValueError:
    """What to say of a transformation that does something else for other shapes."""
    return ValueError(
        "touched_rows cannot hold a transformation that decides by the shapes of arrays, as a mask "
        "or labels given as a function may: in place of the tables it sees the rows touched. Give "
        "masks and labels as trees of bools and labels, or as functions of names."
    )


def check_transformation(tx: Any) -> None:
    """Raises a ValueError unless it has what optax's transformations have."""
    if not all(callable(getattr(tx, name, None)) for name in ("init", "update")):
        hint = ": call it, as in optax.adagrad(0.1)" if callable(tx) else ""
        raise ValueError(
            f"tx must be an optax transformation, with init and update, got {tx!r}{hint}."
        )


def refuse_what_waits(params: Any, state: Any) -> None:
    """Raises a ValueError for what does its work for all rows at once in certain steps.

    How an update is held back until then does not show in what depends on what: known by name.
    """
    kinds: dict[str, tuple[Any, ...]] = {
        "accumulates over steps, such as optax.MultiSteps: add up the RowGrads of several batches, "
        "qrhash.add_grads(g1, g2), instead.": (optax.MultiStepsState, optax.ApplyEvery),
        "moves all rows to averages with earlier ones in certain steps, such as optax.lookahead: "
        f"only the rows of that step would be moved: {_INSTEAD}": (
            optax.LookaheadParams,
            optax.LookaheadState,
        ),
    }
    for what, types in kinds.items():
        is_one = lambda node, types=types: isinstance(node, types)  # noqa: E731
        if any(map(is_one, jax.tree.leaves((params, state), is_leaf=is_one))):
            raise ValueError(f"touched_rows cannot hold a transformation that {what}")


def refusing(extra_args: Mapping[str, Any]) -> dict[str, Any]:
    """Extra arguments of an update, whose functions refuse to be called with rows for tables."""

    def refused(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*_: Any, **__: Any) -> Any:
            raise ValueError(
                "touched_rows cannot hold a transformation that calls a function of the "
                f"parameters, {name}: it has the rows touched in place of the tables: {_INSTEAD}"
            )

        return call

    return {
        name: refused(name, value) if callable(value) else value
        for name, value in extra_args.items()
    }


def _dependence(jaxpr: Any, names: Sequence[set[str]]) -> list[set[str]]:
    """Names of the arguments that each result of a program is computed from."""
    known: dict[Any, set[str]] = dict(zip(jaxpr.invars, names, strict=True))
    known |= {each: set() for each in jaxpr.constvars}
    of = lambda atom: known[atom] if isinstance(atom, Var) else set()  # noqa: E731
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
