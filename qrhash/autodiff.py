"""`value_and_grad`: derivatives with respect to the rows that a function looks up.

The function is traced once, and its look-ups (`qrhash.take`) are found in the program, wherever
they stand in it: in an inner `jax.jit`, `jax.checkpoint`, `jax.lax.scan` or `cond`, under
`jax.vmap`. Then the program is run again with an offset of zero added to the rows of every
look-up, and handing out its row numbers. The derivative with respect to an offset is that with
respect to the rows: with its row numbers it makes the `RowGrads`.

A table that the program uses in any other way, as `attend` does, has the gradient of an ordinary
parameter, an array of its shape.
"""

import functools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun
from jax.extend.core.primitives import cond_p, jit_p, remat_p, scan_p

from qrhash.rowgrads import RowGrads
from qrhash.rows import varying_axes, zeros_beside
from qrhash.sharding import is_sharded_table
from qrhash.take import Reader, take_p


def value_and_grad(
    fun: Callable[..., Any], by_rows: Any, *, has_aux: bool = False
) -> Callable[..., Any]:
    """`jax.value_and_grad`, in which large tables get `RowGrads`.

    Args:
      fun: a function whose first argument is a tree of parameters and whose result is a scalar. It
        is traced, as by `jax.jit`.
      by_rows: a tree of bools, or a prefix of one, over the parameters: which tables are to be
        trained by rows. For the tables of one feature, `config.large_tables`.
      has_aux: whether `fun` returns a pair of the scalar and something else.

    Returns:
      A function of the same arguments that returns (value, gradients), or ((value, aux),
      gradients). The gradients have the structure of the parameters, with one unmerged `RowGrads`
      for each table marked: all its look-ups together. A table that `fun` does not only look up, by
      `qrhash.gather`, `qrhash.lookup` or a module of qrhash, but uses as an array (`attend`
      does), gets an array as large as the table instead, as from `jax.value_and_grad`.

    Raises (the function returned):
      TypeError: a table marked is looked up where its rows cannot be told apart: inside
        `jax.lax.while_loop`, `jax.shard_map` or a function with a derivative of its own.
      ValueError: `by_rows` does not fit the parameters.

    >>> from qrhash.tables import gather
    >>> table = jnp.ones((1000, 2))
    >>> loss = lambda params: jnp.sum(gather((params,), (jnp.array([7, 9]),))[0] ** 2)
    >>> value, grads = value_and_grad(loss, True)(table)
    >>> value.item(), grads.rows.tolist(), grads.values.tolist()
    (4.0, [7, 9], [[2.0, 2.0], [2.0, 2.0]])
    """

    @functools.wraps(fun)
    def differentiated(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        paths, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_sharded_table)
        leaves = [leaf for _, leaf in paths]
        marks = _marks(by_rows, params)

        def in_tables(arrays: Sequence[Any]) -> list[Any]:
            """Each as the array of its table, where that is a `ShardedTable`."""
            return [
                leaf.with_array(array) if is_sharded_table(leaf) else array
                for leaf, array in zip(leaves, arrays, strict=True)
            ]

        def on_arrays(arrays: Sequence[Any]) -> Any:
            return fun(jax.tree.unflatten(tree, in_tables(arrays)), *args, **kwargs)

        arrays = [leaf.array if is_sharded_table(leaf) else leaf for leaf in leaves]
        tables = {
            number: Named(leaf, f"params{jax.tree_util.keystr(path)}")
            for number, ((path, leaf), mark) in enumerate(zip(paths, marks, strict=True))
            if mark
        }
        program = Program.of(on_arrays, arrays, tables, has_aux=has_aux)
        dense = {n: array for n, array in enumerate(arrays) if n not in program.by_rows}

        def with_offsets(dense: Any, offsets: Any) -> tuple[Any, Any]:
            every = [dense.get(number, array) for number, array in enumerate(arrays)]
            value, *others = program.run(every, offsets)
            return value, others

        differentiate = jax.value_and_grad(with_offsets, argnums=(0, 1), has_aux=True)
        (value, (rest, found)), (grads, of_offsets) = differentiate(dense, program.offsets())
        grads |= program.row_grads(found, of_offsets)
        grads = jax.tree.unflatten(tree, in_tables([grads[n] for n in range(len(leaves))]))
        return ((value, program.aux(rest)) if has_aux else value), grads

    return differentiated


def _marks(by_rows: Any, params: Any) -> list[bool]:
    """For each leaf of the parameters, whether it is a table to be trained by rows."""
    given = jax.tree.leaves(by_rows)
    if not all(isinstance(mark, bool) for mark in given):
        wrong = next(mark for mark in given if not isinstance(mark, bool))
        raise ValueError(f"by_rows must hold bools, such as config.large_tables, got {wrong!r}.")
    try:
        return jax.tree.leaves(jax.tree.broadcast(by_rows, params, is_leaf=is_sharded_table))
    except ValueError as error:
        raise ValueError(
            f"by_rows must be a tree of bools over the parameters, or a prefix of one: {error}"
        ) from error


class Named(NamedTuple):
    """A table marked, an array or a `ShardedTable`, and what to call it in messages."""

    table: Any
    name: str


class Site(NamedTuple):
    """A look-up in a program.

    Attributes:
      table: the argument that is the table, by number.
      reader: how the table is read.
      indices: type of each array of row numbers.
      rows: type of the rows of each.
      turns: how often the loops around it turn, from the outermost on.
    """

    table: int
    reader: Reader
    indices: tuple[Any, ...]
    rows: tuple[Any, ...]
    turns: tuple[int, ...] = ()


class Program:
    """A traced function of arrays, and the look-ups in it.

    Args:
      jaxpr: the program, closed.
      aux: makes the second result of the function from the program's results after the first.
      tables: number of an argument -> the table that it is, of those to be trained by rows.

    Attributes:
      by_rows: which arguments are differentiated at the rows looked up.
    """

    def __init__(
        self, jaxpr: Any, aux: Callable[[Sequence[Any]], Any], tables: Mapping[int, Named]
    ) -> None:
        self.aux = aux
        self._closed, self._tables = jaxpr, tables
        _, used_whole = self._sites(tables)
        # What is looked up nowhere has no gradient. Of an array whose kind no look-up tells, it is
        # an array of zeros.
        sites, _ = self._sites(set(tables) - used_whole)
        looked_up = {site.table for site in sites}
        is_plain = {n for n, named in tables.items() if named.table.ndim == 2}
        self.by_rows: Collection[int] = (looked_up | is_plain) - used_whole
        self.sites, _ = self._sites(self.by_rows)

    @classmethod
    def of(
        cls,
        fun: Callable[[Sequence[Any]], Any],
        arrays: Sequence[Any],
        tables: Mapping[int, Named],
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

        return cls(jaxpr, aux, tables)

    def _sites(self, numbers: Collection[int]) -> tuple[list[Site], set[int]]:
        names = {number: self._tables[number].name for number in numbers}
        variables = {self._closed.jaxpr.invars[number]: number for number in numbers}
        jaxpr = self._closed.jaxpr
        return _find(jaxpr, [True] * len(jaxpr.outvars), variables, names)

    def offsets(self) -> list[list[jax.Array]]:
        """For each look-up, what is added to its rows: zeros."""
        return [
            [zeros_beside(aval, (*site.turns, *aval.shape), aval.dtype) for aval in site.rows]
            for site in self.sites
        ]

    def run(self, arrays: Sequence[Any], offsets: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Its scalar, its other results, and the row numbers of each look-up."""
        variables = {self._closed.jaxpr.invars[number]: number for number in self.by_rows}
        jaxpr, consts = self._closed.jaxpr, self._closed.consts
        every = [True] * len(jaxpr.outvars)
        results, found = _run(jaxpr, every, consts, arrays, variables, iter(offsets))
        return results[0], results[1:], found

    def row_grads(self, found: Sequence[Any], of_offsets: Sequence[Any]) -> dict[int, RowGrads]:
        """Number of an argument -> the gradient of the table, all its look-ups together."""
        of_table: dict[int, list[RowGrads]] = {number: [] for number in self.by_rows}
        for site, indices, values in zip(self.sites, found, of_offsets, strict=True):
            flat, layout = site.reader.flatten(indices, values, num_loops=len(site.turns))
            table = self._tables[site.table].table
            rows, grads = (_from_devices_alike(each, flat[1], table) for each in flat)
            num_rows = site.reader.num_rows(table)
            of_table[site.table].append(RowGrads(rows, grads, num_rows, sharding=layout))
        return {
            number: functools.reduce(operator.add, each)
            if each
            else _no_grads(self._tables[number].table)
            for number, each in of_table.items()
        }


def _from_devices_alike(each: jax.Array, values: jax.Array, table: Any) -> jax.Array:
    """Row numbers or values [m, ...] -> [n * m, ...], those of all devices with the same table.

    Inside of `jax.shard_map`, the gradient of a table that is alike on several devices is that of
    all their losses, as the dense gradient is.
    """
    if is_sharded_table(table):
        return each
    axes = tuple(sorted(set(varying_axes(values)).difference(varying_axes(table))))
    if not axes:
        return each
    number, size = jax.lax.axis_index(axes), jax.lax.axis_size(axes)
    of_all = zeros_beside(values, (size, *each.shape), each.dtype).at[number].set(each)
    return jax.lax.psum(of_all, axes).reshape(-1, *each.shape[1:])


def _pair(result: Any) -> tuple[Any, Any]:
    try:
        value, aux = result
    except (TypeError, ValueError):
        raise TypeError(
            f"with has_aux=True the function must return a pair (value, aux), got {result!r}."
        ) from None
    return value, aux


def _no_grads(table: Any) -> RowGrads:
    """The gradient of a table that was not looked up."""
    layout = table.sharding if is_sharded_table(table) else None
    values = jnp.zeros((0, table.shape[1]), table.dtype)
    return RowGrads(jnp.zeros(0, jnp.int32), values, table.shape[0], sharding=layout)


# --- the program ---------------------------------------------------------------------------------


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
    """The programs inside an equation in which look-ups can be told; None if it is no such one."""
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


def _is_look_up(equation: Any, tables: Mapping[Any, int]) -> bool:
    if equation.primitive is not take_p or equation.params["reader"].is_whole:
        return False
    table = equation.invars[0]
    return isinstance(table, Var) and table in tables


def _find(
    jaxpr: Any, used: Sequence[bool], tables: Mapping[Any, int], names: Mapping[int, str]
) -> tuple[list[Site], set[int]]:
    """The look-ups in tables, in the order of the program; and the tables used in other ways."""
    tables, sites, used_whole = dict(tables), [], set()
    for equation, of_equation in _live(jaxpr, used):
        held = {
            tables[each] for each in equation.invars if isinstance(each, Var) and each in tables
        }
        if not held:
            continue
        if _is_look_up(equation, tables):
            table, *indices = equation.invars
            avals = tuple(index.aval for index in indices), tuple(equation.params["out_avals"])
            sites.append(Site(tables[table], equation.params["reader"], *avals))
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
            found, whole = _find(body.jaxpr, body.used(of_equation), inside, names)
            sites += [site._replace(turns=turns + site.turns) for site in found]
            used_whole |= whole
            passed |= set(inside.values())
            if equation.primitive in _RETURN_TABLES:
                _follow(equation, body, inside, tables)
            else:
                results = [each for each in body.jaxpr.outvars if isinstance(each, Var)]
                used_whole |= {inside[each] for each in results if each in inside}
        used_whole |= held - passed
    return sites, used_whole


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
        equation.primitive is take_p or any(map(_looks_up, _programs_in(equation)))
        for equation in jaxpr.eqns
    )


def _cannot_look_up(equation: Any, name: str) -> TypeError:
    return TypeError(
        f"the table {name}, trained by rows, is looked up inside of {equation.primitive.name!r}, "
        "where its rows cannot be told apart: look up before it, or train the table densely, by "
        "leaving it out of by_rows or with a larger large_table_rows."
    )


def _run(
    jaxpr: Any,
    used: Sequence[bool],
    consts: Sequence[Any],
    args: Sequence[Any],
    tables: Mapping[Any, int],
    offsets: Iterator[Any],
) -> tuple[list[Any], list[list[jax.Array]]]:
    """Runs a program with offsets added to the rows of its look-ups; and their row numbers.

    What results are not used may be None.
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
            results = _bind(equation, jaxpr, operands)
        elif _is_look_up(equation, tables):
            table, *indices = operands
            rows, numbers = equation.params["reader"].read(table, indices)
            results = [each + offset for each, offset in zip(rows, next(offsets), strict=True)]
            found.append(numbers)
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
        _find(body.jaxpr, body.used(used), held, dict.fromkeys(held.values(), ""))[0]
        for body, held in zip(bodies, inside, strict=True)
    ]
    own = [[next(offsets) for _ in of_body] for of_body in sites]
    body, held = bodies[0], inside[0]

    def run(args: Sequence[Any], offsets: Sequence[Any], number: int = 0) -> Any:
        each = bodies[number]
        of_body = each.used(used)
        return _run(each.jaxpr, of_body, each.consts, args, inside[number], iter(offsets))

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
    sites: Sequence[Sequence[Site]],
    offsets: Sequence[Sequence[Any]],
) -> tuple[list[Any], list[list[jax.Array]]]:
    """The branch not taken names no rows."""

    def branch(number: int) -> Callable[..., Any]:
        def taken(args: Any, offsets: Any) -> Any:
            results, numbers = run(args, offsets[number], number)
            found = [[_no_rows(site) for site in of_branch] for of_branch in sites]
            found[number] = numbers
            return results, [each for of_branch in found for each in of_branch]

        return taken

    which, *args = operands
    return jax.lax.switch(which, [branch(n) for n in range(len(sites))], args, list(offsets))


def _no_rows(site: Site) -> list[jax.Array]:
    return [
        zeros_beside(aval, (*site.turns, *aval.shape), aval.dtype) + jnp.iinfo(aval.dtype).max
        for aval in site.indices
    ]


def _bind(equation: Any, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """Runs an equation as it is: as a program of this one alone."""
    operands_of = {
        v: each for v, each in zip(equation.invars, operands, strict=True) if isinstance(v, Var)
    }
    alone = jaxpr.replace(
        constvars=[], invars=list(operands_of), outvars=equation.outvars, eqns=[equation]
    )
    return jaxpr_as_fun(ClosedJaxpr(alone, []))(*operands_of.values())
