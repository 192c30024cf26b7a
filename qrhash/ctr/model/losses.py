"""What a training makes less of: the loss of clicks, and that of retrieval."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qrhash.ctr.data.pipeline import Batch
from qrhash.ctr.model.softmax import Frequencies, in_batch_losses, same_items


class Objective(Protocol):
    """A loss, and what it keeps from step to step beside the parameters."""

    def init(self) -> Any:
        """What it keeps, a tree of arrays; None: nothing."""
        ...

    def __call__(self, model: Any, batch: Batch, state: Any) -> tuple[jax.Array, jax.Array, Any]:
        """A batch -> its losses [batch], what a step is to give [batch], and what to keep next."""
        ...


class ClickLoss:
    """The log loss of clicks; a step gives their logits."""

    def init(self) -> None:
        """Nothing."""

    def __call__(self, model: Any, batch: Batch, state: Any) -> tuple[jax.Array, jax.Array, Any]:
        """See `Objective`."""
        logits = model(batch.numbers, batch.ids, batch.keys, batch.lists, batch.found)
        return optax.sigmoid_binary_cross_entropy(logits, batch.labels), logits, state


class InBatchSoftmax:
    """The in-batch softmax of a `TwoTower`; a step gives the losses.

    Args:
      counts: how many training rows each id of the items has, [ids], where one column with ids is
        the item: its frequency. None: it is estimated as the batches go by.
    """

    def __init__(self, counts: np.ndarray | None = None) -> None:
        self._counts = counts

    def init(self) -> Any:
        """The log of the frequencies [ids], which stays as it is, or `Frequencies`."""
        if self._counts is None:
            return Frequencies.create()
        return jnp.log(jnp.maximum(jnp.asarray(self._counts, jnp.float32), 1.0))

    def __call__(self, model: Any, batch: Batch, state: Any) -> tuple[jax.Array, jax.Array, Any]:
        """See `Objective`."""
        if isinstance(state, Frequencies):
            items = model.item_columns.named(batch.ids, batch.keys, batch.lists)
            state = state.met(items, batch.weights)
        _, losses = self.judge(model, batch, state)
        return losses, losses, state

    def judge(self, model: Any, batch: Batch, state: Any) -> tuple[jax.Array, jax.Array]:
        """A batch -> the vectors of its queries [batch, width], and its losses [batch]."""
        inputs = (batch.numbers, batch.ids, batch.keys, batch.lists, batch.found)
        queries, items = model.pair(*inputs)
        columns = (batch.ids, batch.keys, batch.lists)
        named = model.item_columns.named(*columns)
        if isinstance(state, Frequencies):
            log_q = state.log_q(named)
        else:
            log_q = state[model.item_columns.own(*columns)[0][:, 0]]
        losses = in_batch_losses(queries @ items.T, log_q, same_items(named), batch.weights)
        return queries, losses
