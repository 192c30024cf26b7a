"""How often each key was met, column by column -> the ids of every column.

One pass over the training rows: the counts number the categories, most frequent first, and say of a
column what a plan for it goes by.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from qrhash.ctr.data.block import Block
from qrhash.ctr.data.processes import gather
from qrhash.ctr.data.vocabulary import (
    UNSEEN_ID,
    Ids,
    Vocabulary,
    has_no_vocabulary,
    without_vocabulary,
)
from qrhash.ctr.settings import Settings


class KeyCounts:
    """How often each key of one column was met, and how often none.

    Counts of new blocks wait in a list until they are as many as those merged so far: the
    merging then costs O(n log n) in all, not O(n) for every block.
    """

    _LEAST_PENDING = 1 << 16

    def __init__(self) -> None:
        self._keys = np.empty(0, np.uint64)
        self._counts = np.empty(0, np.int64)
        self._num_missing = 0
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_pending = 0

    def add(self, keys: np.ndarray, missing: np.ndarray) -> None:
        """Counts keys [rows], but where they are missing [rows]."""
        self._num_missing += int(missing.sum())
        self._pending.append(np.unique(keys[~missing], return_counts=True))
        self._num_pending += len(self._pending[-1][0])
        if self._num_pending > max(len(self._keys), self._LEAST_PENDING):
            self._merge()

    def found(self) -> tuple[np.ndarray, np.ndarray, int]:
        """The keys that were met [n], rising, how often each [n], and how often none."""
        self._merge()
        return self._keys, self._counts, self._num_missing

    def keep(self, most: int) -> bool:
        """Forgets the rarest keys once there are more than so many; returns whether it did.

        What is met again is counted anew: counts of the frequent ones stay about right, as in lossy
        counting (Manku and Motwani 2002).
        """
        if self._num_pending or len(self._keys) <= most:
            return False
        kept = np.sort(np.argsort(-self._counts, kind="stable")[: most // 2])
        self._keys, self._counts = self._keys[kept], self._counts[kept]
        return True

    def gather(self) -> None:
        """Adds what the other processes have counted."""
        self._merge()
        keys, counts, missing = zip(
            *gather((self._keys, self._counts, self._num_missing)), strict=True
        )
        self._keys, self._counts = self._keys[:0], self._counts[:0]
        self._pending = list(zip(keys, counts, strict=True))
        self._num_missing = sum(missing)

    def vocabulary(self, min_count: int) -> Vocabulary:
        """Numbers what was met at least `min_count` times by falling count, ties by key.

        The missing cell is numbered with the keys, as one before them all.
        """
        self._merge()
        counts = np.concatenate([[self._num_missing], self._counts])
        order = np.argsort(-counts, kind="stable")
        order = order[counts[order] >= max(1, min_count)]
        ids = np.full(len(counts), UNSEEN_ID, np.int32)
        ids[order] = np.arange(1, len(order) + 1)
        missing_id, ids = int(ids[0]), ids[1:]
        common = ids != UNSEEN_ID
        return Vocabulary(self._keys[common], ids[common], missing_id)

    def counts(self, min_count: int) -> np.ndarray:
        """How often the ids of `vocabulary` were met, [num_embeddings] int64 in falling order."""
        self._merge()
        counts = np.concatenate([[self._num_missing], self._counts])
        common = counts[counts >= max(1, min_count)]
        unseen = counts.sum() - common.sum()
        return -np.sort(-np.append(common, unseen))

    def variance_between(self, clicked: "KeyCounts") -> float:
        """The variance of click rates between keys, divided by that of the clicks of one key.

        By the moments of a random effect, as DerSimonian and Laird 1986 have it: that the rates
        differ by more than chance makes them.

        Args:
          clicked: the same of the rows that are clicks.

        Returns:
          0 or more; nan, if no key was met twice, or all rows are clicks, or none.
        """
        self._merge()
        clicked._merge()
        clicks = np.zeros(len(self._keys))
        clicks[np.searchsorted(self._keys, clicked._keys)] = clicked._counts
        clicks = np.append(clicks, clicked._num_missing)
        met = np.append(self._counts, self._num_missing).astype(float)
        clicks, met = clicks[met > 0], met[met > 0]
        rate = clicks.sum() / max(1.0, met.sum())
        noise = rate * (1 - rate)
        freedom = met.sum() - (met @ met) / max(1.0, met.sum())
        if noise <= 0 or len(met) < 2 or met.max() < 2:
            return math.nan
        spread = float(((clicks - met * rate) ** 2 / met).sum())
        return max(0.0, (spread / noise - (len(met) - 1)) / freedom)

    def _merge(self) -> None:
        parts = [(self._keys, self._counts), *self._pending]
        keys, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
        self._keys, place = np.unique(keys, return_inverse=True)
        self._counts = np.zeros(len(self._keys), np.int64)
        np.add.at(self._counts, place, counts)
        self._pending, self._num_pending = [], 0


class Counts:
    """How often the keys of columns were met, column by column.

    Args:
      settings: which columns are hashed or take keys, and the others' `min_count`.
      categories: the columns, as the blocks have them.
      lists: the columns of lists, whose elements have ids.
      names: which of the columns to count; None: those that need a vocabulary.
      with_clicks: whether what was met in rows that are clicks is counted by itself, too.

    Attributes:
      columns: column name -> what the settings say of it, in the order of the columns, those of
        lists last.
      of: column name -> `KeyCounts`, of those that are counted.
      clicked: the same of clicks; empty, if these are not counted by themselves.
      rows: how many rows were counted.
    """

    def __init__(
        self,
        settings: Settings,
        categories: Sequence[str],
        lists: Sequence[str] = (),
        names: Collection[str] | None = None,
        *,
        with_clicks: bool = False,
    ) -> None:
        self._categories, self._lists = categories, lists
        self.columns = {name: settings.column(name) for name in (*categories, *lists)}
        if names is None:
            names = [name for name, each in self.columns.items() if not has_no_vocabulary(each)]
        self.of = {name: KeyCounts() for name in self.columns if name in names}
        self.clicked = {name: KeyCounts() for name in self.of if with_clicks}
        self.rows = 0

    def add(self, block: Block) -> None:
        """Counts the keys of some rows."""
        self.rows += len(block.labels)
        self._add(self.of, block)
        if self.clicked:
            self._add(self.clicked, block.take(block.labels > 0))

    def _add(self, of: Mapping[str, KeyCounts], block: Block) -> None:
        for name, counts in of.items():
            if name in self._lists:
                elements = block.lists[self._lists.index(name)].keys
                counts.add(elements, np.zeros(len(elements), bool))
            else:
                place = self._categories.index(name)
                counts.add(block.keys[:, place], block.missing[:, place])

    def gather(self) -> None:
        """Adds what the other processes have counted."""
        self.rows = sum(gather(self.rows))
        for counts in (*self.of.values(), *self.clicked.values()):
            counts.gather()


def build_ids(counts: Counts, blocks: Iterable[Block]) -> dict[str, Ids]:
    """The ids of every column.

    Of several processes all call it, each with rows of its own.

    Args:
      counts: of the columns, nothing counted yet; knows what was met afterwards.
      blocks: the training rows; read only if a column needs a vocabulary.

    Returns:
      {column name: ids}, in the order of the columns, those of lists last.
    """
    for block in blocks if counts.of else ():
        counts.add(block)
    counts.gather()
    return {
        name: without_vocabulary(column) or counts.of[name].vocabulary(column.min_count)
        for name, column in counts.columns.items()
    }
