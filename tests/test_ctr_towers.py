"""Two towers: their vectors, the in-batch softmax, the ranks, and whole runs."""

import collections
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from flax import nnx
from typer.testing import CliRunner

from qrhash import EmbedConfig, FullTable, KeyDigits, Keys, cli
from qrhash.ctr.data.block import Block
from qrhash.ctr.data.catalogue import Catalogue
from qrhash.ctr.model.ranks import popularity_ranks, ranks, retrieved
from qrhash.ctr.model.softmax import Frequencies, in_batch_losses, same_items
from qrhash.ctr.model.towers import build_towers
from qrhash.ctr.run import retrieval
from qrhash.ctr.settings import Settings
from support import ctr_files
from support.training_process import assert_same_curve, compiled_once, numbers_of, train

STANDARD_PROMOTION = True  # optax.adam needs it


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


# --- the model ------------------------------------------------------------------------------------

CONFIGS = {
    "user": EmbedConfig(FullTable(9), 3),
    "item": EmbedConfig(FullTable(7), 3),
    "tag": EmbedConfig(KeyDigits(6, 2), 3),
    "shop": EmbedConfig(KeyDigits(4, 2), 3),
}


def _linear(layer, x):
    return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


@pytest.mark.parametrize("temperature", [0.0, 0.25])
def test_towers_are_mlps_of_their_columns(temperature, rng):
    settings = Settings(
        model="two-tower", items="item,tag", tower_mlp="5-4", temperature=temperature
    )
    model = build_towers(settings, CONFIGS, ("item", "tag"), 2)
    numbers = rng.normal(size=(6, 2)).astype(np.float32)
    ids = rng.integers(0, 7, (6, 2)).astype(np.int32)
    keys = Keys.of(rng.integers(0, 2**60, (6, 2)))

    def tower(tower, inputs):
        hidden = np.maximum(_linear(tower.hidden.layers[0], inputs), 0)
        out = _linear(tower.out, hidden)
        if temperature:
            out = out / np.linalg.norm(out, axis=1, keepdims=True) / math.sqrt(temperature)
        return out

    def of_keys(module, name, column):
        one, other = map(np.asarray, module.embeddings.columns.tables[name])
        rows = CONFIGS[name].partition.indices(keys[:, column])
        return one[rows[0]] * other[rows[1]]

    query, item = model.query_tower, model.item_tower
    (users,), (items,) = (
        m.embeddings.columns.tables[n] for m, n in ((query, "user"), (item, "item"))
    )
    shop, tag = of_keys(query, "shop", 1), of_keys(item, "tag", 0)
    queries = tower(query, np.concatenate([numbers, np.asarray(users)[ids[:, 0]], shop], axis=1))
    found = tower(item, np.concatenate([np.asarray(items)[ids[:, 1]], tag], axis=1))
    got = model.pair(numbers, ids, keys)
    np.testing.assert_allclose(got[0], queries, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], found, rtol=1e-4, atol=1e-5)
    scores = np.sum(queries * found, axis=1)
    np.testing.assert_allclose(model(numbers, ids, keys), scores, rtol=1e-4, atol=1e-5)
    assert temperature == 0 or abs(scores).max() <= 1 / temperature + 1e-4


def test_an_item_is_named_by_all_its_columns(rng):
    columns = build_towers(Settings(model="two-tower"), CONFIGS, ("item", "tag"), 0).columns
    ids = np.array([[1, 2], [3, 2], [1, 4], [1, 2]], np.int32)
    keys = Keys.of(np.array([[5, 6], [5, 9], [5, 6], [7, 6]]))
    named = columns.named(ids, keys).to_numpy()
    assert named[0] == named[1]  # Another user and shop
    assert len(set(named.tolist())) == 3
    on_device = jax.jit(columns.named)(ids, keys)
    np.testing.assert_array_equal(on_device.to_numpy(), named)


# --- the loss -------------------------------------------------------------------------------------


def test_the_in_batch_softmax_is_that_of_loops(rng):
    rows = 9
    items = np.array([3, 5, 3, 8, 5, 3, 2, 8, 1])
    weights = np.array([1, 1, 1, 1, 0, 1, 1, 0, 1], np.float32)
    scores = rng.normal(size=(rows, rows)).astype(np.float32)
    log_q = rng.normal(size=rows).astype(np.float32)
    same = same_items(Keys.of(items))
    got = in_batch_losses(jnp.asarray(scores), jnp.asarray(log_q), same, weights)
    for i in np.flatnonzero(weights):
        candidates = [j for j in range(rows) if j == i or (weights[j] and items[j] != items[i])]
        terms = [math.exp(scores[i, j] - log_q[j]) for j in candidates]
        wanted = -math.log(math.exp(scores[i, i] - log_q[i]) / sum(terms))
        assert got[i] == pytest.approx(wanted, rel=1e-5)
    assert np.isfinite(got).all()

    # What is no candidate has no gradient, nor has the item of a row as its own negative.
    def total(scores):
        return jnp.sum(in_batch_losses(scores, jnp.asarray(log_q), same, weights) * weights)

    gradient = np.asarray(jax.grad(total)(jnp.asarray(scores)))
    assert not gradient[:, weights == 0].any()
    assert not gradient[weights == 0].any()
    assert gradient[0, 2] == gradient[2, 5] == 0 != gradient[0, 1]


class _Averages:
    """Moving averages, in dictionaries."""

    def __init__(self):
        self.last, self.gaps, self.counts, self.visits = {}, {}, {}, collections.Counter()

    def met(self, step, items, rate):
        for item, count in collections.Counter(items).items():
            gap = step - self.last.get(item, 0)
            self.visits[item] += 1
            new = max(rate, 1 / self.visits[item])
            gap = (1 - new) * self.gaps.get(item, 0) + new * gap
            count = (1 - new) * self.counts.get(item, 0) + new * count
            self.last[item], self.gaps[item], self.counts[item] = step, gap, count

    def log_q(self, item):
        return math.log(self.counts[item] / self.gaps[item])


def test_frequencies_are_moving_averages_of_gaps_and_counts(rng):
    frequencies, averages = Frequencies.create(buckets=1 << 12), _Averages()
    met = jax.jit(lambda f, items, weights: f.met(Keys.of(items), weights, rate=0.1))
    weights = np.array([1] * 7 + [0], np.float32)
    for step in range(1, 40):
        items = np.minimum(rng.geometric(0.2, 8), 12).astype(np.int32)
        frequencies = met(frequencies, items, weights)
        averages.met(step, items[:7].tolist(), 0.1)
    every = np.array(sorted(averages.last), np.int32)
    got = frequencies.log_q(Keys.of(every))
    np.testing.assert_allclose(got, [averages.log_q(item) for item in every], rtol=1e-4, atol=1e-5)
    # One that never came, and one of weight 0.
    frequencies = met(frequencies, np.array([1] * 7 + [99], np.int32), weights)
    never = frequencies.log_q(Keys.of(np.array([99, 77], np.int32)))
    np.testing.assert_allclose(never, [-math.log(41)] * 2, rtol=1e-6)


def test_frequencies_come_near_to_the_truth(rng):
    """Of items that are in every batch many times, and of such as are in one of fifty."""
    probabilities = np.arange(1.0, 201) ** -1.1
    probabilities /= probabilities.sum()
    frequencies = Frequencies.create(buckets=1 << 12)
    met = jax.jit(lambda f, items: f.met(Keys.of(items), np.ones(64, np.float32), rate=0.02))
    for _ in range(1500):
        frequencies = met(frequencies, rng.choice(200, 64, p=probabilities).astype(np.int32))
    log_q = np.asarray(frequencies.log_q(Keys.of(np.arange(200, dtype=np.int32))))
    errors = log_q - np.log(64 * probabilities)
    assert abs(errors[:5]).max() < 0.2
    assert np.sqrt(np.mean(errors**2)) < 0.25


def test_items_that_share_a_place_do_not_look_frequent():
    """With one hash an item takes over the frequency of another one; with two seldom both."""

    def estimates(hashes, buckets):
        rng = np.random.default_rng(0)
        frequencies = Frequencies.create(hashes=hashes, buckets=buckets)
        met = jax.jit(lambda f, items: f.met(Keys.of(items), np.ones(8, np.float32)))
        for step in range(60):
            rare = np.array([100 + step % 20], np.int32)
            frequent = rng.integers(0, 8, 7).astype(np.int32)
            frequencies = met(frequencies, np.concatenate([rare, frequent]))
        return np.asarray(frequencies.log_q(Keys.of(np.arange(100, 120, dtype=np.int32))))

    alone = estimates(1, 1 << 16)
    with_one, with_three = estimates(1, 64) - alone, estimates(3, 64) - alone
    assert with_one.max() > 1
    assert with_three.mean() < with_one.mean() / 3


# --- the ranks ------------------------------------------------------------------------------------


def test_ranks_are_those_of_all_scores(rng):
    """Against sorting; with equal items, blocks, and padding that would be the best of all."""
    items = rng.integers(-2, 3, (50, 3)).astype(np.float32)
    queries = rng.integers(-2, 3, (30, 3)).astype(np.float32)
    wanted = rng.integers(-1, 50, 30)
    padded = np.concatenate([items, np.full((14, 3), 100, np.float32) * np.sign(queries[0])])
    got = ranks(queries, [padded[:32], padded[32:]], wanted, 50)
    for query, item, rank in zip(queries, wanted, got, strict=True):
        scores = items @ query
        if item < 0:
            assert rank == math.inf
            continue
        order = np.sort(-scores)
        places = 1 + np.flatnonzero(order == -scores[item])
        assert rank == places.mean()
    assert len(set(got.tolist())) > 10


def test_ranks_by_popularity(rng):
    counts = np.array([5, 9, 5, 1, 5])
    got = popularity_ranks(counts, np.array([1, 0, 2, 3, -1]))
    assert got.tolist() == [1, 3, 3, 5, math.inf]


def test_recall_and_reciprocal_rank():
    found = retrieved(np.array([1, 2, 10, 10.5, math.inf]), (1, 10), 0.5)
    assert found.recall == {1: 0.2, 10: 0.6}
    assert found.mrr == pytest.approx((1 + 0.5 + 0.1 + 1 / 10.5) / 5)
    assert (found.unseen, found.rows, found.log_loss) == (0.2, 5, 0.5)
    assert found.named()["recall_10"] == 0.6
    assert math.isnan(retrieved(np.zeros(0), (1,)).recall[1])


def test_a_catalogue_counts_tuples(rng, monkeypatch):
    monkeypatch.setattr(Catalogue, "_LEAST_PENDING", 20)
    blocks = []
    for rows in (13, 0, 40, 5, 30):
        keys = rng.integers(0, 4, (rows, 3)).astype(np.uint64)
        missing = rng.random((rows, 3)) < 0.2
        keys[missing] = 0
        none = np.zeros((rows, 0), np.float32)
        blocks.append(Block(np.ones(rows, np.float32), none, keys, missing))
    catalogue = Catalogue([2, 0])
    assert list(catalogue.watching(blocks)) == blocks

    def tuples(block):
        columns = [np.where(block.missing, -1, block.keys.astype(np.int64))[:, j] for j in (2, 0)]
        return list(zip(*(column.tolist() for column in columns), strict=True))

    counts = collections.Counter(itertools.chain(*map(tuples, blocks)))
    held = np.where(catalogue.missing, -1, catalogue.keys.astype(np.int64)).tolist()
    assert [tuple(each) for each in held] == list(counts)  # In the order in which they were met.
    assert catalogue.counts.tolist() == list(counts.values())
    assert catalogue.rows == 88
    for block in blocks:
        assert [list(counts)[n] for n in catalogue.find(block)] == tuples(block)
    other = blocks[0]._replace(
        keys=blocks[0].keys + np.uint64(100), missing=blocks[0].missing & False
    )
    assert set(catalogue.find(other).tolist()) == {-1}
    assert Catalogue([0]).find(other).tolist() == [-1] * 13
