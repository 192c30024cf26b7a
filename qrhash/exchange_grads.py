"""Gradients between the devices of a mesh: to the devices that own their rows, and merged there.

The same two exchanges as in `qrhash.exchange`, the other way. "reduce" sends all gradients of a
group everywhere, and each device keeps what is its own (`merge_by_reduce`). "all_to_all" merges
first, sends each row to its owner (`pack`, then `send`), and has little room: whether it was enough
is known once the gradients are packed, and if not all go everywhere (`send_all`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qrhash.exchange import (
    capacity_of,
    claim_slots,
    exchange_for,
    my_part,
    owners_of,
    places_here,
)
from qrhash.layout import MeshLayout, owner_and_place
from qrhash.merge import merge_rows
from qrhash.protocol import Packed
from qrhash.rows import add_rows, flatten_rows, read_rows, set_rows


def flatten(
    layout: MeshLayout,
    indices: Sequence[jax.Array],
    values: Sequence[jax.Array],
    *,
    batch_axis: int,
) -> tuple[jax.Array, jax.Array]:
    """Row numbers [*shape] and values [*shape, width] of look-ups -> [m] and [m, width].

    Each device puts its own part together: the order is by devices, and nothing is moved.
    """

    def on_device(indices: Sequence[jax.Array], values: Sequence[jax.Array]) -> Any:
        flat = jnp.concatenate([index.reshape(-1) for index in indices])
        return flat, flatten_rows(indices, values)

    of_indices = [layout.batch_spec(index.ndim, batch_axis) for index in indices]
    of_values = [
        layout.rows_spec(value.ndim, spec) for value, spec in zip(values, of_indices, strict=True)
    ]
    run = layout.run(on_device, (list(of_indices), of_values), _batch_specs(layout))
    return run(list(indices), list(values))


def _batch_specs(layout: MeshLayout) -> tuple[PartitionSpec, PartitionSpec]:
    """Of row numbers [m] and gradients [m, width] where a batch's look-ups are."""
    of_indices = layout.batch_spec(1)
    return of_indices, layout.rows_spec(2, of_indices)


def _shard_specs(layout: MeshLayout) -> tuple[PartitionSpec, PartitionSpec]:
    """Of row numbers [S, m] and gradients [S, m, width] where the rows are."""
    return layout.table_spec(2), layout.table_spec(3)


def merge_by_reduce(
    layout: MeshLayout, num_rows: int, indices: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Brings gradients to the shards that own the rows, and merges them there.

    Args:
      layout: the table's layout.
      num_rows: rows of the table.
      indices: row numbers [m], split as the batch is.
      values: [m, width].

    Returns:
      Row numbers within the shards [S, m], each named once, and their sums [S, m, width].
    """
    if indices.shape[0] == 0:
        none = (layout.num_shards, 0)
        return jnp.zeros(none, indices.dtype), jnp.zeros((*none, *values.shape[1:]), values.dtype)

    def on_device(indices: jax.Array, values: jax.Array) -> Any:
        if layout.batch_axes:
            indices = jax.lax.all_gather(indices, layout.batch_axes, tiled=True)
            values = jax.lax.all_gather(values, layout.batch_axes, tiled=True)
        return _merged_here(layout, num_rows, places_here(layout, num_rows, indices), values)

    return layout.run(on_device, _batch_specs(layout), _shard_specs(layout))(indices, values)


def _merged_here(
    layout: MeshLayout, num_rows: int, places: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array]:
    places, sums = merge_rows(places, values, layout.rows_per_shard(num_rows))
    return places[None], sums[None]


@dataclasses.dataclass(frozen=True)
class MeshPacked(Packed):
    """Gradients packed for "all_to_all", as `pack` makes them.

    Attributes:
      layout: the table's layout.
      num_rows: rows of the table.
      distinct: row numbers [m], each named once on its device.
      sums: their gradients [m, width].
      slots: for each its slot in the buffer to be sent.
      overflows: see `Packed`.
    """

    layout: MeshLayout
    num_rows: int
    distinct: jax.Array
    sums: jax.Array
    slots: jax.Array
    overflows: jax.Array

    def send(self) -> tuple[jax.Array, jax.Array]:
        """See `Packed`."""
        layout, shards = self.layout, self.layout.num_shards
        end = layout.rows_per_shard(self.num_rows)

        def on_device(distinct: jax.Array, sums: jax.Array, slots: jax.Array) -> Any:
            # 1. Each row with its gradient into its slot.
            size = shards * capacity_of(layout, distinct.size)
            places = jnp.full(size, end, distinct.dtype)
            places = set_rows(places, slots, owner_and_place(distinct, shards)[1])
            values = set_rows(jnp.zeros((size, *sums.shape[1:]), sums.dtype), slots, sums)
            # 2. To the owners; and to all that own the same rows.
            places = jax.lax.all_to_all(places, layout.row_axes, 0, 0, tiled=True)
            values = jax.lax.all_to_all(values, layout.row_axes, 0, 0, tiled=True)
            if layout.batch_axes_alone:
                places = jax.lax.all_gather(places, layout.batch_axes_alone, tiled=True)
                values = jax.lax.all_gather(values, layout.batch_axes_alone, tiled=True)
            # 3. Merge what several devices sent for one row.
            return _merged_here(layout, self.num_rows, places, values)

        run = layout.run(on_device, _packed_specs(layout), _shard_specs(layout))
        return run(self.distinct, self.sums, self.slots)

    def send_all(self) -> tuple[jax.Array, jax.Array]:
        """See `Packed`."""
        whole = dataclasses.replace(self.layout, batch_axes=self.layout.lookup_axes)
        return merge_by_reduce(whole, self.num_rows, self.distinct, self.sums)


def pack(
    layout: MeshLayout, num_rows: int, indices: jax.Array, values: jax.Array
) -> MeshPacked | None:
    """Packs gradients for "all_to_all", if that is the exchange for them.

    Args:
      layout: the table's layout.
      num_rows: rows of the table.
      indices: row numbers [m], split as the batch is.
      values: [m, width].
    """
    row_bytes = values.dtype.itemsize * math.prod(values.shape[1:])
    lookups = indices.size // layout.size(layout.batch_axes)
    if exchange_for(layout, lookups, row_bytes) == "reduce":
        return None

    def on_device(indices: jax.Array, values: jax.Array) -> Any:
        indices, values = my_part(layout, indices, num_rows), my_part(layout, values, 0)
        distinct, sums = merge_rows(indices, values, num_rows)
        slots, overflows = claim_slots(layout, owners_of(layout, num_rows, distinct))
        return (distinct, sums, slots), overflows

    run = layout.run(on_device, _batch_specs(layout), (_packed_specs(layout), PartitionSpec()))
    (distinct, sums, slots), overflows = run(indices, values)
    return MeshPacked(layout, num_rows, distinct, sums, slots, overflows)


def _packed_specs(layout: MeshLayout) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    split = layout.lookup_axes or None
    return PartitionSpec(split), PartitionSpec(split, layout.column_axis), PartitionSpec(split)


# --- where the rows are ---------------------------------------------------------------------------


def read_in_shards(
    layout: MeshLayout, arrays: Sequence[jax.Array], places: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """`read_rows` of places within shards [S, m], from arrays [S, R, ...]."""

    def on_device(arrays: Sequence[jax.Array], places: jax.Array) -> Any:
        found, places = read_rows([array[0] for array in arrays], places[0])
        return tuple(each[None] for each in found), places[None]

    of_arrays = tuple(layout.table_spec(array.ndim) for array in arrays)
    in_specs = (of_arrays, layout.table_spec(2))
    return layout.run(on_device, in_specs, in_specs)(tuple(arrays), places)


def write_in_shards(
    layout: MeshLayout,
    write: Callable[..., jax.Array],
    array: jax.Array,
    places: jax.Array,
    values: jax.Array,
    *,
    seldom: bool,
) -> jax.Array:
    """`add_rows` or `set_rows` of merged values [S, m, ...] at places within shards [S, m].

    What `seldom` names any row is skipped where it does not.
    """

    def on_device(array: jax.Array, places: jax.Array, values: jax.Array) -> jax.Array:
        array, places, values = array[0], places[0], values[0]
        if not seldom:
            return write(array, places, values)[None]
        # A loop of no or one turn: a conditional would copy the array.
        turns = jnp.any(places < array.shape[0]).astype(jnp.int32)
        return jax.lax.fori_loop(0, turns, lambda _, old: write(old, places, values), array)[None]

    of_array = layout.table_spec(array.ndim)
    in_specs = (of_array, layout.table_spec(2), layout.table_spec(values.ndim))
    return layout.run(on_device, in_specs, of_array)(array, places, values)


def sum_in_shards(
    layout: MeshLayout, num_rows: int, places: jax.Array, sums: jax.Array
) -> jax.Array:
    """Merged gradients as one array [S, R, width]."""
    end = layout.rows_per_shard(num_rows)

    def on_device(places: jax.Array, sums: jax.Array) -> jax.Array:
        zeros = jnp.zeros((end, *sums.shape[2:]), sums.dtype)
        return add_rows(zeros, places[0], sums[0], is_merged=True)[None]

    in_specs = (layout.table_spec(2), layout.table_spec(sums.ndim))
    return layout.run(on_device, in_specs, in_specs[1])(places, sums)
