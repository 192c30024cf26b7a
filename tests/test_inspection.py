"""What became of tables, against loops over all ids and pairs."""

import functools
import itertools
from collections import Counter, defaultdict

import jax
import numpy as np
import pytest

import qrhash
from qrhash import inspection
from qrhash.inspection import blocks

PARTITIONS = {
    "full": qrhash.FullTable(60),
    "hash trick": qrhash.HashTrick(60, 13),
    "quotient-remainder": qrhash.QuotientRemainder(60, 7),
    "mixed radix": qrhash.MixedRadix(60, (4, 4, 4)),
    "chinese remainder": qrhash.ChineseRemainder(60, (8, 9)),
    "codes": qrhash.CodePartition(np.random.default_rng(1).integers(0, 5, (60, 2))),
    "tie-broken codes": qrhash.CodePartition(np.zeros((60, 1), int), tie_breaker=True),
    "digits": qrhash.KeyDigits(5, num_tables=2),
    "hashes": qrhash.MultiHash((6, 5)),
}


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    """So small that every loop has several turns, the last one short."""
    monkeypatch.setattr(blocks, "_INDICES", 16)
    monkeypatch.setattr(blocks, "_VECTORS", 16)
    monkeypatch.setattr(inspection.similarity, "_AT_ONCE", 25)


def _ids(partition):
    return qrhash.Keys.of(np.arange(60) * 7 - 100) if partition.takes_keys else np.arange(60)


def _rows(partition):
    """The tuple of rows of each id, one after the other."""
    ids = _ids(partition)
    return [tuple(int(i[0]) for i in partition.indices(ids[j : j + 1])) for j in range(60)]


@pytest.fixture
def counts(rng):
    met = rng.zipf(1.5, 60).clip(max=200)
    met[rng.permutation(60)[:20]] = 0
    return met


@pytest.mark.parametrize("name", PARTITIONS)
def test_twins_are_the_ids_of_equal_rows(name, counts):
    partition, sets = PARTITIONS[name], defaultdict(list)
    for place, rows in enumerate(_rows(partition)):
        sets[rows].append(place)
    wanted = [places for places in sets.values() if len(places) > 1]
    found = inspection.twins(partition, _ids(partition), counts, named=100)
    assert found.num_ids == 60
    assert found.num_sets == len(wanted)
    assert found.num_twins == sum(map(len, wanted))
    assert (found.num_twins == 0) == partition.is_complementary
    assert sorted(map(sorted, found.sets)) == sorted(wanted)
    totals = [counts[places].sum() for places in found.sets]
    assert totals == sorted(totals, reverse=True)
    assert all((np.diff(counts[places]) <= 0).all() for places in found.sets)
    assert found.share == pytest.approx(sum(totals) / counts.sum())
    assert len(inspection.twins(partition, _ids(partition), named=2).sets) == min(2, len(wanted))


def test_ids_without_rows_are_no_twins():
    partition = qrhash.deeprec.DeepRecQuotientRemainder(60, 8, 8)
    with_rows = partition.num_ids_with_rows
    found = inspection.twins(qrhash.HashTrick(10, 10), np.array([3, 50, 60, -1]))
    assert (found.num_ids, found.num_twins) == (4, 0)
    (table, _) = inspection.table_traffic(partition, 60, np.ones(60))
    assert table.lookups == with_rows
    found = inspection.twins(qrhash.HashTrick(10, 5), np.array([3, 8, 60, 61]))
    assert [places.tolist() for places in found.sets] == [[0, 1]]


@pytest.mark.parametrize("name", PARTITIONS)
def test_hot_rows_are_those_that_most_look_ups_go_to(name, counts):
    partition, rows = PARTITIONS[name], _rows(PARTITIONS[name])
    found = inspection.table_traffic(partition, _ids(partition), counts, top=3, named=4)
    assert len(found) == partition.num_tables
    for table, traffic in enumerate(found):
        met, ids = Counter(), defaultdict(list)
        for place, index in enumerate(rows):
            if counts[place]:
                met[index[table]] += counts[place]
                ids[index[table]].append(place)
        assert traffic.num_rows == partition.num_rows[table]
        assert traffic.lookups == counts.sum()
        assert traffic.untouched == traffic.num_rows - len(met)
        assert [hot.lookups for hot in traffic.hot] == [count for _, count in met.most_common(3)]
        for hot in traffic.hot:
            assert hot.lookups == met[hot.row]
            assert hot.num_ids == len(ids[hot.row])
            assert set(hot.places.tolist()) <= set(ids[hot.row])
            named = sorted((counts[place] for place in ids[hot.row]), reverse=True)[:4]
            assert counts[hot.places].tolist() == named


def test_a_third_of_the_look_ups_is_of_the_head(counts):
    bands = inspection.frequency_bands(counts)
    in_order, before = sorted(range(60), key=lambda i: (-counts[i], i)), 0
    for place in in_order:
        third = 0 if 3 * before < counts.sum() else 1 if 3 * before < 2 * counts.sum() else 2
        assert bands[place] == (third if counts[place] else 3)
        before += counts[place]
    assert inspection.BANDS[3] == "never met"
    assert inspection.frequency_bands(np.zeros(3)).tolist() == [3, 3, 3]


# --- vectors --------------------------------------------------------------------------------------


@pytest.fixture
def planted(rng):
    """Vectors [60, 4]: some nearly equal, some equal, some zeros, one longer than another."""
    vectors = rng.normal(size=(60, 4))
    vectors[40] = vectors[3] * 1.02
    vectors[59] = vectors[3] + 0.01
    vectors[17] = vectors[30]
    vectors[21] = vectors[30] * 3
    vectors[5] = vectors[55] = 0
    return vectors


def _distance(a, b):
    longer = max(np.linalg.norm(a), np.linalg.norm(b))
    return np.linalg.norm(a - b) / longer if longer else 0.0


def test_near_twins_are_the_pairs_at_a_small_distance(planted, counts):
    pairs = itertools.combinations(range(60), 2)
    near = {(a, b): _distance(planted[a], planted[b]) for a, b in pairs}
    near = {pair: distance for pair, distance in near.items() if distance <= 0.1}
    assert {(3, 40), (3, 59), (40, 59), (17, 30), (5, 55)} == set(near)
    found = inspection.near_twins(planted.__getitem__, 60, counts)
    places = sorted({place for pair in near for place in pair})
    assert (found.num_ids, found.num_pairs, found.num_near) == (60, len(near), len(places))
    assert found.share == pytest.approx(counts[places].sum() / counts.sum())
    assert [pair[:2] for pair in found.pairs] == sorted(near, key=lambda pair: (near[pair], pair))
    for pair in found.pairs:
        a, b = planted[pair.first], planted[pair.second]
        assert pair.distance == pytest.approx(_distance(a, b), rel=1e-5)
        if a.any():
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert pair.cosine == pytest.approx(cosine, rel=1e-6)
    assert np.isnan(found.pairs[0].cosine)
    (first,) = inspection.near_twins(planted.__getitem__, 60, named=1).pairs
    assert first[:3] == found.pairs[0][:3]
    few = inspection.near_twins(planted.__getitem__, np.array([3, 9, 40]), closeness=0.03)
    assert (few.num_near, few.pairs[0][:2]) == (2, (0, 2))


def test_neighbours_have_the_greatest_cosines(planted):
    lengths = np.linalg.norm(planted, axis=1)
    cosines = [
        planted[30] @ planted[j] / (lengths[30] * lengths[j]) if lengths[j] else 0.0
        for j in range(60)
    ]
    wanted = sorted((j for j in range(60) if j != 30), key=lambda j: -cosines[j])[:7]
    found = inspection.neighbours(planted.__getitem__, 60, of=30, top=7)
    assert found.places.tolist()[2:] == wanted[2:]
    assert set(found.places.tolist()[:2]) == {17, 21}
    np.testing.assert_allclose(found.cosines, [cosines[j] for j in wanted], rtol=1e-5)
    found = inspection.neighbours(planted.__getitem__, 60, of=planted[30], top=3)
    assert set(found.places.tolist()) == {17, 21, 30}
    some = np.array([3, 9, 59, 40])
    assert inspection.neighbours(planted.__getitem__, some, of=0, top=2).places.tolist() == [3, 2]
    with pytest.raises(ValueError, match="of must be a place from 0 to 59, got 60"):
        inspection.neighbours(planted.__getitem__, 60, of=60)


@pytest.mark.parametrize("operation", ["project", "features"])
def test_vectors_are_those_of_a_config_and_its_tables(operation):
    config = qrhash.EmbedConfig(qrhash.QuotientRemainder(60, 7), 8, operation)
    tables = qrhash.init(jax.random.key(0), config)
    projection = qrhash.init_projection(jax.random.key(0), config)
    vectors = jax.jit(
        functools.partial(qrhash.lookup, tables, config=config, projection=projection)
    )
    every = np.asarray(vectors(np.arange(60))).reshape(60, -1)
    np.testing.assert_allclose(
        inspection.norms(vectors, 60), np.linalg.norm(every, axis=1), rtol=1e-5
    )
    ids = np.array([4, 50, 9])
    (place,) = inspection.neighbours(vectors, ids, of=1, top=1).places
    cosines = every[ids] @ every[50] / np.linalg.norm(every[ids], axis=1)
    assert place == np.argsort(-cosines)[1]


def test_a_module_gives_vectors_and_keys_are_ids():
    from flax import nnx

    config = qrhash.EmbedConfig(qrhash.MultiHash((6, 5)), 8)
    embed = qrhash.nnx.MultiHashEmbed(config, rngs=nnx.Rngs(0))
    keys = _ids(config.partition)
    vectors = nnx.jit(embed)
    wanted = np.linalg.norm(np.asarray(vectors(keys)), axis=1)
    np.testing.assert_allclose(inspection.norms(vectors, keys), wanted, rtol=1e-6)
    equal = inspection.twins(config.partition, keys)
    near = inspection.near_twins(vectors, keys)
    assert near.num_near >= equal.num_twins > 0


def test_of_no_ids_there_is_nothing():
    partition, none = qrhash.HashTrick(10, 3), np.zeros(0, int)
    assert inspection.twins(partition, none).num_twins == 0
    assert inspection.table_traffic(partition, none, none)[0].hot == ()
    assert inspection.near_twins(np.eye(3).__getitem__, none).pairs == ()
    assert inspection.norms(np.eye(3).__getitem__, none).shape == (0,)


def test_what_cannot_be_is_named():
    partition = qrhash.HashTrick(10, 3)
    with pytest.raises(ValueError, match=r"ids must be an array \[n\] of integers, Keys"):
        inspection.twins(partition, [1.5])
    with pytest.raises(ValueError, match="counts must be 10 numbers of at least 0, one for each"):
        inspection.table_traffic(partition, 10, np.ones(9))
    with pytest.raises(ValueError, match="counts must be 3 numbers of at least 0"):
        inspection.frequency_bands([1, -1, 2])
    with pytest.raises(ValueError, match="closeness must be above 0 and at most 1, got 0"):
        inspection.near_twins(np.eye(3).__getitem__, 3, closeness=0)
