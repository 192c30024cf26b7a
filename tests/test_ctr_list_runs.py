"""Models of columns of lists, and runs that learn from nothing else."""

import shutil

import numpy as np
import pyarrow.parquet
import pytest
from flax import nnx
from typer.testing import CliRunner

from qrhash import EmbedConfig, FullTable, KeyDigits, Keys, cli
from qrhash.ctr.data.pipeline import Padded
from qrhash.ctr.model.models import Embeddings
from qrhash.ctr.run import goals
from qrhash.ctr.run.learner import Learner
from qrhash.ctr.run.progress import collect
from support import ctr_files
from support.training_process import assert_same_curve, numbers_of, train

STANDARD_PROMOTION = True  # optax.adam needs it
UNCHECKED_KEYS = True

# --- the model ------------------------------------------------------------------------------------

COMBINERS = {
    "sum": lambda vectors: sum(vectors),
    "mean": lambda vectors: sum(vectors) / len(vectors),
    "sqrtn": lambda vectors: sum(vectors) / np.sqrt(len(vectors)),
    "max": lambda vectors: np.max(vectors, axis=0),
}


@pytest.mark.parametrize("combiner", COMBINERS)
def test_the_vectors_of_a_list_are_pooled(combiner, rng):
    """Beside single ids, in the order of the columns; two lists of other lengths; of keys too."""
    configs = {
        "a": EmbedConfig(FullTable(9), 4, combiner=combiner),
        "b": EmbedConfig(FullTable(9), 4),
        "c": EmbedConfig(FullTable(7), 4, combiner=combiner),
        "d": EmbedConfig(KeyDigits(6, 2), 4, combiner=combiner),
    }
    model = Embeddings(configs, lists=("a", "c", "d"), rngs=nnx.Rngs(0))
    lists = {
        "a": [[1, 2, 2], [], [8]],
        "c": [[0], [6, 1], []],
        "d": [[], [2**63 + 5], [2**63 + 5, 7]],
    }

    def padded(name, length):
        ids, mask = np.full((3, length), 3, np.uint64), np.zeros((3, length), bool)
        for i, row in enumerate(lists[name]):
            ids[i, : len(row)], mask[i, : len(row)] = row, True
        return Padded(Keys.of(ids) if name == "d" else ids.astype(np.int32), mask)

    ids = np.array([[4], [0], [8]], np.int32)
    given = [padded(name, length) for name, length in {"a": 3, "c": 2, "d": 5}.items()]
    got = dict(zip(configs, nnx.jit(lambda *x: model(*x))(ids, None, given), strict=True))

    def vector(name, key):
        key = Keys.of([key]) if name == "d" else np.array([key])
        single = Embeddings(configs, rngs=nnx.Rngs(0)).columns
        return np.asarray(single({name: key})[name])[0]

    np.testing.assert_array_equal(got["b"], [vector("b", key) for (key,) in ids])
    for name, rows in lists.items():
        for row, found in zip(rows, np.asarray(got[name]), strict=True):
            wanted = COMBINERS[combiner]([vector(name, key) for key in row]) if row else np.zeros(4)
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_lists_that_are_not_the_model_s_are_refused():
    model = Embeddings({"a": EmbedConfig(FullTable(9), 4)}, lists=("a",), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="lists must be those of the columns a, got 0"):
        model(np.zeros((3, 0), np.int32))


# --- runs -----------------------------------------------------------------------------------------

SMALL = ["--features=4", "--bottom-mlp=8", "--top-mlp=8", "--deep-mlp=8", "--cross-layers=1"]
SMALL += ["--batch-size=32", "--evaluations=2", "--epochs=3", "--dense-lr=0.02", "--table-lr=0.3"]
SMALL += ["--init-stddev=0.3", "--test-rows=150"]

OPTIONS = {
    "mean": [],
    "sum of keys": ["--combiner=sum", "--ids=keys", "--key-bits=12"],
    "max": ["--combiner=max", "--min-count=2"],
    "large": ["--combiner=sqrtn", "--large-table-rows=10", "--threshold=10", "--collisions=2"],
    "dcn": ["--model=dcn", "--hash-size=50"],
}


@pytest.fixture(scope="module")
def events():
    return ctr_files.tagged(900)


def _run(path, events, *arguments, data=None):
    """Trains; returns the logits that the training itself had on its test rows."""
    found = []

    def watched(pairs):
        found.append(collect(pairs))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(goals, "collect", watched)
        data = data or ctr_files.write_table(path / "e.parquet", events)
        result = train("--data", data, "--output-dir", path / "run", *SMALL, *arguments)
    assert result.exit_code == 0, result.output
    return found[-1][1], result


@pytest.fixture(scope="module")
def runs(events, tmp_path_factory):
    """By name of the options (the run's directory, its own test logits, what it said)."""
    found = {}
    for name, options in OPTIONS.items():
        path = tmp_path_factory.mktemp(name.replace(" ", "_"))
        logits, result = _run(path, events, *options)
        found[name] = (path / "run", logits, result.stderr)
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_it_learns_what_only_the_lists_tell(name, runs):
    run, _, said = runs[name]
    summary = numbers_of(run)[-1]
    assert summary["test_log_loss"] < 0.85 * summary["constant_log_loss"]
    assert summary["test_auc"] > 0.75
    (row,) = [line for line in said.splitlines() if line.split()[:1] == ["tags"]]
    combiner = next((o.partition("=")[2] for o in OPTIONS[name] if "combiner" in o), "mean")
    assert "list<int64>  list, at most 5" in row
    assert row.endswith(f"bytes, {combiner} of each list")


def test_without_the_lists_there_is_nothing_to_learn(events, tmp_path):
    _run(tmp_path, events, "--ignore=tags", "--categories=hour")
    summary = numbers_of(tmp_path / "run")[-1]
    assert summary["test_log_loss"] > 0.95 * summary["constant_log_loss"]


@pytest.mark.parametrize("model", ["dlrm", "dcn"])
def test_lists_alone_are_enough(model, events, tmp_path):
    """No numbers and no categories beside them."""
    only = {name: events[name] for name in ("clicked", "tags")}
    _run(tmp_path, only, f"--model={model}")
    summary = numbers_of(tmp_path / "run")[-1]
    assert summary["test_log_loss"] < 0.85 * summary["constant_log_loss"]


def test_cut_text_gives_the_same_run(runs, events, tmp_path):
    """The pipe-separated CSV, named by an option; and a section that says the same."""
    _, wanted, _ = runs["mean"]
    texts = events | {"tags": ["|".join(map(str, row or ())) for row in events["tags"]]}
    data = ctr_files.write_csv(tmp_path / "e.csv", texts)
    got, _ = _run(tmp_path, texts, "--lists=tags", data=data)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)

    config = tmp_path / "c.toml"
    config.write_text("[columns.tags]\nkind = 'list'\nseparator = '|'\nlength = 7\n")
    shutil.rmtree(tmp_path / "run")
    got, result = _run(tmp_path, texts, f"--config={config}", data=data)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert "list (as the options say), at most 7" in result.stderr


def test_long_lists_are_counted_and_the_sentence_tells_the_option(events, tmp_path):
    long = sum(len(row or ()) == 5 for row in events["tags"])
    _, result = _run(tmp_path, events, "--list-length=4", "--max-bad-lines=400")
    assert numbers_of(tmp_path / "run")[-1]["bad_lines"] == long > 50
    assert "line 2: tags is a list of 5, more than the 4 that --list-length allows" in result.stderr
    data = tmp_path / "e.parquet"
    result = train("--data", data, "--list-length=4", f"--output-dir={tmp_path / 'other'}", *SMALL)
    assert result.exit_code == 1
    assert "--list-length" in result.stderr.splitlines()[-1]


# --- the same model elsewhere ---------------------------------------------------------------------


def _predict(run, data, output, *arguments):
    arguments = ["predict", "--run", run, "--data", data, "--output", output, *arguments]
    return CliRunner().invoke(
        cli.build_app(), list(map(str, arguments)), env={"COLUMNS": "200"}, catch_exceptions=False
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_predict_gives_the_logits_that_training_had(name, runs, events, tmp_path):
    """Bit for bit: of the same rows in the same batches."""
    run, wanted, _ = runs[name]
    tested = ctr_files.rows_of(events, 750, 900)
    data = ctr_files.write_table(tmp_path / "t", tested)
    result = _predict(run, data, tmp_path / "s.parquet")
    assert result.exit_code == 0, result.output
    got = pyarrow.parquet.read_table(tmp_path / "s.parquet")["logit"].to_numpy()
    assert len(set(wanted.tolist())) > 50
    np.testing.assert_array_equal(got, wanted)


def test_predict_takes_other_forms_and_refuses_longer_lists(runs, events, tmp_path):
    run, wanted, _ = runs["mean"]
    tested = ctr_files.rows_of(events, 750, 900)
    short = [len(row or ()) <= 3 for row in tested["tags"]]
    texts = [str(row or []) for row in tested["tags"]]
    data = ctr_files.write_csv(tmp_path / "t.csv", tested | {"tags": texts})
    assert _predict(run, data, tmp_path / "s.parquet").exit_code == 0
    got = pyarrow.parquet.read_table(tmp_path / "s.parquet")["logit"].to_numpy()
    np.testing.assert_array_equal(got, wanted)

    rows = [
        row if few else [1, 2, 3, 4, 5, 6] for row, few in zip(tested["tags"], short, strict=True)
    ]
    data = ctr_files.write_table(tmp_path / "u", tested | {"tags": rows})
    result = _predict(run, data, tmp_path / "s.parquet", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "tags is a list of 6, more than the 5 that --list-length allows" in result.stderr
    table = pyarrow.parquet.read_table(tmp_path / "s.parquet")
    assert table["row"].to_pylist() == np.flatnonzero(short).tolist()
    np.testing.assert_allclose(table["logit"].to_numpy(), wanted[short], rtol=1e-5, atol=1e-6)


def test_predict_takes_lists_as_they_are_written_in_its_data(runs, events, tmp_path):
    """Arrow's, cut or written text, whichever of them the run had."""
    tested = ctr_files.rows_of(events, 750, 900)
    cut = ["|".join(map(str, row or ())) for row in tested["tags"]]
    assert any("|" in row for row in cut)
    written = [str(row or []) for row in tested["tags"]]

    def logits(run, name, tags):
        data = ctr_files.write_csv(tmp_path / f"{name}.csv", tested | {"tags": tags})
        result = _predict(run, data, tmp_path / f"{name}.parquet", "--overwrite")
        assert result.exit_code == 0, result.output
        return pyarrow.parquet.read_table(tmp_path / f"{name}.parquet")

    run, wanted, _ = runs["mean"]
    np.testing.assert_array_equal(logits(run, "cut", cut)["logit"], wanted)
    spoilt = logits(run, "spoilt", ["[1, 2", *written[1:]])  # Malformed, not one cut element.
    assert spoilt["row"].to_pylist() == list(range(1, 150))

    texts = events | {"tags": ["|".join(map(str, row or ())) for row in events["tags"]]}
    path = tmp_path / "of cut text"
    path.mkdir()
    data = ctr_files.write_csv(path / "e.csv", texts)
    wanted, _ = _run(path, texts, "--lists=tags", data=data)
    np.testing.assert_array_equal(logits(path / "run", "written", written)["logit"], wanted)


def test_a_stopped_run_goes_on_to_the_same_numbers(runs, events, tmp_path):
    """With the length that it began with."""
    data = ctr_files.write_table(tmp_path / "e.parquet", events)
    options = ["--data", data, "--output-dir", tmp_path / "run", *SMALL]
    take = Learner.step

    def step_or_stop(self, batch):
        if self.steps == 40:
            raise KeyboardInterrupt
        return take(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", step_or_stop)
        assert train(*options, "--checkpoint-every=16").exit_code == 130
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("qrhash.ctr.data.lists.longest")
        result = train("--resume", "--output-dir", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "resuming after" in result.stderr
    assert numbers_of(tmp_path / "run")[1:] == numbers_of(runs["mean"][0])[1:]


@pytest.mark.parametrize("name", ["large", "sum of keys"])
def test_a_mesh_gives_the_curve_of_one_device(name, runs, events, tmp_path):
    mesh = ["--mesh=data=2", "--exchange=reduce"] if name == "large" else ["--mesh=data=2,model=2"]
    _run(tmp_path, events, *OPTIONS[name], *mesh)
    assert_same_curve(numbers_of(tmp_path / "run"), numbers_of(runs[name][0]))
