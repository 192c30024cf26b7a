"""The numbers of rows: in the order of the files, or by time, the later parts behind the others.

By time the rows fall into groups, of one byte for each row. Those of a group follow each other, in
the order of the files; a row without a time has no number, and is never asked for.
"""

from collections.abc import Sequence

import numpy as np

from qrhash.ctr.data.files import Lines

NO_GROUP = 255


class Numbering:
    """The numbers of rows.

    Args:
      num_rows: of all files.
      groups: [num_rows] uint8, the group of each row, or `NO_GROUP`; None: all are of one.
      firsts: the number that each group begins with.
    """

    def __init__(
        self, num_rows: int, groups: np.ndarray | None = None, firsts: Sequence[int] = (0,)
    ) -> None:
        self._num_rows, self._groups, self._firsts = num_rows, groups, list(firsts)

    def rows(self, numbers: Lines) -> Lines:
        """The rows of the files that have these numbers."""
        if self._groups is None:
            return numbers
        named = np.zeros(self._num_rows, np.bool_)
        named[numbers.start : numbers.stop] = True if numbers.mask is None else numbers.mask
        chosen = np.zeros(self._num_rows, np.bool_)
        for group, first in enumerate(self._firsts):
            members = self._groups == group
            chosen[members] = named[first : first + np.count_nonzero(members)]
        return Lines(0, self._num_rows, chosen)

    def counter(self) -> "Counter":
        """What numbers rows in the order of the files."""
        return Counter(self._groups, self._firsts)


class Counter:
    """Numbers rows in the order of the files; see `Numbering`."""

    def __init__(self, groups: np.ndarray | None, firsts: Sequence[int]) -> None:
        self._groups, self._next, self._at = groups, list(firsts), 0

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """The numbers of increasing rows [n], behind those it was called with before."""
        if self._groups is None or not rows.size:
            return rows
        groups = self._groups[self._at : rows[-1] + 1]
        numbers = np.empty(len(groups), np.int64)
        for group, first in enumerate(self._next):
            members = np.flatnonzero(groups == group)
            numbers[members] = first + np.arange(len(members))
            self._next[group] += len(members)
        found = numbers[rows - self._at]
        self._at = int(rows[-1]) + 1
        return found
