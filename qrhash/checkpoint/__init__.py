"""Checkpoints that restore on any mesh, device count and process count.

A tree of parameters, optimizer state and counters is saved with the configs that give its numbers
their meaning. Tables are kept in the order of their rows, however they were split: what eight
devices wrote one device reads, and the other way round. Orbax does the writing, in the background,
and a checkpoint counts only once all of it is on disk.

    with qrhash.checkpoint.Checkpoints("run/checkpoints", config) as checkpoints:
        checkpoints.save(step, {"params": params, "state": state})
        restored = checkpoints.restore({"params": params, "state": state})

JAX arrays come back as JAX arrays. Whatever else there are numbers of, NumPy's and Python's own,
stays on the host from end to end: JAX would cut its 64 bits to 32.
"""

from qrhash.checkpoint.checkpoints import Checkpoints, Restored
from qrhash.checkpoint.metadata import MismatchError

__all__ = ["Checkpoints", "MismatchError", "Restored"]
