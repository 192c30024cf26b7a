"""`--resume`: a run that was stopped goes on as if it had not been."""

import gc
import gzip
import json
import shutil
import signal

import pytest

from qrhash.ctr.run.learner import Learner
from qrhash.ctr.run.report import RunDirectory
from support import ctr_files
from support.training_process import (
    assert_same_curve,
    command_line,
    numbers_of,
    small_run,
    train,
    until,
)

STANDARD_PROMOTION = True  # optax.adam needs it
UNCHECKED_KEYS = True

MESH = "--mesh=data=2,model=4"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(options, tmp_path_factory):
    """The directory of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("run") / "unbroken"
    _train(*options, "--output-dir", output)
    return output


def _train(*arguments):
    result = train(*arguments)
    assert result.exit_code == 0, result.output
    return result


def _stop(*arguments, step=None, record=None):
    """A run in which Ctrl-C comes before a step, or before the nth record."""
    take, write, records = Learner.step, RunDirectory.record, []

    def step_or_stop(self, batch):
        if self.steps == step:
            raise KeyboardInterrupt
        return take(self, batch)

    def record_or_stop(self, each):
        records.append(each)
        if len(records) == record:
            raise KeyboardInterrupt
        write(self, each)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", step_or_stop)
        patch.setattr(RunDirectory, "record", record_or_stop)
        assert train(*arguments).exit_code == 130


@pytest.fixture(scope="module")
def stopped(options, tmp_path_factory):
    """The directory of a run that was stopped in its first epoch, after the checkpoint of step 6.

    Two points of its curve are recorded, one from after that step.
    """
    output = tmp_path_factory.mktemp("run") / "stopped"
    _stop(*options, "--checkpoint-every=3", "--output-dir", output, step=9)
    shutil.rmtree(output / "checkpoints" / "9")
    return output


@pytest.fixture
def taken_up(stopped, tmp_path):
    """A copy of it, to go on with."""
    return shutil.copytree(stopped, tmp_path / "taken up")


@pytest.fixture
def broken_off():
    """Orbax leaves behind the coroutines of a read that failed: they are to end here."""
    yield
    gc.collect()


def damaging(test):
    test = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")(test)
    return pytest.mark.usefixtures("broken_off")(test)


def _records(directory):
    """The records but for the settings: to the last bit what the unbroken run has."""
    return numbers_of(directory)[1:]


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "where", "steps"),
    [
        (3, {"step": 8}, 6),
        pytest.param(3, {"step": 20}, 18, marks=pytest.mark.slow),
        (13, {"step": 14}, 13),  # The end of the first epoch
        # At the points of the curve
        pytest.param(None, {"step": 12}, 9, marks=pytest.mark.slow),
        (3, {"record": 8}, 26),  # Only the summary is missing
        pytest.param(3, {"step": 2}, None, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on(every, where, steps, options, unbroken, tmp_path):
    output = tmp_path / "run"
    often = [] if every is None else [f"--checkpoint-every={every}"]
    _stop(*options, *often, "--output-dir", output, **where)
    settings = (output / "metrics.jsonl").read_text().splitlines()[0]
    result = _train("--resume", "--output-dir", output)
    if steps is None:
        assert "holds no complete checkpoint: starting anew" in result.stderr
    else:
        rows = 800 * (steps // 13) + 64 * (steps % 13)
        assert f"resuming after {rows:,} rows, {steps} steps" in result.stderr
    assert _records(output) == _records(unbroken)
    assert (output / "metrics.jsonl").read_text().splitlines()[0] == settings
    assert "1,600 rows trained on, 200 tested on" in result.stdout


def test_it_goes_on_more_than_once(options, taken_up, unbroken):
    """The options it began with may be given again; others change no number."""
    resume = ["--resume", *options, "--batch-size=64", "--output-dir", taken_up]
    _stop(*resume, "--checkpoint-every=4", step=18)
    _train(*resume, "--checkpoint-every=7", "--keep-checkpoints=2")
    assert _records(taken_up) == _records(unbroken)
    assert {path.name for path in (taken_up / "checkpoints").iterdir()} == {"21", "26"}


def test_it_keeps_and_saves_checkpoints_as_it_began(options, tmp_path):
    output = tmp_path / "run"
    often = ["--checkpoint-every=2", "--keep-checkpoints=50", "--output-dir", output]
    _stop(*options, *often, step=11)
    _train("--resume", "--output-dir", output)
    steps = sorted(int(path.name) for path in (output / "checkpoints").iterdir())
    assert steps == list(range(2, 27, 2))


def test_it_goes_on_after_a_kill(options, unbroken, tmp_path):
    output = tmp_path / "run"
    killed = command_line(
        *options, "--checkpoint-every=3", "--output-dir", output, output=tmp_path / "log"
    )
    checkpoints = output / "checkpoints"
    until(lambda: checkpoints.exists() and list(checkpoints.glob("?")), [killed], 120)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(timeout=30) == -signal.SIGKILL
    assert len(_records(output)) < len(_records(unbroken))
    result = _train("--resume", "--output-dir", output)
    assert "resuming after " in result.stderr
    assert _records(output) == _records(unbroken)


def test_a_run_of_one_device_goes_on_on_a_mesh(taken_up, unbroken):
    _train("--resume", "--output-dir", taken_up, MESH)
    assert_same_curve(numbers_of(taken_up), numbers_of(unbroken))


def test_a_run_of_a_mesh_goes_on_on_one_device(options, unbroken, tmp_path):
    output = tmp_path / "run"
    _stop(*options, MESH, "--checkpoint-every=3", "--output-dir", output, step=20)
    assert "resuming after 1,120 rows" in _train("--resume", "--output-dir", output).stderr
    assert_same_curve(numbers_of(output), numbers_of(unbroken))


def test_a_finished_run_reports_again(unbroken, tmp_path):
    output = shutil.copytree(unbroken, tmp_path / "run")
    result = _train("--resume", "--output-dir", output)
    assert "1,600 rows trained on, 200 tested on" in result.stdout
    assert numbers_of(output) == numbers_of(unbroken)


@pytest.fixture(scope="module")
def spoilt(options, tmp_path_factory):
    """The options of a run on data with malformed lines."""
    rows = [["x"] if i % 100 == 7 else row for i, row in enumerate(ctr_files.random_rows(1000))]
    return small_run(tmp_path_factory.mktemp("spoilt"), rows=rows)


@pytest.fixture(scope="module")
def spoilt_run(spoilt, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "spoilt"
    _train(*spoilt, "--output-dir", output)
    return output


def test_malformed_lines_are_skipped_as_before(spoilt, spoilt_run, tmp_path):
    output = tmp_path / "run"
    _stop(*spoilt, "--checkpoint-every=3", "--output-dir", output, step=20)
    _train("--resume", "--output-dir", output)
    assert _records(output) == _records(spoilt_run)


def test_a_finished_run_with_malformed_lines_reports_again(spoilt_run, tmp_path):
    output = shutil.copytree(spoilt_run, tmp_path / "run")
    _train("--resume", "--output-dir", output)
    assert numbers_of(output) == numbers_of(spoilt_run)


def test_a_finished_run_with_a_point_at_its_last_step_reports_again(options, tmp_path):
    many = ["--evaluations=100", "--eval-rows=10", "--checkpoint-every=26"]
    _train(*options, *many, "--output-dir", tmp_path / "run")
    before = numbers_of(tmp_path / "run")
    _train("--resume", "--output-dir", tmp_path / "run")
    assert numbers_of(tmp_path / "run") == before


# --- what is taken over ---------------------------------------------------------------------------


def test_without_a_directory_the_last_run_goes_on(stopped, unbroken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(unbroken, tmp_path / "runs" / "20250101-000000")
    shutil.copytree(stopped, tmp_path / "runs" / "20240101-000000")
    (tmp_path / "runs" / "20240101-000000" / "checkpoints").touch()
    result = _train("--resume")
    assert "resuming after 384 rows, 6 steps" in result.stderr
    assert _records(tmp_path / "runs" / "20240101-000000") == _records(unbroken)


@damaging
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(taken_up, unbroken):
    """And a last record that was cut off is dropped."""
    metrics = taken_up / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"kind": "progress", "rows": 6')
    (taken_up / "checkpoints" / "6" / "state" / "manifest.ocdbt").unlink()
    result = _train("--resume", "--output-dir", taken_up, "--checkpoint-every=3")
    assert f"Warning: Checkpoint {taken_up / 'checkpoints' / '6'} is damaged" in result.stderr
    assert "resuming after 192 rows, 3 steps" in result.stderr
    assert _records(taken_up) == _records(unbroken)


# --- what is refused ------------------------------------------------------------------------------


def _assert_refused(sentence, *arguments):
    result = train("--resume", *arguments)
    assert result.exit_code == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert sentence in error
    assert "Traceback" not in result.output


OTHERWISE = {
    "--batch-size=32": "batch_size was 64, got 32",
    "--seed=1": "seed was 0, got 1",
    "--epochs=3": "epochs was 2, got 3",
    "--model=dcn": "model was 'dlrm', got 'dcn'",
    "--table-lr=0.1": "table_lr was 0.3, got 0.1",
    "--list-length=3": "list_length was not given, got 3",  # And none was among its data.
    "--patience=2": "patience was not given, got 2",
}


@pytest.mark.parametrize("option", OTHERWISE)
def test_a_run_goes_on_with_the_options_it_began_with(option, stopped):
    before = (stopped / "metrics.jsonl").read_text()
    sentence = f"options that it began with: {OTHERWISE[option]}; leave it out to go on, or begin "
    _assert_refused(sentence, "--output-dir", stopped, option)
    assert (stopped / "metrics.jsonl").read_text() == before


def test_options_of_a_file_are_held_to_the_same(options, stopped, tmp_path):
    config = tmp_path / "other.toml"
    config.write_text("features = 8\n")
    _assert_refused("features was 4, got 8", "--output-dir", stopped, "--config", config)


def test_there_is_no_run_to_go_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _assert_refused("There is no run with checkpoints under runs")
    _assert_refused("There is no run in absent: it holds no metrics", "--output-dir", "absent")
    (tmp_path / "empty").mkdir()
    _assert_refused("There is no run in empty: it holds no metrics", "--output-dir", "empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text(json.dumps({"kind": "progress"}) + "\n")
    _assert_refused("does not begin with the settings", "--output-dir", "empty")


@pytest.fixture(scope="module")
def hashed(tmp_path_factory):
    """A run on text with hashed ids, which make the tables of all data alike: directory, data."""
    directory = tmp_path_factory.mktemp("hashed")
    config, data = small_run(directory, rows=ctr_files.random_rows(1000))
    output = directory / "run"
    _stop(config, data, "--hash-size=50", "--checkpoint-every=3", "--output-dir", output, step=5)
    return output, directory / "clicks"


def _others(rows):
    """Rows that are not those."""
    spoilt = [row.copy() for row in rows]
    spoilt[997][3] += "1"
    swapped = [rows[1], rows[0], *rows[2:]]
    return {
        "more": (ctr_files.random_rows(1100), "they had 1,000 lines, {} has 1,100"),
        "fewer": (rows[:-1], "they had 1,000 lines, {} has 999"),
        "one cell": (spoilt, "{} has as many lines, 1,000, but its contents are others"),
        "another order": (swapped, "{} has as many lines, 1,000, but its contents are others"),
    }


@pytest.mark.parametrize("name", ["more", "fewer", "one cell", "another order"])
@pytest.mark.parametrize("form", ["text", "parquet", "vocabulary"])
def test_data_that_changed_are_said_to_have(form, name, hashed, taken_up, tmp_path):
    """Before models are compared, which the vocabularies of other data make others."""
    output, _ = hashed
    output = shutil.copytree(output, tmp_path / "run") if form == "text" else taken_up
    rows, sentence = _others(ctr_files.random_rows(1000))[name]
    write = ctr_files.write_text if form == "text" else ctr_files.write_parquet
    if form == "vocabulary":
        rows = [[*row[:14], *[cell and f"{cell}7" for cell in row[14:]]] for row in rows]
    other = write(tmp_path / "other", rows)
    before = (output / "metrics.jsonl").read_text()
    sentence = "resumed with the data that it began with: " + sentence.format(other)
    _assert_refused(sentence, "--output-dir", output, f"--data={other}")
    assert (output / "metrics.jsonl").read_text() == before


def test_the_same_text_goes_on_elsewhere_and_compressed(hashed, tmp_path):
    output, data = hashed
    moved = tmp_path / "moved.gz"
    moved.write_bytes(gzip.compress(data.read_bytes()))
    output = shutil.copytree(output, tmp_path / "run")
    assert "resuming after" in _train("--resume", "--output-dir", output, f"--data={moved}").stderr


def test_a_run_of_an_earlier_version_says_what_may_have_changed(taken_up, tmp_path):
    """Its records do not know their data."""
    metrics = taken_up / "metrics.jsonl"
    settings, *others = metrics.read_text().splitlines()
    old = {name: value for name, value in json.loads(settings).items() if name != "source"}
    metrics.write_text("".join(f"{line}\n" for line in [json.dumps(old), *others]))
    rows = ctr_files.random_rows(1000, categories=30)
    *_, data = small_run(tmp_path, name="other", rows=rows)
    sentence = "A run is resumed with the data that it began with, and with this version"
    _assert_refused(sentence, "--output-dir", taken_up, data)


def test_a_place_in_the_data_as_an_earlier_version_told_it(taken_up):
    metadata = taken_up / "checkpoints" / "6" / "metadata" / "metadata"
    text = metadata.read_text()
    assert '{"batches": 6}' in text
    metadata.write_text(text.replace('{"batches": 6}', '{"parent": {"blocks": 1}, "batch_idx": 6}'))
    _assert_refused("is of an earlier version of qrhash, which told", "--output-dir", taken_up)


@damaging
def test_nothing_but_damaged_checkpoints(taken_up):
    for path in (taken_up / "checkpoints").glob("*/metadata/metadata"):
        path.write_text("")
    sentence = "is damaged: metadata/metadata is no whole JSON. If no other is left, train anew"
    _assert_refused(sentence, "--output-dir", taken_up)


def test_a_run_whose_epochs_fill_their_batches_goes_on(options, tmp_path):
    """The position at the end of an epoch gives no batch of nothing, which would teach NaN."""
    full = ["--batch-size=64", "--synthetic-rows=400", "--test-rows=80", "--checkpoint-every=5"]
    config, _ = options
    _train(config, *full, "--epochs=2", "--output-dir", tmp_path / "run")
    before = numbers_of(tmp_path / "run")
    assert sorted(int(each.name) for each in (tmp_path / "run" / "checkpoints").iterdir())[-1] == 10
    for last in (10, 5):
        _train("--resume", "--output-dir", tmp_path / "run")
        assert numbers_of(tmp_path / "run") == before
        if last == 10:
            shutil.rmtree(tmp_path / "run" / "checkpoints" / "10")
