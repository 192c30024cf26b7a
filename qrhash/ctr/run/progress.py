"""Where a training stands: its counts, its running scores, its learning curve."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from qrhash import Keys
from qrhash.ctr.data.pipeline import Batch
from qrhash.ctr.model.metrics import Judged, described, scores

Record = Callable[[dict[str, Any]], None]
Judge = Callable[[np.ndarray, np.ndarray], Judged]

_WINDOW_ROWS = 10_000  # the running scores and rows/s are over about so many rows


class Progress:
    """Counts what was trained on and records the points of the learning curve.

    Args:
      record: called with every point.
      batch_size: rows of a batch.
      judge: the scores of labels [rows] and of what the steps gave [rows]: of logits, by default.
    """

    def __init__(self, record: Record, batch_size: int, judge: Judge | None = None) -> None:
        self.rows = 0
        self.points = 0
        self._clicks = 0.0
        self._record, self._judge = record, judge or scores
        self._first_rows, self._start, self._paused = 0, math.nan, 0.0
        self._resumed = math.nan
        steps = 2 + _WINDOW_ROWS // batch_size
        self._window: deque[tuple[float, Batch, Any]] = deque(maxlen=steps)

    def add(self, batch: Batch, logits: jax.Array) -> None:
        """Takes note of a step: its batch, and what it gave [batch]: logits, from before it."""
        rows = int(batch.weights.sum())
        self.rows += rows
        if math.isnan(self._start):
            self._first_rows, self._start = self.rows, time.monotonic()
        elif not math.isnan(self._resumed):  # This one was compiled too.
            self._first_rows += rows
            self._paused += time.monotonic() - self._resumed
        self._resumed = math.nan
        self._clicks += float(batch.labels @ batch.weights)
        self._window.append((self._now(), batch, logits))

    @contextmanager
    def pause(self, trained: Any) -> Iterator[None]:
        """What is done meanwhile, such as an evaluation, does not count for the speed.

        Args:
          trained: what the last step gives: the clock stops when it is there.
        """
        jax.block_until_ready(trained)
        begun = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - begun

    def _now(self) -> float:
        return time.monotonic() - self._paused

    @property
    def click_rate(self) -> float:
        """Clicks per row so far."""
        return self._clicks / self.rows

    @property
    def seconds(self) -> float:
        """Since the first step: the compilation is over then; evaluations are included."""
        return time.monotonic() - self._start

    @property
    def rows_per_second(self) -> float:
        """Speed of the steps after the first one: of the training alone."""
        return (self.rows - self._first_rows) / max(1e-9, self._now() - self._start)

    def running(self) -> Judged:
        """Scores of the last rows, each from before it was learnt."""
        return self._judge(*collect((batch, logits) for _, batch, logits in self._window))

    def note(self) -> str:
        """Speed and running scores, in words."""
        timed = [(moment, batch) for moment, batch, _ in self._window if not math.isnan(moment)]
        if len(timed) < 2:
            return described(self.running())
        (begun, _), *steps = timed
        rows = sum(float(batch.weights.sum()) for _, batch in steps)
        rate = rows / max(1e-9, self._now() - begun)
        return f"{rate:,.0f} rows/s  {described(self.running())}"

    def as_dict(self) -> dict[str, Any]:
        """All of it but the learning curve, as JSON can hold it."""
        window = []
        for _, batch, logits in self._window:
            labels, of_batch = collect([(batch, logits)])
            window.append([labels.tolist(), of_batch.tolist()])
        return {
            "rows": self.rows,
            "points": self.points,
            "first_rows": self._first_rows,
            "seconds": self.seconds,
            "paused": self._paused,
            "clicks": self._clicks,
            "window": window,
        }

    def take_over(self, saved: dict[str, Any]) -> None:
        """Stands where `as_dict` was taken."""
        self.rows, self._first_rows = saved["rows"], saved["first_rows"]
        self.points, self._clicks = saved["points"], saved["clicks"]
        self._resumed = time.monotonic()
        self._start = self._resumed - saved["seconds"]
        self._paused = saved.get("paused", 0.0)  # An earlier version did not tell.
        for labels, logits in saved["window"]:
            weights, none = np.ones(len(labels), np.float32), np.empty(0, np.int32)
            batch = Batch(np.array(labels, np.float32), weights, none, none, Keys.of(none))
            self._window.append((math.nan, batch, np.array(logits, np.float32)))

    def point(self, found: Judged, part: str = "test") -> None:
        """Records a point of the learning curve: scores on test rows, or on validation rows."""
        train = self.running()
        self.points += 1
        self._record(
            {
                "kind": "progress",
                "rows": self.rows,
                "seconds": round(self.seconds, 3),
                **{f"train_{name}": value for name, value in train.named().items()},
                **{f"{part}_{name}": value for name, value in found.named().items()},
                f"{part}_rows": found.rows,
            }
        )


def collect(pairs: Iterable[tuple[Batch, jax.Array]]) -> tuple[np.ndarray, np.ndarray]:
    """Batches with their logits -> all labels [rows] and logits [rows], padding left out."""
    labels, logits = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
    for batch, batch_logits in pairs:
        real = batch.weights > 0
        labels.append(batch.labels[real])
        logits.append(np.asarray(batch_logits)[real])
    return np.concatenate(labels), np.concatenate(logits)
