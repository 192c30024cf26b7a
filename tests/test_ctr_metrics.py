"""Log loss and AUC against their definitions, in loops."""

import itertools
import math

import numpy as np
import pytest

from qrhash.ctr.model.metrics import auc, click_rates, constant_logit, log_loss, scores


def _auc_by_pairs(labels, logits):
    pairs = [
        (p, n)
        for (a, p), (b, n) in itertools.product(zip(labels, logits, strict=True), repeat=2)
        if a == 1 and b == 0
    ]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


@pytest.mark.parametrize("values", [2, 5, 1000])
def test_auc_counts_pairs(values, rng):
    labels = rng.integers(0, 2, 60)
    logits = rng.integers(0, values, 60).astype(np.float32)
    assert auc(labels, logits) == pytest.approx(_auc_by_pairs(labels, logits), abs=1e-12)


def test_log_loss_is_the_mean_surprise(rng):
    labels = rng.integers(0, 2, 50)
    logits = rng.normal(0, 2, 50).astype(np.float32)
    rates = [1 / (1 + math.exp(-z)) for z in logits.tolist()]
    wanted = [-math.log(p if y else 1 - p) for y, p in zip(labels, rates, strict=True)]
    assert log_loss(labels, logits) == pytest.approx(sum(wanted) / 50, rel=1e-12)


def test_extreme_logits_stay_finite():
    assert log_loss(np.array([0, 1]), np.array([1000.0, 1000.0])) == 500.0


def test_click_rates_of_extreme_logits_are_0_and_1_without_a_warning():
    with np.errstate(over="raise", invalid="raise"):
        rates = click_rates(np.array([-1e4, 0, 1e4], np.float32))
    assert rates.tolist() == [0, 0.5, 1]


def test_what_is_undefined_is_nan():
    assert math.isnan(auc(np.ones(3), np.arange(3.0)))
    assert math.isnan(auc(np.array([0, 1]), np.array([0.0, np.nan])))
    assert math.isnan(scores(np.empty(0), np.empty(0)).log_loss)


def test_constant_logit():
    rate = 0.3
    assert log_loss(np.array([1] * 3 + [0] * 7), np.full(10, constant_logit(rate))) == (
        pytest.approx(-(0.3 * math.log(0.3) + 0.7 * math.log(0.7)))
    )
    assert math.isfinite(constant_logit(0.0))
    assert math.isfinite(constant_logit(1.0))
