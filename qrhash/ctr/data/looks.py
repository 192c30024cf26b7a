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
      is_whole: of numbers that are no integers by their type: whether they all are by value.
      has_gaps: whether cells are missing.
      why: why it is not read, if it holds "nothing", or what is "nested".
    """

    holds: Holds
    distinct: int
    present: int
    largest: int = 0
    is_whole: bool = False
    has_gaps: bool = False
    why: str = ""


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
        return Seen("integer", len(distinct), len(present), largest)
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
    return Seen(cast(Holds, holds), len(distinct), len(present), is_whole=is_whole, why=_UNREAD)


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
    is_missing = pc.is_in(present, pa.array(cells.NO_NUMBER))
    telling = present.filter(pc.invert(is_missing))
    counts = (len(distinct), len(present))
    if lists.are_written(distinct):
        return Seen("list", *counts)
    if lists.are_of_floats(distinct):
        return Seen("nested", 0, 0, why="of lists those of integers or text are read, not floats")
    if not len(telling):
        return Seen("text", *counts)

    def share(pattern: str) -> float:
        trimmed = pc.utf8_trim_whitespace(telling)
        found = pc.match_substring_regex(trimmed, pattern, ignore_case=True)
        return float(np.mean(found.to_numpy(zero_copy_only=False)))

    if share(cells.CANONICAL) >= _READABLE:
        whole = pc.match_substring_regex(distinct, cells.CANONICAL)
        largest = max(abs(int(text)) for text in distinct.filter(whole).to_pylist())
        return Seen("integer", *counts, largest)
    # Leading zeros are no number's: those of codes.
    if share(cells.DECIMAL) >= _READABLE and share("^[+-]?0[0-9]") < 1 - _READABLE:
        return Seen("number", *counts, is_whole=share(cells.WHOLE) == 1)
    if share("^(true|false)$") >= _READABLE:
        return Seen("boolean", *counts)
    _, bad = cells.times("", telling)
    is_time = bad.mean() <= 1 - _READABLE and share(cells.INTEGER) < 1 - _READABLE
    return Seen("time" if is_time else "text", *counts)
