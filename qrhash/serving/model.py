"""A trained model as it serves: compiled before the first request, its weights replaced at once.

The function is compiled for some numbers of rows: a batch is padded to the next one. Weights are
its arguments, so that newer ones need nothing compiled; whoever scores meanwhile goes on with those
that he began with.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qrhash.checkpoint import Checkpoints, MismatchError
from qrhash.ctr.data.block import Block, no_rows
from qrhash.ctr.data.pipeline import Batch, encode, joined
from qrhash.ctr.data.schema import Schema
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.metrics import click_rates
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.report import IDS
from qrhash.ctr.run.trained import Kept, kept_of, load_trained
from qrhash.ctr.tower_settings import TWO_TOWER
from qrhash.serving.bodies import Columns
from qrhash.serving.limits import Limits
from qrhash.serving.replaced import signature_of

_LEAST = 8  # rows of the smallest batch


class Weights(NamedTuple):
    """What a checkpoint holds of a model.

    Attributes:
      step: of the checkpoint: the version of the model.
      arrays: the leaves of the weights.
    """

    step: int
    arrays: tuple[Any, ...]


class Scored(NamedTuple):
    """What a request is answered.

    Attributes:
      step: the version of the model.
      outputs: "score", and "logit" of a model of clicks, float32 [rows].
    """

    step: int
    outputs: dict[str, np.ndarray]


class Model:
    """The model of a run.

    Args:
      run: the directory of a run.
      limits: how many rows at once.
      display: is told how far it is.

    Attributes:
      run: see above.
      columns: what it reads of a request.
      weights: those that serve now.

    Raises:
      UserError: see `load_trained`.
    """

    def __init__(self, run: Path, limits: Limits, display: Display) -> None:
        self.run = run
        kept = self._kept = kept_of(run)
        self._ids_file = signature_of(run / IDS)
        self._looked_at = self._newest()
        trained = load_trained(kept, display, is_whole=True)
        self.columns = Columns(
            kept.schema, kept.settings, max_rows=limits.max_batch, max_body=limits.max_body
        )
        self._ids, self._configs = trained.ids, trained.configs
        self._has_logits = kept.settings.model != TWO_TOWER
        self._reading = trained.learner.reading
        logits, weights = trained.learner.scoring
        leaves, structure = jax.tree.flatten(weights)
        self.weights = Weights(trained.learner.steps, tuple(leaves))

        def of_leaves(leaves: Any, batch: Batch) -> jax.Array:
            return logits(jax.tree.unflatten(structure, leaves), batch)

        jitted = jax.jit(of_leaves)
        self._compiled: dict[int, Any] = {}
        nothing = self.encoded(no_rows(self.columns.schema), self.columns.schema)
        sizes = [_LEAST]
        while sizes[-1] < limits.max_batch:
            sizes.append(2 * sizes[-1])
        display.phase("compiling the model", len(sizes))
        # All of them now: what is compiled beside requests keeps them waiting for Python.
        for size in sizes:
            lowered = jitted.lower(self.weights.arrays, joined([nothing], size))
            self._compiled[size] = lowered.compile()
            display.move(len(self._compiled))
        display.line(f"compiled for {', '.join(map(str, sizes))} rows")

    @property
    def sizes(self) -> list[int]:
        """Numbers of rows that it is compiled for."""
        return list(self._compiled)

    def encoded(self, block: Block, schema: Schema) -> Batch:
        """Rows as the function takes them."""
        return encode(block, schema, self._ids)

    def scored(self, parts: Sequence[Batch]) -> Scored:
        """The scores of some rows, in their order; at most the largest number compiled for."""
        weights = self.weights
        rows = sum(len(part.labels) for part in parts)
        size = next(size for size in self._compiled if size >= rows)
        found = self._compiled[size](weights.arrays, joined(parts, size))
        logits = np.asarray(found)[:rows]
        if not self._has_logits:
            return Scored(weights.step, {"score": logits})
        scores = click_rates(logits).astype(np.float32)
        return Scored(weights.step, {"score": scores, "logit": logits})

    def refresh(self) -> list[str]:
        """Takes over a newer checkpoint, if there is one; returns what to tell of it.

        Raises:
          UserError: it cannot be read, or is of another model; the one that serves goes on.
        """
        newest = self._newest()
        if newest is None or newest == self._looked_at:
            return []
        # Looked at once, be it damaged or not: it is told of once.
        self._looked_at = newest
        directory, step, _ = newest
        try:
            kept = kept_of(self.run)
            is_other = _of_run(kept) != _of_run(self._kept)
            if is_other or signature_of(self.run / IDS) != self._ids_file:
                raise UserError(
                    f"{self.run} is another run now, of other columns or settings: start again."
                )
            with Checkpoints(directory, self._configs, max_to_keep=None) as checkpoints:
                leaves = jax.tree.leaves(self._reading(checkpoints, step))
        except (OSError, MismatchError) as error:
            raise UserError(f"{directory / str(step)} is not taken over: {error}") from error
        self.weights = Weights(step, tuple(leaves))
        return [f"{self.run}: the model after {step:,} steps"]

    def _newest(self) -> tuple[Path, int, Any] | None:
        """The last complete checkpoint there is: (directory, step, what tells it from others)."""
        directory = kept_of(self.run).checkpoints
        try:
            steps = [int(each.name) for each in directory.iterdir() if each.name.isdigit()]
        except OSError:
            return None
        if not steps:
            return None
        return directory, max(steps), signature_of(directory / str(max(steps)))


def _of_run(kept: Kept) -> Any:
    """What tells a run from others: all but where its rows are, which may come and go."""
    return replace(kept.settings, store=None), kept.schema
