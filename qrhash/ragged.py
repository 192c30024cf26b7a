"""Lists, offsets, padded rows, columns of lists: as ids behind each other, what bags are made of.

Everything is checked here, on the host, and refused in words.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from qrhash.arithmetic import as_ids
from qrhash.keys import Keys
from qrhash.strings import is_arrow, is_text
from qrhash.types import Array

Ids: TypeAlias = Array | Keys


def flat_ids(values: Any) -> Ids:
    """Values as ids or keys [m] of the host."""
    ids = ids_of(values)
    if ids.ndim != 1:
        raise ValueError(f"values must have one axis, got shape {ids.shape}.")
    return ids


def ids_of(values: Any) -> Ids:
    """Values of any kind as ids or keys."""
    if isinstance(values, Keys):
        return values
    if isinstance(values, jax.Array):
        return as_ids(values, "values")
    if is_text(values):
        return Keys.of(values)
    if is_arrow(values):
        if values.null_count:
            raise ValueError(f"values must not be missing, got {values.null_count} nulls.")
        values = np.asarray(values)
    return as_ids(values, "values")


def of_shape(name: str, values: Any, shape: tuple[int, ...]) -> Any:
    """Values as an array, of exactly that shape."""
    array = values if isinstance(values, jax.Array) else np.asarray(values)
    if array.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {array.shape}.")
    return array


def as_weights(values: Any, shape: tuple[int, ...]) -> Any:
    """Weights as an array of floating-point numbers, of exactly that shape."""
    weights = of_shape("weights", values, shape)
    if jnp.issubdtype(weights.dtype, jnp.floating):
        return weights
    if weights.size and not (weights.dtype == bool or jnp.issubdtype(weights.dtype, jnp.integer)):
        raise ValueError(f"weights must be numbers, got an array of {weights.dtype}.")
    return weights.astype(np.float32)


def behind(array: Any, more: int, value: int) -> Any:
    """An array [n] with so many more entries of a value."""
    xp = jnp if isinstance(array, jax.Array) else np
    return xp.pad(array, (0, more), constant_values=value)


def taken_places(ids: Ids, mask: Any, lengths: Any, padding_id: int | None) -> Any:
    """Which places are taken, bool [*shape, length]."""
    given = [name for name, each in (("mask", mask), ("lengths", lengths)) if each is not None]
    given += ["padding_id"] * (padding_id is not None)
    if len(given) > 1:
        raise ValueError(f"from_padded takes one of mask, lengths and padding_id, got {given}.")
    if mask is not None:
        mask = of_shape("mask", mask, ids.shape)
        if mask.dtype != bool:
            raise ValueError(f"mask must be bool, got {mask.dtype}.")
        return mask
    if lengths is not None:
        lengths = of_shape("lengths", lengths, ids.shape[:-1])
        if isinstance(lengths, np.ndarray) and lengths.size:
            low, high = lengths.min(), lengths.max()
            if low < 0 or high > ids.shape[-1]:
                raise ValueError(
                    f"lengths must be from 0 to the number of places, {ids.shape[-1]}, got "
                    f"{low if low < 0 else high}."
                )
        return np.arange(ids.shape[-1]) < lengths[..., None]
    if padding_id is not None:
        return ids != padding_id if not isinstance(ids, Keys) else ~(ids == padding_id)
    return np.ones(ids.shape, bool)


def zero_where(taken: Any, ids: Ids) -> Ids:
    """Ids with 0 in places that are not taken: no policy has anything to say to them."""

    def zeroed(array: Any) -> Any:
        xp = np if isinstance(array, np.ndarray) and isinstance(taken, np.ndarray) else jnp
        return xp.where(taken, array, array.dtype.type(0))

    return jax.tree.map(zeroed, ids)


def unpacked(lists: Any, name: str) -> tuple[Any, np.ndarray]:
    """Lists as all their elements, and the length of each."""
    if is_arrow(lists):
        return _of_arrow(lists, name)
    items = list(lists)
    wrong = next(
        (each for each in items if each is not None and not _is_list(each)),
        None,
    )
    if wrong is not None:
        raise ValueError(f"{name} must hold lists, got {wrong!r}.")
    lengths = np.array([0 if each is None else len(each) for each in items], np.int64)
    parts: Sequence[Any] = [each for each in items if each is not None and len(each)]
    if parts and all(isinstance(each, np.ndarray) for each in parts):
        return np.concatenate(parts), lengths
    return [value for each in parts for value in each], lengths


def _is_list(each: Any) -> bool:
    return hasattr(each, "__len__") and not isinstance(each, (str, bytes, dict))


def _of_arrow(column: Any, name: str) -> tuple[Any, np.ndarray]:
    if "list" not in str(column.type):
        raise ValueError(f"{name} must be a column of lists, got one of {column.type}.")
    chunks = column.chunks if hasattr(column, "chunks") else [column]
    # A null counts as an empty list; `flatten` leaves it out, as it does what a slice leaves out.
    lengths = [np.asarray(chunk.value_lengths().fill_null(0)) for chunk in chunks]
    # A null list of fixed size still has a length.
    lengths = [
        np.where(np.asarray(chunk.is_null()), 0, of_chunk)
        for chunk, of_chunk in zip(chunks, lengths, strict=True)
    ]
    values = [chunk.flatten() for chunk in chunks]
    if any(each.null_count for each in values):
        raise ValueError(f"{name} must hold no missing elements, got a null in a list.")
    merged = [Keys.of(each) if is_text(each) else np.asarray(each) for each in values if len(each)]
    if not merged:
        return np.zeros(0, np.int64), np.concatenate([np.zeros(0, np.int64), *lengths])
    return jax.tree.map(lambda *x: np.concatenate(x), *merged), np.concatenate(lengths)
