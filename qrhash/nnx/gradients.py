"""`value_and_grad`, `grad` and `Optimizer`: stand where those of `flax.nnx` do."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qrhash.nnx.variables import Table, as_table
from qrhash.optim import touched_rows
from qrhash.program import Marked, Program, marked
from qrhash.protocol import is_table


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
        return _Call(f, args, kwargs, argnums, wrt, options, has_aux=has_aux).differentiate()

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


class _Call:
    """A function with its arguments, to be differentiated.

    Its program is traced from the state of all modules among the arguments, and from the arrays
    that it is to be differentiated with respect to; other arguments stay what they are, ids of the
    host too. `nnx.value_and_grad` then differentiates the program in place of the function.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        argnums: Any,
        wrt: Any,
        options: dict[str, Any],
        *,
        has_aux: bool,
    ) -> None:
        self._f, self._has_aux, self._options = f, has_aux, options
        self._args, self._kwargs = _positional(f, args, kwargs)
        self._is_single = isinstance(argnums, (int, nnx.DiffState))
        self._wanted = [
            each if isinstance(each, nnx.DiffState) else nnx.DiffState(each, wrt)
            for each in ((argnums,) if self._is_single else argnums)
        ]
        for each in self._wanted:
            if not 0 <= each.argnum < len(self._args):
                raise ValueError(
                    f"argnums must be of the {len(self._args)} positional arguments, got "
                    f"{each.argnum}."
                )
        graph, graph_updates = (
            current.current_value() if options.get(name) is None else options[name]
            for name, current in (
                ("graph", nnx.set_graph_mode),
                ("graph_updates", nnx.set_graph_updates),
            )
        )
        # Modules are ordinary trees then, and all of an argument is differentiated.
        self._is_tree = not (graph and graph_updates)
        differentiated = {each.argnum for each in self._wanted}
        self._plain = [n for n in sorted(differentiated) if not _has_modules(self._args[n])]
        self._graph, state = nnx.split(self._modules_in(self._args, self._kwargs))
        arrays, self._tree = jax.tree.flatten(state)
        self._num_of_modules = len(arrays)
        self._arrays = [*arrays, *jax.tree.leaves([self._args[n] for n in self._plain])]
        self._paths, tables = self._large_tables(state)
        self._program = Program.of(self._on_arrays, self._arrays, tables, has_aux=True)

    def differentiate(self) -> tuple[Any, Any]:
        """Value, with aux if there is any, and gradients."""
        args = list(self._args)
        argnums: list[Any]
        if self._is_tree:
            argnums = [each.argnum for each in self._wanted]
            for number in argnums:
                args[number] = self._without_tables(number)
        else:
            left_out = [
                nnx.All(each.filter, nnx.Not(self._is_by_rows(each.argnum)))
                for each in self._wanted
            ]
            argnums = [
                each.argnum if each.argnum in self._plain else nnx.DiffState(each.argnum, kept)
                for each, kept in zip(self._wanted, left_out, strict=True)
            ]
        program, last = self._program, len(args) + 1

        def with_offsets(*everything: Any) -> tuple[Any, Any]:
            *args, kwargs, offsets = everything
            modules = self._modules_in(args, kwargs)
            arrays = jax.tree.leaves(nnx.split(modules)[1])
            arrays += jax.tree.leaves([args[n] for n in self._plain])
            for number in program.by_rows:
                arrays[number] = self._arrays[number]
            value, rest, found = program.run(arrays, offsets)
            _, changed = program.aux(rest)
            nnx.update(modules, changed)
            return value, (rest, found)

        differentiate = nnx.value_and_grad(
            with_offsets, argnums=(*argnums, last), has_aux=True, **self._options
        )
        result = differentiate(*args, self._kwargs, program.offsets())
        (value, (rest, found)), (*grads, of_offsets) = result
        for number, of_table in program.row_grads(self._arrays, found, of_offsets).items():
            grads = self._with_grad(grads, self._paths[number], of_table)
        aux, _ = program.aux(rest)
        return ((value, aux) if self._has_aux else value), (
            grads[0] if self._is_single else tuple(grads)
        )

    def _on_arrays(self, arrays: Sequence[Any]) -> tuple[Any, Any]:
        """The function of arrays: its value, and its aux with the state that it changes."""
        of_modules, of_plain = arrays[: self._num_of_modules], arrays[self._num_of_modules :]
        state = jax.tree.unflatten(self._tree, of_modules)
        modules = nnx.merge(self._graph, state, copy=True)
        plain_tree = jax.tree.structure([self._args[n] for n in self._plain])
        plain = dict(zip(self._plain, jax.tree.unflatten(plain_tree, of_plain), strict=True))
        args = [
            plain.get(number, modules.get(str(number), arg))
            for number, arg in enumerate(self._args)
        ]
        kwargs = {name: modules.get(name, arg) for name, arg in self._kwargs.items()}
        result = self._f(*args, **kwargs)
        value, aux = result if self._has_aux else (result, None)
        before = set(map(id, of_modules))
        changed = [
            (path, variable)
            for path, variable in nnx.to_flat_state(nnx.split(modules)[1])
            if not before.issuperset(map(id, jax.tree.leaves(variable)))
        ]
        return value, (aux, nnx.from_flat_state(changed))

    def _modules_in(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Number or name of an argument -> the argument, of those that hold modules."""
        named = {str(number): arg for number, arg in enumerate(args)} | dict(kwargs)
        return {name: arg for name, arg in named.items() if _has_modules(arg)}

    def _large_tables(self, state: Any) -> tuple[dict[int, tuple[Any, ...]], dict[int, Marked]]:
        """Number of an array -> path, and table, of the large ones to be differentiated."""
        takes = {
            str(each.argnum): nnx.filterlib.to_predicate(nnx.All(each.filter, _is_large))
            for each in self._wanted
        }
        paths: dict[int, tuple[Any, ...]] = {}
        tables: dict[int, Marked] = {}
        number = 0
        for path, variable in _variables(state):
            if path[0] in takes and takes[path[0]](path[1:], variable):
                paths[number] = path
                name = ".".join(map(str, path[1:]))
                tables |= dict(enumerate(marked(as_table(variable), name), start=number))
            number += len(jax.tree.leaves(variable))
        return paths, tables

    def _is_by_rows(self, argnum: int) -> Callable[[Any, Any], bool]:
        """A filter of an argument's tables that are differentiated at the rows looked up."""
        paths = {self._paths[number] for number in self._program.by_rows}
        return lambda path, _: (str(argnum), *path) in paths

    def _without_tables(self, argnum: int) -> Any:
        """The argument with nothing in the tables that are differentiated at the rows."""
        is_by_rows = self._is_by_rows(argnum)

        def of(path: Any, variable: Any) -> Any:
            if not is_by_rows(_plain_path(path), variable):
                return variable
            return variable.replace(jnp.zeros(0, variable.get_value().dtype))

        return jax.tree_util.tree_map_with_path(of, self._args[argnum], is_leaf=_is_variable)

    def _with_grad(self, grads: list[Any], path: tuple[Any, ...], grad: Any) -> list[Any]:
        """The gradients of all arguments with that of a table in its place."""
        place = next(n for n, each in enumerate(self._wanted) if str(each.argnum) == path[0])
        if self._is_tree:

            def of(of_path: Any, variable: Any) -> Any:
                return variable.replace(grad) if _plain_path(of_path) == path[1:] else variable

            new = jax.tree_util.tree_map_with_path(of, grads[place], is_leaf=_is_variable)
        else:
            variable = self._variable_at(path)
            new = _put(grads[place], path[1:], variable.replace(grad))
        return [*grads[:place], new, *grads[place + 1 :]]

    def _variable_at(self, path: tuple[Any, ...]) -> nnx.Variable:
        modules = self._modules_in(self._args, self._kwargs)
        return dict(_variables(nnx.split(modules)[1]))[path]


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


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _is_large(path: Any, value: Any) -> bool:
    return isinstance(value, Table) and getattr(value, "is_large", False)


def _plain_path(path: Any) -> tuple[Any, ...]:
    """A path of `jax.tree_util` as nnx writes it."""
    names = ("key", "idx", "name")
    return tuple(next(getattr(each, n) for n in names if hasattr(each, n)) for each in path)


def _variables(state: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Paths and variables of a state, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_variable)
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


class Optimizer(nnx.Optimizer):
    """`nnx.Optimizer` that takes the gradients of `qrhash.nnx.value_and_grad`.

    For updates in place, donate the model and the optimizer to the compiled step:
    `nnx.jit(step, donate_argnames=("model", "optimizer"))`.

    Args:
      model: the module.
      tx: an optax transformation; `qrhash.touched_rows` is applied to it.
      wrt: filter of the variables to optimize, as given to `value_and_grad`.

    >>> from qrhash import EmbedConfig, QuotientRemainder
    >>> from qrhash.nnx import MultiHashEmbed
    >>> model = MultiHashEmbed(EmbedConfig(QuotientRemainder(100_000, 4), 8), rngs=nnx.Rngs(0))
    >>> optimizer = Optimizer(model, optax.adagrad(0.05, initial_accumulator_value=1e-8))
    >>> ids = jnp.array([1, 2, 99_999])
    >>> loss, grads = value_and_grad(lambda model: (model(ids) ** 2).sum())(model)
    >>> grads.table_0.get_value().indices.tolist()
    [0, 0, 24999]
    >>> updates = optimizer.update(model, grads)
    """

    def __init__(
        self, model: Any, tx: optax.GradientTransformation, *, wrt: Any = nnx.Param
    ) -> None:
        for path, node in nnx.iter_graph(model):
            if _is_large(path, node) and is_table(table := as_table(node)):
                table.warn_if_elsewhere()
        super().__init__(model, touched_rows(tx), wrt=wrt)
