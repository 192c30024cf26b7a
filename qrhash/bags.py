"""`Bag`: several ids in one place, such as the categories of an item or the last clicks of a user.

However they are given (lists, offsets, rows with padding, a sparse matrix), they are kept in one
way: all ids behind each other, and for each the number of its bag. The number of places is static,
so that a function compiles once; places that are not needed belong to no bag. Nothing is ever left
out to make ids fit: too many for the places are refused on the host.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qrhash.arithmetic import as_size
from qrhash.lengths import checked_lengths, short
from qrhash.ragged import (
    Ids,
    as_weights,
    behind,
    flat_ids,
    ids_of,
    taken_places,
    unpacked,
    zero_where,
)
from qrhash.types import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("ids", "segments", "weights"),
    meta_fields=("shape", "length"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Bag:
    """Bags of ids, `shape` of them: a pytree that stands wherever ids do.

    Attributes:
      ids: integers, or `Keys`, [n]; what stands in places of no bag does not matter.
      segments: for each id the number of its bag, int32 [n]; any number outside [0, num_bags)
        means none.
      weights: for each id its weight [n], with gradients; None: all are 1.
      shape: shape of the bags, such as (batch,): not an array.
      length: every bag has so many places, next to each other; None: they are ragged.

    >>> bag = Bag.from_lists([[7, 8], [], [7]])
    >>> bag.ids.tolist(), bag.segments.tolist(), bag.shape
    ([7, 8, 7], [0, 0, 2], (3,))
    """

    ids: Any
    segments: Any
    weights: Any = None
    shape: tuple[int, ...] = ()
    length: int | None = None

    @property
    def num_bags(self) -> int:
        """How many bags there are."""
        return math.prod(self.shape)

    @property
    def capacity(self) -> int:
        """How many places for ids there are, n."""
        return self.segments.shape[0]

    @classmethod
    def from_ragged(
        cls,
        values: Any,
        *,
        offsets: Any = None,
        lengths: Any = None,
        weights: Any = None,
        capacity: int | None = None,
    ) -> "Bag":
        """Bags of ids behind each other, with where each begins or how long each is.

        Args:
          values: ids [m] as look-ups take them, or `Keys`, or what `Keys.of` takes as text.
          offsets: where each bag begins in the values, and their end: [num_bags + 1], from 0 to m.
          lengths: or how many values are in each, [num_bags]. Exactly one of the two.
          weights: of the values, [m].
          capacity: places for ids; default: m. Batches of one capacity share a compiled program.

        Raises:
          ValueError: neither or both are given; offsets that do not begin with 0, fall, or do not
            end with m; lengths below 0, or that do not add up to m; more values than places.

        >>> bag = Bag.from_ragged([7, 8, 7], lengths=[2, 0, 1], capacity=4)
        >>> bag.segments.tolist()
        [0, 0, 2, 3]
        """
        ids = flat_ids(values)
        lengths = checked_lengths(offsets, lengths, len(ids))
        segments = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        if weights is not None:
            weights = as_weights(weights, ids.shape)
        return _padded_up(ids, segments, weights, len(lengths), capacity)

    @classmethod
    def from_lists(cls, lists: Any, *, weights: Any = None, capacity: int | None = None) -> "Bag":
        """Bags given as lists.

        Args:
          lists: a sequence of sequences of ids or of text, with None for an empty one; or a column
            of lists of Arrow or pandas.
          weights: their weights, in the same structure.
          capacity: see `from_ragged`.

        Raises:
          ValueError: an element is missing, the weights are of another structure; or as
            `from_ragged`.
        """
        values, lengths = unpacked(lists, "lists")
        if weights is not None:
            weights, of_weights = unpacked(weights, "weights")
            if not np.array_equal(lengths, of_weights):
                raise ValueError(
                    f"weights must be lists of the lengths of the ids', {short(lengths)}, got "
                    f"{short(of_weights)}."
                )
        return cls.from_ragged(values, lengths=lengths, weights=weights, capacity=capacity)

    @classmethod
    def from_padded(
        cls,
        values: Any,
        *,
        mask: Any = None,
        lengths: Any = None,
        padding_id: int | None = None,
        weights: Any = None,
    ) -> "Bag":
        """Bags of so many places each, of which not all are taken; also inside of `jax.jit`.

        Args:
          values: ids or `Keys` [*shape, length], NumPy or JAX.
          mask: which of the places are taken, bool [*shape, length].
          lengths: or how many of them are, from the first on, [*shape].
          padding_id: or the id that means none. At most one of the three; without any, all are.
          weights: [*shape, length].

        Raises:
          ValueError: values without an axis for the places, or shapes that do not fit.
        """
        ids = ids_of(values)
        if ids.ndim < 1:
            raise ValueError(f"values must have shape [*shape, length], got {ids.shape}.")
        *shape, length = ids.shape
        taken = taken_places(ids, mask, lengths, padding_id)
        bags = math.prod(shape)
        xp = np if isinstance(taken, np.ndarray) else jnp
        # Of an export there may be any number of bags: then it is no constant.
        of_all = np if isinstance(bags, int) else jnp
        number = of_all.broadcast_to(of_all.arange(bags, dtype=np.int32)[:, None], (bags, length))
        end = of_all.asarray(bags, dtype=np.int32)
        segments = xp.where(taken.reshape(-1), number.reshape(-1), end)
        if weights is not None:
            weights = as_weights(weights, ids.shape).reshape(-1)
        ids = zero_where(taken.reshape(-1), ids.reshape(-1))
        return cls(ids, segments, weights, tuple(shape), length)

    @classmethod
    def from_sparse(cls, matrix: Any, *, capacity: int | None = None) -> "Bag":
        """The rows of a sparse matrix [num_bags, num_embeddings] as bags with weights.

        Args:
          matrix: of `scipy.sparse`, of any format; or a BCOO of `jax.experimental.sparse`. Columns
            are ids, and the numbers there their weights.
          capacity: see `from_ragged`; a BCOO has its own.

        Raises:
          ValueError: it is none of these, or has other than two axes; or as `from_ragged`.
        """
        if hasattr(matrix, "tocsr"):
            rows = matrix.tocsr()
            return cls.from_ragged(
                rows.indices, offsets=rows.indptr, weights=rows.data, capacity=capacity
            )
        if hasattr(matrix, "to_bcoo"):
            matrix = matrix.to_bcoo()
        if type(matrix).__name__ != "BCOO" or matrix.ndim != 2 or matrix.n_sparse != 2:
            raise ValueError(
                "matrix must be sparse with two axes, of scipy.sparse or a BCOO of "
                f"jax.experimental.sparse, got {type(matrix).__name__}."
            )
        # Its own padding is past the end of both axes.
        bags, ids = matrix.indices[:, 0], matrix.indices[:, 1]
        taken = bags < matrix.shape[0]
        return cls(jnp.where(taken, ids, 0), bags, matrix.data, (matrix.shape[0],))

    @property
    def in_bag(self) -> Array:
        """Which places are in a bag, bool [n]."""
        return (self.segments >= 0) & (self.segments < self.num_bags)

    def ends(self) -> jax.Array:
        """The segments [n], with num_bags for every place of no bag."""
        return jnp.where(self.in_bag, self.segments, self.num_bags)

    def counts(self) -> jax.Array:
        """How many ids are in each bag, int32 [num_bags]."""
        if self.length is not None:
            return self.in_bag.reshape(self.num_bags, self.length).sum(axis=1)
        zeros = jnp.zeros(self.num_bags, jnp.int32)
        return zeros.at[self.ends()].add(1, mode="drop")

    def without_what_is_in_none(self) -> "Bag":
        """The same with id 0 in places of no bag, for which no policy has anything to say."""
        return dataclasses.replace(self, ids=zero_where(self.in_bag, self.ids))

    def without_ids(self) -> "Bag":
        """What pooling needs of it."""
        return dataclasses.replace(self, ids=None)

    def with_segments(self, segments: Array) -> "Bag":
        """The same ids in other bags."""
        return dataclasses.replace(self, segments=segments)

    @classmethod
    def together(cls, bags: Sequence["Bag"]) -> "Bag":
        """Sets of bags that are alike, behind each other, without their ids."""
        first = bags[0]
        end = len(bags) * first.num_bags
        segments = [
            jnp.where(bag.in_bag, bag.segments + number * bag.num_bags, end)
            for number, bag in enumerate(bags)
        ]
        weights = None if first.weights is None else jnp.concatenate([b.weights for b in bags])
        shape = (len(bags), *first.shape)
        return cls(None, jnp.concatenate(segments), weights, shape, first.length)

    def with_weights(self, weights: Array) -> "Bag":
        """The same ids with weights [n], such as learned ones.

        Raises:
          ValueError: weights of another shape.
        """
        weights = as_weights(weights, (self.capacity,))
        return dataclasses.replace(self, weights=weights)


def _padded_up(
    ids: Ids, segments: np.ndarray, weights: Any, num_bags: int, capacity: int | None
) -> Bag:
    """The bags with places up to the capacity."""
    n = len(segments)
    capacity = n if capacity is None else as_size("capacity", capacity, minimum=0)
    if n > capacity:
        raise ValueError(
            f"capacity must be at least the number of ids, {n}, got {capacity}: give more places, "
            "or smaller batches."
        )
    more = capacity - n
    if more:
        pad = functools.partial(jax.tree.map, lambda x: behind(x, more, 0))
        ids, weights = pad(ids), pad(weights)
        segments = behind(segments, more, num_bags)
    return Bag(ids, segments, weights, (num_bags,))
