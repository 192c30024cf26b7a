"""64-bit category keys -> ids.

Two ways, with one face: `num_embeddings`, and a call that turns keys into ids. A `Vocabulary`
numbers the categories of the training lines, most frequent first, so that in a compressed
table a frequent category shares its row with rare ones only (`columns`).
`HashedIds` needs no pass over the data: Criteo's categories are hashes already.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qrhash.ctr.block import CATEGORIES, Block
from qrhash.ctr.settings import Settings

UNSEEN_ID = 0


class Ids(Protocol):
    """What turns the keys of one column into ids."""

    @property
    def num_embeddings(self) -> int:
        """Number of ids."""
        ...

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        """Keys [rows] int64 -> ids [rows] int32 in [0, num_embeddings)."""
        ...


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The categories of one column, a missing cell being one of them.

    Attributes:
      keys: [size] int64, increasing.
      ids: [size] int32, id of each key: 1 is the most frequent; 0 (`UNSEEN_ID`) is left for
        every other key.
    """

    keys: np.ndarray
    ids: np.ndarray

    @property
    def num_embeddings(self) -> int:
        """Number of ids."""
        return len(self.keys) + 1

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        """Keys [rows] int64 -> ids [rows] int32."""
        if not len(self.keys):
            return np.full(keys.shape, UNSEEN_ID, np.int32)
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.ids[places], np.int32(UNSEEN_ID))


@dataclass(frozen=True)
class HashedIds:
    """Id of a key: 1 + key mod (num_embeddings - 1); id 0 is the missing cell."""

    num_embeddings: int

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        """Keys [rows] int64 -> ids [rows] int32."""
        ids = 1 + keys % (self.num_embeddings - 1)
        return np.where(keys < 0, 0, ids).astype(np.int32)


class KeyCounts:
    """How often each key of one column was met.

    Counts of new blocks wait in a list until they are as many as those merged so far: the
    merging then costs O(n log n) in all, not O(n) for every block.
    """

    _LEAST_PENDING = 1 << 16

    def __init__(self) -> None:
        self._keys = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_pending = 0

    def add(self, keys: np.ndarray) -> None:
        """Counts keys [rows]."""
        self._pending.append(np.unique(keys, return_counts=True))
        self._num_pending += len(self._pending[-1][0])
        if self._num_pending > max(len(self._keys), self._LEAST_PENDING):
            self._merge()

    def vocabulary(self, min_count: int) -> Vocabulary:
        """Numbers the keys met at least `min_count` times by falling count, ties by key."""
        self._merge()
        common = self._counts >= min_count
        keys, counts = self._keys[common], self._counts[common]
        ids = np.empty(len(keys), np.int32)
        ids[np.lexsort((keys, -counts))] = np.arange(1, len(keys) + 1)
        return Vocabulary(keys, ids)

    def _merge(self) -> None:
        parts = [(self._keys, self._counts), *self._pending]
        keys, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
        self._keys, place = np.unique(keys, return_inverse=True)
        self._counts = np.zeros(len(self._keys), np.int64)
        np.add.at(self._counts, place, counts)
        self._pending, self._num_pending = [], 0


def build_ids(settings: Settings, blocks: Iterable[Block]) -> dict[str, Ids]:
    """The ids of every column.

    Args:
      settings: which columns are hashed, and the others' `min_count`.
      blocks: the training rows; read only if a column needs a vocabulary.

    Returns:
      {column name: ids}, in the order of the columns.
    """
    columns = {name: settings.column(name) for name in CATEGORIES}
    counted = {name: KeyCounts() for name in CATEGORIES if columns[name].hash_size is None}
    for block in blocks if counted else ():
        for name, counts in counted.items():
            counts.add(block.keys[:, CATEGORIES.index(name)])
    ids: dict[str, Ids] = {}
    for name, column in columns.items():
        if column.hash_size is not None:
            ids[name] = HashedIds(column.hash_size)
        else:
            ids[name] = counted[name].vocabulary(column.min_count)
    return ids
