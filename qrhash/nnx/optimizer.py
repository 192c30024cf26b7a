"""`Optimizer`: stands where that of `flax.nnx` does."""

from typing import Any

import jax
import optax
from flax import nnx

from qrhash.nnx.dynamic import DynamicEmbed
from qrhash.nnx.modules import EmbedCollection
from qrhash.nnx.variables import as_table, is_large, is_variable
from qrhash.optim import reset_rows, touched_rows
from qrhash.protocol import is_table


class Optimizer(nnx.Optimizer):
    """`nnx.Optimizer` that takes the gradients of `qrhash.nnx.value_and_grad`.

    For updates in place, donate the model and the optimizer to the compiled step:
    `nnx.jit(step, donate_argnames=("model", "optimizer"))`.

    Args:
      model: the module.
      tx: an optax transformation; `qrhash.touched_rows` is applied to it.
      wrt: filter of the variables to optimize, as given to `value_and_grad`.

    >>> from qrhash import EmbedConfig, QuotientRemainder
    >>> from qrhash.nnx import MultiHashEmbed, value_and_grad
    >>> model = MultiHashEmbed(EmbedConfig(QuotientRemainder(100_000, 4), 8), rngs=nnx.Rngs(0))
    >>> optimizer = Optimizer(model, optax.adagrad(0.05, initial_accumulator_value=1e-8))
    >>> ids = jax.numpy.array([1, 2, 99_999])
    >>> loss, grads = value_and_grad(lambda model: (model(ids) ** 2).sum())(model)
    >>> grads.table_0.get_value().indices.tolist()
    [0, 0, 24999]
    >>> updates = optimizer.update(model, grads)
    """

    def __init__(
        self, model: Any, tx: optax.GradientTransformation, *, wrt: Any = nnx.Param
    ) -> None:
        for path, node in nnx.iter_graph(model):
            if is_large(path, node) and is_table(table := as_table(node)):
                table.warn_if_elsewhere()
        super().__init__(model, touched_rows(tx), wrt=wrt)

    def reset_rows(self, model: Any, embed: DynamicEmbed | EmbedCollection, found: Any) -> None:
        """The state of rows that keys have just got is as at the start; see `qrhash.reset_rows`.

        Call it after `embed.assign` and before the step: a row that was another key's must not keep
        the moments of that.

        Args:
          model: the module that is optimized.
          embed: one of its `DynamicEmbed`s or `EmbedCollection`s, or itself.
          found: what `embed.assign` has given.

        Raises:
          ValueError: `embed` is not in the model; or as `qrhash.reset_rows`.
        """
        here = [path for path, node in nnx.iter_graph(model) if node is embed]
        if not here:
            raise ValueError(
                "embed must be a DynamicEmbed of the model, or an EmbedCollection, got one that is "
                "not in it."
            )
        named = {(*here[0], name): numbers for name, numbers in embed.new_rows(found).items()}
        state = nnx.state(model, self.wrt, graph=self.graph)
        params = jax.tree.map(as_table, state, is_leaf=is_variable)
        rows = {path: named.get(path) for path, _ in nnx.to_flat_state(state)}
        of_optimizer = nnx.as_pure(self.opt_state)
        new = reset_rows(self.tx, of_optimizer, params, nnx.from_flat_state(rows))
        nnx.update(self.opt_state, nnx.state(new, graph=self.graph))
