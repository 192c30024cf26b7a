"""What an index asks of an admission: which new keys get a row."""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qrhash.keys import Keys
from qrhash.types import PyTree


class Newcomers(NamedTuple):
    """Keys of a batch that have no row.

    Attributes:
      keys: `Keys` [n].
      is_wanted: which places are meant, bool [n]; a key may be at several.
      is_first: bool [n], the first place of each of them.
      occurrences: how often the key at its first place is in the batch, int32 [n]; elsewhere 0.
      step: the number of the step, int32 [].
    """

    keys: Keys
    is_wanted: jax.Array
    is_first: jax.Array
    occurrences: jax.Array
    step: jax.Array


class Admitted(NamedTuple):
    """What an admission says of newcomers.

    Attributes:
      is_admitted: bool [n], at first places.
      counts: how often the keys there were met before this batch, int32 [n].
    """

    is_admitted: jax.Array
    counts: jax.Array


class Admission(abc.ABC):
    """Decides which keys get a row; frozen and hashable, as configs are.

    What it remembers from one batch to the next is a state of arrays beside the index.
    """

    def init(self) -> PyTree:
        """The state before the first batch."""
        return ()

    def split(self, num_shards: int) -> "Admission":
        """That of one of so many shards, each of which sees its own keys."""
        del num_shards
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes of the state."""
        return 0

    @abc.abstractmethod
    def judge(self, state: PyTree, newcomers: Newcomers) -> tuple[PyTree, Admitted]:
        """Counts newcomers, and says which of them are admitted."""

    def settle(self, state: PyTree, newcomers: Newcomers, is_new: jax.Array) -> PyTree:
        """Takes notice of those that got a row, at their first places; there may be no room."""
        del newcomers, is_new
        return state


@dataclasses.dataclass(frozen=True)
class AdmitAll(Admission):
    """Every key gets a row the first time it is met, as long as there are any."""

    def judge(self, state: PyTree, newcomers: Newcomers) -> tuple[PyTree, Admitted]:
        """All of them."""
        nothing = jnp.zeros_like(newcomers.occurrences)
        return state, Admitted(newcomers.is_first, nothing)
