"""How a file of text is written: its delimiter, its header, its quotation marks.

The first bytes of the file say it, where the options do not.
"""

import collections
import csv
import gzip
import io
import itertools
import re
from pathlib import Path
from typing import NamedTuple

from qrhash.ctr.data.cells import BOOLEANS, DECIMAL, NO_NUMBER, quote
from qrhash.ctr.data.criteo import COLUMNS
from qrhash.ctr.data.files import file_errors
from qrhash.ctr.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DELIMITERS = {"tab": "\t", "pipe": "|", "semicolon": ";", "comma": ","}  # rare in text first

_HEAD_BYTES = 1 << 17  # what is looked at; a cell of more would be an error of `csv`
_HEAD_ROWS = 100
_JSON = re.compile(rb'\s*(\[\s*)?\{\s*"[^"]*"\s*:')  # an object, or a list of them
_DATE = re.compile("[0-9]{4}[-/][0-9]{2}[-/][0-9]{2}")


class TextFormat(NamedTuple):
    """How rows are written.

    Attributes:
      delimiter: what stands between cells.
      names: of the columns, in the order of the file.
      has_header: whether they are in the first row, which holds no data then.
      has_quotes: whether quotation marks around a cell are no part of it.
      has_spaces: whether spaces behind a delimiter are no part of a cell.
    """

    delimiter: str
    names: tuple[str, ...]
    has_header: bool
    has_quotes: bool
    has_spaces: bool = False


CRITEO_TEXT = TextFormat("\t", COLUMNS, has_header=False, has_quotes=False)


def is_criteo(head: str, *, lacks_label: bool = False) -> bool:
    """Whether text looks like the Criteo format: most of its lines have 40 cells, and no header."""
    expected = len(COLUMNS) - lacks_label
    counts = collections.Counter(line.count("\t") + 1 for line in _lines(head))
    del counts[1]  # Lines of one cell are malformed in any format.
    if not counts or counts.most_common(1)[0][0] != expected:
        return False
    first = next(line for line in _lines(head) if line.count("\t") + 1 == expected)
    return not _is_header(first.split("\t"), [])


def sniff(head: str, path: Path, *, delimiter: str, header: str, label: str | None) -> TextFormat:
    """The format of a file.

    Args:
      head: its beginning.
      path: for messages.
      delimiter: one of `DELIMITERS`, or "auto".
      header: "yes", "no" or "auto".
      label: a column that must be in a header, if there is one.

    Raises:
      UserError: no delimiter divides its lines.
    """
    mark = _delimiter(head, path) if delimiter == "auto" else DELIMITERS[delimiter]
    # Tables of tabs and pipes seldom have quotation marks that are no part of a cell.
    opening = re.compile(f'(?:^|{re.escape(mark)})"', flags=re.MULTILINE)
    has_quotes = mark in ",;" or bool(opening.search(head))
    rows = _first_rows(head, mark, has_quotes=has_quotes)
    cells = [cell.strip() for cell in rows[0]]
    behind = [cell for row in rows for cell in row[1:] if cell]
    has_spaces = bool(behind) and all(cell.startswith(" ") for cell in behind)
    has_header = header == "yes"
    if header == "auto":
        has_header = label in cells or _is_header(cells, rows[1:])
    names = [cell or f"unnamed{j}" for j, cell in enumerate(cells, 1)]
    if not has_header:
        names = [f"column{j}" for j in range(1, len(cells) + 1)]
    twice = [name for name, times in collections.Counter(names).items() if times > 1]
    if twice:
        raise UserError(
            f"{path} has more than one column {', '.join(twice)}: name each once, or say "
            "--header no, if its first line is none."
        )
    return TextFormat(mark, tuple(names), has_header, has_quotes, has_spaces)


def read_head(path: Path, *, compressed: bool) -> str:
    """The beginning of a file of text, up to its last whole line.

    Raises:
      UserError: it is no text, or empty.
    """
    with file_errors(path), (gzip.open if compressed else open)(path, "rb") as stream:
        head = stream.read(_HEAD_BYTES)
    if not head:
        raise UserError(f"{path} is empty.")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is text in UTF-16; write it in UTF-8.")
    if b"\0" in head:
        raise UserError(f"{path} is neither text, plain or gzip, nor Parquet: it holds zero bytes.")
    if len(head) == _HEAD_BYTES and b"\n" in head:
        head = head[: head.rindex(b"\n")]
    head = head.removeprefix(BYTE_ORDER_MARK)
    if b"\r" in head and b"\n" not in head and len(head.rstrip(b"\r").split(b"\r")) > 1:
        raise UserError(f"{path} ends its lines with carriage returns alone; write line feeds.")
    if _JSON.match(head):
        raise UserError(f"{path} is JSON; write it as Parquet or CSV, with a column for each name.")
    try:
        return head.decode()
    except UnicodeDecodeError:  # As the rows will be read.
        return head.decode("latin-1")


def _lines(head: str) -> list[str]:
    """The first lines that are not empty."""
    lines = [line.removesuffix("\r") for line in head.split("\n")]
    return [line for line in lines if line][:_HEAD_ROWS] or [""]


def _delimiter(head: str, path: Path) -> str:
    """What divides most rows into as many cells as the first one has; of several, the rarest."""

    def agreement(mark: str) -> int:
        first, *others = (len(row) for row in _first_rows(head, mark, has_quotes=True))
        return 0 if first == 1 else 1 + others.count(first)

    best = max(DELIMITERS.values(), key=agreement)
    if not agreement(best):
        first = _lines(head)[0]
        hint = ""
        if "::" in first:
            hint = " Its cells are divided by '::': write a tab in its place."
        elif " " in first.strip():
            hint = " If its cells are divided by spaces, write tabs in their place."
        raise UserError(
            f"{path} has no columns: none of {', '.join(DELIMITERS)} divides its first line, "
            f"{quote(first)}, and as often those below.{hint}"
        )
    return best


def _first_rows(head: str, mark: str, *, has_quotes: bool) -> list[list[str]]:
    """The cells of the first rows that are not empty."""
    text = io.StringIO(head, newline="")
    rows = csv.reader(text, delimiter=mark, quoting=csv.QUOTE_MINIMAL)
    if not has_quotes:
        rows = csv.reader(text, delimiter=mark, quoting=csv.QUOTE_NONE)
    return list(itertools.islice(filter(None, rows), _HEAD_ROWS)) or [[""]]


def _is_header(cells: list[str], rows: list[list[str]]) -> bool:
    """Whether cells are names: none of them a number, a date or a truth value.

    They are, where one stands above nothing but such values. Where all is words, no two are alike,
    and few of them come again in their columns. A name may be missing: that of the index of a
    data frame.
    """
    named = [cell for cell in cells if cell]
    if len(named) < max(1, len(cells) - 1) or any(map(_is_value, named)):
        return False
    below = [set(column) - {""} for column in zip(*_others(cells, rows), strict=True)]
    columns = list(zip(cells, below, strict=False))
    if any(cell and column and all(map(_is_value, column)) for cell, column in columns):
        return True
    again = sum(bool(cell) and cell in column for cell, column in columns)
    return len(set(named)) == len(named) and again < max(2, len(cells) / 4)


def _others(cells: list[str], rows: list[list[str]]) -> list[list[str]]:
    """The cells of the rows as long, without the first one again, as where files were joined."""
    stripped = [[cell.strip() for cell in row] for row in rows if len(row) == len(cells)]
    return [row for row in stripped if row != cells]


def _is_value(cell: str) -> bool:
    return bool(
        re.match(DECIMAL, cell)
        or _DATE.match(cell)
        or cell.lower() in BOOLEANS
        or cell in NO_NUMBER
    )
