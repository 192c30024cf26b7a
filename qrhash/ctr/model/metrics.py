"""How good a model is: log loss and AUC, exact and in float64, from logits."""

import math
from typing import NamedTuple, Protocol

import numpy as np

CONSTANT = "constant predictor"


class Judged(Protocol):
    """How good a model is on some rows: `Scores` of clicks, or what a retrieval has instead."""

    @property
    def baseline(self) -> str:
        """What the baseline of such scores is, in words."""
        ...

    @property
    def log_loss(self) -> float:
        """What the training makes less of."""
        ...

    @property
    def rows(self) -> int:
        """How many rows."""
        ...

    @property
    def titles(self) -> dict[str, str]:
        """The names of the scores that a reader is shown -> what to call them."""
        ...

    def named(self) -> dict[str, float]:
        """The scores, by the names that records have."""
        ...


def described(found: Judged) -> str:
    """Those scores that are defined, in a line of text."""
    named = found.named()
    shown = {title: named.get(name, math.nan) for name, title in found.titles.items()}
    return ", ".join(f"{title} {value:.4f}" for title, value in shown.items() if value == value)


def number(value: float) -> str:
    """A score as a reader is shown it."""
    return "undefined" if math.isnan(value) else f"{value:.4f}"


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

    @property
    def baseline(self) -> str:
        """What the baseline of such scores is, in words."""
        return CONSTANT

    def named(self) -> dict[str, float]:
        """The scores, by the names that records have."""
        return {"log_loss": self.log_loss, "auc": self.auc}

    @property
    def titles(self) -> dict[str, str]:
        """The names of the scores that a reader is shown -> what to call them."""
        return {"log_loss": "log loss", "auc": "AUC"}


def click_rates(logits: np.ndarray) -> np.ndarray:
    """Logits -> probabilities of a click, float64."""
    with np.errstate(over="ignore"):  # of e**-z: what is beyond all numbers is a rate of 0
        return 1 / (1 + np.exp(-logits.astype(np.float64)))


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
