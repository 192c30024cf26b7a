"""Parquet files -> tables, with bounded memory."""

import contextlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from qrhash.ctr.data.files import Part, Unchanged, file_errors
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
            self.fields = dict(zip(names, file.schema_arrow.types, strict=True))
            self.num_rows = file.metadata.num_rows
        # The last part says how many bytes each column has in each group of rows, and their range.
        with file_errors(path), path.open("rb") as stream:
            stream.seek(-8, os.SEEK_END)
            size = int.from_bytes(stream.read(4), "little")
            stream.seek(-8 - size, os.SEEK_END)
            self.checksum = zlib.crc32(stream.read(size))
        if twice:
            raise UserError(f"{path} has more than one column {', '.join(twice)}.")

    def parts(self, start: int, stop: int, columns: list[str]) -> Iterator[Part]:
        """Yields the rows [start, stop); see `File`."""
        with self._file() as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = np.cumsum([0, *sizes])
            groups = [i for i in range(len(sizes)) if ends[i] < stop and ends[i + 1] > start]
            first = int(ends[groups[0]]) if groups else stop
            for batch in file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=columns):
                skipped = max(0, start - first)
                rows = batch.slice(skipped, max(0, stop - first - skipped))
                if rows.num_rows:
                    places = np.arange(rows.num_rows) + first + skipped
                    yield Part(pa.Table.from_batches([rows]), places, places + 1, {})
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
