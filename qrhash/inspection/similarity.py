"""How vectors compare: their lengths, the nearest ones of an id, and those that are nearly equal.

The vectors come from whatever gives them for ids: a Flax module, or
`functools.partial(qrhash.lookup, tables, config=config)`. They are looked up block by block, and
never all kept but for `near_twins`, which compares each with each.
"""

from typing import Any, NamedTuple

import numpy as np

from qrhash.inspection.blocks import (
    Vectors,
    block_size,
    checked_counts,
    num_ids,
    taken,
    vector_blocks,
)

# Two vectors are near twins if their distance is at most this share of the longer one's length.
CLOSENESS = 0.1

_AT_ONCE = 1024  # vectors that are compared with as many others
_ROUNDING = 1e-12  # squared distances below it are none
_TINY = float(np.finfo(np.float64).tiny)


class Neighbours(NamedTuple):
    """The ids whose vectors point the same way, the nearest first.

    Attributes:
      places: where they are among the ids, int64 [m].
      cosines: of the angle between their vector and the one asked for, float64 [m].
    """

    places: np.ndarray
    cosines: np.ndarray


class Pair(NamedTuple):
    """Two ids with nearly the same vector.

    Attributes:
      first, second: their places among the ids.
      distance: between their vectors, as a share of the longer one's length.
      cosine: of the angle between them; nan for vectors of zeros.
    """

    first: int
    second: int
    distance: float
    cosine: float


class NearTwins(NamedTuple):
    """Ids with nearly the same vector as another one.

    Attributes:
      num_ids: how many ids were compared, each with each.
      num_near: how many of them have a near twin.
      num_pairs: how many pairs there are.
      share: share of all counts that is of ids with a near twin.
      pairs: the nearest pairs.
    """

    num_ids: int
    num_near: int
    num_pairs: int
    share: float
    pairs: tuple[Pair, ...]


def norms(vectors: Vectors, ids: Any) -> np.ndarray:
    """The Euclidean lengths of the vectors of ids.

    Args:
      vectors: a function of ids [m] that gives their vectors [m, features], or, for operation
        "features", [m, k, features]; see the module.
      ids: the ids [n], or `Keys` [n], or a number n, for all ids below it.

    Returns:
      float32 [n].

    >>> norms(lambda ids: np.stack([ids, 0 * ids], axis=1), 3).tolist()
    [0.0, 1.0, 2.0]
    """
    found = np.zeros(num_ids(ids), np.float32)
    for part, block in vector_blocks(vectors, ids):
        found[part] = np.linalg.norm(block, axis=1)
    return found


def neighbours(vectors: Vectors, ids: Any, of: Any, *, top: int = 10) -> Neighbours:
    """The ids whose vectors have the greatest cosine with one.

    Args:
      vectors: see `norms`.
      ids: where to look: ids [n], or `Keys` [n], or a number n, for all ids below it.
      of: the place of an id among these, which is left out itself; or a vector [features].
      top: how many to find.

    Raises:
      ValueError: there is no such place.

    >>> angles = np.array([0.0, 3.0, 0.1, 1.5])
    >>> circle = lambda ids: np.stack([np.cos(angles[ids]), np.sin(angles[ids])], axis=1)
    >>> neighbours(circle, 4, of=0, top=2).places.tolist()
    [2, 3]
    """
    n, itself = num_ids(ids), -1
    if isinstance(of, (int, np.integer)):
        if not 0 <= of < n:
            raise ValueError(f"of must be a place from 0 to {n - 1}, got {of}.")
        itself = int(of)
        of = np.asarray(vectors(taken(ids, np.full(block_size(n), itself))))[0]
    query = np.asarray(of, np.float64).reshape(-1)
    query = query / max(_TINY, float(np.linalg.norm(query)))
    places, cosines = np.zeros(0, np.int64), np.zeros(0)
    for part, block in vector_blocks(vectors, ids):
        of_block = block @ query / np.maximum(_TINY, np.linalg.norm(block.astype(float), axis=1))
        some = np.arange(part.start, part.stop)
        places = np.concatenate([places, some[some != itself]])
        cosines = np.concatenate([cosines, of_block[some != itself]])
        nearest = np.argsort(-cosines, kind="stable")[:top]
        places, cosines = places[nearest], cosines[nearest]
    return Neighbours(places, cosines)


def near_twins(
    vectors: Vectors,
    ids: Any,
    counts: Any = None,
    *,
    closeness: float = CLOSENESS,
    named: int = 10,
) -> NearTwins:
    """The ids whose vectors are nearly equal: found exactly, by comparing each with each.

    Two are if their distance is at most `closeness` times the length of the longer one. Vectors of
    zeros are near twins of each other, and so are twins. It takes n**2 / 2 comparisons at most, of
    which a million are made at once; 10,000 ids take a second or two.

    Args:
      vectors: see `norms`.
      ids: which ids to compare: distinct ones [n], or `Keys` [n], or a number n, for all below it.
      counts: how often each is met, [n]; None: all alike.
      closeness: above 0, at most 1.
      named: how many pairs to name.

    Raises:
      ValueError: an argument breaks its rule.

    >>> rows = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.05], [0.0, 9.0]])
    >>> found = near_twins(lambda ids: rows[ids], 4)
    >>> found.num_near, [pair[:2] for pair in found.pairs]
    (2, [(0, 2)])
    """
    n = num_ids(ids)
    met = checked_counts(counts, n)
    if not 0 < closeness <= 1:
        raise ValueError(f"closeness must be above 0 and at most 1, got {closeness!r}.")
    blocks = [block for _, block in vector_blocks(vectors, ids)]
    found = np.concatenate(blocks).astype(np.float64) if blocks else np.zeros((0, 1))
    # By length: the second of two is the longer one, and those much longer need no comparison.
    order = np.argsort(np.linalg.norm(found, axis=1), kind="stable")
    ordered = found[order]
    squares = np.einsum("ij,ij->i", ordered, ordered)
    is_near, num_pairs = np.zeros(n, bool), 0
    best, nearest = np.zeros((0, 2), np.int64), np.zeros(0)
    for i in range(0, n, _AT_ONCE):
        for j in range(i, n, _AT_ONCE):
            a, b = slice(i, i + _AT_ONCE), slice(j, j + _AT_ONCE)
            if squares[a][-1] < (1 - closeness) ** 2 * squares[j] * (1 - _ROUNDING):
                break
            # |a - b|**2 <= closeness**2 * |b|**2
            least = squares[a, None] / 2 + squares[None, b] * ((1 - closeness**2) / 2)
            products = ordered[a] @ ordered[b].T
            at = np.nonzero(np.triu(products >= least, 1) if i == j else products >= least)
            if not len(at[0]):
                continue
            num_pairs += len(at[0])
            is_near[order[a][at[0]]] = is_near[order[b][at[1]]] = True
            between = squares[a][at[0]] + squares[b][at[1]] - 2 * products[at]
            ratios = np.maximum(between, 0) / np.maximum(_TINY, squares[b][at[1]])
            ratios[ratios < _ROUNDING] = 0
            few = np.argsort(ratios, kind="stable")[:named]
            pairs = np.stack([order[a][at[0][few]], order[b][at[1][few]]], axis=1)
            best = np.concatenate([best, np.sort(pairs, axis=1)])
            nearest = np.concatenate([nearest, ratios[few]])
            kept = np.lexsort((best[:, 1], best[:, 0], nearest))[:named]
            best, nearest = best[kept], nearest[kept]
    share = met[is_near].sum() / max(met.sum(), _TINY)
    pairs_found = tuple(_pair(found, int(a), int(b)) for a, b in best)
    return NearTwins(n, int(is_near.sum()), num_pairs, float(share), pairs_found)


def _pair(vectors: np.ndarray, first: int, second: int) -> Pair:
    """Two vectors, compared exactly."""
    a, b = vectors[first], vectors[second]
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    distance = float(np.linalg.norm(a - b)) / max(_TINY, *lengths)
    product = lengths[0] * lengths[1]
    return Pair(first, second, distance, float(a @ b) / product if product else float("nan"))
