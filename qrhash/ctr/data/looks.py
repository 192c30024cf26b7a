"""What the first rows say of a column: what it holds, and how many values of it."""

from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrhash.ctr.data import cells, lists
from qrhash.ctr.data.schema import Holds

_READABLE = 0.99  # share of a column's cells that say what it holds


class Seen(NamedTuple):
    """What the first rows say of a column.

    Attributes:
      holds: what kind of values.
      distinct: how many different ones.
      present: how many cells are not missing.
      largest: the largest absolute value of integers.
      smallest: the smallest of them.
      is_whole: of numbers that are no integers by their type: whether they all are by value.
      has_gaps: whether cells are missing.
      has_commas: of numbers in text: whether they are written with a decimal comma.
      is_categorical: whether its type says that it is one of categories.
      why: why it is not read, if it holds "nothing", or what is "nested"; of text, what it may be
        in a form that is not read as that.
    """

    holds: Holds
    distinct: int
    present: int
    largest: int = 0
    smallest: int = 0
    is_whole: bool = False
    has_gaps: bool = False
    has_commas: bool = False
    is_categorical: bool = False
    why: str = ""


# Numbers with a decimal comma, and those whose comma may as well be one of thousands.
_COMMAS = r"^[+-]?([0-9]+|[0-9]*,[0-9]+)$"
_THOUSANDS = r"^[+-]?([0-9]+|[0-9]{1,3},[0-9]{3})$"
# No number's: a leading zero, or more digits than 64 bits have.
_CODE = "^[+-]?(0[0-9]|[0-9]{21})[0-9]*([.,][0-9]*)?$"
# What people write for each other is told to them, and not guessed.
_FOR_PEOPLE = {
    "numbers? write them as 1234.5": (
        "^[+-]?[$€£¥]?[+-]?\\s?[0-9]{1,3}([,.' \u00a0]?[0-9]{3})*([.,][0-9]+)?\\s?[%$€£¥]?$"
    ),
    "times? write them as 2024-01-31 12:00": (
        "^[0-9]{1,2}[/.-][0-9]{1,2}[/.-]([0-9]{2}|[0-9]{4})( .*)?$"
    ),
}

_UNREAD = "this type is not read"
_NOTHING = Seen("nothing", 0, 0, why="there is nothing in it")


def look(column: pa.Array) -> Seen:
    """What the first cells of a column say of it."""
    column = cells.plain(column)
    kind = column.type
    if lists.are_lists(kind):
        return _look_at_lists(column)
    if cells.is_a(kind, "nested", "duration", "time", "interval") or isinstance(
        kind, pa.BaseExtensionType
    ):
        return Seen("nested", 0, 0, why=_UNREAD)
    present = column.drop_null()
    if pa.types.is_string(kind):
        present = present.filter(pc.not_equal(present, ""))
    distinct = present.unique()
    if not len(distinct):
        return _NOTHING
    if pa.types.is_string(kind):
        return _look_at_text(present, distinct)
    if cells.is_a(kind, "integer"):
        ends = pc.min_max(distinct).as_py()
        largest = max(abs(ends["min"]), abs(ends["max"]))
        return Seen("integer", len(distinct), len(present), largest, ends["min"])
    holds = "nested"
    for held, names in {
        "text": ("binary",),
        "number": ("floating", "decimal"),
        "boolean": ("boolean",),
        "time": ("timestamp", "date"),
    }.items():
        if cells.is_a(kind, *names):
            holds = held
    is_whole = pa.types.is_floating(kind) and not cells.keys("", distinct)[1].any()
    why = _UNREAD if holds == "nested" else ""
    return Seen(cast(Holds, holds), len(distinct), len(present), is_whole=is_whole, why=why)


def _look_at_lists(column: pa.Array) -> Seen:
    kind = column.type.value_type
    if not lists.may_be_elements(kind):
        return Seen(
            "nested",
            0,
            0,
            why=f"of lists those of integers or text are read, not {lists.type_name(kind)}",
        )
    found = column.flatten().drop_null()
    return Seen("list", len(found.unique()), len(found)) if len(found) else _NOTHING


def _look_at_text(present: pa.Array, distinct: pa.Array) -> Seen:
    """Of cells of text: what nearly all of them say."""
    telling = cells.told(present).drop_null()
    counts = (len(distinct), len(present))
    if lists.are_written(distinct):
        return Seen("list", *counts)
    if lists.are_of_floats(distinct):
        return Seen("nested", 0, 0, why="of lists those of integers or text are read, not floats")
    if not len(telling):
        return Seen("text", *counts)

    def share(pattern: str) -> float:
        found = pc.match_substring_regex(telling, pattern, ignore_case=True)
        return float(np.mean(found.to_numpy(zero_copy_only=False)))

    if share(cells.CANONICAL) >= _READABLE:
        whole = telling.filter(pc.match_substring_regex(telling, cells.CANONICAL)).unique()
        values = [int(text) for text in whole.to_pylist()]
        return Seen("integer", *counts, max(map(abs, values)), min(values))
    is_code = share(_CODE) >= 1 - _READABLE
    if share(cells.DECIMAL) >= _READABLE and not is_code:
        return Seen("number", *counts, is_whole=share(cells.WHOLE) == 1)
    if share(_COMMAS) >= _READABLE and share(_THOUSANDS) < _READABLE and not is_code:
        return Seen("number", *counts, has_commas=True)
    if share("^(true|false)$") >= _READABLE:
        return Seen("boolean", *counts)
    _, bad = cells.times("", telling)
    is_time = bad.mean() <= 1 - _READABLE and share(cells.INTEGER) < 1 - _READABLE
    if is_time:
        return Seen("time", *counts)
    hints = (hint for hint, pattern in _FOR_PEOPLE.items() if share(pattern) >= _READABLE)
    return Seen("text", *counts, why="" if is_code else next(hints, ""))
