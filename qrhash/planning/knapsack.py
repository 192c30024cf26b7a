"""One candidate of each class, such that they cost no more than a budget and lose the least.

The multiple-choice knapsack problem. Its relaxation, where a class may have a mixture of
candidates, is solved by the steps along the lower convex hulls of all classes, steepest first, and
gives a bound from below. The classes are then gone through one by one: of all ways to choose from
the classes so far, those stay that no other beats in both cost and loss, and from which the bound
says that something better than the best known can come. What stays is few.

Source: Kellerer, Pferschy, Pisinger 2004, "Knapsack Problems", chapter 11.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# What is found loses at most this much more, relatively, than the best there is.
GAP = 1e-3

_MOST_STATES = 20_000


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
      picks: number of the candidate of each class.
      bound: no choice within the budget loses less.
    """

    picks: tuple[int, ...]
    bound: float


class _Steps(NamedTuple):
    """The relaxation for some classes: least loss by cost, a falling convex line.

    Attributes:
      costs: [points], rising; from the least on that one candidate of each class costs.
      losses: [points], falling.
    """

    costs: np.ndarray
    losses: np.ndarray

    def loss(self, budget: np.ndarray) -> np.ndarray:
        """The least loss for budgets that are no less than the least cost."""
        return np.interp(budget, self.costs, self.losses)


def choose(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], budget: float
) -> Choice | None:
    """The choice that loses least, within `GAP`.

    Args:
      costs: for each class, costs [candidates] of its candidates, 0 or more.
      losses: the same of losses.
      budget: what all may cost together.

    Returns:
      The choice; None, if the cheapest candidates together cost more than the budget.
    """
    # Numbers of the candidates of each class that no other beats.
    kept = [_undominated(*each) for each in zip(costs, losses, strict=True)]
    costs = [cost[numbers] for cost, numbers in zip(costs, kept, strict=True)]
    losses = [loss[numbers] for loss, numbers in zip(losses, kept, strict=True)]
    if sum(cost[0] for cost in costs) > budget:
        return None
    # Classes with most to decide first: the bounds of the others are then close.
    order = sorted(range(len(costs)), key=lambda i: losses[i][-1] - losses[i][0])
    hulls = [_hull(costs[i], losses[i]) for i in order]
    steps = [_steps(hulls[place:]) for place in range(len(order) + 1)]
    bound = float(steps[0].loss(np.array([budget]))[0])
    best_picks, best = _greedy([costs[i] for i in order], [losses[i] for i in order], budget)
    found = _search([(costs[i], losses[i]) for i in order], steps, budget, best, bound)
    picks = best_picks if found is None else found
    chosen = {i: int(kept[i][pick]) for i, pick in zip(order, picks, strict=True)}
    return Choice(tuple(chosen[i] for i in range(len(order))), bound)


def _search(
    classes: Sequence[tuple[np.ndarray, np.ndarray]],
    steps: Sequence[_Steps],
    budget: float,
    best: float,
    bound: float,
) -> list[int] | None:
    """Numbers of the candidates that lose least; None, if none lose less than `best`, by `GAP`."""
    cost, loss = np.zeros(1), np.zeros(1)
    came_from: list[tuple[np.ndarray, np.ndarray]] = []
    for (costs, losses), rest in zip(classes, steps[1:], strict=True):
        cost, loss = cost[:, None] + costs, loss[:, None] + losses
        left = budget - cost
        can_win = loss + rest.loss(left) < best * (1 - GAP / 2)
        parents, picks = np.nonzero((left >= rest.costs[0]) & can_win)
        cost, loss = cost[parents, picks], loss[parents, picks]
        numbers = _undominated(cost, loss)
        if len(numbers) > _MOST_STATES and bound > 0:
            # Losses that are as good as the same: what is lost by it adds up to half of the gap.
            buckets = np.floor(loss[numbers] / (bound * GAP / 2 / len(classes)))
            numbers = numbers[np.unique(buckets, return_index=True)[1]]
            numbers = numbers[np.argsort(cost[numbers])]
        if not len(numbers):
            return None
        came_from.append((parents[numbers], picks[numbers]))
        cost, loss = cost[numbers], loss[numbers]
    state = int(loss.argmin())
    found = []
    for parents, picks in reversed(came_from):
        found.append(int(picks[state]))
        state = int(parents[state])
    return found[::-1]


def _greedy(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], budget: float
) -> tuple[list[int], float]:
    """Steps along the hulls, steepest first, as long as they fit; and what is lost then."""
    picks = [0] * len(costs)
    left = budget - sum(cost[0] for cost in costs)
    for _, i, to in _slopes([_hull(*each) for each in zip(costs, losses, strict=True)]):
        price = costs[i][to] - costs[i][picks[i]]
        if price <= left:
            picks[i], left = to, left - price
    return picks, float(sum(loss[pick] for loss, pick in zip(losses, picks, strict=True)))


class _Hull(NamedTuple):
    """The lower convex hull of a class: its corners' costs, losses and numbers."""

    costs: np.ndarray
    losses: np.ndarray
    numbers: np.ndarray


def _slopes(hulls: Sequence[_Hull]) -> list[tuple[float, int, int]]:
    """(slope, class, candidate to which it leads) of every step along hulls, steepest first."""
    return sorted(
        (slope, i, int(to))
        for i, hull in enumerate(hulls)
        for slope, to in zip(
            np.diff(hull.losses) / np.diff(hull.costs), hull.numbers[1:], strict=True
        )
    )


def _steps(hulls: Sequence[_Hull]) -> _Steps:
    """The relaxation for the classes that have these hulls."""
    prices = np.concatenate([np.zeros(0), *(np.diff(hull.costs) for hull in hulls)])
    gains = np.concatenate([np.zeros(0), *(np.diff(hull.losses) for hull in hulls)])
    order = np.argsort(gains / prices)
    first = (sum(hull.costs[0] for hull in hulls), sum(hull.losses[0] for hull in hulls))
    return _Steps(
        np.concatenate([[first[0]], first[0] + np.cumsum(prices[order])]),
        np.concatenate([[first[1]], first[1] + np.cumsum(gains[order])]),
    )


def _undominated(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Numbers of the candidates that no other beats, by rising cost and falling loss."""
    order = np.lexsort((losses, costs))
    ordered = losses[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(ordered)[:-1]])
    return order[ordered < before]


def _hull(costs: np.ndarray, losses: np.ndarray) -> _Hull:
    """The lower convex hull of candidates by rising cost and falling loss."""
    corners: list[int] = []
    for new in range(len(costs)):
        while len(corners) > 1:
            first, last = corners[-2:]
            before = (losses[last] - losses[first]) * (costs[new] - costs[first])
            if before < (losses[new] - losses[first]) * (costs[last] - costs[first]):
                break
            corners.pop()
        corners.append(new)
    numbers = np.array(corners, np.int64)
    return _Hull(costs[numbers], losses[numbers], numbers)
