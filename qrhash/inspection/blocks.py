"""Ids some thousand at a time: what is made of them takes no more memory than a block of it."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qrhash.arithmetic import as_size
from qrhash.keys import Keys

_INDICES = 1 << 18  # ids whose row numbers are computed at once
_VECTORS = 1 << 14  # ids whose vectors are

Vectors = Callable[[Any], Any]


def num_ids(ids: Any) -> int:
    """How many ids there are: those below a number, or those of an array, or `Keys`.

    Raises:
      ValueError: they are not of one axis, or no integers.
    """
    if isinstance(ids, (int, np.integer)) and not isinstance(ids, bool):
        return as_size("ids", ids, minimum=0)
    kind = "u" if isinstance(ids, Keys) else getattr(getattr(ids, "dtype", None), "kind", "")
    if kind not in ("i", "u") or ids.ndim != 1:
        raise ValueError(
            f"ids must be an array [n] of integers, Keys [n], or a number n for all ids below it, "
            f"got {ids!r}."
        )
    return len(ids)


def taken(ids: Any, places: np.ndarray) -> Any:
    """The ids at some places [m]."""
    return places if isinstance(ids, (int, np.integer)) else ids[places]


def index_blocks(partition: Any, ids: Any) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """Yields (places, row numbers of the ids there in every table), block by block."""
    n = num_ids(ids)
    for start in range(0, n, _INDICES):
        part = slice(start, min(start + _INDICES, n))
        indices = partition.indices(taken(ids, np.arange(part.start, part.stop)))
        yield part, [np.asarray(each) for each in indices]


def block_size(n: int) -> int:
    """How many ids are looked up at once, of n: a power of two."""
    return int(min(_VECTORS, 1 << max(0, n - 1).bit_length()))


def vector_blocks(
    vectors: Vectors, ids: Any, *, at_once: int | None = None, dtype: Any = np.float32
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (places, vectors [m, features] of the ids there), block by block.

    Every block that is looked up has the same length, so that a compiled function is compiled once,
    and of some ids more or less not again. Of ids with k vectors these stand side by side.

    Args:
      vectors: see `norms`.
      ids: see `norms`.
      at_once: how many ids are looked up at once; None: `block_size`.
      dtype: of the vectors; None: the one that they have.
    """
    n = num_ids(ids)
    size = at_once or block_size(n)
    for start in range(0, n, size):
        stop = min(start + size, n)
        places = np.minimum(np.arange(start, start + size), n - 1)
        found = np.asarray(vectors(taken(ids, places)), dtype)
        yield slice(start, stop), found.reshape(size, -1)[: stop - start]


def checked_counts(counts: Any, n: int, name: str = "counts") -> np.ndarray:
    """Counts [n] as float64; ones, where none are given.

    Raises:
      ValueError: they are not one for each id, or below 0.
    """
    if counts is None:
        return np.ones(n)
    found = np.asarray(counts, np.float64)
    if found.shape != (n,) or not np.isfinite(found).all() or (found < 0).any():
        raise ValueError(
            f"{name} must be {n} numbers of at least 0, one for each id, got shape {found.shape}."
        )
    return found
