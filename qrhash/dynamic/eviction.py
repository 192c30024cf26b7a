"""Evictions: which keys lose their rows, at checkpoints or every so many steps.

An eviction looks at whole arrays of the index, once in a while; DeepRec's run when a checkpoint is
saved. What is evicted is forgotten: a key that comes back starts anew.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from qrhash.arithmetic import as_size, ceil_div
from qrhash.dynamic.index import KeyIndex
from qrhash.dynamic.upkeep import lowest
from qrhash.fields import require_choice
from qrhash.types import Scalar

# One row in so many is kept free, when nothing says how long a key may keep one.
_KEPT_FREE = 8

# What each row of the table has -> what each row of the index has.
ByPlace: TypeAlias = Callable[[jax.Array], jax.Array]


def _as_is(each: jax.Array) -> jax.Array:
    return each


class Eviction(abc.ABC):
    """Decides which keys lose their rows; frozen and hashable, as configs are."""

    @abc.abstractmethod
    def gone(
        self, index: KeyIndex, table: jax.Array, step: Scalar, by_place: ByPlace = _as_is
    ) -> jax.Array:
        """Which rows of the index are to be taken back.

        Args:
          index: the `KeyIndex`, of arrays [capacity]; on a mesh [S, R].
          table: [capacity, width]; on a mesh, if it is split, [S, R, width].
          step: the number of the step.
          by_place: brings what each row of the table has, [capacity] or [S, R], into the order of
            the index: on a mesh the two have an order of their own.

        Returns:
          bool [capacity]; on a mesh [S, R].
        """


@dataclasses.dataclass(frozen=True)
class StepsSinceUse(Eviction):
    """Keys that were not met for more than so many steps; DeepRec's `GlobalStepEvict`.

    Attributes:
      steps: its `steps_to_live`.

    Raises:
      ValueError: steps below 1.
    """

    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", as_size("steps", self.steps))

    def gone(
        self, index: KeyIndex, table: jax.Array, step: Scalar, by_place: ByPlace = _as_is
    ) -> jax.Array:
        """By the last step of each row."""
        del table, by_place
        return jnp.asarray(step, jnp.int32) - index.last_steps > self.steps


@dataclasses.dataclass(frozen=True)
class SmallNorm(Eviction):
    """Keys whose vector is close to zero: half its sum of squares is below a threshold.

    This is what DeepRec's `L2WeightEvict` computes, neither the norm nor its square.

    Attributes:
      threshold: its `l2_weight_threshold`, above 0.

    Raises:
      ValueError: another threshold.
    """

    threshold: float

    def __post_init__(self) -> None:
        value = self.threshold
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"threshold must be a number above 0, got {value!r}.")

    def gone(
        self, index: KeyIndex, table: jax.Array, step: Scalar, by_place: ByPlace = _as_is
    ) -> jax.Array:
        """By the rows of the table."""
        del index, step
        squares = jnp.square(table.astype(jnp.float32))
        return by_place(jnp.sum(squares, axis=-1) / 2 < self.threshold)


@dataclasses.dataclass(frozen=True)
class LeastUsed(Eviction):
    """Keys that are used least, until no more than so many are left.

    Attributes:
      num_keys: how many may stay.
      by: "count", how often they were met, and of those met as often the ones met longest ago; or
        "step", when they were met last. Of equal ones the lower row goes first.

    Raises:
      ValueError: keys below 0, or another `by`.
    """

    num_keys: int
    by: str = "count"

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_keys", as_size("num_keys", self.num_keys, minimum=0))
        require_choice("by", self.by, ("count", "step"))

    def gone(
        self, index: KeyIndex, table: jax.Array, step: Scalar, by_place: ByPlace = _as_is
    ) -> jax.Array:
        """By count or last step, exactly as many as are too many."""
        del table, step, by_place
        excess, live = jnp.maximum(index.num_keys - self.num_keys, 0), index.is_live
        if self.by == "step":
            return lowest(index.last_steps, live, excess)
        fewest = lowest(index.counts, live, excess)
        # Of those with the highest of their counts, there may be others as rarely met.
        bound = jnp.max(jnp.where(fewest, index.counts, -1))
        below = live & (index.counts < bound)
        rest = excess - jnp.sum(below, dtype=jnp.int32)
        return below | lowest(index.last_steps, live & (index.counts == bound), rest)


def longest_unused(capacity: int) -> LeastUsed:
    """Keeps one row in eight free: keys that were met longest ago lose theirs."""
    return LeastUsed(capacity - ceil_div(capacity, _KEPT_FREE), by="step")
