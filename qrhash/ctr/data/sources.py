"""Text, gzip and Parquet files -> blocks, with bounded memory.

A text file is read in chunks of whole lines, so that every line keeps its physical number:
the numbers decide the split by time, and a malformed line is shown with its own. What a file
is, its first bytes say, not its name.
"""

import contextlib
import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from qrhash.ctr.data.block import COLUMNS, Block, Source
from qrhash.ctr.data.cells import decode
from qrhash.ctr.errors import UserError

_CHUNK_BYTES = 1 << 20  # text read at once, about 4,000 Criteo lines; also the longest line
_PARQUET_ROWS = 8192  # rows decoded at once


class BadLines:
    """Counts the malformed lines of one file; too many of them stop the run.

    A line met again in a later pass is counted once.

    Args:
      path: the file, for the messages.
      limit: how many malformed lines are skipped before `UserError`.
      notify: called with a message for each of the first few.
    """

    _SHOWN = 5

    def __init__(self, path: Path, limit: int, notify: Callable[[str], None]) -> None:
        self._path, self._limit, self._notify = path, limit, notify
        self._lines: set[int] = set()

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, line: int, reason: str) -> None:
        """Records line number `line`, counted from 0; raises UserError beyond the limit."""
        if line in self._lines:
            return
        self._lines.add(line)
        message = f"{self._path}, line {line + 1}: {reason}"
        if len(self._lines) > self._limit:
            raise UserError(
                f"More than {self._limit} malformed lines, the last of them {message}; "
                "a larger --max-bad-lines skips more."
            )
        if len(self._lines) <= self._SHOWN:
            more = " (further ones are only counted)" if len(self._lines) == self._SHOWN else ""
            self._notify(f"skipped {message}{more}")


class TextSource:
    """A Criteo text file: 40 tab-separated cells a line, no header, plain or gzip."""

    def __init__(self, path: Path, bad_lines: BadLines, *, compressed: bool) -> None:
        self.name = str(path)
        self._path, self._bad_lines = path, bad_lines
        self._open: Callable[[Path, str], Any] = gzip.open if compressed else open
        self.num_lines = self.checksum = 0
        for _, lines in self._chunks():
            self.num_lines += len(lines)
            self.checksum = zlib.crc32(b"\n".join([*lines, b""]), self.checksum)

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        """Yields the rows of lines [start, stop); see `Source`."""
        for first, lines in self._chunks():
            if first >= stop:
                return
            skipped = max(0, start - first)
            lines = lines[skipped : stop - first]
            if lines:
                yield self._parse(lines, first + skipped)

    def _chunks(self) -> Iterator[tuple[int, list[bytes]]]:
        """Yields (number of the first line, whole lines without their line ends)."""
        first, rest = 0, b""
        with _file_errors(self._path), self._open(self._path, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > _CHUNK_BYTES:
                    raise UserError(
                        f"{self.name}, line {first + len(lines) + 1} is longer than "
                        f"{_CHUNK_BYTES:,} bytes; this is not a click log."
                    )
                yield first, lines
                first += len(lines)
            if rest:
                yield first, [rest]

    def _parse(self, lines: list[bytes], first: int) -> Block:
        """[rows] lines -> the block of the well-formed ones; the others go to `bad_lines`."""
        cells = np.array([line.count(b"\t") + 1 for line in lines])
        reasons = {
            row: f"expected {len(COLUMNS)} columns, found {cells[row]}"
            for row in np.flatnonzero(cells != len(COLUMNS)).tolist()
        }
        whole = np.flatnonzero(cells == len(COLUMNS))
        block, unreadable = decode(_split_cells([lines[row] for row in whole]))
        reasons |= {int(whole[row]): reason for row, reason in unreadable.items()}
        for row in sorted(reasons):
            self._bad_lines.add(first + row, reasons[row])
        return block


class ParquetSource:
    """The same 40 columns in a Parquet file, named label, I1..I13, C1..C26."""

    def __init__(self, path: Path, bad_lines: BadLines) -> None:
        self.name = str(path)
        self._path, self._bad_lines = path, bad_lines
        with self._file() as file:
            names = file.schema_arrow.names
            self.num_lines = file.metadata.num_rows
        # The last part says how many bytes each column has in each group of rows, and their range.
        with _file_errors(path), path.open("rb") as stream:
            stream.seek(-8, os.SEEK_END)
            size = int.from_bytes(stream.read(4), "little")
            stream.seek(-8 - size, os.SEEK_END)
            self.checksum = zlib.crc32(stream.read(size))
        for many, fault in ((0, "no column"), (2, "more than one column")):
            faulty = [name for name in COLUMNS if min(names.count(name), 2) == many]
            if faulty:
                raise UserError(f"{path} has {fault} {', '.join(faulty)}.")

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        """Yields the rows of lines [start, stop); see `Source`."""
        with self._file() as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = np.cumsum([0, *sizes])
            groups = [i for i in range(len(sizes)) if ends[i] < stop and ends[i + 1] > start]
            first = int(ends[groups[0]]) if groups else stop
            for batch in file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=[*COLUMNS]):
                skipped = max(0, start - first)
                rows = batch.slice(skipped, max(0, stop - first - skipped))
                if rows.num_rows:
                    block, reasons = decode(pa.Table.from_batches([rows]))
                    for row in sorted(reasons):
                        self._bad_lines.add(first + skipped + row, reasons[row])
                    yield block
                first += batch.num_rows

    @contextlib.contextmanager
    def _file(self) -> Iterator[pyarrow.parquet.ParquetFile]:
        with _file_errors(self._path), pyarrow.parquet.ParquetFile(self._path) as file:
            yield file


def open_source(path: Path, bad_lines: BadLines) -> Source:
    """Opens a file by what its first bytes say it is, and counts its lines.

    Raises:
      UserError: there is no such file, it is a directory or empty, or it cannot be read.
    """
    if not path.exists():
        raise UserError(f"There is no file {path}.")
    if not path.is_file():
        raise UserError(f"{path} is {'a directory' if path.is_dir() else 'not a regular file'}.")
    with _file_errors(path), path.open("rb") as stream:
        magic = stream.read(4)
    source: Source
    if magic == b"PAR1":
        source = ParquetSource(path, bad_lines)
    else:
        source = TextSource(path, bad_lines, compressed=magic[:2] == b"\x1f\x8b")
    if source.num_lines == 0:
        raise UserError(f"{path} is empty.")
    return source


def _split_cells(lines: list[bytes]) -> pa.Table:
    """Lines of 40 cells -> 40 columns of text, null for an empty cell."""
    text = b"\n".join(lines) + b"\n"
    # Arrow ends a line at a lone carriage return too; as a space it spoils its cell only.
    text = text.replace(b"\r\n", b"\n").replace(b"\r", b" ")
    text = text.decode("utf-8", errors="replace").encode()
    if not lines:
        return pa.table({name: pa.array([], pa.string()) for name in COLUMNS})
    return pyarrow.csv.read_csv(
        pa.BufferReader(text),
        pyarrow.csv.ReadOptions(column_names=COLUMNS, use_threads=False, block_size=len(text) + 1),
        pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
        pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(COLUMNS, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """What goes wrong while a file is read, in a sentence."""
    try:
        yield
    except EOFError as error:
        raise UserError(f"{path} is a truncated gzip file: its end is missing.") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file: {error}.") from error
    except pa.ArrowException as error:
        raise UserError(f"{path} is a damaged Parquet file: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
