"""Merging: the gradients of rows named several times are summed.

"hash" finds the duplicates of a row by hashing row numbers into a scratch of a few words for each
row looked up; "sort" by sorting the row numbers. Which one is `qrhash.tuning`'s choice.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qrhash import tuning
from qrhash.rows import across, add_rows, ranks, rows_or_end, set_rows, zeros_beside
from qrhash.types import wide_dtype
from qrhash.words import mixed


def merge_rows(indices: jax.Array, values: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Sums the values of rows named several times.

    Args:
      indices: row numbers [m]; those outside [0, num_rows) name no row.
      values: [m, width].
      num_rows: rows of the table.

    Returns:
      Row numbers [m] and values [m, width], in which every row is named at most once. The other
      positions have row number num_rows and values of zero.
    """
    m = values.shape[0]
    if isinstance(m, int) and m == 0:
        return indices, values

    def method(platform: str) -> str:
        # In a program exported for any batch, m is a symbol: there is no telling how to sort it.
        return tuning.merge_method(platform) if isinstance(m, int) else "hash"

    indices = rows_or_end(indices, num_rows)
    # NaN where there is no row, as the look-up of a bad id leaves behind, must not be summed.
    named = jnp.where(across(indices < num_rows, values), values, 0)
    wide = named.astype(wide_dtype(values.dtype))
    indices, sums = tuning.by_platform(method, _merge_by, (num_rows,), indices, wide)
    return indices, sums.astype(values.dtype)


def _merge_by(
    method: str, num_rows: int, indices: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array]:
    merge = {"hash": _merge_by_hash, "sort": _merge_by_sort}[method]
    return merge(indices, values, num_rows)


def _merge_by_hash(
    rows: jax.Array, values: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    distinct, chosen = distinct_rows(rows, num_rows)
    # The sums start from what stands for its row: only duplicates are added, one by one.
    is_chosen = chosen == jnp.arange(rows.shape[0], dtype=chosen.dtype)
    first = jnp.where(across(is_chosen, values), values, 0)
    others = jnp.where(is_chosen, rows.shape[0], chosen)
    return distinct, add_rows(first, others, values, is_merged=False)


def distinct_rows(rows: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Row numbers [m] named once each, num_rows elsewhere; and for each position, where its row is.

    Given are numbers in [0, num_rows], the last of which names no row: see `rows_or_end`. Every
    position is written into the slot of its row, where the last one written stands for all. What
    was read back under another row number met a collision, and tries again with the next hash
    function; after the first round about one position in ten is left.
    """
    chosen = _representatives(rows, num_rows)
    positions = jnp.arange(rows.shape[0], dtype=jnp.int32)
    return jnp.where(chosen == positions, rows, num_rows), chosen


def compact_rows(rows: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Row numbers [m] named once each, in front; and for each position, at which place its row is.

    Behind them stands num_rows; the place of a position without a row is m.
    """
    m = rows.shape[0]
    distinct, chosen = distinct_rows(rows, num_rows)
    is_named = distinct < num_rows
    places = jnp.where(is_named, ranks(is_named), m)
    named = jnp.full_like(rows, num_rows)
    return set_rows(named, places, rows), places.at[chosen].get(mode="promise_in_bounds")


def _representatives(rows: jax.Array, num_rows: int) -> jax.Array:
    """For each position [m], one position of all that name the same row."""
    m = rows.shape[0]
    if isinstance(m, int) and num_rows <= tuning.ROWS_PER_LOOKUP * m:
        # Few rows: each has a slot of its own, and there are no collisions.
        positions = jnp.arange(m, dtype=jnp.int32)
        scratch = jnp.zeros(num_rows + 1, jnp.int32)
        scratch = scratch.at[rows].set(positions, mode="promise_in_bounds")
        return scratch.at[rows].get(mode="promise_in_bounds")
    num_slots, slot_of = slots_for(m)

    def slots_of(count: jax.Array) -> jax.Array:
        return slot_of(_hash(rows, count))

    def are_same(candidates: jax.Array) -> jax.Array:
        return rows.at[candidates].get(mode="promise_in_bounds") == rows

    return representatives(zeros_beside(rows, (m,), jnp.int32) == 0, num_slots, slots_of, are_same)


def representatives(
    wanted: jax.Array,
    num_slots: Any,
    slots_of: Callable[[jax.Array], jax.Array],
    are_same: Callable[[jax.Array], jax.Array],
    *,
    lowest: bool = False,
) -> jax.Array:
    """For each position [m] that is wanted, one position of all that hold the same; else its own.

    Args:
      wanted: bool [m].
      num_slots: of the scratch.
      slots_of: number of an attempt, uint32 [] -> a slot for each position [m], the same for what
        is the same.
      are_same: positions [m] -> whether each holds what the position itself does.
      lowest: whether it is to be the lowest position of all; else it is any of them.
    """
    m = wanted.shape[0]
    positions = jnp.arange(m, dtype=jnp.int32)

    def attempt(state: tuple[Any, ...]) -> tuple[Any, ...]:
        count, chosen, left = state
        # Claim: each position still without an answer writes itself into its slot.
        slots = slots_of(count).astype(jnp.int32)
        scratch = zeros_beside(wanted, (num_slots,), jnp.int32) + m * lowest
        place = scratch.at[jnp.where(left, slots, num_slots)]
        put = place.min if lowest else place.set
        scratch = put(positions, mode="drop", wrap_negative_indices=False)
        # Check: whoever owns the slot now stands for all that are the same.
        candidates = scratch.at[slots].get(mode="promise_in_bounds")
        candidates = jnp.minimum(candidates, m - 1) if lowest else candidates
        found = left & are_same(candidates)
        return count + 1, jnp.where(found, candidates, chosen), left & ~found

    everything = zeros_beside(wanted, (m,), jnp.int32)
    start = attempt((jnp.uint32(0), positions + everything, wanted))
    return jax.lax.while_loop(lambda state: jnp.any(state[2]), attempt, start)[1]


def slots_for(lookups: int) -> tuple[int, Callable[[jax.Array], jax.Array]]:
    """How many slots for so many look-ups, and the slot of a hash of 32 bits.

    A power of two, and one for each at least. Of an export there may be any number of look-ups.
    """
    if not isinstance(lookups, int):
        of_symbol = tuning.SLOTS_PER_LOOKUP * lookups
        return of_symbol, lambda hashes: hashes % jnp.asarray(of_symbol, jnp.uint32)
    enough, wanted = (
        1 << max(1, (per_lookup * lookups - 1).bit_length())
        for per_lookup in (1, tuning.SLOTS_PER_LOOKUP)
    )
    num_slots = max(enough, min(wanted, tuning.MOST_SPARE_SLOTS))
    # The upper bits are mixed best.
    return num_slots, lambda hashes: hashes >> (33 - num_slots.bit_length())


def _hash(rows: jax.Array, seed: jax.Array) -> jax.Array:
    """Mixes 32 bits, differently for each seed."""
    bits: jax.Array = mixed(rows.astype(jnp.uint32) ^ (seed * jnp.uint32(0x9E3779B9)))
    return bits


def _merge_by_sort(
    rows: jax.Array, values: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Sorts, and sums each run of equal row numbers by a scan: no scatter, no atomics."""
    order = jnp.argsort(rows, stable=True)
    rows, values = rows[order], values[order]
    changes = rows[1:] != rows[:-1]
    starts = jnp.concatenate((jnp.ones(1, bool), changes))
    ends = jnp.concatenate((changes, jnp.ones(1, bool)))

    def join(left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[Any, Any]:
        (starts, sums), (later_starts, later_sums) = left, right
        sums = jnp.where(across(later_starts, sums), later_sums, sums + later_sums)
        return starts | later_starts, sums

    _, sums = jax.lax.associative_scan(join, (starts, values))
    return jnp.where(ends, rows, num_rows), jnp.where(across(ends, sums), sums, 0)
