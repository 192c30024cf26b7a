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
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from qrhash.arithmetic import as_size
from qrhash.config import EmbedConfig
from qrhash.dynamic.cached import cached, check_tiered
from qrhash.dynamic.config import DynamicConfig
from qrhash.dynamic.numbering import ByKey, rows_of_config, table_key
from qrhash.dynamic.records import Records, RowArrays, only_table, rows_of, swap_rows
from qrhash.dynamic.store import Store
from qrhash.dynamic.tier_files import read_tier, write_tier
from qrhash.dynamic.traffic import Fetched, Traffic
from qrhash.types import Key, PyTree


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
      traffic: counts of what went between the two: of ids `looked_up`, those of them that found
        their row on the device, `hits`, and `bytes_moved`.

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
        num_rows, numbering, start = rows_of_config(config)
        key = jax.random.key(0) if key is None else key
        records = Records(self._arrays, start, table_key(config, key))
        self.store = store(num_rows, records.width)
        self.traffic = Traffic(numbering, records, self.store, cache_rows)
        self._flushed = 0
        self._worker: threading.Thread | None = None
        self._loop: Generator[tuple[Any, Fetched], None, None] | None = None
        self._backs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._to_swap: collections.deque[Fetched] = collections.deque()

    @property
    def keys(self) -> ByKey:
        """Of a dynamic table, to be read between the loops: which key has which row.

        `keys.state` is the `State` on the host, of the rows of the store, `keys.num_keys` how many
        keys have a row, and `keys.step` the number of the next step.
        """
        if not isinstance(self.traffic.numbering, ByKey):
            raise ValueError("keys are those of a DynamicConfig: this table is one of ids.")
        return self.traffic.numbering

    @property
    def hit_rate(self) -> float:
        """Of the ids looked up so far, how many found their row on the device: in [0, 1]."""
        return self.traffic.hits / max(self.traffic.looked_up, 1)

    # --- the loop -------------------------------------------------------------------------------

    def ahead(
        self, batches: Iterable[Any], name: str | None = None
    ) -> Generator[tuple[Any, Fetched], None, None]:
        """The batches in their order, each when its rows are fetched: a worker looks ahead.

        When the loop is left early, what was planned and not swapped is undone.

        Args:
          batches: ids [*shape], integers of NumPy, or a `qrhash.Bag` of such; of a dynamic table
            keys, as `dynamic.assign` takes them, or pairs of keys and of which are meant, bool
            [*shape]. Or mappings in which such an entry stands.
          name: of mappings, which entry it is.

        Yields:
          The batch with slots of the cache in place of ids, or with `Found` in place of keys, of
          arrays of NumPy; and what `swap` takes. It must be called before the next batch.

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
        with jax.transfer_guard_host_to_device("allow"):
            arrays, old = swap_rows(arrays, fetched.slots, fetched.values)
        self._backs.put((fetched.move, old))
        return self._arrays.put(params, opt_state, arrays)

    def look(self, batch: Any) -> tuple[Any, Fetched]:
        """What `ahead` gives, of one batch outside of the training, and without looking ahead.

        No key gets a row, and nothing is counted, neither of keys nor of hits.

        Args:
          batch: as one of those of `ahead`.

        Returns:
          The batch in slots, and what `swap` takes; it must be called next.

        Raises:
          ValueError: as in `ahead`.
        """
        self._check_idle("look")
        self._take_all_back()
        in_slots, move, new = self.traffic.plan(batch, is_training=False)
        fetched = self.traffic.fetch(move, new)
        self._to_swap.append(fetched)
        return in_slots, fetched

    def evict(self) -> int:
        """Takes rows back from the keys that the config's eviction names; see `dynamic.evict`.

        Returns:
          How many keys have lost their row.

        Raises:
          ValueError: a loop is under way; the table is one of ids; or the config has no eviction,
            or one that goes by the values of the rows, of which most are in the store.
        """
        self._check_idle("evict")
        return self.keys.evict()

    def flush(self, params: PyTree, opt_state: PyTree) -> None:
        """Writes what has changed on the device to the store, and flushes that.

        The store then holds the whole table as it is after the last step: for a checkpoint, beside
        what is not of this table.

        Raises:
          ValueError: a loop is under way.
        """
        self._check_idle("flush")
        self._take_all_back()
        residents = self.traffic.residents
        arrays = self._arrays.of(params, opt_state)
        for some, values in rows_of(arrays, residents.used_since(self._flushed)):
            self.traffic.write(residents.rows_in(some), self.traffic.records.pack(values))
        self._flushed = residents.number
        self.store.flush()

    def save(self, path: str | Path, params: PyTree, opt_state: PyTree) -> None:
        """Flushes, and writes all rows that were ever in use to a file, and which key has which.

        The file is read by `restore`, and goes into a checkpoint: `files` of `Checkpoints.save`.
        It is written piece by piece, and takes no memory.

        Args:
          path: of the file; one that is there is overwritten.
          params: the parameters.
          opt_state: the state of the optimizer.

        Raises:
          ValueError: a loop is under way.
        """
        self.flush(params, opt_state)
        write_tier(Path(path), self.traffic.numbering, self.store)

    def restore(self, path: str | Path) -> None:
        """Stands where `save` wrote a file: rows, their state, and which key has which.

        The store must be new, and no loop have run: nothing is on the device then.

        Raises:
          ValueError: a loop has run; or the file is of another table, or damaged.
        """
        self._check_idle("restore")
        if self.traffic.residents.number:
            raise ValueError("restore must come before the first loop: make a new Tiered.")
        read_tier(Path(path), self.traffic.numbering, self.store)

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
        self._take_all_back()
        return list(self.traffic.read(rows, len(rows)))

    def stop(self) -> None:
        """Ends a loop that was left by an exception, and its worker, if they are still there."""
        if self._loop is not None:
            self._loop.close()

    def _take_all_back(self) -> None:
        """Records that came out of the cache go to the store."""
        while not self._backs.empty():
            back = self._backs.get()
            if back is not None:
                self.traffic.take_back(*back)

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
                named = batch if name is None else batch[name]
                slots, move, new = self.traffic.plan(named)
                # Behind a plan that this one waits for, no others come: the loop goes on to swap.
                # The last may still be under way on the device.
                while self._backs.qsize() > 1 or arrived < move.waits_for:
                    back = self._backs.get()
                    if back is None:
                        self.traffic.undo(move, new)
                        return
                    arrived = self.traffic.take_back(*back)
                fetched = self.traffic.fetch(move, new)
                batch = slots if name is None else {**batch, name: slots}
                planned.put((batch, fetched, None))
            planned.put((None, None, None))
        except BaseException as error:
            planned.put((None, None, error))

    # --- a loop that is left --------------------------------------------------------------------

    def _undo(self) -> None:
        """After the worker has ended: records come home, and plans not swapped are undone."""
        self._take_all_back()
        while self._to_swap:
            fetched = self._to_swap.pop()
            self.traffic.undo(fetched.move, fetched.new)


def _take_all(planned: Any, to_swap: Any) -> None:
    while not planned.empty():
        _, fetched, _ = planned.get()
        if fetched is not None:
            to_swap.append(fetched)
