"""The index on a mesh: every shard of the table has an index of its own keys.

A hash of the key says which shard owns it. Its row is one of that shard's rows, so that row numbers
are those of an ordinary table split over the mesh, and look-ups, gradients and optimizers know
nothing of keys. In a step the keys of the batch travel to all devices, 8 bytes each, every shard
works on those that it owns, and the row numbers are summed over the shards: exchange "reduce" of
`qrhash.exchange`, with keys in place of rows.

All arrays of an index have an axis of shards in front.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qrhash.dynamic import index as key_index
from qrhash.dynamic import upkeep
from qrhash.dynamic.index import KeyIndex, Rows
from qrhash.dynamic.newcomers import Admission
from qrhash.keys import Keys, scramble
from qrhash.layout import MeshLayout, index_of
from qrhash.types import PyTree, Scalar

# Seed of the hash that says which shard owns a key.
_SEED = 0x5A4D


def create(layout: MeshLayout, capacity: int, admission: Admission) -> tuple[KeyIndex, PyTree]:
    """An index without keys for each shard, and the admission's state beside it.

    Raises:
      ValueError: the rows do not divide by the shards.
    """
    shards = layout.num_shards
    if capacity % shards:
        raise ValueError(
            f"capacity must divide by the {shards} shards of the mesh, got {capacity}: "
            f"{-(-capacity // shards) * shards} does."
        )

    def make() -> Any:
        one = key_index.create(capacity // shards), admission.split(shards).init()
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (shards, *x.shape)), one)

    made: tuple[KeyIndex, PyTree] = jax.jit(make, out_shardings=shard_sharding(layout))()
    return made


# Jitted for their caches: outside of `jax.jit`, they would compile anew at every call.
@functools.partial(jax.jit, static_argnames=("layout", "admission"))
def assign(
    layout: MeshLayout,
    index: KeyIndex,
    keys: Keys,
    step: Scalar,
    *,
    where: jax.Array,
    admission: Admission,
    state: PyTree,
) -> tuple[KeyIndex, Rows, PyTree]:
    """As `qrhash.dynamic.index.assign`, of flat keys [m] and where [m]."""

    def on_shard(carry: Any, keys: Keys, mine: jax.Array, step: jax.Array) -> Any:
        index, state = carry
        policy = admission.split(layout.num_shards)
        index, given, state = key_index.assign(
            index, keys, step, where=mine, admission=policy, state=state
        )
        return (index, state), given

    carry, given = _on_shards(layout, on_shard, (index, state), index.capacity, keys, where, step)
    return carry[0], given, carry[1]


@functools.partial(jax.jit, static_argnames="layout")
def lookup_rows(layout: MeshLayout, index: KeyIndex, keys: Keys, *, where: jax.Array) -> Rows:
    """As `qrhash.dynamic.index.lookup_rows`, of flat keys [m] and where [m]."""

    def on_shard(index: Any, keys: Keys, mine: jax.Array, step: jax.Array) -> Any:
        del step
        return index, key_index.lookup_rows(index, keys, where=mine)

    return _on_shards(layout, on_shard, index, index.capacity, keys, where, 0)[1]


@functools.partial(jax.jit, static_argnames="layout")
def evict(layout: MeshLayout, index: KeyIndex, gone: jax.Array) -> KeyIndex:
    """As `qrhash.dynamic.upkeep.evict`, of gone [S, R]."""

    def on_device(index: KeyIndex, gone: jax.Array) -> KeyIndex:
        return _stacked(upkeep.evict(_alone(index), gone[0]))

    spec = _of_shards(layout)
    evicted: KeyIndex = layout.run(on_device, (spec, spec), spec)(index, gone)
    return evicted


def _on_shards(
    layout: MeshLayout,
    fun: Callable[[Any, Keys, jax.Array, jax.Array], tuple[Any, Rows]],
    carry: PyTree,
    capacity: int,
    keys: Keys,
    where: jax.Array,
    step: Scalar,
) -> tuple[Any, Rows]:
    """Runs what every shard does with the keys that it owns; the rows are numbers of the table."""
    layout = layout.for_batch([where], 0)
    shards = layout.num_shards

    def on_device(carry: Any, keys: Keys, where: jax.Array, step: jax.Array) -> Any:
        number, alone = layout.shard().number, _alone(carry)
        # 1. Every device learns all keys of the batch: replicas of a shard must agree.
        every, wanted = _whole(layout, (keys, where))
        owner = (scramble(every, _SEED).hi % jnp.uint32(shards)).astype(jnp.int32)
        mine = wanted & (owner == number)
        # 2. It looks for, or gives rows to, those that it owns.
        alone, given = fun(alone, every, mine, step)
        has_row = mine & (given.rows < capacity // shards)
        # 3. The sum over the shards is the row number; each device keeps those of its own batch.
        less = jnp.where(has_row, index_of(number, given.rows, shards) - capacity, 0)
        counts = given._replace(rows=less, is_new=given.is_new.astype(jnp.int32))
        if layout.row_axes:
            counts = jax.lax.psum(counts, layout.row_axes)
        part = Rows(
            _own_part(layout, counts.rows + capacity, where.shape[0]),
            _own_part(layout, counts.is_new > 0, where.shape[0]),
            counts.not_admitted,
            counts.no_room,
        )
        return _stacked(alone), part

    batch, whole, spec = layout.batch_spec(1), PartitionSpec(), _of_shards(layout)
    in_specs = (spec, batch, batch, whole)
    out_specs = (spec, Rows(batch, batch, whole, whole))
    run = layout.run(on_device, in_specs, out_specs)
    made: tuple[Any, Rows] = run(carry, keys, where, jnp.asarray(step, jnp.int32))
    return made


def shard_sharding(layout: MeshLayout) -> NamedSharding:
    """Where the arrays of an index are, and of an admission's state."""
    return NamedSharding(layout.mesh, _of_shards(layout))


def _of_shards(layout: MeshLayout) -> PartitionSpec:
    return PartitionSpec(layout.row_axes or None)


def _alone(tree: PyTree) -> Any:
    """What one shard has, without the axis of shards."""
    return jax.tree.map(lambda x: x[0], tree)


def _stacked(tree: PyTree) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


def _whole(layout: MeshLayout, tree: PyTree) -> Any:
    if not layout.batch_axes:
        return tree
    return jax.lax.all_gather(tree, layout.batch_axes, tiled=True)


def _own_part(layout: MeshLayout, each: jax.Array, size: int) -> jax.Array:
    if not layout.batch_axes:
        return each
    start = jax.lax.axis_index(layout.batch_axes) * size
    return jax.lax.dynamic_slice_in_dim(each, start, size)
