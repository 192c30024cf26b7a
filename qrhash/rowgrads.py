"""Row gradients: the gradient of a large table that names only the rows touched.

A batch touches few rows of a large table, but `jax.grad` through a gather writes a gradient of the
table's size. `qrhash.autodiff` differentiates at the gathered rows instead; what comes back for a
table is a `RowGrads`, the row numbers looked up and the gradient of each of the rows read.
Duplicates are merged by `merge`.

In the pure form, for those who take the steps themselves, `take_rows` is the gather of a training
step. Its care is for XLA, which updates a donated table in place only if it can see that every
read of the table comes before the update: the row numbers that it returns are results of the read.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import chex
import jax
import jax.extend.random
import jax.numpy as jnp

from qrhash.rows import (
    INT32_MAX,
    across,
    add_rows,
    as_one,
    check_merge_method,
    device_index,
    distinct_rows,
    merge_rows,
    read_rows,
    wide_dtype,
)
from qrhash.sharding import (
    Parcels,
    ShardedTable,
    Sharding,
    add_in_shards,
    flatten_lookups,
    to_owners,
)
from qrhash.tables import check_one_index_per_table


def _no_random_numbers(*_: Any, **__: Any) -> NoReturn:
    raise TypeError("the row numbers of RowGrads are no keys to draw random numbers from.")


def _row_number_type(words: int) -> Any:
    """An opaque dtype of so many 32-bit words: JAX refuses any arithmetic on it, and names it.

    JAX has one kind of opaque dtypes, that of random keys; nothing is ever drawn from these.
    """
    refuse = dict.fromkeys(("seed", "split", "random_bits", "fold_in"), _no_random_numbers)
    return jax.extend.random.define_prng_impl(
        key_shape=(words,),
        **refuse,
        name=f"row numbers of qrhash.RowGrads, {32 * words} bits",
        tag="row numbers of qrhash.RowGrads, whose optimizers go inside qrhash.touched_rows",
    )


_ROW_NUMBERS = {4: _row_number_type(1), 8: _row_number_type(2)}


def _as_opaque(rows: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(rows, jnp.uint32)
    words = words[..., None] if rows.dtype.itemsize == 4 else words
    return jax.random.wrap_key_data(words, impl=_ROW_NUMBERS[rows.dtype.itemsize])


def _as_integers(opaque: Any) -> Any:
    if not jax.dtypes.issubdtype(getattr(opaque, "dtype", None), jax.dtypes.prng_key):
        return opaque
    words = jax.random.key_data(opaque)
    if words.shape[-1] == 1:
        return jax.lax.bitcast_convert_type(words[..., 0], jnp.int32)
    return jax.lax.bitcast_convert_type(words, jnp.int64)


class _RowGradsType(type):
    """What JAX quotes where it meets `RowGrads` in place of an array: it says what to do."""

    def __repr__(cls) -> str:
        return (
            "<class 'qrhash.RowGrads', gradients by rows: the whole optimizer goes inside of "
            "qrhash.touched_rows>"
        )


class RowGrads(metaclass=_RowGradsType):
    """The gradient of a table [num_rows, width], zero but for the rows that it names.

    A row may be named several times: its gradient is the sum. A row number outside [0, num_rows)
    names no row, whatever its value. `g + g`, `2 * g` and `sum` are right. In the tree the row
    numbers are of a type that takes no arithmetic: `jax.tree.map(jnp.add, g, g)`, `psum`, or an
    optimizer outside of `qrhash.touched_rows` raises a TypeError that names it, and nothing adds
    up row numbers. `add_grads` and `sum_grads` add up trees, `global_norm` is their norm.

    Of a table on a mesh (`qrhash.ShardedTable`), `rows` and `values` are split as the batch is.
    Merged, they are where the rows are: row numbers within the shards [S, m], and [S, m, width].

    Args:
      rows: row numbers [m], integers.
      values: their gradients [m, width].
      num_rows: rows of the table.
      is_merged: whether no row is named twice, and values without a row are zero.
      sharding: the `Sharding` of a table on a mesh.
      spill: on a mesh, where an exchange had too little room: all rows are here instead.

    Attributes:
      rows: row numbers [m], int32; int64 for a table of 2**31 rows or more.

    >>> grads = RowGrads(jnp.array([1, 2, 1]), jnp.array([[1.0], [2.0], [3.0]]), num_rows=4)
    >>> grads.to_dense().tolist()
    [[0.0], [4.0], [2.0], [0.0]]
    """

    __slots__ = ("_opaque_rows", "is_merged", "num_rows", "sharding", "spill", "values")

    def __init__(
        self,
        rows: chex.Array,
        values: chex.Array,
        num_rows: int,
        is_merged: bool = False,
        sharding: Sharding | None = None,
        spill: "RowGrads | None" = None,
    ) -> None:
        if jnp.issubdtype(jnp.result_type(rows), jnp.integer):
            # Of the host, they may be wider than the device's integers are.
            end = num_rows if sharding is None or not is_merged else INT32_MAX
            rows = _as_opaque(_at_least_32_bits(device_index(rows, end)))
        self._opaque_rows, self.values, self.num_rows = rows, values, num_rows
        self.is_merged, self.sharding, self.spill = is_merged, sharding, spill

    @property
    def rows(self) -> Any:
        """Row numbers [m]; on a mesh and merged [S, m]."""
        return _as_integers(self._opaque_rows)

    def __reduce__(self) -> Any:
        static = (self.num_rows, self.is_merged, self.sharding, self.spill)
        return RowGrads, (self.rows, self.values, *static)

    def __repr__(self) -> str:
        rows = f"rows={self.rows}" if self.spill is None else f"rows={self.rows}, {self.spill=}"
        merged = ", is_merged=True" if self.is_merged else ""
        return f"RowGrads({rows}, values={self.values}, num_rows={self.num_rows}{merged})"

    def _tree_flatten(self) -> tuple[Any, Any]:
        return (self._opaque_rows, self.values, self.spill), (
            self.num_rows,
            self.is_merged,
            self.sharding,
        )

    def _tree_flatten_with_keys(self) -> tuple[Any, Any]:
        children, static = self._tree_flatten()
        keys = map(jax.tree_util.GetAttrKey, ("rows", "values", "spill"))
        return tuple(zip(keys, children, strict=True)), static

    @classmethod
    def _tree_unflatten(cls, static: Any, children: Any) -> "RowGrads":
        # Whatever stands for arrays in a tree is kept as it is.
        grads = object.__new__(cls)
        grads._opaque_rows, grads.values, grads.spill = children
        grads.num_rows, grads.is_merged, grads.sharding = static
        return grads

    def replace(self, **changes: Any) -> "RowGrads":
        """The same with other arguments."""
        names = ("rows", "values", "num_rows", "is_merged", "sharding", "spill")
        return RowGrads(**{name: getattr(self, name) for name in names} | changes)

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
        return self.replace(rows=rows, values=values, spill=None)

    def parcels(self, method: str | None) -> Parcels | None:
        """The gradients packed for "all_to_all", if that is how they are to be sent."""
        if self.sharding is None or not Parcels.are_right_for(
            self.sharding, self.rows, self.values
        ):
            return None
        return Parcels(self.sharding, self.num_rows, self.rows, self.values, method)

    def in_shards(self, rows: jax.Array, values: jax.Array) -> "RowGrads":
        """Merged gradients [S, m, width] of the same table on its mesh."""
        return self.replace(rows=rows, values=values, is_merged=True)

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
        return self._of_values(self.values * factor, spill)

    __rmul__ = __mul__

    def _of_values(self, values: jax.Array, spill: "RowGrads | None") -> "RowGrads":
        """Other values at the same row numbers."""
        static = (self.num_rows, self.is_merged, self.sharding)
        return self._tree_unflatten(static, (self._opaque_rows, values, spill))

    def __truediv__(self, divisor: chex.Numeric) -> "RowGrads":
        spill = None if self.spill is None else self.spill / divisor
        return self._of_values(self.values / divisor, spill)


def _at_least_32_bits(rows: jax.Array) -> jax.Array:
    return rows if rows.dtype in (jnp.int32, jnp.int64) else rows.astype(jnp.int32)


def is_row_grads(node: Any) -> bool:
    """Whether a node of a tree is a `RowGrads`: what `is_leaf` of `jax.tree.map` takes."""
    return isinstance(node, RowGrads)


jax.tree_util.register_pytree_with_keys(
    RowGrads,
    RowGrads._tree_flatten_with_keys,
    RowGrads._tree_unflatten,
    RowGrads._tree_flatten,
)


def global_norm(grads: Any) -> jax.Array:
    """The Euclidean norm of a tree of gradients, that of the dense ones: `optax.global_norm`.

    Args:
      grads: a tree of arrays and `RowGrads`.

    Returns:
      A scalar: the root of the sum of all squares, rows named several times summed first.

    >>> grads = RowGrads(jnp.array([1, 1]), jnp.array([[1.0], [2.0]]), num_rows=4)
    >>> global_norm({"table": grads, "bias": jnp.array([4.0])}).item()
    5.0
    """

    def squares(grad: Any) -> jax.Array:
        merged = grad.merge() if is_row_grads(grad) else grad
        values = merged.values if is_row_grads(merged) else jnp.asarray(merged)
        wide = values.astype(wide_dtype(values.dtype))
        return jnp.sum(jnp.square(jnp.abs(wide)))

    total = map(squares, jax.tree.leaves(grads, is_leaf=is_row_grads))
    return jnp.sqrt(sum(total, start=jnp.zeros(())))


def add_grads(*grads: Any) -> Any:
    """Adds up trees of gradients, of several batches for instance.

    The sum over microbatches of their gradients is the gradient of the sum of their losses.

    Args:
      *grads: trees of one structure, of arrays and `RowGrads` (inside `ShardedTable`s too).

    Returns:
      The tree of their sums. A `RowGrads` of the sum names the rows of each.

    Raises:
      ValueError: no trees, or trees of other structures.
      TypeError: gradients of other kinds at one place.

    >>> one = {"table": RowGrads(jnp.array([1]), jnp.ones((1, 2)), num_rows=4), "bias": 1.0}
    >>> total = add_grads(one, one)
    >>> total["table"].to_dense()[1].tolist(), total["bias"]
    ([2.0, 2.0], 2.0)
    """
    if not grads:
        raise ValueError("add_grads takes at least one tree of gradients, got none.")
    leaves, tree = jax.tree.flatten(grads[0], is_leaf=is_row_grads)
    others: list[tuple[list[Any], Any]]
    others = [jax.tree.flatten(other, is_leaf=is_row_grads) for other in grads[1:]]
    for number, (_, of_other) in enumerate(others, start=1):
        if of_other != tree:
            raise ValueError(
                f"add_grads takes trees of one structure, but tree {number} is {of_other}, and "
                f"tree 0 is {tree}."
            )
    for leaf, *rest in zip(leaves, *(each for each, _ in others), strict=True):
        if len({is_row_grads(each) for each in (leaf, *rest)}) > 1:
            raise TypeError(
                "add_grads met RowGrads and a dense gradient for one table: make the former dense "
                "with to_dense()."
            )
    sums = [
        functools.reduce(operator.add, of_leaf)
        for of_leaf in zip(leaves, *(each for each, _ in others), strict=True)
    ]
    return jax.tree.unflatten(tree, sums)


def sum_grads(stacked: Any) -> Any:
    """The sum over a leading axis, as `jax.lax.scan` and `jax.vmap` stack what they return.

    So gradients are accumulated over microbatches in a loop: return those of each turn, and sum
    them up afterwards. (A carry cannot add them up, as every turn names other rows.)

        losses, grads = jax.lax.map(lambda batch: step(params, batch), batches)
        grads = qrhash.sum_grads(grads)

    Args:
      stacked: a tree of arrays [n, ...] and of unmerged `RowGrads` with rows [n, m] and values
        [n, m, width].

    Returns:
      The tree of sums: arrays [...], and `RowGrads` of n * m row numbers.

    Raises:
      ValueError: `RowGrads` without such an axis, or merged ones.

    >>> one = RowGrads(jnp.array([1, 2]), jnp.ones((2, 1)), num_rows=4)
    >>> _, stacked = jax.lax.scan(lambda _, __: (None, one), None, length=3)
    >>> sum_grads(stacked).to_dense()[:, 0].tolist()
    [0.0, 3.0, 3.0, 0.0]
    """

    def total(grad: Any) -> Any:
        if not is_row_grads(grad):
            return jnp.sum(grad, axis=0)
        rows = grad.rows
        if jnp.ndim(rows) != 2 or grad.is_merged:
            raise ValueError(
                f"sum_grads takes unmerged RowGrads stacked along a leading axis, of rows [n, m], "
                f"got {'merged ones' if grad.is_merged else f'rows of shape {jnp.shape(rows)}'}."
            )
        if grad.sharding is not None:
            flat = flatten_lookups(grad.sharding, 1, [rows], [grad.values])
        else:
            flat = rows.reshape(-1), grad.values.reshape(-1, *grad.values.shape[2:])
        return RowGrads(*flat, grad.num_rows, sharding=grad.sharding)

    return jax.tree.map(total, stacked, is_leaf=is_row_grads)


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
