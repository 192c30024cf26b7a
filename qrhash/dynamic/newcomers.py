"""New keys of a batch: which they are, and what an index asks of an admission."""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qrhash.dynamic.slots import some_keys
from qrhash.keys import Keys, scramble
from qrhash.merge import representatives, slots_for
from qrhash.types import PyTree


class Newcomers(NamedTuple):
    """Keys of a batch that have no row.

    Attributes:
      keys: `Keys` [n], some of them several times, and others among them that are not meant.
      is_first: bool [n], the first place of each of them.
      occurrences: how often the key at its first place is in the batch, int32 [n]; elsewhere 0.
      step: the number of the step, int32 [].
    """

    keys: Keys
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


def first_places(
    keys: Keys, wanted: jax.Array, times: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which keys [n] are the same, of those wanted, each of which counts so many times [n].

    Returns:
      For each place that is wanted the first one with the same key, else its own, int32 [n]; where
      a wanted one is the first, bool [n]; and how often its key counts in all there, int32 [n],
      elsewhere 0.
    """
    n = wanted.shape[0]
    num_slots, slot_of = slots_for(n)
    mixed = scramble(keys)

    def slots_of(attempt: jax.Array) -> jax.Array:
        # Keys that meet at one attempt part at another: these are lines through the two words.
        return slot_of((mixed.hi + attempt * mixed.lo) * jnp.uint32(0x9E3779B9))

    def are_same(places: jax.Array) -> jax.Array:
        return some_keys(keys, places) == keys

    first = representatives(wanted, num_slots, slots_of, are_same, lowest=True)
    is_first = wanted & (first == jnp.arange(n, dtype=jnp.int32))
    occurrences = jnp.zeros(n, jnp.int32).at[jnp.where(wanted, first, n)].add(times, mode="drop")
    return first, is_first, occurrences
