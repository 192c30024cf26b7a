"""The index on a mesh: every shard of the table has an index of its own keys.

A hash of the key says which shard owns it: on that shard the key has a place, and `home` says which
row of the table goes with the place. At first these are the shard's own rows; on another number of
shards a key has another place, and the row that it had (`qrhash.dynamic.reshard`). Row numbers are
those of an ordinary table split over the mesh, and look-ups, gradients and optimizers know nothing
of keys. In a step the keys of the batch travel to the shards that own them, and the row numbers
back: see `qrhash.dynamic.key_exchange`.

All arrays of an index have an axis of shards in front. Every shard has ceil(capacity / S) places;
where the rows do not divide by the shards, the last place of some has no row, and no key gets it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qrhash.arithmetic import ceil_div
from qrhash.dynamic import index as key_index
from qrhash.dynamic import upkeep
from qrhash.dynamic.index import KeyIndex, Rows
from qrhash.dynamic.key_exchange import of_one, of_shards, on_shards, with_shard_axis
from qrhash.dynamic.newcomers import Admission
from qrhash.dynamic.slots import places_where, read
from qrhash.keys import Keys
from qrhash.layout import MeshLayout, index_of, owner_and_place
from qrhash.rows import ranks
from qrhash.types import PyTree, Scalar


def create(
    layout: MeshLayout, capacity: int, admission: Admission
) -> tuple[KeyIndex, PyTree, jax.Array]:
    """An index without keys for each shard, the admission's state beside it, and `home` [S, R]."""
    shards = layout.num_shards
    rows = ceil_div(capacity, shards)

    def make() -> Any:
        one = key_index.create(rows), admission.split(shards).init()
        index, state = jax.tree.map(lambda x: jnp.broadcast_to(x, (shards, *x.shape)), one)
        owners, places = jnp.arange(shards, dtype=jnp.int32), jnp.arange(rows, dtype=jnp.int32)
        home = index_of(owners[:, None], places[None], shards)
        home = jnp.where(home < capacity, home, -1)
        lacks_row = home[:, -1] < 0
        index = index.replace(
            free=jnp.where(lacks_row[:, None], jnp.roll(index.free, -1, axis=1), index.free),
            num_free=index.num_free - lacks_row.astype(jnp.int32),
        )
        return index, state, home

    made: tuple[KeyIndex, PyTree, jax.Array]
    made = jax.jit(make, out_shardings=shard_sharding(layout))()
    return made


# Jitted for their caches: outside of `jax.jit`, they would compile anew at every call.
@functools.partial(jax.jit, static_argnames=("layout", "admission", "capacity"))
def assign(
    layout: MeshLayout,
    index: KeyIndex,
    keys: Keys,
    step: Scalar,
    *,
    where: jax.Array,
    admission: Admission,
    state: PyTree,
    home: jax.Array,
    capacity: int,
) -> tuple[KeyIndex, Rows, PyTree]:
    """As `qrhash.dynamic.index.assign`, of flat keys [m] and where [m]; rows are the table's."""

    def on_shard(carry: Any, keys: Keys, times: jax.Array, step: jax.Array) -> Any:
        index, state = carry
        policy = admission.split(layout.num_shards)
        index, given, state = key_index.assign(
            index, keys, step, where=times > 0, times=times, admission=policy, state=state
        )
        return (index, state), given

    carry = (index, state)
    carry, given = on_shards(layout, on_shard, carry, home, capacity, keys, where, step)
    return carry[0], given, carry[1]


@functools.partial(jax.jit, static_argnames=("layout", "capacity"))
def lookup_rows(
    layout: MeshLayout,
    index: KeyIndex,
    keys: Keys,
    *,
    where: jax.Array,
    home: jax.Array,
    capacity: int,
) -> Rows:
    """As `qrhash.dynamic.index.lookup_rows`, of flat keys [m] and where [m]; see `assign`."""

    def on_shard(index: Any, keys: Keys, times: jax.Array, step: jax.Array) -> Any:
        del step
        return index, key_index.lookup_rows(index, keys, where=times > 0)

    return on_shards(layout, on_shard, index, home, capacity, keys, where, 0)[1]


@functools.partial(jax.jit, static_argnames="layout")
def evict(layout: MeshLayout, index: KeyIndex, gone: jax.Array) -> KeyIndex:
    """As `qrhash.dynamic.upkeep.evict`, of gone [S, R]."""

    def on_device(index: KeyIndex, gone: jax.Array) -> KeyIndex:
        return with_shard_axis(upkeep.evict(of_one(index), gone[0]))

    spec = of_shards(layout)
    evicted: KeyIndex = layout.run(on_device, (spec, spec), spec)(index, gone)
    return evicted


@functools.partial(jax.jit, static_argnames=("layout", "capacity", "wanted"))
def grow(
    layout: MeshLayout, index: KeyIndex, home: jax.Array, *, capacity: int, wanted: int
) -> tuple[KeyIndex, jax.Array]:
    """As `qrhash.dynamic.upkeep.grow`, from `capacity` rows in all to `wanted`; and `home`."""
    places = ceil_div(wanted, layout.num_shards)

    def on_device(index: KeyIndex, home: jax.Array) -> Any:
        every = home
        if layout.row_axes:
            every = jax.lax.all_gather(home, layout.row_axes, tiled=True)
        # 1. The new rows go to the places without one, those of all shards in turn.
        more = places - home.shape[1]
        by_turn = jnp.pad(every, ((0, 0), (0, more)), constant_values=-1).T
        lacks_row = by_turn < 0
        rank = ranks(lacks_row.reshape(-1)).reshape(by_turn.shape)
        new = jnp.where(capacity + rank < wanted, capacity + rank, -1)
        number = layout.shard().number
        rows = jnp.where(lacks_row, new, by_turn)[:, number]
        # 2. These places are given last: they are below the others in the stack.
        old, is_new = of_one(index), lacks_row[:, number] & (rows >= 0)
        below = jnp.arange(places, dtype=jnp.int32)[::-1]
        stack = jnp.concatenate([below, old.free])
        is_free = jnp.concatenate([is_new[below], jnp.arange(old.capacity) < old.num_free])
        free = read(stack, jnp.minimum(places_where(is_free, places), stack.size - 1))
        num_free = jnp.sum(is_free, dtype=jnp.int32)
        longer = upkeep.grow(old, places) if more else old
        return with_shard_axis((longer.replace(free=free, num_free=num_free), rows))

    spec = of_shards(layout)
    grown: tuple[KeyIndex, jax.Array] = layout.run(on_device, (spec, spec), (spec, spec))(
        index, home
    )
    return grown


@functools.partial(jax.jit, static_argnames="layout")
def by_place(layout: MeshLayout, home: jax.Array, each: jax.Array) -> jax.Array:
    """What each row of the table has, by the places [S, R] of the index.

    Args:
      layout: the `MeshLayout`.
      home: rows of the places [S, R].
      each: [S, R] of a table split over the mesh; or [capacity], of one that is on every device.
    """

    def on_device(home: jax.Array, each: jax.Array) -> jax.Array:
        if each.ndim == 1:
            return each.at[home].get(mode="clip")
        if layout.row_axes:
            each = jax.lax.all_gather(each, layout.row_axes, tiled=True)
        return each.at[owner_and_place(home, layout.num_shards)].get(mode="clip")

    spec = of_shards(layout)
    of_each = PartitionSpec() if each.ndim == 1 else spec
    moved: jax.Array = layout.run(on_device, (spec, of_each), spec)(home, each)
    return moved


def shard_sharding(layout: MeshLayout) -> NamedSharding:
    """Where the arrays of an index are, and of an admission's state."""
    return NamedSharding(layout.mesh, of_shards(layout))
