"""Which files the data are in, whether they stay as they are, and what goes wrong with them."""

import contextlib
import glob
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from qrhash.ctr.data.processes import gather
from qrhash.ctr.errors import UserError

# What a folder is searched for; a file that is named itself may have any name.
SUFFIXES = (".parquet", ".pq", ".csv", ".tsv", ".txt", ".dat", ".data", ".gz")
MAGIC_BYTES = 4


class Part(NamedTuple):
    """Some rows of a file, in order.

    Attributes:
      table: [rows] of the columns wanted.
      places: [rows] int64, which row of the file each is, from 0, malformed ones counted.
      lines: [rows] int64, the line each begins in, from 1: for messages.
      faults: {place: (line, reason)} of the rows that have no cells.
    """

    table: pa.Table
    places: np.ndarray
    lines: np.ndarray
    faults: dict[int, tuple[int, str]]


class Lines(NamedTuple):
    """Some of the rows that are numbered from 0.

    Attributes:
      start: the first one.
      stop: behind the last one.
      mask: [stop - start] bool, which of these; None: all.
    """

    start: int
    stop: int
    mask: np.ndarray | None = None

    @property
    def end(self) -> int:
        """Behind the last of them."""
        if self.mask is None:
            return self.stop
        return self.stop - int(np.argmax(self.mask[::-1])) if self.mask.any() else self.start

    def counted_from(self, first: int) -> "Lines":
        """The same rows, where another one is number 0."""
        return self._replace(start=self.start - first, stop=self.stop - first)

    def any_of(self, first: int, count: int) -> bool:
        """Whether the rows [first, first + count) have any of them."""
        begin, end = max(first, self.start), min(first + count, self.stop)
        if self.mask is None or begin >= end:
            return begin < end
        return bool(self.mask[begin - self.start : end - self.start].any())

    def among(self, first: int, count: int) -> np.ndarray:
        """Which of the rows [first, first + count) they are, counted from the first of these."""
        begin, end = max(first, self.start), min(first + count, self.stop)
        rows = np.arange(begin - first, end - first)
        if self.mask is None or begin >= end:
            return rows
        return rows[self.mask[begin - self.start : end - self.start]]


class File(Protocol):
    """A file of rows.

    Attributes:
      path: where it is.
      fields: its columns, with their types.
      num_rows: rows in all, malformed ones included.
      checksum: by it other rows are told.
    """

    path: Path
    fields: dict[str, pa.DataType]
    num_rows: int
    checksum: int

    def parts(self, wanted: Lines, columns: list[str]) -> Iterator[Part]:
        """Yields the rows wanted, in order; no others are decoded."""
        ...

    def sample(self, rows: int) -> pa.Table:
        """The first rows, or fewer, with all columns."""
        ...


class BadLines:
    """Counts the malformed lines of all files; too many of them stop the run.

    A line met again in a later pass is counted once.

    Args:
      limit: how many malformed lines are skipped before `UserError`.
      notify: called with a message for each of the first few.
    """

    _SHOWN = 5

    def __init__(self, limit: int, notify: Callable[[str], None]) -> None:
        self._limit, self._notify = limit, notify
        self._lines: dict[tuple[Path, int], str] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, path: Path, line: int, reason: str) -> None:
        """Records line number `line`, counted from 1; raises UserError beyond the limit."""
        if (path, line) in self._lines:
            return
        self._lines[path, line] = reason
        message = f"{path}, line {line}: {reason}"
        if len(self._lines) > self._limit:
            hint = "a larger --max-bad-lines skips more."
            paths, lines = zip(*self._lines, strict=True)
            are_first = min(lines) <= 2 and max(lines) - min(lines) < len(lines)
            if self._limit and len(set(paths)) == 1 and are_first:
                hint = "no line is well formed: do --preset, --delimiter and --header fit the data?"
            raise UserError(
                f"More than {self._limit} malformed lines, the last of them {message}; {hint}"
            )
        if len(self._lines) <= self._SHOWN:
            more = " (further ones are only counted)" if len(self._lines) == self._SHOWN else ""
            self._notify(f"skipped {message}{more}")

    def check(self, num_lines: int) -> None:
        """Raises UserError if more than half of the lines read, so many, are malformed; not all."""
        if num_lines / 2 < len(self._lines) < num_lines:
            (path, line), reason = next(iter(self._lines.items()))
            raise UserError(
                f"{len(self._lines):,} of {num_lines:,} lines are malformed, the first of them "
                f"{path}, line {line}: {reason}."
            )

    def gather(self) -> None:
        """Counts those too that the other processes met; raises UserError as `add`, in all."""
        for found in gather(self._lines):
            for (path, line), reason in found.items():
                self.add(path, line, reason)


class Unchanged:
    """A file that must stay as it is while a run reads it.

    Args:
      path: where it is.

    Raises:
      UserError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._now()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, a file that is not as it was is told so, whatever else that led to."""
        self._check()
        try:
            yield
        except UserError:
            self._check()
            raise
        self._check()

    def _check(self) -> None:
        """Raises a UserError if the file is not as it was."""
        before, now = self._stamp, self._now()
        if before != now:
            sizes = f"it had {before[0]:,} bytes, and now has {now[0]:,}"
            if before[0] == now[0]:
                sizes = "it was written to"
            raise UserError(
                f"{self._path} changed during the run: {sizes}; start again when it is complete."
            )

    def _now(self) -> tuple[int, int]:
        with file_errors(self._path):
            stat = self._path.stat()
        return stat.st_size, stat.st_mtime_ns


def find_files(data: str, notify: Callable[[str], None]) -> list[Path]:
    """The files that a path names: one, those of a folder, or those of a pattern; by name.

    Args:
      data: a file, a folder, or a pattern such as "day_*.csv".
      notify: called with a sentence on files that are left out.

    Raises:
      UserError: there are none.
    """
    path = Path(data)
    if not data.strip():
        raise UserError("--data names no file: it is empty.")
    if "://" in data:
        raise UserError(f"{data} is an address; --data takes files and folders of this machine.")
    if path.is_dir():
        return _in_folder(path, notify)
    if not path.exists() and glob.has_magic(data):
        found = sorted(each for each in map(Path, glob.glob(data, recursive=True)))
        if not found:
            raise UserError(f"No file matches {data}.")
        return [each for each in found if each.is_file()]
    if not path.exists():
        raise UserError(f"There is no file or folder {data}.")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file.")
    return [path]


def _in_folder(folder: Path, notify: Callable[[str], None]) -> list[Path]:
    """The files of data in a folder and its folders; not those whose name begins with . or _."""
    hidden = (".", "_")
    files = [
        each
        for each in sorted(folder.rglob("*"))
        if each.is_file()
        and not any(part.startswith(hidden) for part in each.relative_to(folder).parts)
    ]
    found = [each for each in files if each.name.lower().endswith(SUFFIXES)]
    found = found or [each for each in files if not each.suffix]  # part-00000, of Hadoop
    if not found:
        raise UserError(
            f"{folder} holds no file of data: none has a name that ends in {', '.join(SUFFIXES)}."
        )
    others = [str(each.relative_to(folder)) for each in files if each not in found]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        notify(f"left out of {folder}, as no data by their names: {', '.join(others[:3])}{more}")
    return found


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """What goes wrong while a file is read, in a sentence."""
    try:
        yield
    except EOFError as error:
        raise UserError(f"{path} is a truncated gzip file: its end is missing.") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file: {error}.") from error
    except pa.ArrowException as error:
        raise UserError(f"{path} is a damaged Parquet file: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path} is gone: there is no such file any more.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
