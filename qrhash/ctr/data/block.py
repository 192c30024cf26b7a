"""Rows on the host.

A row is a click (0 or 1), some numbers, some categories, and some lists of categories; any number
or category may be missing, and a list be empty.
A category is a number here too, its 64-bit *key*: the bits of an integer, or a hash of text. All
2**64 keys can occur, so a missing cell is told by a mask. Keys become ids in `vocabulary`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from qrhash.ctr.data.schema import Schema


class Lists(NamedTuple):
    """A column of lists: all elements behind each other, and where each list begins.

    Attributes:
      keys: [elements] uint64.
      offsets: [rows + 1] int64: row i has the elements [offsets[i], offsets[i + 1]).
    """

    keys: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """How many elements each list has, [rows] int64."""
        return np.diff(self.offsets)

    def take(self, wanted: slice | np.ndarray) -> "Lists":
        """The lists of some rows: of a slice, a mask [rows] bool, or their numbers [n]."""
        starts, lengths = self.offsets[:-1][wanted], self.lengths[wanted]
        offsets = _offsets(lengths)
        places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Lists(self.keys[places], offsets)


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
      importance: [rows] float32, how much each counts in the training; None: all alike.
      lists: the columns of lists.
    """

    labels: np.ndarray
    numbers: np.ndarray
    keys: np.ndarray
    missing: np.ndarray
    truth: np.ndarray | None = None
    places: np.ndarray | None = None
    importance: np.ndarray | None = None
    lists: tuple[Lists, ...] = ()

    def rows(self, start: int, stop: int) -> "Block":
        """The rows [start, stop) of the block."""
        return self.take(slice(start, stop))

    def take(self, wanted: slice | np.ndarray) -> "Block":
        """The rows of a slice, a mask [rows] bool, or their numbers [n]."""
        *columns, lists = self
        taken = [None if each is None else each[wanted] for each in columns]
        return Block._make([*taken, tuple(each.take(wanted) for each in lists)])

    def only(self, schema: Schema, part: Schema) -> "Block":
        """The categories and lists of a part of the schema, and of other columns the labels."""
        numbers = np.zeros((len(self.labels), 0), self.numbers.dtype)
        at = [schema.categories.index(name) for name in part.categories]
        lists = tuple(self.lists[schema.lists.index(name)] for name in part.lists)
        return Block(self.labels, numbers, self.keys[:, at], self.missing[:, at], lists=lists)

    def present(self, name: str, schema: Schema) -> np.ndarray:
        """The keys that there are in a column of categories, or of lists, [n] uint64."""
        if name in schema.lists:
            return self.lists[schema.lists.index(name)].keys
        place = schema.categories.index(name)
        return self.keys[~self.missing[:, place], place]


def joined(blocks: Sequence[Block]) -> Block:
    """The rows of one block or more, of the same columns, behind each other."""
    *columns, lists = zip(*blocks, strict=True)
    whole = [None if each[0] is None else np.concatenate(each) for each in columns]
    return Block._make([*whole, tuple(map(_joined_lists, zip(*lists, strict=True)))])


def _joined_lists(parts: Sequence[Lists]) -> Lists:
    lengths = np.concatenate([each.lengths for each in parts])
    return Lists(np.concatenate([each.keys for each in parts]), _offsets(lengths))


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """Lengths [rows] -> where each list begins, and the last one ends, [rows + 1] int64."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def no_rows(schema: Schema) -> Block:
    """A block of no rows."""
    nothing = Lists(np.zeros(0, np.uint64), np.zeros(1, np.int64))
    keys = np.zeros((0, len(schema.categories)), np.uint64)
    return Block(
        np.zeros(0, np.float32),
        np.zeros((0, len(schema.numbers)), np.float32),
        keys,
        keys > 0,
        places=np.zeros(0, np.int64),
        importance=None if schema.weight is None else np.zeros(0, np.float32),
        lists=(nothing,) * len(schema.lists),
    )


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

    def blocks(self, start: int, stop: int, wanted: np.ndarray | None = None) -> Iterator[Block]:
        """Yields the well-formed rows of lines [start, stop), counted from 0, in order.

        With `wanted`, [stop - start] bool, of the lines that it names; no others are decoded.
        """
        ...
