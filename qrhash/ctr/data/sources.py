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
from qrhash.ctr.data.files import (
    MAGIC_BYTES,
    BadLines,
    File,
    Lines,
    Part,
    file_errors,
    find_files,
)
from qrhash.ctr.data.folders import in_folders
from qrhash.ctr.data.formats import CRITEO_TEXT, TextFormat, is_criteo, read_head, sniff
from qrhash.ctr.data.inference import (
    SAMPLE_ROWS,
    as_they_are_here,
    check_sections,
    infer,
    listed,
)
from qrhash.ctr.data.numbering import NO_GROUP, Numbering
from qrhash.ctr.data.parquet import ParquetFile
from qrhash.ctr.data.processes import gather, own_lines, together
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
        self._numbering = Numbering(self.num_lines)

    def split_by_time(self, *lines: int) -> list[int]:
        """Numbers the last rows by time after all others; returns where each part begins.

        Rows of the same time stay together: there may be more of them than asked for.

        Args:
          lines: how many rows each part is to have, the last ones last.

        Raises:
          UserError: a part would be empty, or no row be left before them.
        """
        assert self.schema.time is not None
        times, known = self._times()
        in_order = np.sort(times[known])
        if sum(lines) >= len(in_order):
            raise UserError(
                f"{self.name}: only {len(in_order):,} rows have a time in {self.schema.time}; "
                f"testing on the last {sum(lines):,} leaves none to train on."
            )
        # From the last part on, each before where the next one has come to begin.
        begin, cuts = len(in_order), []
        for wanted in reversed(lines):
            cuts.append(in_order[max(0, begin - wanted)])
            begin = int(np.searchsorted(in_order, cuts[-1]))
            if begin == 0:
                raise UserError(
                    f"{self.name}: {self.schema.time} does not divide the rows: testing on the "
                    f"last {sum(lines):,} of {len(in_order):,}, and those of the same time, leaves "
                    "none to train on."
                )
        cuts.reverse()
        timed = len(in_order) - np.searchsorted(in_order, cuts)
        firsts: list[int] = (self.num_lines - timed).tolist()
        groups = np.where(known, np.searchsorted(cuts, times, side="right"), NO_GROUP)
        self._numbering = Numbering(self.num_lines, groups.astype(np.uint8), [0, *firsts])
        return firsts

    def _times(self) -> tuple[np.ndarray, np.ndarray]:
        """The times of all rows [num_lines] int64, and whether they have one [num_lines] bool."""
        begin, end = own_lines(0, self.num_lines)
        times, known = np.zeros(end - begin, np.int64), np.zeros(end - begin, np.bool_)
        for rows, found, bad in together(self._timed(begin, end)):
            times[rows - begin], known[rows - begin] = found, ~bad
        self._bad_lines.gather()
        times, known = map(np.concatenate, zip(*gather((times, known)), strict=True))
        return times, known

    def _timed(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (rows, their times, which of them have none) of the rows [start, stop)."""
        name = self.schema.time
        assert name is not None
        for file, part, rows in _parts(self._files, Lines(start, stop), [name]):
            column = part.table[name].combine_chunks()
            times, bad = cells.times(name, column)
            self._tell(file, part)
            for row in np.flatnonzero(bad).tolist():
                reason = f"{name} is not a time: {cells.quote(column[row].as_py())}"
                self._bad_lines.add(file.path, int(part.lines[row]), reason)
            yield rows, times, bad

    def blocks(self, start: int, stop: int, wanted: np.ndarray | None = None) -> Iterator[Block]:
        """Yields the rows of lines [start, stop); see `Source`. Those of a part are in order."""
        number = self._numbering.counter()
        chosen = self._numbering.rows(Lines(start, stop, wanted))
        columns = [column.name for column in self.schema.used if column.use != "time"]
        for file, part, rows in _parts(self._files, chosen, columns):
            self._tell(file, part)
            block, reasons = decode(part.table, self.schema)
            for row in sorted(reasons):
                self._bad_lines.add(file.path, int(part.lines[row]), reasons[row])
            yield block._replace(places=number(rows)[block.places])

    def tables(self, names: Sequence[str], start: int, stop: int) -> Iterator[pa.Table]:
        """Yields some columns of the lines [start, stop) as they are in the files, in parts."""
        chosen = self._numbering.rows(Lines(start, stop))
        for _, part, _ in _parts(self._files, chosen, list(names)):
            yield part.table

    def _tell(self, file: File, part: Part) -> None:
        for line, reason in part.faults.values():
            self._bad_lines.add(file.path, line, reason)


def _parts(
    files: Sequence[File], wanted: Lines, columns: list[str]
) -> Iterator[tuple[File, Part, np.ndarray]]:
    """Yields (file, rows, their places among those of all files) of the rows wanted of files."""
    first = 0
    for file in files:
        if wanted.any_of(first, file.num_rows):
            for part in file.parts(wanted.counted_from(first), columns):
                yield file, part, part.places + first
        first += file.num_rows


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
        raise UserError(f"{settings.data} holds no rows.")
    used = files[0].fields if found is None else [column.name for column in found.used]
    for file in files:
        _check_fields(file, files[0], list(used), may_have_more=found is not None)
    if found is None:
        sample = _sample(files)
        if not sample.num_rows:
            raise UserError(
                f"{settings.data}: none of the first rows has the {len(files[0].fields)} cells of "
                f"the first one, {listed(files[0].fields)}; is that a header, and --delimiter "
                "right?"
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
    num_lines = sum(file.num_rows for file in files)
    wanted = Lines(*own_lines(0, num_lines))

    def lengths() -> Iterator[list[int]]:
        for _, part, _ in _parts(files, wanted, [column.name for column in asked]):
            found = (part.table[column.name].combine_chunks() for column in asked)
            yield [lists.longest(*each) for each in zip(asked, found, strict=True)]

    if not asked:
        return schema
    found = [[1] * len(asked), *together(lengths())]
    found = np.max(gather(np.max(found, axis=0)), axis=0).tolist()
    longest = {column.name: length for column, length in zip(asked, found, strict=True)}
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
