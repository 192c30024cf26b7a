"""Which rows are on the device, and which must make room for others: integers on the host.

Planned is a batch ahead of its step. A row whose record is still on its way back is known as such,
so that nobody reads an older one.
"""

from typing import NamedTuple

import numpy as np

# A look for the slots used longest ago finds one in so many.
_SCANNED = 4

# Slots not used for so many plans are all as old.
_OLD = 2**16 - 1


class CacheFullError(ValueError):
    """One batch names more rows than there are slots."""


class Move(NamedTuple):
    """What one batch changes.

    Attributes:
      number: of the plan, from 1 on.
      slots: where rows come to be, int64 [n].
      rows: which rows these are, int64 [n].
      victims: which rows were there, int64 [n]; -1 for none.
      waits_for: the last plan whose victims must be in the store before its rows are read there.
    """

    number: int
    slots: np.ndarray
    rows: np.ndarray
    victims: np.ndarray
    waits_for: int


class Residents:
    """Rows of a table in the slots of a cache; those not used for longest make room.

    Args:
      num_rows: rows of the table.
      num_slots: rows of the cache.
    """

    def __init__(self, num_rows: int, num_slots: int) -> None:
        # Of each row: slot + 1; 0: in the store; -n: taken out by plan n, not yet in the store. All
        # that is no row has the last one, in a slot behind the others.
        self._where = np.zeros(num_rows + 1, np.int32)
        self._where[-1] = num_slots + 1
        self._rows = np.full(num_slots, -1, np.int64)
        self._last = np.zeros(num_slots + 1, np.int32)
        self._number = 0
        # Slots to be taken next, the last first, and the plan that found them.
        self._oldest, self._scanned = np.arange(num_slots - 1, -1, -1), 1

    @property
    def num_slots(self) -> int:
        """Rows of the cache."""
        return len(self._rows)

    @property
    def number(self) -> int:
        """Of the last plan."""
        return self._number

    def plan(self, rows: np.ndarray) -> tuple[np.ndarray, Move, int]:
        """Makes room for the rows of a batch.

        Args:
          rows: int64 [m], any of them several times; those outside the table name none.

        Returns:
          Their slots, int32 [m], num_slots for those outside; what moves; and how many of the m
          were there already.

        Raises:
          CacheFullError: they are more than there are slots; nothing moves then.
        """
        # As unsigned numbers, those below zero are the largest.
        end = len(self._where) - 1
        rows = np.minimum(rows.view(np.uint64), end).view(np.int64)
        where = self._where[rows]
        absent = np.flatnonzero(where <= 0)
        in_slots = where.astype(np.int64) - 1
        in_slots[absent] = self.num_slots
        num_hits = len(rows) - int(np.count_nonzero(in_slots == self.num_slots))
        self._number += 1
        number = self._number
        self._last[in_slots] = number
        needed = _distinct(rows[absent])
        slots = self._oldest_slots(len(needed), number)
        if slots is None:
            count = len(_distinct(in_slots[in_slots < self.num_slots])) + len(needed)
            raise CacheFullError(
                f"cache_rows must be at least the {count} rows that one batch names, got "
                f"{self.num_slots}: make the cache larger or the batch smaller."
            )
        victims, waits_for = self._rows[slots], -min(self._where[needed].min(initial=0), 0)
        self._where[victims[victims >= 0]] = -number
        self._where[needed] = slots + 1
        self._rows[slots] = needed
        in_slots[absent] = self._where[rows[absent]] - 1
        move = Move(number, slots, needed, victims, int(waits_for))
        return in_slots.astype(np.int32), move, num_hits

    def _oldest_slots(self, count: int, number: int) -> np.ndarray | None:
        """So many slots, those used longest ago, that this plan does not need; None: too few."""
        found: list[np.ndarray] = []
        while count:
            if not len(self._oldest):
                self._oldest, self._scanned = self._scan(count, number), number
                if len(self._oldest) < count:
                    return None
            start = max(len(self._oldest) - count, 0)
            taken, self._oldest = self._oldest[start:], self._oldest[:start]
            # Some were used again after they were found.
            taken = taken[self._last[taken] < self._scanned]
            self._last[taken] = number
            found.append(taken)
            count -= len(taken)
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _scan(self, count: int, number: int) -> np.ndarray:
        """The slots used longest ago that this plan does not need, the oldest last."""
        ages = np.minimum(number - self._last[:-1], _OLD).astype(np.uint16)
        how_many = np.cumsum(np.bincount(ages, minlength=_OLD + 1)[:0:-1])
        enough = int(np.searchsorted(how_many, max(self.num_slots // _SCANNED, count)))
        oldest = np.flatnonzero(ages >= max(_OLD - enough, 1))
        # Radix sort, of 16 bits: partitions and sorts of all are ten times as slow.
        return oldest[np.argsort(ages[oldest], kind="stable")]

    def arrived(self, number: int, victims: np.ndarray) -> None:
        """The records of a plan's victims [n] are in the store."""
        is_latest = self._where[victims] == -number
        self._where[victims[is_latest]] = 0

    def undo(self, move: Move) -> None:
        """Takes back the last plan that was not yet undone: nothing has moved."""
        self._where[move.rows] = 0
        self._rows[move.slots] = move.victims
        there = move.victims >= 0
        self._where[move.victims[there]] = move.slots[there] + 1

    def used_since(self, number: int) -> np.ndarray:
        """Slots with rows that a plan after that one needed."""
        return np.flatnonzero((self._rows >= 0) & (self._last[:-1] > number))

    def rows_in(self, slots: np.ndarray) -> np.ndarray:
        """Which rows are in slots [n]."""
        return self._rows[slots]


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """In order, each once."""
    ordered = np.sort(numbers)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]
