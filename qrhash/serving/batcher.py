"""Requests that wait, scored together.

One thread takes what waits, up to so many rows, or once the first has waited for so long. Rows of
the same columns are read together, as those of a file are: that is most of the time of a request.
Where that fails each request is read by itself, so that no other one suffers.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qrhash.ctr.data.pipeline import Batch
from qrhash.serving.bodies import Rows
from qrhash.serving.limits import LATER, Limits, Refused
from qrhash.serving.metrics import Metrics
from qrhash.serving.model import Model, Scored
from qrhash.serving.reading import read

_Outcome = Scored | Exception


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request that waits: its rows, and who waits for them."""

    rows: Rows
    answer: "asyncio.Future[Scored]"
    since: float

    @property
    def count(self) -> int:
        return self.rows.table.num_rows


class Batcher:
    """Scores requests together.

    Args:
      model: the model.
      limits: how many rows, and how long.
      metrics: is told of every batch.
      notify: is told of errors that nobody foresaw.
    """

    def __init__(
        self, model: Model, limits: Limits, metrics: Metrics, notify: Callable[[str], None]
    ) -> None:
        self._model, self._limits, self._metrics = model, limits, metrics
        self._notify = notify
        self._queue: deque[_Waiting] = deque()
        self._rows = 0
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many rows wait."""
        return self._rows

    @property
    def is_alive(self) -> bool:
        """Whether anybody scores."""
        return self._thread.is_alive()

    async def score(self, rows: Rows) -> Scored:
        """The scores of the rows of a request.

        Raises:
          Refused: too many wait; or they cannot be read.
        """
        found = asyncio.get_running_loop().create_future()
        waiting = _Waiting(rows, found, time.monotonic())
        with self._changed:
            if self._is_closed or self._rows + waiting.count > self._limits.max_waiting:
                raise Refused(503, "Too many rows wait to be scored: come later.", headers=LATER)
            self._queue.append(waiting)
            self._rows += waiting.count
            self._changed.notify()
        answer: Scored = await found
        return answer

    def close(self) -> None:
        """Scores what waits, and ends; nothing is taken any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while taken := self._take():
            wanted = [each for each in taken if not each.answer.cancelled()]
            outcomes = self._outcomes(wanted)
            by_loop: dict[Any, list[tuple[_Waiting, _Outcome]]] = {}
            for each, outcome in zip(wanted, outcomes, strict=True):
                by_loop.setdefault(each.answer.get_loop(), []).append((each, outcome))
            for loop, pairs in by_loop.items():
                if not loop.is_closed():
                    loop.call_soon_threadsafe(_deliver, pairs)

    def _take(self) -> list[_Waiting]:
        """The requests of the next batch; none: it is closed."""
        limits = self._limits
        with self._changed:
            while not self._queue and not self._is_closed:
                self._changed.wait()
            while self._queue and not self._is_closed and self._rows < limits.max_batch:
                left = self._queue[0].since + limits.max_delay - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            taken, rows = [], 0
            while self._queue and rows + self._queue[0].count <= limits.max_batch:
                taken.append(self._queue.popleft())
                rows += taken[-1].count
            self._rows -= rows
        return taken

    def _outcomes(self, wanted: Sequence[_Waiting]) -> list[_Outcome]:
        """What becomes of each request of a batch."""
        outcomes: list[_Outcome] = [Refused(500, "")] * len(wanted)
        order: list[int] = []
        parts: list[Batch] = []
        for places in _alike(wanted):
            for some, batch in self._read(wanted, places, outcomes):
                order += some
                parts.append(batch)
        if not order:
            return outcomes
        try:
            scored = self._model.scored(parts)
        except Exception as error:
            self._notify(f"A batch could not be scored: {error!r}")
            for place in order:
                outcomes[place] = Refused(500, "The rows could not be scored.")
            return outcomes
        sizes = [wanted[place].count for place in order]
        self._metrics.batch(sum(sizes))
        cuts = np.cumsum(sizes)[:-1]
        split = {name: np.split(each, cuts) for name, each in scored.outputs.items()}
        for number, place in enumerate(order):
            outcomes[place] = Scored(
                scored.step, {name: each[number] for name, each in split.items()}
            )
        return outcomes

    def _read(
        self, wanted: Sequence[_Waiting], places: list[int], outcomes: list[_Outcome]
    ) -> list[tuple[list[int], Batch]]:
        """The rows of requests that can be read, in parts: (which requests, their rows)."""
        try:
            batch, good, refused = read(self._model, [wanted[place].rows for place in places])
        except Exception as error:
            if len(places) > 1:
                alone = (self._read(wanted, [place], outcomes) for place in places)
                return [part for parts in alone for part in parts]
            if not isinstance(error, Refused):
                self._notify(f"A request could not be read: {error!r}")
                error = Refused(500, "The rows could not be read.")
            outcomes[places[0]] = error
            return []
        for number, refusal in refused.items():
            outcomes[places[number]] = refusal
        return [] if batch is None else [([places[number] for number in good], batch)]


def _alike(wanted: Sequence[_Waiting]) -> list[list[int]]:
    """Which requests have their rows in columns of the same types."""
    groups: dict[Any, list[int]] = {}
    for place, each in enumerate(wanted):
        groups.setdefault((each.rows.table.schema, each.rows.schema), []).append(place)
    return list(groups.values())


def _deliver(pairs: Sequence[tuple[_Waiting, _Outcome]]) -> None:
    for waiting, outcome in pairs:
        if waiting.answer.done():
            continue
        if isinstance(outcome, Scored):
            waiting.answer.set_result(outcome)
        else:
            waiting.answer.set_exception(outcome)
