"""Parameters, optimizers and the compiled step.

The model is split once into its structure and two groups of parameters; a step is a pure
function of them. Its cost goes by the batch: large tables are differentiated and updated by the
rows touched, unless `settings.dense_updates`. Tables learn by Adagrad. With a mean loss the
squared gradients of a row are near 1e-8, hence the tiny initial accumulator: the usual 0.1 would
freeze the tables. All other parameters learn by Adam, at a rate that falls linearly to zero: the
noise of the last batches then averages out.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qrhash import MeshLayout, apply_updates, touched_rows, value_and_grad
from qrhash.batches import process_rows, put_batch
from qrhash.checkpoint import Checkpoints, Restored
from qrhash.ctr.data.pipeline import Batch
from qrhash.ctr.model.losses import ClickLoss, Objective
from qrhash.ctr.settings import Settings
from qrhash.nnx import Table, as_table, shardings


class Learner:
    """A model in training.

    Args:
      build: makes the model, which takes numbers [batch, N], ids and keys [batch, columns] and
        lists, and gives logits [batch].
      settings: learning rates and the initial accumulator.
      objective: what to make less of; by default the log loss of clicks.
      num_steps: how many steps there will be: Adam's learning rate falls to zero over them.
      layout: how large tables and the batch are split over devices.

    Attributes:
      params: {"tables": tables, "dense": all other parameters}.
      steps: how many steps were taken.
    """

    def __init__(
        self,
        build: Callable[[], nnx.Module],
        settings: Settings,
        *,
        objective: Objective | None = None,
        num_steps: int,
        layout: MeshLayout | None = None,
    ) -> None:
        graph, *shapes = nnx.split(nnx.eval_shape(build), Table, ...)
        places = None if layout is None else tuple(shardings(each, layout) for each in shapes)
        create = jax.jit(lambda: tuple(nnx.split(build(), Table, ...)[1:]), out_shardings=places)
        tables, dense = create()
        groups = {"tables": "tables", "dense": "dense"}
        optimizer = touched_rows(
            optax.partition(
                {
                    "tables": optax.adagrad(
                        settings.table_lr, initial_accumulator_value=settings.table_accumulator
                    ),
                    "dense": optax.adam(optax.linear_schedule(settings.dense_lr, 0.0, num_steps)),
                },
                groups,
            )
        )
        large: dict[str, Any] = {"tables": False, "dense": False}
        if not settings.dense_updates:
            large["tables"] = nnx.map_state(lambda _, table: table.replace(table.is_large), tables)
        self.params: dict[str, Any] = {"tables": tables, "dense": dense}
        self.steps = 0
        self._state = optimizer.init(self.params)
        self._graph, self._layout = graph, layout
        everywhere = None if layout is None else NamedSharding(layout.mesh, PartitionSpec())
        self._everywhere = everywhere
        objective = objective or ClickLoss()
        self._kept = jax.jit(objective.init, out_shardings=everywhere)()

        def loss(params: dict[str, Any], batch: Batch, kept: Any) -> tuple[jax.Array, Any]:
            losses, outputs, kept = objective(self._model(params), batch, kept)
            weights = batch.weights
            if batch.importance is not None:
                weights = weights * batch.importance
            # Of a batch whose rows all count nothing, the loss is zero.
            total = jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)
            return jnp.sum(losses * weights) / total, (outputs, kept)

        loss_and_gradients = value_and_grad(loss, large, has_aux=True)

        def step(params: Any, state: Any, kept: Any, batch: Batch) -> tuple[Any, ...]:
            (_, (outputs, kept)), gradients = loss_and_gradients(params, batch, kept)
            updates, state = optimizer.update(gradients, state, params)
            return apply_updates(params, updates), state, kept, outputs

        to = None
        if layout is not None:
            of_state = jax.tree.map(lambda array: array.sharding, (self.params, self._state))
            to = (*of_state, everywhere, everywhere)
        self._step = jax.jit(step, donate_argnums=(0, 1, 2), out_shardings=to)
        self._logits = self.compiled(
            lambda model, batch, _: model(batch.numbers, batch.ids, batch.keys, batch.lists)
        )

    def step(self, batch: Batch) -> jax.Array:
        """Learns from a batch; returns what the objective gives, [batch]: logits, from before."""
        self.params, self._state, self._kept, outputs = self._step(
            self.params, self._state, self._kept, self._on_devices(batch)
        )
        self.steps += 1
        return outputs

    def logits(self, batch: Batch) -> jax.Array:
        """The logits [batch] of a batch."""
        return self._logits(batch)

    def compiled(self, function: Callable[[Any, Any, Any], Any]) -> Callable[[Any], Any]:
        """A function of the model as it is, made of a pure one.

        Args:
          function: of the model, a tree of arrays [rows, ...], and what the objective keeps.

        Returns:
          The compiled function of such a tree; what it gives is whole on every device.
        """

        def run(params: Any, kept: Any, inputs: Any) -> Any:
            return function(self._model(params), inputs, kept)

        jitted = jax.jit(run, out_shardings=self._everywhere)
        return lambda inputs: jitted(self.params, self._kept, self._on_devices(inputs))

    def _model(self, params: dict[str, Any]) -> Any:
        return nnx.merge(self._graph, *params.values())

    def save(self, checkpoints: Checkpoints, extra: Any) -> None:
        """Saves parameters, optimizer state and number of steps, and what is given beside them."""
        checkpoints.save(self.steps, self._all, extra)

    def restore(self, checkpoints: Checkpoints) -> Restored:
        """Takes over the last checkpoint that can be read."""
        like = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding),
            self._all,
        )
        jax.tree.map(lambda array: array.delete(), self._all)
        restored = checkpoints.restore(like)
        (self.params, self._state, *kept), self.steps = restored.state, restored.step
        self._kept = kept[0] if kept else None
        return restored

    @property
    def _all(self) -> tuple[Any, ...]:
        """All that changes."""
        kept = () if self._kept is None else (self._kept,)
        return (self.params, self._state, *kept)

    def _on_devices(self, batch: Any) -> Any:
        """A tree of arrays [rows, ...], split over the mesh if any: of a process its own rows."""
        if self._layout is None:
            return batch
        size = len(jax.tree.leaves(batch)[0])
        mine = process_rows(size, self._layout)
        return put_batch(jax.tree.map(lambda column: column[mine], batch), size, self._layout)

    @property
    def num_params(self) -> int:
        """Parameters in all."""
        variables = jax.tree.leaves(
            self.params, is_leaf=lambda node: isinstance(node, nnx.Variable)
        )
        return sum(math.prod(as_table(variable).shape) for variable in variables)
