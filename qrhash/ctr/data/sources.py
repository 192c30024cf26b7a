"""The data of a run, in one file or many, -> blocks of rows.

What a file is, its first bytes say, not its name. Rows come in the order of the files by name, and
within them in their own. Which of them are trained and which tested on is decided by that order,
or by a column of times: then the training rows are numbered first, and the test rows after them.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from qrhash.ctr.data import cells, lists
from qrhash.ctr.data.block import Block
from qrhash.ctr.data.criteo import COLUMNS
from qrhash.ctr.data.decode import decode
from qrhash.ctr.data.files import MAGIC_BYTES, BadLines, File, Part, file_errors, find_files
from qrhash.ctr.data.folders import in_folders
from qrhash.ctr.data.formats import CRITEO_TEXT, TextFormat, is_criteo, read_head, sniff
from qrhash.ctr.data.inference import (
    SAMPLE_ROWS,
    as_they_are_here,
    check_sections,
    infer,
    listed,
)
from qrhash.ctr.data.parquet import ParquetFile
from qrhash.ctr.data.schema import CRITEO, Schema
from qrhash.ctr.data.text import TextFile
from qrhash.ctr.errors import UserError
from qrhash.ctr.settings import Settings

_LONG = 1000  # elements of a list that cost a batch much memory
_CRITEO_CATEGORIES = ("integer", "string", "large_string", "string_view", "dictionary", "null")


class FileSource:
    """The rows of some files; a `Source`.

    Args:
      name: what to call them.
      files: in order.
      schema: what their columns are used as.
      bad_lines: is told of malformed rows.
    """

    def __init__(self, name: str, files: list[File], schema: Schema, bad_lines: BadLines) -> None:
        self.name, self.schema = name, schema
        self._files, self._bad_lines = files, bad_lines
        self.num_lines = sum(file.num_rows for file in files)
        self.checksum = files[0].checksum
        for file in files[1:]:
            self.checksum = zlib.crc32(f"{self.checksum} {file.checksum}".encode())
        # By time: from which times on later parts are, and at which numbers they begin.
        self._cuts = np.zeros(0, np.int64)
        self._firsts: list[int] = []

    def split_by_time(self, *lines: int) -> list[int]:
        """Numbers the last rows by time after all others; returns where each part begins.

        Rows of the same time stay together: there may be more of them than asked for.

        Args:
          lines: how many rows each part is to have, the last ones last.

        Raises:
          UserError: a part would be empty, or no row be left before them.
        """
        assert self.schema.time is not None
        # 8 bytes for each row.
        found = [times[~bad] for _, _, times, bad in self._timed_parts([self.schema.time])]
        times = np.sort(np.concatenate([np.zeros(0, np.int64), *found]))
        if sum(lines) >= len(times):
            raise UserError(
                f"{self.name}: only {len(times):,} rows have a time in {self.schema.time}; testing "
                f"on the last {sum(lines):,} leaves none to train on."
            )
        # From the last part on, each before where the next one has come to begin.
        begin, cuts = len(times), []
        for wanted in reversed(lines):
            cuts.append(times[max(0, begin - wanted)])
            begin = int(np.searchsorted(times, cuts[-1]))
            if begin == 0:
                raise UserError(
                    f"{self.name}: {self.schema.time} does not divide the rows: testing on the "
                    f"last {sum(lines):,} of {len(times):,}, and those of the same time, leaves "
                    "none to train on."
                )
        self._cuts = np.array(cuts[::-1], np.int64)
        timed = len(times) - np.searchsorted(times, self._cuts)
        self._firsts = (self.num_lines - timed).tolist()
        return list(self._firsts)

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        """Yields the rows of lines [start, stop); see `Source`."""
        for path, part, lines in self._parts(start, stop):
            block, reasons = decode(part.table, self.schema)
            for row in sorted(reasons):
                self._bad_lines.add(path, int(part.lines[row]), reasons[row])
            yield block._replace(places=lines[block.places])

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Path, Part, np.ndarray]]:
        """Yields (path, rows, their places among all rows) of lines [start, stop)."""
        columns = [column.name for column in self.schema.used]
        if self._firsts:
            yield from self._parts_by_time(start, stop, columns)
            return
        first = 0
        for file in self._files:
            if start < first + file.num_rows and first < stop:
                for part in file.parts(max(0, start - first), stop - first, columns):
                    for line, reason in part.faults.values():
                        self._bad_lines.add(file.path, line, reason)
                    yield file.path, part, part.places + first
            first += file.num_rows

    def _parts_by_time(
        self, start: int, stop: int, columns: list[str]
    ) -> Iterator[tuple[Path, Part, np.ndarray]]:
        """As `_parts`, numbered by time: within each part in the order of the files.

        A row without a time counts as one of the first part, so that no line is without a number.
        """
        done = np.array([0, *self._firsts])  # the next number in each part
        of_start = int(np.searchsorted(done, start, side="right")) - 1
        for file, part, times, bad in self._timed_parts(columns):
            group = np.where(bad, 0, np.searchsorted(self._cuts, times, side="right"))
            numbers = np.empty(len(times), np.int64)
            for k in range(len(done)):
                rows = np.flatnonzero(group == k)
                numbers[rows] = done[k] + np.arange(len(rows))
                done[k] += len(rows)
            done[0] += len(part.faults)
            self._tell(file, part, bad)
            kept = np.flatnonzero((numbers >= start) & (numbers < stop) & ~bad)
            if kept.size:
                table = part.table.take(pa.array(kept))
                yield file.path, Part(table, part.places[kept], part.lines[kept], {}), numbers[kept]
            if done[of_start] >= stop:
                return

    def _timed_parts(
        self, columns: list[str]
    ) -> Iterator[tuple[File, Part, np.ndarray, np.ndarray]]:
        """Yields (file, rows, their times, which of them have none)."""
        time = self.schema.time
        assert time is not None
        for file in self._files:
            for part in file.parts(0, file.num_rows, columns):
                yield file, part, *cells.times(time, part.table[time].combine_chunks())

    def _tell(self, file: File, part: Part, bad: np.ndarray) -> None:
        for line, reason in part.faults.values():
            self._bad_lines.add(file.path, line, reason)
        for row in np.flatnonzero(bad).tolist():
            cell = cells.quote(part.table[self.schema.time][row].as_py())
            reason = f"{self.schema.time} is not a time: {cell}"
            self._bad_lines.add(file.path, int(part.lines[row]), reason)


def open_source(
    settings: Settings,
    bad_lines: BadLines,
    notify: Callable[[str], None] = lambda _: None,
    schema: Schema | None = None,
) -> FileSource:
    """Opens the files that the settings name, and counts their lines.

    Args:
      settings: where the data are, and what their columns are used as.
      bad_lines: is told of malformed rows.
      notify: called with a sentence on files that are left out.
      schema: of an earlier run; by default it is inferred.

    Raises:
      UserError: there is no such file, or none that holds rows; one cannot be read, or has other
        columns than the first.
    """
    assert settings.data is not None
    first, *others = find_files(settings.data, notify)
    files = [_open_file(first, settings, schema)]
    found = CRITEO if schema is None and _is_criteo(files[0], settings) else schema
    raw = [files[0], *(_open_file(path, settings, found) for path in others)]
    files = [in_folders(file, settings.data) for file in raw]
    if found is not None and not found.label_required and found.label not in files[0].fields:
        found = found.without("label")
    if not sum(file.num_rows for file in files):
        raise UserError(f"{settings.data} is empty.")
    used = files[0].fields if found is None else [column.name for column in found.used]
    for file in files:
        _check_fields(file, files[0], list(used), may_have_more=found is not None)
    if found is None:
        sample = _sample(files)
        if not sample.num_rows:
            raise UserError(
                f"{settings.data}: none of the first rows has the {len(files[0].fields)} cells of "
                "the first one; is that a header, and --delimiter right?"
            )
        found = infer(files[0].fields, sample, settings)
    elif found.lists:
        found = as_they_are_here(found, _sample(files), settings)
    check_sections(settings, found)
    found = _with_lengths(found, files, notify)
    return FileSource(settings.data, files, found, bad_lines)


def _with_lengths(schema: Schema, files: Sequence[File], notify: Callable[[str], None]) -> Schema:
    """The same columns, those of lists with the length of the longest one, if none is given."""
    asked = [column for column in schema.of_use("list") if column.length is None]
    longest = {column.name: 1 for column in asked}
    for file in files if asked else ():
        for part in file.parts(0, file.num_rows, list(longest)):
            for column in asked:
                found = lists.longest(column, part.table[column.name].combine_chunks())
                longest[column.name] = max(longest[column.name], found)
    for name, length in longest.items():
        if length > _LONG:
            notify(
                f"{name} has a list of {length:,}, and every row of a batch as many places: with "
                "--list-length N rows of longer ones count as malformed"
            )
    return schema.with_lengths(longest)


def _open_file(path: Path, settings: Settings, schema: Schema | None) -> File:
    with file_errors(path), path.open("rb") as stream:
        magic = stream.read(MAGIC_BYTES)
    if magic == b"PAR1":
        return ParquetFile(path)
    compressed = magic[:2] == b"\x1f\x8b"
    head = read_head(path, compressed=compressed)
    return TextFile(path, _format(head, path, settings, schema), compressed=compressed)


def _format(head: str, path: Path, settings: Settings, schema: Schema | None) -> TextFormat:
    is_preset = settings.preset == "criteo" or (schema is not None and schema.preset == "criteo")
    may_lack_label = schema is not None and not schema.label_required
    if is_preset and may_lack_label and is_criteo(head, lacks_label=True):
        return CRITEO_TEXT._replace(names=COLUMNS[1:])
    if is_preset or (schema is None and settings.may_be_criteo and is_criteo(head)):
        return CRITEO_TEXT
    form = sniff(
        head,
        path,
        delimiter=settings.delimiter,
        header=settings.header,
        label=settings.label,
    )
    if schema is None or form.has_header or not may_lack_label:
        return form
    # Without a header columns go by their places, which one that is not there moves.
    names = tuple(each.name for each in schema.columns if each.use != "label")
    return form._replace(names=names) if len(names) == len(form.names) else form


def _is_criteo(file: File, settings: Settings) -> bool:
    """Whether a file is in the Criteo format: as the options say, or by its form."""
    if settings.preset == "criteo" or (isinstance(file, TextFile) and file.form == CRITEO_TEXT):
        return True
    if not settings.may_be_criteo or not set(COLUMNS) <= set(file.fields):
        return False
    kinds = [file.fields[name] for name in CRITEO.categories]
    return isinstance(file, ParquetFile) and all(
        cells.is_a(kind, *_CRITEO_CATEGORIES) for kind in kinds
    )


def _sample(files: list[File]) -> pa.Table:
    """The first rows, and those of the last file: what is one value in a file may be a day."""
    ends = files[:1] if len(files) == 1 else [files[0], files[-1]]
    tables = [file.sample(SAMPLE_ROWS).select(list(files[0].fields)) for file in ends]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException:  # Types that are read alike need not be one: a dictionary and text.
        return tables[0]


def _check_fields(file: File, first: File, used: list[str], *, may_have_more: bool) -> None:
    """Raises a UserError unless a file has the columns used, of the types of the first file."""
    absent = [name for name in used if name not in file.fields]
    if absent:
        raise UserError(
            f"{file.path} has no column {', '.join(absent)}; it has {listed(file.fields)}."
        )
    for name in used:
        here, there = file.fields[name], first.fields[name]
        if _family(here) != _family(there) and "null" not in (_family(here), _family(there)):
            raise UserError(
                f"Column {name} is {here} in {file.path}, but {there} in {first.path}: write all "
                "files with the same types."
            )
    more = [name for name in file.fields if name not in first.fields]
    if more and not may_have_more:
        raise UserError(f"{file.path} has a column {listed(more)} that {first.path} has not.")


def _family(kind: pa.DataType) -> str:
    """Types that are read alike."""
    kind = getattr(kind, "value_type", kind) if pa.types.is_dictionary(kind) else kind
    if lists.are_lists(kind):
        of = _family(kind.value_type)
        return of if of == "null" else f"lists of {of}"
    alike = {
        "text": ("string", "large_string", "string_view"),
        # A data frame writes integers beside missing ones as floats.
        "number": ("integer", "floating", "decimal"),
        "time": ("date", "timestamp"),
        "null": ("null",),
    }
    return next((name for name, of in alike.items() if cells.is_a(kind, *of)), str(kind))
