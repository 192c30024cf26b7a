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
from qrhash.types import PyTree


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
        here = path_in(model, embed)
        if here is None:
            raise ValueError(
                "embed must be a DynamicEmbed of the model, or an EmbedCollection, got one that is "
                "not in it."
            )
        named = {(*here, name): numbers for name, numbers in embed.new_rows(found).items()}
        state = nnx.state(model, self.wrt, graph=self.graph)
        rows = {path: named.get(path) for path, _ in nnx.to_flat_state(state)}
        params, opt_state = self.as_arrays(model)
        self.take_over(reset_rows(self.tx, opt_state, params, nnx.from_flat_state(rows)))

    def as_arrays(self, model: Any) -> tuple[PyTree, PyTree]:
        """The parameters optimized and the optimizer's state, as trees without variables.

        Args:
          model: the module that is optimized.
        """
        state = nnx.state(model, self.wrt, graph=self.graph)
        return jax.tree.map(as_table, state, is_leaf=is_variable), nnx.as_pure(self.opt_state)

    def take_over(self, opt_state: PyTree) -> None:
        """Holds the arrays of a state as `as_arrays` gives it."""
        nnx.update(self.opt_state, nnx.state(opt_state, graph=self.graph))


def path_in(model: Any, module: Any) -> tuple[Any, ...] | None:
    """Where in a model a module is: () if it is the model itself, None if it is not in it."""
    return next((path for path, node in nnx.iter_graph(model) if node is module), None)
