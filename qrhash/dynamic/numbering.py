"""Which rows of a whole table a batch names, found on the host: by ids, or by keys."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from qrhash.bags import Bag
from qrhash.config import EmbedConfig
from qrhash.dynamic.config import DynamicConfig
from qrhash.dynamic.embedding import (
    Parameters,
    State,
    assign,
    evict,
    find,
    init_state,
)
from qrhash.dynamic.eviction import SmallNorm
from qrhash.dynamic.found import Found
from qrhash.dynamic.upkeep import evict as evict_rows
from qrhash.initializers import per_row, table_initializers
from qrhash.keys import Keys
from qrhash.policies import PADDING
from qrhash.types import Key


class Named(NamedTuple):
    """The rows that a batch names.

    Attributes:
      rows: int64 [n]; those outside the table name none.
      in_slots: makes the batch of the training, of slots [n] in place of these rows.
      new: which rows keys have got by this batch, int64.
    """

    rows: np.ndarray
    in_slots: Callable[[np.ndarray], Any]
    new: np.ndarray


class Numbering(Protocol):
    """See `ById`, `ByKey`."""

    def name(self, batch: Any) -> Named:
        """The rows that a batch of the training names."""

    def find(self, batch: Any) -> Named:
        """The rows that another batch names: no key gets one."""

    def forget(self, new: np.ndarray) -> None:
        """Takes back rows that keys got by a batch that no step has seen."""

    def in_use(self, start: int, stop: int) -> np.ndarray:
        """Which of some rows may be in use, bool [stop - start]."""

    def saved(self) -> list[np.ndarray]:
        """What it keeps."""

    def take_over(self, saved: Sequence[np.ndarray]) -> None:
        """Stands where `saved` was taken; raises a ValueError if that is of another table."""


_NONE = np.zeros(0, np.int64)


class ById:
    """Ids of a vocabulary, each with a row of its own.

    Args:
      config: the `EmbedConfig` of the whole table.
    """

    def __init__(self, config: EmbedConfig) -> None:
        self._config = config

    def name(self, batch: Any) -> Named:
        """See `Numbering`; of ids [*shape], or a `Bag` of ids."""
        if isinstance(batch, Bag):
            return self._name_bag(batch)
        rows = np.asarray(self._config.indices(np.asarray(batch))[0])
        return Named(
            rows.reshape(-1).astype(np.int64),
            lambda slots: slots.reshape(rows.shape),
            _NONE,
        )

    def _name_bag(self, bag: Bag) -> Named:
        in_bag = np.asarray(bag.in_bag)
        ids = np.where(in_bag, np.asarray(bag.ids), 0)
        rows = np.where(in_bag, np.asarray(self._config.indices(ids)[0], np.int64), PADDING)
        # The padding id is in no bag.
        segments = np.where(rows == PADDING, bag.num_bags, bag.segments).astype(np.int32)

        def in_slots(slots: np.ndarray) -> Bag:
            return dataclasses.replace(bag, ids=slots, segments=segments)

        return Named(rows, in_slots, _NONE)

    def find(self, batch: Any) -> Named:
        """See `Numbering`."""
        return self.name(batch)

    def forget(self, new: np.ndarray) -> None:
        """See `Numbering`: every id has had its row all along."""

    def in_use(self, start: int, stop: int) -> np.ndarray:
        """See `Numbering`: any may be."""
        return np.ones(stop - start, bool)

    def saved(self) -> list[np.ndarray]:
        """See `Numbering`: nothing."""
        return []

    def take_over(self, saved: Sequence[np.ndarray]) -> None:
        """See `Numbering`."""
        if saved:
            raise ValueError("it is of a table of keys, not of ids")


class ByKey:
    """Keys that come and go, each with a row of the store.

    Args:
      config: the `DynamicConfig` of the whole table.

    Attributes:
      state: which key has which row: the `State`, on the host.
      num_keys: how many keys have a row.
      step: the number of the next step.
    """

    def __init__(self, config: DynamicConfig) -> None:
        self._config = config
        self.step = self.num_keys = 0
        with on_host():
            self.state: State = init_state(config)
        self._assign = jax.jit(functools.partial(assign, config=config), donate_argnums=0)
        self._find = jax.jit(functools.partial(find, config=config))

    def name(self, batch: Any) -> Named:
        """See `Numbering`; of keys [*shape], a `Bag` of keys, or a pair: keys, which are meant."""
        keys, where = _as_keys(batch)
        with on_host():
            self.state, found = self._assign(self.state, keys, step=self.step, where=where)
            self.num_keys = int(self.state.index.num_keys)
        self.step += 1
        return _named(found)

    def find(self, batch: Any) -> Named:
        """See `Numbering`; of what `name` takes."""
        keys, where = _as_keys(batch)
        with on_host():
            found = self._find(self.state, keys, where=where)
        return _named(found)

    def evict(self) -> int:
        """Takes rows back as the config's eviction says; gives how many."""
        rule = self._config.eviction
        if rule is None or isinstance(rule, SmallNorm):
            raise ValueError(
                "evict needs a config.eviction that goes by steps or counts, such as "
                f"StepsSinceUse(1000), got {rule!r}."
            )
        with on_host():
            nothing = Parameters(jnp.zeros((0, 0)))
            self.state, count = evict(self.state, nothing, self._config, self.step)
        self.num_keys -= int(count)
        return int(count)

    def forget(self, new: np.ndarray) -> None:
        """See `Numbering`."""
        if new.size:
            with on_host():
                gone = np.zeros(self.state.index.capacity, bool)
                gone[new] = True
                index = evict_rows(self.state.index, jnp.asarray(gone))
                self.state = dataclasses.replace(self.state, index=index)
                self.num_keys = int(index.num_keys)

    def in_use(self, start: int, stop: int) -> np.ndarray:
        """See `Numbering`: those that keys have."""
        index = self.state.index
        # Of these rows alone: it is asked for piece by piece.
        return index.replace(last_steps=np.asarray(index.last_steps)[start:stop]).is_live

    def saved(self) -> list[np.ndarray]:
        """See `Numbering`: the leaves of the state, and the step."""
        return [*map(np.asarray, jax.tree.leaves(self.state)), np.asarray(self.step)]

    def take_over(self, saved: Sequence[np.ndarray]) -> None:
        """See `Numbering`."""
        leaves, tree = jax.tree.flatten(self.state)
        *values, step = saved
        types = [[(each.shape, each.dtype) for each in some] for some in (values, leaves)]
        if types[0] != types[1]:
            raise ValueError("it is of another capacity, admission, or version of qrhash")
        with on_host():
            self.state = jax.tree.unflatten(tree, map(jnp.asarray, values))
            self.num_keys = int(self.state.index.num_keys)
        self.step = int(step)


def _as_keys(batch: Any) -> tuple[Any, Any]:
    """Keys, or a `Bag` of them; and which are meant."""
    if isinstance(batch, Bag):
        return dataclasses.replace(batch, ids=Keys.of(batch.ids)), None
    keys, where = batch if isinstance(batch, tuple) else (batch, None)
    return Keys.of(keys), where


def _named(found: Found) -> Named:
    # From here on it belongs to the device of the training.
    found = jax.tree.map(np.asarray, found)
    rows, is_new = found.rows.rows, found.rows.is_new

    def in_slots(slots: np.ndarray) -> Any:
        named = found.rows._replace(rows=slots.reshape(rows.shape))
        return dataclasses.replace(found, rows=named)

    return Named(rows.reshape(-1).astype(np.int64), in_slots, rows[is_new].astype(np.int64))


def rows_of_config(config: EmbedConfig | DynamicConfig) -> tuple[int, Numbering, Any]:
    """How many rows a whole table has, which ones a batch names, and how they start."""
    if isinstance(config, DynamicConfig):
        return config.capacity, ByKey(config), per_row(jax.nn.initializers.zeros)
    return config.num_embeddings, ById(config), table_initializers(config)[0]


def table_key(config: EmbedConfig | DynamicConfig, key: Key) -> Key:
    """The key that rows are drawn from, of the one that `qrhash.init` takes."""
    return key if isinstance(config, DynamicConfig) else jax.random.split(key, 1)[0]


def on_host() -> Any:
    """A context in which JAX computes on the host."""
    return jax.default_device(jax.devices("cpu")[0])
