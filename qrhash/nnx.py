"""The Flax NNX modules: hold the arrays of features and call the pure core.

The parameters are named as in `qrhash.linen`, whose docstring shows how either module takes
over the other's. `value_and_grad` and `Optimizer` stand where those of `flax.nnx` do, for training
whose cost goes by the batch and not by the tables:

    loss, grads = qrhash.nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)          # optimizer = qrhash.nnx.Optimizer(model, tx)
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import optax
from flax import nnx

from qrhash import collection
from qrhash import tables as core
from qrhash.collection import CollectionConfig, as_collection_config
from qrhash.combine import Projection, as_projection
from qrhash.config import EmbedConfig, check_config
from qrhash.optim import touched_rows
from qrhash.rowgrads import LookedUp, row_grads, zero_offsets
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
    f: Callable[..., Any], *, has_aux: bool = False, wrt: Any = nnx.Param
) -> Callable[..., Any]:
    """`nnx.value_and_grad`, in which large tables get `qrhash.RowGrads`.

    Args:
      f: a function whose first argument is a module and whose result is a scalar. The module's
        large tables may be looked up any number of times, and used for nothing else. It is called
        twice, the first time on abstract values, as by `nnx.jit`, to find these look-ups.
      has_aux: whether `f` returns a pair of the scalar and something else.
      wrt: filter of the variables to differentiate with respect to.

    Returns:
      A function of the same arguments that returns (value, gradients), or ((value, aux),
      gradients): an `nnx.State` like that of `nnx.value_and_grad`, in which the value of a large
      `Table` is a `RowGrads`.

    Raises (the function returned):
      TypeError: a large table is used for anything but a look-up, or inside another transformation.
    """
    is_large = nnx.All(wrt, _is_large)

    def with_offsets(model: Any, offsets: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        tables = _variables(model, is_large)
        arrays = [table.get_value() for table in tables.values()]
        reads = [
            LookedUp(as_table(table), of_table)
            for table, of_table in zip(tables.values(), offsets, strict=True)
        ]
        for table, read in zip(tables.values(), reads, strict=True):
            table.set_value(read)
        try:
            result = f(model, *args, **kwargs)
        finally:
            for table, array in zip(tables.values(), arrays, strict=True):
                table.set_value(array)
        value, aux = result if has_aux else (result, None)
        return value, (aux, [read.lookups for read in reads])

    gradient = nnx.value_and_grad(
        with_offsets,
        argnums=(nnx.DiffState(0, nnx.All(wrt, nnx.Not(_is_large))), 1),
        has_aux=True,
    )

    @functools.wraps(f)
    def differentiated(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        tables = _variables(model, is_large)
        looked_up = [as_table(table) for table in tables.values()]
        offsets = _zero_offsets(f, is_large, looked_up, model, *args, **kwargs)
        (value, (aux, lookups)), (grads, offset_grads) = gradient(model, offsets, args, kwargs)
        table_grads = zip(tables.items(), row_grads(looked_up, lookups, offset_grads), strict=True)
        flat = {path: table.replace(grad) for (path, table), grad in table_grads}
        grads = nnx.merge_state(grads, nnx.from_flat_state(flat))
        return ((value, aux) if has_aux else value), grads

    return differentiated


def _zero_offsets(
    f: Callable[..., Any], is_large: Any, tables: list[Any], *args: Any, **kwargs: Any
) -> Any:
    """The offsets of all look-ups, found on a copy of the modules."""
    graph, state = nnx.split((args, kwargs))

    def run(reads: Any) -> None:
        (model, *others), options = nnx.merge(graph, state, copy=True)
        for table, read in zip(_variables(model, is_large).values(), reads, strict=True):
            table.set_value(read)
        f(model, *others, **options)

    return zero_offsets(run, tables)


def _is_large(path: Any, value: Any) -> bool:
    return isinstance(value, Table) and getattr(value, "is_large", False)


def _variables(model: Any, wanted: Any) -> dict[Any, nnx.Variable]:
    """Path -> variable, of a model's own variables that a filter takes."""
    takes = nnx.filterlib.to_predicate(wanted)
    return {
        path: node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable) and takes(path, node)
    }


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
        for table in map(as_table, _variables(model, _is_large).values()):
            if is_sharded_table(table):
                table.warn_if_elsewhere()
        super().__init__(model, touched_rows(tx), wrt=wrt)


def as_table(variable: nnx.Variable) -> Any:
    """What a variable holds: a table on a mesh, or state in its layout, as a `ShardedTable`."""
    value, layout = variable.get_value(), getattr(variable, "layout", None)
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
