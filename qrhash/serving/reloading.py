"""Newer checkpoints, snapshots and deltas, looked for while others serve."""

import threading
from collections.abc import Callable

from qrhash.ctr.errors import UserError
from qrhash.serving.metrics import Metrics

# What looks for something newer, and returns what to tell of it; raises a UserError if it cannot
# be taken over.
Refresh = Callable[[], list[str]]


class Reloader:
    """Looks for what is newer, now and then.

    Args:
      refreshes: name -> what looks.
      every: seconds from one look to the next; 0: nobody looks.
      metrics: is told what was taken over, and what was not.
      notify: the same in words.
    """

    def __init__(
        self,
        refreshes: dict[str, Refresh],
        every: float,
        metrics: Metrics,
        notify: Callable[[str], None],
    ) -> None:
        self._refreshes, self._every = refreshes, every
        self._metrics, self._notify = metrics, notify
        self._told: dict[str, str] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="reloader", daemon=True)
        if every > 0:
            self._thread.start()

    def look(self) -> None:
        """Looks once."""
        for what, refresh in self._refreshes.items():
            try:
                told = refresh()
            except UserError as error:
                self._failed(what, str(error))
            # Whatever it is, the next look may find better.
            except Exception as error:
                self._failed(what, f"{what} could not be looked for: {error!r}")
            else:
                for sentence in told:
                    is_fault = sentence.startswith("Warning")
                    self._metrics.event(what, "failed" if is_fault else "taken over")
                    self._notify(sentence)

    def _failed(self, what: str, sentence: str) -> None:
        """Counts a failure, and tells of it unless it is the last one again."""
        self._metrics.event(what, "failed")
        if self._told.get(what) != sentence:
            self._notify(f"Warning: {sentence}")
        self._told[what] = sentence

    def close(self) -> None:
        """Looks no more; what is being read is left to end with the program."""
        self._closed.set()

    def _work(self) -> None:
        while not self._closed.wait(self._every):
            self.look()
