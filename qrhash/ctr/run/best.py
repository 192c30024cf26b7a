"""The best model of a run, by its log loss on the validation rows, and when to look no further."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from qrhash.checkpoint import Checkpoints
from qrhash.ctr.model.metrics import Judged
from qrhash.ctr.model.room import ColumnConfig
from qrhash.ctr.run.learner import Learner


class Best:
    """The best model so far.

    Args:
      directory: where it is kept as a checkpoint; None: nowhere.
      configs: of the model's embeddings.
      patience: how many scores in a row may be no better before the training is over; None: any.

    Attributes:
      rows: how many rows it was trained on; 0, if there is none yet.
      seen: how many rows the last model that was scored was trained on.
    """

    _KEPT = 2  # A run that goes on from before the last one needs the one before it.

    def __init__(
        self,
        directory: Path | None,
        configs: Mapping[str, ColumnConfig],
        patience: int | None,
    ) -> None:
        self._directory, self._configs, self._patience = directory, configs, patience
        self._checkpoints: Checkpoints | None = None
        self._log_loss, self._failures = math.inf, 0
        self.rows = self.seen = 0

    @property
    def is_over(self) -> bool:
        """Whether the patience is at its end."""
        return self._patience is not None and self._failures >= self._patience

    def update(self, found: Judged, learner: Learner, rows: int) -> None:
        """Takes note of the scores of the model as it is, after so many rows; keeps the best."""
        self.seen = rows
        if not found.log_loss < self._log_loss:
            self._failures += 1
            return
        self._log_loss, self._failures, self.rows = found.log_loss, 0, rows
        if self._directory is not None:
            learner.save(self._opened(self._directory), {"rows": rows})

    def restore(self, learner: Learner) -> bool:
        """Gives the learner the best model back, if it is another one than the last.

        Returns:
          Whether the learner has it: not, if its checkpoint is gone.
        """
        if self._directory is None or not self.rows or self.rows == self.seen:
            return True
        checkpoints = self._opened(self._directory)
        if not checkpoints.steps:
            self.rows = self.seen
            return False
        # What is there may be one before, if a run that went on did not come to the same best.
        self.rows = learner.restore(checkpoints).extra["rows"]
        return True

    def as_dict(self) -> dict[str, Any]:
        """What it knows, as JSON can hold it."""
        return {
            "log_loss": self._log_loss if math.isfinite(self._log_loss) else None,
            "failures": self._failures,
            "rows": self.rows,
            "seen": self.seen,
        }

    def take_over(self, saved: Mapping[str, Any], step: int) -> None:
        """Stands where `as_dict` was taken, at a step; what was kept after it is removed."""
        self._log_loss = math.inf if saved["log_loss"] is None else saved["log_loss"]
        self._failures, self.rows, self.seen = saved["failures"], saved["rows"], saved["seen"]
        self.forget_after(step)

    def forget_after(self, step: int) -> None:
        """Removes what was kept after a step: the run comes there once more."""
        if self._directory is None or not self._directory.is_dir():
            return
        if jax.process_index() == 0:
            for path in self._directory.iterdir():
                if path.name.isdecimal() and int(path.name) > step:
                    shutil.rmtree(path)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("best models forgotten")

    def close(self) -> None:
        """Ends the background work."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def _opened(self, directory: Path) -> Checkpoints:
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(directory, self._configs, max_to_keep=self._KEPT)
        return self._checkpoints
