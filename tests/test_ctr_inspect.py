"""`qrhash inspect`: what it says of a run, against loops over its rows; and what can be wrong."""

import io
import json
import math
import random
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from rich.console import Console
from typer.testing import CliRunner

from qrhash import cli, inspection
from qrhash.ctr.data.counts import KeyCounts
from qrhash.ctr.data.names import names_of
from qrhash.ctr.data.population import population
from qrhash.ctr.data.vocabulary import HashedIds, RawKeys
from qrhash.ctr.model.models import column_vectors
from qrhash.ctr.run import again
from qrhash.ctr.run import inspect as inspecting
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.inspect_report import FIGURES, PICTURE
from qrhash.ctr.run.trained import kept_of, load_trained
from qrhash.strings import hash_strings
from support import ctr_files
from support.training_process import numbers_of, train

STANDARD_PROMOTION = True  # optax.adam needs it
UNCHECKED_KEYS = True

ROWS, TESTED = 800, 200
CONFIG = """
features = 4
bottom_mlp = "8"
top_mlp = "8"
batch_size = 50
evaluations = 2
test_rows = 200
threshold = 8
columns.item = {partition = "hash-trick", collisions = 4}
columns.page = {hash_size = 7}
columns.device = {ids = "keys", key_bits = 5}
columns.visit = {dynamic = 12, evict_after = 1000}
"""


def _events():
    """Users who like items or not, one item that is met in a third of all rows, and lists of tags.

    Nobody meets the last user but the test.
    """
    rng = random.Random(0)
    rows = defaultdict(list)
    for row in range(ROWS):
        user = min(int(rng.expovariate(0.1)), 49)
        item = 7 if rng.random() < 1 / 3 else rng.randrange(30)
        like = (user % 2 == item % 2) == (rng.random() < 0.9)
        rows["user"].append("visitor" if row >= ROWS - 5 else f"user-{user}")
        rows["item"].append(item - 10)
        rows["page"].append(f"page-{rng.randrange(15)}")
        rows["device"].append(rng.randrange(2**63) % 97)
        rows["visit"].append(f"visit-{min(int(rng.expovariate(0.05)), 60)}")
        rows["tags"].append(rng.sample(["a", "b", "c", "d"], rng.randrange(4)))
        rows["clicked"].append(int(like))
    return dict(rows)


def _inspect(*arguments):
    arguments = ["inspect", *map(str, arguments)]
    return CliRunner().invoke(
        cli.build_app(), arguments, env={"COLUMNS": "200"}, catch_exceptions=False
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, its events, what inspect found and said of it, and the score of each row."""
    path = tmp_path_factory.mktemp("inspected")
    events = _events()
    data = ctr_files.write_table(path / "events.parquet", events)
    (path / "config.toml").write_text(CONFIG)
    categories = "--categories=user,item,page,device,visit"
    options = [f"--config={path / 'config.toml'}", "--data", data, categories]
    result = train(*options, "--output-dir", path / "run")
    assert result.exit_code == 0, result.output
    asked = ["--neighbours=user=user-3", "--neighbours=item=-3", "--neighbours=visit=visit-1"]
    said = _inspect(path / "run", *asked, "--top=5")
    assert said.exit_code == 0, said.output
    scores = path / "scores.parquet"
    arguments = ["predict", str(path / "run"), "--data", str(data), "--output", str(scores)]
    assert CliRunner().invoke(cli.build_app(), arguments).exit_code == 0
    found = json.loads((path / "run" / FIGURES).read_text())
    logits = pyarrow.parquet.read_table(scores)["logit"].to_numpy()
    return path, events, found, said, logits


def _counts(events, column):
    """How often each value of the training rows is met."""
    some = events[column][: ROWS - TESTED]
    return Counter(value for row in some for value in (row if column == "tags" else [row]))


def _band_of(counts):
    """value -> its band, by a walk from the most frequent on."""
    bands, before, total = {}, 0, sum(counts.values())
    for value, count in counts.most_common():
        bands[value] = min(2, 3 * before // total)
        before += count
    return bands


@pytest.fixture(scope="module")
def model(made):
    """The trained model, as predict has it."""

    return load_trained(kept_of(made[0] / "run"), Display(Console(file=io.StringIO())))


def test_all_rows_have_the_scores_of_the_run(made):
    path, _, found, _, _ = made
    summary = numbers_of(path / "run")[-1]
    assert found["counted_rows"] == ROWS - TESTED
    assert found["all_rows"]["lookups"] == TESTED
    assert found["all_rows"]["log_loss"] == pytest.approx(summary["test_log_loss"], rel=1e-6)
    assert found["all_rows"]["auc"] == pytest.approx(summary["test_auc"])
    assert found["steps"] == 12
    assert set(found["columns"]) == {"user", "item", "page", "device", "visit", "tags"}


@pytest.mark.parametrize("column", ["user", "item", "device", "visit", "tags"])
def test_head_middle_and_tail_are_scored_by_their_look_ups(column, made):
    _, events, found, _, logits = made
    counts = _counts(events, column)
    # Of ids met as often as those at an edge either may be behind it: these are left out.
    bands = _band_of(counts)
    lookups = defaultdict(list)
    for row in range(ROWS - TESTED, ROWS):
        values = events[column][row] if column == "tags" else [events[column][row]]
        for value in values:
            lookups[bands.get(value, 3)].append(row)
    of_column = found["columns"][column]["bands"]
    assert sum(each["lookups"] for each in of_column.values()) == sum(map(len, lookups.values()))
    for band, name in enumerate(inspection.BANDS):
        inside, outside = (
            {counts[value] for value, of in bands.items() if (of == band) == is_inside}
            for is_inside in (True, False)
        )
        if inside & outside or not lookups[band]:
            continue
        rows = lookups[band]
        labels = [events["clicked"][row] for row in rows]
        losses = [
            math.log1p(math.exp(-z if y else z)) for y, z in zip(labels, logits[rows], strict=True)
        ]
        got = of_column[name]
        assert got["lookups"] == len(rows)
        assert got["log_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert got["clicked"] == pytest.approx(np.mean(labels))
        assert got["predicted"] == pytest.approx(np.mean(1 / (1 + np.exp(-logits[rows]))), rel=1e-5)
    if column == "user":
        assert of_column["never met"]["lookups"] >= 5
        assert found["columns"]["user"]["met"] == len(counts)


def test_the_hash_trick_has_twins_and_its_hot_row_is_of_the_planted_item(made, model):
    """By the ids that the run gave the items: four to a row."""
    _, events, found, _, _ = made
    counts, of_item = _counts(events, "item"), found["columns"]["item"]
    keys = np.array(list(counts), np.int64).view(np.uint64)
    ids = model.ids["item"](keys, np.zeros(len(keys), bool))
    (rows,) = model.configs["item"].partition.indices(ids)
    sharing = defaultdict(set)
    for value, row in zip(counts, rows.tolist(), strict=True):
        sharing[row].add(str(value))
    sets = [values for values in sharing.values() if len(values) > 1]
    twins = of_item["twins"]
    assert (twins["sets"], twins["ids"]) == (len(sets), sum(map(len, sets)))
    assert {frozenset(each["first"]) for each in twins["most_met"]} == set(map(frozenset, sets))
    for each in twins["most_met"]:
        assert each["ids"] == len(each["first"])
        assert each["met"] == sum(counts[int(value)] for value in each["first"])
    (table,) = of_item["tables"]
    hot = table["hot"][0]
    assert hot["ids"][0] == {"id": "-3", "met": counts[-3]}
    on_it = next(values for values in sharing.values() if "-3" in values)
    assert {each["id"] for each in hot["ids"]} <= on_it
    total = sum(counts[int(value)] for value in on_it)
    assert hot["share"] == pytest.approx(total / (ROWS - TESTED))
    assert hot["sharing"] == len(on_it)
    assert table["untouched"] == table["rows"] - len(sharing)
    assert found["columns"]["user"]["twins"]["ids"] == 0
    assert of_item["near_twins"]["ids"] >= twins["ids"]


@pytest.mark.parametrize(("column", "value"), [("user", "user-3"), ("visit", "visit-1")])
def test_neighbours_are_the_nearest_of_all_vectors(column, value, made, model):
    _, events, found, _, _ = made
    counts = _counts(events, column)
    values = list(counts)
    keys = np.array([_key(each) for each in values], np.uint64)
    taken = model.ids[column](keys, np.zeros(len(keys), bool))
    of_column = model.learner.compiled(lambda model, ids, _: column_vectors(model, column, ids))
    vectors, has_row = map(np.asarray, of_column(taken))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = units @ units[values.index(value)]
    cosines[values.index(value)] = -2
    (asked,) = (each for each in found["neighbours"] if each["column"] == column)
    got = {each["id"]: each["cosine"] for each in asked["nearest"]}
    assert asked["value"] == value
    assert len(got) == 5
    np.testing.assert_allclose(list(got.values()), np.sort(cosines)[::-1][:5], rtol=1e-4)
    for name, cosine in got.items():
        assert cosine == pytest.approx(cosines[values.index(name)], rel=1e-4)
    norms = np.linalg.norm(vectors, axis=1)
    bands = found["columns"][column]["bands"]
    assert min(norms) <= bands["head"]["norms"][1] <= max(norms)
    if column == "visit":
        with_row = found["columns"]["visit"]["with_row"]
        assert with_row["ids"] == has_row.sum()
        met = sum(counts[each] for each, has in zip(values, has_row, strict=True) if has)
        assert with_row["share"] == pytest.approx(met / (ROWS - TESTED))
        (room,) = found["growing"]
        assert (room["capacity"], room["columns"]) == (12, ["visit"])
        assert 0 < room["keys"] <= 12


def _key(text):
    return hash_strings(np.array([text]))[0]


def test_keys_and_hashes_have_names(made):
    """Of hashed ids that of the most frequent value; rows of keys that none goes to are idle."""
    _, events, found, _, _ = made
    of_page, of_device = found["columns"]["page"], found["columns"]["device"]
    counts = _counts(events, "page")
    assert (of_page["ids"], of_page["embedding"]) == (7, "FullTable 7 x 4")
    (table,) = of_page["tables"]
    assert {each["id"] for hot in table["hot"] for each in hot["ids"]} <= set(counts)
    assert of_device["ids"] == len(_counts(events, "device"))
    assert of_device["twins"]["ids"] > 0
    names = {name for each in of_device["twins"]["most_met"] for name in each["first"]}
    assert names <= set(map(str, events["device"]))


def test_what_is_said_and_drawn(made):
    path, _, _, said, _ = made
    assert (path / "run" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert not list((path / "run").glob("part-*"))
    assert "hash trick" in said.stdout
    assert f"{TESTED} of the test rows of" in said.stdout
    assert "nearest to item -3, met " in said.stdout
    assert "Rows that grow, of visit: " in said.stdout
    assert "visit: each key with a row has it for itself" in said.stdout
    assert f"{FIGURES} and {PICTURE} are in {path / 'run'}" in said.stderr
    for columns in ("80", "200"):
        result = CliRunner().invoke(
            cli.build_app(), ["inspect", "--help"], env={"COLUMNS": columns}
        )
        assert "--neighbours" in result.stdout


def test_other_data_are_scored_and_tell_the_counts_where_the_runs_are_gone(made, tmp_path):
    path, events, _, _, _ = made
    some = ctr_files.rows_of(events, 0, 100)
    data = ctr_files.write_table(tmp_path / "some.parquet", some)
    given = ["--data", data, "--output-dir", tmp_path / "a", "--columns=user"]
    result = _inspect("--run", path / "run", *given)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "a" / FIGURES).read_text())
    assert (found["counted_rows"], found["all_rows"]["lookups"]) == (ROWS - TESTED, 100)

    run = shutil.copytree(path / "run", tmp_path / "run")
    moved = (run / "metrics.jsonl").read_text().replace("events.parquet", "gone.parquet")
    (run / "metrics.jsonl").write_text(moved)
    result = _inspect(run)
    assert result.exit_code == 1
    assert "gone.parquet. Other data to look at can be named with --data." in result.stderr
    del some["clicked"]
    data = ctr_files.write_csv(tmp_path / "some.csv", some | {"tags": [""] * 100})
    result = _inspect(run, "--data", data, "--columns=item", "--neighbours=user=user-3")
    assert result.exit_code == 0, result.output
    assert "How often ids are met is told by" in result.stderr
    assert "Not scored: no row of" in result.stdout
    found = json.loads((run / FIGURES).read_text())
    assert (found["counted_rows"], found["all_rows"]) == (100, None)
    assert set(found["columns"]) == {"user", "item"}

    ctr_files.write_table(tmp_path / "gone.parquet", ctr_files.rows_of(events, 0, 700))
    (run / "metrics.jsonl").write_text(moved.replace(str(path), str(tmp_path)))
    assert "is not as it was when" in _inspect(run).stderr


WRONG = {
    "neither": ([], "One run must be given, as RUN or with --run, got neither."),
    "no run": (["nowhere"], "There is no run in nowhere: it holds no metrics.jsonl."),
    "column": (["RUN", "--columns=usr"], "--columns: the model has no embedded column 'usr'; it"),
    "asked": (["RUN", "--neighbours=usr=3"], "--neighbours: the model has no embedded column"),
    "no value": (["RUN", "--neighbours=user"], "--neighbours must be COLUMN=VALUE, such as user"),
    "value": (["RUN", "--neighbours=user=me"], "user was 'me' in no row that was counted."),
    "tested": (["RUN", "--neighbours=user=visitor"], "user was 'visitor' in no row that was"),
    "output": (["RUN", "--output-dir=RUN/ids.npz/x"], "ids.npz is no directory: choose another"),
    "data": (["RUN", "--data=absent.csv"], "There is no file or folder absent.csv"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_one_sentence(name, made):
    path, (arguments, sentence) = made[0], WRONG[name]
    run = str(path / "run")
    result = _inspect(*(each.replace("RUN", run) for each in arguments))
    assert result.exit_code == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert sentence in error
    assert "Traceback" not in result.output


def test_a_damaged_run_is_one_sentence(made, tmp_path):
    run = shutil.copytree(made[0] / "run", tmp_path / "run")
    (run / "ids.npz").write_bytes((run / "ids.npz").read_bytes()[:-30])
    assert "ids.npz cannot be read" in _inspect(run).stderr
    shutil.copy(made[0] / "run" / "ids.npz", run)
    shutil.rmtree(run / "checkpoints")
    assert "holds no complete checkpoint, and so no trained model" in _inspect(run).stderr


# --- the parts ------------------------------------------------------------------------------------


def _counted(values, missing=0):
    counts = KeyCounts()
    keys = np.array([*values, *[0] * missing], np.uint64)
    counts.add(keys, np.arange(len(keys)) >= len(values))
    return counts


def test_a_population_has_the_most_frequent_first():
    met = [5] * 3 + [8] * 6 + [13]
    made = population(_counted(met).vocabulary(1), _counted(met, missing=2))
    assert made.counts.tolist() == [6, 3, 2, 1]
    assert made.keys[:2].tolist() == [8, 5]
    assert made.nameless(2) == "(all others)"
    assert made.bands_of(np.array([[1, 0], [2, 7]])).tolist() == [[0, 2], [1, 3]]

    hashed = population(HashedIds(4), _counted(met, missing=2))
    assert hashed.counts.tolist() == [9, 2, 1, 0]
    assert [hashed.has_key(place) for place in range(4)] == [True, False, True, False]
    assert (hashed.keys[0], hashed.nameless(1)) == (8, "(missing)")
    assert hashed.nameless(3).endswith("never met)")

    raw = population(RawKeys(), _counted(met, missing=2))
    assert raw.counts.tolist() == [6, 3, 2, 1]
    assert raw.nameless(2) == "(missing)"
    some = RawKeys()(np.array([13, 99], np.uint64), np.zeros(2, bool))
    assert raw.bands_of(some).tolist() == [2, 3]
    assert raw.place_of(some[:1]) == 3
    assert raw.place_of(some[1:]) == -1
    assert population(RawKeys(), KeyCounts()).bands_of(some).tolist() == [3, 3]


def test_counts_of_keys_are_bounded_and_keep_the_frequent_ones():
    counts = KeyCounts()
    rng = np.random.default_rng(0)
    for _ in range(20):
        keys = np.append(rng.integers(10, 2**60, 20_000), np.arange(10).repeat(100))
        counts.add(keys.astype(np.uint64), np.zeros(len(keys), bool))
        counts.keep(50_000)
    keys, found, _ = counts.found()
    assert len(keys) < 250_000
    top = np.argsort(-found, kind="stable")[:10]
    assert sorted(keys[top].tolist()) == list(range(10))
    assert (found[top] == 2000).all()


def test_names_are_found_in_the_data_and_integers_name_themselves(made):
    kept = kept_of(made[0] / "run")
    source = again.open_own(kept, again.BadLines(0, print), print)
    wanted = {
        "user": np.array([_key("user-3"), _key("nobody")], np.uint64),
        "item": np.array([-10, 5], np.int64).view(np.uint64),
        "tags": np.array([_key("b")], np.uint64),
    }
    found = names_of(source, wanted, 0, ROWS)
    assert found["user"][int(wanted["user"][0])] == "user-3"
    assert found["user"][int(wanted["user"][1])] == str(int(wanted["user"][1]))
    assert list(found["item"].values()) == ["-10", "5"]
    assert list(found["tags"].values()) == ["b"]


def test_an_interrupt_leaves_nothing(made, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspecting, "by_frequency", interrupted)
    result = _inspect(made[0] / "run", "--output-dir", tmp_path / "out")
    assert result.exit_code == 130
    assert "Interrupted." in result.stderr
    assert not (tmp_path / "out").exists()
    assert not Path("part-inspect.png").exists()
