"""Slots: an open-addressing hash table of 64-bit keys in one array, as pure functions.

A slot holds the two words of a key and its row number, and two slots stand side by side: one gather
reads both. A key tries pairs of slots by double hashing, until it finds itself or a slot that was
never used. Rounds of the whole batch are followed by rounds of the few keys that are left, and all
loops run on donated arrays in place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qrhash.keys import Keys, scramble
from qrhash.rows import ranks, set_rows

# Row numbers of slots without a row. Between them and the rows are the codes of those claimed.
EMPTY, TOMBSTONE = 2**32 - 1, 2**32 - 2
_CLAIMED = 2**31

_SEED = 0x510715

# Rounds are of the keys left once these are at most one in so many.
_LEFT = 8


def new_slots(num_slots: int) -> jax.Array:
    """Slots [num_slots // 2, 2, 4], uint32, none of them used."""
    return jnp.zeros((num_slots // 2, 2, 4), jnp.uint32).at[..., 2].set(jnp.uint32(EMPTY))


class _Probe(NamedTuple):
    """The pair of slots where a key looks next, and how far it goes from there."""

    pair: jax.Array
    stride: jax.Array

    def onward(self, moves: jax.Array, num_pairs: int) -> "_Probe":
        further = (self.pair + self.stride) & (num_pairs - 1)
        return self._replace(pair=jnp.where(moves, further, self.pair))

    def some(self, places: jax.Array) -> "_Probe":
        """Those of the keys at places that are inside."""
        return _Probe(read(self.pair, places), read(self.stride, places))


def _probe(keys: Keys, num_pairs: int) -> _Probe:
    """The first pair of each key, and its stride: odd, so that it comes by every one."""
    mixed = scramble(keys, _SEED)
    pair = (mixed.hi & jnp.uint32(num_pairs - 1)).astype(jnp.int32)
    return _Probe(pair, (mixed.lo | jnp.uint32(1)).astype(jnp.int32))


def read(array: jax.Array, places: jax.Array) -> jax.Array:
    """Entries of an array at places that are inside of it."""
    return array.at[places].get(mode="promise_in_bounds")


def some_keys(keys: Keys, places: jax.Array) -> Keys:
    """Keys at places that are inside."""
    return Keys(read(keys.hi, places), read(keys.lo, places))


def places_where(mask: jax.Array, size: int) -> jax.Array:
    """The first `size` places [size] where the mask [m] holds; m where there are no more."""
    m = mask.shape[0]
    places = jnp.full(size, m, jnp.int32)
    return set_rows(places, jnp.where(mask, ranks(mask), size), jnp.arange(m, dtype=jnp.int32))


def few(m: int) -> int:
    """Of m keys, how many are worked on by themselves rather than with all the others."""
    return jax.core.max_dim(m // _LEFT, 8)  # of an export m may be any number


def on_few(
    wanted: jax.Array, fun: Callable[[Any, jax.Array, jax.Array], Any], carry: Any
) -> tuple[Any, jax.Array]:
    """Runs a function on the places wanted, if they are few.

    Args:
      wanted: bool [m].
      fun: (carry, places [n], which of them are meant [n]) -> carry.
      carry: a tree of arrays.

    Returns:
      The carry, and what is still wanted [m].
    """
    m = wanted.shape[0]

    def turn(state: Any) -> Any:
        carry, wanted, _ = state
        places = places_where(wanted, few(m))
        meant = places < m
        return fun(carry, jnp.minimum(places, m - 1), meant), jnp.zeros_like(wanted), jnp.int32(0)

    # A loop of no or one turn: unlike a conditional, it leaves its arrays in place.
    count = jnp.sum(wanted, dtype=jnp.int32)
    state = (carry, wanted, count)
    state = jax.lax.while_loop(lambda s: (s[2] > 0) & (s[2] <= few(m)), turn, state)
    return state[0], state[1]


def find(slots: jax.Array, keys: Keys, wanted: jax.Array, none: int) -> jax.Array:
    """The rows of keys.

    Args:
      slots: [num_slots // 2, 2, 4].
      keys: [m].
      wanted: which of them are looked for, bool [m].
      none: what stands for no row.

    Returns:
      int32 [m].
    """
    num_pairs, m = slots.shape[0], wanted.shape[0]

    def a_round(state: Any, keys: Keys) -> Any:
        count, rows, left, probe = state
        # Of eight words XLA makes one loop, of twice four it makes two.
        pair = read(slots.reshape(num_pairs, 8), probe.pair)
        for slot in (pair[:, :4], pair[:, 4:]):
            is_key = (slot[:, 0] == keys.hi) & (slot[:, 1] == keys.lo)
            is_here = left & is_key & (slot[:, 2] < jnp.uint32(_CLAIMED))
            rows = jnp.where(is_here, slot[:, 2].astype(jnp.int32), rows)
            left = left & ~is_here & (slot[:, 2] != jnp.uint32(EMPTY))
        return count + 1, rows, left, probe.onward(left, num_pairs)

    rows = jnp.full(m, none, jnp.int32)
    state = (jnp.int32(0), rows, wanted, _probe(keys, num_pairs))

    def are_many(state: Any) -> jax.Array:
        left = jnp.sum(state[2], dtype=jnp.int32)
        return (left > few(m)) & (state[0] < num_pairs)

    count, rows, left, probe = jax.lax.while_loop(are_many, lambda s: a_round(s, keys), state)

    def rest(rows: jax.Array, places: jax.Array, meant: jax.Array) -> jax.Array:
        keys_left = some_keys(keys, places)
        state = (count, jnp.full(places.shape, none, jnp.int32), meant, probe.some(places))
        _, found, _, _ = jax.lax.while_loop(
            lambda s: jnp.any(s[2]) & (s[0] < num_pairs), lambda s: a_round(s, keys_left), state
        )
        return set_rows(rows, jnp.where(meant, places, m), found)

    return on_few(left & (count < num_pairs), rest, rows)[0]


def place(
    slots: jax.Array, keys: Keys, wanted: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Puts keys into slots that hold none.

    Args:
      slots: [num_slots // 2, 2, 4]; there is room for all.
      keys: [m].
      wanted: which of them are meant, bool [m]: each once, and none of them there already.
      rows: their row numbers, int32 [m].

    Returns:
      The slots, and how many of them were never used before.
    """
    num_pairs, m = slots.shape[0], wanted.shape[0]
    num_slots = 2 * num_pairs
    codes = jnp.uint32(_CLAIMED) + jnp.arange(m, dtype=jnp.uint32)

    def a_round(state: Any, codes: jax.Array) -> Any:
        (slots, fresh), places, left, probe, side = state
        slot = 2 * probe.pair + side
        old = read(slots, slot)[:, 2]
        claims = left & (old >= jnp.uint32(TOMBSTONE))
        # Of several keys the first has the slot: its code is the lowest.
        slots = slots.at[jnp.where(claims, slot, num_slots), 2].min(codes, mode="drop")
        won = claims & (read(slots, slot)[:, 2] == codes)
        places = jnp.where(won, slot, places)
        fresh = fresh + jnp.sum(won & (old == jnp.uint32(EMPTY)), dtype=jnp.int32)
        left = left & ~won
        probe = probe.onward(left & (side == 1), num_pairs)
        return (slots, fresh), places, left, probe, jnp.where(left, 1 - side, side)

    def are_many(state: Any) -> jax.Array:
        return jnp.sum(state[2], dtype=jnp.int32) > few(m)

    nowhere = jnp.full(m, num_slots, jnp.int32)
    of_one, side = slots.reshape(num_slots, 4), jnp.zeros(m, jnp.int32)
    state = ((of_one, jnp.int32(0)), nowhere, wanted, _probe(keys, num_pairs), side)
    slots_and_fresh, places, left, probe, side = jax.lax.while_loop(
        are_many, lambda s: a_round(s, codes), state
    )

    def rest(carry: Any, at: jax.Array, meant: jax.Array) -> Any:
        slots_and_fresh, places = carry
        nowhere = jnp.full(at.shape, num_slots, jnp.int32)
        state = (slots_and_fresh, nowhere, meant, probe.some(at), read(side, at))
        slots_and_fresh, placed, *_ = jax.lax.while_loop(
            lambda s: jnp.any(s[2]), lambda s: a_round(s, read(codes, at)), state
        )
        return slots_and_fresh, set_rows(places, jnp.where(meant, at, m), placed)

    ((of_one, fresh), places), _ = on_few(left, rest, (slots_and_fresh, places))
    entries = jnp.stack([keys.hi, keys.lo, rows.astype(jnp.uint32), jnp.zeros_like(keys.lo)], 1)
    return set_rows(of_one, places, entries).reshape(slots.shape), fresh
