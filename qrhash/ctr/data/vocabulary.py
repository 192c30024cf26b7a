"""64-bit category keys -> ids.

Three ways, with one face: a call that turns keys into what a model takes. A `Vocabulary`
numbers the categories of the training lines, most frequent first, so that in a compressed
table a frequent category shares its row with rare ones only (`columns`).
`HashedIds` needs no pass over the data: keys of text are hashes, and so are Criteo's.
`RawKeys` are no ids: the keys themselves, for tables that take any key, so that nothing need be
known of the data before and nothing be kept of them.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qrhash.ctr.column_settings import ColumnSettings
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


def has_no_vocabulary(column: ColumnSettings) -> bool:
    """Whether a column's ids need no pass over the data."""
    return without_vocabulary(column) is not None


def without_vocabulary(column: ColumnSettings) -> Ids | None:
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
        name: without_vocabulary(settings.column(name))
        or Vocabulary(arrays[f"keys_{j}"], arrays[f"ids_{j}"], int(arrays[f"missing_{j}"]))
        for j, name in enumerate(names)
    }
