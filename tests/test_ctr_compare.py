"""`qrhash compare`: what is trained, what is kept, and what is made of it."""

import io
import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from qrhash.ctr.compare_settings import METHODS, CompareOptions, check_base
from qrhash.ctr.errors import UserError
from qrhash.ctr.run import compare as comparing
from qrhash.ctr.run.compare import Outcome, Trial, compare
from qrhash.ctr.run.compare_report import FIGURES, PICTURE, compared, draw, table_of, write
from qrhash.ctr.run.display import Display
from qrhash.ctr.settings import Settings
from support import ctr_files

STANDARD_PROMOTION = True  # optax.adam needs it
UNCHECKED_KEYS = True

LEFT_OUT = {name: {"partition": "drop"} for name in ("ad",)}
SMALL = {
    "features": 4,
    "bottom_mlp": "8",
    "top_mlp": "8",
    "batch_size": 64,
    "threshold": 20,
    "evaluations": 2,
    "eval_rows": 64,
    "columns": LEFT_OUT,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "events.parquet"
    return str(ctr_files.write_table(path, ctr_files.events(500, users=80)))


@pytest.fixture
def here(monkeypatch):
    """Trainings in this process; the list of those that were begun."""
    begun = []

    def outcomes(self, trials, full_bytes):
        for trial in trials:
            begun.append(trial.name)
            yield comparing._train(asdict(self._settings), trial, full_bytes, self._directory)

    monkeypatch.setattr(comparing._Jobs, "_outcomes", outcomes)
    return begun


def _compare(data, directory, **options):
    console = Console(file=io.StringIO(), width=200)
    with Display(console) as display:
        found = compare(
            Settings(data=data, **SMALL),
            CompareOptions(output_dir=str(directory), **options),
            display,
        )
    return found, console.file.getvalue()


def test_every_method_is_trained_at_every_size(data, here, tmp_path):
    options = {"methods": "hash-trick,plan,dynamic", "compressions": "2", "seeds": 1}
    found, said = _compare(data, tmp_path / "c", **options)
    names = [each.trial.name for each in found]
    assert names == here
    assert names == [
        "full-seed0",
        *("hash-trick-2x-seed0", "plan-2x-seed0", "dynamic-2x-seed0"),
    ]
    assert "4 of 4, dynamic-2x-seed0: " in said
    full = found[0].summary["full_bytes"]
    for each in found[1:]:
        assert not each.reason
        taken = each.summary["embedding_bytes"] + each.summary["index_bytes"]
        assert taken <= full / each.trial.times


def test_seeds_differ_and_a_seed_agrees(data, here, tmp_path):
    first, _ = _compare(data, tmp_path / "a", methods="full", seeds=2)
    again, _ = _compare(data, tmp_path / "b", methods="full", seeds=2)
    losses = [[each.summary["test_log_loss"] for each in found] for found in (first, again)]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def test_what_is_finished_stays_finished(data, here, tmp_path, monkeypatch):
    options = {"methods": "hash-trick", "compressions": "2", "seeds": 2}
    train, killed = comparing._train, "hash-trick-2x-seed0"

    def killed_once(values, trial, full_bytes, directory):
        if trial.name == killed:
            (directory / "runs" / trial.name).mkdir()
            (directory / "runs" / trial.name / "metrics.jsonl").write_text('{"kind": "settings"}\n')
            raise KeyboardInterrupt
        return train(values, trial, full_bytes, directory)

    monkeypatch.setattr(comparing, "_train", killed_once)
    with pytest.raises(KeyboardInterrupt):
        _compare(data, tmp_path / "c", **options)
    monkeypatch.setattr(comparing, "_train", train)
    before = {path: path.read_bytes() for path in (tmp_path / "c").rglob("full*/metrics.jsonl")}
    assert len(before) == 2
    here.clear()
    found, said = _compare(data, tmp_path / "c", **options)
    assert here == [killed, "hash-trick-2x-seed1"]
    assert "going on with the comparison in" in said
    assert {path: path.read_bytes() for path in before} == before
    here.clear()
    again, _ = _compare(data, tmp_path / "c", **options | {"seeds": 1})
    assert not here
    assert again == [found[0], found[2]]


def test_another_comparison_is_not_mixed_in(data, here, tmp_path):
    _compare(data, tmp_path / "c", methods="full", seeds=1)
    options = CompareOptions(output_dir=str(tmp_path / "c"))
    other = Settings(data=data, **SMALL | {"features": 8})
    with pytest.raises(UserError, match="holds a comparison with features=4, got 8: choose anoth"):
        compare(other, options, Display(Console(file=io.StringIO())))
    other = ctr_files.write_table(tmp_path / "other.parquet", ctr_files.events(300, users=80))
    moved = tmp_path / "moved.parquet"
    moved.write_bytes(Path(data).read_bytes())
    _compare(str(moved), tmp_path / "e", methods="full", seeds=1)
    moved.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"holds a comparison of other data than .* has now"):
        _compare(str(moved), tmp_path / "e", methods="full", seeds=2)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "other").write_text("")
    with pytest.raises(UserError, match="holds something else: choose another --output-dir"):
        _compare(data, tmp_path / "d", methods="full")


def test_a_comparison_goes_on_that_an_earlier_version_began(data, here, tmp_path):
    """Whose defaults were others, of options that a comparison says itself."""
    _compare(data, tmp_path / "c", methods="full", seeds=1)
    basis = tmp_path / "c" / comparing.BASIS
    begun = json.loads(basis.read_text())
    assert begun["partition"] == "auto"
    basis.write_text(json.dumps(begun | {"partition": "quotient-remainder"}))
    found, _ = _compare(data, tmp_path / "c", methods="plan", compressions="2", seeds=1)
    assert here == ["full-seed0", "plan-2x-seed0"]
    assert not found[1].reason


def test_what_was_begun_and_never_trained_is_begun_anew(data, here, tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparing, "_train", stopped)
        with pytest.raises(KeyboardInterrupt):
            _compare(data, tmp_path / "c", methods="full")
    other = ctr_files.write_table(tmp_path / "other.parquet", ctr_files.events(300, users=80))
    found, _ = _compare(str(other), tmp_path / "c", methods="full", seeds=1)
    assert found[0].summary["train_rows"] == 240


def test_what_goes_wrong_in_a_process_is_told(data, tmp_path):
    (tmp_path / "c" / "runs").mkdir(parents=True)
    jobs = comparing._Jobs(tmp_path / "c", Settings(data=data, **SMALL), 1, Display(Console()), 1)
    (tmp_path / "c" / "runs" / "full-seed0").write_text("")
    with pytest.raises(UserError, match="full-seed0 failed: NotADirectoryError"):
        list(jobs._outcomes([Trial("full", 1, 0)], 0))


@pytest.mark.slow
def test_processes_train_as_this_one_does(data, tmp_path):
    """And the temporary failure of one is its own."""
    found, _ = _compare(data, tmp_path / "c", methods="hash-trick", compressions="1000", seeds=1)
    full, none = found
    assert "allows the embeddings" in none.reason
    assert not none.summary
    outcome, peak = comparing._train(
        comparing.asdict(Settings(data=data, **SMALL)), full.trial, 0, tmp_path / "d"
    )
    for name in ("test_log_loss", "test_auc", "embedding_bytes", "train_rows"):
        assert full.summary[name] == pytest.approx(outcome.summary[name], rel=1e-4)
    assert peak > 100e6


def test_nonsense_is_named(data, here, tmp_path):
    with pytest.raises(UserError, match="There is no file"):
        _compare("nowhere.csv", tmp_path / "c")
    assert not list(tmp_path.iterdir())
    wrong = {
        "methods": ("full,best", "methods must be of full, .*, got 'best'"),
        "compressions": ("4,x", "compressions must be numbers of at least 1"),
        "seeds": (0, "seeds must be at least 1, got 0"),
    }
    for name, (value, sentence) in wrong.items():
        with pytest.raises(UserError, match=sentence):
            CompareOptions(**{name: value})
    with pytest.raises(UserError, match="operation is what qrhash compare says itself"):
        check_base(Settings(operation="add"))
    with pytest.raises(UserError, match=r"columns\.C1: partition is what qrhash compare says"):
        check_base(Settings(columns={"C1": {"partition": "full"}}))


# --- what is made of it ---------------------------------------------------------------------------

LOSSES = {
    ("full", 1.0): [0.5, 0.4],
    ("mult", 4.0): [0.51, 0.41],
    ("add", 4.0): [0.502, 0.399],
    ("mult", 16.0): [0.52, 0.45],
}


def _outcomes():
    for (method, times), losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            summary = {
                "test_log_loss": loss,
                "test_auc": 1 - loss,
                "embedding_bytes": 1000 / times,
                "index_bytes": 0,
            }
            yield Outcome(Trial(method, times, seed), summary)
    yield Outcome(Trial("add", 16.0, 0), {}, "too small")
    yield Outcome(Trial("add", 16.0, 1), {}, "too small")


def test_losses_are_compared_seed_by_seed():
    rows = {(each.method, each.times): each for each in compared(list(_outcomes()))}
    assert list(rows) == [*LOSSES, ("add", 16.0)]
    for key, losses in LOSSES.items():
        excess = [100 * (a / b - 1) for a, b in zip(losses, LOSSES["full", 1.0], strict=True)]
        row = rows[key]
        assert row.excess == pytest.approx(statistics.mean(excess))
        assert row.error == pytest.approx(statistics.stdev(excess) / math.sqrt(2))
        assert row.log_loss == pytest.approx(statistics.mean(losses))
        assert row.auc == pytest.approx(1 - statistics.mean(losses))
        assert row.num_bytes == 1000 / key[1]
    assert rows["add", 16.0].reason == "too small"
    (alone,) = compared([Outcome(Trial("full", 1.0, 0), next(_outcomes()).summary)])
    assert math.isnan(alone.error)


def test_the_table_has_the_best_of_a_size_first():
    console = Console(file=io.StringIO(), width=120)
    console.print(table_of(compared(list(_outcomes())), seeds=2))
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("│")]
    assert [line.split("│")[2].strip() for line in lines] == ["full", "add", "mult", "mult", "add"]
    assert "+2.25 ± 0.25 %" in lines[2]
    assert "too small" in lines[4]


def test_figures_and_picture_are_written(tmp_path):
    outcomes = list(_outcomes())
    write(outcomes, compared(outcomes), tmp_path)
    figures = json.loads((tmp_path / FIGURES).read_text())
    assert [each["method"] for each in figures["compared"]] == [
        "full",
        "mult",
        "add",
        "mult",
        "add",
    ]
    assert figures["compared"][4]["log_loss"] is None
    assert len(figures["runs"]) == len(outcomes)
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([FIGURES, PICTURE])


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_picture_has_its_sizes_on_its_axis(seeds, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    draw(compared([each for each in _outcomes() if each.trial.seed < seeds]), tmp_path / "p.png")
    (axes,) = figures[0].axes
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown == ["62.5 B", "250.0 B", "1.0 kB"]
    full = next(line for line in axes.get_lines() if line.get_label().startswith("full"))
    assert full.get_color() not in {line.get_color() for line in axes.get_lines() if line != full}
    has_bars = any(len(each.get_segments()) for each in axes.collections)
    assert has_bars == (seeds > 1)


def test_the_methods_are_settings():
    for times_of in METHODS.values():
        assert Settings(**times_of(4.0, 10_000))
