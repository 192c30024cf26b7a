"""Bodies of requests, JSON or Arrow, -> Arrow tables of the columns of a run.

Nobody is trusted: what does not fit is refused before it takes memory. A column of JSON becomes one
of text or of floats, by which a cell has the key and the number that it has in a file.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import pyarrow as pa

from qrhash.ctr.data.inference import as_they_are_here
from qrhash.ctr.data.schema import Column, Schema
from qrhash.ctr.errors import UserError
from qrhash.ctr.settings import Settings
from qrhash.serving.arrow_streams import read_stream
from qrhash.serving.limits import Refused

ARROW, JSON = "application/vnd.apache.arrow.stream", "application/json"

_EXACT = 2**53  # below it every integer is a float
_FLOATS = {int, float, bool, type(None)}
_TEXT = {str, type(None)}


@dataclass(frozen=True)
class Rows:
    """The rows of a request.

    Attributes:
      table: the columns that the model reads.
      schema: what they are used as, of lists also how they are written.
    """

    table: pa.Table
    schema: Schema


class Columns:
    """The columns that a model reads.

    Args:
      schema: of the run.
      settings: of the run.
      max_rows: the most that a request may have.
      max_body: bytes of a body, and of what is in it once it is no longer encoded.

    Attributes:
      schema: of them alone: no label, time or weight is asked for.
      of_files: of files with such rows, in which there may be other columns.
    """

    def __init__(self, schema: Schema, settings: Settings, *, max_rows: int, max_body: int) -> None:
        self.of_files = replace(
            schema.without("time", "weight"), all_positive=False, label_required=False
        )
        self.schema = self.of_files.without("label", "ignored")
        self._settings, self._max_rows, self._max_body = settings, max_rows, max_body

    def rows(self, body: bytes, kind: str) -> Rows:
        """The rows of a body.

        Args:
          body: of the request.
          kind: its type, `JSON` or `ARROW`.

        Raises:
          Refused: it cannot be read, lacks a column, or has no rows, or too many.
        """
        table = self._of_json(body) if kind == JSON else self._of_arrow(body)
        schema = self.schema
        if schema.lists:
            try:
                schema = as_they_are_here(schema, table, self._settings)
            except UserError as error:
                raise Refused(422, str(error)) from error
        return Rows(table, schema)

    def _of_arrow(self, body: bytes) -> pa.Table:
        names = [column.name for column in self.schema.used]
        table = read_stream(body, names, max_rows=self._max_rows, max_bytes=self._max_body)
        self._check_count(table.num_rows)
        return table

    def _of_json(self, body: bytes) -> pa.Table:
        rows = _rows_of(json_of(body))
        self._check_count(len(rows))
        columns = {}
        for column in self.schema.used:
            try:
                cells = [row[column.name] for row in rows]
            except KeyError:
                number = next(i for i, row in enumerate(rows) if column.name not in row)
                raise Refused(
                    422,
                    f"Row {number} has no {column.name!r}; null stands for a missing value.",
                    {number: f"has no {column.name!r}"},
                ) from None
            columns[column.name] = self._column(column, cells)
        return pa.table(columns) if columns else pa.table({"": pa.nulls(len(rows))}).select([])

    def _column(self, column: Column, cells: list[Any]) -> pa.Array:
        makers: dict[str, Callable[[str, list[Any]], pa.Array]] = {
            "number": _numbers,
            "category": self._categories,
            "list": self._lists,
        }
        try:
            return makers[column.use](column.name, cells)
        except UnicodeEncodeError as error:
            raise Refused(422, f"{column.name} holds text that is no Unicode.") from error

    def _categories(self, name: str, cells: list[Any]) -> pa.Array:
        if not set(map(type, cells)) <= _TEXT:
            is_hex = self.schema.preset == "criteo"
            cells = [_text(cell, is_hex, name, row) for row, cell in enumerate(cells)]
        return pa.array(cells, pa.string())

    def _lists(self, name: str, cells: list[Any]) -> pa.Array:
        kinds = set(map(type, cells))
        if kinds <= _TEXT and str in kinds:
            return pa.array(cells, pa.string())
        rule = "a list"
        if {str, list} <= kinds:
            rule = "written as a list, as it is in other rows of the request"
        lists = []
        for row, cell in enumerate(cells):
            if cell is not None and not isinstance(cell, list):
                _refuse(name, row, rule, cell)
            lists.append(cell and [_text(each, False, name, row) for each in cell])
        return pa.array(lists, pa.list_(pa.string()))

    def _check_count(self, rows: int) -> None:
        if not rows:
            raise Refused(422, "The request has no rows.")
        if rows > self._max_rows:
            raise Refused(
                413,
                f"The request has more than the {self._max_rows:,} rows of --max-batch: "
                "send several requests.",
            )


def json_of(body: bytes) -> Any:
    """What a body of JSON says.

    Raises:
      Refused: it is no JSON.
    """

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(body, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body is not JSON: {error}.") from error


def _rows_of(said: Any) -> list[dict[str, Any]]:
    rows = said.get("rows") if isinstance(said, dict) else said
    if not isinstance(rows, list):
        raise Refused(400, 'The body must be {"rows": [{"column": value, ...}, ...]}, or a list.')
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise Refused(
                400, f"Row {number} is no object, with a value for each column.", {number: "no row"}
            )
    return rows


def _numbers(name: str, cells: Sequence[Any]) -> pa.Array:
    kinds = set(map(type, cells))
    if kinds <= _FLOATS:
        return pa.array([_float(name, row, cell) for row, cell in enumerate(cells)], pa.float64())
    for row, cell in enumerate(cells):
        if type(cell) not in _FLOATS | _TEXT:
            _refuse(name, row, "a number", cell)
    # Numbers that are written as text are read as those of a file.
    text = [cell if type(cell) in _TEXT else repr(cell).lower() for cell in cells]
    return pa.array(text, pa.string())


def _float(name: str, row: int, cell: Any) -> float | None:
    try:
        return None if cell is None else float(cell)
    except OverflowError:
        return _refuse(name, row, "a number", cell)


def _text(cell: Any, is_hex: bool, name: str, row: int) -> str | None:
    """A category as a file of text has it."""
    if cell is None or isinstance(cell, str):
        return cell
    if isinstance(cell, bool) and not is_hex:
        return str(cell).lower()
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < _EXACT:
        cell = int(cell)
    if isinstance(cell, int) and not isinstance(cell, bool) and -(2**63) <= cell < 2**64:
        return format(cell, "x") if is_hex else str(cell)
    return _refuse(name, row, "a category", cell)


def _refuse(name: str, row: int, rule: str, cell: Any) -> NoReturn:
    shown = json.dumps(cell) if isinstance(cell, (dict, list, float, bool)) else str(cell)
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    reason = f"{name} is not {rule}: {shown}"
    raise Refused(422, f"Row {row}: {reason}.", {row: reason})
