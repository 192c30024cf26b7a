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

from qrhash.tables import RowTable, check_one_index_per_table, device_index, wide_dtype

MERGE_METHODS = ("hash", "sort")

# Tables with at most so many rows for each row looked up need no hashing: every row has a slot.
_SLOTS_PER_LOOKUP = 4


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "values"),
    meta_fields=("num_rows", "is_merged"),
)
@dataclasses.dataclass(frozen=True)
class RowGrads:
    """The gradient of a table [num_rows, width], zero but for the rows that it names.

    A row may be named several times: its gradient is the sum. A row number outside [0, num_rows)
    names no row, whatever its value. `g + g`, `2 * g` and `sum` work; but as the row numbers are
    part of the tree, `jax.tree.map` over it changes them. So optax's transformations belong inside
    `qrhash.touched_rows`, which shows them the values alone, and a norm is that of `merged_values`.

    Attributes:
      rows: row numbers [m], int32.
      values: their gradients [m, width].
      num_rows: rows of the table.
      is_merged: whether no row is named twice, and values without a row are zero.

    >>> grads = RowGrads(jnp.array([1, 2, 1]), jnp.array([[1.0], [2.0], [3.0]]), num_rows=4)
    >>> grads.to_dense().tolist()
    [[0.0], [4.0], [2.0], [0.0]]
    """

    rows: chex.Array
    values: chex.Array
    num_rows: int
    is_merged: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the table."""
        return (self.num_rows, *self.values.shape[1:])

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
        method = method or ("hash" if jax.default_backend() == "cpu" else "sort")
        self.check()
        if self.is_merged or self.values.shape[0] == 0:
            return dataclasses.replace(self, is_merged=True)
        rows = _rows_or_end(self.rows, self.num_rows)
        named = rows < self.num_rows
        # NaN where there is no row, as the look-up of a bad id leaves behind, must not be summed.
        values = jnp.where(_across(named, self.values), self.values, 0)
        merge = _merge_by_hash if method == "hash" else _merge_by_sort
        rows, values = merge(rows, values.astype(wide_dtype(self.dtype)), self.num_rows)
        return RowGrads(rows, values.astype(self.dtype), self.num_rows, is_merged=True)

    def check(self, table: chex.Array | None = None) -> None:
        """Raises a ValueError unless the arrays fit each other, and the table if it is given."""
        rows, values = jnp.shape(self.rows), jnp.shape(self.values)
        if len(rows) != 1 or len(values) != 2 or rows[0] != values[0]:
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
        """The gradient as an array [num_rows, width]."""
        return add_to_rows(jnp.zeros(self.shape, self.dtype), self.merge())

    @classmethod
    def from_dense(cls, gradient: chex.Array, rows: chex.Array) -> "RowGrads":
        """Of a dense gradient [num_rows, width], the rows named in `rows` [*shape], each once."""
        num_rows = gradient.shape[0]
        (values,), rows = take_same_rows((gradient,), rows.reshape(-1), fill_value=0.0)
        first = _first_of_each(rows, num_rows)
        return cls(
            jnp.where(first, rows, num_rows),
            jnp.where(_across(first, values), values, 0),
            num_rows,
            is_merged=True,
        )

    def __add__(self, other: "RowGrads") -> "RowGrads":
        if not isinstance(other, RowGrads):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(
                f"only gradients of one table add up, got tables {self.shape} and {other.shape}."
            )
        rows = jnp.concatenate((self.rows, other.rows))
        return RowGrads(rows, jnp.concatenate((self.values, other.values)), self.num_rows)

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
        return dataclasses.replace(self, values=self.values * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: chex.Numeric) -> "RowGrads":
        return dataclasses.replace(self, values=self.values / divisor)


def check_merge_method(method: str | None) -> None:
    """Raises a ValueError unless `RowGrads.merge` knows the method."""
    if method is not None and method not in MERGE_METHODS:
        raise ValueError(f"method must be one of {', '.join(MERGE_METHODS)}, got {method!r}.")


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
    return (
        jnp.asarray(table)
        .at[updates.rows]
        .add(
            updates.values.astype(table.dtype),
            mode="drop",
            wrap_negative_indices=False,
            unique_indices=updates.is_merged,
        )
    )


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
        take_same_rows((table,), index, fill_value=fill_value)
        for table, index in zip(tables, indices, strict=True)
    ]
    return tuple(rows for (rows,), _ in taken), tuple(index for _, index in taken)


def take_same_rows(
    arrays: Sequence[chex.Array], index: chex.Array, *, fill_value: float
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """`take_rows` of the same rows from several arrays [num_rows, ...], in one conditional."""
    num_rows = arrays[0].shape[0]
    index = _rows_or_end(device_index(index, num_rows), num_rows)
    arrays = tuple(map(jnp.asarray, arrays))

    def read(arrays: Sequence[jax.Array], index: jax.Array) -> tuple[Any, jax.Array]:
        return tuple(_rows_or_zeros(array, index) for array in arrays), index

    def skip(arrays: Sequence[jax.Array], index: jax.Array) -> tuple[Any, jax.Array]:
        shapes = [(*index.shape, *array.shape[1:]) for array in arrays]
        zeros = (jnp.zeros(s, a.dtype) for s, a in zip(shapes, arrays, strict=True))
        return tuple(zeros), jnp.full_like(index, num_rows)

    if index.size == 0:
        return skip(arrays, index)
    rows, index = jax.lax.cond(jnp.any(index < num_rows), read, skip, arrays, index)
    if fill_value != 0:
        in_table = index < num_rows
        rows = tuple(jnp.where(_across(in_table, each), each, fill_value) for each in rows)
    return rows, index


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
        leaves, tree = jax.tree.flatten(params)
        marks = _marks(by_rows, params)
        tables = [leaf for leaf, mark in zip(leaves, marks, strict=True) if mark]
        dense = [leaf for leaf, mark in zip(leaves, marks, strict=True) if not mark]

        def join(tables: Sequence[Any], dense: Sequence[Any]) -> Any:
            tables_left, dense_left = iter(tables), iter(dense)
            joined = [next(tables_left if mark else dense_left) for mark in marks]
            return jax.tree.unflatten(tree, joined)

        def recorded(reads: Sequence[LookedUp], dense: Sequence[Any]) -> Any:
            return fun(join(reads, dense), *args, **kwargs)

        def with_offsets(dense: Any, offsets: Any) -> tuple[Any, Any]:
            reads = [LookedUp(*pair) for pair in zip(tables, offsets, strict=True)]
            result = recorded(reads, dense)
            value, aux = result if has_aux else (result, None)
            return value, (aux, [read.indices for read in reads])

        offsets = zero_offsets(lambda reads: recorded(reads, dense), tables)
        (value, (aux, indices)), (dense_grads, offset_grads) = jax.value_and_grad(
            with_offsets, argnums=(0, 1), has_aux=True
        )(dense, offsets)
        grads = join(row_grads(tables, indices, offset_grads), dense_grads)
        return ((value, aux) if has_aux else value), grads

    return differentiated


def _marks(by_rows: Any, params: Any) -> list[bool]:
    """For each leaf of the parameters, whether it is a table to be trained by rows."""
    given = jax.tree.leaves(by_rows)
    if not all(isinstance(mark, bool) for mark in given):
        wrong = next(mark for mark in given if not isinstance(mark, bool))
        raise ValueError(f"by_rows must hold bools, such as config.large_tables, got {wrong!r}.")
    try:
        return jax.tree.leaves(jax.tree.broadcast(by_rows, params))
    except ValueError as error:
        raise ValueError(
            f"by_rows must be a tree of bools over the parameters, or a prefix of one: {error}"
        ) from error


class LookedUp(RowTable):
    """A table that can only be looked up, and records how.

    To the rows of each look-up it adds an offset of zero. The derivative with respect to the
    offset is the derivative with respect to the rows.

    Args:
      table: the array [rows, width].
      offsets: one array [*shape, width] for each look-up to come, in their order; None where this
        is yet to be found out.
    """

    def __init__(self, table: chex.Array, offsets: Sequence[chex.Array] | None = None) -> None:
        self.shape, self.dtype, self.ndim = table.shape, table.dtype, table.ndim
        self.indices: list[jax.Array] = []
        self._table = table
        self._offsets = offsets
        self._trace = _current_trace()

    def take(self, index: chex.Array, fill_value: float) -> jax.Array:
        """Rows [*index.shape, width]; those outside the table hold `fill_value`."""
        if _current_trace() != self._trace:
            raise TypeError(
                f"a table of shape {self.shape} trained by rows is looked up inside another JAX "
                "transformation (jax.vmap, jax.lax.scan, jax.checkpoint or an inner jax.jit): look "
                "up before it, or train the table densely, with a larger large_table_rows."
            )
        (rows,), index = take_same_rows((self._table,), index, fill_value=fill_value)
        self.indices.append(index)
        if self._offsets is None:
            return rows
        return rows + self._offsets[len(self.indices) - 1]

    def __getitem__(self, key: Any) -> "LookedUp":
        return self if key is Ellipsis else self._refuse()

    def __getattr__(self, name: str) -> NoReturn:
        raise _OnlyLookedUpError(repr(self))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise _OnlyLookedUpError(repr(self))

    def __repr__(self) -> str:
        # Also what JAX quotes when it refuses the object in its own words.
        return (
            f"a table of shape {self.shape} trained by rows can only be looked up, with "
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
) -> list[list[jax.Array]]:
    """The offsets for all look-ups that a function does in tables [rows, width], none computed."""
    shapes: list[list[tuple[int, ...]]] = []

    def record(tables: Sequence[chex.Array]) -> None:
        reads = [LookedUp(table) for table in tables]
        fun(reads)
        shapes.extend([index.shape for index in read.indices] for read in reads)

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
        [jnp.zeros((*shape, *table.shape[1:]), table.dtype) for shape in of_table]
        for table, of_table in zip(tables, shapes, strict=True)
    ]


def row_grads(
    tables: Sequence[chex.Array],
    indices: Sequence[Sequence[jax.Array]],
    offset_grads: Sequence[Sequence[jax.Array]],
) -> list[RowGrads]:
    """One `RowGrads` for each table, of all its look-ups."""
    grads = []
    for table, of_table, values in zip(tables, indices, offset_grads, strict=True):
        shape, num_rows = table.shape[1:], table.shape[0]
        none = RowGrads(jnp.zeros(0, jnp.int32), jnp.zeros((0, *shape), table.dtype), num_rows)
        each = (
            RowGrads(rows.reshape(-1), value.reshape(-1, *shape), num_rows)
            for rows, value in zip(of_table, values, strict=True)
        )
        grads.append(functools.reduce(operator.add, each) if of_table else none)
    return grads


def _rows_or_zeros(table: jax.Array, index: jax.Array) -> jax.Array:
    in_table = index < table.shape[0]
    rows = table.at[jnp.where(in_table, index, 0)].get(mode="promise_in_bounds")
    # On the CPU a select of gathered rows is slow, as XLA does not vectorize it; with a product on
    # top it takes a third of the time.
    return jnp.where(_across(in_table, rows), rows, 0) * _across(in_table.astype(table.dtype), rows)


def _merge_by_hash(
    rows: jax.Array, values: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    positions = jnp.arange(rows.shape[0], dtype=jnp.int32)
    chosen = _representatives(rows, num_rows)
    summed = jnp.zeros_like(values).at[chosen].add(values, mode="promise_in_bounds")
    return jnp.where(chosen == positions, rows, num_rows), summed


def _first_of_each(rows: jax.Array, num_rows: int) -> jax.Array:
    """Whether a position is the one chosen among all that name its row."""
    positions = jnp.arange(rows.shape[0], dtype=jnp.int32)
    return (_representatives(rows, num_rows) == positions) & (rows < num_rows)


def _representatives(rows: jax.Array, num_rows: int) -> jax.Array:
    """For each position [m], one position of all that name the same row.

    Every position is written into the slot of its row, where the last one written stands for
    all. What was read back under another row number met a collision, and tries again with the next
    hash function; after the first round about one position in ten is left.
    """
    m = rows.shape[0]
    positions = jnp.arange(m, dtype=jnp.int32)
    if num_rows < _SLOTS_PER_LOOKUP * m:
        return jnp.zeros(num_rows + 1, jnp.int32).at[rows].set(positions)[rows]
    bits = max(1, (_SLOTS_PER_LOOKUP * m - 1).bit_length())

    def attempt(state: tuple[Any, ...]) -> tuple[Any, ...]:
        count, chosen, left = state
        slots = _hash(rows, count) >> (32 - bits)
        slots = slots.astype(jnp.int32)
        scratch = jnp.zeros(1 << bits, jnp.int32)
        scratch = scratch.at[jnp.where(left, slots, 1 << bits)].set(
            positions, mode="drop", wrap_negative_indices=False
        )
        candidates = scratch.at[slots].get(mode="promise_in_bounds")
        found = left & (rows.at[candidates].get(mode="promise_in_bounds") == rows)
        return count + 1, jnp.where(found, candidates, chosen), left & ~found

    start = attempt((jnp.uint32(0), positions, jnp.ones(m, bool)))
    return jax.lax.while_loop(lambda state: jnp.any(state[2]), attempt, start)[1]


def _hash(rows: jax.Array, seed: jax.Array) -> jax.Array:
    """Mixes 32 bits, differently for each seed: the finalizer of MurmurHash3."""
    bits = rows.astype(jnp.uint32) ^ (seed * jnp.uint32(0x9E3779B9))
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _merge_by_sort(
    rows: jax.Array, values: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Sorts, and sums each run of equal row numbers by a scan: no scatter, no atomics."""
    order = jnp.argsort(rows, stable=True)
    rows, values = rows[order], values[order]
    changes = rows[1:] != rows[:-1]
    starts = jnp.concatenate((jnp.ones(1, bool), changes))
    ends = jnp.concatenate((changes, jnp.ones(1, bool)))

    def join(left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[Any, Any]:
        (starts, sums), (later_starts, later_sums) = left, right
        sums = jnp.where(_across(later_starts, sums), later_sums, sums + later_sums)
        return starts | later_starts, sums

    _, sums = jax.lax.associative_scan(join, (starts, values))
    return jnp.where(ends, rows, num_rows), jnp.where(_across(ends, sums), sums, 0)


def _rows_or_end(rows: jax.Array, num_rows: int) -> jax.Array:
    """Row numbers, with num_rows for all that are outside the table."""
    rows = rows if num_rows <= jnp.iinfo(rows.dtype).max else rows.astype(jnp.int64)
    return jnp.where((rows >= 0) & (rows < num_rows), rows, num_rows)


def _across(per_row: jax.Array, rows: jax.Array) -> jax.Array:
    """[*shape] -> [*shape, 1, ...], of as many axes as the rows have."""
    return per_row.reshape(per_row.shape + (1,) * (rows.ndim - per_row.ndim))


def _current_trace() -> Any:
    return jax.extend.core.get_opaque_trace_state(convention="flax")
