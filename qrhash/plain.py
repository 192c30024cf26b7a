"""A traced function in JAX's own operations alone, for those who know no others.

The look-up and the sum over bags are operations of qrhash, so that they can be told in a program
(see `qrhash.take`). Converters to other systems go through a program operation by operation, and
know what each of JAX's does: here every one of ours is put in its own terms.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Var
from jax.extend.core.primitives import jit_p

from qrhash.jaxprs import run_equation
from qrhash.pooled import pooled_p
from qrhash.take import Site, take_p


def in_plain_operations(fun: Callable[..., Sequence[Any]], *types: Any) -> ClosedJaxpr:
    """Traces a function, and puts the operations of qrhash in terms of those of JAX.

    Inner `jax.jit` are dissolved. What stands inside of a loop or a branch stays as it is.

    Args:
      fun: a function of arrays, to a sequence of arrays.
      *types: of its arguments, as `jax.ShapeDtypeStruct`; their sizes may be symbolic.

    Returns:
      The program, closed.
    """
    traced = jax.make_jaxpr(fun)(*types)
    return jax.make_jaxpr(lambda *args: _run(traced.jaxpr, traced.consts, args))(*types)


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Runs a program, its own operations as what they do."""
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))

    def value_of(each: Any) -> Any:
        return values[each] if isinstance(each, Var) else each.val

    for equation in jaxpr.eqns:
        operands = [value_of(each) for each in equation.invars]
        results = _results(equation, jaxpr, operands)
        values.update(zip(equation.outvars, results, strict=True))
    return [value_of(each) for each in jaxpr.outvars]


def _results(equation: Any, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    params = equation.params
    if equation.primitive is take_p:
        return _look_up(params["site"], operands)
    if equation.primitive is pooled_p:
        return [params["sums"].run(*operands)]
    if equation.primitive is jit_p:
        return _run(params["jaxpr"].jaxpr, params["jaxpr"].consts, operands)
    return run_equation(equation, jaxpr, operands)


def _look_up(site: Site, operands: Sequence[Any]) -> list[jax.Array]:
    """A look-up, an index at a time: not every converter can split at sizes that are symbolic."""
    arrays, indices = site.split(operands)
    table = site.table(arrays)
    within = site.look_ups.within
    return [table.take([each], within([each], table.shape[0]))[0] for each in indices]
