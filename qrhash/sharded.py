"""`ShardedTable`: a large table on a mesh, split by rows."""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import with_sharding_constraint
from jax.sharding import NamedSharding, PartitionSpec

from qrhash import exchange, exchange_grads
from qrhash.arithmetic import ceil_div
from qrhash.layout import MeshLayout, check_layout, join_rows, split_rows
from qrhash.protocol import LookUps, Packed, Storage, Table
from qrhash.rowgrads import RowGrads
from qrhash.rows import add_rows, device_index, rows_or_end, set_rows
from qrhash.take import take
from qrhash.types import Array, Scalar, wide_dtype


@dataclasses.dataclass(frozen=True)
class MeshStorage(Storage):
    """Rows of an array [S, R, ...] split over a mesh; see `Storage`.

    Attributes:
      layout: which device owns a row.
    """

    layout: MeshLayout

    row_axis = 1

    def array_shape(self, num_rows: int, row: tuple[int, ...]) -> tuple[int, ...]:
        """See `Storage`."""
        return (self.layout.num_shards, self.layout.rows_per_shard(num_rows), *row)

    def flatten(
        self, indices: Sequence[jax.Array], values: Sequence[jax.Array], *, batch_axis: int = 0
    ) -> tuple[jax.Array, jax.Array]:
        """See `Storage`."""
        return exchange_grads.flatten(self.layout, indices, values, batch_axis=batch_axis)

    def merge(
        self, indices: jax.Array, values: jax.Array, num_rows: int
    ) -> tuple[jax.Array, jax.Array]:
        """See `Storage`."""
        return exchange_grads.merge_by_reduce(self.layout, num_rows, indices, values)

    def pack(self, indices: jax.Array, values: jax.Array, num_rows: int) -> Packed | None:
        """See `Storage`."""
        return exchange_grads.pack(self.layout, num_rows, indices, values)

    def read(
        self, arrays: Sequence[jax.Array], indices: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """See `Storage`."""
        return exchange_grads.read_in_shards(self.layout, arrays, indices)

    def add(
        self, array: jax.Array, indices: jax.Array, values: jax.Array, *, seldom: bool = False
    ) -> jax.Array:
        """See `Storage`."""
        write = functools.partial(add_rows, is_merged=True)
        return exchange_grads.write_in_shards(
            self.layout, write, array, indices, values, seldom=seldom
        )

    def set(
        self, array: jax.Array, indices: jax.Array, values: jax.Array, *, seldom: bool = False
    ) -> jax.Array:
        """See `Storage`."""
        return exchange_grads.write_in_shards(
            self.layout, set_rows, array, indices, values, seldom=seldom
        )

    def joined(self, other: Storage) -> Storage:
        """See `Storage`."""
        if other == self:
            return self
        # Batches that were split in different ways, or not at all.
        return MeshStorage(dataclasses.replace(self.layout, batch_axes=()))

    def to_order(self, array: jax.Array, num_rows: int) -> jax.Array:
        """See `Storage`."""
        if self.layout.is_explicit:
            array = jax.sharding.reshard(array, NamedSharding(self.layout.mesh, PartitionSpec()))
        return join_rows(array, num_rows)

    def from_order(self, rows: jax.Array) -> jax.Array:
        """See `Storage`."""
        return self.constrain(split_rows(rows, self.layout.num_shards))

    def constrain(self, array: jax.Array) -> jax.Array:
        """See `Storage`."""
        lay_out = jax.sharding.reshard if self.layout.is_explicit else with_sharding_constraint
        return lay_out(array, self.layout.table_sharding(array.ndim))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("array",), meta_fields=("num_rows", "layout")
)
@dataclasses.dataclass(frozen=True, eq=False)
class ShardedTable(Table):
    """A large table on a mesh: stands for an array [num_rows, width] in look-ups and in training.

    As a pytree it has one leaf, the array: optimizers keep their state in the same layout.

    Attributes:
      array: [S, R, width], see `qrhash.layout`.
      num_rows: rows of the table, without padding.
      layout: its `MeshLayout`.
    """

    array: Any
    num_rows: int
    layout: MeshLayout

    @property
    def shape(self) -> tuple[int, ...]:
        """[num_rows, width]."""
        return (self.num_rows, *self.array.shape[2:])

    @property
    def dtype(self) -> np.dtype:
        """Of its entries."""
        return self.array.dtype

    def with_array(self, array: Any) -> Self:
        """Another array in the same layout."""
        return dataclasses.replace(self, array=array)

    # Gradients of tables add up, and are scaled, as arrays and `RowGrads` are.
    def __add__(self, other: "ShardedTable") -> "ShardedTable":
        if not isinstance(other, ShardedTable):
            return NotImplemented
        if (self.num_rows, self.layout) != (other.num_rows, other.layout):
            raise ValueError("only tables, or gradients, of one number of rows and layout add up.")
        return self.with_array(self.array + other.array)

    def __radd__(self, other: Any) -> "ShardedTable":
        """0 + the table: where `sum` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    # An array left of an operator leaves it to the table.
    __array_ufunc__ = None

    def __neg__(self) -> "ShardedTable":
        return self.with_array(-self.array)

    def __sub__(self, other: "ShardedTable") -> "ShardedTable":
        return self + -other if isinstance(other, ShardedTable) else NotImplemented

    def __mul__(self, factor: Scalar) -> "ShardedTable":
        return self.with_array(self.array * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Scalar) -> "ShardedTable":
        return self.with_array(self.array / divisor)

    def take(self, indices: Sequence[jax.Array], look_ups: LookUps) -> list[jax.Array]:
        """See `Table`."""
        return self.read(indices, look_ups)[0]

    def read(
        self, indices: Sequence[jax.Array], look_ups: LookUps
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """See `Table`."""
        n, axis = self.num_rows, look_ups.batch_axis
        checked = [rows_or_end(device_index(index, n), n) for index in indices]
        layout = self.layout.for_batch(checked, axis)
        return exchange.read(layout, n, self.array, checked, batch_axis=axis)

    def take_from_many(self, indices: Sequence[jax.Array], look_ups: LookUps) -> list[jax.Array]:
        """See `Table`: one after the other."""
        axis = look_ups.batch_axis
        each = [
            take(
                self.with_array(array),
                [jnp.take(index, number, axis) for index in indices],
                look_ups,
            )
            for number, array in enumerate(self.array)
        ]
        return [jnp.stack(rows, axis) for rows in zip(*each, strict=True)]

    def gradient(
        self, indices: Sequence[jax.Array], cotangents: Sequence[jax.Array], look_ups: LookUps
    ) -> Self:
        """See `Table`: its look-ups' gradients, added up where the rows are."""
        axis, num_rows = look_ups.batch_axis, self.num_rows
        layout = self.layout.for_batch(indices, axis)
        values = [each.astype(wide_dtype(each.dtype)) for each in cotangents]
        flat = exchange_grads.flatten(layout, indices, values, batch_axis=axis)
        merged = exchange_grads.merge_by_reduce(layout, num_rows, *flat)
        return self.with_array(exchange_grads.sum_in_shards(layout, num_rows, *merged))

    def row_grads(
        self,
        indices: Sequence[jax.Array],
        values: Sequence[jax.Array],
        look_ups: LookUps,
        *,
        num_loops: int = 0,
    ) -> Self:
        """See `Table`."""
        axis = look_ups.batch_axis + num_loops
        if indices:
            storage = MeshStorage(self.layout.for_batch(indices, axis))
            flat = storage.flatten(indices, values, batch_axis=axis)
        else:
            storage = MeshStorage(self.layout)
            flat = jnp.zeros(0, jnp.int32), jnp.zeros((0, *self.shape[1:]), self.dtype)
        return self.with_array(RowGrads(*flat, self.num_rows, storage=storage))

    def products(self, query: jax.Array) -> "ShardedTable":
        """See `Table`."""
        products = jnp.einsum("srf,...f->sr...", self.array.astype(query.dtype), query)
        layout = dataclasses.replace(self.layout, column_axis=None)
        return ShardedTable(products, self.num_rows, layout)

    def shardings(self) -> "ShardedTable":
        """See `Table`."""
        return self.with_array(self.layout.table_sharding(self.array.ndim))

    def __reduce__(self) -> Any:
        return _unpickled, (self.array, self.num_rows, self.layout)

    def in_place(self) -> "ShardedTable":
        """The table with its array where its layout says, as pickle does not keep it."""
        return jax.device_put(self, self.shardings()) if _is_concrete(self.array) else self

    def warn_if_elsewhere(self) -> None:
        """Warns of an array that is not where its layout says; of a traced one nothing is known.

        The numbers are right nonetheless, but every look-up moves the table, or every device holds
        all of it.
        """
        array, layout = self.array, self.layout
        if not _is_concrete(array):
            return
        to = layout.table_sharding(array.ndim)
        if not array.sharding.is_equivalent_to(to, array.ndim):
            warnings.warn(
                f"a table of shape {self.shape} is not where its layout says, {to.spec} of "
                f"{layout.num_shards} shards, but at {array.sharding}: it takes up to "
                f"{layout.num_shards} times the memory, and is moved in every look-up. Put it "
                "there with jax.device_put(tables, layout.shardings(tables)).",
                stacklevel=3,
            )

    def to_array(self) -> jax.Array:
        """All rows, [num_rows, width], in their order: for tables that fit one device."""
        return MeshStorage(self.layout).to_order(self.array, self.num_rows)

    @classmethod
    def from_array(cls, table: Array, layout: MeshLayout) -> "ShardedTable":
        """A table [num_rows, width] split over a mesh."""
        check_layout(layout)
        if len(np.shape(table)) != 2:
            raise ValueError(f"table must be of shape [rows, width], got {np.shape(table)}.")
        num_rows, width = table.shape
        layout.array_shape(num_rows, width)  # raises if the width cannot be split
        array = split_rows(table, layout.num_shards)
        return cls(jax.device_put(array, layout.table_sharding()), num_rows, layout)

    def lengthened(self, num_rows: int) -> "ShardedTable":
        """With more rows, of zeros, behind those that it has: all of these stay where they are."""
        more = self.layout.rows_per_shard(num_rows) - self.array.shape[1]
        longer = jax.jit(
            lambda array: jnp.pad(array, ((0, 0), (0, more), (0, 0))),
            out_shardings=self.layout.table_sharding(),
        )
        return ShardedTable(longer(self.array), num_rows, self.layout)

    def to_file(self) -> jax.Array:
        """All rows in their order and split in blocks, [n, width], n >= num_rows.

        Every device sends its rows to where they belong: none ever holds more than two shards.
        """
        return _in_order(self.layout, self.array)

    def from_file(self, rows: jax.Array) -> "ShardedTable":
        """The table of the same layout with these rows, as `to_file` gives them."""
        return self.with_array(_from_order(self.layout, self.array.shape[1], rows))

    @property
    def file_type(self) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding of `to_file`."""
        shards, rows, *rest = self.array.shape
        shape = (shards * shards * ceil_div(rows, shards), *rest)
        to = NamedSharding(self.layout.mesh, _ordered_spec(self.layout, self.array.ndim))
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=to)


def _is_concrete(array: Any) -> bool:
    return isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)


def _unpickled(array: Any, num_rows: int, layout: MeshLayout) -> ShardedTable:
    return ShardedTable(array, num_rows, layout).in_place()


# A device's rows, those at places [R] of its shard, are every S-th of the table. In the order of
# files a device has a block of neighbouring rows: from each shard R / S of them, in turn.


def _ordered_spec(layout: MeshLayout, ndim: int) -> PartitionSpec:
    return PartitionSpec(layout.row_axes or None, *layout.table_spec(ndim)[2:])


@functools.partial(jax.jit, static_argnums=0)
def _in_order(layout: MeshLayout, array: jax.Array) -> jax.Array:
    shards, rows = array.shape[:2]
    block = ceil_div(rows, shards)

    def send(array: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, block * shards - rows), *[(0, 0)] * (array.ndim - 2)]
        parts = jnp.pad(array, padding)[0].reshape(shards, block, *array.shape[2:])
        if layout.row_axes:
            parts = jax.lax.all_to_all(parts, layout.row_axes, 0, 0, tiled=True)
        return join_rows(parts, shards * block)

    spec, ordered = layout.table_spec(array.ndim), _ordered_spec(layout, array.ndim)
    return layout.run(send, (spec,), ordered)(array)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _from_order(layout: MeshLayout, rows_per_shard: int, rows: jax.Array) -> jax.Array:
    def send(rows: jax.Array) -> jax.Array:
        parts = split_rows(rows, layout.num_shards)
        if layout.row_axes:
            parts = jax.lax.all_to_all(parts, layout.row_axes, 0, 0, tiled=True)
        return parts.reshape(1, -1, *rows.shape[1:])[:, :rows_per_shard]

    spec, ordered = layout.table_spec(rows.ndim + 1), _ordered_spec(layout, rows.ndim + 1)
    return layout.run(send, (ordered,), spec)(rows)
