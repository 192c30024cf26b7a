"""Early stopping: the best model by the validation rows is the one that is tested and kept."""

import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from qrhash import cli
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.sources import open_source
from qrhash.ctr.errors import UserError
from qrhash.ctr.run import goals
from qrhash.ctr.run.learner import Learner
from qrhash.ctr.run.progress import collect
from qrhash.ctr.settings import Settings
from support import ctr_files
from support.training_process import assert_same_curve, numbers_of, train

STANDARD_PROMOTION = True  # optax.adam needs it
UNCHECKED_KEYS = True

# 500 rows to train on, 125 to validate and 175 to test on: 16 steps an epoch, 32 points.
SMALL = ["--features=4", "--bottom-mlp=32", "--top-mlp=32", "--batch-size=32", "--evaluations=32"]
SMALL += ["--dense-lr=0.02", "--table-lr=0.3", "--init-stddev=0.3", "--test-rows=175", "--epochs=8"]
SMALL += ["--validation-fraction=0.2", "--threshold=10", "--large-table-rows=10"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows that are soon learnt, and then by heart: the validation rows tell."""
    return ctr_files.write_table(tmp_path_factory.mktemp("data") / "e", ctr_files.events(800))


def _run(data, output, *arguments):
    """Trains; returns the logits that it had on the test rows, and the result."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(goals, "collect", lambda pairs: found.append(collect(pairs)) or found[-1])
        result = train("--data", data, "--output-dir", output, *SMALL, *arguments)
    assert result.exit_code == 0, result.output
    return found[-1][1], result


@pytest.fixture(scope="module")
def stopped_early(data, tmp_path_factory):
    """Its directory, its logits on the test rows, its output."""
    output = tmp_path_factory.mktemp("run") / "run"
    return output, *_run(data, output, "--patience=4")


def _losses(output):
    return [r["validation_log_loss"] for r in numbers_of(output) if "validation_log_loss" in r]


def test_it_ends_when_no_point_was_better_for_so_long(stopped_early):
    output, _, result = stopped_early
    losses = _losses(output)
    best = int(np.argmin(losses))
    assert len(losses) == best + 5 < 32
    summary = numbers_of(output)[-1]
    assert summary["best_rows"] < summary["train_rows"] < 8 * 500
    points = [r["rows"] for r in numbers_of(output) if "validation_log_loss" in r]
    assert (summary["best_rows"], summary["train_rows"]) == (points[best], points[-1])
    assert summary["test_rows"] == 175
    assert f"no better since {points[best]:,} rows: the training ends here" in result.stderr
    assert f"after {points[best]:,} rows" in result.stdout


def test_without_patience_it_goes_to_its_end_and_tests_the_best(data, stopped_early, tmp_path):
    _run(data, tmp_path / "run")
    losses, before = _losses(tmp_path / "run"), _losses(stopped_early[0])
    assert len(losses) == 32
    assert losses[: len(before)] == before
    points = [r["rows"] for r in numbers_of(tmp_path / "run") if "validation_log_loss" in r]
    summary = numbers_of(tmp_path / "run")[-1]
    assert summary["train_rows"] == points[-1] == 8 * 500
    assert summary["best_rows"] == points[int(np.argmin(losses))] < 8 * 500


def test_the_best_model_predicts(stopped_early, tmp_path):
    output, logits, _ = stopped_early
    rows = ctr_files.rows_of(ctr_files.events(800), 625, 800)
    tested = ctr_files.write_table(tmp_path / "t", rows)

    def predicted(run):
        path = tmp_path / "s.parquet"
        arguments = ["predict", "--run", run, "--data", tested, "--output", path, "--overwrite"]
        result = CliRunner().invoke(cli.build_app(), list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return np.array(pyarrow.parquet.read_table(path)["logit"], np.float32)

    np.testing.assert_array_equal(predicted(output), logits)
    last = shutil.copytree(output, tmp_path / "last")
    shutil.rmtree(last / "best")
    assert np.abs(predicted(last) - logits).max() > 0.01


def _stop(*arguments, step):
    take = Learner.step

    def step_or_stop(self, batch):
        if self.steps == step:
            raise KeyboardInterrupt
        return take(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", step_or_stop)
        assert train(*arguments, *SMALL).exit_code == 130


# Each of either once in every CI, and all pairs before a release.
@pytest.mark.parametrize(
    ("step", "every"),
    [
        *[(7, 5), (18, 1000), (30, None)],
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [(7, 1000), (7, None), (18, 5)]),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [(18, None), (30, 5)]),
        pytest.param(30, 1000, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_goes_on_finds_the_same_best(every, step, data, stopped_early, tmp_path):
    """From before models that it kept, too: every=1000 keeps the best ones alone."""
    output = tmp_path / "run"
    often = [] if every is None else [f"--checkpoint-every={every}"]
    _stop("--data", data, "--output-dir", output, "--patience=4", *often, step=step)
    kept = sorted(int(path.name) for path in (output / "best").iterdir())
    assert kept
    result = train("--resume", "--output-dir", output)
    assert result.exit_code == 0, result.output
    assert numbers_of(output)[1:] == numbers_of(stopped_early[0])[1:]


def test_a_finished_run_reports_again(stopped_early, tmp_path):
    output = shutil.copytree(stopped_early[0], tmp_path / "run")
    result = train("--resume", "--output-dir", output)
    assert result.exit_code == 0, result.output
    assert numbers_of(output) == numbers_of(stopped_early[0])


def test_a_best_model_that_is_gone(stopped_early, tmp_path):
    """The last one is tested instead, and it is said."""
    output = shutil.copytree(stopped_early[0], tmp_path / "run")
    shutil.rmtree(output / "best")
    result = train("--resume", "--output-dir", output)
    assert result.exit_code == 0, result.output
    assert "Warning: the best model's checkpoint is gone; the last one is" in result.stderr
    summary, before = numbers_of(output)[-1], numbers_of(stopped_early[0])[-1]
    assert summary["best_rows"] == summary["train_rows"] == before["train_rows"]
    assert summary["test_log_loss"] != before["test_log_loss"]


@pytest.mark.slow
def test_a_run_on_a_mesh_finds_the_same_best(data, stopped_early, tmp_path):
    _run(data, tmp_path / "run", "--patience=4", "--mesh=data=2,model=4")
    assert_same_curve(numbers_of(tmp_path / "run"), numbers_of(stopped_early[0]))


def test_validation_rows_are_no_part_of_the_vocabulary(tmp_path):
    events = ctr_files.events(800)
    events["user"] = [2**40] * 300 + [2**41] * 200 + [2**42 + i for i in range(300)]
    data = ctr_files.write_table(tmp_path / "e", events)
    _run(data, tmp_path / "run", "--epochs=1", "--evaluations=1")
    with np.load(tmp_path / "run" / "ids.npz") as file:
        names = json.loads(str(file["names"]))
        assert file[f"keys_{names.index('user')}"].tolist() == [2**40, 2**41]


def test_validation_rows_are_the_last_by_time_before_the_test_rows(tmp_path):
    events = ctr_files.events(160)
    order = np.random.default_rng(0).permutation(160)
    mixed = {name: [values[i] for i in order] for name, values in events.items()}
    data = ctr_files.write_table(tmp_path / "e", mixed)
    source = open_source(Settings(data=str(data), time="when"), BadLines(0, print))
    assert source.split_by_time(40, 30) == [90, 130]
    found = {}
    for start, stop in [(0, 90), (90, 130), (130, 160), (100, 120)]:
        blocks = list(source.blocks(start, stop))
        assert np.concatenate([block.places for block in blocks]).tolist() == [*range(start, stop)]
        found[start, stop] = np.concatenate([block.numbers[:, 1] for block in blocks])
    for (start, stop), ages in list(found.items())[:3]:
        assert ages.tolist() == [events["age"][i] for i in order if start <= i < stop]
    assert found[100, 120].tolist() == found[90, 130][10:30].tolist()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"patience": 2}, "patience goes with a validation_fraction above 0"),
        ({"validation_fraction": 1.0}, "validation_fraction must be below 1"),
        ({"validation_fraction": 0.1, "checkpoint_every": 0}, "keeps the best model as a checkpo"),
    ],
)
def test_options_that_say_nothing_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Settings(**options)


def test_validation_rows_that_cannot_be_read(tmp_path):
    events = ctr_files.events(400)
    events["clicked"][300:320] = [7] * 20
    events["ad"] = ["x", "y"] * 200
    data = ctr_files.write_csv(tmp_path / "e.csv", events)
    result = train("--data", data, "--validation-fraction=0.0625", "--label=clicked")
    assert "none of the lines to validate on can be read" in result.stderr


def test_validation_that_leaves_nothing(tmp_path):
    data = ctr_files.write_table(tmp_path / "e", ctr_files.events(200))
    result = train("--data", data, "--validation-fraction=0.999")
    assert "Validating on 160 of 160 training lines leaves none" in result.stderr
