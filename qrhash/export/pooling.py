"""Bags where vectors are served: what `qrhash.pooling` does, on NumPy."""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from qrhash.lengths import checked_lengths


@dataclass(frozen=True)
class Bags:
    """Which id is in which bag.

    Attributes:
      of_ids: the bag of each id, integers [n], in rising order.
      num_bags: how many bags there are.
      weights: of the ids, float32 [n], or None.
      combiner: "sum", "mean", "sqrtn" or "max"; see `qrhash.pooling`.
    """

    of_ids: np.ndarray
    num_bags: int
    weights: np.ndarray | None
    combiner: str

    @classmethod
    def of(cls, offsets: Any, weights: Any, num_ids: int, combiner: str) -> Self:
        """The bags that offsets cut ids into.

        Args:
          offsets: where each bag begins, and their end, integers [num_bags + 1].
          weights: of the ids, [num_ids], or None.
          num_ids: how many there are in all bags.
          combiner: as above.

        Raises:
          ValueError: offsets or weights that are none of these ids; or weights with "max".
        """
        lengths = checked_lengths(offsets, None, num_ids)
        if weights is not None:
            weights = np.asarray(weights, np.float32)
            if weights.shape != (num_ids,) or combiner == "max":
                raise ValueError(
                    f"weights must be one for each of {num_ids} ids, and not with combiner 'max', "
                    f"got shape {weights.shape} with {combiner!r}."
                )
        bags = np.repeat(np.arange(lengths.size), lengths)
        return cls(bags, lengths.size, weights, combiner)

    def without(self, left_out: np.ndarray) -> "Bags":
        """The bags without some of the ids, bool [n]."""
        weights = None if self.weights is None else self.weights[~left_out]
        return replace(self, of_ids=self.of_ids[~left_out], weights=weights)

    @property
    def is_empty(self) -> np.ndarray:
        """Which bags hold no id, bool [num_bags]."""
        return np.bincount(self.of_ids, minlength=self.num_bags) == 0

    def pool(self, vectors: np.ndarray) -> np.ndarray:
        """Pools the vectors [n, ...] of the ids: [num_bags, ...]; zeros for an empty bag."""
        shape = (self.num_bags, *vectors.shape[1:])
        if self.combiner == "max":
            most = np.full(shape, -np.inf, np.float32)
            np.maximum.at(most, self.of_ids, vectors)
            most[self.is_empty] = 0
            return most
        weights = np.ones(len(vectors), np.float32) if self.weights is None else self.weights
        sums = np.zeros(shape, np.float32)
        np.add.at(sums, self.of_ids, vectors * _across(weights, sums))
        if self.combiner == "sum":
            return sums
        by = np.zeros(self.num_bags, np.float32)
        np.add.at(by, self.of_ids, weights if self.combiner == "mean" else weights**2)
        by = _across(by if self.combiner == "mean" else np.sqrt(by), sums)
        return np.divide(sums, by, out=np.zeros_like(sums), where=by != 0)


def _across(numbers: np.ndarray, array: np.ndarray) -> np.ndarray:
    """Numbers [n] with as many axes as an array that they are broadcast over."""
    return numbers.reshape(-1, *(1,) * (array.ndim - 1))
