"""What each of several processes reads of the data, so that together they read it once a pass.

A process gives some rows of every batch, [i B + a, i B + b) of all rows that there are, and decodes
no others. Which lines these are depends on the lines before that give no row: malformed ones, or
those that are no positives. So all of them are looked at first, by each process its own part, and
what was found, one byte of every line, is told to all.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from qrhash.ctr.data.block import Block, Source
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.processes import gather, own_lines, together

_NO_ROW = -1


class Share(NamedTuple):
    """The rows that this process reads.

    Attributes:
      labels: [num_lines] int8, the label of every line, -1 of one that gives no row.
      batch_size: rows of a batch.
      rows: those of a batch that this process gives.
    """

    labels: np.ndarray
    batch_size: int
    rows: slice

    def labels_of(self, start: int, stop: int) -> np.ndarray:
        """The labels of all rows of the lines [start, stop), [rows] int8."""
        labels = self.labels[start:stop]
        return labels[labels != _NO_ROW]

    def wanted(self, start: int, stop: int, skipped: int) -> np.ndarray:
        """Which of the lines [start, stop) this process reads, [stop - start] bool.

        Args:
          start: the line that the first batch begins with.
          stop: where the last one ends.
          skipped: so many of the first rows, of whatever process, are not read.
        """
        is_row = self.labels[start:stop] != _NO_ROW
        is_own = np.zeros(self.batch_size, np.bool_)
        is_own[self.rows] = True
        is_read = np.resize(is_own, np.count_nonzero(is_row))
        is_read[:skipped] = False
        wanted = np.zeros(len(is_row), np.bool_)
        wanted[is_row] = is_read
        return wanted


class Survey:
    """The first look at all lines, by all processes together.

    Args:
      source: what is looked at.
      bad_lines: those of the source.

    Attributes:
      labels: as those of a `Share`, of the lines that were looked at.
    """

    def __init__(self, source: Source, bad_lines: BadLines) -> None:
        self._source, self._bad_lines = source, bad_lines
        self.labels = np.full(source.num_lines, _NO_ROW, np.int8)

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        """Yields this process's part of the lines [start, stop); at its end all know of all."""
        begin, end = own_lines(start, stop)
        for block in together(self._source.blocks(begin, end)):
            assert block.places is not None
            self.labels[block.places] = block.labels
            yield block
        self._bad_lines.gather()
        self.labels[start:stop] = np.concatenate(gather(self.labels[begin:end]))
