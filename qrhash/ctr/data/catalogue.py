"""The rows that an item was wanted in, and the items of them.

Retrieval learns from the positive rows alone: `Positives` are those of a source. A `Catalogue`
holds the distinct items of the training ones, an item being a tuple of categories. It has a name of
64 bits: the key of its column, or of several columns a hash of their keys, which two of n items
share with a probability of n**2 / 2**65.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from qrhash.ctr.data.block import Block, Source
from qrhash.ctr.data.processes import gather
from qrhash.ctr.data.vocabulary import RawKeys
from qrhash.keys import Keys, cross


class Positives:
    """The rows of a source whose label is 1; a `Source`.

    Args:
      source: of clicks and what are none.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.name, self.schema = source.name, source.schema
        self.num_lines, self.checksum = source.num_lines, source.checksum

    def blocks(self, start: int, stop: int, wanted: np.ndarray | None = None) -> Iterator[Block]:
        """Yields the positive rows of lines [start, stop); see `Source`."""
        for block in self._source.blocks(start, stop, wanted):
            yield block.take(block.labels > 0)


class Catalogue:
    """The distinct items of some rows, in the order in which they were first met.

    Args:
      places: of the item's columns among the categories of a block.

    Attributes:
      rows: how many rows were met.
      keys: [items, columns] uint64, 0 where the cell is missing.
      missing: [items, columns] bool.
      counts: [items] int64, how many rows had each.
    """

    _LEAST_PENDING = 1 << 16  # rows; see `KeyCounts`

    def __init__(self, places: Sequence[int]) -> None:
        self._places = list(places)
        self.rows = 0
        self.keys = np.zeros((0, len(places)), np.uint64)
        self.missing = np.zeros((0, len(places)), np.bool_)
        self.counts = np.zeros(0, np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._num_pending = 0
        self._sorted = (np.zeros(0, np.uint64), np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.counts)

    def watching(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The same blocks, with their items taken note of; complete when all were gone through."""
        for block in blocks:
            self._pending.append((*self._columns(block), np.ones(len(block.labels), np.int64)))
            self.rows += len(block.labels)
            self._num_pending += len(block.labels)
            if self._num_pending > max(len(self), self._LEAST_PENDING):
                self._merge()
            yield block
        self._merge()

    def gather(self) -> None:
        """Adds the items of the rows of the other processes, each of which had its `own_lines`."""
        self._pending = gather((self.keys, self.missing, self.counts))
        self.keys, self.missing = self.keys[:0], self.missing[:0]
        self.counts = self.counts[:0]
        self._merge()
        self.rows = int(self.counts.sum())

    def find(self, block: Block) -> np.ndarray:
        """Which item each row of a block has, [rows] int32; -1 for none of these."""
        names, numbers = self._sorted
        wanted = _names(*self._columns(block))
        if not len(names):
            return np.full(len(wanted), -1, np.int32)
        at = np.searchsorted(names, wanted).clip(max=len(names) - 1)
        return np.where(names[at] == wanted, numbers[at], -1).astype(np.int32)

    def _columns(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        return block.keys[:, self._places], block.missing[:, self._places]

    def _merge(self) -> None:
        parts = [(self.keys, self.missing, self.counts), *self._pending]
        keys, missing, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        names, first, place = np.unique(
            _names(keys, missing), return_index=True, return_inverse=True
        )
        order = np.argsort(first, kind="stable")
        counts = np.zeros(len(names), np.int64)
        np.add.at(counts, place, weights)
        self.keys, self.missing = keys[first[order]], missing[first[order]]
        self.counts = counts[order]
        numbers = np.empty(len(order), np.int64)
        numbers[order] = np.arange(len(order))
        self._sorted = (names, numbers)
        self._pending, self._num_pending = [], 0


def _names(keys: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Keys [rows, columns], where they are missing -> one name for each row [rows] uint64."""
    named: Keys = RawKeys()(keys, missing)
    columns = [named[:, j] for j in range(keys.shape[1])]
    return (columns[0] if len(columns) == 1 else cross(*columns)).to_numpy()
