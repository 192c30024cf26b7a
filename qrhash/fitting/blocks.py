"""A full table as the fits read it: some thousand rows at a time, with their weights and indices.

Nothing else of the full table is ever in memory, so that it may be a file larger than that. What is
summed up for each row of a small table is summed in float64.
"""

import copy
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from qrhash.arithmetic import as_size
from qrhash.config import EmbedConfig
from qrhash.inspection.blocks import checked_counts, num_ids, taken
from qrhash.keys import Keys
from qrhash.protocol import is_table

_VALUES = 1 << 20  # numbers that are made of a block's ids at once
_MOST_ROWS, _FEWEST_ROWS = 1 << 16, 1 << 8


class Block(NamedTuple):
    """Rows of a full table, of ids that have rows and a weight above zero.

    Attributes:
      vectors: the rows, float64 [m, features]; None where they are not asked for.
      weights: float64 [m].
      indices: the ids' row numbers in each table, k arrays [m].
    """

    vectors: Any
    weights: np.ndarray
    indices: list[np.ndarray]


class Source:
    """A full table, weighted, seen through the tables of a config.

    Args:
      full: [n, features] floats, of anything that can be sliced by rows.
      config: the `EmbedConfig`.
      keys: the key of each row, [n], for a family on keys.
      weights: how much each row matters, [n]; None: all alike.
      block_rows: how many rows to read at once; None: by their width.
      values: how many numbers are made of an id on the way.

    Raises:
      ValueError: an argument breaks its rule.
    """

    def __init__(
        self,
        full: Any,
        config: EmbedConfig,
        keys: Any = None,
        weights: Any = None,
        block_rows: int | None = None,
        values: int = 1,
    ) -> None:
        self.ids = ids_of(config, keys)
        _check_full(full, num_ids(self.ids), config.features)
        self.full, self.config = full, config
        self.num_ids = num_ids(self.ids)
        self.weights = None if weights is None else checked_counts(weights, self.num_ids, "weights")
        if self.weights is not None and not self.weights.any():
            raise ValueError("weights must be above 0 for one row at least, got zeros alone.")
        if block_rows is None:
            at_once = _VALUES // max(values, config.features)
            self.block_rows = min(_MOST_ROWS, max(_FEWEST_ROWS, at_once))
        else:
            self.block_rows = as_size("block_rows", block_rows)

    def flattened(self) -> "Source":
        """The same with the roots of the weights."""
        flat = copy.copy(self)
        if self.weights is not None:
            flat.weights = np.sqrt(self.weights)
            flat.__dict__.pop("row_weights", None)
        return flat

    def blocks(
        self, table: int = 0, rows: range | None = None, *, with_vectors: bool = True
    ) -> Iterator[Block]:
        """Yields a `Block` for each part of the full table, where there is anything to yield.

        Args:
          table: of `rows`, which table they are of.
          rows: leaves out ids whose row in that table is not one of these.
          with_vectors: whether the full table is read.
        """
        for start in range(0, self.num_ids, self.block_rows):
            part = slice(start, min(start + self.block_rows, self.num_ids))
            weights, indices = self.met(part)
            is_met = weights > 0
            if rows is not None:
                is_met &= (indices[table] >= rows.start) & (indices[table] < rows.stop)
            if not is_met.any():
                continue
            vectors = self.read(part) if with_vectors else None
            if is_met.all():
                yield Block(vectors, weights, indices)
            else:
                vectors = vectors[is_met] if vectors is not None else None
                yield Block(vectors, weights[is_met], [index[is_met] for index in indices])

    def met(self, part: slice) -> tuple[np.ndarray, list[np.ndarray]]:
        """Weights of the ids of a part, zero for those that have no row, and their row numbers."""
        ids = taken(self.ids, np.arange(part.start, part.stop))
        indices = [np.asarray(index) for index in self.config.indices(ids)]
        has_rows = (indices[0] >= 0) & (indices[0] < self.config.partition.num_rows[0])
        weights = has_rows.astype(np.float64)
        if self.weights is not None:
            weights *= self.weights[part]
        return weights, indices

    def read(self, part: slice) -> np.ndarray:
        """Rows of the full table, float64 [m, features]."""
        if isinstance(self.full, jax.Array):
            # The start is no constant: one program serves all blocks.
            size = part.stop - part.start
            rows = jax.lax.dynamic_slice_in_dim(self.full, part.start, size, axis=0)
        else:
            rows = self.full[part.start : part.stop]
        return np.asarray(rows).astype(np.float64)

    def moments(self) -> tuple[np.ndarray, float]:
        """The weighted mean [features], and the weighted sum of squared distances from it.

        Raises:
          ValueError: no id has a row, or a row of the full table that matters is not finite.
        """
        total, mean, spread = 0.0, np.zeros(self.config.features), 0.0
        for block in self.blocks():
            if not np.isfinite(block.vectors).all():
                raise ValueError(
                    "full must hold finite numbers in the rows that have a weight above 0, got nan "
                    "or infinity."
                )
            weight = block.weights.sum()
            of_block = block.weights @ block.vectors / weight
            spread += float(block.weights @ ((block.vectors - of_block) ** 2).sum(axis=1))
            # Two parts' sums around their own means, as one around the mean of both.
            apart = of_block - mean
            spread += float(total * weight / (total + weight) * (apart @ apart))
            total += weight
            mean = mean + weight / total * apart
        if not total:
            raise ValueError("full must have a row of an id that has rows in the tables, got none.")
        return mean, spread

    @functools.cached_property
    def row_weights(self) -> list[np.ndarray]:
        """The weight of all ids that share a row, of each row of each table, k arrays [rows_j]."""
        sums = [np.zeros(rows) for rows in self.config.partition.num_rows]
        for block in self.blocks(with_vectors=False):
            for summed, index in zip(sums, block.indices, strict=True):
                add_by_row(summed, index, block.weights)
        return sums


def ids_of(config: EmbedConfig, keys: Any) -> Any:
    """The ids that the rows of a full table stand for: `Keys` [n], or a number n for all below it.

    Raises:
      ValueError: a family on keys without keys, or another one with them.
    """
    kind = type(config.partition).__name__
    if not config.partition.takes_keys:
        if keys is not None:
            raise ValueError(
                f"keys must be left out for {kind}, whose row i of a full table is that of id i."
            )
        return config.num_embeddings
    if keys is None:
        raise ValueError(
            f"keys must be given for {kind}, a family on keys: the key of each row of the full "
            "table, [n]."
        )
    found = Keys.of(keys)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"keys must have shape [n], one for each row, got {found.shape}.")
    return Keys(np.asarray(found.hi), np.asarray(found.lo))


def add_by_row(sums: np.ndarray, index: np.ndarray, values: np.ndarray) -> None:
    """Adds values [m, ...] to the rows [m] of sums [num_rows, ...], in place."""
    if (index[1:] < index[:-1]).any():
        order = np.argsort(index, kind="stable")
        index, values = index[order], values[order]
    starts = np.flatnonzero(np.append(True, index[1:] != index[:-1]))
    sums[index[starts]] += np.add.reduceat(values, starts, axis=0)


def _check_full(full: Any, num_rows: int, features: int) -> None:
    shape, dtype = getattr(full, "shape", None), getattr(full, "dtype", None)
    if shape is None or dtype is None or is_table(full):
        raise ValueError(
            "full must be an array [n, features] that can be sliced by rows, of NumPy or JAX or a "
            f"file, got {type(full).__name__}."
        )
    if not jax.numpy.issubdtype(dtype, np.floating):
        raise ValueError(f"full must hold floats, got {dtype}.")
    if tuple(shape) != (num_rows, features):
        raise ValueError(
            f"full must have shape {(num_rows, features)}, a row of the config's features for each "
            f"id, got {tuple(shape)}."
        )
