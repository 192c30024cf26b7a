"""Columns that are not in the files but in the names of their folders: day=7/part-0.parquet."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa

from qrhash.ctr.data.files import File, Lines, Part

_MISSING = "__HIVE_DEFAULT_PARTITION__"  # as Hive and Spark write it


class FileInFolders:
    """A file with the columns that its folders add; a `File`.

    Args:
      file: the file.
      values: column -> its value in all rows, as text; None: missing.
    """

    def __init__(self, file: File, values: dict[str, str | None]) -> None:
        self._file, self._values = file, values
        self.path, self.num_rows, self.checksum = file.path, file.num_rows, file.checksum
        self.fields = file.fields | dict.fromkeys(values, pa.string())

    def parts(self, wanted: Lines, columns: list[str]) -> Iterator[Part]:
        """Yields the rows wanted; see `File`."""
        own = [name for name in columns if name not in self._values]
        # Of no column there would be no rows.
        some = own or list(self._file.fields)[:1]
        for part in self._file.parts(wanted, some):
            yield part._replace(table=self._with_values(part.table).select(columns))

    def sample(self, rows: int) -> pa.Table:
        """The first rows."""
        return self._with_values(self._file.sample(rows))

    def _with_values(self, table: pa.Table) -> pa.Table:
        for name, value in self._values.items():
            cells = pa.array([value], pa.string()).take(pa.array([0] * table.num_rows, pa.int64()))
            table = table.append_column(name, cells)
        return table


def in_folders(file: File, data: str) -> File:
    """The file, with the columns of its folders below what the option names.

    Args:
      file: one of those that `data` names.
      data: a file, a folder, or a pattern.
    """
    root = Path(data)
    inside = file.path.relative_to(root) if file.path.is_relative_to(root) else file.path
    pairs = [part.partition("=") for part in inside.parent.parts if "=" in part]
    values = {
        name: None if value == _MISSING else unquote(value)
        for name, _, value in pairs
        if name not in file.fields
    }
    return FileInFolders(file, values) if values else file
