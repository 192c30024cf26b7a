"""Optimizers for tables of which a step touches few rows."""

from qrhash.optim.accumulators import AccumulatorState, adagrad, rowwise_adagrad
from qrhash.optim.resets import grow_rows, reset_rows
from qrhash.optim.rounding import RoundingState, stochastic_rounding
from qrhash.optim.wrapper import apply_updates, touched_rows

__all__ = [
    "AccumulatorState",
    "RoundingState",
    "adagrad",
    "apply_updates",
    "grow_rows",
    "reset_rows",
    "rowwise_adagrad",
    "stochastic_rounding",
    "touched_rows",
]
