"""Slots: an open-addressing hash table of 64-bit keys in one array, as pure functions.

A slot holds the two words of a key and its row number. Four slots stand side by side in a bucket,
which is one line of the cache. A key tries buckets by double hashing, until it finds itself or a
slot that was never used. Rounds of the whole batch are followed by rounds of the few keys that are
left, and all loops run on donated arrays in place.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qrhash.keys import Keys, scramble
from qrhash.rows import ranks, set_rows

# Row numbers of slots without a row. Between them and the rows are the codes of those claimed.
EMPTY, TOMBSTONE = 2**32 - 1, 2**32 - 2
_CLAIMED = 2**31

BUCKET = 4  # slots; in each bucket those never used are behind the others

_SEED = 0x510715

# Rounds are of the keys left once these are at most one in so many; of keys that are looked for,
# hardly one in 25 is left after the first round.
_LEFT, _LEFT_TO_FIND = 8, 16

_SOUGHT = -1  # the row of a key that is still to be found


def new_slots(num_slots: int) -> jax.Array:
    """Slots [num_slots // 4, 4, 4], uint32, none of them used."""
    zeros = jnp.zeros((num_slots // BUCKET, BUCKET, 4), jnp.uint32)
    return zeros.at[..., 2].set(jnp.uint32(EMPTY))


def _hashes(keys: Keys) -> jax.Array:
    return scramble(keys, _SEED).hi


def _buckets(hashes: jax.Array, turn: jax.Array, num_buckets: int) -> jax.Array:
    """Where keys look at a turn, int32 [m]: strides are odd, so that they come by every bucket."""
    stride = (hashes >> 16) | jnp.uint32(1)
    place = hashes + turn.astype(jnp.uint32) * stride
    return (place & jnp.uint32(num_buckets - 1)).astype(jnp.int32)


def read(array: jax.Array, places: Any) -> jax.Array:
    """Entries of an array at places that are inside of it, not below zero."""
    return array.at[places].get(mode="promise_in_bounds", wrap_negative_indices=False)


def some_keys(keys: Keys, places: jax.Array) -> Keys:
    """Keys at places that are inside."""
    return Keys(read(keys.hi, places), read(keys.lo, places))


def places_where(mask: jax.Array, size: int) -> jax.Array:
    """The first `size` places [size] where the mask [m] holds; m where there are no more."""
    m = mask.shape[0]
    places = jnp.full(size, m, jnp.int32)
    return set_rows(places, jnp.where(mask, ranks(mask), size), jnp.arange(m, dtype=jnp.int32))


def few(m: int, share: int = _LEFT) -> int:
    """Of m keys, how many are worked on by themselves rather than with all the others."""
    return jax.core.max_dim(m // share, 8)  # of an export m may be any number


def on_few(
    wanted: jax.Array,
    fun: Callable[[Any, jax.Array, jax.Array], Any],
    carry: Any,
    share: int = _LEFT,
) -> tuple[Any, jax.Array]:
    """Runs a function on the places wanted, if they are few.

    Args:
      wanted: bool [m].
      fun: (carry, places [n], which of them are meant [n]) -> carry.
      carry: a tree of arrays.
      share: few are at most one in so many.

    Returns:
      The carry, and what is still wanted [m].
    """
    m = wanted.shape[0]
    most = few(m, share)

    def turn(state: Any) -> Any:
        carry, wanted, _ = state
        places = places_where(wanted, most)
        meant = places < m
        return fun(carry, jnp.minimum(places, m - 1), meant), jnp.zeros_like(wanted), jnp.int32(0)

    # A loop of no or one turn: unlike a conditional, it leaves its arrays in place.
    count = jnp.sum(wanted, dtype=jnp.int32)
    state = (carry, wanted, count)
    state = jax.lax.while_loop(lambda s: (s[2] > 0) & (s[2] <= most), turn, state)
    return state[0], state[1]


def find(slots: jax.Array, keys: Keys, wanted: jax.Array, none: int) -> jax.Array:
    """The rows of keys.

    Args:
      slots: [num_slots // 4, 4, 4].
      keys: [m].
      wanted: which of them are looked for, bool [m].
      none: what stands for no row.

    Returns:
      int32 [m].
    """
    num_buckets, m = slots.shape[0], wanted.shape[0]
    words, empty = slots.reshape(num_buckets, -1), jnp.uint32(EMPTY).astype(jnp.int32)

    def a_round(state: Any, keys: Keys, hashes: jax.Array) -> Any:
        turn, rows = state
        bucket = jnp.where(rows == _SOUGHT, _buckets(hashes, turn, num_buckets), 0)
        # Word by word, XLA makes one loop of it all, and writes down no slots.
        found = jnp.full_like(rows, _SOUGHT)
        for side in reversed(range(BUCKET)):
            hi, lo, row = (read(words, (bucket, 4 * side + word)) for word in range(3))
            row = row.astype(jnp.int32)  # negative, if it is none
            if side == BUCKET - 1:
                found = jnp.where(row == empty, none, found)
            is_key = (hi == keys.hi) & (lo == keys.lo) & (row >= 0)
            found = jnp.where(is_key, row, found)
        return turn + 1, jnp.where(rows == _SOUGHT, found, rows)

    def are_many(state: Any) -> jax.Array:
        left = jnp.sum(state[1] == _SOUGHT, dtype=jnp.int32)
        return (left > few(m, _LEFT_TO_FIND)) & (state[0] < num_buckets)

    hashes = _hashes(keys)
    state = a_round((jnp.int32(0), jnp.where(wanted, _SOUGHT, none)), keys, hashes)
    turn, rows = jax.lax.while_loop(are_many, lambda s: a_round(s, keys, hashes), state)

    def rest(rows: jax.Array, places: jax.Array, meant: jax.Array) -> jax.Array:
        some = some_keys(keys, places), read(hashes, places)
        state = (turn, jnp.where(meant, _SOUGHT, none))
        _, found = jax.lax.while_loop(
            lambda s: jnp.any(s[1] == _SOUGHT) & (s[0] < num_buckets),
            lambda s: a_round(s, *some),
            state,
        )
        return set_rows(rows, jnp.where(meant, places, m), found)

    rows, _ = on_few(rows == _SOUGHT, rest, rows, _LEFT_TO_FIND)
    return jnp.where(rows == _SOUGHT, none, rows)


def place(
    slots: jax.Array, keys: Keys, wanted: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Puts keys into slots that hold none.

    Args:
      slots: [num_slots // 4, 4, 4]; there is room for all.
      keys: [m].
      wanted: which of them are meant, bool [m]: each once, and none of them there already.
      rows: their row numbers, int32 [m].

    Returns:
      The slots, and how many of them were never used before.
    """
    num_buckets, m = slots.shape[0], wanted.shape[0]
    num_slots = BUCKET * num_buckets
    codes = jnp.uint32(_CLAIMED) + jnp.arange(m, dtype=jnp.uint32)

    def a_round(state: Any, codes: jax.Array, hashes: jax.Array) -> Any:
        (slots, fresh), places, left, turns = state
        bucket = _buckets(hashes, turns, num_buckets)
        side, old = jnp.zeros_like(bucket), jnp.zeros_like(hashes)
        for each in reversed(range(BUCKET)):
            row = read(slots, (BUCKET * bucket + each, 2))
            is_free = row >= jnp.uint32(TOMBSTONE)
            side, old = jnp.where(is_free, each, side), jnp.where(is_free, row, old)
        slot = BUCKET * bucket + side
        claims = left & (old >= jnp.uint32(TOMBSTONE))
        # Of several keys the first has the slot: its code is the lowest.
        slots = slots.at[jnp.where(claims, slot, num_slots), 2].min(codes, mode="drop")
        won = claims & (read(slots, (slot, 2)) == codes)
        places = jnp.where(won, slot, places)
        fresh = fresh + jnp.sum(won & (old == jnp.uint32(EMPTY)), dtype=jnp.int32)
        return (slots, fresh), places, left & ~won, jnp.where(left & ~claims, turns + 1, turns)

    def are_many(state: Any) -> jax.Array:
        return jnp.sum(state[2], dtype=jnp.int32) > few(m)

    nowhere, turns = jnp.full(m, num_slots, jnp.int32), jnp.zeros(m, jnp.int32)
    of_one, hashes = slots.reshape(num_slots, 4), _hashes(keys)
    state = ((of_one, jnp.int32(0)), nowhere, wanted, turns)
    slots_and_fresh, places, left, turns = jax.lax.while_loop(
        are_many, lambda s: a_round(s, codes, hashes), state
    )

    def rest(carry: Any, at: jax.Array, meant: jax.Array) -> Any:
        slots_and_fresh, places = carry
        some = read(codes, at), read(hashes, at)
        nowhere = jnp.full(at.shape, num_slots, jnp.int32)
        state = (slots_and_fresh, nowhere, meant, read(turns, at))
        slots_and_fresh, placed, *_ = jax.lax.while_loop(
            lambda s: jnp.any(s[2]), lambda s: a_round(s, *some), state
        )
        return slots_and_fresh, set_rows(places, jnp.where(meant, at, m), placed)

    ((of_one, fresh), places), _ = on_few(left, rest, (slots_and_fresh, places))
    entries = jnp.stack([keys.hi, keys.lo, rows.astype(jnp.uint32), jnp.zeros_like(keys.lo)], 1)
    return set_rows(of_one, places, entries).reshape(slots.shape), fresh
