"""Row gradients: the gradient of a large table that names only the rows touched.

A batch touches few rows of a large table, but `jax.grad` through a gather writes a gradient of the
table's size. `qrhash.autodiff` differentiates at the gathered rows instead; what comes back for a
table is a `RowGrads`, the row numbers looked up and the gradient of each of the rows read.
Duplicates are merged by `merge`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qrhash.merge import distinct_rows
from qrhash.opaque import as_integers, as_opaque
from qrhash.protocol import Packed, Storage
from qrhash.rows import across, device_index, read_rows
from qrhash.storage import LocalStorage
from qrhash.types import Array, Scalar

_LOCAL = LocalStorage()


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
    optimizer outside of `qrhash.touched_rows` raises an error, which mostly names it, and nothing
    adds up row numbers. `add_grads` and `sum_grads` add up trees, `global_norm` is their norm.

    Of a table on a mesh (`qrhash.ShardedTable`), indices and values are split as the batch is.
    Merged, they are where the rows are: row numbers within the shards [S, m], and [S, m, width].

    Args:
      indices: row numbers [m], integers.
      values: their gradients [m, width].
      num_rows: rows of the table.
      is_merged: whether no row is named twice, and values without a row are zero.
      storage: where the rows of the array are that this is the gradient of.
      spill: where an exchange had too little room: all rows are here instead.

    Attributes:
      indices: row numbers [m], int32; int64 for a table of 2**31 rows or more.

    >>> grads = RowGrads(jnp.array([1, 2, 1]), jnp.array([[1.0], [2.0], [3.0]]), num_rows=4)
    >>> grads.to_dense().tolist()
    [[0.0], [4.0], [2.0], [0.0]]
    """

    __slots__ = ("_opaque", "is_merged", "num_rows", "spill", "storage", "values")

    def __init__(
        self,
        indices: Array,
        values: Array,
        num_rows: int,
        is_merged: bool = False,
        storage: Storage = _LOCAL,
        spill: "RowGrads | None" = None,
    ) -> None:
        if jnp.issubdtype(jnp.result_type(indices), jnp.integer):
            # Of the host, they may be wider than the device's integers are.
            indices = as_opaque(_at_least_32_bits(device_index(indices, num_rows)))
        self._opaque: Any = indices
        self.values: Any = values
        self.num_rows = num_rows
        self.is_merged, self.storage, self.spill = is_merged, storage, spill

    @property
    def indices(self) -> Any:
        """Row numbers [m]; on a mesh and merged [S, m]."""
        return as_integers(self._opaque)

    def __reduce__(self) -> Any:
        static = (self.num_rows, self.is_merged, self.storage, self.spill)
        return RowGrads, (self.indices, self.values, *static)

    def __repr__(self) -> str:
        spill = "" if self.spill is None else f", spill={self.spill}"
        merged = ", is_merged=True" if self.is_merged else ""
        return (
            f"RowGrads(indices={self.indices}, values={self.values}, num_rows={self.num_rows}"
            f"{merged}{spill})"
        )

    def _tree_flatten(self) -> tuple[Any, Any]:
        static = (self.num_rows, self.is_merged, self.storage)
        return (self._opaque, self.values, self.spill), static

    def _tree_flatten_with_keys(self) -> tuple[Any, Any]:
        children, static = self._tree_flatten()
        keys = map(jax.tree_util.GetAttrKey, ("indices", "values", "spill"))
        return tuple(zip(keys, children, strict=True)), static

    @classmethod
    def _tree_unflatten(cls, static: Any, children: Any) -> "RowGrads":
        # Whatever stands for arrays in a tree is kept as it is.
        grads = object.__new__(cls)
        grads._opaque, grads.values, grads.spill = children
        grads.num_rows, grads.is_merged, grads.storage = static
        return grads

    def replace(self, **changes: Any) -> "RowGrads":
        """The same with other arguments."""
        names = ("indices", "values", "num_rows", "is_merged", "storage", "spill")
        return RowGrads(**{name: getattr(self, name) for name in names} | changes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this is the gradient of; on one device, of the table."""
        return self.storage.array_shape(self.num_rows, self.values.shape[self._index_ndim :])

    @property
    def _index_ndim(self) -> int:
        return 1 + self.storage.row_axis * self.is_merged

    @property
    def dtype(self) -> Any:
        """Dtype of the gradients."""
        return self.values.dtype

    def merge(self) -> "RowGrads":
        """Sums the gradients of rows named several times.

        Returns:
          `RowGrads` of the same m, in which every row is named at most once. The other positions
          have row number num_rows and values of zero. The sums are in no fixed order where
          `qrhash.tuning.merge_method` is "hash", on a CPU they always come out alike.
        """
        self.check()
        if not self.is_merged:
            return self.as_merged(*self.storage.merge(self.indices, self.values, self.num_rows))
        if self.spill is None:
            return self
        # One of the two names no row: side by side none is named twice.
        axis = self.storage.row_axis
        indices = jnp.concatenate((self.indices, self.spill.indices), axis)
        values = jnp.concatenate((self.values, self.spill.values), axis)
        return self.as_merged(indices, values)

    def as_merged(self, indices: jax.Array, values: jax.Array) -> "RowGrads":
        """Merged row numbers and gradients for the same array."""
        return self.replace(indices=indices, values=values, is_merged=True, spill=None)

    def pack(self) -> Packed | None:
        """The gradients packed for an exchange of fixed size, if that is how they are to travel."""
        self.check()
        if self.is_merged:
            return None
        return self.storage.pack(self.indices, self.values, self.num_rows)

    def check(self, param: Array | None = None) -> None:
        """Raises a ValueError unless the arrays fit each other, and the parameter if given."""
        indices, values = jnp.shape(self.indices), jnp.shape(self.values)
        axes = self._index_ndim
        if len(indices) != axes or len(values) != axes + 1 or indices != values[:-1]:
            raise ValueError(
                f"RowGrads take indices [m] and values [m, width], got shapes {indices} and "
                f"{values}: flatten the leading axes of both."
            )
        if not jnp.issubdtype(self.indices.dtype, jnp.integer):
            raise ValueError(
                f"RowGrads take integer indices, got {self.indices.dtype}: they were made of "
                "these, or a tree operation changed them. Transformations of gradients belong "
                "inside qrhash.touched_rows."
            )
        if param is not None and param.shape != self.shape:
            raise ValueError(
                f"RowGrads of a table of shape {self.shape} do not fit one of {param.shape}."
            )

    def to_dense(self) -> jax.Array:
        """The gradient as an array of `shape`."""
        zeros = self.storage.constrain(jnp.zeros(self.shape, self.dtype))
        return add_to_rows(zeros, self.merge())

    @classmethod
    def from_dense(cls, gradient: Array, indices: Array) -> "RowGrads":
        """Of a dense gradient [num_rows, width], the rows named in indices [*shape], each once."""
        num_rows = gradient.shape[0]
        (values,), named = read_rows((gradient,), indices.reshape(-1))
        named, _ = distinct_rows(named, num_rows)
        values = jnp.where(across(named < num_rows, values), values, 0)
        return cls(named, values, num_rows, is_merged=True)

    def __add__(self, other: "RowGrads") -> "RowGrads":
        if not isinstance(other, RowGrads):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(
                f"only gradients of one table add up, got tables {self.shape} and {other.shape}."
            )
        storage = self.storage.joined(other.storage)
        if storage.row_axis and (self.is_merged or other.is_merged):
            raise ValueError("gradients of a table on a mesh add up before they are merged only.")
        both = storage.flatten((self.indices, other.indices), (self.values, other.values))
        return RowGrads(*both, self.num_rows, storage=storage)

    # An array left of a `+` leaves the sum to `__radd__`.
    __array_ufunc__ = None

    def __radd__(self, other: Any) -> Any:
        """A table + its update, as `optax.apply_updates` has it; and 0, where `sum` begins."""
        return self if isinstance(other, int) and other == 0 else add_to_rows(other, self)

    def __neg__(self) -> "RowGrads":
        return self * -1

    def __sub__(self, other: "RowGrads") -> "RowGrads":
        return self + -other

    def __mul__(self, factor: Scalar) -> "RowGrads":
        if isinstance(factor, RowGrads):
            return NotImplemented
        spill = None if self.spill is None else self.spill * factor
        return self._of_values(self.values * factor, spill)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Scalar) -> "RowGrads":
        if isinstance(divisor, RowGrads):
            return NotImplemented
        spill = None if self.spill is None else self.spill / divisor
        return self._of_values(self.values / divisor, spill)

    def _of_values(self, values: Any, spill: "RowGrads | None") -> "RowGrads":
        """Other values at the same row numbers."""
        static = (self.num_rows, self.is_merged, self.storage)
        return self._tree_unflatten(static, (self._opaque, values, spill))


def _at_least_32_bits(indices: jax.Array) -> jax.Array:
    return indices if indices.dtype in (jnp.int32, jnp.int64) else indices.astype(jnp.int32)


def is_row_grads(node: Any) -> bool:
    """Whether a node of a tree is a `RowGrads`: what `is_leaf` of `jax.tree.map` takes."""
    return isinstance(node, RowGrads)


jax.tree_util.register_pytree_with_keys(
    RowGrads,
    RowGrads._tree_flatten_with_keys,
    RowGrads._tree_unflatten,
    RowGrads._tree_flatten,
)


def add_to_rows(array: Array, updates: RowGrads) -> jax.Array:
    """Adds to the rows named, and touches no other; in place where XLA may."""
    updates.check(array)
    array, storage = jnp.asarray(array), updates.storage
    if not updates.is_merged:
        return storage.add_unmerged(array, updates.indices, updates.values, updates.num_rows)
    array = storage.add(array, updates.indices, updates.values)
    if updates.spill is None:
        return array
    return storage.add(array, updates.spill.indices, updates.spill.values, seldom=True)
