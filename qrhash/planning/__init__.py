"""A budget of memory -> the embeddings of many columns."""

from qrhash.planning.candidates import Candidates, Facts
from qrhash.planning.memory import OPTIMIZERS, Memory
from qrhash.planning.planner import Column, ColumnPlan, Plan, plan

__all__ = ["OPTIMIZERS", "Candidates", "Column", "ColumnPlan", "Facts", "Memory", "Plan", "plan"]
