"""Which rows of a whole table a batch names, found on the host: by ids, or by keys."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from qrhash.bags import Bag
from qrhash.config import EmbedConfig
from qrhash.dynamic.config import DynamicConfig
from qrhash.dynamic.embedding import State, assign, init_state
from qrhash.dynamic.upkeep import evict
from qrhash.keys import Keys
from qrhash.policies import PADDING


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
        """The rows that a batch names."""

    def forget(self, new: np.ndarray) -> None:
        """Takes back rows that keys got by a batch that no step has seen."""


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
            lambda slots: jnp.asarray(slots.reshape(rows.shape)),
            _NONE,
        )

    def _name_bag(self, bag: Bag) -> Named:
        in_bag = np.asarray(bag.in_bag)
        ids = np.where(in_bag, np.asarray(bag.ids), 0)
        rows = np.where(in_bag, np.asarray(self._config.indices(ids)[0], np.int64), PADDING)
        # The padding id is in no bag.
        segments = np.where(rows == PADDING, bag.num_bags, bag.segments).astype(np.int32)

        def in_slots(slots: np.ndarray) -> Bag:
            with_slots = dataclasses.replace(bag, ids=slots, segments=segments)
            moved: Bag = jax.tree.map(jnp.asarray, with_slots)
            return moved

        return Named(rows, in_slots, _NONE)

    def forget(self, new: np.ndarray) -> None:
        """See `Numbering`: every id has had its row all along."""


class ByKey:
    """Keys that come and go, each with a row of the store.

    Args:
      config: the `DynamicConfig` of the whole table.

    Attributes:
      state: which key has which row: the `State`, on the host.
      step: the number of the next step.
    """

    def __init__(self, config: DynamicConfig) -> None:
        self.step = 0
        with on_host():
            self.state: State = init_state(config)
        self._assign = jax.jit(functools.partial(assign, config=config), donate_argnums=0)

    def name(self, batch: Any) -> Named:
        """See `Numbering`; of keys [*shape], or a `Bag` of keys."""
        if isinstance(batch, Bag):
            keys: Any = dataclasses.replace(batch, ids=Keys.of(batch.ids))
        else:
            keys = Keys.of(batch)
        with on_host():
            self.state, found = self._assign(self.state, keys, step=self.step)
        self.step += 1
        # From here on it belongs to the device of the training.
        found = jax.tree.map(np.asarray, found)
        rows, is_new = found.rows.rows, found.rows.is_new

        def in_slots(slots: np.ndarray) -> Any:
            named = found.rows._replace(rows=slots.reshape(rows.shape))
            return jax.tree.map(jnp.asarray, dataclasses.replace(found, rows=named))

        return Named(rows.reshape(-1).astype(np.int64), in_slots, rows[is_new].astype(np.int64))

    def forget(self, new: np.ndarray) -> None:
        """See `Numbering`."""
        if new.size:
            with on_host():
                gone = np.zeros(self.state.index.capacity, bool)
                gone[new] = True
                index = evict(self.state.index, jnp.asarray(gone))
                self.state = dataclasses.replace(self.state, index=index)


def on_host() -> Any:
    """A context in which JAX computes on the host."""
    return jax.default_device(jax.devices("cpu")[0])
