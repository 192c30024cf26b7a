"""64-bit category keys -> ids.

Three ways, with one face: a call that turns keys into what a model takes. A `Vocabulary`
numbers the categories of the training lines, most frequent first, so that in a compressed
table a frequent category shares its row with rare ones only (`columns`).
`HashedIds` needs no pass over the data: keys of text are hashes, and so are Criteo's.
`RawKeys` are no ids: the keys themselves, for tables that take any key, so that nothing need be
known of the data before and nothing be kept of them.
"""

import json
import math
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qrhash.ctr.column_settings import ColumnSettings
from qrhash.ctr.data.block import Block
from qrhash.ctr.data.processes import gather
from qrhash.ctr.errors import UserError
from qrhash.ctr.settings import Settings
from qrhash.keys import Keys

UNSEEN_ID = 0

# The key of a missing cell: the first 64 bits of the fraction of pi.
MISSING_KEY = 0x243F6A8885A308D3


class Ids(Protocol):
    """What turns the keys of one column into what a model takes."""

    @property
    def num_embeddings(self) -> int | None:
        """Number of ids; None: there are none, but keys."""
        ...

    def __call__(self, keys: np.ndarray, missing: np.ndarray) -> Any:
        """Keys [rows] uint64, where they are missing [rows] -> ids [rows] int32, or `Keys`."""
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


@dataclass(frozen=True)
class RawKeys:
    """The keys as they are; a missing cell has a key of its own, which one in 2**64 others has."""

    num_embeddings: None = None

    def __call__(self, keys: np.ndarray, missing: np.ndarray) -> Keys:
        """Keys [rows] uint64, where they are missing [rows] -> `Keys` [rows]."""
        return Keys.of(np.where(missing, np.uint64(MISSING_KEY), keys))


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
    """How often each key was met, column by column.

    Args:
      settings: see `build_ids`.
      categories: see `build_ids`.
      lists: see `build_ids`.
      names: which of the columns to count; None: those that need a vocabulary.

    Attributes:
      of: column name -> `KeyCounts`.
    """

    def __init__(
        self,
        settings: Settings,
        categories: Sequence[str],
        lists: Sequence[str] = (),
        names: Collection[str] | None = None,
    ) -> None:
        self._categories, self._lists = categories, lists
        every = (*categories, *lists)
        if names is None:
            names = [name for name in every if not has_no_vocabulary(settings.column(name))]
        self.of = {name: KeyCounts() for name in every if name in names}

    def add(self, block: Block) -> None:
        """Counts the keys of some rows."""
        for name, counts in self.of.items():
            if name in self._lists:
                elements = block.lists[self._lists.index(name)].keys
                counts.add(elements, np.zeros(len(elements), bool))
            else:
                place = self._categories.index(name)
                counts.add(block.keys[:, place], block.missing[:, place])

    def gather(self) -> None:
        """Adds what the other processes have counted."""
        for counts in self.of.values():
            counts.gather()


def build_ids(
    settings: Settings,
    categories: Sequence[str],
    blocks: Iterable[Block],
    lists: Sequence[str] = (),
) -> dict[str, Ids]:
    """The ids of every column.

    Of several processes all call it, each with rows of its own.

    Args:
      settings: which columns are hashed or take keys, and the others' `min_count`.
      categories: the columns, as the blocks have them.
      blocks: the training rows; read only if a column needs a vocabulary.
      lists: the columns of lists, whose elements have ids.

    Returns:
      {column name: ids}, in the order of the columns, those of lists last.
    """
    counted = Counts(settings, categories, lists)
    for block in blocks if counted.of else ():
        counted.add(block)
    counted.gather()
    columns = {name: settings.column(name) for name in (*categories, *lists)}
    return {
        name: _without_vocabulary(column) or counted.of[name].vocabulary(column.min_count)
        for name, column in columns.items()
    }


def has_no_vocabulary(column: ColumnSettings) -> bool:
    """Whether a column's ids need no pass over the data."""
    return _without_vocabulary(column) is not None


def _without_vocabulary(column: ColumnSettings) -> Ids | None:
    """The ids of a column that needs to know nothing of the data; None for others."""
    if column.hash_size is not None:
        return HashedIds(column.hash_size)
    return RawKeys() if column.takes_keys else None


def save_ids(path: Path, ids: Mapping[str, Ids]) -> None:
    """Writes the vocabularies among the ids to a file, which is whole or not there."""
    arrays: dict[str, Any] = {"names": np.array(json.dumps(list(ids)))}
    for j, of_keys in enumerate(ids.values()):
        if isinstance(of_keys, Vocabulary):
            arrays |= {f"keys_{j}": of_keys.keys, f"ids_{j}": of_keys.ids}
            arrays[f"missing_{j}"] = np.array(of_keys.missing_id)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    part.replace(path)


def load_ids(path: Path, settings: Settings, categories: Sequence[str]) -> dict[str, Ids]:
    """The ids that `save_ids` wrote, and those that the settings make.

    Raises:
      UserError: there is no such file, or it holds other columns.
    """
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            arrays = dict(file)
        names = json.loads(str(arrays["names"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read, without which no id has its meaning: {error}."
        ) from error
    if names != list(categories):
        raise UserError(f"{path} is of another run: its columns are not those of the records.")
    return {
        name: _without_vocabulary(settings.column(name))
        or Vocabulary(arrays[f"keys_{j}"], arrays[f"ids_{j}"], int(arrays[f"missing_{j}"]))
        for j, name in enumerate(names)
    }
