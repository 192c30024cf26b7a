"""Codes from a log: counted in chunks, clustered evenly, the same for the same seed."""

import collections
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qrhash
from qrhash import codes as module
from qrhash.codes import from_cooccurrence

CLUSTERS, CONTEXTS = 5, 40


@pytest.fixture(scope="module")
def _sklearn():
    pytest.importorskip("sklearn")


with_sklearn = pytest.mark.usefixtures("_sklearn")


def _planted(num_ids=200, length=12_000, noise=0.2):
    """The cluster of each id, and a log of ids met in contexts of their cluster, mostly."""
    rng = np.random.default_rng(0)
    clusters = rng.permutation(num_ids) % CLUSTERS
    ids = rng.integers(0, num_ids, length)
    own = clusters[ids] * (CONTEXTS // CLUSTERS) + rng.integers(0, CONTEXTS // CLUSTERS, length)
    contexts = np.where(rng.random(length) < noise, rng.integers(0, CONTEXTS, length), own)
    return clusters, ids, contexts


def _cut(arrays, *at):
    return list(zip(*(np.split(array, at) for array in arrays), strict=True))


@st.composite
def _logs(draw):
    pairs = st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 3))
    chunks = draw(st.lists(st.lists(pairs, max_size=8), max_size=6))
    return [tuple(np.array(chunk, int).reshape(-1, 3).T) for chunk in chunks]


@given(log=_logs())
def test_chunks_are_counted_as_by_a_dictionary(log):
    want = collections.defaultdict(float)
    for chunk in log:
        for i, c, weight in zip(*chunk, strict=True):
            want[int(i), int(c)] += weight
    got = module._counted(log, 6).tocoo()
    assert {(i, c): w for i, c, w in zip(got.row, got.col, got.data, strict=True) if w} == {
        pair: w for pair, w in want.items() if w
    }


@given(log=_logs(), shift=st.sampled_from([0.5, 1.0, 3.0]), smoothing=st.sampled_from([0, 0.75, 1]))
def test_information_is_that_of_loops(log, shift, smoothing):
    counts = module._counted(log, 6)
    n = counts.toarray()
    got = module._information(counts, shift, smoothing).toarray()
    powers = [sum(row[c] for row in n) ** smoothing for c in range(n.shape[1])]
    for i, c in np.ndindex(n.shape):
        want = 0.0
        if n[i, c]:
            chance = sum(n[i]) * powers[c] / sum(powers)
            want = max(0.0, math.log(n[i, c] / chance) - math.log(shift))
        assert got[i, c] == pytest.approx(want, rel=1e-5, abs=1e-6)


@given(
    n=st.integers(1, 60), k=st.integers(1, 6), num_groups=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_clusters_have_room_for_everyone_and_a_nearer_one_has_none_left(n, k, num_groups, seed):
    rng = np.random.default_rng(seed)
    points, centres = rng.normal(size=(n, 2)), rng.normal(size=(k, 2))
    groups = rng.integers(0, num_groups, n)
    room = -(-np.bincount(groups, minlength=num_groups) // k) + 1
    got = module._balanced(points, groups, centres, room)
    counts = np.zeros((num_groups, k), int)
    np.add.at(counts, (groups, got), 1)
    assert (counts <= room[:, None]).all()
    distances = ((points[:, None] - centres) ** 2).sum(axis=2)
    for i in range(n):
        for other in range(k):
            if distances[i, other] < distances[i, got[i]]:
                assert counts[groups[i], other] == room[groups[i]]


@with_sklearn
def test_planted_clusters_are_found_however_the_log_is_cut():
    clusters, *log = _planted()
    whole = from_cooccurrence([tuple(log)], 200, num_codes=(CLUSTERS, 4), slack=0.0)
    assert whole.shape == (200, 2)
    assert whole.dtype == np.int32
    for code in range(CLUSTERS):
        assert len(set(clusters[whole[:, 0] == code])) == 1
    assert np.bincount(whole[:, 0]).tolist() == [40] * CLUSTERS
    assert len(set(map(tuple, whole.tolist()))) == CLUSTERS * 4
    assert qrhash.CodePartition(whole, tie_breaker=True).num_rows == (CLUSTERS, 4, 10)
    cut = iter(_cut(log, 10, 10, 4000, 11_999))
    np.testing.assert_array_equal(
        from_cooccurrence(cut, 200, num_codes=(CLUSTERS, 4), slack=0.0), whole
    )


@with_sklearn
def test_a_seed_gives_its_codes_and_another_one_others():
    _, *log = _planted(noise=0.8)
    one, same, other = (
        from_cooccurrence([tuple(log)], 200, num_codes=(16,), seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@with_sklearn
def test_weights_count_as_repetitions_do():
    _, ids, contexts = _planted(length=3000)
    weights = np.random.default_rng(1).integers(0, 4, len(ids))
    repeated = [(np.repeat(ids, weights), np.repeat(contexts, weights))]
    np.testing.assert_array_equal(
        from_cooccurrence([(ids, contexts, weights)], 200, num_codes=(7,)),
        from_cooccurrence(repeated, 200, num_codes=(7,)),
    )


@with_sklearn
def test_ids_never_met_get_codes_by_their_number_evenly():
    _, ids, contexts = _planted(num_ids=100)
    codes = from_cooccurrence([(ids, contexts)], 124, num_codes=(CLUSTERS, 4))
    assert codes[100:].tolist() == [[r % CLUSTERS, r // CLUSTERS % 4] for r in range(24)]
    nothing = from_cooccurrence([], 12, num_codes=(2, 3))
    assert nothing.tolist() == [[r % 2, r // 2 % 3] for r in range(12)]


@with_sklearn
@pytest.mark.parametrize("num_ids", [1, 2, 9])
def test_few_ids_and_contexts(num_ids):
    ids = np.arange(num_ids)
    for contexts in (ids * 0, ids, ids // 2):
        codes = from_cooccurrence([(ids, contexts)], num_ids, num_codes=(4, 4))
        assert codes.shape == (num_ids, 2)
        assert codes.min() >= 0
        assert codes.max() < 4


@with_sklearn
def test_a_bar_is_shown_on_request(capsys):
    _, *log = _planted()
    from_cooccurrence([tuple(log)], 200, num_codes=(4,), progress=True)
    assert "clustering" in capsys.readouterr().err
    from_cooccurrence([tuple(log)], 200, num_codes=(4,))
    assert capsys.readouterr().err == ""


def test_where_scikit_learn_is_missing_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"scikit-learn.*pip install 'qrhash\[codes\]'"):
        from_cooccurrence([], 3)


ONE = np.array([0])


@with_sklearn
@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        ((ONE,), r"chunks\[1\] must be \(ids, contexts\)"),
        (ONE, r"chunks\[1\] must be \(ids, contexts\)"),
        ((ONE, np.array([0, 1])), r"chunks\[1\].*one shape \[m\], got \(1,\), \(2,\)"),
        ((ONE, ONE, np.ones(2)), r"chunks\[1\].*one shape \[m\].*\(2,\)"),
        ((np.array([3]), ONE), r"chunks\[1\] must hold ids in \[0, 3\), got 3"),
        ((np.array([-1]), ONE), r"chunks\[1\] must hold ids in \[0, 3\), got -1"),
        ((ONE, np.array([-2])), r"chunks\[1\] must hold contexts in .* got -2"),
        ((ONE, np.array([2**31])), r"chunks\[1\] must hold contexts in .* got 2147483648"),
        ((ONE * 1.0, ONE), r"chunks\[1\]\[0\] must be integers.*float64"),
        ((ONE, ONE, np.array([-1.0])), r"chunks\[1\] must hold finite weights.*-1.0"),
        ((ONE, ONE, np.array([np.nan])), r"chunks\[1\] must hold finite weights.*nan"),
    ],
)
def test_a_chunk_that_is_none_is_refused_by_its_number(chunk, words):
    with pytest.raises(ValueError, match=words):
        from_cooccurrence([(ONE, ONE), chunk], 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_embeddings": 0}, "num_embeddings must be a positive integer, got 0"),
        ({"num_codes": ()}, r"num_codes must name .* got \(\)"),
        ({"num_codes": 256}, "num_codes must name .* got 256"),
        ({"num_codes": (4, 0)}, r"num_codes\[1\] must be a positive integer, got 0"),
        ({"num_dims": 0}, "num_dims must be a positive integer, got 0"),
        ({"shift": 0}, "shift must be a number above 0, got 0"),
        ({"smoothing": -1}, "smoothing must be a number of at least 0, got -1"),
        ({"slack": math.inf}, "slack must be a number of at least 0, got inf"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        from_cooccurrence([], **{"num_embeddings": 3, **options})
