"""Keys between the devices of a mesh: to the shards that own them, and row numbers back.

The two exchanges of `qrhash.exchange`, with keys in place of rows:

* "reduce": every device learns all keys of the batch, works on those that its shard owns, and the
  row numbers are summed over the shards. It never overflows.
* "all_to_all": every device sends each of its keys once, and how often it has it, to the shard that
  owns it, and a row number comes back the same way. What a device does falls with the number of
  devices. A batch that finds too little room, on any device, goes by "reduce" as a whole.

By either a shard meets its keys in the order of their first places in the batch, so that it gives
them the same rows; and all devices with the same shard meet the same keys.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qrhash.dynamic.index import Rows
from qrhash.dynamic.newcomers import first_places
from qrhash.dynamic.slots import read
from qrhash.exchange import capacity_of, claim_slots, exchange_for, my_part
from qrhash.keys import Keys, scramble
from qrhash.layout import MeshLayout
from qrhash.rows import set_rows
from qrhash.types import PyTree, Scalar

# What a shard does with keys of its own: what it carries, keys [n], how often each counts [n] (0:
# it is not meant), the step -> the same with `Rows` of its places.
OnShard: TypeAlias = Callable[[Any, Keys, jax.Array, jax.Array], tuple[Any, Rows]]

# Seed of the hash that says which shard owns a key.
_SEED = 0x5A4D

_KEY_BYTES = 8


def owner_of(keys: Keys, num_shards: int) -> Any:
    """The shards [m], int32, of keys [m]; of NumPy for keys of the host."""
    hashes = scramble(keys, _SEED).hi
    return (hashes % hashes.dtype.type(num_shards)).astype("int32")


def of_shards(layout: MeshLayout) -> PartitionSpec:
    """Of arrays with an axis of shards in front."""
    return PartitionSpec(layout.row_axes or None)


def of_one(tree: PyTree) -> Any:
    """What one shard has, without the axis of shards."""
    return jax.tree.map(lambda x: x[0], tree)


def with_shard_axis(tree: PyTree) -> Any:
    """The inverse, of one shard."""
    return jax.tree.map(lambda x: x[None], tree)


def on_shards(
    layout: MeshLayout,
    fun: OnShard,
    carry: PyTree,
    home: jax.Array,
    capacity: int,
    keys: Keys,
    where: jax.Array,
    step: Scalar,
) -> tuple[Any, Rows]:
    """Runs what every shard does with the keys that it owns.

    Args:
      layout: the table's layout.
      fun: see `OnShard`.
      carry: arrays with an axis of shards in front.
      home: rows of the table by the places of the shards, int32 [S, R]; -1 for none.
      capacity: rows of the table: the number that stands for no row.
      keys: [m], the batch's.
      where: which of them are meant, bool [m].
      step: the number of the step.

    Returns:
      What it carries, and the `Rows` of the batch, numbers of rows of the table.
    """
    layout = layout.for_batch([where], 0)

    def on_device(
        carry: Any, home: jax.Array, keys: Keys, where: jax.Array, step: jax.Array
    ) -> Any:
        def in_table(carry: Any, keys: Keys, times: jax.Array) -> tuple[Any, Rows]:
            carry, given = fun(carry, keys, times, step)
            last = home.shape[1] - 1
            has_row = (times > 0) & (given.rows <= last)
            rows = jnp.where(has_row, read(home[0], jnp.minimum(given.rows, last)), capacity)
            return carry, given._replace(rows=rows)

        alone, given = _by_exchange(layout, in_table, of_one(carry), capacity, keys, where)
        return with_shard_axis(alone), given

    batch, whole = layout.batch_spec(1), PartitionSpec()
    spec = of_shards(layout)
    in_specs = (spec, spec, batch, batch, whole)
    run = layout.run(on_device, in_specs, (spec, Rows(batch, batch, whole, whole)))
    made: tuple[Any, Rows] = run(carry, home, keys, where, jnp.asarray(step, jnp.int32))
    return made


def _by_exchange(
    layout: MeshLayout,
    fun: Callable[[Any, Keys, jax.Array], tuple[Any, Rows]],
    carry: Any,
    capacity: int,
    keys: Keys,
    where: jax.Array,
) -> tuple[Any, Rows]:
    """On one device: the rows of its part of the batch, by either exchange."""

    def by_reduce(turn: Any, state: tuple[Any, Rows]) -> tuple[Any, Rows]:
        # 1. Every device learns all keys of the batch: replicas of a shard must agree. They go by
        #    the turn, which is 0, lest XLA let them travel whether or not there is a turn.
        turn = jnp.asarray(turn, jnp.uint32)
        every, wanted = Keys(keys.hi ^ turn, keys.lo ^ turn), where & (turn == 0)
        if layout.batch_axes:
            every, wanted = jax.lax.all_gather((every, wanted), layout.batch_axes, tiled=True)
        # 2. It looks for, or gives rows to, those that it owns.
        mine = wanted & (owner_of(every, layout.num_shards) == layout.shard().number)
        carry, given = fun(state[0], every, mine.astype(jnp.int32))
        # 3. The sum over the shards is the row number; each device keeps those of its own batch.
        given = given._replace(rows=given.rows - capacity, is_new=given.is_new.astype(jnp.int32))
        given = _over_shards(layout, given)
        rows, is_new = (_own_part(layout, x, where.size) for x in (given.rows, given.is_new))
        return carry, given._replace(rows=rows + capacity, is_new=is_new > 0)

    none = jnp.full(where.shape, capacity, jnp.int32), jnp.zeros_like(where)
    state = carry, Rows(*none, jnp.int32(0), jnp.int32(0))
    if exchange_for(layout, where.size, _KEY_BYTES) == "reduce":
        return by_reduce(0, state)
    # 1. Name every key once, and claim a slot for it in the buffer of the shard that owns it.
    sent, wanted = (jax.tree.map(lambda x: my_part(layout, x, 0), each) for each in (keys, where))
    first, is_first, times = first_places(sent, wanted, jnp.ones(wanted.shape, jnp.int32))
    owners = jnp.where(is_first, owner_of(sent, layout.num_shards), layout.num_shards)
    slots, overflows = claim_slots(layout, owners)

    def by_all_to_all(_: Any, state: tuple[Any, Rows]) -> tuple[Any, Rows]:
        # 2. Keys travel to their owners, and to all that own the same; counts of 0 stand for none.
        words = jnp.stack([sent.hi, sent.lo, times.astype(jnp.uint32)], axis=1)
        room = layout.num_shards * capacity_of(layout, wanted.size)
        buffer = set_rows(jnp.zeros((room, 3), jnp.uint32), slots, words)
        arrived = jax.lax.all_to_all(buffer, layout.row_axes, 0, 0, tiled=True)
        if layout.batch_axes_alone:
            arrived = jax.lax.all_gather(arrived, layout.batch_axes_alone, tiled=True)
        # 3. The owners look for them, or give them rows, in the order of the batch.
        order = _batch_order(layout)
        hi, lo, counts = _blocks(arrived, order).T
        carry, given = fun(state[0], Keys(hi, lo), counts.astype(jnp.int32))
        # 4. Row numbers travel back the way the keys came, into the same slots; duplicates share
        #    that of the place which stands for them.
        found = jnp.stack([given.rows, given.is_new.astype(jnp.int32)], axis=1)
        found = _blocks(found, np.argsort(order))
        if layout.batch_axes_alone:
            replica = jax.lax.axis_index(layout.batch_axes_alone)
            found = jax.lax.dynamic_slice_in_dim(found, replica * room, room)
        back = jax.lax.all_to_all(found, layout.row_axes, 0, 0, tiled=True)
        rows, is_new = back.at[jnp.minimum(slots[first], room - 1)].get(mode="promise_in_bounds").T
        rows, is_new = jnp.where(wanted, rows, capacity), is_first & (is_new > 0)
        # 5. Devices with the same keys have each asked for a part of them.
        if layout.row_axes_alone:
            parts = jax.lax.all_gather((rows, is_new), layout.row_axes_alone, tiled=True)
            rows, is_new = (each[: where.size] for each in parts)
        return carry, Rows(rows, is_new, *_over_shards(layout, (given.not_admitted, given.no_room)))

    # Loops of no or one turn: unlike a conditional, they leave the index in place. All devices
    # agree on `overflows`: a collective in one of the two alone would wait forever.
    for is_wanted, run in ((~overflows, by_all_to_all), (overflows, by_reduce)):
        state = jax.lax.fori_loop(0, is_wanted.astype(jnp.int32), run, state)
    return state


def _over_shards(layout: MeshLayout, tree: Any) -> Any:
    """The sums over the shards."""
    return jax.lax.psum(tree, layout.row_axes) if layout.row_axes else tree


def _batch_order(layout: MeshLayout) -> np.ndarray:
    """The blocks that a shard gets from all devices, in the order of their parts of the batch."""
    axes = (*layout.batch_axes_alone, *layout.row_axes)
    numbers = np.arange(layout.size(axes)).reshape([layout.mesh.shape[axis] for axis in axes])
    return numbers.transpose([axes.index(axis) for axis in layout.lookup_axes]).reshape(-1)


def _blocks(each: jax.Array, order: np.ndarray) -> jax.Array:
    """The blocks of an array [len(order) * n, k] in another order."""
    return each.reshape(len(order), -1, each.shape[1])[order].reshape(each.shape)


def _own_part(layout: MeshLayout, each: jax.Array, size: int) -> jax.Array:
    if not layout.batch_axes:
        return each
    start = jax.lax.axis_index(layout.batch_axes) * size
    return jax.lax.dynamic_slice_in_dim(each, start, size)
