"""A traced function, the look-ups in it, and the same program with offsets on their rows.

The function is traced once, and its look-ups (`qrhash.take`) are found in the program, wherever
they stand in it: in an inner `jax.jit`, `jax.checkpoint`, `jax.lax.scan` or `cond`, under
`jax.vmap`. Then the program is run again with an offset of zero added to the rows of every
look-up, and handing out its row numbers. The derivative with respect to an offset is that with
respect to the rows: with its row numbers it makes the `RowGrads`.
"""

import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qrhash.jaxprs import LookUp, find, run_with_offsets
from qrhash.kinds import as_table
from qrhash.protocol import is_table
from qrhash.rowgrads import RowGrads, is_row_grads
from qrhash.rows import zeros_beside


class Marked(NamedTuple):
    """An array of a table that is to be trained by rows.

    Attributes:
      name: what to call the table in messages.
      no_grads: its gradient if it is looked up nowhere; None: an array of zeros.
    """

    name: str
    no_grads: RowGrads | None


def marked(node: Any, name: str) -> list[Marked]:
    """The arrays of a table to be trained by rows: of a `Table`, or of an array of any kind."""
    if not is_table(node) and jnp.ndim(node) != 2:
        return [Marked(name, None)]
    no_grads = jax.tree.leaves(as_table(node).no_grads(), is_leaf=is_row_grads)
    return [Marked(name, each) for each in no_grads]


class Program:
    """A traced function of arrays, and the look-ups in it.

    Args:
      jaxpr: the program, closed.
      aux: makes the second result of the function from the program's results after the first.
      marked: number of an argument -> what array it is, of those to be trained by rows.

    Attributes:
      by_rows: which arguments are differentiated at the rows looked up.
    """

    def __init__(
        self, jaxpr: Any, aux: Callable[[Sequence[Any]], Any], marked: Mapping[int, Marked]
    ) -> None:
        self.aux = aux
        self._closed, self._marked = jaxpr, marked
        by_rows = set(marked)
        # If one array is used in another way, no look-up has all arrays of that table left: its
        # other arrays leave too. Hence repeated.
        while used_whole := by_rows & self._find(by_rows)[1]:
            by_rows -= used_whole
        # A table looked up nowhere gets its `no_grads`; without one, zeros.
        looked_up = {n for each in self._find(by_rows)[0] for n in each.arrays}
        known = {n for n in by_rows if marked[n].no_grads is not None}
        self.by_rows: Collection[int] = looked_up | known
        self.look_ups, _ = self._find(self.by_rows)

    @classmethod
    def of(
        cls,
        fun: Callable[[Sequence[Any]], Any],
        arrays: Sequence[Any],
        marked: Mapping[int, Marked],
        *,
        has_aux: bool,
    ) -> "Program":
        """Traces a function of a list of arrays that returns a scalar, or a pair."""
        tree: Any = None
        others: list[Any] = []

        def flat(*arrays: Any) -> list[Any]:
            nonlocal tree, others
            result = fun(arrays)
            value, aux = _pair(result) if has_aux else (result, None)
            leaves, tree = jax.tree.flatten(aux)
            # Only arrays go through the program.
            others = [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
            return [value, *(leaf for leaf in leaves if isinstance(leaf, jax.Array))]

        jaxpr = jax.make_jaxpr(flat)(*arrays)

        def aux(results: Sequence[Any]) -> Any:
            left = iter(results)
            leaves = [next(left) if other is None else other for other in others]
            return jax.tree.unflatten(tree, leaves)

        return cls(jaxpr, aux, marked)

    def _find(self, numbers: Collection[int]) -> tuple[list[LookUp], set[int]]:
        names = {number: self._marked[number].name for number in numbers}
        variables = {self._closed.jaxpr.invars[number]: number for number in numbers}
        jaxpr = self._closed.jaxpr
        return find(jaxpr, [True] * len(jaxpr.outvars), variables, names)

    def offsets(self) -> list[list[jax.Array]]:
        """For each look-up, what is added to its rows: zeros."""
        return [
            [zeros_beside(aval, (*each.turns, *aval.shape), aval.dtype) for aval in each.rows]
            for each in self.look_ups
        ]

    def run(self, arrays: Sequence[Any], offsets: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Its scalar, its other results, and the row numbers of each look-up."""
        variables = {self._closed.jaxpr.invars[number]: number for number in self.by_rows}
        jaxpr, consts = self._closed.jaxpr, self._closed.consts
        every = [True] * len(jaxpr.outvars)
        results, found = run_with_offsets(jaxpr, every, consts, arrays, variables, iter(offsets))
        return results[0], results[1:], found

    def row_grads(
        self, arrays: Sequence[Any], found: Sequence[Any], of_offsets: Sequence[Any]
    ) -> dict[int, RowGrads]:
        """Number of an argument -> the gradient of the array, all its look-ups together.

        Args:
          arrays: those that the program was run with.
          found: row numbers of each look-up, as from `run`.
          of_offsets: the derivatives with respect to its offsets.
        """
        of_array: dict[int, list[RowGrads]] = {number: [] for number in self.by_rows}
        for each, indices, values in zip(self.look_ups, found, of_offsets, strict=True):
            table = each.site.table([arrays[number] for number in each.arrays])
            grads = table.row_grads(indices, values, each.site.look_ups, num_loops=len(each.turns))
            leaves = jax.tree.leaves(grads, is_leaf=is_row_grads)
            for number, grad in zip(each.arrays, leaves, strict=True):
                of_array[number].append(grad)
        return {
            number: functools.reduce(operator.add, grads) if grads else self._no_grads(number)
            for number, grads in of_array.items()
        }

    def _no_grads(self, number: int) -> RowGrads:
        grads = self._marked[number].no_grads
        assert grads is not None  # else it would not be trained by rows
        return grads


def _pair(result: Any) -> tuple[Any, Any]:
    try:
        value, aux = result
    except (TypeError, ValueError):
        raise ValueError(
            f"with has_aux=True the function must return a pair (value, aux), got {result!r}."
        ) from None
    return value, aux
