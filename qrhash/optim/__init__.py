"""Optimizers for tables of which a step touches few rows."""

from qrhash.optim.accumulators import AccumulatorState, adagrad, rowwise_adagrad
from qrhash.optim.resets import grow_rows, reset_rows
from qrhash.optim.rounding import (
    CompensationState,
    RoundingState,
    compensated_rounding,
    stochastic_rounding,
)
from qrhash.optim.wrapper import apply_updates, touched_rows

__all__ = [
    "AccumulatorState",
    "CompensationState",
    "RoundingState",
    "adagrad",
    "apply_updates",
    "compensated_rounding",
    "grow_rows",
    "reset_rows",
    "rowwise_adagrad",
    "stochastic_rounding",
    "touched_rows",
]
