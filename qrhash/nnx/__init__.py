"""The Flax NNX modules: hold the arrays of features and call the pure core.

The parameters are named as in `qrhash.linen`, whose docstring shows how either module takes
over the other's. `value_and_grad` and `Optimizer` stand where those of `flax.nnx` do, for training
whose cost goes by the batch and not by the tables:

    loss, grads = qrhash.nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)          # optimizer = qrhash.nnx.Optimizer(model, tx)

A `DynamicEmbed` gives rows to keys before these two lines:

    found = model.embed.assign(keys, step)
    optimizer.reset_rows(model, model.embed, found)

So does an `EmbedCollection` with dynamic features.
"""

from qrhash.nnx.dynamic import DynamicEmbed
from qrhash.nnx.gradients import grad, value_and_grad
from qrhash.nnx.modules import EmbedCollection, MultiHashEmbed
from qrhash.nnx.optimizer import Optimizer
from qrhash.nnx.variables import KeyState, Table, as_table, shardings

__all__ = [
    "DynamicEmbed",
    "EmbedCollection",
    "KeyState",
    "MultiHashEmbed",
    "Optimizer",
    "Table",
    "as_table",
    "grad",
    "shardings",
    "value_and_grad",
]
