"""Twins: ids that share all their rows, so that no training can ever tell them apart.

That is arithmetic of the partition alone, whatever the tables hold. Complementary partitions have
none.
"""

from typing import Any, NamedTuple

import numpy as np

from qrhash.inspection.blocks import checked_counts, index_blocks, num_ids
from qrhash.partitions import Partition


class Twins(NamedTuple):
    """Ids that have the same row in every table.

    Attributes:
      num_ids: how many ids were looked at.
      num_twins: how many of them share all their rows with another of them.
      num_sets: in how many sets of equal rows.
      share: share of all counts that is theirs.
      sets: the sets that are met most, each the places of its ids [m], the most frequent first.
    """

    num_ids: int
    num_twins: int
    num_sets: int
    share: float
    sets: tuple[np.ndarray, ...]


def twins(partition: Partition, ids: Any, counts: Any = None, *, named: int = 10) -> Twins:
    """The ids that share all their rows.

    Args:
      partition: the partition.
      ids: which ids to look at: distinct ones [n], for a family on keys `Keys` [n]; or a number n,
        for all ids below it. Ids without rows are left out.
      counts: how often each is met, [n]; None: all alike.
      named: how many sets to name.

    Raises:
      ValueError: ids or counts of another shape.

    >>> from qrhash.families import HashTrick, QuotientRemainder
    >>> found = twins(HashTrick(10, 8), 10)
    >>> found.num_twins, [ids.tolist() for ids in found.sets]
    (4, [[0, 8], [1, 9]])
    >>> twins(QuotientRemainder(10, 4), 10).num_twins
    0
    """
    n = num_ids(ids)
    met = checked_counts(counts, n)
    if partition.is_complementary:
        return Twins(n, 0, 0, 0.0, ())
    labels = _labels(partition, ids, n)
    sizes = np.bincount(labels[labels >= 0], minlength=1)
    is_twin = (labels >= 0) & (sizes[labels] > 1)
    totals = np.where(sizes > 1, np.bincount(labels[is_twin], met[is_twin], len(sizes)), -1.0)
    most = np.argsort(-totals, kind="stable")[: min(named, int((sizes > 1).sum()))]
    sets = (np.flatnonzero(labels == label) for label in most)
    return Twins(
        n,
        int(is_twin.sum()),
        int((sizes > 1).sum()),
        float(met[is_twin].sum() / max(met.sum(), np.finfo(float).tiny)),
        tuple(places[np.argsort(-met[places], kind="stable")] for places in sets),
    )


def _labels(partition: Partition, ids: Any, n: int) -> np.ndarray:
    """A number for each id [n], equal for ids of equal rows; -1 for one without rows."""
    labels, found = np.zeros(n, np.int64), np.ones(n, bool)
    for table, rows in enumerate(partition.num_rows):
        for part, indices in index_blocks(partition, ids):
            found[part] &= (indices[table] >= 0) & (indices[table] < rows)
            labels[part] = labels[part] * (rows + 1) + indices[table]
        # Numbered anew, so that the next product keeps within 64 bits.
        labels = np.unique(labels, return_inverse=True)[1].reshape(n)
    return np.where(found, labels, -1)
