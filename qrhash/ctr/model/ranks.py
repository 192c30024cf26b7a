"""Retrieval, judged: at which place among all items the one that was wanted comes.

Exact, and in bounded memory: of some queries and all items, block by block, products are made and
only counted. Items of one score share their mean rank, as clicks do in the AUC: where all score
alike the place is that of chance.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

POPULAR = "the most popular items"


class Retrieved(NamedTuple):
    """How well items were found; nan where it is not defined.

    Attributes:
      log_loss: mean loss of the in-batch softmax.
      recall: k -> share of the rows whose item is among the first k.
      mrr: mean of 1 / rank.
      unseen: share of the rows whose item is none of those to choose from: a miss.
      rows: how many rows.
    """

    log_loss: float
    recall: dict[int, float]
    mrr: float
    unseen: float
    rows: int

    @property
    def baseline(self) -> str:
        """What the baseline of such scores is, in words."""
        return POPULAR

    def named(self) -> dict[str, float]:
        """The scores, by the names that records have; the loss alone, if no items were ranked."""
        if not self.recall:
            return {"log_loss": self.log_loss}
        recalls = {f"recall_{k}": value for k, value in self.recall.items()}
        return {"log_loss": self.log_loss, **recalls, "mrr": self.mrr, "unseen": self.unseen}

    @property
    def titles(self) -> dict[str, str]:
        """The names of the scores that a reader is shown -> what to call them."""
        recalls = {f"recall_{k}": f"recall at {k:,}" for k in self.recall}
        return {"log_loss": "in-batch loss", **recalls, "mrr": "mean reciprocal rank"}


def retrieved(ranks: np.ndarray, recall_at: Sequence[int], log_loss: float = math.nan) -> Retrieved:
    """The scores of ranks [rows], from 1, that of an item which is not there being infinite.

    >>> retrieved(np.array([1.0, 4.0, np.inf, np.inf]), (1, 5))[1:]
    ({1: 0.25, 5: 0.5}, 0.3125, 0.5, 4)
    """
    if not len(ranks):
        return Retrieved(log_loss, dict.fromkeys(recall_at, math.nan), math.nan, math.nan, 0)
    recall = {k: float(np.mean(ranks <= k)) for k in recall_at}
    unseen = float(np.mean(np.isinf(ranks)))
    return Retrieved(log_loss, recall, float(np.mean(1 / ranks)), unseen, len(ranks))


def ranks(
    queries: np.ndarray, items: Iterable[np.ndarray], wanted: np.ndarray, num_items: int
) -> np.ndarray:
    """The ranks of the items wanted.

    Args:
      queries: [rows, width].
      items: blocks of vectors [n, width] of the items, all of the same n; can be gone through
        twice. What is beyond `num_items` counts nothing.
      wanted: [rows], which item each query is to find; -1 for one that is not there.
      num_items: how many there are.

    Returns:
      [rows] float64: 1 + the number of items of a higher score + half of the others of the same.
    """
    # The score of the wanted item out of the same product as all others: it ties with its equals.
    own = np.zeros(len(queries), np.float32)
    for first, block in _numbered(items):
        is_here = (wanted >= first) & (wanted < first + len(block))
        if is_here.any():
            places = np.where(is_here, wanted - first, 0)
            own = np.where(is_here, np.asarray(_taken(_products(queries, block), places)), own)
    above, equal = np.zeros(len(queries), np.int64), np.zeros(len(queries), np.int64)
    for first, block in _numbered(items):
        more, same = _counts(_products(queries, block), own, num_items - first)
        above += np.asarray(more)
        equal += np.asarray(same)
    found = 1 + above + np.maximum(equal - 1, 0) / 2
    return np.where(wanted < 0, np.inf, found)


def popularity_ranks(counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The ranks [rows] of the items wanted, by how often each was met, counts [items]."""
    rising = np.sort(counts)
    own = counts[wanted.clip(min=0)]
    up_to = np.searchsorted(rising, own, side="right")
    equal = up_to - np.searchsorted(rising, own, side="left")
    found = 1 + len(counts) - up_to + (equal - 1) / 2
    return np.where(wanted < 0, np.inf, found)


def _numbered(blocks: Iterable[np.ndarray]) -> Iterable[tuple[int, np.ndarray]]:
    """Blocks, with the number of each one's first row."""
    first = 0
    for block in blocks:
        yield first, block
        first += len(block)


# A function of its own: the scores of both passes are the same to the last bit.
@jax.jit
def _products(queries: jax.Array, block: jax.Array) -> jax.Array:
    return jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _taken(scores: jax.Array, places: jax.Array) -> jax.Array:
    return jnp.take_along_axis(scores, places[:, None], axis=1)[:, 0]


@jax.jit
def _counts(scores: jax.Array, own: jax.Array, num_items: int) -> tuple[jax.Array, jax.Array]:
    """How many of the first `num_items` scores [rows, n] are above each row's own, and at it."""
    is_item = (jnp.arange(scores.shape[1]) < num_items)[None]
    above, equal = scores > own[:, None], scores == own[:, None]
    return jnp.sum(above & is_item, axis=1), jnp.sum(equal & is_item, axis=1)
