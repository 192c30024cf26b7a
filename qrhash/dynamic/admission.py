"""Admissions: which keys have earned a row of their own.

A key that is met once will hardly be met again, and a row for it is wasted. So keys are counted
until they have been met `threshold` times: exactly, among as many candidates as there is memory
for, or by a sketch, whose memory is fixed for any number of keys. Counted are occurrences in the
batches of the training, as in DeepRec; a key is admitted in the very batch that brings it to the
threshold.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from qrhash.arithmetic import as_size, ceil_div
from qrhash.dynamic.index import KeyIndex, assign, create, lookup_rows, num_bytes
from qrhash.dynamic.newcomers import Admission, AdmitAll, Admitted, Newcomers
from qrhash.dynamic.slots import read
from qrhash.dynamic.upkeep import evict, lowest
from qrhash.fields import require_probability
from qrhash.keys import Keys, check_seed, scramble
from qrhash.types import PyTree


@dataclasses.dataclass(frozen=True)
class ExactCount(Admission):
    """Keys that have been met so often; DeepRec's `CounterFilter(filter_freq=threshold)`.

    Candidates are counted in an index of their own, of 52 to 84 bytes each. Where there are more of
    them than it has room for, those met longest ago are forgotten, a quarter at a time.

    Attributes:
      threshold: how many occurrences it takes, the one that is judged included.
      num_candidates: how many keys without a row are remembered.

    Raises:
      ValueError: a threshold below 1, or no candidates.
    """

    threshold: int
    num_candidates: int

    def __post_init__(self) -> None:
        for name in ("threshold", "num_candidates"):
            object.__setattr__(self, name, as_size(name, getattr(self, name)))

    def split(self, num_shards: int) -> "ExactCount":
        """With its part of the candidates."""
        return dataclasses.replace(self, num_candidates=ceil_div(self.num_candidates, num_shards))

    @property
    def num_bytes(self) -> int:
        """Those of the candidates' index."""
        return num_bytes(self.num_candidates)

    def init(self) -> KeyIndex:
        """No candidates."""
        return create(self.num_candidates)

    def judge(self, state: KeyIndex, newcomers: Newcomers) -> tuple[KeyIndex, Admitted]:
        """Those whose count reaches the threshold."""
        num_wanted = jnp.sum(newcomers.is_first, dtype=jnp.int32)

        def lacks_room(state: KeyIndex) -> jax.Array:
            return (state.num_free < num_wanted) & (state.num_keys > 0)

        def with_room(state: KeyIndex) -> KeyIndex:
            count = jnp.maximum(num_wanted - state.num_free, self.num_candidates // 4)
            return evict(state, lowest(state.last_steps, state.is_live, count))

        # A loop of no or one turn: unlike a conditional, it leaves its arrays in place.
        state = jax.lax.while_loop(lacks_room, with_room, state)
        state, of_keys, _ = assign(
            state,
            newcomers.keys,
            newcomers.step,
            where=newcomers.is_first,
            times=newcomers.occurrences,
        )
        # One for which there is no room among the candidates has what this batch brings.
        is_candidate = of_keys.rows < self.num_candidates
        counted = read(state.counts, jnp.minimum(of_keys.rows, self.num_candidates - 1))
        count = jnp.where(is_candidate, counted, newcomers.occurrences)
        is_admitted = newcomers.is_first & (count >= self.threshold)
        return state, Admitted(is_admitted, count - newcomers.occurrences)

    def settle(self, state: KeyIndex, newcomers: Newcomers, is_new: jax.Array) -> KeyIndex:
        """They are no candidates any more: should they come back, they count from zero."""
        rows = lookup_rows(state, newcomers.keys, where=is_new).rows
        return state.replace(
            counts=state.counts.at[rows].set(0, mode="drop"),
            last_steps=state.last_steps.at[rows].set(0, mode="drop"),
        )


def admit_after(times: int, capacity: int) -> Admission:
    """Keys that have been met so often: at once, or among as many candidates as there are rows."""
    return AdmitAll() if times == 1 else ExactCount(times, capacity)


@dataclasses.dataclass(frozen=True)
class SketchCount(Admission):
    """Keys that have been met so often by a count that may be too high, and is never too low.

    A count-min sketch with conservative update: each key has `num_hashes` counters, of which the
    lowest is its count, and only counters below the new count are raised. They stop at the
    threshold, so that one byte each is enough for thresholds up to 255. With three counters for
    each distinct key one in two thousand is admitted too early, with six one in fifteen thousand.

    Attributes:
      threshold: how many occurrences it takes, up to 65,535.
      num_counters: of all hashes together.
      num_hashes: how many counters a key has.
      halve_every: all counters are halved every so many steps: a sketch that never forgets admits
        everything in the end. None: never.

    Raises:
      ValueError: an argument is below 1, or the threshold is above 65,535.

    Source: Cormode and Muthukrishnan 2005; Estan and Varghese 2002 for the conservative update.
    """

    threshold: int
    num_counters: int
    num_hashes: int = 4
    halve_every: int | None = None

    _MOST: ClassVar[int] = 2**16 - 1

    def __post_init__(self) -> None:
        for name in ("threshold", "num_counters", "num_hashes"):
            object.__setattr__(self, name, as_size(name, getattr(self, name)))
        if self.halve_every is not None:
            object.__setattr__(self, "halve_every", as_size("halve_every", self.halve_every))
        if self.threshold > self._MOST:
            raise ValueError(f"threshold must be at most {self._MOST}, got {self.threshold}.")
        if self.num_counters < self.num_hashes:
            raise ValueError(
                f"num_counters must be at least the {self.num_hashes} of one key, got "
                f"{self.num_counters}."
            )

    @classmethod
    def for_keys(cls, threshold: int, num_keys: int, false_rate: float) -> "SketchCount":
        """A sketch of the size of DeepRec's counting Bloom filter, `CBFFilter`.

        Args:
          threshold: its `filter_freq`.
          num_keys: how many distinct keys there will be, its `max_element_size`.
          false_rate: how many of them may be admitted too early, its
            `false_positive_probability`; with the conservative update far fewer are.

        Raises:
          ValueError: a rate outside (0, 1); or as `SketchCount`.

        >>> SketchCount.for_keys(5, 1_000_000, 0.01)
        SketchCount(threshold=5, num_counters=9585059, num_hashes=7, halve_every=None)
        """
        num_keys = as_size("num_keys", num_keys)
        require_probability("false_rate", false_rate)
        counters = math.ceil(-math.log(false_rate) / math.log(2) ** 2 * num_keys)
        hashes = math.ceil(-math.log2(false_rate))
        return cls(threshold, max(counters, hashes), hashes)

    @property
    def _width(self) -> int:
        return self.num_counters // self.num_hashes

    def split(self, num_shards: int) -> "SketchCount":
        """With its part of the counters."""
        num_counters = max(ceil_div(self.num_counters, num_shards), self.num_hashes)
        return dataclasses.replace(self, num_counters=num_counters)

    @property
    def num_bytes(self) -> int:
        """Those of the counters, and of one number."""
        return self.num_hashes * self._width * (1 if self.threshold < 2**8 else 2) + 4

    def init(self) -> PyTree:
        """Counters [num_hashes * width], and how often they were halved."""
        dtype = jnp.uint8 if self.threshold < 2**8 else jnp.uint16
        return jnp.zeros(self.num_hashes * self._width, dtype), jnp.int32(0)

    def judge(self, state: PyTree, newcomers: Newcomers) -> tuple[PyTree, Admitted]:
        """Those whose count reaches the threshold."""
        counters, halvings = self._halved(state[0], state[1], newcomers.step)
        places = self._places(newcomers.keys)
        before = jnp.min(read(counters, places).astype(jnp.int32), axis=1)
        after = jnp.minimum(before + newcomers.occurrences, self.threshold)
        at = jnp.where(newcomers.is_first[:, None], places, counters.shape[0])
        raised = jnp.broadcast_to(after[:, None], at.shape).astype(counters.dtype)
        counters = counters.at[at].max(raised, mode="drop")
        is_admitted = newcomers.is_first & (after >= self.threshold)
        # The sketch goes on counting keys that have lost their row: nothing of it is theirs alone.
        return (counters, halvings), Admitted(is_admitted, jnp.zeros_like(before))

    def _places(self, keys: Keys) -> jax.Array:
        """The counters of each key, [n, num_hashes]."""
        mixed, width = scramble(keys, _SEED), jnp.uint32(self._width)
        places = [
            (mixed.hi + jnp.uint32(number) * mixed.lo) % width + jnp.uint32(number) * width
            for number in range(self.num_hashes)
        ]
        return jnp.stack(places, axis=1).astype(jnp.int32)

    def _halved(
        self, counters: jax.Array, halvings: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        if self.halve_every is None:
            return counters, halvings
        due = step // self.halve_every

        def halve(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            counters, halvings = state
            times = jnp.minimum(due - halvings, 15).astype(counters.dtype)
            return counters >> times, due

        # A loop of no or one turn: unlike a conditional, it leaves its arrays in place.
        return jax.lax.while_loop(lambda s: s[1] < due, halve, (counters, halvings))


@dataclasses.dataclass(frozen=True)
class AdmitByChance(Admission):
    """Each occurrence of a key without a row gets it one by chance: nothing is remembered.

    A key that is met n times is admitted with the probability 1 - (1 - probability)**n. Chance is a
    hash of key and step: the same run admits the same keys.

    Attributes:
      probability: in (0, 1).
      seed: another one, other keys.

    Source: McMahan et al. 2013, section 4.1 (Poisson inclusion).
    """

    probability: float
    seed: int = 0

    def __post_init__(self) -> None:
        require_probability("probability", self.probability)
        check_seed(self.seed)

    def judge(self, state: PyTree, newcomers: Newcomers) -> tuple[PyTree, Admitted]:
        """Those that are in luck."""
        keys, step = newcomers.keys, newcomers.step.astype(jnp.uint32)
        mixed = scramble(Keys(keys.hi ^ step, keys.lo), self.seed)
        luck = (mixed.hi >> 8).astype(jnp.float32) / 2**24
        stays_out = jnp.float32(1 - self.probability) ** newcomers.occurrences.astype(jnp.float32)
        is_admitted = newcomers.is_first & (luck >= stays_out)
        return state, Admitted(is_admitted, jnp.zeros_like(newcomers.occurrences))


# Seed of the hashes of a sketch: not that of the slots, or keys would meet in both.
_SEED = 0x5CE7C4
