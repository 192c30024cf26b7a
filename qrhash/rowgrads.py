"""Row gradients: the gradient of a large table that names only the rows touched.

A batch touches few rows of a large table, but `jax.grad` through a gather writes a gradient of the
table's size. Here the gathered rows are the place to differentiate at: `value_and_grad` hands the
function tables that can only be looked up, and what comes back for each is a `RowGrads`, the row
numbers looked up and the gradient of each of the rows read. Duplicates are merged by `merge`.

In the pure form, for those who take the steps themselves, `take_rows` is the gather of a training
step. Its care is for XLA, which updates a donated table in place only if it can see that every
read of the table comes before the update: the row numbers that it returns are results of the read.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import chex
import jax
import jax.extend
import jax.numpy as jnp

from qrhash.rows import (
    RowTable,
    across,
    add_rows,
    as_one,
    check_merge_method,
    distinct_rows,
    merge_rows,
    read_rows,
)
from qrhash.sharding import (
    Parcels,
    ShardedTable,
    Sharding,
    add_in_shards,
    flatten_lookups,
    is_sharded_table,
    to_owners,
)
from qrhash.tables import check_one_index_per_table


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "values", "spill"),
    meta_fields=("num_rows", "is_merged", "sharding"),
)
@dataclasses.dataclass(frozen=True)
class RowGrads:
    """The gradient of a table [num_rows, width], zero but for the rows that it names.

    A row may be named several times: its gradient is the sum. A row number outside [0, num_rows)
    names no row, whatever its value. `g + g`, `2 * g` and `sum` work; but as the row numbers are
    part of the tree, `jax.tree.map` over it changes them. So optax's transformations belong inside
    `qrhash.touched_rows`, which shows them the values alone, and a norm is that of `merged_values`.

    Of a table on a mesh (`qrhash.ShardedTable`), `rows` and `values` are split as the batch is.
    Merged, they are where the rows are: row numbers within the shards [S, m], and [S, m, width].

    Attributes:
      rows: row numbers [m], int32.
      values: their gradients [m, width].
      num_rows: rows of the table.
      is_merged: whether no row is named twice, and values without a row are zero.
      sharding: the `Sharding` of a table on a mesh.
      spill: on a mesh, where an exchange had too little room: all rows are here instead.

    >>> grads = RowGrads(jnp.array([1, 2, 1]), jnp.array([[1.0], [2.0], [3.0]]), num_rows=4)
    >>> grads.to_dense().tolist()
    [[0.0], [4.0], [2.0], [0.0]]
    """

    rows: chex.Array
    values: chex.Array
    num_rows: int
    is_merged: bool = False
    sharding: Sharding | None = None
    spill: "RowGrads | None" = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the table; on a mesh, that of its array."""
        if self.sharding is None:
            return (self.num_rows, *self.values.shape[1:])
        rows = self.sharding.rows_per_shard(self.num_rows)
        return (self.sharding.num_shards, rows, *self.values.shape[1 + self.is_merged :])

    @property
    def dtype(self) -> Any:
        """Dtype of the gradients."""
        return self.values.dtype

    def merge(self, method: str | None = None) -> "RowGrads":
        """Sums the gradients of rows named several times.

        Args:
          method: "hash" finds the duplicates of a row by hashing row numbers into a scratch of a
            few words for each row looked up; its sums are in no fixed order on a GPU. "sort" sorts
            the row numbers, and is deterministic everywhere. Default: what is faster, "hash" on
            the CPU, "sort" elsewhere.

        Returns:
          `RowGrads` of the same m, in which every row is named at most once. The other positions
          have row number num_rows and values of zero.

        Raises:
          ValueError: an unknown method.
        """
        check_merge_method(method)
        self.check()
        if self.is_merged:
            return self if self.spill is None else self._with_spill_inside()
        if self.sharding is not None:
            owned = to_owners(self.sharding, self.num_rows, self.rows, self.values, method)
            return self.in_shards(*owned)
        merged = merge_rows(self.rows, self.values, self.num_rows, method)
        return RowGrads(*merged, self.num_rows, is_merged=True)

    def _with_spill_inside(self) -> "RowGrads":
        """One of the two names no row: side by side none is named twice."""
        assert self.spill is not None
        rows = jnp.concatenate((self.rows, self.spill.rows), axis=1)
        values = jnp.concatenate((self.values, self.spill.values), axis=1)
        return dataclasses.replace(self, rows=rows, values=values, spill=None)

    def parcels(self, method: str | None) -> Parcels | None:
        """The gradients packed for "all_to_all", if that is how they are to be sent."""
        if self.sharding is None or not Parcels.are_right_for(
            self.sharding, self.rows, self.values
        ):
            return None
        return Parcels(self.sharding, self.num_rows, self.rows, self.values, method)

    def in_shards(self, rows: jax.Array, values: jax.Array) -> "RowGrads":
        """Merged gradients [S, m, width] of the same table on its mesh."""
        return dataclasses.replace(self, rows=rows, values=values, is_merged=True)

    def check(self, table: chex.Array | None = None) -> None:
        """Raises a ValueError unless the arrays fit each other, and the table if it is given."""
        rows, values = jnp.shape(self.rows), jnp.shape(self.values)
        axes = 1 if self.sharding is None else 1 + self.is_merged
        if len(rows) != axes or len(values) != axes + 1 or rows != values[:-1]:
            raise ValueError(
                f"RowGrads take rows [m] and values [m, width], got shapes {rows} and {values}: "
                "flatten the leading axes of both."
            )
        if not jnp.issubdtype(self.rows.dtype, jnp.integer):
            raise ValueError(
                f"RowGrads take integer rows, got {self.rows.dtype}: a tree operation changed the "
                "row numbers. Transformations of gradients belong inside qrhash.touched_rows."
            )
        if table is not None and table.shape != self.shape:
            raise ValueError(
                f"RowGrads of a table of shape {self.shape} do not fit one of {table.shape}."
            )

    def to_dense(self) -> jax.Array:
        """The gradient as an array [num_rows, width]; on a mesh as the table's, [S, R, width]."""
        zeros = jnp.zeros(self.shape, self.dtype)
        if self.sharding is not None:
            zeros = self.sharding.constrain(zeros)
        return add_to_rows(zeros, self.merge())

    @classmethod
    def from_dense(cls, gradient: chex.Array, rows: chex.Array) -> "RowGrads":
        """Of a dense gradient [num_rows, width], the rows named in `rows` [*shape], each once."""
        num_rows = gradient.shape[0]
        (values,), rows = read_rows((gradient,), rows.reshape(-1), fill_value=0.0)
        rows, _ = distinct_rows(rows, num_rows)
        values = jnp.where(across(rows < num_rows, values), values, 0)
        return cls(rows, values, num_rows, is_merged=True)

    def __add__(self, other: "RowGrads") -> "RowGrads":
        if not isinstance(other, RowGrads):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(
                f"only gradients of one table add up, got tables {self.shape} and {other.shape}."
            )
        if self.sharding is not None:
            return self._added_on_mesh(other)
        rows = jnp.concatenate((self.rows, other.rows))
        values = jnp.concatenate((self.values, other.values))
        return RowGrads(rows, values, self.num_rows)

    def _added_on_mesh(self, other: "RowGrads") -> "RowGrads":
        if self.is_merged or other.is_merged or self.sharding is None:
            raise ValueError("gradients of a table on a mesh add up before they are merged only.")
        whole = dataclasses.replace(self.sharding, batch=())
        layout = self.sharding if other.sharding == self.sharding else whole
        both = flatten_lookups(layout, 0, (self.rows, other.rows), (self.values, other.values))
        return RowGrads(*both, self.num_rows, sharding=layout)

    # An array left of a `+` leaves the sum to `__radd__`.
    __array_ufunc__ = None

    def __radd__(self, other: chex.Numeric) -> Any:
        """A table + its update, as `optax.apply_updates` has it; and 0, where `sum` begins."""
        return self if isinstance(other, int) and other == 0 else add_to_rows(other, self)

    def __neg__(self) -> "RowGrads":
        return self * -1

    def __sub__(self, other: "RowGrads") -> "RowGrads":
        return self + -other

    def __mul__(self, factor: chex.Numeric) -> "RowGrads":
        spill = None if self.spill is None else self.spill * factor
        return dataclasses.replace(self, values=self.values * factor, spill=spill)

    __rmul__ = __mul__

    def __truediv__(self, divisor: chex.Numeric) -> "RowGrads":
        spill = None if self.spill is None else self.spill / divisor
        return dataclasses.replace(self, values=self.values / divisor, spill=spill)


def is_row_grads(node: Any) -> bool:
    """Whether a node of a tree is a `RowGrads`: what `is_leaf` of `jax.tree.map` takes."""
    return isinstance(node, RowGrads)


def merged_values(grads: Any) -> Any:
    """The tree with the merged values in place of every `RowGrads`.

    `optax.global_norm(merged_values(grads))` is the norm of the dense gradients.
    """
    return jax.tree.map(
        lambda grad: grad.merge().values if is_row_grads(grad) else grad,
        grads,
        is_leaf=is_row_grads,
    )


def add_to_rows(table: chex.Array, updates: RowGrads) -> jax.Array:
    """Adds to the rows named, and touches no other; in place where XLA may."""
    updates.check(table)
    table = jnp.asarray(table)
    if updates.sharding is None:
        return add_rows(table, updates.rows, updates.values, is_merged=updates.is_merged)
    merged = updates if updates.is_merged else updates.merge()
    table = add_in_shards(updates.sharding, table, merged.rows, merged.values)
    if merged.spill is None:
        return table
    spill = merged.spill
    return add_in_shards(updates.sharding, table, spill.rows, spill.values, seldom=True)


def take_rows(
    tables: Sequence[chex.Array], indices: Sequence[chex.Array], *, fill_value: float = jnp.nan
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Gathers rows that are to be updated in the same step; see `qrhash.gather`.

    XLA copies a donated table unless every read of it is ordered before its update. Each read here
    is one branch of a conditional, which is compiled as one piece: it happens once, however many
    results are computed from its rows, and the row numbers come out of the same conditional. Where
    the update goes by these row numbers, it cannot but come later.

    Args:
      tables: k arrays [rows_j, width_j].
      indices: k integer arrays [*shape], as `row_numbers` returns them.
      fill_value: what a row outside the table holds.

    Returns:
      k arrays [*shape, width_j], and the k arrays of row numbers to make the `RowGrads` of; those
      outside the table are now all rows_j.

    Raises:
      ValueError, TypeError: as `qrhash.gather`.

    >>> (rows,), (index,) = take_rows((jnp.arange(6.0).reshape(3, 2),), (jnp.array([2, -1]),))
    >>> rows.tolist(), index.tolist()
    ([[4.0, 5.0], [nan, nan]], [2, 3])
    """
    check_one_index_per_table(tables, indices)
    taken = [
        _read(table, [index], fill_value) for table, index in zip(tables, indices, strict=True)
    ]
    return tuple(rows for (rows,), _ in taken), tuple(index for _, (index,) in taken)


def _read(
    table: Any, indices: Sequence[chex.Array], fill_value: float, batch_axis: int = 0
) -> tuple[list[jax.Array], list[jax.Array]]:
    """For each index [*shape] rows [*shape, width]; and the row numbers to update by."""
    if not isinstance(table, ShardedTable):
        flat, split = as_one(indices, table.shape[0])
        (of_all,), flat = read_rows((table,), flat, fill_value=fill_value)
        return split(of_all), split(flat)
    rows, read = table.read(indices, batch_axis=batch_axis)
    if fill_value != 0:
        rows = [
            jnp.where(across(index < table.num_rows, each), each, fill_value)
            for index, each in zip(read, rows, strict=True)
        ]
    return rows, read


def value_and_grad(
    fun: Callable[..., Any], by_rows: Any, *, has_aux: bool = False
) -> Callable[..., Any]:
    """`jax.value_and_grad`, in which large tables get `RowGrads`.

    Args:
      fun: a function whose first argument is a tree of parameters and whose result is a scalar.
        The tables that `by_rows` marks may only be looked up in it, any number of times, by
        `qrhash.gather`, `qrhash.lookup` or a module of qrhash. It is called twice, the first time
        on abstract values, as by `jax.jit`, to find these look-ups.
      by_rows: a tree of bools, or a prefix of one, over the parameters: which are such tables. For
        the tables of one feature, `config.large_tables`.
      has_aux: whether `fun` returns a pair of the scalar and something else.

    Returns:
      A function of the same arguments that returns (value, gradients), or ((value, aux),
      gradients). The gradients have the structure of the parameters, with one unmerged `RowGrads`
      for each table marked: all its look-ups together.

    Raises (the function returned):
      TypeError: a table marked is used for anything but a look-up, or is looked up inside another
        JAX transformation (`jax.vmap`, `jax.lax.scan`, `jax.checkpoint`, an inner `jax.jit`).
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
        leaves, tree = jax.tree.flatten(params, is_leaf=is_sharded_table)
        marks = _marks(by_rows, params)
        tables = [leaf for leaf, mark in zip(leaves, marks, strict=True) if mark]
        dense = [leaf for leaf, mark in zip(leaves, marks, strict=True) if not mark]

        def join(tables: Sequence[Any], dense: Sequence[Any]) -> Any:
            tables_left, dense_left = iter(tables), iter(dense)
            joined = [next(tables_left if mark else dense_left) for mark in marks]
            return jax.tree.unflatten(tree, joined)

        def in_place(each: Sequence[Any]) -> list[Any]:
            """Each as the array of its table, where that is a `ShardedTable`."""
            return [
                table.with_array(one) if is_sharded_table(table) else one
                for table, one in zip(tables, each, strict=True)
            ]

        def recorded(reads: Sequence[LookedUp], dense: Sequence[Any]) -> Any:
            return fun(join(reads, dense), *args, **kwargs)

        def with_offsets(dense: Any, offsets: Any) -> tuple[Any, Any]:
            reads = [LookedUp(*pair) for pair in zip(tables, offsets, strict=True)]
            result = recorded(in_place(reads), dense)
            value, aux = result if has_aux else (result, None)
            return value, (aux, [read.lookups for read in reads])

        offsets = zero_offsets(lambda reads: recorded(in_place(reads), dense), tables)
        (value, (aux, lookups)), (dense_grads, offset_grads) = jax.value_and_grad(
            with_offsets, argnums=(0, 1), has_aux=True
        )(dense, offsets)
        grads = join(in_place(row_grads(tables, lookups, offset_grads)), dense_grads)
        return ((value, aux) if has_aux else value), grads

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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("indices",),
    meta_fields=("num_rows", "sharding", "batch_axis"),
)
@dataclasses.dataclass(frozen=True)
class Lookup:
    """A look-up in a table: row numbers [*shape] each, the table's rows, and how it is split."""

    indices: list[jax.Array]
    num_rows: int
    sharding: Sharding | None
    batch_axis: int


class LookedUp(RowTable):
    """A table's array that can only be looked up, and records how.

    To the rows of each look-up it adds an offset of zero. The derivative with respect to the
    offset is the derivative with respect to the rows.

    Args:
      table: the array [rows, width], or a `ShardedTable`.
      offsets: arrays [*shape, width] for each look-up to come, in their order; None where this is
        yet to be found out.

    Attributes:
      lookups: what was looked up.
    """

    def __init__(self, table: Any, offsets: Sequence[Sequence[chex.Array]] | None = None) -> None:
        array = table.array if is_sharded_table(table) else table
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim
        self.lookups: list[Lookup] = []
        self._table = table
        self._offsets = offsets
        self._trace = _current_trace()

    def take_for(self, holder: ShardedTable, *args: Any, **kwargs: Any) -> list[jax.Array]:
        """`take`, where this stands for the array of a table on a mesh."""
        if not is_sharded_table(self._table):
            self._table = holder.with_array(self._table)
        return self.take(*args, **kwargs)

    def take(
        self, indices: Sequence[chex.Array], fill_value: float, *, batch_axis: int = 0
    ) -> list[jax.Array]:
        """Rows, see `RowTable`."""
        if _current_trace() != self._trace:
            raise TypeError(
                f"a table of shape {self._table.shape} trained by rows is looked up inside another "
                "JAX transformation (jax.vmap, jax.lax.scan, jax.checkpoint or an inner jax.jit): "
                "look up before it, or train the table densely, with a larger large_table_rows."
            )
        rows, indices = _read(self._table, indices, fill_value, batch_axis)
        sharding = self._table.sharding if is_sharded_table(self._table) else None
        layout = None if sharding is None else sharding.for_batch(indices, batch_axis)
        self.lookups.append(Lookup(indices, self._table.shape[0], layout, batch_axis))
        if self._offsets is None:
            return rows
        offsets = self._offsets[len(self.lookups) - 1]
        return [each + offset for each, offset in zip(rows, offsets, strict=True)]

    def __getitem__(self, key: Any) -> "LookedUp":
        return self if key is Ellipsis else self._refuse()

    def __getattr__(self, name: str) -> NoReturn:
        raise _OnlyLookedUpError(repr(self))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise _OnlyLookedUpError(repr(self))

    def __repr__(self) -> str:
        # Also what JAX quotes when it refuses the object in its own words.
        return (
            f"a table of shape {self._table.shape} trained by rows can only be looked up, with "
            "qrhash.gather, qrhash.lookup or a module of qrhash: to use it as an array, for "
            "instance to attend over it, train it densely, with a larger large_table_rows."
        )


class _OnlyLookedUpError(AttributeError, TypeError):
    """A TypeError to people, an AttributeError to `hasattr`."""


for _name in (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"),
    *("radd", "rsub", "rmul", "rmatmul", "rtruediv", "rfloordiv", "rmod", "rpow"),
    *("neg", "pos", "abs", "eq", "ne", "lt", "le", "gt", "ge", "len", "iter", "array"),
):
    setattr(LookedUp, f"__{_name}__", LookedUp._refuse)


def zero_offsets(
    fun: Callable[[Sequence[LookedUp]], Any], tables: Sequence[chex.Array]
) -> list[list[list[jax.Array]]]:
    """The offsets for all look-ups that a function does in tables [rows, width], none computed."""
    shapes: list[list[list[tuple[int, ...]]]] = []

    def record(tables: Sequence[chex.Array]) -> None:
        reads = [LookedUp(table) for table in tables]
        fun(reads)
        shapes.extend(
            [[index.shape for index in lookup.indices] for lookup in read.lookups] for read in reads
        )

    try:
        jax.eval_shape(record, tables)
    except TypeError as error:
        if isinstance(error, _OnlyLookedUpError) or LookedUp.__name__ not in str(error):
            raise
        raise _OnlyLookedUpError(
            "a table trained by rows was used in a JAX function or transformation, but can only be "
            "looked up, and outside of jax.checkpoint, jax.jit and their like: look up before "
            "these, or train the table densely, with a larger large_table_rows."
        ) from error
    return [
        [
            [jnp.zeros((*shape, table.shape[-1]), table.dtype) for shape in of_lookup]
            for of_lookup in of_table
        ]
        for table, of_table in zip(tables, shapes, strict=True)
    ]


def row_grads(
    tables: Sequence[Any],
    lookups: Sequence[Sequence[Lookup]],
    offset_grads: Sequence[Sequence[Sequence[jax.Array]]],
) -> list[RowGrads]:
    """One `RowGrads` for each table, of all its look-ups."""
    return [
        functools.reduce(operator.add, map(_grads_of_lookup, of_table, values))
        if of_table
        else _no_grads(table)
        for table, of_table, values in zip(tables, lookups, offset_grads, strict=True)
    ]


def _grads_of_lookup(lookup: Lookup, values: Sequence[jax.Array]) -> RowGrads:
    layout, indices = lookup.sharding, lookup.indices
    if layout is not None:
        flat = flatten_lookups(layout, lookup.batch_axis, indices, values)
        return RowGrads(*flat, lookup.num_rows, sharding=layout)
    rows = jnp.concatenate([index.reshape(-1) for index in indices])
    rows_grads = jnp.concatenate([each.reshape(-1, each.shape[-1]) for each in values])
    return RowGrads(rows, rows_grads, lookup.num_rows)


def _no_grads(table: Any) -> RowGrads:
    """The gradient of a table that was not looked up."""
    sharding = table.sharding if is_sharded_table(table) else None
    if table.ndim != 2:
        raise ValueError(
            f"a table on a mesh, an array of shape {table.shape}, is to be trained by rows but "
            "never looked up: leave it out of by_rows."
        )
    values = jnp.zeros((0, table.shape[1]), table.dtype)
    return RowGrads(jnp.zeros(0, jnp.int32), values, table.shape[0], sharding=sharding)


def _current_trace() -> Any:
    return jax.extend.core.get_opaque_trace_state(convention="flax")
