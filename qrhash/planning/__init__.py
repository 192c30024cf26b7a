"""A budget of memory -> the embeddings of many columns."""

from qrhash.planning.candidates import Candidates, Facts
from qrhash.planning.columns import Column
from qrhash.planning.memory import OPTIMIZERS, Memory
from qrhash.planning.planner import ColumnPlan, Plan, plan

__all__ = ["OPTIMIZERS", "Candidates", "Column", "ColumnPlan", "Facts", "Memory", "Plan", "plan"]
