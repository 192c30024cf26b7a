"""64-bit category keys -> ids.

Two ways, with one face: `num_embeddings`, and a call that turns keys into ids. A `Vocabulary`
numbers the categories of the training lines, most frequent first, so that in a compressed
table a frequent category shares its row with rare ones only (`columns`).
`HashedIds` needs no pass over the data: keys of text are hashes, and so are Criteo's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qrhash.ctr.data.block import Block
from qrhash.ctr.settings import Settings

UNSEEN_ID = 0


class Ids(Protocol):
    """What turns the keys of one column into ids."""

    @property
    def num_embeddings(self) -> int:
        """Number of ids."""
        ...

    def __call__(self, keys: np.ndarray, missing: np.ndarray) -> np.ndarray:
        """Keys [rows] uint64, where they are missing [rows] -> ids [rows] int32."""
        ...


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The categories of one column, a missing cell being one of them.

    Attributes:
      keys: [size] uint64, increasing.
      ids: [size] int32, id of each key: 1 is the most frequent; 0 (`UNSEEN_ID`) is left for
        every other key.
      missing_id: that of the missing cell, numbered among the others.
    """

    keys: np.ndarray
    ids: np.ndarray
    missing_id: int = UNSEEN_ID

    @property
    def num_embeddings(self) -> int:
        """Number of ids."""
        return len(self.keys) + 1 + (self.missing_id != UNSEEN_ID)

    def __call__(self, keys: np.ndarray, missing: np.ndarray) -> np.ndarray:
        """Keys [rows] uint64, where they are missing [rows] -> ids [rows] int32."""
        ids = np.full(keys.shape, UNSEEN_ID, np.int32)
        if len(self.keys):
            places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
            ids = np.where(self.keys[places] == keys, self.ids[places], ids)
        return np.where(missing, np.int32(self.missing_id), ids)


@dataclass(frozen=True)
class HashedIds:
    """Id of a key, taken as unsigned: 1 + key mod (num_embeddings - 1); 0 is the missing cell."""

    num_embeddings: int

    def __call__(self, keys: np.ndarray, missing: np.ndarray) -> np.ndarray:
        """Keys [rows] uint64, where they are missing [rows] -> ids [rows] int32."""
        ids = 1 + keys % np.uint64(self.num_embeddings - 1)
        return np.where(missing, 0, ids).astype(np.int32)


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

    def _merge(self) -> None:
        parts = [(self._keys, self._counts), *self._pending]
        keys, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
        self._keys, place = np.unique(keys, return_inverse=True)
        self._counts = np.zeros(len(self._keys), np.int64)
        np.add.at(self._counts, place, counts)
        self._pending, self._num_pending = [], 0


def build_ids(
    settings: Settings, categories: Sequence[str], blocks: Iterable[Block]
) -> dict[str, Ids]:
    """The ids of every column.

    Args:
      settings: which columns are hashed, and the others' `min_count`.
      categories: the columns, as the blocks have them.
      blocks: the training rows; read only if a column needs a vocabulary.

    Returns:
      {column name: ids}, in the order of the columns.
    """
    columns = {name: settings.column(name) for name in categories}
    counted = {name: KeyCounts() for name in categories if columns[name].hash_size is None}
    for block in blocks if counted else ():
        for name, counts in counted.items():
            place = categories.index(name)
            counts.add(block.keys[:, place], block.missing[:, place])
    ids: dict[str, Ids] = {}
    for name, column in columns.items():
        if column.hash_size is not None:
            ids[name] = HashedIds(column.hash_size)
        else:
            ids[name] = counted[name].vocabulary(column.min_count)
    return ids
