"""The in-batch softmax: every row's item among the items of all rows of its batch.

With the score s(x, y) of a query and an item, the loss of row i is

    -log( exp(s(x_i, y_i) - log q_i) / sum_j exp(s(x_i, y_j) - log q_j) ),

the sum over the rows of the batch whose item is another one, and over i itself. Items come into a
batch as often as they are popular; q_j, how often item j does, takes that out again, as in sampled
softmax, so that the scores do not fall with it.

Where q is not known from counts it is estimated as the batches go by, as in algorithms 2 and 3 of
Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations" (RecSys
2019): moving averages of the steps that lie between two batches with the item, by hashed ids. An
item may be in a batch several times; so there is a moving average of that number too, and q is this
one divided by the other. The first times an average is the plain mean. Of several hashes the one
counts by which the item is rarest: in the others it shares its place with more frequent ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrhash.keys import Keys, scramble

_MASKED = -1e30


def same_items(items: Keys) -> jax.Array:
    """Items [batch] -> [batch, batch] bool, whether two rows have the same one."""
    return (items.hi[:, None] == items.hi[None]) & (items.lo[:, None] == items.lo[None])


def in_batch_losses(
    scores: jax.Array, log_q: jax.Array, same: jax.Array, weights: Any
) -> jax.Array:
    """The losses of a batch's rows.

    Args:
      scores: [batch, batch], of the query of row i and the item of row j.
      log_q: [batch], log of how often the item of row j comes into a batch.
      same: [batch, batch] bool, whether i and j have the same item.
      weights: [batch], 0 for a row that is no candidate.

    Returns:
      [batch]; of no meaning for a row of weight 0.
    """
    own = jnp.eye(len(weights), dtype=bool)
    is_negative = ~same & (weights > 0)[None]
    logits = jnp.where(is_negative | own, scores - log_q[None], _MASKED)
    return jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits)


class Frequencies(NamedTuple):
    """How often hashed items come into a batch, by what was met.

    Attributes:
      steps: [] int32, how many batches were met.
      last: [hashes, buckets] int32, the last of them with an item of this bucket, from 1; 0: none.
      visits: [hashes, buckets] int32, how many of them had one.
      gaps: [hashes, buckets] float32, moving average of the steps from one to the next.
      counts: [hashes, buckets] float32, moving average of how many such items there were in it.
    """

    steps: jax.Array
    last: jax.Array
    visits: jax.Array
    gaps: jax.Array
    counts: jax.Array

    @classmethod
    def create(cls, *, hashes: int = 2, buckets: int = 1 << 17) -> "Frequencies":
        """Of nothing met."""
        floats = np.zeros((hashes, buckets), np.float32)
        integers = floats.astype(np.int32)
        return cls(jnp.int32(0), *map(jnp.asarray, (integers, integers, floats, floats)))

    def met(self, items: Keys, weights: Any, *, rate: float = 0.05) -> "Frequencies":
        """After a batch of items [batch], of which those of weight 0 do not count.

        Args:
          items: what to hash.
          weights: [batch].
          rate: of the moving averages; of fewer than 1 / rate visits they are the plain mean.
        """
        hashes, buckets = self.last.shape
        steps = self.steps + 1
        columns = []
        for k in range(hashes):
            places = _places(items, k, buckets)
            found = (places[:, None] == places[None]).astype(jnp.float32) @ (weights > 0)
            last, visits, gaps, counts = (each[k][places] for each in self[1:])
            weight = jnp.maximum(rate, 1 / (visits + 1).astype(jnp.float32))
            gaps += weight * ((steps - last).astype(jnp.float32) - gaps)
            counts += weight * (found - counts)
            # Rows of one bucket write the same; those that do not count, nothing.
            to = jnp.where(weights > 0, places, buckets)
            new = (jnp.full_like(last, steps), visits + 1, gaps, counts)
            pairs = zip(self[1:], new, strict=True)
            columns.append([old[k].at[to].set(values, mode="drop") for old, values in pairs])
        return Frequencies(steps, *map(jnp.stack, zip(*columns, strict=True)))

    def log_q(self, items: Keys) -> jax.Array:
        """Items [batch] -> log of how many of each there are in a batch [batch].

        Of one that was not met: as if it were in the next batch, for the first time.
        """
        hashes, buckets = self.last.shape
        never = jnp.log(1.0 / (self.steps + 1).astype(jnp.float32))
        found = []
        for k in range(hashes):
            places = _places(items, k, buckets)
            gaps, counts = self.gaps[k][places], self.counts[k][places]
            is_met = self.last[k][places] > 0
            rate = jnp.where(is_met, counts / jnp.maximum(gaps, 1.0), 1.0)
            found.append(jnp.where(is_met, jnp.log(rate), never))
        return jnp.min(jnp.stack(found), axis=0)


def _places(items: Keys, number: int, buckets: int) -> jax.Array:
    """The bucket [batch] int32 of each item, by the hash of this number."""
    return (scramble(items, number + 1).lo % jnp.uint32(buckets)).astype(jnp.int32)
