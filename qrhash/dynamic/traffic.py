"""What goes between a store and the rows on the device: planned, fetched, taken back."""

from typing import Any, NamedTuple

import jax
import numpy as np

from qrhash.dynamic.numbering import Numbering
from qrhash.dynamic.records import Records, padded
from qrhash.dynamic.residents import CacheFullError, Move, Residents
from qrhash.dynamic.store import Store


class Fetched(NamedTuple):
    """What is to be on the device for a batch, as `Tiered.swap` takes it.

    Attributes:
      move: which rows come to which slots, and which ones make room.
      slots: the same slots, int32 [k]; behind the n that are meant, one past the end.
      values: rows of the table and of its optimizer state, each [k, ...].
      new: of a dynamic table, the rows of the store that keys have just got, int64.
    """

    move: Move
    slots: Any
    values: tuple[Any, ...]
    new: np.ndarray


class Traffic:
    """The rows of a table between store and device, by what batches name.

    Args:
      numbering: which rows these are.
      records: how records are made of rows.
      store: where those are that are not on the device.
      cache_rows: how many rows are.

    Attributes:
      looked_up: how many ids have been looked up so far, in the batches of the training planned.
      hits: how many of them found their row on the device.
      bytes_moved: how many bytes of records have been read from the store and written to it.
    """

    def __init__(
        self, numbering: Numbering, records: Records, store: Store, cache_rows: int
    ) -> None:
        self.numbering, self.records, self._store = numbering, records, store
        self.residents = Residents(store.num_rows, cache_rows)
        self.looked_up = self.hits = self.bytes_moved = 0

    def plan(self, batch: Any, *, is_training: bool = True) -> tuple[Any, Move, np.ndarray]:
        """The batch in slots; what moves; which rows keys have just got.

        Raises:
          CacheFullError: it names more rows than there are slots; nothing moves then.
        """
        named = self.numbering.name(batch) if is_training else self.numbering.find(batch)
        try:
            slots, move, hits = self.residents.plan(named.rows)
        except CacheFullError:
            self.numbering.forget(named.new)
            raise
        if is_training:
            self.hits += hits
            self.looked_up += int(np.count_nonzero(slots < self.residents.num_slots))
        return named.in_slots(slots), move, named.new

    def fetch(self, move: Move, new: np.ndarray) -> Fetched:
        """The rows that come to the device; what goes wrong undoes the plan."""
        if not len(move.rows):
            return Fetched(move, None, (), new)
        try:
            slots = padded(move.slots, self.residents.num_slots)
            values = self.read(move.rows, len(slots))
            self.bytes_moved += len(move.rows) * self.records.width
            return Fetched(move, slots, values, new)
        except BaseException:
            self.undo(move, new)
            raise

    def read(self, rows: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
        """What the store has of rows [n]: of each array [size, ...], behind the n anything."""
        return self.records.unpack(self._store.read(rows), rows, size)

    def take_back(self, move: Move, old: tuple[jax.Array, ...]) -> int:
        """Writes what made room for a plan's rows; gives the number of the plan."""
        victims = move.victims
        there = victims >= 0
        if there.any():
            rows = [np.asarray(each)[: len(victims)] for each in old]
            if not there.all():
                victims, rows = victims[there], [each[there] for each in rows]
            self.write(victims, self.records.pack(rows))
            self.residents.arrived(move.number, victims)
        return move.number

    def write(self, rows: np.ndarray, records: np.ndarray) -> None:
        """Writes records [n, width] of rows [n] to the store."""
        self._store.write(rows, records)
        self.bytes_moved += records.nbytes

    def undo(self, move: Move, new: np.ndarray) -> None:
        """Takes back the last plan that was not yet undone."""
        self.residents.undo(move)
        self.numbering.forget(new)
