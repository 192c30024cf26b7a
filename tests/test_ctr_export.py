"""`qrhash export`: files that give the trainer's own scores in a process without qrhash."""

import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from jax import export as jax_export
from safetensors.flax import load_file
from typer.testing import CliRunner

from qrhash import cli, export
from qrhash.ctr.data import cells
from qrhash.ctr.data.decode import decode
from qrhash.ctr.data.pipeline import encode
from qrhash.ctr.data.schema import Schema
from qrhash.ctr.model.models import column_vectors
from qrhash.ctr.run import export_formats
from qrhash.ctr.run.export_inputs import Inputs
from qrhash.ctr.run.export_readme import readme
from qrhash.ctr.run.trained import kept_of, load_trained
from qrhash.ctr.tower_settings import TWO_TOWER
from qrhash.keys import Keys
from qrhash.strings import hash_strings
from support import ctr_files
from support.cases import assert_close
from support.training_process import train

STANDARD_PROMOTION = True  # optax.adam needs it
UNCHECKED_KEYS = True

SMALL = ["--features=4", "--batch-size=32", "--evaluations=1", "--test-rows=60"]
CLICKS = [*SMALL, "--bottom-mlp=8", "--top-mlp=8"]
TOWERS = [*SMALL, "--model=two-tower", "--tower-mlp=8-4"]
RATED = [*TOWERS, "--items=movie_id,genre", "--label=rating", "--positive-from=4"]
WATCHED = [*TOWERS, "--items=movie_id,genres", "--label=none"]
RUNS = {
    "vocabulary": (ctr_files.events, [*CLICKS, "--operation=project"]),
    "keys": (ctr_files.events, [*CLICKS, "--ids=keys", "--key-bits=12"]),
    "dynamic": (ctr_files.tagged, [*CLICKS, "--ids=keys", "--dynamic=20"]),
    "towers": (ctr_files.ratings, RATED),
    "towers of lists": (ctr_files.films, WATCHED),
}


class _Quiet:
    def phase(self, *_):
        pass

    line = phase


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """By name: the directory of a run, that of its export, and the rows that it was trained on."""
    made = {}

    def of(name):
        if name not in made:
            events, options = RUNS[name]
            path, rows = tmp_path_factory.mktemp(name), events(200)
            data = ctr_files.write_table(path / "e.parquet", rows)
            result = train("--data", data, "--output-dir", path / "run", *options)
            assert result.exit_code == 0, result.output
            result = _export(path / "run", path / "model")
            assert result.exit_code == 0, result.output
            made[name] = path / "run", path / "model", rows
        return made[name]

    return of


def _export(*arguments):
    return CliRunner().invoke(
        cli.build_app(), ["export", *map(str, arguments)], catch_exceptions=False
    )


def _first(rows, schema, count):
    """Some rows as a model takes them."""
    used = {column.name for column in schema.used}
    table = pa.table({name: cells[:count] for name, cells in rows.items() if name in used})
    block, bad = decode(table, schema)
    assert not bad
    return block


@pytest.mark.parametrize("name", RUNS)
def test_the_exported_function_gives_the_trainers_scores(name, exported):
    run, model, rows = exported(name)
    kept = kept_of(run)
    trained = load_trained(kept, _Quiet())
    inputs = Inputs.of(trained, kept.schema, kept.settings.model == TWO_TOWER)
    function = jax_export.deserialize(bytearray((model / "model.stablehlo").read_bytes()))
    assert function.platforms == ("cpu", "cuda", "tpu")
    weights = load_file(model / "weights.safetensors")
    said = json.loads((model / "model.json").read_text())
    schema = Schema.from_dict(said["schema"])
    for count in (1, 7):
        batch = encode(_first(rows, schema, count), schema, trained.ids)
        arrays = inputs.arrays(batch)
        assert {each: ["rows", *array.shape[1:]] for each, array in arrays.items()} == {
            each: of["shape"] for each, of in said["inputs"].items()
        }
        found = function.call(weights, arrays)
        assert list(found) == said["outputs"]
        wanted = np.asarray(trained.learner.logits(batch))
        if "logit" in found:
            assert_close(found["logit"], wanted)
            wanted = 1 / (1 + np.exp(-wanted))
        assert_close(found["score"], wanted)


@pytest.mark.parametrize("name", RUNS)
def test_the_snapshot_has_the_vectors_of_the_columns(name, exported):
    run, model, rows = exported(name)
    trained = load_trained(kept_of(run), _Quiet())
    snapshot = export.Snapshot(model / "embeddings.safetensors", verify=True)
    for column, ids in trained.ids.items():
        values = [
            each
            for cell in rows[column]
            for each in (cell or [] if isinstance(cell, list) else [cell])
            if each is not None
        ][:20]
        keys = Keys.of(values).to_numpy()
        taken = ids(keys, np.zeros(len(keys), bool))
        wanted, _ = column_vectors(trained.learner.model, column, taken)
        assert_close(snapshot.lookup(taken, column), wanted)


@pytest.mark.parametrize("name", ["vocabulary", "dynamic"])
def test_the_lines_of_its_readme_run_without_qrhash(name, exported):
    _, model, _ = exported(name)
    (code,) = re.findall(r"```python\n(.*?)```", (model / "README.md").read_text(), re.DOTALL)
    code = "import sys; sys.modules['qrhash'] = None\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=model, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


NAMES = ["user id", "a,b", "x\ny", "", "it's"]
SAID = {
    "outputs": ["score"],
    "platforms": ["cpu"],
    "also": [],
    "schema": {"preset": "table"},
    "columns_of": {"numbers": NAMES, "ids": [], "keys": []},
    "inputs": {"numbers": {"shape": ["rows", 5], "dtype": "float32"}},
    "lists": {},
    "columns": {name: {"by": "vocabulary", "missing": None} for name in NAMES},
}


def test_its_readme_names_columns_whatever_they_are_called():
    page = readme(SAID)
    assert page.count("`user id`, `a,b`, `'x\\ny'`, `''`, `it's`") == 2


def test_its_readme_says_which_key_text_has():
    page = readme(SAID)
    assert "(`42`, not `042` or `+42`)" in page
    assert "(`42.0`)" in page
    assert "`true` and `false`, whatever their case, in lower case" in page
    text = ["42", "42.0", "-1", "042", "+42", "TRUE", "true"]
    found = cells.keys("a", pa.array(text))[0][0].tolist()
    hashed = hash_strings(["042", "+42", "true", "true"]).tolist()
    assert found == [42, 42, 2**64 - 1, *hashed]


def test_whoever_may_read_one_of_its_files_may_read_all(exported):
    _, model, _ = exported("keys")
    assert len({each.stat().st_mode for each in model.iterdir()}) == 1


def test_an_export_is_replaced_only_when_told(exported, tmp_path):
    run, model, _ = exported("keys")
    result = _export(run, model)
    assert result.exit_code == 1
    assert f"{model} exists; choose another directory, or --overwrite it." in result.output
    before = (model / "model.json").read_text()
    assert _export(run, model, "--overwrite", "--rows=int8").exit_code == 0
    assert (model / "model.json").read_text() == before
    assert [each.name for each in model.parent.iterdir() if "part" in each.name] == []
    (tmp_path / "mine.txt").write_text("mine")
    result = _export(run, tmp_path / "mine.txt", "--overwrite")
    assert f"{tmp_path / 'mine.txt'} is no directory; choose another." in result.output
    result = _export(run, tmp_path, "--overwrite")
    assert "is no earlier export" in result.output
    assert (tmp_path / "mine.txt").exists()


def test_mistakes_are_told_in_a_sentence(exported, tmp_path):
    run, _, _ = exported("keys")
    for arguments, words in (
        ((tmp_path / "none", tmp_path / "m"), "none"),
        (
            (run, tmp_path / "m", "--platforms=cpu,gpu"),
            "--platforms must be some of cpu, cuda, tpu",
        ),
        ((run, tmp_path / "m", "--rows=int3"), "--rows must be one of float32"),
        ((run, tmp_path / "m", "--platforms="), "--platforms must be some of cpu, cuda, tpu"),
        ((run, tmp_path / "m", "--also=pmml"), "--also must be some of savedmodel, onnx, got pmml"),
        ((run, run, "--overwrite"), "is the run, or holds it"),
    ):
        result = _export(*arguments)
        assert result.exit_code == 1, result.output
        assert words in " ".join(result.output.split())
        assert not (tmp_path / "m").exists()


# --- formats of other systems ---------------------------------------------------------------------

SYSTEMS = {"savedmodel": "tensorflow", "onnx": "jax2onnx"}


@pytest.mark.filterwarnings("ignore")  # what these owe each other
@pytest.mark.parametrize(
    ("name", "system"),
    [
        *((name, "savedmodel") for name in ("vocabulary", "dynamic")),
        *((name, "onnx") for name in RUNS),
    ],
)
def test_other_systems_give_the_same_scores(name, system, exported, tmp_path):
    pytest.importorskip(SYSTEMS[system])
    run, _, _ = exported(name)
    result = _export(run, tmp_path / "m", f"--also={system}")
    if system == "onnx" and name in ("dynamic", "towers of lists"):  # which have lists
        assert result.exit_code == 1
        said = " ".join(result.output.split())
        assert "--also onnx: this model cannot be converted" in said
        assert not any(tmp_path.iterdir())
        return
    assert result.exit_code == 0, result.output
    page = (tmp_path / "m" / "README.md").read_text()
    _, code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = "import sys; sys.modules['qrhash'] = sys.modules['jax'] = None\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "m", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_format_whose_system_is_not_installed_is_refused(exported, tmp_path, monkeypatch):
    run, _, _ = exported("keys")
    monkeypatch.setitem(export_formats._NEEDED, "onnx", ("no_such_package.at_all",))
    result = _export(run, tmp_path / "m", "--also=onnx")
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "--also onnx needs no_such_package.at_all" in said
    assert "pip install 'qrhash[onnx]'" in said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["other scores", "raises"])
def test_what_gives_other_scores_is_not_handed_out(fault, exported, tmp_path, monkeypatch):
    run, _, _ = exported("keys")

    def written(function, path, outputs):
        path.write_bytes(b"a model")
        if fault == "raises":
            raise NotImplementedError("no such operation\nand more")

        def read(inputs):
            found = function.run(function.weights, inputs)
            return {name: np.asarray(found[name]) + (name == "score") for name in outputs}

        return read

    monkeypatch.setitem(export_formats._NEEDED, "onnx", ())
    monkeypatch.setattr(export_formats, "_onnx", written)
    result = _export(run, tmp_path / "m", "--also=onnx")
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    wanted = {
        "other scores": "it does not give the model's scores",
        "raises": "cannot be converted (NotImplementedError: no such operation)",
    }
    assert wanted[fault] in said
    assert not any(tmp_path.iterdir())
