"""An interrupt ends the program at once, whoever is running."""

import os
import sys
from typing import Any

INTERRUPTED = 130  # exit code of a program that a SIGINT ended


def interrupted_early(*_: Any) -> None:
    """What a SIGINT does until a run has something to keep."""
    print("Interrupted before training began; nothing was written.", file=sys.stderr)
    leave()


def leave() -> None:
    """Ends the program: threads that read ahead may still be running, nobody waits for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)
