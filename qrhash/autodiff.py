"""`value_and_grad`: derivatives with respect to the rows that a function looks up.

A table that the function uses in any other way, as `attend` does, has the gradient of an ordinary
parameter, an array of its shape. How it is done: `qrhash.program`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from qrhash.program import Marked, Program, marked
from qrhash.protocol import is_table
from qrhash.types import PyTree


def value_and_grad(
    fun: Callable[..., Any], large: PyTree, *, has_aux: bool = False
) -> Callable[..., Any]:
    """`jax.value_and_grad`, in which large tables get `RowGrads`.

    Args:
      fun: a function whose first argument is a tree of parameters and whose result is a scalar. It
        is traced, as by `jax.jit`.
      large: a tree of bools, or a prefix of one, over the parameters: which tables are to be
        trained by rows. For the tables of one feature, `config.large_tables`.
      has_aux: whether `fun` returns a pair of the scalar and something else.

    Returns:
      A function of the same arguments that returns (value, gradients), or ((value, aux),
      gradients). The gradients have the structure of the parameters, with one unmerged `RowGrads`
      for each table marked: all its look-ups together. A table that `fun` does not only look up, by
      `qrhash.gather`, `qrhash.lookup` or a module of qrhash, but uses as an array (`attend`
      does), gets an array as large as the table instead, as from `jax.value_and_grad`.

    Raises (the function returned):
      ValueError: a table marked is looked up where its rows cannot be told apart: inside
        `jax.lax.while_loop`, `jax.shard_map` or a function with a derivative of its own; or
        `large` does not fit the parameters.

    >>> import jax.numpy as jnp
    >>> from qrhash.vectors import gather
    >>> table = jnp.ones((1000, 2))
    >>> loss = lambda params: jnp.sum(gather((params,), (jnp.array([7, 9]),))[0] ** 2)
    >>> value, grads = value_and_grad(loss, large=True)(table)
    >>> value.item(), grads.indices.tolist(), grads.values.tolist()
    (4.0, [7, 9], [[2.0, 2.0], [2.0, 2.0]])
    """

    @functools.wraps(fun)
    def differentiated(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        arrays, tree = jax.tree.flatten(params)

        def on_arrays(arrays: Any) -> Any:
            return fun(jax.tree.unflatten(tree, arrays), *args, **kwargs)

        program = Program.of(on_arrays, arrays, _marked(large, params), has_aux=has_aux)
        dense = {n: array for n, array in enumerate(arrays) if n not in program.by_rows}

        def with_offsets(dense: Any, offsets: Any) -> tuple[Any, Any]:
            every = [dense.get(number, array) for number, array in enumerate(arrays)]
            value, *others = program.run(every, offsets)
            return value, others

        differentiate = jax.value_and_grad(with_offsets, argnums=(0, 1), has_aux=True)
        (value, (rest, found)), (grads, of_offsets) = differentiate(dense, program.offsets())
        grads |= program.row_grads(arrays, found, of_offsets)
        grads = jax.tree.unflatten(tree, [grads[n] for n in range(len(arrays))])
        return ((value, program.aux(rest)) if has_aux else value), grads

    return differentiated


def _marked(large: PyTree, params: PyTree) -> Mapping[int, Marked]:
    """Number of a leaf of the parameters -> the array, of the tables to be trained by rows."""
    marks = jax.tree.leaves(large)
    bools = (bool, np.bool_)
    if not all(isinstance(mark, bools) for mark in marks):
        wrong = next(mark for mark in marks if not isinstance(mark, bools))
        raise ValueError(f"large must hold bools, such as config.large_tables, got {wrong!r}.")
    try:
        marks = jax.tree.leaves(jax.tree.broadcast(large, params))
    except ValueError as error:
        raise ValueError(
            f"large must be a tree of bools over the parameters, or a prefix of one: {error}"
        ) from error
    nodes, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_table)
    found: dict[int, Marked] = {}
    number = 0
    for path, node in nodes:
        of_node = marked(node, f"params{jax.tree_util.keystr(path)}")
        found |= {n: each for n, each in enumerate(of_node, start=number) if marks[n]}
        number += len(of_node)
    return found
