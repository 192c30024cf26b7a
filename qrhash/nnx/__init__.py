"""The Flax NNX modules: hold the arrays of features and call the pure core.

The parameters are named as in `qrhash.linen`, whose docstring shows how either module takes
over the other's. `value_and_grad` and `Optimizer` stand where those of `flax.nnx` do, for training
whose cost goes by the batch and not by the tables:

    loss, grads = qrhash.nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)          # optimizer = qrhash.nnx.Optimizer(model, tx)
"""

from qrhash.nnx.gradients import Optimizer, grad, value_and_grad
from qrhash.nnx.modules import EmbedCollection, MultiHashEmbed
from qrhash.nnx.variables import Table, as_table, shardings

__all__ = [
    "EmbedCollection",
    "MultiHashEmbed",
    "Optimizer",
    "Table",
    "as_table",
    "grad",
    "shardings",
    "value_and_grad",
]
