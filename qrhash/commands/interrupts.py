"""What an interrupt does, before a run has something to keep and after."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

_SAID = "Ctrl-C: the training ends with this batch; once more, and it ends at once."

INTERRUPTED = 130  # exit code of a program that a SIGINT ended


def interrupted_early(*_: Any) -> None:
    """What a SIGINT does until a run has something to keep."""
    print("Interrupted before training began; nothing was written.", file=sys.stderr)
    leave()


class Interrupts:
    """What a SIGINT does from then on: the run ends between two batches; a second one, at once.

    Python would raise KeyboardInterrupt in the middle of whatever a library is doing, which may
    lose it, as `__del__` does, or fail for another reason, as Orbax does amid a save.

    Args:
      left: what to say of what there is, when a second one ends the program.
    """

    def __init__(self, left: Callable[[], Sequence[str]] = list) -> None:
        self._left = left
        self._has_come = False

    def __call__(self, *_: Any) -> None:
        """As a signal handler."""
        if self._has_come:
            print("Interrupted.", *self._left(), sep="\n", file=sys.stderr)
            leave()
        self._has_come = True
        # Not by `print`, whose buffer the handler may have interrupted.
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"\n{_SAID}\n".encode())  # behind a progress bar

    def check(self) -> None:
        """Between two batches.

        Raises:
          KeyboardInterrupt: a SIGINT has come.
        """
        if self._has_come:
            raise KeyboardInterrupt


def leave() -> None:
    """Ends the program: threads that read ahead may still be running, nobody waits for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)
