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
from typer.testing import CliRunner

from qrhash import EmbedConfig, FullTable, KeyDigits, Keys, cli
from qrhash.ctr.data.block import Block, Lists
from qrhash.ctr.data.catalogue import Catalogue
from qrhash.ctr.data.pipeline import Padded
from qrhash.ctr.data.schema import Column, Schema
from qrhash.ctr.model.ranks import popularity_ranks, ranks, retrieved
from qrhash.ctr.model.softmax import Frequencies, in_batch_losses, same_items
from qrhash.ctr.model.towers import build_towers
from qrhash.ctr.run import retrieval
from qrhash.ctr.settings import Settings
from support import ctr_files
from support.training_process import assert_same_curve, numbers_of, train

STANDARD_PROMOTION = True  # optax.adam needs it
UNCHECKED_KEYS = True


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
@pytest.mark.usefixtures("keys_used_once")
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


def _padded(rows, length, *, keys=False):
    """Rows of ids as a batch has them, with anything in the places that are not taken."""
    ids, mask = np.full((len(rows), length), 5, np.int64), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return Padded(Keys.of(ids) if keys else ids.astype(np.int32), mask)


LISTS = {
    "seen": EmbedConfig(FullTable(9), 3),
    "genres": EmbedConfig(FullTable(7), 3, combiner="sum"),
    "words": EmbedConfig(KeyDigits(6, 2), 3),
}


def test_lists_go_to_the_tower_of_their_column(rng):
    """The pooled vectors stand behind the others; an empty list has zeros."""
    settings = Settings(model="two-tower", tower_mlp="4", temperature=0)
    items = ("item", "tag", "genres", "words")
    model = build_towers(settings, CONFIGS | LISTS, items, 0, tuple(LISTS))
    ids = rng.integers(0, 7, (3, 2)).astype(np.int32)
    keys = Keys.of(rng.integers(0, 2**60, (3, 2)))
    genres = [[], [6, 2, 2], [3]]
    seen, words = _padded([[1, 8], [0], []], 3), _padded([[2**50], [], [4, 7]], 2, keys=True)
    lists = [seen, _padded(genres, 4), words]

    query, item = model.query_tower, model.item_tower
    (table,) = map(np.asarray, item.embeddings.columns.tables["genres"])
    pooled = [table[row].sum(axis=0) for row in genres]
    *others, of_words = item.embeddings(ids[:, [1]], keys[:, [0]], lists[1:])
    assert not others[-1][0].any()
    found = _linear(item.out, np.concatenate([*others[:-1], pooled, of_words], axis=1))
    queries = query.embeddings(ids[:, [0]], keys[:, [1]], lists[:1])
    queries = _linear(query.out, np.concatenate(queries, axis=1))
    got = jax.jit(lambda *inputs: model.pair(jnp.zeros((3, 0)), *inputs))(ids, keys, lists)
    np.testing.assert_allclose(got[0], queries, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], found, rtol=1e-4, atol=1e-5)
    alone = model.items(*model.item_columns.own(ids, keys, lists))
    np.testing.assert_allclose(alone, got[1], rtol=1e-5, atol=1e-6)


def test_an_item_is_named_by_all_its_columns(rng):
    columns = build_towers(Settings(model="two-tower"), CONFIGS, ("item", "tag"), 0).item_columns
    ids = np.array([[1, 2], [3, 2], [1, 4], [1, 2]], np.int32)
    keys = Keys.of(np.array([[5, 6], [5, 9], [5, 6], [7, 6]]))
    named = columns.named(ids, keys).to_numpy()
    assert named[0] == named[1]  # Another user and shop
    assert len(set(named.tolist())) == 3
    on_device = jax.jit(columns.named)(ids, keys)
    np.testing.assert_array_equal(on_device.to_numpy(), named)


def test_an_item_is_named_by_its_lists_in_any_order():
    items = ("item", "genres", "words")
    configs = {"item": CONFIGS["item"], "user": CONFIGS["user"]} | LISTS
    columns = build_towers(Settings(model="two-tower"), configs, items, 0, tuple(LISTS))
    ids = np.array([[2, 1]] * 6, np.int32)
    none = Keys.of(np.zeros((6, 0), np.int64))
    genres = _padded([[1, 4], [4, 1], [1, 4, 4], [5], [], [4, 1]], 3)
    words = _padded([[2**60, 3]] * 5 + [[3]], 4, keys=True)
    seen = _padded([[6], [7], [], [8], [8], [6]], 2)
    given = (ids, none, [seen, genres, words])
    named = columns.item_columns.named(*given).to_numpy()
    assert named[0] == named[1]  # Of other queries
    assert len(set(named.tolist())) == 5
    longer = genres._replace(ids=np.pad(genres.ids, ((0, 0), (0, 2)), constant_values=1))
    longer = longer._replace(mask=np.pad(genres.mask, ((0, 0), (0, 2))))
    again = jax.jit(columns.item_columns.named)(ids, none, [seen, longer, words])
    np.testing.assert_array_equal(again.to_numpy(), named)


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


def _categories(*names, lists=()):
    uses = dict.fromkeys(names, "category") | dict.fromkeys(lists, "list")
    return Schema(columns=tuple(Column(name, "int64", "integer", uses[name]) for name in uses))


def test_some_columns_of_a_block_do_not_keep_its_numbers_in_memory():
    schema = _categories("a", "b", lists=("d",))
    block = Block(np.ones(3), np.ones((3, 64)), np.ones((3, 2), np.uint64), np.ones((3, 2), bool))
    part = block._replace(lists=(_lists([[1], [], [2]]),)).only(schema, schema.only(["b"]))
    assert part.numbers.shape == (3, 0)
    assert part.numbers.base is None
    assert part.lists == ()


def test_a_catalogue_counts_tuples(rng, monkeypatch):
    """Of categories, and of lists, which are bags: their elements stand in no order."""
    monkeypatch.setattr(Catalogue, "_LEAST_PENDING", 20)
    schema = _categories("a", "b", "c", lists=("d", "e"))
    blocks = []
    for rows in (13, 0, 40, 5, 30):
        keys = rng.integers(0, 3, (rows, 3)).astype(np.uint64)
        missing = rng.random((rows, 3)) < 0.2
        keys[missing] = 0
        none = np.zeros((rows, 0), np.float32)
        lists = tuple(_lists(rng.integers(0, 3, n) for n in rng.integers(0, 3, rows)) for _ in "de")
        blocks.append(Block(np.ones(rows, np.float32), none, keys, missing, lists=lists))

    def tuples(block, columns, lists):
        cells = np.where(block.missing, -1, block.keys.astype(np.int64))[:, columns].tolist()
        bags = [
            [tuple(sorted(each.keys[a:b].tolist())) for a, b in itertools.pairwise(each.offsets)]
            for each in (block.lists[k] for k in lists)
        ]
        return list(zip(map(tuple, cells), *bags, strict=True))

    cases = ((("a", "c"), [0, 2], []), (("a", "c", "e"), [0, 2], [1]), (("e",), [], [1]))
    for names, columns, lists in cases:
        catalogue = Catalogue(schema, names)
        assert list(catalogue.watching(blocks)) == blocks
        each = [tuples(block, columns, lists) for block in blocks]
        counts = collections.Counter(itertools.chain(*each))
        # In the order in which they were met.
        held = tuples(catalogue.items, range(len(columns)), range(len(lists)))
        assert held == list(counts)
        assert catalogue.counts.tolist() == list(counts.values())
        assert catalogue.rows == 88
        for block, wanted in zip(blocks, each, strict=True):
            assert [held[n] for n in catalogue.find(block)] == wanted
        others = tuple(each._replace(keys=each.keys + np.uint64(100)) for each in blocks[0].lists)
        other = blocks[0]._replace(
            keys=blocks[0].keys + np.uint64(100), missing=blocks[0].missing & False, lists=others
        )
        known = [] if columns else [held.index(((), ()))]  # The empty list
        assert set(catalogue.find(other).tolist()) == {-1, *known}
        assert Catalogue(schema, names).find(other).tolist() == [-1] * 13


def _lists(rows):
    """Rows of elements, as blocks have them."""
    rows = [np.asarray(row, np.uint64) for row in rows]
    offsets = np.cumsum([0, *map(len, rows)])
    return Lists(np.concatenate([np.zeros(0, np.uint64), *rows]), offsets)


# --- whole runs -----------------------------------------------------------------------------------

SMALL = ["--model=two-tower", "--features=8", "--tower-mlp=16-8", "--batch-size=64"]
SMALL += ["--dense-lr=0.01", "--table-lr=0.3", "--init-stddev=0.3", "--recall-at=5,10"]
SMALL += ["--epochs=3", "--evaluations=3", "--eval-rows=300"]
LIKED = ["--label=rating", "--positive-from=4"]
BY_MOVIE = ["--items=movie_id", "--ignore=genre"]
RATINGS = ctr_files.ratings(3000)
LIKES = [rating >= 4 for rating in RATINGS["rating"]]
TEST = range(2400, 3000)


def _train(path, *arguments, columns=RATINGS):
    """Trains; returns the records of the run."""
    data = ctr_files.write_table(path / "ratings.parquet", columns)
    result = train("--data", data, *SMALL, "--output-dir", path / "run", *arguments)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in (path / "run" / "metrics.jsonl").read_text().splitlines()]


def _defined(run):
    """The records of a run, without what is not defined."""
    return [{k: v for k, v in each.items() if v is not None} for each in numbers_of(run)]


def _scores(path, columns):
    """What `qrhash predict` makes of rows of some columns."""
    data = ctr_files.write_table(path / "asked.parquet", columns)
    arguments = ["--run", path / "run", "--data", data, "--output", path / "scores.parquet"]
    result = CliRunner().invoke(
        cli.build_app(), ["predict", "--overwrite", *map(str, arguments)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return pyarrow.parquet.read_table(path / "scores.parquet").to_pydict(), result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("towers")
    return path, _train(path, *LIKED, *BY_MOVIE)


def test_it_finds_what_is_liked_and_says_so(run):
    path, records = run
    kinds = [record["kind"] for record in records]
    assert kinds == ["settings", *["progress"] * 3, "summary"]
    summary = records[-1]
    assert summary["train_rows"] == 3 * sum(LIKES[:2400])
    assert summary["test_rows"] == sum(LIKES[2400:])
    # Fifteen movies in each of four genres: the best there is has the genre's order.
    assert summary["test_recall_10"] > summary["constant_recall_10"] + 0.3
    assert summary["test_mrr"] > 1.5 * summary["constant_mrr"]
    assert summary["test_log_loss"] < records[1]["test_log_loss"] < math.log(64)
    assert summary["constant_log_loss"] is None
    point = records[1]
    assert 0 < point["test_recall_5"] < point["test_recall_10"] < 1
    assert {name for name in point if "train" in name} == {"train_log_loss"}
    assert (path / "run" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_recall_is_that_of_all_scores(run):
    """`predict` scores every pair of a test row's query and a training item: sorted by hand."""
    path, _ = run
    items = sorted(
        {m for m, likes in zip(RATINGS["movie_id"][:2400], LIKES, strict=False) if likes}
    )
    rows = [row for row in TEST if LIKES[row]][:100]
    asked = {"user_id": [], "hour": [], "movie_id": []}
    for row in rows:
        asked["user_id"] += [RATINGS["user_id"][row]] * len(items)
        asked["hour"] += [RATINGS["hour"][row]] * len(items)
        asked["movie_id"] += items
    found, result = _scores(path, asked)
    assert list(found) == ["row", "score"]
    assert "no score is defined" not in result.output
    table = np.reshape(found["score"], (len(rows), len(items)))
    places = []
    for scores, row in zip(table, rows, strict=True):
        movie = RATINGS["movie_id"][row]
        if movie in items:
            places.append(1 + np.sum(scores > scores[items.index(movie)] + 1e-5))
        else:
            places.append(math.inf)
    places = np.array(places)
    # The same run, tested on these rows alone.
    last = rows[-1] + 1
    columns = ctr_files.rows_of(RATINGS, 0, last)
    (path / "again").mkdir()
    options = [f"--test-rows={last - 2400}", *LIKED, *BY_MOVIE]
    summary = _train(path / "again", *options, columns=columns)[-1]
    assert summary["test_rows"] == 100
    assert summary["test_recall_5"] == pytest.approx(np.mean(places <= 5), abs=0.011)
    assert summary["test_recall_10"] == pytest.approx(np.mean(places <= 10), abs=0.011)
    assert summary["test_mrr"] == pytest.approx(np.mean(1 / places), abs=2e-3)
    counts = collections.Counter(
        m for m, likes in zip(RATINGS["movie_id"][:2400], LIKES, strict=False) if likes
    )
    order = [count for _, count in counts.most_common()]
    hits = [counts[RATINGS["movie_id"][row]] > order[10] for row in rows]
    assert summary["constant_recall_10"] == pytest.approx(np.mean(hits), abs=0.05)


def test_predicted_are_the_products_of_the_vectors(run):
    path, _ = run
    found, result = _scores(path, ctr_files.rows_of(RATINGS, 2900, 3000))
    assert list(found) == ["row", "score", "label"]
    assert found["label"] == [int(likes) for likes in LIKES[2900:]]
    assert max(map(abs, found["score"])) <= 10.001  # 1 / temperature
    assert "AUC" in result.output
    assert "log loss" not in result.output
    liked, other = (
        np.mean([s for s, likes in zip(found["score"], LIKES[2900:], strict=True) if likes is want])
        for want in (True, False)
    )
    assert liked > other + 1


def test_inspected_are_vectors_and_rows_without_clicks(run, tmp_path):
    path, _ = run
    arguments = ["inspect", str(path / "run"), "--columns=user_id", "--neighbours=movie_id=1000"]
    arguments += ["--output-dir", str(tmp_path)]
    result = CliRunner().invoke(cli.build_app(), arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "Not scored: a run of two-tower has no clicks to score." in result.stdout
    found = json.loads((tmp_path / "inspect.json").read_text())
    assert found["all_rows"] is None
    assert found["counted_rows"] < len(RATINGS["rating"])
    assert len(found["neighbours"][0]["nearest"]) == 10


OTHERS = {
    "keys": ["--ids=keys", "--key-bits=12", *BY_MOVIE],
    "two columns": ["--items=movie_id,genre"],
    "two columns, hashed and compressed": [
        *("--items=genre,movie_id", "--hash-size=500", "--threshold=10", "--compression=3")
    ],
    "as they are": ["--temperature=0", *BY_MOVIE],
    "lists": ["--lists=genre", "--items=movie_id,genre"],
    "lists that grow": [
        *("--lists=genre", "--items=movie_id,genre", "--ids=keys", "--dynamic=200")
    ],
    "mesh, keys": ["--mesh=data=4", "--ids=keys", "--key-bits=12", *BY_MOVIE],
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_whatever_the_columns_are(options, tmp_path):
    records = _train(tmp_path, *LIKED, *options)
    summary = records[-1]
    assert summary["test_recall_10"] > summary["constant_recall_10"] + 0.3
    found, _ = _scores(tmp_path, ctr_files.rows_of(RATINGS, 2900, 3000))
    liked, other = (
        np.mean([s for s, likes in zip(found["score"], LIKES[2900:], strict=True) if likes is want])
        for want in (True, False)
    )
    assert liked > other + 1


def test_a_mesh_gives_the_same_numbers(run, tmp_path):
    _, wanted = run
    got = _train(tmp_path, *LIKED, *BY_MOVIE, "--mesh=data=2,model=2", "--large-table-rows=20")
    for name in ("test_log_loss", "test_recall_10", "test_mrr", "train_rows", "constant_mrr"):
        assert got[-1][name] == pytest.approx(wanted[-1][name], rel=0.02), name


def test_events_without_a_label(tmp_path):
    """Every row is a positive; and those that were none are not there."""
    columns = {
        name: [v for v, likes in zip(values, LIKES, strict=True) if likes]
        for name, values in RATINGS.items()
        if name not in ("rating", "hour")
    }
    rows = len(columns["genre"])
    records = _train(tmp_path, "--label=none", *BY_MOVIE, columns=columns)
    summary = records[-1]
    assert summary["train_rows"] + 3 * summary["test_rows"] == 3 * rows
    assert summary["test_recall_10"] > summary["constant_recall_10"] + 0.3
    found, _ = _scores(tmp_path, columns)
    assert list(found) == ["row", "score"]
    assert len(found["row"]) == rows


@pytest.mark.parametrize("options", [(), ("--ids=keys", "--key-bits=16")], ids=["ids", "keys"])
def test_lists_describe_a_query(options, tmp_path):
    """Of new users, who have no id, only what they have seen tells their taste."""
    columns = {name: list(RATINGS[name]) for name in ("movie_id", "genre", "rating")}
    liked = zip(columns["genre"], LIKES, strict=True)
    columns["seen"] = [
        [f"{g} {n % 3}", "film"] if likes else [] for n, (g, likes) in enumerate(liked)
    ]
    summary = _train(tmp_path, *LIKED, *BY_MOVIE, *options, columns=columns)[-1]
    assert summary["test_recall_10"] > summary["constant_recall_10"] + 0.3
    asked = {"movie_id": [1000, 1000], "seen": [["drama 1", "film"], ["western 1", "film"]]}
    found, _ = _scores(tmp_path, asked)  # Of a drama
    assert found["score"][0] > found["score"][1] + 1


FILMS = ctr_files.films(2500, items=400)
WATCHED = ["--label=none", "--recall-at=10,50", "--epochs=6"]
BY_LISTS = [*WATCHED, "--items=movie_id,genres"]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    path = tmp_path_factory.mktemp("films")
    return path, _train(path, *BY_LISTS, columns=FILMS)


def _items_of(columns):
    """The distinct items, each by its first row."""
    pairs = zip(columns["movie_id"], columns["genres"], strict=True)
    found = {}
    for film, genres in pairs:
        found.setdefault((film, tuple(sorted(genres or []))), (film, genres))
    return found


def test_predict_gives_the_scores_of_the_model_as_it_was_trained(tmp_path, monkeypatch):
    """Bit for bit: of the same rows in the same batches."""
    wanted = []
    tested = retrieval.Retrieval.tested

    def watched(goal, learner, batches, click_rate):
        batches = list(batches)
        wanted.extend(np.asarray(learner.logits(each))[each.weights > 0] for each in batches)
        return tested(goal, learner, batches, click_rate)

    monkeypatch.setattr(retrieval.Retrieval, "tested", watched)
    _train(tmp_path, *BY_LISTS, "--epochs=1", columns=FILMS)
    found, _ = _scores(tmp_path, ctr_files.rows_of(FILMS, 2000, 2500))
    np.testing.assert_array_equal(np.float32(found["score"]), np.concatenate(wanted))


def test_lists_describe_items(films, tmp_path):
    """Of films that were seldom watched, the genres tell whom they are for."""
    _, records = films
    alone = _train(tmp_path, *WATCHED, *BY_MOVIE[:1], "--ignore=genres", columns=FILMS)
    for name in ("test_recall_10", "test_recall_50"):
        assert records[-1][name] > 1.5 * alone[-1][name], name
    assert records[-1]["test_mrr"] > alone[-1]["test_mrr"]
    # In whatever order its genres are written, a film is one item.
    assert records[-1]["test_unseen"] == alone[-1]["test_unseen"]


def test_the_recall_of_items_with_lists_is_that_of_all_scores(films):
    """The candidates come with their lists: as `predict` scores them, sorted by hand."""
    path, records = films
    items = _items_of(ctr_files.rows_of(FILMS, 0, 2000))
    places = []
    wanted = list(items)
    rows = ctr_files.rows_of(FILMS, 2000, 2500)
    asked = {"user_id": [], "movie_id": [], "genres": [], "hour": []}
    for row in range(500):
        asked["user_id"] += [rows["user_id"][row]] * len(items)
        asked["hour"] += [rows["hour"][row]] * len(items)
        asked["movie_id"] += [film for film, _ in items.values()]
        asked["genres"] += [genres for _, genres in items.values()]
    found, _ = _scores(path, asked)
    table = np.reshape(found["score"], (500, len(items)))
    for row, scores in enumerate(table):
        item = rows["movie_id"][row], tuple(sorted(rows["genres"][row] or []))
        known = item in items
        own = scores[wanted.index(item)] if known else math.inf
        places.append(1 + np.sum(scores > own + 1e-5) if known else math.inf)
    places = np.array(places)
    for k in (10, 50):
        assert records[-1][f"test_recall_{k}"] == pytest.approx(np.mean(places <= k), abs=0.003)
    assert records[-1]["test_mrr"] == pytest.approx(np.mean(1 / places), abs=1e-3)


def test_the_vector_of_an_item_follows_its_list(films):
    """Of a new film, which has no id, the list alone tells; an empty one and a missing one too."""
    path, _ = films
    lists = [["war"], ["noir", "drama"], ["drama", "noir"], [], None]
    users = sorted(set(FILMS["user_id"]))
    asked = {
        "user_id": [user for user in users for _ in lists],
        "movie_id": [5] * len(users) * len(lists),
        "genres": lists * len(users),
        "hour": [3.0] * len(users) * len(lists),
    }
    found, _ = _scores(path, asked)
    scores = np.reshape(found["score"], (len(users), len(lists)))
    assert np.isfinite(scores).all()
    assert (abs(scores[:, 0] - scores[:, 1]) > 0.1).mean() > 0.9
    np.testing.assert_allclose(scores[:, 1], scores[:, 2], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scores[:, 3], scores[:, 4])
    # Whoever watches most films of war is scored higher for one of them.
    watched = collections.Counter(
        user
        for user, genres in zip(FILMS["user_id"], FILMS["genres"], strict=True)
        if "war" in (genres or [])
    )
    rows = collections.Counter(FILMS["user_id"])
    fans = np.array([watched[user] > 0.8 * rows[user] for user in users])
    assert 1 <= fans.sum() < len(users) / 2
    assert scores[fans, 0].mean() > scores[~fans, 0].mean() + 2


def test_other_lists_make_other_items(tmp_path):
    """As two columns do: who changes what describes an item has one more to choose from."""
    columns = {name: list(values) for name, values in FILMS.items()}
    pairs = len(_items_of(ctr_files.rows_of(columns, 0, 2000)))
    columns["genres"][0] = ["silent"]
    assert len(_items_of(ctr_files.rows_of(columns, 0, 2000))) == pairs + 1
    data = ctr_files.write_table(tmp_path / "f.parquet", columns)
    result = train("--data", data, *SMALL, *BY_LISTS, "--epochs=1", "--output-dir", tmp_path / "r")
    assert (
        f"items by movie_id, genres: {pairs + 1} in 2,000 positive training rows" in result.output
    )


def test_items_that_are_new_are_misses_and_told(tmp_path):
    columns = {name: list(values) for name, values in RATINGS.items()}
    columns["movie_id"][2700:] = [m + 1 for m in columns["movie_id"][2700:]]
    data = ctr_files.write_table(tmp_path / "r", columns)
    result = train("--data", data, *SMALL, *LIKED, *BY_MOVIE, "--output-dir", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    share = sum(LIKES[2700:]) / sum(LIKES[2400:])
    assert summary["test_unseen"] == pytest.approx(share)
    assert summary["test_recall_10"] < 1 - share
    assert f"{share:.2%}" in result.output
    assert "items by movie_id: " in result.output


RESUMED = {
    "counts": (RATINGS, [*LIKED, *BY_MOVIE]),
    "stream": (RATINGS, [*LIKED, "--items=movie_id,genre"]),
    "lists": (FILMS, [*BY_LISTS, "--epochs=2"]),
}


@pytest.mark.parametrize(("columns", "options"), RESUMED.values(), ids=RESUMED)
def test_a_run_that_is_resumed_comes_to_the_same(columns, options, tmp_path):
    (tmp_path / "whole").mkdir()
    arguments = [*options, "--checkpoint-every=7", "--keep-checkpoints=50"]
    _train(tmp_path / "whole", *arguments, columns=columns)
    wanted = _defined(tmp_path / "whole" / "run")
    checkpoints = tmp_path / "whole" / "run" / "checkpoints"
    steps = sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
    for step in steps[len(steps) // 2 :]:
        (checkpoints / str(step)).rename(tmp_path / f"{step}")
    result = train("--resume", "--output-dir", tmp_path / "whole" / "run")
    assert result.exit_code == 0, result.output
    assert "resuming after" in result.output
    got = _defined(tmp_path / "whole" / "run")
    assert_same_curve(got, wanted)
    for name in ("test_recall_10", "test_mrr"):
        assert got[-1][name] == pytest.approx(wanted[-1][name], abs=5e-3)


def test_the_best_by_validation_rows_is_kept(tmp_path):
    options = ["--validation-fraction=0.2", "--patience=2", "--epochs=40", "--evaluations=40"]
    records = _train(tmp_path, *LIKED, *BY_MOVIE, *options)
    points = [record for record in records if "validation_log_loss" in record]
    losses = [point["validation_log_loss"] for point in points]
    assert losses[-2:] > [min(losses)] * 2
    assert 2 < len(points) < 40
    assert records[-1]["best_rows"] == points[int(np.argmin(losses))]["rows"]
    assert 0 < points[0]["validation_recall_10"] < 1


def test_frequencies_taken_out_make_for_higher_recall(tmp_path, monkeypatch):
    """Where some are a hundred times as popular as others, the loss without them hides those."""
    columns = ctr_files.ratings(4000, items=200, skew=1.2)
    found = {}
    for kind in ("counts", "stream", "none"):
        (tmp_path / kind).mkdir()
        with monkeypatch.context() as patch:
            if kind == "stream":
                patch.setattr(retrieval.Retrieval, "_counts", lambda self: None)
            if kind == "none":
                patch.setattr(retrieval.Retrieval, "_counts", lambda self: np.ones(1000))
            found[kind] = _train(tmp_path / kind, *LIKED, *BY_MOVIE, columns=columns)[-1]
    for name in ("test_recall_5", "test_recall_10", "test_mrr"):
        assert found["counts"][name] > 1.4 * found["none"][name]
        assert found["stream"][name] > 0.9 * found["counts"][name]


# --- what is refused ------------------------------------------------------------------------------


def test_what_cannot_be_is_one_sentence(tmp_path):
    data = ctr_files.write_table(tmp_path / "r.parquet", RATINGS)
    bare = {name: values for name, values in RATINGS.items() if name in ("user_id", "movie_id")}
    bare = ctr_files.write_table(tmp_path / "b.parquet", bare)

    def says(sentence, *options, data=data):
        result = train("--data", data, *options, "--output-dir", tmp_path / "run")
        assert result.exit_code == 1
        (error,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
        assert sentence in error
        assert not (tmp_path / "run").exists()

    two = ["--model=two-tower", *LIKED]
    says("Name them with --items, of the categories and lists user_id, movie_id, genre", *two)
    neither = "is neither a category nor a list of the data; these are: user_id, movie_id, genre"
    says(f"--items: 'hour' {neither}", *two, "--items=hour")
    says(f"--items: 'film' {neither}", *two, "--items=film")
    names = ["--label=none", "--model=two-tower", "--items=user_id,movie_id"]
    says("--items names every column: none is left to describe the query by", *names, data=bare)
    lists = {name: FILMS[name] for name in ("movie_id", "genres")}
    lists = ctr_files.write_table(tmp_path / "l.parquet", lists)
    every = [*names[:2], "--items=genres,movie_id"]
    says("--items names every column: none is left", *every, data=lists)
    says("or say --label none, if every row is a positive", "--model=two-tower", "--items=movie_id")
    says("label 'none' goes with model 'two-tower', not 'dlrm'", "--label=none")
    both = ["--label=none", "--positive-from=4", "--model=two-tower", "--items=movie_id"]
    says("positive_from goes with a label, not with label 'none'", *both)
    says("items goes with model 'two-tower', not 'dlrm'", *LIKED, "--items=movie_id")
    says("temperature goes with model 'two-tower'", *LIKED, "--temperature=1", "--model=dcn")
    says("recall_at must be positive integers such as 10,100, got '0'", *two, "--recall-at=0")
    says("tower_mlp must be positive widths", *two, *BY_MOVIE, "--tower-mlp=8-x")
    says("tower_mlp must name the width", *two, *BY_MOVIE, "--tower-mlp=")
    high = ["--label=rating", "--positive-from=9", "--model=two-tower", *BY_MOVIE]
    says("None of the training rows is positive", *high)
    (tmp_path / "c.toml").write_text("[columns.movie_id]\npartition = 'drop'\n")
    says("All items are dropped", *two, *BY_MOVIE, "--config", tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text("[columns.user_id]\npartition = 'drop'\n")
    dropped = ["--ignore=genre,hour", "--items=movie_id", "--config", tmp_path / "c.toml"]
    says("nothing to describe a query by but columns that are dropped", *two, *dropped)
