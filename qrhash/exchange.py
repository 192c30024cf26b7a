"""Rows between the devices of a mesh: two exchanges.

A look-up moves rows of the batch, never a table, and gradients go back the same way (see
`qrhash.exchange_grads`):

* "reduce": every device looks for all rows of its group, those of other shards being zeros, and the
  results are summed over the group. It never overflows.
* "all_to_all": every device merges its own row numbers, sends each to the shard that owns the row
  (input_dist), which looks it up (lookup) and sends the row back (output_dist): the traffic of a
  device falls with the number of devices. There is room for `capacity` rows from one device to
  another; a batch that needs more, on any device, goes by "reduce" as a whole.

Below, S is the number of shards, R their rows, m the look-ups of one device.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qrhash.arithmetic import ceil_div
from qrhash.layout import MeshLayout, owner_and_place
from qrhash.merge import distinct_rows
from qrhash.rows import flatten_indices, read_rows, set_rows

_INDEX_BYTES = 4


# --- which exchange -------------------------------------------------------------------------------


def exchange_for(layout: MeshLayout, lookups: int, row_bytes: float) -> str:
    """Which exchange, for so many look-ups of one device, of rows of so many bytes."""
    if layout.num_shards == 1 or lookups == 0:
        return "reduce"  # nothing travels
    if layout.exchange != "auto":
        return layout.exchange
    received = bytes_received(layout, lookups, row_bytes)
    return min(("reduce", "all_to_all"), key=received.__getitem__)


def bytes_received(layout: MeshLayout, lookups: int, row_bytes: float) -> dict[str, float]:
    """What a device receives in a step, forward and backward, by either exchange."""
    named_row = row_bytes + _INDEX_BYTES
    batch, shared, alone = map(
        layout.size, (layout.batch_axes, layout.shared_axes, layout.row_axes_alone)
    )
    # Forward: row numbers of the group, and rows back. Backward: all gradients of the batch.
    by_reduce = (shared - 1) * lookups * named_row + (batch - 1) * lookups * named_row
    by_reduce += 2 * (alone - 1) / alone * lookups * shared * row_bytes
    # A device sends a buffer of fixed size to every shard, filled or not; its own stays at home.
    # Gradients go on from there to all devices that own the same rows.
    mine = ceil_div(lookups, alone)
    shards, owners = layout.num_shards, layout.size(layout.batch_axes_alone)
    buffers = 2 * (shards - 1) + (owners - 1) * shards
    by_all_to_all = buffers * capacity_of(layout, mine) * named_row
    by_all_to_all += (alone - 1) * mine * row_bytes
    return {"reduce": by_reduce, "all_to_all": by_all_to_all}


def capacity_of(layout: MeshLayout, lookups: int) -> int:
    """Rows from one device to another, for so many look-ups of one device."""
    if layout.capacity is not None:
        return min(layout.capacity, lookups)
    mean = lookups / layout.num_shards
    # Six standard deviations above the mean, in multiples of 8.
    return min(lookups, 8 * ceil_div(math.ceil(mean + 6 * mean**0.5), 8))


# --- rows -----------------------------------------------------------------------------------------


def read(
    layout: MeshLayout,
    num_rows: int,
    array: jax.Array,
    indices: Sequence[jax.Array],
    *,
    batch_axis: int,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Rows of a table on a mesh, ordered before any update; see `Table.read`.

    Args:
      layout: its layout, for this batch.
      num_rows: rows of the table.
      array: [S, R, ...].
      indices: row numbers [*shape] each, num_rows for none.
      batch_axis: the axis of the indices that is the batch's.

    Returns:
      For each index, rows [*shape, ...]; and the row numbers, as results of the read.
    """
    if not sum(index.size for index in indices):
        none = [jnp.zeros((*index.shape, *array.shape[2:]), array.dtype) for index in indices]
        return none, list(indices)

    def on_device(array: jax.Array, *indices: jax.Array) -> Any:
        flat, split = flatten_indices(indices, num_rows)
        rows, token = _read_flat(layout, num_rows, array[0], flat.reshape(-1))
        if len(indices) == 1:
            rows = rows.reshape(*indices[0].shape, *rows.shape[1:])
        return split(rows), [jnp.where(token, index, num_rows) for index in indices]

    of_indices = [layout.batch_spec(index.ndim, batch_axis) for index in indices]
    of_rows = [
        layout.rows_spec(index.ndim + array.ndim - 2, spec)
        for index, spec in zip(indices, of_indices, strict=True)
    ]
    in_specs = (layout.table_spec(array.ndim), *of_indices)
    return layout.run(on_device, in_specs, (of_rows, of_indices))(array, *indices)


def _read_flat(
    layout: MeshLayout, num_rows: int, shard: jax.Array, indices: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """On one device: its shard [R, ...] and row numbers [m] -> rows [m, ...], and a token.

    The token is true, and a result of the read: what depends on it comes later.
    """
    row_bytes = shard.dtype.itemsize * math.prod(shard.shape[1:])
    by_reduce = functools.partial(_read_by_reduce, layout, num_rows)
    if exchange_for(layout, indices.size, row_bytes) == "reduce":
        return by_reduce(shard, indices)
    # 1. Name every row once, and claim a slot for it in the buffer of the shard that owns it.
    mine = my_part(layout, indices, num_rows)
    distinct, chosen = distinct_rows(mine, num_rows)
    slots, overflows = claim_slots(layout, owners_of(layout, num_rows, distinct))

    def by_all_to_all(shard: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
        # 2. input_dist: places travel to their owners, in slots; one past the end of a shard for
        #    none.
        sent = layout.num_shards * capacity_of(layout, mine.size)
        wanted = jnp.full(sent, shard.shape[0], distinct.dtype)
        _, places = owner_and_place(distinct, layout.num_shards)
        wanted = set_rows(wanted, slots, places)
        local = jax.lax.all_to_all(wanted, layout.row_axes, 0, 0, tiled=True)
        # 3. lookup: the owners read, in order before any update.
        (found,), local = read_rows((shard,), local)
        # 4. output_dist: rows travel back the way the numbers came, into the same slots; duplicates
        #    share that of the row which stands for them.
        back = jax.lax.all_to_all(found, layout.row_axes, 0, 0, tiled=True)
        rows = back.at[slots[chosen]].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        # 5. Devices that look up the same ids have each asked for a part of them.
        if layout.row_axes_alone:
            rows = jax.lax.all_gather(rows, layout.row_axes_alone, tiled=True)[: indices.size]
        return rows, _token(local)

    # All devices agree on `overflows`: a collective in one branch alone would wait forever.
    return jax.lax.cond(overflows, by_reduce, by_all_to_all, shard, indices)


def _read_by_reduce(
    layout: MeshLayout, num_rows: int, shard: jax.Array, indices: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # 1. Along axes of rows and batch, every device learns what the others look up.
    group = indices
    if layout.shared_axes:
        group = jax.lax.all_gather(indices, layout.shared_axes, tiled=True)
    # 2. It reads what is its own, zeros for all else.
    (found,), local = read_rows((shard,), places_here(layout, num_rows, group))
    # 3. The sum over the owners is the row; each device keeps those of its own batch.
    if layout.row_axes_alone:
        found = jax.lax.psum(found, layout.row_axes_alone)
    if layout.shared_axes:
        found = jax.lax.psum_scatter(found, layout.shared_axes, tiled=True)
    return found, _token(local)


def _token(local: jax.Array) -> jax.Array:
    """A True that XLA cannot know before the read that these row numbers came out of."""
    return local[0] >= 0 if local.size else jnp.bool_(True)


def places_here(layout: MeshLayout, num_rows: int, indices: jax.Array) -> jax.Array:
    """Places in the device's own shard, one past its end for rows of other shards."""
    owner, place = owner_and_place(indices, layout.num_shards)
    is_mine = (indices < num_rows) & (owner == layout.shard().number)
    return jnp.where(is_mine, place, layout.rows_per_shard(num_rows))


def my_part(layout: MeshLayout, each: jax.Array, fill_value: Any) -> jax.Array:
    """This device's part of what stands alike on all devices along the axes of the rows alone."""
    devices = layout.size(layout.row_axes_alone)
    if devices == 1:
        return each
    size = ceil_div(each.shape[0], devices)
    padding = [(0, size * devices - each.shape[0]), *[(0, 0)] * (each.ndim - 1)]
    padded = jnp.pad(each, padding, constant_values=fill_value)
    start = jax.lax.axis_index(layout.row_axes_alone) * size
    return jax.lax.dynamic_slice_in_dim(padded, start, size)


def owners_of(layout: MeshLayout, num_rows: int, distinct: jax.Array) -> jax.Array:
    """The shards [m] that own rows [m], int32; their number where there is no row."""
    shards = layout.num_shards
    owners = jnp.where(distinct < num_rows, owner_and_place(distinct, shards)[0], shards)
    return owners.astype(jnp.int32)


def claim_slots(layout: MeshLayout, owners: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Slots in the buffer to be sent, [S * capacity], for what goes to its owner [m].

    Args:
      layout: the layout, for this batch.
      owners: numbers of shards [m]; S for none.

    Returns:
      For each its slot [m], the buffer's end for none; and whether there is too little room, on any
      device.
    """
    shards, capacity = layout.num_shards, capacity_of(layout, owners.size)
    # The rank of each among those for the same owner, by a running count for each owner.
    every = jnp.arange(shards, dtype=jnp.int32)[None]
    is_for = (owners[:, None] == every).astype(jnp.int32)
    rank = jnp.sum(jnp.cumsum(is_for, axis=0) * is_for, axis=1) - 1
    is_meant = owners < shards
    fits = is_meant & (rank < capacity)
    slots = jnp.where(fits, owners * capacity + rank, shards * capacity)
    overflows = jnp.any(is_meant & ~fits).astype(jnp.int32)
    axes = (*layout.row_axes, *layout.batch_axes_alone)
    return slots, jax.lax.pmax(overflows, axes) > 0
