"""Files of text -> tables, with bounded memory.

A file is read in chunks of whole lines, so that every line keeps its number: a malformed one is
shown with its own. A row is a line, or several of them where a line ends inside quotation marks.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from qrhash.ctr.data.files import Lines, Part, Unchanged, file_errors
from qrhash.ctr.data.formats import BYTE_ORDER_MARK, TextFormat
from qrhash.ctr.errors import UserError

_CHUNK_BYTES = 1 << 20  # text read at once, about 4,000 Criteo lines; also the longest row


class _Chunk(NamedTuple):
    """Consecutive rows as they stand in the file.

    Attributes:
      first: number of the first row of data, from 0.
      lines: [rows], the line in which each begins, from 1.
      rows: [rows], without their line ends.
    """

    first: int
    lines: list[int]
    rows: list[bytes]


class TextFile:
    """A file of text, plain or gzip; a `File`."""

    def __init__(self, path: Path, form: TextFormat, *, compressed: bool) -> None:
        self.path, self.form = path, form
        self.fields = dict.fromkeys(form.names, pa.string())
        self._open: Callable[[Path, str], Any] = gzip.open if compressed else open
        self._unchanged = Unchanged(path)
        self.num_rows = self.checksum = 0
        for chunk in self._chunks():
            self.num_rows += len(chunk.rows)
            self.checksum = zlib.crc32(b"\n".join([*chunk.rows, b""]), self.checksum)

    def parts(self, wanted: Lines, columns: list[str]) -> Iterator[Part]:
        """Yields the rows wanted; others are counted, up to the last one, and no more."""
        places: list[int] = []
        lines: list[int] = []
        rows: list[bytes] = []
        end = wanted.end
        for chunk in self._chunks():
            if chunk.first >= end:
                break
            for i in wanted.among(chunk.first, len(chunk.rows)).tolist():
                places.append(chunk.first + i)
                lines.append(chunk.lines[i])
                rows.append(chunk.rows[i])
            # Few rows of a chunk cost little less to parse than many: those of several go together.
            if sum(map(len, rows)) >= _CHUNK_BYTES // 2:
                yield self._part(places, lines, rows, columns)
                places, lines, rows = [], [], []
        if rows:
            yield self._part(places, lines, rows, columns)

    def _part(
        self, places: list[int], lines: list[int], rows: list[bytes], columns: list[str]
    ) -> Part:
        table, faults = read_rows(rows, self.form, columns)
        whole = np.array([i for i in range(len(rows)) if i not in faults], np.int64)
        return Part(
            table,
            np.array(places, np.int64)[whole],
            np.array(lines, np.int64)[whole],
            {places[i]: (lines[i], reason) for i, reason in sorted(faults.items())},
        )

    def sample(self, rows: int) -> pa.Table:
        """The first rows, as text."""
        tables, found = [read_rows([], self.form, self.form.names)[0]], 0
        for part in self.parts(Lines(0, rows), list(self.form.names)):
            tables.append(part.table)
            found += part.table.num_rows
            if found >= rows:
                break
        return pa.concat_tables(tables)

    def _chunks(self) -> Iterator[_Chunk]:
        first, line, rest = 0, 1, b""
        is_header = self.form.has_header
        quotes = _Quotes(self.form.delimiter) if self.form.has_quotes else None
        with (
            self._unchanged.watched(),
            file_errors(self.path),
            self._open(self.path, "rb") as stream,
        ):
            while chunk := stream.read(_CHUNK_BYTES):
                if line == 1 and not rest:
                    chunk = chunk.removeprefix(BYTE_ORDER_MARK)
                *lines, rest = (rest + chunk).split(b"\n")
                rows, sizes, left = _rows(lines, quotes)
                rest = b"\n".join([*left, rest])
                starts = [line + each for each in _starts(sizes)]
                line += sum(sizes)
                if len(rest) > _CHUNK_BYTES:
                    self._refuse(line, f"is longer than {_CHUNK_BYTES:,} bytes", bool(left))
                skipped = int(is_header and bool(rows))
                is_header = is_header and not rows
                if len(rows) > skipped:
                    yield _Chunk(first, starts[skipped:], rows[skipped:])
                first += len(rows) - skipped
            if rest and not is_header:
                rows, _, left = _rows(rest.split(b"\n"), quotes)
                if left:
                    self._refuse(line, "does not end", is_open=True)
                yield _Chunk(first, [line], rows)

    def _refuse(self, line: int, what: str, is_open: bool) -> None:
        reason = "this is not a click log"
        if is_open:
            reason = "a quotation mark begins a cell in it that none ends"
        raise UserError(f"{self.path}, line {line} {what}; {reason}.")


def read_rows(
    rows: Sequence[bytes], form: TextFormat, columns: Sequence[str]
) -> tuple[pa.Table, dict[int, str]]:
    """Rows of text -> columns of text, null for an empty cell; and {row: reason} for bad rows."""
    expected = len(form.names)

    def reason(found: int) -> str:
        return f"expected {expected} columns, found {found}"

    # Arrow takes an empty line for a row of missing cells.
    faults = {i: reason(1) for i, row in enumerate(rows) if not row.rstrip(b"\r")}
    kept = [i for i in range(len(rows)) if i not in faults]
    table, invalid = _read_csv([rows[i] for i in kept], form, columns)
    if table.num_rows + len(invalid) != len(kept):  # Quotation marks where arrow expects none
        return _read_one_by_one(rows, form, columns)
    return table, faults | {kept[i]: reason(found) for i, found in invalid.items()}


def _read_one_by_one(
    rows: Sequence[bytes], form: TextFormat, columns: Sequence[str]
) -> tuple[pa.Table, dict[int, str]]:
    tables, faults = [_read_csv([], form, columns)[0]], {}
    for i, row in enumerate(rows):
        table, invalid = _read_csv([row], form, columns)
        if table.num_rows == 1 and row.rstrip(b"\r"):
            tables.append(table)
        else:
            found = next(iter(invalid.values()), 1)
            faults[i] = f"expected {len(form.names)} columns, found {found}"
    return pa.concat_tables(tables), faults


def _read_csv(
    rows: Sequence[bytes], form: TextFormat, columns: Sequence[str]
) -> tuple[pa.Table, dict[int, int]]:
    """-> the rows that have the right number of cells, {row: number of cells} of the others."""
    if not rows:
        return pa.table({name: pa.array([], pa.string()) for name in columns}), {}
    invalid: dict[int, int] = {}

    def take_note(row: Any) -> str:
        invalid[row.number - 1] = row.actual_columns
        return "skip"

    # Arrow ends a line at a lone carriage return too; as a space it spoils its cell only.
    text = _in_utf8(rows).replace(b"\r\n", b"\n").replace(b"\r", b" ")
    places = [f"{j}" for j in range(len(form.names))]  # Names may be alike, and arrow's may not.
    wanted = [places[form.names.index(name)] for name in columns]
    table = pyarrow.csv.read_csv(
        pa.BufferReader(text),
        pyarrow.csv.ReadOptions(column_names=places, use_threads=False, block_size=len(text) + 1),
        pyarrow.csv.ParseOptions(
            delimiter=form.delimiter,
            quote_char='"' if form.has_quotes else False,
            newlines_in_values=form.has_quotes,
            ignore_empty_lines=False,
            invalid_row_handler=take_note,
        ),
        pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(places, pa.string()),
            include_columns=wanted,
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    if form.has_spaces:
        trimmed = [pc.utf8_ltrim(column, characters=" ") for column in table.columns]
        table = pa.table(trimmed, names=wanted)
    return table.rename_columns(list(columns)), invalid


def _in_utf8(rows: Sequence[bytes]) -> bytes:
    """Rows with their line ends; one that is not in UTF-8 is taken for Latin-1, which any is."""
    text = b"\n".join(rows) + b"\n"
    try:
        text.decode()
    except UnicodeDecodeError:
        return b"".join(_row_in_utf8(row) + b"\n" for row in rows)
    return text


def _row_in_utf8(row: bytes) -> bytes:
    try:
        row.decode()
    except UnicodeDecodeError:
        return row.decode("latin-1").encode()
    return row


class _Quotes:
    """Tells whether a line ends inside quotation marks. One that begins a cell opens them."""

    def __init__(self, delimiter: str) -> None:
        mark = re.escape(delimiter).encode()
        self._opened = re.compile(b"(?:^|" + mark + b')"')
        self._closed = re.compile(b'(?:[^"]|"")*"(?!")')

    def are_open_after(self, line: bytes, is_open: bool) -> bool:
        """Whether they are, given whether they are before it."""
        at = 0
        while True:
            if is_open:
                closing = self._closed.match(line, at)
                if closing is None:
                    return True
                at, is_open = closing.end(), False
            # ^ holds at the beginning of the line alone, wherever the search begins.
            opening = self._opened.search(line, at)
            if opening is None:
                return False
            at, is_open = opening.end(), True


def _rows(lines: list[bytes], quotes: _Quotes | None) -> tuple[list[bytes], list[int], list[bytes]]:
    """Lines -> rows, how many lines each has, and the lines of a row that is not complete."""
    if quotes is None or not any(b'"' in line for line in lines):
        return lines, [1] * len(lines), []
    rows: list[bytes] = []
    sizes: list[int] = []
    pending: list[bytes] = []
    for line in lines:
        is_open = bool(pending)
        if b'"' in line:
            is_open = quotes.are_open_after(line, is_open)
        pending.append(line)
        if not is_open:
            rows.append(b"\n".join(pending))
            sizes.append(len(pending))
            pending = []
    return rows, sizes, pending


def _starts(sizes: list[int]) -> list[int]:
    """Where each of some consecutive rows begins, from 0."""
    return np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(int).tolist()
