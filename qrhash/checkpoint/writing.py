"""Writing in the background, to the end of the program.

Orbax writes with threads. A program does not end before what was saved is written; if it cannot be
written, the exit code is 1.
"""

import atexit
import concurrent.futures.thread
import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp

# All that TensorStore knows of an array, behind what is wrong with it.
DUMPS = re.compile(r" \[tensorstore_spec=.*| See full TensorStore details.*", re.DOTALL)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return next(iter(DUMPS.sub("", str(error)).strip().splitlines()), type(error).__name__)


unfinished: dict[ocp.CheckpointManager, Path] = {}  # whose last save may be on its way
_failed_at_exit = threading.Event()


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Whatever the system or Orbax make of files that cannot be written, as an OSError."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None
        message = f"{directory} cannot be written: {reason or first_line(error)}"
        raise OSError(message) from error


def finish(manager: ocp.CheckpointManager, directory: Path) -> None:
    """Returns when what was saved is written."""
    try:
        with writing(directory):
            manager.wait_until_finished()
    finally:
        unfinished.pop(manager, None)


def _finish_all() -> None:
    for manager, directory in list(unfinished.items()):
        try:
            finish(manager, directory)
        except Exception as error:
            print(f"Error: {error}", file=sys.stderr)
            _failed_at_exit.set()


def _fail_at_exit() -> None:
    if _failed_at_exit.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


# Orbax writes with executors of concurrent.futures. They end before the functions of atexit are
# called, so this is to come before their end: the last to be registered is the first to be called.
assert concurrent.futures.thread
threading._register_atexit(_finish_all)  # type: ignore[attr-defined]
atexit.register(_fail_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=unfinished.clear)  # the parent's threads are not there
