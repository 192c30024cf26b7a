"""Rows on the host, and the columns of the Criteo format.

A row is a click (0 or 1), 13 integers and 26 categories; any integer or category may be
missing. A category is a number here too, its 64-bit *key*: what the hex digits in the file
say, or the 64 bits of an integer. All 2**64 keys can occur, so a missing cell is told by a mask.
Keys become ids in `vocabulary`.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

LABEL = "label"
INTEGERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
COLUMNS = (LABEL, *INTEGERS, *CATEGORIES)


class Block(NamedTuple):
    """Some consecutive rows.

    Attributes:
      labels: [rows] float32, 0 or 1.
      numbers: [rows, 13] float32, nan where the cell is missing.
      keys: [rows, 26] uint64, 0 where the cell is missing.
      missing: [rows, 26] bool, where there is no category.
      truth: [rows] float64, the logit of the probability each label was drawn with; None for
        real data.
    """

    labels: np.ndarray
    numbers: np.ndarray
    keys: np.ndarray
    missing: np.ndarray
    truth: np.ndarray | None = None

    def rows(self, start: int, stop: int) -> "Block":
        """The rows [start, stop) of the block."""
        return Block(*(column[start:stop] for column in self if column is not None))


class Source(Protocol):
    """Where rows come from. Every pass over them gives the same rows.

    Attributes:
      name: what to call it in a message.
      num_lines: lines in all, malformed ones included: the time axis of the split.
      checksum: by it other rows, or the same ones in other blocks, are told.
    """

    name: str
    num_lines: int
    checksum: int

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        """Yields the well-formed rows of lines [start, stop), counted from 0, in order."""
        ...
