"""A table that grows whose rows are in a store, and those in use on the device.

The host knows which key has which row, and looks some batches ahead; see `qrhash.dynamic.Tiered`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qrhash.ctr.data.pipeline import Batch
from qrhash.ctr.errors import UserError
from qrhash.ctr.run.growth import as_arrays, table_paths
from qrhash.ctr.settings import Settings
from qrhash.dynamic import DynamicConfig, FileStore, MemoryStore, State, Store, Tiered
from qrhash.dynamic.numbering import on_host
from qrhash.dynamic.residents import CacheFullError

_FILE = "rows.zip"
_AT_ONCE = 2**16  # rows


class StoredRows:
    """The rows of the one table that grows, of which the model has those in use.

    Args:
      config: of the whole table.
      model: the model, or its structure.
      params: {"tables": tables, ...}, or types of them.
      tx: the transformation that they are trained with.
      settings: where the rows are.
    """

    def __init__(
        self,
        config: DynamicConfig,
        model: Any,
        params: Any,
        tx: optax.GradientTransformation,
        settings: Settings,
    ) -> None:
        (path,) = table_paths(model)
        self._config, self._path = config, path
        types = jax.eval_shape(as_arrays, params)

        def make() -> Tiered:
            store = _store(settings.store)
            return Tiered(config, types, tx, store, table=lambda tree: _at(tree["tables"], path))

        self._make, self._tier = make, make()
        self._keys_of = jax.jit(lambda keys, lists: model.keys_of_growing(keys, lists))

    def ahead(
        self,
        batches: Iterator[Batch],
        is_stop: Callable[[Batch], bool],
        swapped: Callable[[Callable[..., Any]], None],
    ) -> Iterator[Batch]:
        """The batches, each with its keys' rows once these are on the device.

        Behind a batch that it is to stop at, none is planned before the next one is asked for.

        Args:
          batches: of the training.
          is_stop: whether to stop behind a batch; asked once for each, in their order.
          swapped: is given a function of parameters and state that brings the rows; calls it.
        """
        is_over = False

        def entries() -> Iterator[dict[str, Any]]:
            nonlocal is_over
            for batch in batches:
                is_last = is_stop(batch)
                yield {"keys": self._named(batch), "batch": batch, "is_last": is_last}
                if is_last:
                    return
            is_over = True

        while not is_over:
            loop = self._tier.ahead(entries(), "keys")
            with closing(loop):
                while (planned := self._next(loop)) is not None:
                    entry, fetched = planned
                    swapped(partial(self._tier.swap, fetched=fetched))
                    if entry["is_last"]:
                        next(loop, None)
                    yield entry["batch"]._replace(found=[entry["keys"]])

    def _next(self, loop: Iterator[Any]) -> Any:
        with _told():
            return next(loop, None)

    def look(self, batch: Batch) -> tuple[Batch, Callable[..., Any]]:
        """A batch that is not trained on, and what brings its rows to the device."""
        with _told():
            found, fetched = self._tier.look(self._named(batch))
        return batch._replace(found=[found]), partial(self._tier.swap, fetched=fetched)

    def _named(self, batch: Batch) -> Any:
        """The keys of a batch, and which of them are meant."""
        with on_host():
            ((keys, meant),) = self._keys_of(batch.keys, batch.lists)
            return keys, meant & (jnp.asarray(batch.weights) > 0)[:, None]

    def evict(self) -> int:
        """Takes rows back from keys; gives from how many."""
        return self._tier.evict()

    @property
    def num_params_elsewhere(self) -> int:
        """Parameters of the table that the model, which has some of the rows, has not."""
        return self._config.num_params - self._tier.config.num_params

    @property
    def num_keys(self) -> int:
        """How many keys have a row."""
        return self._tier.keys.num_keys

    def save(self, directory: Path, params: Any, state: Any) -> None:
        """Writes all rows into a directory of a checkpoint."""
        self._tier.save(directory / _FILE, params, state)

    def restore(self, directory: Path) -> None:
        """Stands where `save` wrote; nothing is on the device then."""
        self._empty()
        self._tier.restore(directory / _FILE)

    def _empty(self) -> None:
        self._tier.store.close()
        self._tier = self._make()

    def take_all(self, tables: Any) -> tuple[Any, State]:
        """All that `restore` has read, at once; the store is empty then.

        Args:
          tables: the state of the model's tables.

        Returns:
          The same with all rows of the table that grows, and which key has which.
        """
        num_rows, flat = self._config.capacity, dict(nnx.to_flat_state(tables))
        variable = flat[self._path]
        rows = np.empty((num_rows, self._config.features), variable.dtype)
        for start in range(0, num_rows, _AT_ONCE):
            some = np.arange(start, min(start + _AT_ONCE, num_rows))
            rows[some] = self._tier.read(some)[0]
        state = jax.tree.map(lambda array: jnp.asarray(np.asarray(array)), self._tier.keys.state)
        self._empty()
        flat[self._path] = variable.replace(jnp.asarray(rows))
        return nnx.from_flat_state(flat), state

    def as_dict(self) -> dict[str, Any]:
        """What went to and fro, as JSON can hold it."""
        store = self._tier.store
        return {
            "hit_rate": self._tier.hit_rate,
            "bytes_moved": self._tier.traffic.bytes_moved,
            "bytes": store.num_rows * store.record_width,
        }

    @property
    def note(self) -> str:
        """In words."""
        moved = self._tier.traffic.bytes_moved / 1e6
        return f"{self._tier.hit_rate:.1%} found on the device, {moved:,.0f} MB moved"


@contextmanager
def _told() -> Iterator[None]:
    """A cache too small for a batch is the user's to mend."""
    try:
        yield
    except CacheFullError as error:
        raise UserError(str(error)) from error


def _at(tree: Any, path: Iterable[Any]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _store(directory: str | None) -> Callable[[int, int], Store]:
    """What makes the store: in memory, or in a file of a directory, which no other process has."""
    if directory is None:
        return MemoryStore

    def make(num_rows: int, record_width: int) -> Store:
        try:
            return FileStore.unnamed(directory, num_rows, record_width)
        except OSError as error:
            raise UserError(
                f"store {directory}: no file of rows can be made there: {error.strerror or error}."
            ) from error

    return make
