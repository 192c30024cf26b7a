"""Plans: what rows that are shared know, the knapsack, and that budgets are kept."""

import functools
import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qrhash
from qrhash import planning
from qrhash.planning import candidates, knapsack, traffic
from qrhash.planning.memory import OPTIMIZERS, Memory

# The 26 columns of Criteo's display advertising data.
CRITEO = [
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
]
SIZES = {f"C{number}": size for number, size in enumerate(CRITEO, 1)}


# --- what rows know -------------------------------------------------------------------------------


def _known(counts, num_rows, prior_count):
    """Row by row: the share of variance that a table explains, ids in it by id mod rows."""
    explained = 0.0
    for row in range(num_rows):
        met = sum(counts[row::num_rows])
        if met:
            effective = sum(count**2 for count in counts[row::num_rows]) / met
            explained += effective**2 / (effective + prior_count)
    return explained / sum(counts)


def _falling(rng, size, most):
    return np.sort(rng.integers(0, most, size))[::-1] + 1.0


@pytest.mark.parametrize("prior_count", [0.0, 3.0, 100.0])
def test_what_rows_know_is_that_of_the_loop_for_few_ids(prior_count, rng):
    counts = _falling(rng, 30, 50)
    of_ids = traffic.of_counts(counts)
    sizes, known = traffic.known_by_rows(of_ids, prior_count)
    assert {1, 2, 3, 30} <= set(sizes)
    wanted = np.array([_known(counts, int(rows), prior_count) for rows in sizes])
    np.testing.assert_allclose(known, np.maximum.accumulate(wanted))
    assert traffic.known_alone(of_ids, prior_count) == pytest.approx(wanted[-1])


@pytest.mark.parametrize("prior_count", [0.0, 20.0])
def test_pieces_of_many_ids_know_what_the_ids_do(prior_count):
    counts = 1e5 * np.arange(1, 20_001) ** -1.05
    of_ids = traffic.of_counts(counts)
    sizes, known = traffic.known_by_rows(of_ids, prior_count)
    for place in range(0, len(sizes), 6):
        wanted = _known(counts, int(sizes[place]), prior_count)
        assert known[place] == pytest.approx(wanted, rel=0.02, abs=1e-3)


@given(st.integers(1, 10**8), st.floats(1, 1e9))
def test_zipf_is_that_of_the_sum(size, total):
    of_ids = traffic.of_zipf(size, total)
    assert of_ids.total == pytest.approx(total)
    assert of_ids.edges[-1] == size
    assert (np.diff(of_ids.counts) <= 0).all()
    exact = np.arange(1, min(size, 5000) + 1) ** -1.05
    taken = traffic.of_zipf(len(exact), exact.sum())
    np.testing.assert_allclose(taken.counts, traffic.of_counts(exact).counts, rtol=1e-3)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=300), st.floats(0, 1000))
def test_more_rows_know_no_less_and_rows_of_ones_own_the_most(counts, prior_count):
    of_ids = traffic.of_counts(np.sort(counts)[::-1].astype(float))
    _, known = traffic.known_by_rows(of_ids, prior_count)
    assert (np.diff(known) >= 0).all()
    alone = traffic.known_alone(of_ids, prior_count)
    assert known[-1] == pytest.approx(alone, abs=1e-9) or len(counts) > 32
    assert 0 <= alone <= 1


def test_what_is_met_once_is_nothing_to_lose():
    often, once = (traffic.of_counts(np.full(1000, count)) for count in (1000.0, 1.0))
    lost = []
    for of_ids in (often, once):
        sizes, known = traffic.known_by_rows(of_ids, 20.0)
        half = np.interp(500, sizes, known)
        lost.append(traffic.known_alone(of_ids, 20.0) - half)
    assert lost[0] > 20 * lost[1] > 0


# --- the knapsack ---------------------------------------------------------------------------------


def _by_brute_force(costs, losses, budget):
    best = None
    for picks in itertools.product(*(range(len(cost)) for cost in costs)):
        if sum(cost[pick] for cost, pick in zip(costs, picks, strict=True)) <= budget:
            lost = sum(loss[pick] for loss, pick in zip(losses, picks, strict=True))
            best = lost if best is None else min(best, lost)
    return best


_numbers = st.integers(0, 60)
_classes = st.lists(
    st.lists(st.tuples(_numbers, _numbers), min_size=1, max_size=6), min_size=1, max_size=5
)


@given(_classes, st.integers(0, 200), st.sampled_from([1, 3, 20_000]))
def test_the_choice_is_the_best_there_is(classes, budget, most_states):
    costs = [np.array([cost for cost, _ in each], float) for each in classes]
    losses = [np.array([loss for _, loss in each], float) for each in classes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_MOST_STATES", most_states)
        choice = knapsack.choose(costs, losses, budget)
    wanted = _by_brute_force(costs, losses, budget)
    assert (choice is None) == (wanted is None)
    if choice is None:
        return
    picked = list(zip(costs, losses, choice.picks, strict=True))
    assert sum(cost[pick] for cost, _, pick in picked) <= budget
    lost = sum(loss[pick] for _, loss, pick in picked)
    assert choice.bound <= wanted * (1 + 1e-9) + 1e-9
    assert wanted <= lost <= wanted * (1 + 1e-3) + 1e-9


# --- plans ----------------------------------------------------------------------------------------


def _offered(sizes, features, memory, prior_count, examples):
    """(cost, loss, config) of all candidates of each column."""
    for size in sizes:
        facts = candidates.Facts(
            num_embeddings=size,
            features=features,
            traffic=traffic.of_zipf(size, examples),
            prior_count=prior_count,
            memory=memory,
            options={"large_table_rows": memory.large_table_rows},
            per_octave=1,
        )
        found = [way(facts) for way in candidates.WAYS]
        yield [
            (cost, loss, each.make(number))
            for each in found
            for number, (cost, loss) in enumerate(zip(each.costs, each.losses, strict=True))
        ]


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=3),
    st.sampled_from([1, 2, 8]),
    st.sampled_from(list(OPTIMIZERS)),
    st.floats(0.02, 1.1),
)
def test_no_combination_of_candidates_is_better(sizes, devices, optimizer, share):
    memory = Memory(optimizer=optimizer, devices=devices, large_table_rows=200, itemsize=4)
    offered = list(_offered(sizes, 4, memory, 20.0, 10_000.0))
    names = [f"c{number}" for number in range(len(sizes))]
    full = memory.per_device({n: each[0][2] for n, each in zip(names, offered, strict=True)})
    budget = max(1, int(share * full))
    least = np.inf
    for combination in itertools.product(*(each[::7] + each[:1] for each in offered)):
        configs = {name: config for name, (*_, config) in zip(names, combination, strict=True)}
        if memory.per_device(configs) <= budget:
            least = min(least, sum(loss for _, loss, _ in combination))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning.planner, "NEGLIGIBLE", 0.0)
        make = functools.partial(
            planning.plan,
            dict(zip(names, sizes, strict=True)),
            budget,
            features=4,
            devices=devices,
            optimizer=optimizer,
            num_examples=10_000.0,
            large_table_rows=200,
        )
        if least == np.inf:
            return
        planned = make()
    assert planned.bytes_per_device <= budget
    known = sum(
        traffic.known_alone(traffic.of_zipf(size, 10_000.0), traffic.PRIOR_COUNT) for size in sizes
    )
    assert planned.loss <= least / known * 1.01 + 1e-9
    assert planned.least_loss <= planned.loss + 1e-9
