"""Look-ups in a jaxpr: found, and run again with offsets on their rows.

A jaxpr is a list of equations; `jit`, `checkpoint`, `scan` and `cond` are equations with jaxprs
inside of them. Both functions go through it in the same order, and into the same bodies, so that
the look-ups which `find` found are those which `run_with_offsets` meets.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun
from jax.extend.core.primitives import cond_p, jit_p, remat_p, scan_p

from qrhash.pooled import pooled_p
from qrhash.rows import zeros_beside
from qrhash.take import Site, take_p


class LookUp(NamedTuple):
    """A look-up in a program.

    Attributes:
      arrays: the arguments that are the table's arrays, by number.
      site: what the look-up does.
      indices: type of each array of row numbers.
      rows: type of the rows of each.
      turns: how often the loops around it turn, from the outermost on.
    """

    arrays: tuple[int, ...]
    site: Site
    indices: tuple[Any, ...]
    rows: tuple[Any, ...]
    turns: tuple[int, ...] = ()


_RETURN_TABLES = (jit_p, remat_p)


class _Body(NamedTuple):
    """A program inside an equation of another, which it runs with these of its operands."""

    jaxpr: Any
    consts: Sequence[Any]
    first: int  # its first argument is this operand of the equation
    holds_tables: int  # so many of its arguments may be tables
    returns: bool = False  # its results are those of the equation, and no more is done with them

    def used(self, of_equation: Sequence[bool]) -> list[bool]:
        """Which of its results are used, given which ones of the equation."""
        return list(of_equation) if self.returns else [True] * len(self.jaxpr.outvars)


def _bodies(equation: Any) -> list[_Body] | None:
    """The programs in an equation in which look-ups can be told; None: it is of another kind."""
    params, count = equation.params, len(equation.invars)
    if equation.primitive is jit_p:
        return [_Body(params["jaxpr"].jaxpr, params["jaxpr"].consts, 0, count, returns=True)]
    if equation.primitive is remat_p:
        return [_Body(params["jaxpr"], (), 0, count)]
    if equation.primitive is scan_p:
        # A table that is carried, or scanned over, is an array like any other.
        return [_Body(params["jaxpr"].jaxpr, params["jaxpr"].consts, 0, _scan_counts(equation)[0])]
    if equation.primitive is cond_p:
        return [_Body(each.jaxpr, each.consts, 1, count) for each in params["branches"]]
    return None


def _scan_counts(equation: Any) -> tuple[int, int]:
    """How many constants a scan has, and how many carried values.

    Its operands are these and the arrays scanned over, its results what is carried and what is
    stacked: arrays with an axis more than in the program of one turn.
    """
    body = equation.params["jaxpr"].jaxpr
    results = zip(equation.outvars, body.outvars, strict=True)
    carried = sum(result.aval.ndim == inner.aval.ndim for result, inner in results)
    operands = zip(equation.invars, body.invars, strict=True)
    alike = sum(operand.aval.ndim == inner.aval.ndim for operand, inner in operands)
    return alike - carried, carried


def _tables_in(equation: Any, body: _Body, tables: Mapping[Any, int]) -> dict[Any, int]:
    """The tables among the arguments of a body."""
    operands = equation.invars[body.first :][: body.holds_tables]
    return {
        argument: tables[operand]
        for argument, operand in zip(body.jaxpr.invars, operands, strict=False)
        if isinstance(operand, Var) and operand in tables
    }


def _live(jaxpr: Any, used: Sequence[bool]) -> list[tuple[Any, list[bool]]]:
    """The equations that the used results depend on, or that have effects.

    With each, which of its own results are used.
    """
    results = zip(jaxpr.outvars, used, strict=True)
    needed = {result for result, is_used in results if is_used and isinstance(result, Var)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        of_equation = [result in needed for result in equation.outvars]
        if equation.effects or any(of_equation):
            kept.append((equation, of_equation))
            needed.update(each for each in equation.invars if isinstance(each, Var))
    return kept[::-1]


def _pooled_tables(equation: Any, tables: Mapping[Any, int]) -> list[int]:
    """Which operands of a sum over bags are tables; none, if it is no such sum."""
    if equation.primitive is not pooled_p:
        return []
    operands = equation.invars[: equation.params["sums"].num_tables]
    return [n for n, each in enumerate(operands) if isinstance(each, Var) and each in tables]


def _pooled_look_up(equation: Any, number: int, tables: Mapping[Any, int]) -> LookUp:
    """The look-up of a sum over bags in one of its tables."""
    types = [each.aval for each in equation.invars]
    site = equation.params["sums"].site(number, types)
    of_tables, indices, _, _ = equation.params["sums"].split(types)
    index, table = indices[number], of_tables[number]
    rows = table.update(shape=(*index.shape, *table.shape[1:]))
    return LookUp((tables[equation.invars[number]],), site, (index,), (rows,))


def _is_look_up(equation: Any, tables: Mapping[Any, int]) -> bool:
    if equation.primitive is not take_p or equation.params["site"].look_ups.is_whole:
        return False
    arrays, _ = equation.params["site"].split(equation.invars)
    return all(isinstance(array, Var) and array in tables for array in arrays)


def find(
    jaxpr: Any, used: Sequence[bool], tables: Mapping[Any, int], names: Mapping[int, str]
) -> tuple[list[LookUp], set[int]]:
    """The look-ups in tables, in the order of the program; and the tables used in other ways."""
    tables, found, used_whole = dict(tables), [], set()
    for equation, of_equation in _live(jaxpr, used):
        held = {
            tables[each] for each in equation.invars if isinstance(each, Var) and each in tables
        }
        if not held:
            continue
        if _is_look_up(equation, tables):
            site = equation.params["site"]
            arrays, indices = site.split(equation.invars)
            numbers = tuple(tables[array] for array in arrays)
            avals = tuple(index.aval for index in indices), tuple(equation.params["out_avals"])
            found.append(LookUp(numbers, site, *avals))
            continue
        if pooled := _pooled_tables(equation, tables):
            found += [_pooled_look_up(equation, number, tables) for number in pooled]
            continue
        bodies = _bodies(equation)
        if bodies is None:
            if any(map(_looks_up, _programs_in(equation))):
                raise _cannot_look_up(equation, names[min(held)])
            used_whole |= held
            continue
        passed = set()
        turns = (equation.params["length"],) if equation.primitive is scan_p else ()
        for body in bodies:
            inside = _tables_in(equation, body, tables)
            of_body, whole = find(body.jaxpr, body.used(of_equation), inside, names)
            found += [each._replace(turns=turns + each.turns) for each in of_body]
            used_whole |= whole
            passed |= set(inside.values())
            if equation.primitive in _RETURN_TABLES:
                _follow(equation, body, inside, tables)
            else:
                results = [each for each in body.jaxpr.outvars if isinstance(each, Var)]
                used_whole |= {inside[each] for each in results if each in inside}
        used_whole |= held - passed
    return found, used_whole


def _follow(equation: Any, body: _Body, inside: Mapping[Any, int], tables: dict[Any, int]) -> None:
    """A table that a jitted or checkpointed function returns is that table still."""
    for result, inner in zip(equation.outvars, body.jaxpr.outvars, strict=True):
        if isinstance(inner, Var) and inner in inside:
            tables[result] = inside[inner]


def _programs_in(equation: Any) -> list[Any]:
    """All programs among the parameters of an equation."""
    found = []
    for value in equation.params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(each, "eqns"):
                found.append(getattr(each, "jaxpr", each))
    return found


def _looks_up(jaxpr: Any) -> bool:
    """Whether a program looks anything up."""
    return any(
        equation.primitive in (take_p, pooled_p) or any(map(_looks_up, _programs_in(equation)))
        for equation in jaxpr.eqns
    )


def _cannot_look_up(equation: Any, name: str) -> ValueError:
    return ValueError(
        f"the table {name}, trained by rows, is looked up inside of {equation.primitive.name!r}, "
        "where its rows cannot be told apart: look up before it, or train the table densely, by "
        "not marking it large, or with a larger large_table_rows."
    )


def run_with_offsets(
    jaxpr: Any,
    used: Sequence[bool],
    consts: Sequence[Any],
    args: Sequence[Any],
    tables: Mapping[Any, int],
    offsets: Iterator[Any],
) -> tuple[list[Any], list[list[jax.Array]]]:
    """Runs a program with offsets added to the rows of its look-ups; and their row numbers.

    Results that `used` leaves out may be None.
    """
    tables, found = dict(tables), []
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))

    def value_of(each: Any) -> Any:
        return values.get(each) if isinstance(each, Var) else each.val

    for equation, of_equation in _live(jaxpr, used):
        operands = [value_of(each) for each in equation.invars]
        holds = any(isinstance(each, Var) and each in tables for each in equation.invars)
        if not holds:
            results = run_equation(equation, jaxpr, operands)
        elif _is_look_up(equation, tables):
            site = equation.params["site"]
            arrays, indices = site.split(operands)
            rows, numbers = site.table(arrays).read(indices, site.look_ups)
            results = [each + offset for each, offset in zip(rows, next(offsets), strict=True)]
            found.append(numbers)
        elif pooled := _pooled_tables(equation, tables):
            sums = equation.params["sums"]
            of_bags, numbers = sums.with_offsets(operands, pooled, offsets)
            results = [of_bags]
            found += numbers
        else:
            results, numbers_inside = _run_inside(equation, of_equation, operands, tables, offsets)
            found += numbers_inside
        values.update(zip(equation.outvars, results, strict=True))
    return [value_of(each) for each in jaxpr.outvars], found


def _run_inside(
    equation: Any,
    used: Sequence[bool],
    operands: Sequence[Any],
    tables: dict[Any, int],
    offsets: Iterator[Any],
) -> tuple[list[Any], list[list[jax.Array]]]:
    """The same of an equation with programs inside of it."""
    bodies, params = _bodies(equation), equation.params
    assert bodies is not None
    inside = [_tables_in(equation, body, tables) for body in bodies]
    sites = [
        find(body.jaxpr, body.used(used), held, dict.fromkeys(held.values(), ""))[0]
        for body, held in zip(bodies, inside, strict=True)
    ]
    own = [[next(offsets) for _ in of_body] for of_body in sites]
    body, held = bodies[0], inside[0]

    def run(args: Sequence[Any], offsets: Sequence[Any], number: int = 0) -> Any:
        each = bodies[number]
        of_body = each.used(used)
        return run_with_offsets(
            each.jaxpr, of_body, each.consts, args, inside[number], iter(offsets)
        )

    if equation.primitive in _RETURN_TABLES:
        _follow(equation, body, held, tables)
    if equation.primitive is jit_p:
        return run(operands, own[0])
    if equation.primitive is remat_p:
        options = {"policy": params["policy"], "prevent_cse": params["prevent_cse"]}
        return jax.checkpoint(run, **options)(operands, own[0])
    if equation.primitive is scan_p:
        return _scan(equation, operands, run, own[0])
    return _switch(operands, run, sites, own)


def _scan(
    equation: Any, operands: Sequence[Any], run: Callable[..., Any], offsets: Sequence[Any]
) -> tuple[list[Any], list[list[jax.Array]]]:
    params = equation.params
    first, carried = _scan_counts(equation)
    last = first + carried
    consts, start, xs = operands[:first], operands[first:last], operands[last:]

    def turn(carry: Any, each: Any) -> tuple[Any, Any]:
        of_turn, offsets = each
        results, found = run([*consts, *carry, *of_turn], offsets)
        return results[: len(start)], (results[len(start) :], found)

    end, (ys, found) = jax.lax.scan(
        turn,
        list(start),
        (list(xs), list(offsets)),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*end, *ys], found


def _switch(
    operands: Sequence[Any],
    run: Callable[..., Any],
    sites: Sequence[Sequence[LookUp]],
    offsets: Sequence[Sequence[Any]],
) -> tuple[list[Any], list[list[jax.Array]]]:
    """One branch runs; the row numbers of the others are past the end."""

    def branch(number: int) -> Callable[..., Any]:
        def taken(args: Any, offsets: Any) -> Any:
            results, numbers = run(args, offsets[number], number)
            found = [[_no_rows(site) for site in of_branch] for of_branch in sites]
            found[number] = numbers
            return results, [each for of_branch in found for each in of_branch]

        return taken

    which, *args = operands
    return jax.lax.switch(which, [branch(n) for n in range(len(sites))], args, list(offsets))


def _no_rows(site: LookUp) -> list[jax.Array]:
    return [
        zeros_beside(aval, (*site.turns, *aval.shape), aval.dtype) + jnp.iinfo(aval.dtype).max
        for aval in site.indices
    ]


def run_equation(equation: Any, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """Runs an equation of a program as it is: as a program of this one alone."""
    operands_of = {
        v: each for v, each in zip(equation.invars, operands, strict=True) if isinstance(v, Var)
    }
    alone = jaxpr.replace(
        constvars=[], invars=list(operands_of), outvars=equation.outvars, eqns=[equation]
    )
    return jaxpr_as_fun(ClosedJaxpr(alone, []))(*operands_of.values())
