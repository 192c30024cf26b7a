"""`TieredEmbeddingVariable`: its rows are in a store, and those in use on the device."""

import contextlib
import functools
import weakref
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from qrhash.deeprec.options import StorageOption
from qrhash.deeprec.variable import EmbeddingVariable
from qrhash.dynamic import DynamicConfig, Fetched, Found, State, Tiered, cached
from qrhash.nnx import Optimizer
from qrhash.nnx.optimizer import path_in
from qrhash.types import PyTree


class TieredEmbeddingVariable(EmbeddingVariable):
    """What `get_embedding_variable` returns where the storage has several tiers.

    The host knows which key has which row, and looks some batches ahead; see
    `qrhash.dynamic.Tiered`. So there is a loop in place of `assign`, `find` and `evict`:

        for found in var.ahead(batches, model, optimizer):
            step(model, optimizer, found)  # with embedding_lookup(var, found) in the loss

    `model` is the module that holds the variable, or the variable itself, and `optimizer` the
    `qrhash.nnx.Optimizer` of it. Both are donated, as to a compiled step: what else holds arrays of
    theirs, such as a `nnx.clone`, holds them no longer.

    Attributes:
      name: the variable's name.
      config: the `qrhash.dynamic.DynamicConfig` of the rows on the device.
      whole: that of all rows.
      storage: the `StorageOption`.

    >>> import optax
    >>> from qrhash.deeprec.options import StorageType
    >>> storage = StorageOption(StorageType.HBM_DRAM, storage_size=[32])
    >>> var = TieredEmbeddingVariable("v", DynamicConfig(1000, 4), storage, rngs=nnx.Rngs(0))
    >>> optimizer = Optimizer(var, optax.adagrad(0.1))
    >>> for found in var.ahead([[7, 8], [8, 9]], var, optimizer):
    ...     print(var.table.shape, var(found).shape)
    (2, 4) (2, 4)
    (2, 4) (2, 4)
    >>> var.tier.keys.num_keys, var.tier.hit_rate
    (3, 0.25)
    """

    def __init__(
        self, name: str, config: DynamicConfig, storage: StorageOption, *, rngs: nnx.Rngs
    ) -> None:
        small = cached(config, storage.cache_rows(config))
        super().__init__(name, small, has_state=False, rngs=rngs)
        self.whole, self.storage = config, storage

    @property
    def tier(self) -> Tiered:
        """The `qrhash.dynamic.Tiered`: for `hit_rate`, `keys`, `evict`, `read` and `stop`.

        Raises:
          ValueError: there is none before the first `ahead`, `look`, `flush`, `save` or `restore`.
        """
        if self not in _BELOW:
            raise ValueError(
                "tier is there once ahead, look, flush, save or restore has been called: it holds "
                "the optimizer's state too, and they name the optimizer."
            )
        return _BELOW[self].tier

    @property
    def num_keys(self) -> int:
        """How many keys have a row, between the loops."""
        return self.tier.keys.num_keys

    @property
    def _state(self) -> State:
        raise ValueError(
            "keys of a variable in tiers have their rows from var.ahead(batches, model, optimizer) "
            "in the training, and from var.look(keys, model, optimizer) elsewhere, and lose them "
            "by var.tier.evict(): the index is on the host, not in the variable."
        )

    # --- the loop -------------------------------------------------------------------------------

    def ahead(
        self, batches: Iterable[Any], model: Any, optimizer: Optimizer, name: str | None = None
    ) -> Iterator[Any]:
        """The batches in their order, each when its rows are on the device: a worker looks ahead.

        Keys are counted and given rows, and new rows and the optimizer's state of them start, as by
        `assign` and `Optimizer.reset_rows` of other variables.

        Args:
          batches: keys [*shape], as `qrhash.Keys.of` takes them, a `qrhash.Bag` of such, or pairs
            of keys and of which are meant, bool [*shape]. Or mappings in which such an entry
            stands.
          model: the module that is trained, with the variable in it.
          optimizer: that of the model.
          name: of mappings, which entry it is.

        Yields:
          The batch with `Found` in place of keys.

        Raises:
          ValueError: `model` does not hold the variable, or another model has been given before;
            `optimizer` is none of `qrhash.nnx`, or does not train the table; no file can be made in
            `storage_path`; another loop is under way; or one batch names more rows than are on the
            device.
        """
        tier = self._tier_of(model, optimizer)
        return self._brought(tier.ahead(batches, name), model, optimizer, name)

    def _brought(
        self,
        loop: Generator[tuple[Any, Fetched], None, None],
        model: Any,
        optimizer: Optimizer,
        name: str | None,
    ) -> Iterator[Any]:
        path = _BELOW[self].path
        with contextlib.closing(loop):
            for batch, fetched in loop:
                self._swap(model, optimizer, fetched)
                if fetched.new.size:
                    _start(model, optimizer, batch if name is None else batch[name], path=path)
                yield batch

    def _swap(self, model: Any, optimizer: Optimizer, fetched: Fetched) -> None:
        below = _BELOW[self]
        params, opt_state = below.tier.swap(*optimizer.as_arrays(model), fetched)
        self.table.set_value(_table_at(params, below.path))
        optimizer.take_over(opt_state)

    # --- outside of the training ----------------------------------------------------------------

    def look(self, keys: Any, model: Any, optimizer: Optimizer) -> Found:
        """The rows of keys outside of the training, brought to the device.

        No key gets a row, and nothing is counted.

        Args:
          keys: as a batch of `ahead`.
          model: as in `ahead`.
          optimizer: as in `ahead`.

        Returns:
          The keys with their rows, for look-ups before the next call of `look` or `ahead`.

        Raises:
          ValueError: as in `ahead`.
        """
        found, fetched = self._tier_of(model, optimizer).look(keys)
        self._swap(model, optimizer, fetched)
        return found

    def flush(self, model: Any, optimizer: Optimizer) -> None:
        """Writes what has changed on the device to the store, as `tier.read` reads it.

        Raises:
          ValueError: a loop is under way; or as in `ahead`.
        """
        self._tier_of(model, optimizer).flush(*optimizer.as_arrays(model))

    def save(self, path: str | Path, model: Any, optimizer: Optimizer) -> None:
        """Writes all rows, the optimizer's state of them, and which key has which to a file.

        What else the model and the optimizer hold belongs into a checkpoint beside it.

        Args:
          path: of the file; one that is there is overwritten.
          model: as in `ahead`.
          optimizer: as in `ahead`.

        Raises:
          ValueError: a loop is under way; or as in `ahead`.
        """
        self._tier_of(model, optimizer).save(path, *optimizer.as_arrays(model))

    def restore(self, path: str | Path, model: Any, optimizer: Optimizer) -> None:
        """Stands where `save` wrote a file; the variable must be new.

        Args:
          path: of the file.
          model: as in `ahead`.
          optimizer: as in `ahead`.

        Raises:
          ValueError: a loop has run; the file is of another table, or damaged; or as in `ahead`.
        """
        self._tier_of(model, optimizer).restore(path)

    def _tier_of(self, model: Any, optimizer: Optimizer) -> Tiered:
        """What is below the device, made once: its records hold the optimizer's state."""
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"optimizer must be a qrhash.nnx.Optimizer, got {optimizer!r:.200}.")
        path = path_in(model, self)
        if path is None:
            raise ValueError("model must be the variable or hold it, got one that it is not in.")
        params, _ = optimizer.as_arrays(model)
        if "table" not in _at(params, path):
            raise ValueError("optimizer must train the table of the variable: its wrt omits that.")
        tree = jax.tree.structure(params)
        if self not in _BELOW:
            at = functools.partial(_table_at, path=path)
            store = self.storage.store
            tier = Tiered(self.whole, params, optimizer.tx, store, table=at)
            _BELOW[self] = _Below(tier, path, tree)
        below = _BELOW[self]
        if (path, tree) != (below.path, below.tree):
            raise ValueError(
                "model must be of the structure of the one that was given first: the parameters "
                "are known by their places in it."
            )
        return below.tier


class _Below(NamedTuple):
    """What is below the device: for a model of one structure, with the variable at one place."""

    tier: Tiered
    path: tuple[Any, ...]
    tree: Any


# No attribute: what is compiled for a module keeps its attributes for ever, and a store is large.
_BELOW: weakref.WeakKeyDictionary[TieredEmbeddingVariable, _Below] = weakref.WeakKeyDictionary()


def _at(tree: Any, path: Iterable[Any]) -> Any:
    """A part of the parameters; empty if they have none there."""
    for name in path:
        tree = tree.get(name, {})
    return tree


def _table_at(params: PyTree, path: Iterable[Any]) -> Any:
    return _at(params, path)["table"]


def _start_rows(model: Any, optimizer: Optimizer, found: Found, path: tuple[Any, ...]) -> None:
    """New rows and the optimizer's state of them are as at the start."""
    var = model
    for name in path:
        var = var[name] if isinstance(name, int) else getattr(var, name)
    var.start(found)
    optimizer.reset_rows(model, var, found)


# In place, for which what goes in is given away.
_start = nnx.jit(_start_rows, static_argnames="path", donate_argnames=("model", "optimizer"))
