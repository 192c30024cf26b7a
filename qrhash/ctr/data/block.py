"""Rows on the host.

A row is a click (0 or 1), some numbers and some categories; any number or category may be missing.
A category is a number here too, its 64-bit *key*: the bits of an integer, or a hash of text. All
2**64 keys can occur, so a missing cell is told by a mask. Keys become ids in `vocabulary`.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from qrhash.ctr.data.schema import Schema


class Block(NamedTuple):
    """Some rows, in the order of the data.

    Attributes:
      labels: [rows] float32, 0 or 1; nan where the data have no label.
      numbers: [rows, N] float32, nan where the cell is missing.
      keys: [rows, C] uint64, 0 where the cell is missing.
      missing: [rows, C] bool, where there is no category.
      truth: [rows] float64, the logit of the probability each label was drawn with; None for
        real data.
      places: [rows] int64, which row of the data each is, from 0, malformed ones counted; None
        only in tests.
    """

    labels: np.ndarray
    numbers: np.ndarray
    keys: np.ndarray
    missing: np.ndarray
    truth: np.ndarray | None = None
    places: np.ndarray | None = None

    def rows(self, start: int, stop: int) -> "Block":
        """The rows [start, stop) of the block."""
        return self.take(slice(start, stop))

    def take(self, wanted: slice | np.ndarray) -> "Block":
        """The rows of a slice, or of a mask [rows] bool."""
        return Block._make(None if each is None else each[wanted] for each in self)


class Source(Protocol):
    """Where rows come from. Every pass over them gives the same rows.

    Attributes:
      name: what to call it in a message.
      schema: which columns there are, and what each is used as.
      num_lines: lines in all, malformed ones included: the axis of the split. The training rows
        come first.
      checksum: by it other rows, or the same ones in other blocks, are told.
    """

    name: str
    schema: Schema
    num_lines: int
    checksum: int

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        """Yields the well-formed rows of lines [start, stop), counted from 0, in order."""
        ...
