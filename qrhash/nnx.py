"""The Flax NNX modules: hold the arrays of features and call the pure core.

The parameters are named as in `qrhash.linen`, whose docstring shows how either module takes
over the other's. `value_and_grad` and `Optimizer` stand where those of `flax.nnx` do, for training
whose cost goes by the batch and not by the tables:

    loss, grads = qrhash.nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)          # optimizer = qrhash.nnx.Optimizer(model, tx)
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import optax
from flax import nnx

from qrhash import collection
from qrhash import tables as core
from qrhash.autodiff import Named, Program
from qrhash.collection import CollectionConfig, as_collection_config
from qrhash.combine import Projection, as_projection
from qrhash.config import EmbedConfig, check_config
from qrhash.optim import touched_rows
from qrhash.sharding import ShardedTable, Sharding, is_sharded_table, mesh_axes


class Table(nnx.Param):
    """A table: an `nnx.Param` of a type of its own, so that a filter can tell tables apart.

    Its metadata `is_large` says whether it is trained by rows. On a mesh a large table's value is
    the array of a `qrhash.ShardedTable`, and the metadata hold its `num_rows` and its `layout`.
    """

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        table = as_table(self)
        if is_sharded_table(table):
            self.set_value(table.in_place().array)


class MultiHashEmbed(nnx.Module):
    """A vector for every id from a few small tables; stands where `flax.nnx.Embed` does.

    The tables, attributes `table_0`, `table_1`, ..., are of type `Table`; for operation "project",
    `kernel` and `bias` are ordinary parameters. Given `config.logical_axes`, they carry axis names
    (small tables are not split by rows), which `nnx.get_named_sharding` maps to a mesh under
    `nnx.logical_axis_rules`; large tables with a `config.sharding` come out where that says.

    Args:
      config: the feature's `EmbedConfig`.
      rngs: random number generators; the stream "params" initialises the parameters.

    >>> from qrhash import EmbedConfig, QuotientRemainder
    >>> embed = MultiHashEmbed(EmbedConfig(QuotientRemainder(1000, 4), 8), rngs=nnx.Rngs(0))
    >>> embed(jax.numpy.array([[1, 2, 3]])).shape
    (1, 3, 8)
    """

    def __init__(self, config: EmbedConfig, *, rngs: nnx.Rngs) -> None:
        check_config(config)
        self.config = config
        key = rngs.params()
        for j, table in enumerate(core.init(key, config)):
            setattr(
                self,
                self._table_names[j],
                _table(table, config.table_axes(j), config.large_tables[j]),
            )
        projection = core.init_projection(key, config)
        for field in config.projection_fields:
            axes = getattr(config.projection_axes, field)
            setattr(self, field, _annotated(nnx.Param, getattr(projection, field), axes))

    @property
    def num_embeddings(self) -> int:
        """Size of the vocabulary."""
        return self.config.num_embeddings

    @property
    def features(self) -> int:
        """Width of the vectors."""
        return self.config.features

    @property
    def dtype(self) -> jax.numpy.dtype:
        """Dtype of the maths and the vectors."""
        return self.config.vector_dtype

    @property
    def param_dtype(self) -> jax.numpy.dtype:
        """Dtype of the parameters."""
        return self.config.param_dtype

    @property
    def tables(self) -> tuple[Any, ...]:
        """The tables, [rows_j, width_j] each; on a mesh, large ones are `ShardedTable`s."""
        return tuple(as_table(getattr(self, name)) for name in self._table_names)

    @property
    def _table_names(self) -> tuple[str, ...]:
        return tuple(f"table_{j}" for j in range(self.config.num_tables))

    @property
    def projection(self) -> Projection | None:
        """The dense parameters of operation "project"; None for the others."""
        fields = self.config.projection_fields
        return Projection(*(getattr(self, field)[...] for field in fields)) if fields else None

    @property
    def embedding(self) -> jax.Array:
        """The vectors of all ids, [num_embeddings, features], computed anew."""
        return core.all_vectors(self.tables, self.config, self.projection)

    def set_tables(self, tables: Sequence[chex.Array], projection: Any = None) -> None:
        """Takes over tables [rows_j, width_j], for instance pre-trained ones.

        Args:
          tables: as in `qrhash.as_tables`.
          projection: for "project" its `Projection`, or None: it stays as it is.

        Raises:
          ValueError: as `qrhash.as_tables`; or a projection of another shape.
        """
        made = core.as_tables(tables, self.config)
        if projection is not None:
            self.config.check_projection(projection)
            given = as_projection(projection)
            for field in self.config.projection_fields:
                core.check_dtype(field, getattr(given, field), self.param_dtype)
                getattr(self, field).set_value(jax.numpy.asarray(getattr(given, field)))
        for name, table in zip(self._table_names, made, strict=True):
            getattr(self, name).set_value(_array_of(table))

    def __call__(self, inputs: chex.Array, out_sharding: Any = None) -> jax.Array:
        """Looks up the vectors of ids; see `qrhash.lookup`.

        Args:
          inputs: integer ids [*shape].
          out_sharding: where the vectors are to be, on a mesh.

        Returns:
          Vectors [*shape, features].
        """
        return core.lookup(
            self.tables, inputs, self.config, self.projection, out_sharding=out_sharding
        )

    def attend(self, query: chex.Array, out_sharding: Any = None) -> jax.Array:
        """Inner products of queries with the vectors of all ids; see `qrhash.attend`.

        Args:
          query: [*shape, features].
          out_sharding: where the logits are to be, on a mesh.

        Returns:
          Logits [*shape, num_embeddings].
        """
        return core.attend(
            self.tables, query, self.config, self.projection, out_sharding=out_sharding
        )


class EmbedCollection(nnx.Module):
    """Vectors for the ids of many features, from few stacked tables.

    The stacks are attributes of type `Table` named as in `config.stacks`. For operation "project"
    a feature's `<name>_kernel` and `<name>_bias` are ordinary parameters.

    Args:
      config: the `CollectionConfig`, or a mapping to make one of.
      rngs: random number generators; the stream "params" initialises the parameters.

    >>> from qrhash import EmbedConfig, FullTable, QuotientRemainder
    >>> item = EmbedConfig(QuotientRemainder(1_000_000, 4), 8)
    >>> day = EmbedConfig(FullTable(7), 8)
    >>> embed = EmbedCollection({"item": item, "day": day}, rngs=nnx.Rngs(0))
    >>> vectors = embed({"item": jax.numpy.array([1, 999_999]), "day": jax.numpy.array([0, 6])})
    >>> vectors["item"].shape, vectors["day"].shape
    ((2, 8), (2, 8))
    """

    def __init__(
        self, config: CollectionConfig | Mapping[str, EmbedConfig | str], *, rngs: nnx.Rngs
    ) -> None:
        self.config = as_collection_config(config)
        key = rngs.params()
        stacks = collection.init(key, self.config)
        for stack in self.config.stacks:
            table = _table(stacks.pop(stack.name), stack.axes, stack.is_large)
            setattr(self, stack.name, table)
        configs = self.config.configs
        for name, projection in collection.init_projections(key, self.config).items():
            axes = configs[name].projection_axes
            for field in configs[name].projection_fields:
                param = _annotated(nnx.Param, getattr(projection, field), getattr(axes, field))
                setattr(self, f"{name}_{field}", param)

    def __call__(self, inputs: Mapping[str, chex.Array]) -> dict[str, jax.Array]:
        """Looks up the vectors of ids; see `qrhash.collection.lookup`.

        Args:
          inputs: {feature name: integer ids [*shape]}, of any of the features.

        Returns:
          {feature name: vectors [*shape, features]}.
        """
        stacks = {stack.name: as_table(self._stack(stack.name)) for stack in self.config.stacks}
        projections = {
            name: Projection(
                *(getattr(self, f"{name}_{field}")[...] for field in config.projection_fields)
            )
            for name, config in self.config.owned.items()
            if config.projection_fields
        }
        return collection.lookup(stacks, inputs, self.config, projections)

    @property
    def tables(self) -> dict[str, tuple[jax.Array, ...]]:
        """The tables [rows_j, width_j] of each feature that has its own."""
        stacks = {stack.name: as_table(self._stack(stack.name)) for stack in self.config.stacks}
        return collection.unstack(stacks, self.config)

    def set_tables(self, tables: Mapping[str, tuple[chex.Array, ...]]) -> None:
        """Takes over the tables of each feature, as `tables` gives them.

        Raises:
          ValueError: a feature is missing or unknown, or a table has another shape or dtype.
        """
        for name, table in collection.as_stacks(tables, self.config).items():
            self._stack(name).set_value(_array_of(table))

    def _stack(self, name: str) -> Table:
        return getattr(self, name)


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
      TypeError: a large table is looked up where its rows cannot be told apart, see
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
        for number, of_table in program.row_grads(found, of_offsets).items():
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

    def _large_tables(self, state: Any) -> tuple[dict[int, tuple[Any, ...]], dict[int, Named]]:
        """Number of an array -> path, and table, of the large ones to be differentiated."""
        takes = {
            str(each.argnum): nnx.filterlib.to_predicate(nnx.All(each.filter, _is_large))
            for each in self._wanted
        }
        paths, tables, number = {}, {}, 0
        for path, variable in _variables(state):
            if path[0] in takes and takes[path[0]](path[1:], variable):
                paths[number] = path
                tables[number] = Named(as_table(variable), ".".join(map(str, path[1:])))
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
            return variable.replace(jax.numpy.zeros(0, variable.get_value().dtype))

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
    >>> model = MultiHashEmbed(EmbedConfig(QuotientRemainder(100_000, 4), 8), rngs=nnx.Rngs(0))
    >>> optimizer = Optimizer(model, optax.adagrad(0.05, initial_accumulator_value=1e-8))
    >>> ids = jax.numpy.array([1, 2, 99_999])
    >>> loss, grads = value_and_grad(lambda model: (model(ids) ** 2).sum())(model)
    >>> grads.table_0.get_value().rows.tolist()
    [0, 0, 24999]
    >>> updates = optimizer.update(model, grads)
    """

    def __init__(
        self, model: Any, tx: optax.GradientTransformation, *, wrt: Any = nnx.Param
    ) -> None:
        for path, node in nnx.iter_graph(model):
            if _is_large(path, node) and is_sharded_table(table := as_table(node)):
                table.warn_if_elsewhere()
        super().__init__(model, touched_rows(tx), wrt=wrt)


def as_table(variable: nnx.Variable) -> Any:
    """What a variable holds: a table on a mesh, or state in its layout, as a `ShardedTable`."""
    # Of the metadata alone: an attribute of this name is also one of JAX's arrays.
    value, layout = variable.get_value(), variable.get_metadata().get("layout")
    if layout is None:
        return value
    of_table = (layout.num_shards, layout.rows_per_shard(variable.num_rows))
    # Optimizers keep state of other shapes too, with the metadata of the table it is for.
    is_other = getattr(value, "shape", of_table)[:2] != of_table
    return value if is_other else ShardedTable(value, variable.num_rows, layout)


def place(state: Any, sharding: Sharding) -> Any:
    """A state with, in place of its values, where they belong: `out_shardings` of `jax.jit`.

    Tables are split by rows as they say, all else is on every device of the mesh.
    """

    def of(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(_array_of(sharding.place(as_table(variable))))

    return jax.tree.map(of, state, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _array_of(table: Any) -> Any:
    return table.array if is_sharded_table(table) else table


def _table(value: Any, axes: Any, is_large: bool) -> Table:
    if not is_sharded_table(value):
        return _annotated(Table, value, axes, is_large=is_large)
    metadata = {"num_rows": value.num_rows, "layout": value.sharding}
    return _annotated(Table, value.array, mesh_axes(axes), is_large=is_large, **metadata)


def _annotated(variable: type[nnx.Param], value: chex.Array, axes: Any, **metadata: Any) -> Any:
    if axes is None:
        return variable(value, **metadata)
    # Logical names need no mesh until they are mapped to one: hence not placed here and now.
    return variable(value, out_sharding=axes, eager_sharding=False, **metadata)
