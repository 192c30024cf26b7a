"""Log loss and AUC, exact and in float64, from logits."""

import math
from typing import NamedTuple

import numpy as np


class Scores(NamedTuple):
    """How well logits foretold clicks; nan where it is not defined.

    Attributes:
      log_loss: mean of -log of the probability given to what happened.
      auc: probability that a click's logit is above a non-click's, ties counted half.
      rows: how many rows.
    """

    log_loss: float
    auc: float
    rows: int


def scores(labels: np.ndarray, logits: np.ndarray) -> Scores:
    """Log loss and AUC of logits [rows] for labels [rows] of 0 and 1."""
    return Scores(log_loss(labels, logits), auc(labels, logits), len(labels))


def log_loss(labels: np.ndarray, logits: np.ndarray) -> float:
    """mean(log(1 + e^z) - y z), in float64.

    >>> round(log_loss(np.array([0, 1]), np.array([0.0, 0.0])), 4)
    0.6931
    """
    if not len(labels):
        return math.nan
    z = logits.astype(np.float64)
    return float(np.mean(np.logaddexp(0, z) - labels * z))


def auc(labels: np.ndarray, logits: np.ndarray) -> float:
    """Area under the ROC curve: the rank sum of the clicks, tied logits sharing their mean rank.

    >>> auc(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.4, 0.8]))
    0.875
    """
    clicked = labels > 0.5
    clicks = int(clicked.sum())
    others = len(labels) - clicks
    if not clicks or not others or np.isnan(logits).any():
        return math.nan
    _, place, counts = np.unique(logits, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = mean_rank[place][clicked].sum()
    return float((rank_sum - clicks * (clicks + 1) / 2) / (clicks * others))


def constant_logit(rate: float) -> float:
    """The logit of a click rate, kept finite for rates of 0 and 1."""
    rate = min(max(rate, 1e-6), 1 - 1e-6)
    return math.log(rate / (1 - rate))
