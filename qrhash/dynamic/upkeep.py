"""What an index needs from time to time: rows taken back, slots dealt anew, more rows.

An eviction leaves tombstones in the slots, by which keys that are further on are still found.
Where few slots are left that were never used, looks at absent keys become long, and all slots are
dealt anew.
"""

import jax
import jax.numpy as jnp

from qrhash.arithmetic import as_size
from qrhash.dynamic.index import KeyIndex, create
from qrhash.dynamic.slots import TOMBSTONE, new_slots, place, read, some_keys
from qrhash.keys import Keys
from qrhash.rows import ranks, set_rows
from qrhash.types import Scalar

# Keys that are dealt anew at once.
_AT_ONCE = 2**16


# Jitted for its cache: outside of `jax.jit`, the loop would compile anew at every call.
@jax.jit
def evict(index: KeyIndex, gone: jax.Array) -> KeyIndex:
    """Takes rows back: their keys are no longer known.

    Args:
      index: a `KeyIndex`; donate it, and it is updated in place.
      gone: which rows, bool [capacity]; rows that no key has do not matter.

    Returns:
      The index. What is taken back first is given next: the rows from the highest down.

    >>> from qrhash.dynamic.index import assign, lookup_rows
    >>> index, given, _ = assign(create(3), Keys.of([5, 7]), step=0)
    >>> index = evict(index, jnp.array([True, False, False]))
    >>> lookup_rows(index, [5, 7]).rows.tolist(), int(index.num_keys)
    ([3, 1], 1)
    """
    capacity = index.capacity
    gone = gone & index.is_live
    numbers = jnp.arange(capacity, dtype=jnp.int32)
    free = set_rows(index.free, jnp.where(gone, index.num_free + ranks(gone), capacity), numbers)
    rows = index.slots[..., 2]
    is_dead = (rows < capacity) & read(gone, jnp.minimum(rows, capacity - 1).astype(jnp.int32))
    column = jnp.where(is_dead, jnp.uint32(TOMBSTONE), rows)
    index = index.replace(
        slots=index.slots.at[..., 2].set(column),
        counts=jnp.where(gone, 0, index.counts),
        last_steps=jnp.where(gone, -1, index.last_steps),
        free=free,
        num_free=index.num_free + jnp.sum(gone, dtype=jnp.int32),
    )

    def are_few(index: KeyIndex) -> jax.Array:
        return index.num_unused < index.num_slots // 4

    # A loop of no or one turn: unlike a conditional, it leaves its arrays in place.
    return jax.lax.while_loop(are_few, rebuild, index)


def rebuild(index: KeyIndex) -> KeyIndex:
    """Deals the slots anew: the same keys in the same rows, and no tombstones."""
    return _dealt(index, index.num_slots)


def grow(index: KeyIndex, capacity: int) -> KeyIndex:
    """An index of more rows, in which every key keeps its own.

    Args:
      index: a `KeyIndex`.
      capacity: how many rows there are to be. The table needs as many, see
        `qrhash.dynamic.grow`.

    Raises:
      ValueError: fewer rows than there are.
    """
    capacity = check_more(capacity, index.capacity)
    new, more = create(capacity), capacity - index.capacity
    # The new rows are below the others in the stack: they are given last.
    free = jnp.concatenate([new.free[:more], index.free])

    def longer(old: jax.Array, like: jax.Array) -> jax.Array:
        return like.at[: index.capacity].set(old)

    keys = Keys(longer(index.keys.hi, new.keys.hi), longer(index.keys.lo, new.keys.lo))
    grown = index.replace(
        keys=keys,
        counts=longer(index.counts, new.counts),
        last_steps=longer(index.last_steps, new.last_steps),
        free=free,
        num_free=index.num_free + more,
    )
    return _dealt(grown, max(new.num_slots, index.num_slots))


def check_more(capacity: int, before: int) -> int:
    """The capacity as an integer; raises a ValueError unless it is at least that of before."""
    capacity = as_size("capacity", capacity)
    if capacity < before:
        raise ValueError(
            f"capacity must be at least the {before} rows that there are, got {capacity}."
        )
    return capacity


def _dealt(index: KeyIndex, num_slots: int) -> KeyIndex:
    """The keys of the rows, in new slots."""
    capacity, live = index.capacity, index.is_live
    size = min(capacity, _AT_ONCE)

    def turn(number: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        slots, used = carry
        rows = number * size + jnp.arange(size, dtype=jnp.int32)
        is_row = rows < capacity
        rows = jnp.minimum(rows, capacity - 1)
        keys = some_keys(index.keys, rows)
        slots, fresh = place(slots, keys, is_row & read(live, rows), rows)
        return slots, used + fresh

    start = (new_slots(num_slots), jnp.int32(0))
    slots, used = jax.lax.fori_loop(0, -(-capacity // size), turn, start)
    return index.replace(slots=slots, num_unused=num_slots - used)


def lowest(scores: jax.Array, among: jax.Array, count: Scalar) -> jax.Array:
    """The lowest of some scores: exactly so many, or all; of equal ones the first.

    Args:
      scores: int32 [*shape], not below zero.
      among: which of them are meant, bool [*shape].
      count: how many are wanted, int32 [].

    Returns:
      Which they are, bool [*shape]. By bisection: sorting would take twenty times as long.
    """
    count = jnp.minimum(count, jnp.sum(among, dtype=jnp.int32))

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # fewer than `count` are below low, at least so many below high
        middle = low + (high - low) // 2
        are_enough = jnp.sum(among & (scores <= middle), dtype=jnp.int32) >= count
        return jnp.where(are_enough, low, middle + 1), jnp.where(are_enough, middle, high)

    bounds = (jnp.int32(0), jnp.int32(2**31 - 1))
    bound, _ = jax.lax.fori_loop(0, 31, halve, bounds)
    below, equal = among & (scores < bound), among & (scores == bound)
    rest = count - jnp.sum(below, dtype=jnp.int32)
    rank = ranks(equal.reshape(-1)).reshape(equal.shape)
    return below | (equal & (rank < rest))
