"""Parquet files -> tables, with bounded memory."""

import contextlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from qrhash.ctr.data.files import Lines, Part, Unchanged, file_errors
from qrhash.ctr.errors import UserError

_PARQUET_ROWS = 8192  # rows decoded at once


class ParquetFile:
    """A Parquet file; a `File`. Its lines are its rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unchanged = Unchanged(path)
        with self._file() as file:
            names = file.schema_arrow.names
            twice = sorted({name for name in names if names.count(name) > 1})
            self.fields = _types(file.schema_arrow)
            self.num_rows = file.metadata.num_rows
        # The last part says how many bytes each column has in each group of rows, and their range.
        with file_errors(path), path.open("rb") as stream:
            stream.seek(-8, os.SEEK_END)
            size = int.from_bytes(stream.read(4), "little")
            stream.seek(-8 - size, os.SEEK_END)
            self.checksum = zlib.crc32(stream.read(size))
        if twice:
            raise UserError(f"{path} has more than one column {', '.join(twice)}.")

    def parts(self, wanted: Lines, columns: list[str]) -> Iterator[Part]:
        """Yields the rows wanted, of groups of rows that hold any; see `File`."""
        with self._file() as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = np.cumsum([0, *sizes]).tolist()
            groups = [i for i in range(len(sizes)) if wanted.any_of(ends[i], sizes[i])]
            for run in _runs(groups):
                first = ends[run[0]]
                for batch in file.iter_batches(_PARQUET_ROWS, row_groups=run, columns=columns):
                    rows = wanted.among(first, batch.num_rows)
                    if rows.size:
                        table = _take(pa.Table.from_batches([batch]), rows)
                        yield Part(table, rows + first, rows + first + 1, {})
                    first += batch.num_rows

    def sample(self, rows: int) -> pa.Table:
        """The first rows."""
        with self._file() as file:
            for batch in file.iter_batches(rows):
                return pa.Table.from_batches([batch])
            return file.schema_arrow.empty_table()

    @contextlib.contextmanager
    def _file(self) -> Iterator[pyarrow.parquet.ParquetFile]:
        with (
            self._unchanged.watched(),
            file_errors(self.path),
            pyarrow.parquet.ParquetFile(self.path) as file,
        ):
            yield file


def _types(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Column -> its type: a dictionary's too, where a data frame had categories of integers.

    Parquet keeps these as plain integers, and what they were in a note beside them.
    """
    types = dict(zip(schema.names, schema.types, strict=True))
    for note in (schema.pandas_metadata or {}).get("columns", ()):
        name = note.get("field_name")
        is_categorical = name in types and note.get("pandas_type") == "categorical"
        if is_categorical and pa.types.is_integer(types[name]):
            types[name] = pa.dictionary(pa.int32(), types[name])
    return types


def _runs(numbers: list[int]) -> list[list[int]]:
    """Increasing numbers, parted where one is left out."""
    gaps = np.flatnonzero(np.diff(numbers) > 1) + 1
    return [run.tolist() for run in np.split(np.array(numbers, int), gaps) if run.size]


def _take(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Those rows; consecutive ones are not copied."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return table.slice(rows[0], len(rows))
    return table.take(pa.array(rows))
