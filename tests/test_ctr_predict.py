"""`qrhash predict`: the trainer's own logits, row by row; and all that can be wrong."""

import csv
import shutil

import numpy as np
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from qrhash import cli
from qrhash.ctr.data.counts import KeyCounts
from qrhash.ctr.data.vocabulary import HashedIds, RawKeys, Vocabulary, load_ids, save_ids
from qrhash.ctr.errors import UserError
from qrhash.ctr.run import goals
from qrhash.ctr.run import predict as predicting
from qrhash.ctr.run.progress import collect
from qrhash.ctr.settings import Settings
from support import ctr_files
from support.training_process import numbers_of, small_run, train

STANDARD_PROMOTION = True  # optax.adam needs it
UNCHECKED_KEYS = True

SMALL = ["--features=4", "--bottom-mlp=8", "--top-mlp=8", "--batch-size=32", "--evaluations=2"]
SMALL += ["--dense-lr=0.02", "--table-lr=0.3", "--init-stddev=0.3", "--test-rows=150"]


def _predict(run, data, output, *arguments):
    arguments = ["predict", "--run", run, "--data", data, "--output", output, *arguments]
    return CliRunner().invoke(
        cli.build_app(), list(map(str, arguments)), env={"COLUMNS": "200"}, catch_exceptions=False
    )


def _scores(run, data, output, *arguments):
    result = _predict(run, data, output, *arguments)
    assert result.exit_code == 0, result.output
    return pyarrow.parquet.read_table(output).to_pydict(), result


def _run(path, events, *arguments):
    """Trains; returns the logits and labels that the training itself had on its test rows."""
    found = []

    def watched(pairs):
        collected = collect(pairs)
        found.append(collected)
        return collected

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(goals, "collect", watched)
        data = ctr_files.write_table(path / "e.parquet", events)
        result = train("--data", data, "--output-dir", path / "run", *SMALL, *arguments)
    assert result.exit_code == 0, result.output
    return found[-1]


OPTIONS = {
    "vocabulary": [],
    "min count": ["--min-count=5"],
    "hashed": ["--hash-size=40"],
    "keys": ["--ids=keys", "--key-bits=12"],
    "dcn": ["--model=dcn", "--large-table-rows=30", "--threshold=10"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Events, and by name of the options (the run's directory, its own test labels and logits)."""
    events, found = ctr_files.events(800), {}
    for name, options in OPTIONS.items():
        path = tmp_path_factory.mktemp(name.replace(" ", "_"))
        found[name] = (path / "run", *_run(path, events, *options))
    return events, found


@pytest.mark.parametrize("name", OPTIONS)
def test_it_gives_the_logits_that_training_had_on_the_test_rows(name, runs, tmp_path):
    """Bit for bit: of the same rows in the same batches."""
    events, found = runs
    run, labels, logits = found[name]
    tested = ctr_files.rows_of(events, 650, 800)
    data = ctr_files.write_table(tmp_path / "tested", tested)
    got, result = _scores(run, data, tmp_path / "s.parquet")
    assert len(set(logits.tolist())) > 100
    np.testing.assert_array_equal(np.array(got["logit"], np.float32), logits)
    assert got["row"] == list(range(150))
    assert got["label"] == labels.tolist() == tested["clicked"]
    wanted = 1 / (1 + np.exp(-logits.astype(np.float64)))
    np.testing.assert_array_equal(got["score"], wanted.astype(np.float32))
    assert not list(tmp_path.glob("*.part"))
    summary = numbers_of(run)[-1]
    log_loss, auc = summary["test_log_loss"], summary["test_auc"]
    assert f"log loss {log_loss:.4f}, AUC {auc:.4f} on 150 labels" in result.stderr


def test_rows_have_the_same_scores_whatever_holds_them(runs, tmp_path):
    """Text without a label, its columns in another order; and a folder, of which the last part is
    what was tested on.
    """
    events, found = runs
    run, _, logits = found["vocabulary"]
    names = ["note", "ad", "age", "user", "price", "when"]
    columns = {name: events.get(name, [1] * 800) for name in names}
    data = ctr_files.write_csv(tmp_path / "e.csv", columns, delimiter=";")
    got, result = _scores(run, data, tmp_path / "s.parquet")
    assert list(got) == ["row", "logit", "score"]
    np.testing.assert_allclose(np.array(got["logit"])[650:], logits, rtol=1e-5, atol=1e-6)
    assert "800 rows scored, 0 malformed lines skipped" in result.stderr
    assert "labels" not in result.stderr

    (tmp_path / "folder").mkdir()
    for part, (start, stop) in {"a": (0, 500), "b": (500, 800)}.items():
        ctr_files.write_table(
            tmp_path / "folder" / f"{part}.parquet", ctr_files.rows_of(events, start, stop)
        )
    again, _ = _scores(run, tmp_path / "folder", tmp_path / "t.parquet")
    assert again["logit"] == got["logit"]
    assert again["row"] == list(range(800))


def test_scores_as_text(runs, tmp_path):
    events, found = runs
    run, _, _ = found["vocabulary"]
    data = ctr_files.write_table(tmp_path / "e", ctr_files.rows_of(events, 0, 70))
    wanted, _ = _scores(run, data, tmp_path / "s.parquet")
    assert _predict(run, data, tmp_path / "s.csv").exit_code == 0
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name, kind in {"row": int, "logit": np.float32, "score": np.float32, "label": int}.items():
        assert [kind(row[name]) for row in rows] == [kind(value) for value in wanted[name]]


def test_malformed_rows_have_no_score_and_missing_labels_are_no_fault(runs, tmp_path):
    events, found = runs
    run, _, _ = found["vocabulary"]
    part = ctr_files.rows_of(events, 0, 100)
    part["ad"] = ["red"] * 100
    wanted, _ = _scores(run, ctr_files.write_csv(tmp_path / "e.csv", part), tmp_path / "w.parquet")
    part["clicked"][3] = None
    part["clicked"][4] = "?"
    part["age"] = [f"{age}" if i != 70 else "old" for i, age in enumerate(part["age"])]
    lines = ctr_files.write_csv(tmp_path / "e.csv", part).read_text().splitlines()
    (tmp_path / "e.csv").write_text("\n".join([*lines[:41], "too,few", *lines[41:]]) + "\n")
    got, result = _scores(run, tmp_path / "e.csv", tmp_path / "s.parquet")
    assert got["row"] == [row for row in range(101) if row not in (40, 71)]
    assert [got["label"][row] for row in (2, 3, 4)] == [part["clicked"][2], None, None]
    kept = [row for row in range(100) if row != 70]
    np.testing.assert_allclose(got["logit"], np.array(wanted["logit"])[kept], rtol=1e-5)
    assert "99 rows scored, 2 malformed lines skipped" in result.stderr
    assert "2 rows have no label that can be read" in result.stderr
    assert "e.csv, line 42: expected 6 columns, found 2" in result.stderr
    assert "e.csv, line 73: age is not a number: 'old'" in result.stderr
    part["clicked"] = ["good", None] * 50
    words = ctr_files.write_csv(tmp_path / "words.csv", part)
    got, result = _scores(run, words, tmp_path / "words.parquet")
    assert set(got["label"]) == {None}
    assert result.stderr.rstrip().endswith("; none of these rows has a label that can be read")
    result = _predict(run, tmp_path / "e.csv", tmp_path / "none.csv", "--max-bad-lines=1")
    assert "More than 1 malformed lines" in result.stderr
    assert not list(tmp_path.glob("none.csv*"))


def test_the_criteo_format_with_its_label_and_without(tmp_path):
    rows = ctr_files.random_rows(1000)
    config, data = small_run(tmp_path, rows=rows)
    assert train(config, data, "--output-dir", tmp_path / "run").exit_code == 0
    wanted, _ = _scores(tmp_path / "run", tmp_path / "clicks", tmp_path / "s.parquet")
    assert wanted["label"] == [int(row[0]) for row in rows]
    bare = ctr_files.write_text(tmp_path / "bare", [row[1:] for row in rows])
    got, _ = _scores(tmp_path / "run", bare, tmp_path / "t.parquet")
    assert got == {name: wanted[name] for name in ("row", "logit", "score")}
    parquet = ctr_files.write_parquet(tmp_path / "parquet", rows)
    assert _scores(tmp_path / "run", parquet, tmp_path / "u.parquet")[0] == wanted


def test_columns_without_a_header_and_without_their_label(tmp_path):
    events = ctr_files.events(300)
    data = ctr_files.write_csv(tmp_path / "e", events, header=False)
    options = ["--label=column1", "--output-dir", tmp_path / "run", *SMALL]
    assert train("--data", data, *options).exit_code == 0
    wanted, _ = _scores(tmp_path / "run", data, tmp_path / "s.parquet")
    del events["clicked"]
    data = ctr_files.write_csv(tmp_path / "f", events, header=False)
    got, _ = _scores(tmp_path / "run", data, tmp_path / "t.parquet")
    assert got["logit"] == wanted["logit"]


def test_a_run_of_a_mesh_predicts_on_one_device(runs, tmp_path):
    events, _ = runs
    _, logits = _run(tmp_path, events, "--mesh=data=2,model=4", "--large-table-rows=20")
    data = ctr_files.write_table(tmp_path / "t", ctr_files.rows_of(events, 650, 800))
    got, _ = _scores(tmp_path / "run", data, tmp_path / "s.parquet")
    np.testing.assert_allclose(got["logit"], logits, rtol=1e-4, atol=1e-5)


def test_values_in_another_form_than_the_run_had_are_pointed_out(runs, tmp_path):
    events, found = runs
    run, _, _ = found["vocabulary"]
    part = ctr_files.rows_of(events, 0, 100)
    _, result = _scores(run, ctr_files.write_table(tmp_path / "e", part), tmp_path / "s.parquet")
    assert "Warning" not in result.stderr
    part["user"] = [f"user-{user}" for user in part["user"]]
    part["ad"] = [None] * 100
    _, result = _scores(run, ctr_files.write_table(tmp_path / "f", part), tmp_path / "t.parquet")
    warnings = [line for line in result.stderr.splitlines() if line.startswith("Warning")]
    assert len(warnings) == 1
    assert f"an id for none of the values of user in {tmp_path / 'f'}: are they" in warnings[0]
    assert warnings[0].endswith("of type int64?")


# --- what is refused ------------------------------------------------------------------------------


def test_what_cannot_be_is_one_sentence(runs, tmp_path):
    events, found = runs
    run, _, _ = found["vocabulary"]
    data = ctr_files.write_table(tmp_path / "e.parquet", ctr_files.rows_of(events, 0, 50))
    output = tmp_path / "s.csv"
    output.write_text("precious")

    def says(sentence, run=run, data=data, output=tmp_path / "new.csv", also=()):
        before = sorted(tmp_path.rglob("*"))
        result = _predict(run, data, output, *also)
        assert result.exit_code == 1
        (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert sentence in error
        assert sorted(tmp_path.rglob("*")) == before

    says("s.csv exists; choose another --output, or --overwrite it", output=output)
    assert output.read_text() == "precious"
    says("is the data; choose another", output=data, also=["--overwrite"])
    says("--output must end in .parquet, .pq, .csv", output=tmp_path / "s.txt")
    says("There is no directory", output=tmp_path / "no" / "s.csv")
    says("There is no file", data=tmp_path / "absent")
    says("absent: it holds no metrics.jsonl", run=tmp_path / "absent")
    fewer = {name: events[name][:50] for name in ("clicked", "user", "price")}
    (tmp_path / "data").mkdir()
    says("has no column ad, age", data=ctr_files.write_table(tmp_path / "data" / "f", fewer))
    floats = ctr_files.rows_of(events, 0, 50) | {"user": events["when"][:50]}
    floats = ctr_files.write_table(tmp_path / "data" / "g", floats)
    says("Column user has type timestamp[us]; it must hold integers or text", data=floats)

    broken = shutil.copytree(run, tmp_path / "data" / "run")
    (broken / "ids.npz").unlink()
    says("ids.npz cannot be read", run=broken)
    shutil.copy(run / "ids.npz", broken)
    shutil.rmtree(broken / "checkpoints")
    says("holds no complete checkpoint, and so no trained model", run=broken)

    assert _predict(run, data, output, "--overwrite").exit_code == 0
    assert output.read_text().startswith('"row","logit","score","label"\n')


def test_scores_that_are_not_whole_are_not_there(runs, tmp_path, monkeypatch):
    events, found = runs
    data = ctr_files.write_table(tmp_path / "e", events)
    monkeypatch.setattr(predicting, "_ROWS", 1)
    seen = []

    def interrupted(self, rows):
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        if len(seen) == 5:
            raise KeyboardInterrupt
        return place(self, rows)

    place = predicting._Placed.take
    monkeypatch.setattr(predicting._Placed, "take", interrupted)
    result = _predict(found["vocabulary"][0], data, tmp_path / "s.parquet")
    assert result.exit_code == 130
    assert seen[-1] == ["e", "s.parquet.part"]
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


# --- what is kept of the ids ----------------------------------------------------------------------


def test_ids_come_back_from_their_file(tmp_path):
    counts = KeyCounts()
    counts.add(np.array([7, 2**64 - 1, 7, 0], np.uint64), np.array([False, False, False, True]))
    vocabulary = counts.vocabulary(1)
    columns = {"b/ c": {"hash_size": 9}, "d": {"ids": "keys"}}
    settings = Settings(data="events", columns=columns)
    save_ids(tmp_path / "ids", {"a": vocabulary, "b/ c": HashedIds(9), "d": RawKeys()})
    ids = load_ids(tmp_path / "ids", settings, ("a", "b/ c", "d"))
    assert (ids["b/ c"], ids["d"]) == (HashedIds(9), RawKeys())
    assert isinstance(ids["a"], Vocabulary)
    np.testing.assert_array_equal(ids["a"].keys, vocabulary.keys)
    np.testing.assert_array_equal(ids["a"].ids, vocabulary.ids)
    assert ids["a"].missing_id == vocabulary.missing_id != 0
    with pytest.raises(UserError, match="is of another run"):
        load_ids(tmp_path / "ids", settings, ("a", "d"))
    (tmp_path / "cut").write_bytes((tmp_path / "ids").read_bytes()[:-30])
    with pytest.raises(UserError, match="cut cannot be read"):
        load_ids(tmp_path / "cut", settings, ("a", "b/ c", "d"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "ids"]
