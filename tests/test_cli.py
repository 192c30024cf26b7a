"""The command line: its help, its errors, its exit codes."""

import os
import signal
import subprocess
import sys
import time

import jax
import pytest
from rich.console import Console
from typer.testing import CliRunner

import qrhash
from qrhash import cli
from qrhash.commands.interrupts import Interrupts
from qrhash.commands.running import guarded
from qrhash.ctr.data.criteo import CATEGORIES
from qrhash.ctr.run.report import CHECKPOINTS, IDS, METRICS, PICTURE
from qrhash.ctr.settings import options
from support import ctr_files

STANDARD_PROMOTION = True  # optax.adam needs it

SMALL = """
features = 4
bottom_mlp = "8"
top_mlp = "8"
batch_size = 64
""" + "".join(f"[columns.{name}]\npartition = 'drop'\nhash_size = 2\n" for name in CATEGORIES[2:])


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SMALL)
    return "--config=small.toml"


def _run(*arguments):
    return CliRunner().invoke(cli.build_app(), arguments, env={"COLUMNS": "200"})


def test_version():
    result = _run("--version")
    assert (result.exit_code, result.stdout) == (0, f"qrhash {qrhash.__version__}\n")


def test_help_offers_every_option_with_its_default():
    text = _run("train", "--help").stdout
    for name, _, _, _ in options():
        assert f"--{name.replace('_', '-')} " in text
    for panel in ("Data", "Embeddings", "Model", "Training", "Output"):
        assert f" {panel} " in text
    assert "512-256-64" in text
    # What every run has before what only those of tables that grow or of two towers have.
    assert text.index("--compression ") < text.index("--features ") < text.index("--admit-after ")
    assert text.index("--model ") < text.index("--items ")
    assert "[columns" not in text  # rich would swallow it


def test_a_run_leaves_metrics_and_picture(small, tmp_path):
    path = ctr_files.write_text(tmp_path / "clicks.tsv", ctr_files.random_rows(300))
    result = _run("train", small, "--data", str(path), "--output-dir", "out", "--test-rows", "50")
    assert result.exit_code == 0, result.stderr
    assert "250 rows trained on, 50 tested on" in result.stdout
    assert "constant predictor" in result.stdout
    assert f"{METRICS} and {PICTURE} are in out" in result.stderr
    assert {each.name for each in (tmp_path / "out").iterdir()} == {
        METRICS,
        PICTURE,
        CHECKPOINTS,
        IDS,
    }

    again = _run("train", small, "--data", str(path), "--output-dir", "out")
    assert again.exit_code == 1
    assert "holds an earlier run" in again.stderr


MISTAKES = {
    "missing file": (["--data", "absent.tsv"], "There is no file or folder absent.tsv"),
    "missing folder": (["--data", "absent/"], "There is no file or folder absent/."),
    "empty folder": (["--data", "nothing"], "nothing holds no file of data"),
    "not hex": (["--data", "words.tsv", "--max-bad-lines", "3"], "C1 is not a category"),
    "labels": (["--data", "labels.tsv", "--max-bad-lines", "3"], "label is not 0 or 1: '7'"),
    "all bad": (
        ["--data", "labels.tsv", "--config", "small.toml"],
        "none of the 16 training lines can be read",
    ),
    "value": (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
    "config": (["--config", "absent.toml"], "absent.toml cannot be read"),
    "split": (["--test-rows", "200000"], "leaves none to train on"),
    "embedding": (["--partition", "hash-trick", "--collisions", "0"], "Column C1, "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_1(name, small, tmp_path):
    arguments, sentence = MISTAKES[name]
    ctr_files.write_text(tmp_path / "words.tsv", [ctr_files.make_row(category="xyz")] * 20)
    ctr_files.write_text(tmp_path / "labels.tsv", [ctr_files.make_row(label="7")] * 20)
    (tmp_path / "nothing").mkdir()
    if name == "embedding":
        arguments = [*arguments, "--hash-size", "300", "--synthetic-rows", "100"]
    result = _run("train", *arguments)
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert "Traceback" not in result.output
    assert f"{METRICS} " not in result.stderr
    assert not list(tmp_path.rglob(PICTURE))


def test_a_device_with_too_little_memory_is_one_sentence(capsys):
    def run(said):
        def fail():
            raise jax.errors.JaxRuntimeError(said)

        return guarded(fail, Console())

    assert run("RESOURCE_EXHAUSTED: Out of memory allocating 540000 bytes.\nAllocator: ...") == 1
    assert capsys.readouterr().err == (
        "Error: Out of memory allocating 540000 bytes: fewer --features, or a smaller "
        "--batch-size, take less.\n"
    )
    with pytest.raises(RuntimeError, match="INTERNAL: a fault"):
        run("INTERNAL: a fault")


def test_a_wrong_choice_is_typers_to_refuse():
    result = _run("train", "--partition", "magic")
    assert result.exit_code == 2
    assert "magic" in result.output


def test_without_the_extra_one_sentence(monkeypatch):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name)
    )
    with pytest.raises(SystemExit, match=r"qrhash needs pyarrow; .*pip install 'qrhash\[train\]'"):
        cli.main()


def test_importing_the_command_line_loads_none_of_the_extra():
    code = "import sys, qrhash.cli; print(sorted({*qrhash.cli._TRAIN_EXTRA} & {*sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n"


def test_an_interrupt_keeps_what_was_written(small, tmp_path):
    """Ctrl-C in a run that would take hours."""
    arguments = ["train", small, "--output-dir=out", "--hash-size=30", "--evaluations=100000"]
    arguments += ["--synthetic-rows=100000000", "--eval-rows=10"]
    with subprocess.Popen(
        [sys.executable, "-c", "from qrhash.cli import main; main()", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        metrics = tmp_path / "out" / METRICS
        deadline = time.monotonic() + 120
        while not (metrics.exists() and "progress" in metrics.read_text()):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert "Interrupted." in errors
    assert errors.endswith(
        f"{METRICS} and {PICTURE} are in out\ngo on with: qrhash train --resume --output-dir out\n"
    )
    assert "Traceback" not in errors
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_an_interrupt_waits_for_the_batch_and_a_second_one_for_nothing(monkeypatch, capfd):
    interrupts = Interrupts(lambda: ["go on with: ..."])
    interrupts.check()
    interrupts(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
    said = "Ctrl-C: the training ends with this batch; once more, and it ends at once."
    assert capfd.readouterr().err == f"\n{said}\n"
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        interrupts(signal.SIGINT, None)
    assert ended.value.code == 130
    assert capfd.readouterr().err == "Interrupted.\ngo on with: ...\n"


def test_an_early_interrupt_ends_at_once(tmp_path):
    code = "import qrhash.cli as cli; signal = cli.signal.signal\n"
    code += "cli.signal.signal = lambda *args: (signal(*args), print('ready', flush=True))\n"
    with subprocess.Popen(
        [sys.executable, "-c", code + "cli.main()", "train", "--output-dir=out"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert errors == "Interrupted before training began; nothing was written.\n"
    assert not (tmp_path / "out").exists()
