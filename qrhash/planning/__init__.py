"""A budget of memory -> the embeddings of many columns."""

from qrhash.planning.candidates import Candidates, Facts
from qrhash.planning.columns import Column
from qrhash.planning.memory import OPTIMIZERS, Memory
from qrhash.planning.planner import BudgetError, ColumnPlan, Plan, plan

__all__ = [
    "OPTIMIZERS",
    "BudgetError",
    "Candidates",
    "Column",
    "ColumnPlan",
    "Facts",
    "Memory",
    "Plan",
    "plan",
]
