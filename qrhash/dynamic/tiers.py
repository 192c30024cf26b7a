"""Tables larger than the device: rows in a store, and a cache of them where the training is.

A worker looks ahead: for the batches that come next it finds the rows that are not on the device,
reads their records (the row and all optimizer state of it) and chooses which others make room.
Before its step, a batch swaps them: one function, in place, writes the new rows and gives out the
old ones, whose records the worker takes back to the store. What is trained is an ordinary large
table of `cache_rows` rows, and the numbers are those of one that is all there:

    tier = Tiered(config, params, tx, MemoryStore, key=key)
    for batch, fetched in tier.ahead(batches):
        params, opt_state = tier.swap(params, opt_state, fetched)
        params, opt_state, loss = step(params, opt_state, batch)
    tier.flush(params, opt_state)
"""

import collections
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qrhash.arithmetic import as_size
from qrhash.config import EmbedConfig
from qrhash.dynamic.cached import cached, check_tiered
from qrhash.dynamic.config import DynamicConfig
from qrhash.dynamic.numbering import ById, ByKey, Numbering
from qrhash.dynamic.records import Records, RowArrays, only_table, padded, rows_of, swap_rows
from qrhash.dynamic.residents import Move, Residents
from qrhash.dynamic.store import Store
from qrhash.initializers import per_row, table_initializers
from qrhash.types import Key, PyTree


class Fetched(NamedTuple):
    """What is to be on the device for a batch, as `Tiered.swap` takes it.

    Attributes:
      move: which rows come to which slots, and which ones make room.
      slots: the same slots on the device, int32 [k]; behind the n that are meant, one past the end.
      values: rows of the table and of its optimizer state, each [k, ...].
      new: of a dynamic table, the rows of the store that keys have just got, int64.
    """

    move: Move
    slots: Any
    values: tuple[Any, ...]
    new: np.ndarray


class Tiered:
    """A table whose rows are in a store, and those in use on the device.

    Args:
      config: the `EmbedConfig` of the whole table, of one `FullTable`; its batches are ids. Or a
        `DynamicConfig`, whose `capacity` is the rows of the store; its batches are keys.
      params: the parameters, or types of them; in them a table of `cached(config, cache_rows)`.
      tx: the transformation that they are trained with, such as of `qrhash.touched_rows`.
      store: makes a `Store` of (num_rows, record_width), such as `MemoryStore`, or
        `functools.partial(FileStore, path)`.
      table: gives the table of a tree like the parameters. Default: of `Parameters` theirs, else
        the only leaf.
      key: the key that the whole table starts from, as `qrhash.init(key, config)` would draw it.
      depth: so many batches are planned ahead.

    Attributes:
      config: `cached(config, cache_rows)`.
      store: the store.
      keys: of a dynamic table: `keys.state` is the `State` on the host, which key has which row of
        the store, and `keys.step` the number of the next step.
      looked_up: how many ids have been looked up so far, in the batches planned.
      hits: how many of them found their row on the device.
      bytes_moved: how many bytes of records have been read from the store and written to it.

    Raises:
      ValueError: an argument breaks its rule; as `cached`; `tx` keeps state for the table that does
        not go by its rows.
    """

    def __init__(
        self,
        config: EmbedConfig | DynamicConfig,
        params: PyTree,
        tx: optax.GradientTransformation,
        store: Callable[[int, int], Store],
        *,
        table: Callable[[PyTree], Any] | None = None,
        key: Key | None = None,
        depth: int = 2,
    ) -> None:
        check_tiered(config)
        self._arrays = RowArrays(tx, params, table or only_table)
        cache_rows, width = self._arrays.table.shape
        self.config = cached(config, cache_rows)
        if width != config.features:
            raise ValueError(
                f"params must hold a table of {config.features} features, got {width}: make it of "
                "cached(config, cache_rows)."
            )
        self._depth = as_size("depth", depth)
        self._numbering: Numbering
        initializer: Any
        key = jax.random.key(0) if key is None else key
        if isinstance(config, DynamicConfig):
            self._numbering, num_rows = ByKey(config), config.capacity
            initializer = per_row(jax.nn.initializers.zeros)
        else:
            self._numbering, num_rows = ById(config), config.num_embeddings
            (initializer,) = table_initializers(config)
            key = jax.random.split(key, 1)[0]
        self._records = Records(self._arrays, initializer, key)
        self.store = store(num_rows, self._records.width)
        self._residents = Residents(num_rows, cache_rows)
        self._flushed = self._steps = 0
        self._worker: threading.Thread | None = None
        self._loop: Generator[tuple[Any, Fetched], None, None] | None = None
        self._backs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._to_swap: collections.deque[Fetched] = collections.deque()
        self.looked_up = self.hits = self.bytes_moved = 0

    @property
    def keys(self) -> ByKey:
        """See `Tiered`; to be read, or set from a checkpoint, between the loops."""
        if not isinstance(self._numbering, ByKey):
            raise ValueError("keys are those of a DynamicConfig: this table is one of ids.")
        return self._numbering

    @property
    def hit_rate(self) -> float:
        """Of the ids looked up so far, how many found their row on the device: in [0, 1]."""
        return self.hits / max(self.looked_up, 1)

    # --- the loop -------------------------------------------------------------------------------

    def ahead(
        self, batches: Iterable[Any], name: str | None = None
    ) -> Generator[tuple[Any, Fetched], None, None]:
        """The batches in their order, each when its rows are fetched: a worker looks ahead.

        When the loop is left early, what was planned and not swapped is undone.

        Args:
          batches: ids [*shape], integers of NumPy, or a `qrhash.Bag` of such; of a dynamic table
            keys, as `dynamic.assign` takes them. Or mappings in which such an entry stands.
          name: of mappings, which entry it is.

        Yields:
          The batch with slots of the cache in place of ids, or with `Found` in place of keys; and
          what `swap` takes. It must be called before the next batch.

        Raises:
          ValueError: one batch names more rows than the cache has; ids without a row, under the
            policy "raise"; the loop has not called `swap`; or another loop is under way. What goes
            wrong in `batches` is raised here as it is.
        """
        self._check_idle("ahead")
        self._loop = self._run(batches, name)
        return self._loop

    def _run(
        self, batches: Iterable[Any], name: str | None
    ) -> Generator[tuple[Any, Fetched], None, None]:
        self._check_idle("ahead")
        planned: queue.Queue[Any] = queue.Queue(self._depth)
        stop = threading.Event()
        self._worker = worker = threading.Thread(
            target=self._work, args=(iter(batches), name, planned, stop), daemon=True
        )
        worker.start()
        try:
            while True:
                batch, fetched, error = planned.get()
                if error is not None:
                    raise error
                if fetched is None:
                    return
                self._to_swap.append(fetched)
                yield batch, fetched
                if self._to_swap:
                    raise ValueError("swap must be called for every batch before the next.")
        finally:
            stop.set()
            self._backs.put(None)
            while worker.is_alive():
                _take_all(planned, self._to_swap)
                worker.join(0.01)
            _take_all(planned, self._to_swap)
            self._undo()
            self._worker = None

    def swap(self, params: PyTree, opt_state: PyTree, fetched: Fetched) -> tuple[PyTree, PyTree]:
        """Brings the rows of a batch to the device, and takes out those that make room.

        Args:
          params: the parameters. The table is donated.
          opt_state: the state of the optimizer. What goes by the rows of the table is donated.
          fetched: what came with the batch.

        Returns:
          Parameters and state, in which the step runs.

        Raises:
          ValueError: it is not that of the batch which is due.
        """
        if not self._to_swap or fetched is not self._to_swap[0]:
            raise ValueError("swap must be called once for every batch, with what came with it.")
        self._to_swap.popleft()
        if not len(fetched.move.rows):
            return params, opt_state
        arrays = self._arrays.of(params, opt_state)
        arrays, old = swap_rows(arrays, fetched.slots, fetched.values)
        self._backs.put((fetched.move, old))
        return self._arrays.put(params, opt_state, arrays)

    def flush(self, params: PyTree, opt_state: PyTree) -> None:
        """Writes what has changed on the device to the store, and flushes that.

        The store then holds the whole table as it is after the last step: for a checkpoint, beside
        what is not of this table.

        Raises:
          ValueError: a loop is under way.
        """
        self._check_idle("flush")
        slots = self._residents.used_since(self._flushed)
        arrays = self._arrays.of(params, opt_state)
        for some, values in rows_of(arrays, slots):
            self._write(self._residents.rows_in(some), self._records.pack(values))
        self._flushed = self._residents.number
        self.store.flush()

    def read(self, rows: Any) -> list[np.ndarray]:
        """Rows of the table as the last `flush` wrote them, and their optimizer state.

        Args:
          rows: row numbers, int64 [n].

        Returns:
          The rows [n, features], then for each array of the state that goes by rows its own
          [n, ...], in the order of the leaves. Rows that were never on the device are as at first.

        Raises:
          ValueError: a loop is under way, or a row number is outside of the table.
        """
        self._check_idle("read")
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.store.num_rows:
            raise ValueError(f"rows must be in [0, {self.store.num_rows}), got {rows!r:.200}.")
        records = self.store.read(rows)
        self._records.start_those_never_written(records, rows)
        return list(self._records.unpack(records, len(rows)))

    def stop(self) -> None:
        """Ends a loop that was left by an exception, and its worker, if they are still there."""
        if self._loop is not None:
            self._loop.close()

    def _check_idle(self, name: str) -> None:
        if self._worker is not None:
            raise ValueError(
                f"{name} must not be called before the loop over ahead has ended: for instance by "
                "itertools.islice(batches, steps). After an exception in it call stop."
            )

    # --- the worker -----------------------------------------------------------------------------

    def _work(self, batches: Any, name: str | None, planned: Any, stop: threading.Event) -> None:
        try:
            arrived = 0
            for batch in batches:
                if stop.is_set():
                    return
                slots, move, new = self._plan(batch if name is None else batch[name])
                # Behind a plan that this one waits for, no others come: the loop goes on to swap.
                while not self._backs.empty() or arrived < move.waits_for:
                    back = self._backs.get()
                    if back is None:
                        self._undo_one(move, new)
                        return
                    arrived = self._take_back(*back)
                try:
                    fetched = self._fetch(move, new)
                except BaseException:
                    self._undo_one(move, new)
                    raise
                batch = slots if name is None else {**batch, name: slots}
                planned.put((batch, fetched, None))
            planned.put((None, None, None))
        except BaseException as error:
            planned.put((None, None, error))

    def _plan(self, batch: Any) -> tuple[Any, Move, np.ndarray]:
        """The batch in slots; what moves; which rows keys have just got."""
        named = self._numbering.name(batch)
        try:
            slots, move, hits = self._residents.plan(named.rows)
        except ValueError:
            self._numbering.forget(named.new)
            raise
        self.hits += hits
        self.looked_up += int(np.sum(slots < self._residents.num_slots))
        return named.in_slots(slots), move, named.new

    def _fetch(self, move: Move, new: np.ndarray) -> Fetched:
        count = len(move.rows)
        if not count:
            return Fetched(move, None, (), new)
        records = self.store.read(move.rows)
        self.bytes_moved += records.nbytes
        self._records.start_those_never_written(records, move.rows)
        slots = padded(move.slots, self._residents.num_slots)
        values = self._records.unpack(records, len(slots))
        return Fetched(move, jnp.asarray(slots), tuple(map(_on_device, values)), new)

    def _take_back(self, move: Move, old: tuple[jax.Array, ...]) -> int:
        there = move.victims >= 0
        if there.any():
            rows = [np.asarray(each)[: len(there)][there] for each in old]
            self._write(move.victims[there], self._records.pack(rows))
            self._residents.arrived(move.number, move.victims[there])
        return move.number

    def _write(self, rows: np.ndarray, records: np.ndarray) -> None:
        self.store.write(rows, records)
        self.bytes_moved += records.nbytes

    # --- a loop that is left --------------------------------------------------------------------

    def _undo(self) -> None:
        """After the worker has ended: records come home, and plans not swapped are undone."""
        while not self._backs.empty():
            back = self._backs.get()
            if back is not None:
                self._take_back(*back)
        while self._to_swap:
            fetched = self._to_swap.pop()
            self._undo_one(fetched.move, fetched.new)

    def _undo_one(self, move: Move, new: np.ndarray) -> None:
        self._residents.undo(move)
        self._numbering.forget(new)


def _on_device(array: np.ndarray) -> Any:
    # Whether there are wide numbers may be decided for the thread of the loop alone.
    return array if array.dtype.itemsize > 4 else jnp.asarray(array)


def _take_all(planned: Any, to_swap: Any) -> None:
    while not planned.empty():
        _, fetched, _ = planned.get()
        if fetched is not None:
            to_swap.append(fetched)
