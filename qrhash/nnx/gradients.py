"""`value_and_grad` and `grad`: stand where those of `flax.nnx` do."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qrhash.nnx.variables import as_table, is_large, is_variable
from qrhash.program import Marked, Program, marked


def value_and_grad(
    f: Callable[..., Any] | None = None,
    *,
    argnums: Any = 0,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    **options: Any,
) -> Callable[..., Any]:
    """`nnx.value_and_grad`, in which large tables get `qrhash.RowGrads`.

    Args:
      f: a function whose result is a scalar. It is traced, as by `nnx.jit`. Without it, what is
        returned is a decorator.
      argnums: the arguments to differentiate with respect to, as flax's: integers or
        `nnx.DiffState`s, one or several; modules, lists and tuples of modules, arrays.
      has_aux: whether `f` returns a pair of the scalar and something else.
      wrt: filter of the variables to differentiate with respect to, where `argnums` are integers.
      **options: other options of `nnx.value_and_grad`, such as `graph=False`.

    Returns:
      A function of the same arguments that returns (value, gradients), or ((value, aux),
      gradients): what `nnx.value_and_grad` returns, in which the value of a large `Table` is a
      `RowGrads`; or an array as large as the table, if `f` uses it otherwise than by look-ups.

    Raises (the function returned):
      ValueError: a large table is looked up where its rows cannot be told apart, see
        `qrhash.value_and_grad`.
    """
    if f is None:
        return functools.partial(
            value_and_grad, argnums=argnums, has_aux=has_aux, wrt=wrt, **options
        )

    @functools.wraps(f)
    def differentiated(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        call = _call_of(f, args, kwargs, argnums, wrt, options, has_aux=has_aux)
        value, grads = _differentiate(call)
        is_single = isinstance(argnums, (int, nnx.DiffState))
        return value, grads[0] if is_single else tuple(grads)

    return differentiated


def grad(
    f: Callable[..., Any] | None = None, *, has_aux: bool = False, **options: Any
) -> Callable[..., Any]:
    """`nnx.grad`, in which large tables get `qrhash.RowGrads`: see `value_and_grad`.

    Args:
      f: a function whose result is a scalar.
      has_aux: whether `f` returns a pair of the scalar and something else.
      **options: other options of `value_and_grad`.

    Returns:
      A function of the same arguments that returns the gradients, or (gradients, aux).
    """
    if f is None:
        return functools.partial(grad, has_aux=has_aux, **options)
    differentiate = value_and_grad(f, has_aux=has_aux, **options)

    @functools.wraps(f)
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        value, grads = differentiate(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return differentiated


class _Call(NamedTuple):
    """A function with its arguments, to be differentiated.

    Attributes:
      f: the function.
      args: its positional arguments.
      kwargs: the others.
      wanted: with respect to what, of which arguments.
      has_aux: whether it returns a pair.
      options: of `nnx.value_and_grad`.
    """

    f: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wanted: list[nnx.DiffState]
    has_aux: bool
    options: dict[str, Any]

    @property
    def is_tree(self) -> bool:
        """Flax's tree mode: modules are ordinary trees, of which everything is differentiated."""
        modes = (("graph", nnx.set_graph_mode), ("graph_updates", nnx.set_graph_updates))
        given = (self.options.get(name) for name, _ in modes)
        return not all(
            current.current_value() if value is None else value
            for value, (_, current) in zip(given, modes, strict=True)
        )

    @property
    def plain(self) -> list[int]:
        """Which of the arguments wanted hold no modules: arrays and trees of them."""
        numbers = sorted({each.argnum for each in self.wanted})
        return [number for number in numbers if not _has_modules(self.args[number])]


def _call_of(
    f: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    argnums: Any,
    wrt: Any,
    options: dict[str, Any],
    *,
    has_aux: bool,
) -> _Call:
    args, kwargs = _positional(f, args, kwargs)
    wanted = [
        each if isinstance(each, nnx.DiffState) else nnx.DiffState(each, wrt)
        for each in ((argnums,) if isinstance(argnums, (int, nnx.DiffState)) else argnums)
    ]
    for each in wanted:
        if not 0 <= each.argnum < len(args):
            raise ValueError(
                f"argnums must be of the {len(args)} positional arguments, got {each.argnum}."
            )
    return _Call(f, args, kwargs, wanted, has_aux, options)


def _differentiate(call: _Call) -> tuple[Any, list[Any]]:
    """Value, with aux if there is any, and the gradients of the arguments wanted."""
    # 1. The program is traced from the state of all modules among the arguments, and from the
    #    arrays wanted; other arguments stay what they are, ids of the host too.
    graph, state = nnx.split(_modules_in(call.args, call.kwargs))
    of_modules, tree = jax.tree.flatten(state)
    arrays = [*of_modules, *jax.tree.leaves([call.args[n] for n in call.plain])]
    paths, tables = _large_tables(call, state)
    on_arrays = functools.partial(_on_arrays, call, graph, tree)
    program = Program.of(on_arrays, arrays, tables, has_aux=True)

    # 2. In place of the function, flax differentiates the program, with respect to the offsets and
    #    to all that was wanted but for the tables that it has by rows.
    def with_offsets(*everything: Any) -> tuple[Any, Any]:
        *args, kwargs, offsets = everything
        modules = _modules_in(args, kwargs)
        now = jax.tree.leaves(nnx.split(modules)[1])
        now += jax.tree.leaves([args[n] for n in call.plain])
        for number in program.by_rows:
            now[number] = arrays[number]
        value, rest, found = program.run(now, offsets)
        _, changed = program.aux(rest)
        nnx.update(modules, changed)
        return value, (rest, found)

    by_rows = {paths[number] for number in program.by_rows}
    args, argnums = _without_tables(call, by_rows)
    last = len(args) + 1  # behind the keyword arguments
    differentiate = nnx.value_and_grad(
        with_offsets, argnums=(*argnums, last), has_aux=True, **call.options
    )
    result = differentiate(*args, call.kwargs, program.offsets())
    (value, (rest, found)), (*grads, of_offsets) = result

    # 3. The gradients of these tables, in their places.
    for number, of_table in program.row_grads(arrays, found, of_offsets).items():
        grads = _with_grad(call, grads, paths[number], of_table)
    aux, _ = program.aux(rest)
    return ((value, aux) if call.has_aux else value), grads


def _on_arrays(call: _Call, graph: Any, tree: Any, arrays: Sequence[Any]) -> tuple[Any, Any]:
    """The function of arrays: its value, and its aux with the state that it changes."""
    of_modules, of_plain = arrays[: tree.num_leaves], arrays[tree.num_leaves :]
    modules = nnx.merge(graph, jax.tree.unflatten(tree, of_modules), copy=True)
    plain_tree = jax.tree.structure([call.args[n] for n in call.plain])
    plain = dict(zip(call.plain, jax.tree.unflatten(plain_tree, of_plain), strict=True))
    args = [
        plain.get(number, modules.get(str(number), arg)) for number, arg in enumerate(call.args)
    ]
    kwargs = {name: modules.get(name, arg) for name, arg in call.kwargs.items()}
    result = call.f(*args, **kwargs)
    value, aux = result if call.has_aux else (result, None)
    before = set(map(id, of_modules))
    changed = [
        (path, variable)
        for path, variable in nnx.to_flat_state(nnx.split(modules)[1])
        if not before.issuperset(map(id, jax.tree.leaves(variable)))
    ]
    return value, (aux, nnx.from_flat_state(changed))


def _modules_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Number or name of an argument -> the argument, of those that hold modules."""
    named = {str(number): arg for number, arg in enumerate(args)} | dict(kwargs)
    return {name: arg for name, arg in named.items() if _has_modules(arg)}


def _large_tables(call: _Call, state: Any) -> tuple[dict[int, tuple[Any, ...]], dict[int, Marked]]:
    """Number of an array -> path, and table, of the large ones to be differentiated."""
    takes = {
        str(each.argnum): nnx.filterlib.to_predicate(nnx.All(each.filter, is_large))
        for each in call.wanted
    }
    paths: dict[int, tuple[Any, ...]] = {}
    tables: dict[int, Marked] = {}
    number = 0
    for path, variable in _variables(state):
        if path[0] in takes and takes[path[0]](path[1:], variable):
            name = ".".join(map(str, path[1:]))
            of_table = dict(enumerate(marked(as_table(variable), name), start=number))
            tables |= of_table
            paths |= dict.fromkeys(of_table, path)
        number += len(jax.tree.leaves(variable))
    return paths, tables


def _without_tables(call: _Call, paths: set[tuple[Any, ...]]) -> tuple[list[Any], list[Any]]:
    """Arguments and argnums for flax, which leave out the tables at these paths."""

    def is_left_out(argnum: int) -> Callable[[Any, Any], bool]:
        return lambda path, _: (str(argnum), *path) in paths

    if not call.is_tree:
        kept = [nnx.All(each.filter, nnx.Not(is_left_out(each.argnum))) for each in call.wanted]
        return list(call.args), [
            each.argnum if each.argnum in call.plain else nnx.DiffState(each.argnum, of_argument)
            for each, of_argument in zip(call.wanted, kept, strict=True)
        ]
    # There is no filter in tree mode: nothing is left in these tables instead.
    args = list(call.args)
    for argnum in (each.argnum for each in call.wanted):
        leaves_out = is_left_out(argnum)

        def of(path: Any, variable: Any, leaves_out: Any = leaves_out) -> Any:
            if not leaves_out(_plain_path(path), variable):
                return variable
            return variable.replace(jnp.zeros(0, variable.get_value().dtype))

        args[argnum] = jax.tree_util.tree_map_with_path(of, args[argnum], is_leaf=is_variable)
    return args, [each.argnum for each in call.wanted]


def _with_grad(call: _Call, grads: list[Any], path: tuple[Any, ...], grad: Any) -> list[Any]:
    """The gradients of all arguments with that of a table in its place."""
    place = next(n for n, each in enumerate(call.wanted) if str(each.argnum) == path[0])
    if call.is_tree:

        def of(of_path: Any, variable: Any) -> Any:
            return variable.replace(grad) if _plain_path(of_path) == path[1:] else variable

        new = jax.tree_util.tree_map_with_path(of, grads[place], is_leaf=is_variable)
    else:
        state = nnx.split(_modules_in(call.args, call.kwargs))[1]
        variable = dict(_variables(state))[path]
        new = _put(grads[place], path[1:], variable.replace(grad))
    return [*grads[:place], new, *grads[place + 1 :]]


def _positional(
    f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by position, as far as the function takes them so."""
    try:
        bound = inspect.signature(f).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return args, kwargs  # the call itself will say what does not fit
    return bound.args, bound.kwargs


def _has_modules(arg: Any) -> bool:
    def is_node(each: Any) -> bool:
        return isinstance(each, (nnx.Pytree, nnx.Variable))

    return any(map(is_node, jax.tree.leaves(arg, is_leaf=is_node)))


def _plain_path(path: Any) -> tuple[Any, ...]:
    """A path of `jax.tree_util` as nnx writes it."""
    names = ("key", "idx", "name")
    return tuple(next(getattr(each, n) for n in names if hasattr(each, n)) for each in path)


def _variables(state: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Paths and variables of a state, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_variable)
    return [(_plain_path(path), variable) for path, variable in leaves]


def _put(grads: Any, path: tuple[Any, ...], variable: nnx.Variable) -> Any:
    """The gradients of an argument, a tree of states, with a variable more."""
    if isinstance(grads, nnx.State):
        return nnx.merge_state(grads, nnx.from_flat_state({path: variable}))
    first, *rest = path
    if isinstance(grads, Mapping):
        return {**grads, first: _put(grads[first], tuple(rest), variable)}
    new = [
        _put(each, tuple(rest), variable) if number == first else each
        for number, each in enumerate(grads)
    ]
    return type(grads)(*new) if hasattr(grads, "_fields") else type(grads)(new)
