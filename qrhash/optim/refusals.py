"""What `qrhash.touched_rows` refuses, in words."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax

INSTEAD = "train the tables densely with it, with a larger large_table_rows."


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
        f"only the rows of that step would be moved: {INSTEAD}": (
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
                f"parameters, {name}: it has the rows touched in place of the tables: {INSTEAD}"
            )

        return call

    return {
        name: refused(name, value) if callable(value) else value
        for name, value in extra_args.items()
    }
