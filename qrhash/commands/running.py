"""How a command runs: what is wrong in one sentence, and an interrupt without a traceback."""

import logging
import signal
from collections.abc import Callable

from rich.console import Console

from qrhash.commands.interrupts import INTERRUPTED
from qrhash.ctr.errors import UserError
from qrhash.ctr.run.display import Display


def guarded(action: Callable[[], None], console: Console) -> int:
    """Runs it; returns the exit code, and says in a sentence what went wrong."""
    # Orbax logs, with a traceback, what it raises all the same: an interrupt, say.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        action()
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        said = str(error) if not isinstance(error, RuntimeError) else _of_memory(error)
        Console(stderr=True).print(
            f"Error: {said or 'out of memory.'}", markup=False, highlight=False, soft_wrap=True
        )
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted.", markup=False, highlight=False, soft_wrap=True)
        return INTERRUPTED
    return 0


def _of_memory(error: RuntimeError) -> str:
    """What JAX says, if a device has too little memory; raises any other error again."""
    state, _, said = str(error).partition("\n")[0].partition(": ")
    if state != "RESOURCE_EXHAUSTED":
        raise error
    return f"{said.rstrip('.')}: fewer --features, or a smaller --batch-size, take less."


def shown(action: Callable[[Display], None]) -> int:
    """Runs what says on standard error how far it is; returns the exit code."""
    console = Console(stderr=True)

    def run() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        action(Display(console))

    return guarded(run, console)
