"""Parameters, optimizers and the compiled step.

The model is split once into its structure and two groups of parameters; a step is a pure
function of them, and of which key has which row. Its cost goes by the batch: large tables are
differentiated and updated by the rows touched, unless `settings.dense_updates`. Where tables grow,
the new keys of a batch get their rows first, and from time to time rows are taken back.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qrhash import MeshLayout, apply_updates, value_and_grad
from qrhash.batches import process_rows, put_batch
from qrhash.checkpoint import Checkpoints, Restored
from qrhash.ctr.data.pipeline import Batch
from qrhash.ctr.model.growing import Counts
from qrhash.ctr.model.losses import ClickLoss, Objective
from qrhash.ctr.run.growth import Growth, assign_rows, reset
from qrhash.ctr.run.optimizers import make_optimizer
from qrhash.ctr.run.stored import StoredRows
from qrhash.ctr.settings import Settings
from qrhash.dynamic import DynamicConfig
from qrhash.nnx import KeyState, Table, as_table, shardings

# What of a model is trained by rows, what says which key has which row, and what is dense.
_GROUPS = (Table, KeyState, ...)

# From one time the counts of keys come to the host to the next, at most: they are of 32 bits.
_STEPS_COUNTED, _ROWS_COUNTED = 100, 2**22


class Learner:
    """A model in training.

    Args:
      build: makes the model, which takes numbers [batch, N], ids and keys [batch, columns] and
        lists, and gives logits [batch].
      settings: learning rates and the initial accumulator.
      objective: what to make less of; by default the log loss of clicks.
      num_steps: how many steps there will be: Adam's learning rate falls to zero over them.
      layout: how large tables and the batch are split over devices.
      stored: the config of the table that grows, if its rows are in a store: the model that `build`
        makes has those on the device.
      to_restore: whether a checkpoint is to be restored: nothing is drawn, and all is zeros before.

    Attributes:
      params: {"tables": tables, "dense": all other parameters}.
      steps: how many steps were taken.
      growth: what became of the keys of tables that grow, when they were counted last.
    """

    def __init__(
        self,
        build: Callable[[], nnx.Module],
        settings: Settings,
        *,
        objective: Objective | None = None,
        num_steps: int,
        layout: MeshLayout | None = None,
        stored: DynamicConfig | None = None,
        to_restore: bool = False,
    ) -> None:
        abstract: Any = nnx.eval_shape(build)
        self._graph, *shapes = nnx.split(abstract, *_GROUPS)
        places = None if layout is None else tuple(shardings(each, layout) for each in shapes)

        def create() -> tuple[Any, ...]:
            if not to_restore:
                return _groups_of(build())
            return jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), tuple(shapes))

        tables, self._keys, dense = jax.jit(create, out_shardings=places)()
        self._objective = objective or ClickLoss()
        self._optimizer = optimizer = make_optimizer(tables, settings, num_steps)
        large: dict[str, Any] = {"tables": False, "dense": False}
        if not settings.dense_updates:
            large["tables"] = nnx.map_state(lambda _, table: table.replace(table.is_large), tables)
        self._loss_and_gradients = value_and_grad(self._loss, large, has_aux=True)
        self.params: dict[str, Any] = {"tables": tables, "dense": dense}
        self.steps = 0
        self._state = optimizer.init(self.params)
        self._layout = layout
        everywhere = None if layout is None else NamedSharding(layout.mesh, PartitionSpec())
        self._everywhere = everywhere
        self._kept = jax.jit(self._objective.init, out_shardings=everywhere)()
        self._stored: StoredRows | None = None
        self._read_whole: Callable[[Checkpoints, int], Any] | None = None
        if stored is None:
            growing = [each.table.config for each in abstract.growing]
        else:
            growing = [stored]
            self._stored = StoredRows(stored, abstract, self.params, optimizer, settings)
        self.growth = Growth(growing)
        self._evict_every = settings.evict_every
        self._count_every = max(1, min(_STEPS_COUNTED, _ROWS_COUNTED // settings.batch_size))
        self._counts = jax.device_put(self.growth.nothing(), everywhere)
        to: Any = (None, None)
        if layout is not None:
            carried = (self.params, self._state, self._keys)
            of_carried = jax.tree.map(lambda array: array.sharding, carried)
            to = ((*of_carried, *[everywhere] * 3), (of_carried[2], everywhere))
        self._step = jax.jit(self._stepped, donate_argnums=(0, 1, 2, 3, 4), out_shardings=to[0])
        self._evict = jax.jit(self._evicted, donate_argnums=(1, 2), out_shardings=to[1])
        self._logits = self.compiled(lambda model, batch, _: _logits_of(model, batch))

    def _loss(self, params: Any, keys: Any, kept: Any, batch: Batch) -> tuple[jax.Array, Any]:
        """The loss of a batch; what the objective gives and keeps."""
        losses, outputs, kept = self._objective(self._model(params, keys), batch, kept)
        weights = batch.weights
        if batch.importance is not None:
            weights = weights * batch.importance
        # Of a batch whose rows all count nothing, the loss is zero.
        total = jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)
        return jnp.sum(losses * weights) / total, (outputs, kept)

    def _stepped(
        self, params: Any, state: Any, keys: Any, kept: Any, counts: Any, batch: Any, number: Any
    ) -> tuple[Any, ...]:
        if self.growth.capacity:
            model = self._model(params, keys)
            batch, of_batch, new = assign_rows(model, batch, number)
            tables, keys = _groups_of(model)[:2]
            params = params | {"tables": tables}
            state = reset(self._optimizer, state, params, new)
            counts = jax.tree.map(jnp.add, counts, of_batch)
        (_, (outputs, kept)), gradients = self._loss_and_gradients(params, keys, kept, batch)
        updates, state = self._optimizer.update(gradients, state, params)
        return apply_updates(params, updates), state, keys, kept, counts, outputs

    def _evicted(self, params: Any, keys: Any, counts: Counts, number: Any) -> tuple[Any, Counts]:
        model = self._model(params, keys)
        evicted = jnp.stack([each.table.evict(number) for each in model.growing])
        keys = _groups_of(model)[1]
        return keys, counts._replace(evicted=counts.evicted + evicted)

    def ahead(self, batches: Any, is_stop: Callable[[Batch], bool]) -> Iterator[Batch]:
        """The batches of the training, each when it can be learnt from.

        Args:
          batches: of the pipeline.
          is_stop: whether somebody asks for scores, or saves, after a batch: behind it none is
            taken from the pipeline before the next one is asked for. Asked of each in their order.
        """
        if self._stored is None:
            return iter(batches)
        steps = itertools.count(self.steps + 1)

        def is_last(batch: Batch) -> bool:
            is_due = next(steps) % self._evict_every == 0
            return is_stop(batch) or is_due

        return self._stored.ahead(iter(batches), is_last, self._swap)

    def _swap(self, swap: Callable[..., Any]) -> None:
        self.params, self._state = swap(self.params, self._state)

    def step(self, batch: Batch) -> jax.Array:
        """Learns from a batch; returns what the objective gives, [batch]: logits, from before."""
        carried = (self.params, self._state, self._keys, self._kept, self._counts)
        *carried, outputs = self._step(*carried, self._on_devices(batch), np.int32(self.steps))
        self.params, self._state, self._keys, self._kept, self._counts = carried
        self.steps += 1
        if self.growth.capacity and self.steps % self._evict_every == 0:
            self._take_rows_back()
        if self.steps % self._count_every == 0:
            self.count_keys()
        return outputs

    def _take_rows_back(self) -> None:
        """Evicts keys."""
        if self._stored is None:
            number = np.int32(self.steps)
            self._keys, self._counts = self._evict(self.params, self._keys, self._counts, number)
        else:
            evicted = self._counts.evicted + self._stored.evict()
            self._counts = self._counts._replace(evicted=evicted)

    def count_keys(self) -> None:
        """Brings `growth` up to now; of several processes all call it, after the same step."""
        if self.growth.capacity:
            self.growth.add(self._counts, self._num_keys())
            self._counts = jax.device_put(self.growth.nothing(), self._everywhere)

    def _num_keys(self) -> int:
        if self._stored is not None:
            return self._stored.num_keys
        states = [each.get_value() for _, each in nnx.to_flat_state(self._keys)]
        return sum(int(state.index.num_keys) for state in states)

    @property
    def note(self) -> str:
        """What there is to say of tables that grow, in words."""
        of_store = "" if self._stored is None else self._stored.note
        return "  ".join(filter(None, (self.growth.note, of_store)))

    @property
    def store(self) -> dict[str, Any] | None:
        """What went between store and device, as JSON can hold it; None without a store."""
        return None if self._stored is None else self._stored.as_dict()

    def logits(self, batch: Batch) -> jax.Array:
        """The logits [batch] of a batch."""
        if self._stored is not None:
            batch, swap = self._stored.look(batch)
            self._swap(swap)
        return self._logits(batch)

    @property
    def scoring(self) -> tuple[Callable[[Any, Batch], jax.Array], Any]:
        """The logits as a pure function of weights and a batch, and the weights as they are.

        The function holds nothing of the learner's arrays.
        """
        graph = self._graph

        def logits(weights: Any, batch: Batch) -> jax.Array:
            return _logits_of(_merged(graph, *weights), batch)

        return logits, (self.params, self._keys)

    @property
    def reading(self) -> Callable[[Checkpoints, int], Any]:
        """What reads the weights, as `scoring` has them, of the checkpoint of a step.

        The function holds nothing of the learner's arrays, and changes no checkpoint.
        """
        if self._read_whole is not None:
            return self._read_whole
        like, keys = self._like, None if self._keys else self._keys

        def weights(checkpoints: Checkpoints, step: int) -> Any:
            params, _, *others = checkpoints.restore(like, step).state
            return params, others.pop() if keys is None else keys

        return weights

    def compiled(self, function: Callable[[Any, Any, Any], Any]) -> Callable[[Any], Any]:
        """A function of the model as it is, made of a pure one.

        Args:
          function: of the model, a tree of arrays [rows, ...], and what the objective keeps.

        Returns:
          The compiled function of such a tree; what it gives is whole on every device.
        """

        def run(params: Any, keys: Any, kept: Any, inputs: Any) -> Any:
            return function(self._model(params, keys), inputs, kept)

        jitted = jax.jit(run, out_shardings=self._everywhere)
        return lambda inputs: jitted(self.params, self._keys, self._kept, self._on_devices(inputs))

    @property
    def model(self) -> Any:
        """The model as it is."""
        return self._model(self.params)

    def _model(self, params: dict[str, Any], keys: Any = None) -> Any:
        keys = self._keys if keys is None else keys
        return _merged(self._graph, params, keys)

    def save(self, checkpoints: Checkpoints, extra: Any) -> None:
        """Saves parameters, optimizer state and number of steps, and what is given beside them."""
        files = None
        if self._stored is not None:
            files = partial(self._stored.save, params=self.params, state=self._state)
        checkpoints.save(self.steps, self._all, extra, files=files)

    def restore(self, checkpoints: Checkpoints) -> Restored:
        """Takes over the last checkpoint that can be read."""
        like = self._like
        jax.tree.map(lambda array: array.delete(), self._all)
        files = None if self._stored is None else self._stored.restore
        restored = checkpoints.restore(like, files=files)
        self.params, self._state, *others = restored.state
        if self._keys:
            self._keys = others.pop()
        self._kept = others.pop() if others else None
        self.steps = restored.step
        return restored

    def take_whole(self, stored: "Learner") -> None:
        """Stands where another one does whose rows are in a store, just restored: all are here."""
        assert stored._stored is not None
        like, rows = stored._like, stored._stored
        no_keys = nnx.map_state(lambda _, of_keys: of_keys.replace(None), self._keys)

        def whole(params: dict[str, Any]) -> tuple[dict[str, Any], Any]:
            tables, state = rows.take_all(params["tables"])
            keys = nnx.map_state(lambda _, of_keys: of_keys.replace(state), no_keys)
            return params | {"tables": tables}, keys

        def read(checkpoints: Checkpoints, step: int) -> Any:
            return whole(checkpoints.restore(like, step, files=rows.restore).state[0])

        # Its own are zeros, and it takes no further steps.
        jax.tree.map(lambda array: array.delete(), (self.params, self._state))
        self.params, self._keys = whole(stored.params)
        self._kept, self.steps, self._read_whole = stored._kept, stored.steps, read

    @property
    def _like(self) -> Any:
        """All that changes, without the arrays."""
        return jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding),
            self._all,
        )

    @property
    def _all(self) -> tuple[Any, ...]:
        """All that changes."""
        kept = () if self._kept is None else (self._kept,)
        return (self.params, self._state, *kept, *([self._keys] if self._keys else []))

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
        there = sum(math.prod(as_table(variable).shape) for variable in variables)
        return there if self._stored is None else there + self._stored.num_params_elsewhere


def _merged(graph: Any, params: dict[str, Any], keys: Any) -> Any:
    """The model of a structure, parameters, and which key has which row."""
    return nnx.merge(graph, params["tables"], keys, params["dense"])


def _logits_of(model: Any, batch: Batch) -> jax.Array:
    logits: jax.Array = model(batch.numbers, batch.ids, batch.keys, batch.lists, batch.found)
    return logits


def _groups_of(model: Any) -> tuple[Any, ...]:
    """Its tables, which key has which row, and all else."""
    return tuple(nnx.split(model, *_GROUPS)[1:])
