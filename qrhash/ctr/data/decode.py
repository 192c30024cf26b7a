"""Arrow tables -> blocks, and what is wrong with each row that is left out.

Only for the few cells that cannot be read is a reason put into words.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from qrhash.ctr.data import cells, lists
from qrhash.ctr.data.block import Block
from qrhash.ctr.data.schema import CRITEO, Schema

_FEW = 1 << 11  # rows

# (name, column) -> what it holds, and a mask of the cells that cannot be read.
_Reader = Callable[[str, pa.Array], tuple[Any, np.ndarray]]


class _Readers(NamedTuple):
    """How the cells of a column are read, and what they must be: (reader, rule)."""

    label: tuple[_Reader, str]
    number: tuple[_Reader, str]
    category: tuple[_Reader, str]


def decode(table: pa.Table, schema: Schema = CRITEO) -> tuple[Block, dict[int, str]]:
    """Decodes the columns of a table.

    Args:
      table: the columns that the schema uses; numbers, or text with "" or null for missing.
      schema: what each is used as.

    Returns:
      The block of the rows that are well formed, whose places are those in the table, and {row
      number: reason} for the others.
    """
    reasons: dict[int, str] = {}
    readers = _readers(schema)
    table = with_points(table, schema)

    def read(name: str, reader: _Reader, rule: str, *, required: bool = True) -> Any:
        column = table[name].combine_chunks()
        values, bad = reader(name, column)
        if not required:
            return np.where(bad, np.nan, values)
        refuse(name, column, bad, rule)
        return values

    def read_all(names: Sequence[str], reader: _Reader, rule: str) -> list[Any]:
        found: dict[str, Any] = {}
        for group in _read_at_once(table, names):
            columns = [table[name].combine_chunks() for name in group]
            column = columns[0] if len(group) == 1 else pa.concat_arrays(columns)
            values, bad = reader(group[0], column)
            for number, name in enumerate(group):
                of_name = slice(number * rows, (number + 1) * rows)
                is_pair = isinstance(values, tuple)
                found[name] = tuple(v[of_name] for v in values) if is_pair else values[of_name]
                refuse(name, columns[number], bad[of_name], rule)
        return [found[name] for name in names]

    def refuse(name: str, column: pa.Array, bad: np.ndarray, rule: str) -> None:
        for row in np.flatnonzero(bad).tolist():
            reasons.setdefault(row, f"{name} is not {rule}: {cells.quote(column[row].as_py())}")

    rows = table.num_rows
    labels = np.full(rows, 1 if schema.all_positive else np.nan, np.float32)
    if schema.label is not None:
        labels = read(schema.label, *readers.label, required=schema.label_required)
    importance = None
    if schema.weight is not None:
        importance = read(schema.weight, _weights, "a weight, a number of at least 0")
    numbers = read_all(schema.numbers, *readers.number)
    found = read_all(schema.categories, *readers.category)
    found_lists = []
    for column in schema.of_use("list"):
        each, faults = lists.read(column, table[column.name].combine_chunks())
        found_lists.append(each)
        reasons = faults | reasons
    good = np.ones(rows, bool)
    good[list(reasons)] = False
    block = Block(
        labels,
        _stacked(numbers, rows, np.float32),
        _stacked([keys for keys, _ in found], rows, np.uint64),
        _stacked([missing for _, missing in found], rows, np.bool_),
        places=np.arange(rows),
        importance=importance,
        lists=tuple(found_lists),
    )
    return block.take(good), reasons


def with_points(table: pa.Table, schema: Schema) -> pa.Table:
    """A table whose numbers with a decimal comma have a point in its place."""
    for column in schema.used:
        if column.decimal_comma:
            place = table.column_names.index(column.name)
            cells_of = table[column.name].combine_chunks()
            table = table.set_column(place, column.name, cells.with_points(cells_of))
    return table


def _read_at_once(table: pa.Table, names: Sequence[str]) -> list[list[str]]:
    """Columns of one type in groups: of few rows a call to Arrow takes longer than what it does."""
    if table.num_rows > _FEW:
        return [[name] for name in names]
    groups: dict[pa.DataType, list[str]] = {}
    for name in names:
        groups.setdefault(table.schema.field(name).type, []).append(name)
    return list(groups.values())


def keys_of(name: str, column: pa.Array, schema: Schema) -> tuple[np.ndarray, np.ndarray]:
    """The keys of cells of a column of categories, or of the elements of one of lists.

    Args:
      name: of the column.
      column: the cells, [n].
      schema: what the columns are used as.

    Returns:
      Keys [n] uint64, and where there is none, be it missing or unreadable, [n] bool.
    """
    read = cells.keys if name in schema.lists else _readers(schema).category[0]
    (keys, missing), bad = read(name, column)
    return keys, missing | bad


def _readers(schema: Schema) -> _Readers:
    if schema.preset == "criteo":
        return _Readers(
            (_criteo_labels, "0 or 1"),
            (cells.integers, "an integer"),
            (cells.hex_keys, f"a category of up to {cells.MAX_DIGITS} hex digits"),
        )
    labels = partial(cells.labels, positive_from=schema.positive_from, positive=schema.positive)
    rule = "0 or 1" if schema.positive_from is None else "a number"
    return _Readers(
        (labels, "there" if schema.positive else rule),
        (cells.numbers, "a number"),
        (cells.keys, "a category"),
    )


def _weights(name: str, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    values, bad = cells.numbers(name, column)
    return values, bad | ~(values >= 0)


def _criteo_labels(name: str, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    values, _ = cells.integers(name, column)
    return values, ~np.isin(values, (0.0, 1.0))


def _stacked(columns: list[np.ndarray], rows: int, dtype: Any) -> np.ndarray:
    """Columns [rows] -> [rows, columns], of none too."""
    return np.stack(columns, axis=1) if columns else np.zeros((rows, 0), dtype)
