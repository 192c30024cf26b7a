"""Rows of one device's table: read before they are written, written in place.

XLA updates a donated table in place only if it can see that every read of the table comes before
the update. `read_rows` is the read that makes sure of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qrhash import tuning
from qrhash.arithmetic import INT32_MAX, as_ids
from qrhash.types import Array


def device_index(index: Array, num_rows: int) -> jax.Array:
    """Row numbers for the device; from the host they are 64 bits wide and must not wrap."""
    index = as_ids(index, "indices")
    if not isinstance(index, np.ndarray):
        return index
    if num_rows > INT32_MAX and jnp.asarray(0).dtype.itemsize < 8:
        raise ValueError(
            f"a table of {num_rows} rows needs 64-bit row numbers: set jax_enable_x64, or use more "
            "tables, for instance MixedRadix.balanced(num_embeddings, num_tables)."
        )
    in_table = is_within(index, num_rows)
    dtype = jnp.int32 if num_rows <= INT32_MAX else None
    return jnp.asarray(np.where(in_table, index, num_rows), dtype)


def flatten_indices(
    indices: Sequence[Array], num_rows: int
) -> tuple[jax.Array, Callable[[jax.Array], list[jax.Array]]]:
    """Indices [*shape] as one [n]; and what splits an array [n, ...] up in the same way.

    A single one stays as it is, and so does what is computed from it: XLA fuses that better.
    """
    on_device = [device_index(index, num_rows) for index in indices]
    if len(on_device) == 1:
        return on_device[0], lambda rows: [rows]
    sizes = [index.size for index in on_device]

    def split(rows: jax.Array) -> list[jax.Array]:
        parts = jax.lax.split(rows, sizes)
        return [
            part.reshape(*index.shape, *rows.shape[1:])
            for part, index in zip(parts, on_device, strict=True)
        ]

    return jnp.concatenate([index.reshape(-1) for index in on_device]), split


def flatten_rows(indices: Sequence[Any], rows: Sequence[jax.Array]) -> jax.Array:
    """Rows [*shape, ...] of indices [*shape] as one [n, ...]."""
    flat = [
        each.reshape(index.size, *each.shape[index.ndim :])
        for index, each in zip(indices, rows, strict=True)
    ]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat)


def fill_missing(rows: jax.Array, is_missing: jax.Array, fill_value: float) -> jax.Array:
    """Rows [*shape, ...] with fill_value for those missing [*shape], which are zeros so far."""
    if isinstance(fill_value, (int, float)) and fill_value == 0:
        return rows
    return jnp.where(across(is_missing, rows), fill_value, rows)


def rows_or_end(index: jax.Array, num_rows: int) -> jax.Array:
    """Row numbers, with num_rows for all that are outside the table."""
    index = index if num_rows <= jnp.iinfo(index.dtype).max else index.astype(jnp.int64)
    return jnp.where(is_within(index, num_rows), index, num_rows)


def is_within(index: Any, size: int) -> Any:
    """Where an index is in [0, size)."""
    return (index >= 0) & (index < size)


def across(per_row: jax.Array, rows: jax.Array) -> jax.Array:
    """[*shape] -> [*shape, 1, ...], of as many axes as the rows have."""
    return per_row.reshape(per_row.shape + (1,) * (rows.ndim - per_row.ndim))


def read_rows(arrays: Sequence[Array], index: Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Gathers the same rows from several arrays [num_rows, ...], in order before any update.

    The read is one branch of a conditional, which is compiled as one piece: it happens once,
    however many results are computed from its rows, and the row numbers come out of the same
    conditional. An update that goes by these cannot but come later.

    Args:
      arrays: all of the same number of rows.
      index: row numbers [*shape].

    Returns:
      Arrays [*shape, ...], zeros for rows outside, and the row numbers, num_rows for those outside.
    """
    num_rows = arrays[0].shape[0]
    index = rows_or_end(device_index(index, num_rows), num_rows)
    tables = tuple(map(jnp.asarray, arrays))

    def read(arrays: Sequence[jax.Array], index: jax.Array) -> tuple[Any, jax.Array]:
        return tuple(_rows_or_zeros(array, index) for array in arrays), index

    def skip(arrays: Sequence[jax.Array], index: jax.Array) -> tuple[Any, jax.Array]:
        shapes = jax.eval_shape(read, arrays, index)[0]
        zeros = (zeros_beside(each, each.shape, each.dtype) for each in shapes)
        return tuple(zeros), jnp.full_like(index, num_rows)

    if index.size == 0:
        return skip(tables, index)
    # To XLA either branch could be taken. Neither the rows nor the row numbers can then be computed
    # apart from the conditional, and whatever is written by these row numbers is written after it.
    return jax.lax.cond(jnp.any(index < num_rows), read, skip, tables, index)


def apart(fun: Callable[[], Any], is_any: jax.Array) -> Any:
    """What a function gives that reads rows; zeros if not `is_any`.

    As a branch of a conditional, which is compiled as one piece, and computed once. Else every use
    of rows would read them anew: from where updates are then to be written XLA would copy the whole
    array in each turn of a loop, and compute on one thread; and where rows of two arrays are
    multiplied, it would gather them entry by entry.
    """
    shapes = jax.eval_shape(fun)

    def nothing() -> Any:
        return jax.tree.map(lambda each: zeros_beside(each, each.shape, each.dtype), shapes)

    return jax.lax.cond(is_any, fun, nothing)


def _rows_or_zeros(table: jax.Array, index: jax.Array) -> jax.Array:
    in_table = index < table.shape[0]
    rows = table.at[jnp.where(in_table, index, 0)].get(
        mode="promise_in_bounds", out_sharding=out_sharding(table, index)
    )
    # On the CPU a select of gathered rows is slow, as XLA does not vectorize it; with a product on
    # top it takes a third of the time.
    return jnp.where(across(in_table, rows), rows, 0) * across(in_table.astype(table.dtype), rows)


def gather_rows(table: Array, index: jax.Array) -> jax.Array:
    """Rows [*shape, width] of row numbers [*shape]; zeros for those outside the table."""
    table = jnp.asarray(table)
    rows = table.at[index].get(
        mode="fill",
        fill_value=0,
        wrap_negative_indices=False,
        out_sharding=out_sharding(table, index),
    )
    if not tuning.multiplies_gathered(tuning.traced_for(), table.shape[-1]):
        return rows
    in_table = is_within(index, table.shape[0]).astype(table.dtype)
    return rows * across(in_table, rows)


def _type_of(array: Any) -> Any:
    return array if isinstance(array, jax.core.AbstractValue) else jax.typeof(array)


def varying_axes(array: Any) -> tuple[str, ...]:
    """Inside of a `jax.shard_map` that checks it: the mesh axes over which an array differs."""
    kind = _type_of(array)
    manual = getattr(kind, "manual_axis_type", None)  # since jax 0.11
    return tuple(sorted(kind.vma if manual is None else manual.varying))


def zeros_beside(like: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros that, inside of `jax.shard_map`, vary over the same mesh axes as an array, or type."""
    return varying_beside(jnp.zeros(shape, dtype), like)


def zeros_after(arrays: Sequence[jax.Array], zeros: jax.Array) -> jax.Array:
    """The zeros, made after the arrays, of floats.

    So they can have the memory of what the arrays, and nothing later, are computed from.
    """
    for each in arrays:
        # Nothing is greater than infinity, which XLA does not conclude.
        zeros = zeros + (each[(0,) * each.ndim] > jnp.inf).astype(zeros.dtype)
    return zeros


def varying_beside(array: jax.Array, *others: Any) -> jax.Array:
    """The array; inside of `jax.shard_map` it varies over the mesh axes of the others as well."""
    axes = {axis for other in others for axis in varying_axes(other)}
    more = tuple(sorted(axes.difference(varying_axes(array))))
    return jax.lax.pcast(array, more, to="varying") if more else array


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


def ranks(where: jax.Array) -> jax.Array:
    """How many places before each one hold, bool [n] -> int32 [n]: the rank of those that do.

    Places go into the bits of words, and only sums of whole words are summed up: on a CPU it takes
    half the time of a cumulative sum of all.
    """
    n = where.shape[0]
    if not isinstance(n, int):  # of an export
        where = where.astype(jnp.int32)
        return jnp.cumsum(where) - where
    bit = jnp.arange(32, dtype=jnp.uint32)[None]
    in_words = jnp.pad(where, (0, -n % 32)).reshape(-1, 32).astype(jnp.uint32)
    words = jnp.sum(in_words << bit, axis=1, dtype=jnp.uint32)
    counts = _num_bits(words)
    before = jnp.cumsum(counts, dtype=jnp.int32) - counts
    within = _num_bits(words[:, None] & ((jnp.uint32(1) << bit) - jnp.uint32(1)))
    return (before[:, None] + within).reshape(-1)[:n]


def _num_bits(words: jax.Array) -> jax.Array:
    return jax.lax.population_count(words).astype(jnp.int32)
