"""Rows of one device's table: read before they are written, merged where named twice.

XLA updates a donated table in place only if it can see that every read of the table comes before
the update. `read_rows` is the read that makes sure of it. `merge_rows` sums what belongs to one
row: "hash" finds duplicates by hashing row numbers into a scratch of a few words for each, "sort"
by sorting them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qrhash.arithmetic import as_ids

INT32_MAX = 2**31 - 1
MERGE_METHODS = ("hash", "sort")

# Tables with at most so many rows for each row looked up need no hashing: every row has a slot.
_SLOTS_PER_LOOKUP = 4


def device_index(index: chex.Array, rows: int) -> jax.Array:
    """Row numbers for the device; from the host they are 64 bits wide and must not wrap."""
    index = as_ids(index)
    if not isinstance(index, np.ndarray):
        return index
    if rows > INT32_MAX and jnp.asarray(0).dtype.itemsize < 8:
        raise ValueError(
            f"a table of {rows} rows needs 64-bit row numbers: set jax_enable_x64, or use more "
            "tables, for instance MixedRadix.balanced(num_embeddings, num_tables)."
        )
    in_table = (index >= 0) & (index < rows)
    return jnp.asarray(np.where(in_table, index, rows), jnp.int32 if rows <= INT32_MAX else None)


def as_one(
    indices: Sequence[chex.Array], num_rows: int
) -> tuple[jax.Array, Callable[[jax.Array], list[jax.Array]]]:
    """Indices [*shape] as one [n]; and what splits an array [n, ...] up in the same way."""
    indices = [device_index(index, num_rows) for index in indices]
    if len(indices) == 1:
        return indices[0], lambda rows: [rows]
    sizes = [index.size for index in indices]

    def split(rows: jax.Array) -> list[jax.Array]:
        parts = jax.lax.split(rows, sizes)
        return [
            part.reshape(*index.shape, *rows.shape[1:])
            for part, index in zip(parts, indices, strict=True)
        ]

    return jnp.concatenate([index.reshape(-1) for index in indices]), split


def rows_or_end(index: jax.Array, num_rows: int) -> jax.Array:
    """Row numbers, with num_rows for all that are outside the table."""
    index = index if num_rows <= jnp.iinfo(index.dtype).max else index.astype(jnp.int64)
    return jnp.where((index >= 0) & (index < num_rows), index, num_rows)


def across(per_row: jax.Array, rows: jax.Array) -> jax.Array:
    """[*shape] -> [*shape, 1, ...], of as many axes as the rows have."""
    return per_row.reshape(per_row.shape + (1,) * (rows.ndim - per_row.ndim))


def wide_dtype(dtype: Any) -> Any:
    """The dtype to draw and to sum in: float32 at least."""
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.dtype(jnp.float32)


def read_rows(
    arrays: Sequence[chex.Array], index: chex.Array, *, fill_value: float
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Gathers the same rows from several arrays [num_rows, ...], in order before any update.

    The read is one branch of a conditional, which is compiled as one piece: it happens once,
    however many results are computed from its rows, and the row numbers come out of the same
    conditional. An update that goes by these cannot but come later.

    Args:
      arrays: all of the same number of rows.
      index: row numbers [*shape].
      fill_value: what a row outside the arrays holds.

    Returns:
      Arrays [*shape, ...], and the row numbers, num_rows for those outside.
    """
    num_rows = arrays[0].shape[0]
    index = rows_or_end(device_index(index, num_rows), num_rows)
    arrays = tuple(map(jnp.asarray, arrays))

    def read(arrays: Sequence[jax.Array], index: jax.Array) -> tuple[Any, jax.Array]:
        return tuple(_rows_or_zeros(array, index) for array in arrays), index

    def skip(arrays: Sequence[jax.Array], index: jax.Array) -> tuple[Any, jax.Array]:
        shapes = jax.eval_shape(read, arrays, index)[0]
        zeros = (zeros_beside(each, each.shape, each.dtype) for each in shapes)
        return tuple(zeros), jnp.full_like(index, num_rows)

    if index.size == 0:
        return skip(arrays, index)
    rows, index = jax.lax.cond(jnp.any(index < num_rows), read, skip, arrays, index)
    if fill_value != 0:
        in_table = index < num_rows
        rows = tuple(jnp.where(across(in_table, each), each, fill_value) for each in rows)
    return rows, index


def _rows_or_zeros(table: jax.Array, index: jax.Array) -> jax.Array:
    in_table = index < table.shape[0]
    rows = table.at[jnp.where(in_table, index, 0)].get(
        mode="promise_in_bounds", out_sharding=out_sharding(table, index)
    )
    # On the CPU a select of gathered rows is slow, as XLA does not vectorize it; with a product on
    # top it takes a third of the time.
    return jnp.where(across(in_table, rows), rows, 0) * across(in_table.astype(table.dtype), rows)


def gather_rows(table: chex.Array, index: jax.Array) -> jax.Array:
    """Rows [*shape, width] of row numbers [*shape]; zeros for those outside the table."""
    table = jnp.asarray(table)
    return table.at[index].get(
        mode="fill",
        fill_value=0,
        wrap_negative_indices=False,
        out_sharding=out_sharding(table, index),
    )


def _type_of(array: Any) -> Any:
    return array if isinstance(array, jax.core.AbstractValue) else jax.typeof(array)


def varying_axes(array: Any) -> tuple[str, ...]:
    """Inside of a `jax.shard_map` that checks it: the mesh axes over which an array differs."""
    kind = _type_of(array)
    manual = getattr(kind, "manual_axis_type", None)  # since jax 0.11
    return tuple(sorted(kind.vma if manual is None else manual.varying))


def zeros_beside(like: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros that, inside of `jax.shard_map`, vary over the same mesh axes as an array, or type."""
    zeros, axes = jnp.zeros(shape, dtype), varying_axes(like)
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros


def out_sharding(table: Any, index: jax.Array) -> NamedSharding | None:
    """On a mesh of explicit axes, that of rows of a table, or type of one: as their ids are."""
    sharding = _type_of(table).sharding
    if sharding.mesh.empty or not sharding.mesh.are_all_axes_explicit:
        return None
    spec = PartitionSpec(*jax.typeof(index).sharding.spec, *sharding.spec[1:])
    return NamedSharding(sharding.mesh, spec)


def add_rows(
    table: jax.Array, index: jax.Array, values: jax.Array, *, is_merged: bool
) -> jax.Array:
    """The table plus values [m, ...] at the rows of the index [m]; in place where XLA may."""
    return table.at[index].add(
        values.astype(table.dtype),
        mode="drop",
        wrap_negative_indices=False,
        unique_indices=is_merged,
    )


def set_rows(table: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """The table with values [m, ...] at the rows of the index [m], none named twice."""
    return table.at[index].set(
        values.astype(table.dtype), mode="drop", wrap_negative_indices=False, unique_indices=True
    )


def check_merge_method(method: str | None) -> None:
    """Raises a ValueError unless `merge_rows` knows the method."""
    if method is not None and method not in MERGE_METHODS:
        raise ValueError(f"method must be one of {', '.join(MERGE_METHODS)}, got {method!r}.")


def merge_rows(
    index: jax.Array, values: jax.Array, num_rows: int, method: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sums the values of rows named several times.

    Args:
      index: row numbers [m]; those outside [0, num_rows) name no row.
      values: [m, width].
      num_rows: rows of the table.
      method: "hash" or "sort"; by default what is faster, "hash" on the CPU, "sort" elsewhere.

    Returns:
      Row numbers [m] and values [m, width], in which every row is named at most once. The other
      positions have row number num_rows and values of zero.
    """
    check_merge_method(method)
    m = values.shape[0]
    # In a program exported for any batch, m is a symbol: there is no telling how to sort it.
    is_symbol = not isinstance(m, int)
    method = method or ("hash" if is_symbol or jax.default_backend() == "cpu" else "sort")
    if m == 0:
        return index, values
    index = rows_or_end(index, num_rows)
    # NaN where there is no row, as the look-up of a bad id leaves behind, must not be summed.
    named = jnp.where(across(index < num_rows, values), values, 0)
    merge = _merge_by_hash if method == "hash" else _merge_by_sort
    index, sums = merge(index, named.astype(wide_dtype(values.dtype)), num_rows)
    return index, sums.astype(values.dtype)


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

    Every position is written into the slot of its row, where the last one written stands for
    all. What was read back under another row number met a collision, and tries again with the next
    hash function; after the first round about one position in ten is left.
    """
    chosen = _representatives(rows, num_rows)
    positions = jnp.arange(rows.shape[0], dtype=jnp.int32)
    return jnp.where(chosen == positions, rows, num_rows), chosen


def _representatives(rows: jax.Array, num_rows: int) -> jax.Array:
    """For each position [m], one position of all that name the same row."""
    m = rows.shape[0]
    positions = jnp.arange(m, dtype=jnp.int32)
    is_symbol = not isinstance(m, int)
    if not is_symbol and num_rows < _SLOTS_PER_LOOKUP * m:
        return jnp.zeros(num_rows + 1, jnp.int32).at[rows].set(positions)[rows]
    if is_symbol:
        num_slots = _SLOTS_PER_LOOKUP * m
        slot_of = lambda hashes: hashes % jnp.asarray(num_slots, jnp.uint32)  # noqa: E731
    else:
        bits = max(1, (_SLOTS_PER_LOOKUP * m - 1).bit_length())
        num_slots = 1 << bits
        slot_of = lambda hashes: hashes >> (32 - bits)  # noqa: E731

    def attempt(state: tuple[Any, ...]) -> tuple[Any, ...]:
        count, chosen, left = state
        slots = slot_of(_hash(rows, count)).astype(jnp.int32)
        scratch = zeros_beside(rows, (num_slots,), jnp.int32)
        scratch = scratch.at[jnp.where(left, slots, num_slots)].set(
            positions, mode="drop", wrap_negative_indices=False
        )
        candidates = scratch.at[slots].get(mode="promise_in_bounds")
        found = left & (rows.at[candidates].get(mode="promise_in_bounds") == rows)
        return count + 1, jnp.where(found, candidates, chosen), left & ~found

    everything = zeros_beside(rows, (m,), jnp.int32)
    start = attempt((jnp.uint32(0), positions + everything, everything == 0))
    return jax.lax.while_loop(lambda state: jnp.any(state[2]), attempt, start)[1]


def _hash(rows: jax.Array, seed: jax.Array) -> jax.Array:
    """Mixes 32 bits, differently for each seed: the finalizer of MurmurHash3."""
    bits = rows.astype(jnp.uint32) ^ (seed * jnp.uint32(0x9E3779B9))
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


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
