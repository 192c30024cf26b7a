"""The rows that an item was wanted in, and the items of them.

Retrieval learns from the positive rows alone: `Positives` are those of a source. A `Catalogue`
holds the distinct items of the training ones, an item being a tuple of categories, and of lists of
them in any order. It has a name of 64 bits: the key of its column, or of a list or several columns
a hash of their keys, which two of n items share with a probability of n**2 / 2**65.
"""

from collections.abc import Collection, Iterable, Iterator

import numpy as np

from qrhash.ctr.data.block import Block, Lists, Source, joined, no_rows
from qrhash.ctr.data.processes import gather
from qrhash.ctr.data.schema import Schema
from qrhash.ctr.data.vocabulary import RawKeys
from qrhash.keys import Keys, cross, scramble


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
      schema: the columns of the rows.
      names: of those that an item is told by: categories and lists.

    Attributes:
      schema: the columns of an item.
      rows: how many rows were met.
      items: the items, as rows of these columns.
      counts: [items] int64, how many rows had each.
    """

    _LEAST_PENDING = 1 << 16  # rows; see `KeyCounts`

    def __init__(self, schema: Schema, names: Collection[str]) -> None:
        self._of_rows, self.schema = schema, schema.only(names)
        self.rows = 0
        self.items = self._of(no_rows(schema))
        self.counts = np.zeros(0, np.int64)
        self._pending: list[tuple[Block, np.ndarray]] = []
        self._num_pending = 0
        self._sorted = (np.zeros(0, np.uint64), np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.counts)

    def watching(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The same blocks, with their items taken note of; complete when all were gone through."""
        for block in blocks:
            self._pending.append((self._of(block), np.ones(len(block.labels), np.int64)))
            self.rows += len(block.labels)
            self._num_pending += len(block.labels)
            if self._num_pending > max(len(self), self._LEAST_PENDING):
                self._merge()
            yield block
        self._merge()

    def gather(self) -> None:
        """Adds the items of the rows of the other processes, each of which had its `own_lines`."""
        self._pending = gather((self.items, self.counts))
        self.items, self.counts = self.items.rows(0, 0), self.counts[:0]
        self._merge()
        self.rows = int(self.counts.sum())

    def find(self, block: Block) -> np.ndarray:
        """Which item each row of a block has, [rows] int32; -1 for none of these."""
        names, numbers = self._sorted
        wanted = _names(self._of(block))
        if not len(names):
            return np.full(len(wanted), -1, np.int32)
        at = np.searchsorted(names, wanted).clip(max=len(names) - 1)
        return np.where(names[at] == wanted, numbers[at], -1).astype(np.int32)

    def _of(self, block: Block) -> Block:
        return block.only(self._of_rows, self.schema)

    def _merge(self) -> None:
        blocks, weights = zip((self.items, self.counts), *self._pending, strict=True)
        items = joined(blocks)
        names, first, place = np.unique(_names(items), return_index=True, return_inverse=True)
        order = np.argsort(first, kind="stable")
        counts = np.zeros(len(names), np.int64)
        np.add.at(counts, place, np.concatenate(weights))
        self.items, self.counts = items.take(first[order]), counts[order]
        numbers = np.empty(len(order), np.int64)
        numbers[order] = np.arange(len(order))
        self._sorted = (names, numbers)
        self._pending, self._num_pending = [], 0


def _names(items: Block) -> np.ndarray:
    """Items -> one name for each [rows] uint64."""
    named: Keys = RawKeys()(items.keys, items.missing)
    columns = [named[:, j] for j in range(items.keys.shape[1])]
    columns += map(_bags, items.lists)
    return (columns[0] if len(columns) == 1 else cross(*columns)).to_numpy()


def _bags(lists: Lists) -> Keys:
    """One key for each list [rows], whatever the order of its elements: the sum of theirs."""
    mixed = scramble(Keys.of(lists.keys))
    words = []
    for word in (mixed.hi, mixed.lo):
        sums = np.concatenate([np.zeros(1, np.uint32), np.cumsum(word, dtype=np.uint32)])
        words.append(np.diff(sums[lists.offsets]))
    return Keys(*words)
