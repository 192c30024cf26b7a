"""Optimizers for tables of which a step touches few rows."""

from qrhash.optim.accumulators import AccumulatorState, adagrad, rowwise_adagrad
from qrhash.optim.resets import grow_rows, reset_rows
from qrhash.optim.wrapper import apply_updates, touched_rows

__all__ = [
    "AccumulatorState",
    "adagrad",
    "apply_updates",
    "grow_rows",
    "reset_rows",
    "rowwise_adagrad",
    "touched_rows",
]
