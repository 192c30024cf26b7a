"""Vocabulary sizes from a small file, for `qrhash plan` without data.

CSV has a row of names, column and size, and after them length and counts if there are any:

    column,size,length,counts
    user,3,1,70 20 10
    item,200000,,

JSON and TOML have for each column its size, or an object of size, length and counts:

    user = {size = 3, counts = [70, 20, 10]}
    item = 200000
"""

import csv
import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qrhash.ctr.errors import UserError
from qrhash.planning import Column

_FIELDS = ("size", "length", "counts")


def read_sizes(path: Path) -> dict[str, Column]:
    """The columns of a file that ends in .csv, .json or .toml.

    Raises:
      UserError: it cannot be read, or does not hold what it must.
    """
    readers: dict[str, Callable[[str], Any]] = {
        ".csv": _from_csv,
        ".json": json.loads,
        ".toml": tomllib.loads,
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} must end in {', '.join(readers)}: a table of vocabulary sizes.")
    try:
        values = readers[path.suffix.lower()](path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if not isinstance(values, Mapping) or not values:
        raise UserError(f"{path} must have a size for each column, got {values!r}.")
    return {str(name): _column(path, name, value) for name, value in values.items()}


def _from_csv(text: str) -> dict[str, Any]:
    rows = csv.DictReader(text.splitlines(), skipinitialspace=True)
    names = rows.fieldnames or []
    if "column" not in names or "size" not in names:
        raise ValueError(f"its first line must name column and size, it names {', '.join(names)}")
    columns: dict[str, Any] = {}
    for row in rows:
        if row["column"] in columns:
            raise ValueError(f"column {row['column']} is there twice")
        columns[row["column"]] = {
            name: [_number(count) for count in text.split()] if name == "counts" else _number(text)
            for name in _FIELDS
            if (text := row.get(name) or "").strip()
        }
    return columns


def _number(text: str) -> Any:
    """An integer or a float; text that is neither stays as it is."""
    for kind in (int, float):
        try:
            return kind(text.replace("_", ""))
        except ValueError:
            continue
    return text


def _column(path: Path, name: str, value: Any) -> Column:
    fields = value if isinstance(value, Mapping) else {"size": value}
    if unknown := [field for field in fields if field not in _FIELDS]:
        raise UserError(
            f"{path}, column {name}: there may be {', '.join(_FIELDS)}, got {unknown[0]!r}."
        )
    size = fields.get("size")
    if type(size) is not int or size < 1:
        raise UserError(f"{path}, column {name}: size must be a positive integer, got {size!r}.")
    length = fields.get("length", 1.0)
    if type(length) not in (int, float) or not length > 0:
        raise UserError(f"{path}, column {name}: length must be above 0, got {length!r}.")
    counts = fields.get("counts")
    if counts is None:
        return Column(size, None, length)
    is_list = isinstance(counts, list) and len(counts) == size
    if not is_list or not all(type(count) in (int, float) and count >= 0 for count in counts):
        raise UserError(f"{path}, column {name}: counts must be {size} numbers, 0 or more.")
    return Column(size, sorted(counts, reverse=True), length)
