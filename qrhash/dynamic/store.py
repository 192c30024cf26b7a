"""Stores: where the rows are that a device has no room for, in memory or in a file.

A store holds records, bytes of one width, by the number of the row. What they mean is no business
of its own.
"""

import os
import tempfile
from typing import Protocol, Self

import numpy as np

from qrhash.arithmetic import as_size


class Store(Protocol):
    """Records of bytes, one for each row number in [0, num_rows).

    Attributes:
      num_rows: how many there are.
      record_width: bytes of a record.
    """

    num_rows: int
    record_width: int

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The records of rows, int64 [n] -> uint8 [n, record_width]; zeros if never written."""

    def write(self, rows: np.ndarray, records: np.ndarray) -> None:
        """Sets the records [n, record_width], uint8, of rows [n], none of them named twice."""

    def flush(self) -> None:
        """Returns when all that was written is kept, as far as the store keeps anything."""

    def close(self) -> None:
        """Gives back what the store holds. What was not flushed may be lost."""


class MemoryStore:
    """A store in the host's memory; pages that are never written take none.

    Args:
      num_rows: how many rows.
      record_width: bytes of a record.

    Raises:
      ValueError: an argument is below 1.

    >>> store = MemoryStore(1000, 2)
    >>> store.write(np.array([7]), np.array([[1, 2]], np.uint8))
    >>> store.read(np.array([7, 8])).tolist()
    [[1, 2], [0, 0]]
    """

    def __init__(self, num_rows: int, record_width: int) -> None:
        self.num_rows = as_size("num_rows", num_rows)
        self.record_width = as_size("record_width", record_width)
        # As one item each, records are copied whole.
        self._records = np.zeros(self.num_rows, _item(self.record_width))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """See `Store`."""
        return _as_bytes(self._records[rows])

    def write(self, rows: np.ndarray, records: np.ndarray) -> None:
        """See `Store`."""
        self._records[rows] = _as_items(records, self.record_width)

    def flush(self) -> None:
        """See `Store`: memory keeps nothing beyond the process."""

    def close(self) -> None:
        """See `Store`."""
        self._records = self._records[:0]


class FileStore:
    """A store in a file, which may be larger than the memory: what is in use of it is in memory.

    After a crash the file holds what the last `flush` wrote, all of it and nothing later. For that
    a row has two places: a record goes to the one that does not hold what was flushed, under the
    number of the next flush, and counts once that number stands in the head of the file. The file
    is sparse: rows that were never written take no space on the disk.

    Args:
      path: the file. One that is there is gone on with, and made longer if it has fewer rows.
      num_rows: how many rows.
      record_width: bytes of a record.

    Raises:
      ValueError: an argument is below 1; or the file is of another kind, of records of another
        width, or of more rows.
    """

    def __init__(self, path: str | os.PathLike[str], num_rows: int, record_width: int) -> None:
        self.path = os.fspath(path)
        self.num_rows = as_size("num_rows", num_rows)
        self.record_width = as_size("record_width", record_width)
        place = [("flushes", "<u4", (2,)), ("records", _item(record_width), (2,))]
        size = _HEAD_BYTES + self.num_rows * np.dtype(place).itemsize
        is_new = not os.path.exists(self.path) or not os.path.getsize(self.path)
        if not is_new:
            self._check_file()
        with open(self.path, "ab") as file:
            file.truncate(size)
        self._head = np.memmap(self.path, _HEAD, "r+", shape=())
        self._rows = np.memmap(self.path, place, "r+", _HEAD_BYTES, (self.num_rows,))
        if is_new:
            self._head["width"] = self.record_width
            self._head["magic"] = _MAGIC
        elif self._head["is_changed"]:
            self._forget_what_was_not_flushed()
        self._head["num_rows"] = self.num_rows

    @classmethod
    def unnamed(cls, folder: str | os.PathLike[str], num_rows: int, record_width: int) -> Self:
        """A store in a file of a folder that no other process has, and that goes with this one.

        Args:
          folder: a folder that is there.
          num_rows: how many rows.
          record_width: bytes of a record.

        Raises:
          OSError: no such file can be made there.
        """
        handle, path = tempfile.mkstemp(suffix=".rows", prefix="qrhash-", dir=folder)
        os.close(handle)
        try:
            return cls(path, num_rows, record_width)
        finally:
            # Its pages stay for as long as they are mapped: however this process ends, nothing is
            # left behind.
            os.unlink(path)

    def _check_file(self) -> None:
        with open(self.path, "rb") as file:
            head = file.read(_HEAD.itemsize)
        (found,) = np.frombuffer(head.ljust(_HEAD.itemsize), _HEAD)
        if found["magic"] != _MAGIC:
            raise ValueError(f"path must be a file that a FileStore wrote, or none: {self.path}.")
        if found["width"] != self.record_width:
            raise ValueError(
                f"record_width must be that of the file, {found['width']} bytes, got "
                f"{self.record_width}: table and optimizer must be those that wrote {self.path}."
            )
        if found["num_rows"] > self.num_rows:
            raise ValueError(
                f"num_rows must be at least the {found['num_rows']} of {self.path}, got "
                f"{self.num_rows}."
            )

    def _forget_what_was_not_flushed(self) -> None:
        for start in range(0, self.num_rows, _AT_ONCE):
            flushes = self._rows["flushes"][start : start + _AT_ONCE]
            is_later = flushes > self._head["flushes"]
            if is_later.any():
                flushes[is_later] = 0
        self._rows.flush()
        self._head["is_changed"] = 0

    def read(self, rows: np.ndarray) -> np.ndarray:
        """See `Store`."""
        flushes = self._rows["flushes"][rows]
        records = self._rows["records"][rows, flushes.argmax(axis=1)]
        found = _as_bytes(np.asarray(records))
        found[~flushes.any(axis=1)] = 0
        return found

    def write(self, rows: np.ndarray, records: np.ndarray) -> None:
        """See `Store`."""
        if not self._head["is_changed"]:
            self._head["is_changed"] = 1
            self._head.flush()
        flushes, number = self._rows["flushes"][rows], self._head["flushes"] + 1
        newest = flushes.argmax(axis=1)
        is_flushed = flushes.max(axis=1) < number
        place = np.where(is_flushed, 1 - newest, newest)
        self._rows["records"][rows, place] = _as_items(records, self.record_width)
        self._rows["flushes"][rows, place] = number

    def flush(self) -> None:
        """See `Store`: it is on the disk."""
        self._rows.flush()
        # The order matters: what the head counts as flushed is there.
        self._head["flushes"] += 1
        self._head["is_changed"] = 0
        self._head.flush()

    def close(self) -> None:
        """See `Store`."""
        del self._head, self._rows


_MAGIC = b"qrhash rows 1"
_HEAD = np.dtype(
    [
        *(("magic", "S16"), ("width", "<u8"), ("num_rows", "<u8")),
        *(("flushes", "<u4"), ("is_changed", "<u4")),
    ]
)
_HEAD_BYTES = 4096  # a page of its own
_AT_ONCE = 2**20


def _item(width: int) -> np.dtype:
    return np.dtype((np.void, width))


def _as_items(records: np.ndarray, width: int) -> np.ndarray:
    return np.ascontiguousarray(records, np.uint8).view(_item(width))[:, 0]


def _as_bytes(items: np.ndarray) -> np.ndarray:
    return items[:, None].view(np.uint8)
