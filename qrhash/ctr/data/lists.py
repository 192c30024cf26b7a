"""Columns of lists -> the keys of their elements, behind each other, and where each list begins.

Lists are Arrow's, or text: cut at a separator ("Action|Comedy"), or written as JSON, Python or
NumPy write a list (["a", "b"], [1 2]). Text becomes Arrow's lists first, so that there is one way
to read them. An element has the key that it would have as a cell of a column of categories.
"""

import ast
import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrhash.ctr.data import cells
from qrhash.ctr.data.block import Lists
from qrhash.ctr.data.schema import Column
from qrhash.ctr.errors import UserError

DEFAULT_SEPARATOR = "|"

_LISTS = ("list", "large_list", "fixed_size_list")
# The escapes that JSON and Python write. What else follows a backslash is no such text.
_ESCAPE = r"\\(?:[\\/'\"nrtbf]|x[0-9a-f]{2}|u[0-9a-fA-F]{4}|U[0-9a-f]{8})"
# Nothing is tried twice (`+` behind a quantifier): spoilt text costs no more than its length.
_ELEMENT = (
    rf'"[^"\\]*+(?:{_ESCAPE}[^"\\]*+)*+"'
    rf"|'[^'\\]*+(?:{_ESCAPE}[^'\\]*+)*+'"
    r"|-?(?:0|[1-9][0-9]*+)|null|None|true|True|false|False"
)
_ELEMENTS_WRITTEN = re.compile(_ELEMENT)
_WRITTEN = re.compile(
    rf"\s*+\[\s*+(?:(?:{_ELEMENT})(?:(?:\s*+,\s*+|\s++)(?:{_ELEMENT}))*+\s*+,?\s*+)?\]\s*+"
)
_OF_NUMBERS = re.compile(r"\s*+\[[-+0-9.eE,\s]*+\]\s*+")
_MISSING = ("null", "None")


def read(column: Column, values: pa.Array) -> tuple[Lists, dict[int, str]]:
    """The lists of a column.

    Args:
      column: what it is; how many elements a list may have, and how text is cut.
      values: [rows], null for an empty list.

    Returns:
      The lists, and {row: reason} of those that cannot be used: text that is no list, an element
      that is missing or no category, or more elements than there may be.
    """
    name = column.name
    lists, unreadable = _as_lists(column, values)
    lengths = _lengths(lists)
    (keys, missing), bad = cells.keys(name, lists.flatten())
    rows = np.repeat(np.arange(len(lists)), lengths)
    reasons: dict[int, str] = {}

    def refuse(found: Iterable[Any], rule: str) -> None:
        for row in map(int, found):
            reasons.setdefault(row, f"{name} {rule}: {cells.quote(values[row].as_py())}")

    refuse(np.flatnonzero(unreadable), "is not a list as JSON or Python write it")
    refuse(np.unique(rows[missing]), "has an element that is missing")
    refuse(np.unique(rows[bad]), "has an element that is not a category")
    most = lengths.max(initial=0) if column.length is None else column.length
    for row in np.flatnonzero(lengths > most):
        rule = f"is a list of {lengths[row]:,}, more than the {most:,} that --list-length allows"
        refuse([row], rule)
    return Lists(keys, np.concatenate([[0], np.cumsum(lengths)])), reasons


def longest(column: Column, values: pa.Array) -> int:
    """How many elements the longest list of a column has."""
    return int(_lengths(_as_lists(column, values)[0]).max(initial=0))


def elements(column: Column, values: pa.Array) -> pa.Array:
    """All elements of all lists."""
    return _as_lists(column, values)[0].flatten()


def are_lists(kind: pa.DataType) -> bool:
    """Whether a type is one of lists, of whatever elements."""
    return cells.is_a(kind, *_LISTS)


def type_name(kind: pa.DataType) -> str:
    """A type as a message shows it: of lists their elements' alone, however they are encoded."""
    if are_lists(kind):
        return f"list<{type_name(kind.value_type)}>"
    return str(kind.value_type if pa.types.is_dictionary(kind) else kind)


def may_be_elements(kind: pa.DataType) -> bool:
    """Whether lists of this type are read: of integers or text."""
    found = cells.plain(pa.array([], kind)).type
    return cells.is_a(found, "integer", "string", "binary", "boolean", "null")


def are_written(text: pa.Array) -> bool:
    """Whether every cell of text, none of them missing, is written as a list."""
    return len(text) > 0 and all(map(_WRITTEN.fullmatch, text.to_pylist()))


def look_written(text: pa.Array) -> bool:
    """Whether any cell of text begins as a written list does, be it spoilt further on."""
    return bool(pc.any(pc.match_substring_regex(text, r"^\s*\[")).as_py())


def are_of_floats(text: pa.Array) -> bool:
    """Whether cells of text are written as lists, of numbers of which some are floats."""
    others = [cell for cell in text.to_pylist() if not _WRITTEN.fullmatch(cell)]
    return bool(others) and all(
        _OF_NUMBERS.fullmatch(cell) and re.search("[.eE]", cell) for cell in others
    )


def _lengths(lists: pa.Array) -> np.ndarray:
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64)


def _as_lists(column: Column, values: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """-> lists of Arrow, text that is none [rows] bool."""
    values = cells.plain(values)
    if are_lists(values.type):
        return values, np.zeros(len(values), bool)
    if pa.types.is_null(values.type):
        return values.cast(pa.list_(pa.string())), np.zeros(len(values), bool)
    if not pa.types.is_string(values.type):
        raise UserError(
            f"Column {column.name} has type {values.type}; it must hold lists, or text that is cut "
            "into them."
        )
    if column.separator is not None:
        return _cut(values, column.separator), np.zeros(len(values), bool)
    return _written(values)


def _cut(text: pa.Array, separator: str) -> pa.Array:
    """Text cut at a separator, of which one at its end begins no element; without spaces around."""
    last = rf"{re.escape(separator)}\s*$"
    text = pc.utf8_trim_whitespace(pc.replace_substring_regex(text, last, ""))
    parts = pc.split_pattern(pc.if_else(pc.equal(text, ""), None, text), separator)
    trimmed = pc.utf8_trim_whitespace(parts.flatten())
    offsets = np.concatenate([[0], np.cumsum(_lengths(parts))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), trimmed)


def _written(text: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Text written as lists -> lists of text; what is none [rows] bool."""
    text = text.fill_null("").dictionary_encode()
    distinct = text.dictionary.to_pylist()
    parsed = [_parsed(cell) if cell.strip() else [] for cell in distinct]
    bad = np.array([each is None for each in parsed], bool)
    places = text.indices.to_numpy(zero_copy_only=False)
    return pa.array(parsed, pa.list_(pa.string())).take(text.indices), bad[places]


def _parsed(cell: str) -> list[str | None] | None:
    """The elements of a list in text, None for a missing one; or None: it is no list."""
    if not _WRITTEN.fullmatch(cell):
        return None
    tokens = _ELEMENTS_WRITTEN.findall(cell)
    if "\\" in cell:
        return [_unescaped(token) for token in tokens]
    return [_plain(token) for token in tokens]


def _plain(token: str) -> str | None:
    """An element as it is written -> its text, None for a missing one."""
    if token[0] in "\"'":
        return token[1:-1]
    return None if token in _MISSING else token


def _without_slashes(escape: re.Match[str]) -> str:
    return "/" if escape[1] == "/" else escape[0]


def _unescaped(token: str) -> str | None:
    """As `_plain`, for what may have escapes."""
    if "\\" not in token:
        return _plain(token)
    try:
        text = json.loads(token)
    except ValueError:  # Of Python, which has no escape for a slash.
        text = ast.literal_eval(re.sub(r"\\([\\/])", _without_slashes, token))
    # JSON may write a character in two halves, and one half without the other.
    return str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
