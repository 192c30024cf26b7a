"""The synthetic stream: the same rows however they are cut, and labels that follow the truth."""

import numpy as np
import pytest

from qrhash.ctr.data.synthetic import SyntheticSource
from qrhash.ctr.model.metrics import constant_logit, scores
from support import ctr_files


def _read(source, start, stop):
    return ctr_files.joined(source.blocks(start, stop))


@pytest.fixture(scope="module")
def whole():
    return _read(SyntheticSource(30_000, seed=1), 0, 30_000)


@pytest.mark.parametrize("span", [(0, 1), (100, 9000), (8192, 16384), (16000, 30_000)])
def test_any_span_holds_the_same_rows(span, whole):
    part = _read(SyntheticSource(30_000, seed=1), *span)
    for got, wanted in zip(part, whole.rows(*span), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_another_seed_makes_other_rows_and_effects(whole):
    other = _read(SyntheticSource(100, seed=2), 0, 100)
    assert (other.keys != whole.keys[:100]).any()


def test_labels_follow_the_truth(whole):
    """A click rate within 4 standard errors in each tenth of the rows by true rate."""
    rates = 1 / (1 + np.exp(-whole.truth))
    for rows in np.array_split(np.argsort(rates), 10):
        error = np.sqrt(np.mean(rates[rows] * (1 - rates[rows])) / len(rows))
        assert abs(whole.labels[rows].mean() - rates[rows].mean()) < 4 * error


def test_there_is_something_to_learn(whole):
    truth = scores(whole.labels, whole.truth)
    constant = scores(whole.labels, np.full(len(whole.labels), constant_logit(whole.labels.mean())))
    assert truth.log_loss < constant.log_loss - 0.1
    assert truth.auc > 0.75


def test_categories_look_like_criteos(whole):
    missing = whole.missing.mean(axis=0)
    assert not whole.keys[whole.missing].any()
    assert (missing[::3] > 0).all()
    assert (missing[1::3] == 0).all()
    assert 0.05 < np.isnan(whole.numbers).mean() < 0.15
    keys, counts = np.unique(whole.keys[:, 3], return_counts=True)
    assert len(keys) > 1000
    assert counts.max() > 1000
    assert keys.max() < 2**32
