"""Training on several devices and in several processes: the curve of one device."""

import re
import shutil
import socket
import time

import jax
import pytest

from qrhash.ctr.errors import UserError
from qrhash.ctr.run import devices, report
from qrhash.ctr.run import train as fitting
from qrhash.ctr.run.devices import make_layout, mesh_sizes
from qrhash.ctr.run.learner import Learner
from qrhash.ctr.settings import Settings
from support import ctr_files
from support.training_process import (
    COUNTED,
    ROWS,
    assert_same_curve,
    assert_same_to_the_last_bit,
    command_line,
    numbers_of,
    small_run,
    train,
    until,
)

STANDARD_PROMOTION = True  # optax.adam needs it
UNCHECKED_KEYS = True


# --- the mesh -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=2,model=4", {"data": 2, "model": 4}),
        ("model=4, data=2", {"model": 4, "data": 2}),
        ("data=8", {"data": 8}),
    ],
)
def test_a_mesh_is_written_as_sizes(text, sizes):
    assert list(mesh_sizes(text).items()) == list(sizes.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo=2", "axes data and model, got 'foo' in 'foo=2'"),
        ("data=2,foo=4", "axes data and model, got 'foo' in 'data=2,foo=4'"),
        ("", "axes data and model, got ''"),
        ("data=2,", "axes data and model, got ''"),
        *(
            (text, f"sizes such as data=2,model=4, got '{text}'")
            for text in ("data", "data=", "data=x", "data=0", "model=-1", "data=2.0")
        ),
        ("data=2,data=2", "sizes such as data=2,model=4, got 'data=2,data=2'"),
        ("data=2;model=4", "sizes such as data=2,model=4, got 'data=2;model=4'"),
    ],
)
def test_a_mesh_written_wrong_is_one_sentence(text, message):
    with pytest.raises(UserError, match=message) as error:
        mesh_sizes(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mesh", "rows", "batch"),
    [
        ("data=2,model=4", ("model",), ("data",)),
        ("model=2,data=2", ("model",), ("data",)),
        ("model=8", ("model",), ()),
        ("data=8", ("data",), ("data",)),
        ("data=1", ("data",), ("data",)),
    ],
)
def test_tables_go_over_model_and_batches_over_data(mesh, rows, batch):
    layout = make_layout(Settings(mesh=mesh, exchange="reduce"))
    assert (layout.row_axes, layout.batch_axes, layout.exchange) == (rows, batch, "reduce")
    assert dict(layout.mesh.shape) == mesh_sizes(mesh)


def test_without_a_mesh_nothing_is_split():
    assert make_layout(Settings()) is None


def test_more_devices_than_there_are():
    hint = "XLA_FLAGS=--xla_force_host_platform_device_count=16"
    with pytest.raises(UserError, match=f"mesh data=16 is of 16 devices.* 8.*{hint}"):
        make_layout(Settings(mesh="data=16"))


def test_a_batch_that_does_not_divide():
    with pytest.raises(UserError, match=r"--batch-size and --mesh do not fit: .* 8 .*, got 12"):
        make_layout(Settings(mesh="data=8", batch_size=12))
    assert make_layout(Settings(mesh="model=8", batch_size=12)) is not None


@pytest.mark.parametrize(
    ("mesh", "message"),
    [(None, "need a --mesh over all their devices"), ("data=4", "4 devices.* 8")],
)
def test_several_processes_train_on_all_their_devices(mesh, message, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=message):
        make_layout(Settings(mesh=mesh))


# --- what the command line says -------------------------------------------------------------------


def _free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


TOGETHER = "--coordinator, --num-processes and --process-id go together"
MISTAKES = {
    "axis": ("--mesh foo=2", "mesh has the axes data and model, got 'foo'"),
    "devices": ("--mesh data=3,model=3", "The mesh data=3,model=3 is of 9 devices"),
    "batch": ("--mesh data=8 --batch-size 100", "--batch-size and --mesh do not fit"),
    "coordinator alone": ("--coordinator localhost:1", TOGETHER),
    "number alone": ("--num-processes 2", TOGETHER),
    "no coordinator": ("--num-processes 2 --process-id 1", TOGETHER),
    "no number": ("--coordinator localhost:1 --num-processes 2", TOGETHER),
    "process": (
        "--coordinator localhost:1 --num-processes 2 --process-id 2 --output-dir out",
        "process_id must be below num_processes=2, got 2",
    ),
    "output": (
        "--coordinator localhost:1 --num-processes 2 --process-id 1",
        "Several processes need one --output-dir",
    ),
    **{
        f"address {address}": (
            f"--coordinator {address} --num-processes 2 --process-id 0 --output-dir out",
            f"coordinator must be host:port, of a port from 1 to 65535, got '{address}'",
        )
        for address in (
            *("localhost", "localhost:", ":1234", "localhost:http", "1234"),
            *("localhost:0", "localhost:65536", "a..b:1234"),
        )
    },
}


def _assert_one_error(result, sentence):
    assert result.exit_code == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert sentence in error
    assert "Traceback" not in result.output


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, sentence = MISTAKES[name]
    small = ["--synthetic-rows=100", "--hash-size=50"]
    _assert_one_error(train(*small, *arguments.split()), sentence)
    assert not list(tmp_path.iterdir())


def test_a_coordinator_that_does_not_answer(tmp_path):
    address = f"localhost:{_free_port()}"
    start = time.monotonic()
    result = train(
        f"--coordinator={address}",
        *("--num-processes=2", "--process-id=1", "--coordinator-timeout=2", "--mesh=data=8"),
        f"--output-dir={tmp_path / 'out'}",
    )
    assert 2 <= time.monotonic() - start < 10
    _assert_one_error(result, f"The coordinator at {address} does not answer within 2 s")
    assert not (tmp_path / "out").exists()


def test_of_processes_numbered_in_a_file_the_first_speaks(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "fit", lambda settings, display, keeper: display.line("hear"))
    monkeypatch.setattr(devices, "connect", lambda settings, display: None)
    monkeypatch.setattr(report, "final_table", lambda summary: "")
    for number, heard in ((0, True), (1, False)):
        (tmp_path / "run.toml").write_text(f"process_id = {number}\n")
        result = train(f"--config={tmp_path / 'run.toml'}", f"--output-dir={tmp_path / 'out'}")
        assert (result.exit_code, "hear" in result.stderr) == (0, heard)


# --- the same curve -------------------------------------------------------------------------------


def _train(*arguments):
    result = train(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory):
    """The records of a run on one device."""
    output = tmp_path_factory.mktemp("run") / "alone"
    _train(*options, "--output-dir", output)
    return numbers_of(output)


@pytest.mark.parametrize(
    ("mesh", "exchange"),
    [("data=2,model=4", "auto"), ("model=8", "all_to_all"), ("data=8", "reduce")],
)
def test_every_mesh_gives_the_curve_of_one_device(
    mesh, exchange, options, alone, tmp_path, monkeypatch
):
    learners = []
    initialise = Learner.__init__

    def watched(self, *arguments, **options):
        learners.append(self)
        initialise(self, *arguments, **options)

    monkeypatch.setattr(Learner, "__init__", watched)
    output = tmp_path / "run"
    _train(*options, "--mesh", mesh, "--exchange", exchange, "--output-dir", output)
    assert_same_curve(numbers_of(output), alone)
    (learner,) = learners
    tables = jax.tree.leaves(learner.params["tables"])
    parts = [len({str(part.index) for part in table.addressable_shards}) for table in tables]
    *_, shards = mesh_sizes(mesh).values()
    assert sorted(parts) == [1, shards]
    assert learner._step._cache_size() == 1


def test_a_mesh_changes_no_count(options, alone, tmp_path):
    """Rows that pad the tables are nobody's parameters."""
    _train(*options, "--mesh=data=2,model=4", "--output-dir", tmp_path / "run")
    counts = [
        {name: value for name, value in record.items() if isinstance(value, int)}
        for record in (numbers_of(tmp_path / "run")[-1], alone[-1])
    ]
    assert counts[0] == counts[1]


MESH = "--mesh=data=2,model=4"


def _together(*options, output, logs):
    """A run of two processes; how many rows each decoded."""
    shared = [*options, "--output-dir", output, MESH, "--num-processes=2"]
    shared += [f"--coordinator=localhost:{_free_port()}", "--coordinator-timeout=60"]
    processes = [
        command_line(*shared, f"--process-id={number}", output=log, devices=4, before=COUNTED)
        for number, log in enumerate(logs)
    ]
    try:
        until(lambda: all(process.poll() == 0 for process in processes), processes, 150)
    except AssertionError as error:
        texts = (f"--- process {n}:\n{log.read_text()[-3000:]}" for n, log in enumerate(logs))
        raise AssertionError("\n".join([str(error), *texts])) from error
    return [int(re.findall("decoded ([0-9]+)", log.read_text())[-1]) for log in logs]


@pytest.fixture
def logs(tmp_path):
    return [tmp_path / f"{number}.log" for number in (0, 1)]


def test_two_processes_give_the_curve_of_one(options, alone, tmp_path, logs):
    output = tmp_path / "run"
    decoded = _together(*options, output=output, logs=logs)
    assert_same_curve(numbers_of(output), alone)
    assert "rows trained on" in logs[0].read_text()
    assert "rows trained on" not in logs[1].read_text()
    # Each row once in each pass: the first look, the sample of the test rows, two epochs, the test.
    assert sum(decoded) == 1000 + 100 + 2 * 800 + 200
    assert max(decoded) <= sum(decoded) / 2 + 5 * 32

    # One process takes up what two have left.
    result = _train("--resume", "--output-dir", output)
    assert "resuming after 1,600 rows, 26 steps" in result.stderr
    assert_same_curve(numbers_of(output), alone)


@pytest.mark.slow
def test_two_processes_find_the_items_of_one(tmp_path, logs):
    """Each gathers those of its rows, with their lists."""
    data = ctr_files.write_table(tmp_path / "f.parquet", ctr_files.films(600))
    run = [f"--data={data}", "--label=none", "--model=two-tower", "--items=movie_id,genres"]
    run += ["--features=4", "--tower-mlp=8-4", "--batch-size=64", "--evaluations=2"]
    _train(*run, "--output-dir", tmp_path / "alone")
    _together(*run, output=tmp_path / "run", logs=logs)
    alone, together = (numbers_of(tmp_path / name) for name in ("alone", "run"))
    for records in (alone, together):
        assert records[-1].pop("constant_log_loss") is None
    assert_same_curve(together, alone)
    for name in ("test_unseen", "constant_recall_10"):
        assert together[-1][name] == alone[-1][name]
    assert together[-1]["test_mrr"] == pytest.approx(alone[-1]["test_mrr"], rel=1e-3)


BAD = range(7, ROWS, 100)


def _spoilt_text(folder):
    """Lines without cells, and others with a cell that is none."""
    rows = ctr_files.random_rows(ROWS)
    for i in BAD:
        rows[i] = ["x"] if i % 200 == 7 else [*rows[i][:15], "no", *rows[i][16:]]
    return ctr_files.write_text(folder / "spoilt", rows)


def _spoilt_parquet(folder):
    rows = ctr_files.random_rows(ROWS)
    for i in BAD:
        rows[i][15] = "no"
    return ctr_files.write_parquet(folder / "spoilt", rows)


def _forget_after(step, output):
    """As if the run had been stopped then."""
    for path in (output / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def _run_alone(*run, tmp_path):
    """One process on as many devices; with 8 malformed lines to train on and 2 to test on."""
    often = ["--max-bad-lines=10", "--checkpoint-every=9", "--keep-checkpoints=9"]
    _train(*run, *often, MESH, "--output-dir", tmp_path / "alone")
    summary = numbers_of(tmp_path / "alone")[-1]
    assert (summary["bad_lines"], summary["train_rows"]) == (10, 2 * 792)
    return tmp_path / "alone", [*run, *often]


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_began(options, tmp_path, logs):
    """With malformed rows among the others, which move all that follow, and a plan by all rows."""
    run = [options[0], f"--data={_spoilt_text(tmp_path)}", "--compression=2"]
    alone, run = _run_alone(*run, tmp_path=tmp_path)
    output = tmp_path / "run"
    decoded = _together(*run, output=output, logs=logs)
    assert_same_to_the_last_bit(output, alone)
    without_cells = 5
    assert sum(decoded) == 1000 - without_cells + 99 + 2 * 792 + 198
    assert max(decoded) <= sum(decoded) / 2 + 5 * 32
    assert logs[0].read_text().count("\nskipped ") == 5
    _forget_after(9, output)
    result = _train("--resume", MESH, "--output-dir", output)
    assert "resuming after 576 rows" in result.stderr
    assert_same_to_the_last_bit(output, alone)


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_began(options, tmp_path, logs):
    """Without a vocabulary: to find the malformed rows they look at all of them first."""
    run = [options[0], f"--data={_spoilt_parquet(tmp_path)}", "--ids=keys", "--key-bits=10"]
    alone, _ = _run_alone(*run, tmp_path=tmp_path)
    output = shutil.copytree(alone, tmp_path / "run")
    _forget_after(18, output)
    decoded = _together("--resume", output=output, logs=logs)
    assert "resuming after 1,112 rows" in logs[0].read_text()
    assert_same_to_the_last_bit(output, alone)
    assert sum(decoded) == 1000 + 99 + 2 * 792 - 1112 + 198
    assert max(decoded) <= sum(decoded) / 2 + 4 * 32


@pytest.mark.slow
def test_two_processes_give_keys_the_rows_that_one_gives(options, tmp_path, logs):
    """Both count what became of the keys after the same steps, whoever shows it."""
    run = [*options, "--dynamic=80", "--evict-every=5", "--large-table-rows=16"]
    _train(*run, MESH, "--output-dir", tmp_path / "alone")
    _together(*run, output=tmp_path / "run", logs=logs)
    assert_same_to_the_last_bit(tmp_path / "run", tmp_path / "alone")
    of_runs = [numbers_of(tmp_path / name)[-1] for name in ("run", "alone")]
    became = ("num_keys", "looked_up", "in_rows", "admitted", "no_room", "evicted")
    counts = [[summary[f"dynamic_{name}"] for name in became] for summary in of_runs]
    assert counts[0] == counts[1]
    assert counts[0][-1] > 0


@pytest.mark.slow
def test_a_limit_of_malformed_lines_holds_for_all_processes(options, tmp_path, logs):
    """Each meets half of them, and says what one would that meets all."""
    run = [options[0], f"--data={_spoilt_text(tmp_path)}", "--max-bad-lines=9"]
    with pytest.raises(AssertionError, match="exit codes"):
        _together(*run, output=tmp_path / "run", logs=logs)
    for log in logs:
        assert "Error: More than 9 malformed lines, the last of them" in log.read_text()
