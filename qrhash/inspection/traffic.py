"""Which rows the look-ups go to: hot ones, who shares them, and those that none goes to."""

from typing import Any, NamedTuple

import numpy as np

from qrhash.inspection.blocks import checked_counts, index_blocks, num_ids
from qrhash.partitions import Partition


class HotRow(NamedTuple):
    """A row that many look-ups go to.

    Attributes:
      row: its number.
      lookups: how many.
      num_ids: how many of the ids that were met share it.
      places: the places of the most frequent of them, [m].
    """

    row: int
    lookups: float
    num_ids: int
    places: np.ndarray


class TableTraffic(NamedTuple):
    """The look-ups of one table.

    Attributes:
      num_rows: how many rows it has.
      lookups: how many there are, over all rows.
      untouched: how many rows none of them goes to.
      hot: the rows that most go to, the hottest first.
    """

    num_rows: int
    lookups: float
    untouched: int
    hot: tuple[HotRow, ...]


def table_traffic(
    partition: Partition, ids: Any, counts: Any, *, top: int = 5, named: int = 5
) -> tuple[TableTraffic, ...]:
    """Where the look-ups of ids go, table by table.

    Args:
      partition: the partition.
      ids: the ids that were met: distinct ones [n], for a family on keys `Keys` [n]; or a number n,
        for all ids below it.
      counts: how often each was met, [n], 0 or more.
      top: how many of the hottest rows to name.
      named: how many ids to name of each.

    Returns:
      A `TableTraffic` for each table.

    Raises:
      ValueError: ids or counts of another shape.

    >>> from qrhash.families import HashTrick
    >>> (table,) = table_traffic(HashTrick(6, 4), 6, [10, 1, 0, 0, 5, 2], top=1)
    >>> table.untouched, table.hot[0].row, table.hot[0].lookups, table.hot[0].places.tolist()
    (2, 0, 15.0, [0, 4])
    """
    met = checked_counts(counts, num_ids(ids))
    # One place more, for ids without rows.
    counted = [np.zeros(rows + 1) for rows in partition.num_rows]
    touched = [np.zeros(rows + 1, bool) for rows in partition.num_rows]
    for part, indices in index_blocks(partition, ids):
        for each, was, index in zip(counted, touched, indices, strict=True):
            np.add.at(each, index, met[part])
            was[index[met[part] > 0]] = True
    counted = [each[:-1] for each in counted]
    hot = [np.argsort(-each, kind="stable")[:top] for each in counted]
    hot = [rows[each[rows] > 0] for rows, each in zip(hot, counted, strict=True)]
    shared = _shared(partition, ids, met, hot, named)
    return tuple(
        TableTraffic(
            len(each),
            float(each.sum()),
            int((~was[:-1]).sum()),
            tuple(
                HotRow(int(row), float(each[row]), *of_row)
                for row, of_row in zip(rows, ids_of, strict=True)
            ),
        )
        for each, was, rows, ids_of in zip(counted, touched, hot, shared, strict=True)
    )


def _shared(
    partition: Partition, ids: Any, met: np.ndarray, hot: list[np.ndarray], named: int
) -> list[list[tuple[int, np.ndarray]]]:
    """Of each hot row of each table, how many ids share it, and the most frequent of them."""
    found = [[(0, np.zeros(0, np.int64))] * len(rows) for rows in hot]
    for part, indices in index_blocks(partition, ids):
        for of_table, rows, index in zip(found, hot, indices, strict=True):
            for number, row in enumerate(rows):
                more = part.start + np.flatnonzero((index == row) & (met[part] > 0))
                count, places = of_table[number]
                places = np.concatenate([places, more])
                most = np.argsort(-met[places], kind="stable")[:named]
                of_table[number] = (count + len(more), places[most])
    return found
