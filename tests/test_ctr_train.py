"""Whole runs with small models."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from qrhash import EmbedConfig, FullTable, HashTrick, KeyDigits, Keys
from qrhash.ctr.data.counts import Counts, build_ids
from qrhash.ctr.data.criteo import CATEGORIES
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.pipeline import Batch, batches
from qrhash.ctr.data.schema import CRITEO, Column
from qrhash.ctr.data.sources import open_source
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.metrics import Scores, constant_logit, log_loss
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.learner import Learner
from qrhash.ctr.run.overview import overview
from qrhash.ctr.run.progress import Progress
from qrhash.ctr.run.records import Keeper, Summary
from qrhash.ctr.run.report import METRICS, PICTURE, RunDirectory, draw, final_table
from qrhash.ctr.run.rows import split_line
from qrhash.ctr.run.train import fit
from qrhash.ctr.settings import Settings
from support import ctr_files

STANDARD_PROMOTION = True  # optax.adam needs it

# Most columns are left out: the time goes into compiling their embeddings.
COLUMNS = {name: {"partition": "drop", "hash_size": 2} for name in CATEGORIES[3:]}
SMALL = {
    "features": 4,
    "bottom_mlp": "8",
    "top_mlp": "8",
    "deep_mlp": "8",
    "batch_size": 64,
    "threshold": 20,
    "evaluations": 3,
    "columns": COLUMNS,
}

LEARNS = {  # in the few steps of a test
    "features": 8,
    "operation": "mult",
    "init_stddev": 0.35,
    "bottom_mlp": "16",
    "top_mlp": "32",
    "batch_size": 32,
    "dense_lr": 0.01,
    "table_lr": 0.3,
}


def _fit(**options):
    records = []
    with Display(Console(file=io.StringIO())) as display:
        summary = fit(Settings(**SMALL | options), display, Kept(records))
    return summary, records


class Kept(Keeper):
    """Keeps the records in a list, and no checkpoints."""

    def __init__(self, records):
        self.record = records.append


@pytest.mark.parametrize("label", ["0", "1"])
def test_labels_that_are_all_alike_are_warned_of(label, tmp_path):
    rows = [[label, *row[1:]] for row in ctr_files.random_rows(100)]
    data = ctr_files.write_text(tmp_path / "clicks", rows)
    with Display(Console(file=io.StringIO(), width=150)) as display:
        fit(Settings(data=str(data), **SMALL), display, Kept([]))
    sentence = f"Warning: the labels of all training rows are {label}: there is nothing to learn"
    assert sentence in display._console.file.getvalue()


@pytest.fixture(scope="module")
def rows():
    return ctr_files.random_rows(3000)


def test_keys_of_64_bits_train_alike_whatever_holds_them(tmp_path):
    """Hex digits, unsigned and signed integers: the same batches, and a run that takes them."""
    rows = ctr_files.random_rows(300)
    for row in rows:
        row[14:] = [
            cell and f"{2**64 - 1 - int(cell, 16) * 0x123456789AB % 2**64:x}" for cell in row[14:]
        ]
    assert {len(cell) for row in rows for cell in row[14:]} >= {0, 16}
    files = [ctr_files.write_text(tmp_path / "text", rows)]
    for name, kind in (("unsigned", pa.uint64()), ("signed", pa.int64())):
        files.append(ctr_files.write_parquet(tmp_path / name, rows, integer_keys=kind))
    columns = COLUMNS | {"C2": {"hash_size": 50}}
    options = SMALL | {"columns": columns}
    found = []
    for path in files:
        settings = Settings(**options, data=str(path))
        source = open_source(settings, BadLines(0, print))
        ids = build_ids(Counts(settings, CATEGORIES), source.blocks(0, 300))
        with batches(source, 0, 300, ids, 300) as stream:
            (batch,) = stream
        found.append(batch.ids)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    cells = [cell for row in rows for cell in row[14:16]]
    for j, number in enumerate(found[0][:, :2].ravel().tolist()):
        if j % 2 == 1:  # C2
            assert number == (1 + int(cells[j], 16) % 49 if cells[j] else 0)
    assert len(set(found[0][:, 0].tolist())) == len({row[14] for row in rows})
    summary, _ = _fit(data=str(files[2]), columns=columns, max_bad_lines=0)
    assert (summary.train_rows, summary.test.rows) == (240, 60)


@pytest.mark.parametrize("model", ["dlrm", "dcn"])
def test_it_learns_from_a_file(model, rows, tmp_path, monkeypatch):
    learners = []
    initialise = Learner.__init__

    def watched(self, *arguments, **options):
        learners.append(self)
        initialise(self, *arguments, **options)

    monkeypatch.setattr(Learner, "__init__", watched)
    path = ctr_files.write_gzip(tmp_path / "clicks", rows)
    summary, records = _fit(data=str(path), model=model, test_rows=700, **LEARNS)
    assert [record["kind"] for record in records] == ["settings", *["progress"] * 3, "summary"]
    assert (summary.train_rows, summary.test.rows, summary.bad_lines) == (2300, 700, 0)
    labels = np.array([float(row[0]) for row in rows])
    constant = log_loss(labels[2300:], np.full(700, constant_logit(labels[:2300].mean())))
    assert summary.constant.log_loss == pytest.approx(constant, rel=1e-5)
    assert summary.test.log_loss < summary.constant.log_loss - 0.15
    assert summary.test.auc > 0.8
    assert records[-1]["test_auc"] == summary.test.auc
    assert summary.truth is None
    # C1..C3 have 51 categories and the unseen one: tables of ceil(52 / 4) and 4 rows.
    assert summary.embedding_params == 3 * 17 * 8
    assert summary.embedding_bytes == 3 * 17 * 8 * 4
    assert summary.full_params == (3 * 52 + 23 * 2) * 8
    assert [learner._step._cache_size() for learner in learners] == [1]


def test_the_same_seed_gives_the_same_numbers_from_every_format(rows, tmp_path):
    text = ctr_files.write_text(tmp_path / "text", rows)
    parquet = ctr_files.write_parquet(tmp_path / "parquet", rows)
    options = {"epochs": 2, "max_bad_lines": 0}
    first, _ = _fit(data=str(text), **options)
    second, _ = _fit(data=str(parquet), **options)
    assert first.test == second.test
    assert first.train_rows == 2 * 2400


def test_narrow_tables_train_by_chance_and_with_what_was_rounded_off(rows, tmp_path):
    """Both kinds at once: large tables by chance, small ones compensated; near to float32."""
    path = ctr_files.write_text(tmp_path / "x.tsv", rows)
    options = LEARNS | {"data": str(path), "large_table_rows": 30, "hash_size": 400}
    wanted, _ = _fit(**options)
    narrow = options | {"param_dtype": "bfloat16"}
    found = [_fit(**narrow)[0] for _ in range(2)]
    assert found[0].test == found[1].test
    assert found[0].test.log_loss == pytest.approx(wanted.test.log_loss, rel=0.02)
    assert found[0].embedding_bytes < 0.6 * wanted.embedding_bytes


@pytest.mark.parametrize(
    "options",
    [
        {"dynamic": "300", "columns": {}},
        {"hash_size": 400, "threshold": 0, "collisions": 1, "large_table_rows": 1},
    ],
)
def test_narrow_tables_of_one_kind_alone_or_that_grow(options):
    few = {"synthetic_rows": 600, "param_dtype": "bfloat16", **LEARNS, **options}
    summary, _ = _fit(**few)
    assert np.isfinite(summary.test.log_loss)


def test_the_synthetic_stream_is_bounded_by_its_truth():
    summary, _ = _fit(synthetic_rows=6000, hash_size=50, **LEARNS)
    assert summary.truth is not None
    assert summary.truth.rows == summary.test.rows == 1200
    assert summary.truth.log_loss < summary.test.log_loss < summary.constant.log_loss


def test_malformed_lines_keep_the_split_where_it_is(rows, tmp_path):
    """Nine bad lines, seven among the first 900: the test rows stay the last 100 lines."""
    spoilt = [
        ["x"] if i in (5, 6, 7, 8, 9, 10, 11, 950, 999) else row for i, row in enumerate(rows)
    ]
    path = ctr_files.write_text(tmp_path / "f", spoilt[:1000])
    summary, _ = _fit(data=str(path), test_rows=100, epochs=2, max_bad_lines=9)
    assert (summary.train_rows, summary.test.rows, summary.bad_lines) == (2 * 893, 98, 9)
    with pytest.raises(UserError, match="More than 8 malformed lines"):
        _fit(data=str(path), test_rows=100, max_bad_lines=8)


def test_nothing_readable_to_train_or_test_on(rows, tmp_path):
    bad = [["x"]] * 50
    path = ctr_files.write_text(tmp_path / "train", bad + rows[:50])
    with pytest.raises(UserError, match="none of the 50 training lines can be read"):
        _fit(data=str(path), test_rows=50)
    path = ctr_files.write_text(tmp_path / "test", rows[:50] + bad)
    with pytest.raises(UserError, match="none of the last 50 lines can be read"):
        _fit(data=str(path), test_rows=50)


@pytest.mark.parametrize(
    ("options", "lines", "split"),
    [({}, 10, 8), ({"test_rows": 3}, 10, 7), ({"test_fraction": 0.01}, 10, 9), ({}, 2, 1)],
)
def test_split_line(options, lines, split):
    assert split_line(Settings(**options), lines) == split


def test_a_split_that_leaves_nothing_to_train_on():
    with pytest.raises(UserError, match="last 10 of 10 lines leaves none to train on"):
        split_line(Settings(test_rows=10), 10)


SUMMARY = Summary(
    train_rows=1000,
    best_rows=1000,
    bad_lines=2,
    embedding_params=250,
    embedding_rows=20,
    embedding_bytes=1000,
    full_params=1000,
    full_rows=80,
    full_bytes=4000,
    dense_params=7,
    rows_per_second=500.0,
    test=Scores(0.45, float("nan"), 100),
    constant=Scores(0.5, 0.5, 100),
    truth=Scores(0.4, 0.8, 100),
)


def test_records_are_json_and_an_undefined_score_is_null(tmp_path):
    with RunDirectory(str(tmp_path / "run")) as directory:
        directory.record({"kind": "progress", "rows": 9, "train_log_loss": 0.5, "train_auc": 0.5}
                         | {"test_log_loss": 0.6, "test_auc": float("nan")})  # fmt: skip
        directory.record(SUMMARY.as_record())
    lines = (tmp_path / "run" / METRICS).read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [record["kind"] for record in records] == ["progress", "summary"]
    assert records[1]["test_auc"] is None
    assert records[1]["truth_log_loss"] == 0.4
    assert (tmp_path / "run" / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_an_earlier_run_is_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = set()
    for _ in range(3):
        with RunDirectory(None) as directory:
            directory.record({"kind": "settings"})
        paths.add(directory.path)
        assert [each.name for each in directory.path.iterdir()] == [METRICS]  # no points yet
        assert (directory.note, directory.going_on) == (f"{METRICS} is in {directory.path}", "")
    assert len(paths) == 3
    with pytest.raises(UserError, match="holds an earlier run"):
        RunDirectory(str(next(iter(paths))))


def test_a_run_without_records_leaves_nothing(tmp_path):
    with RunDirectory(str(tmp_path / "run")) as directory:
        pass
    assert directory.path is None
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with (
        RunDirectory(str(tmp_path / "file" / "run")) as directory,
        pytest.raises(UserError, match="cannot be written"),
    ):
        directory.record({"kind": "settings"})


def test_a_picture_without_points(tmp_path):
    draw([], tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()


def test_the_final_table_says_it_all():
    console = Console(file=io.StringIO(), width=120)
    console.print(final_table(SUMMARY))
    text = console.file.getvalue()
    for part in ("250", "4.00 x fewer than the 1,000", "500 rows/s", "0.4500", "undefined"):
        assert part in text
    for line in (("rows of tables", "20", "the 80"), ("their bytes", "1,000", "the 4,000")):
        assert any(all(part in each for part in line) for each in text.splitlines())
    assert "0.5000 constant predictor, 0.4000 ground truth" in text
    console.print(final_table(replace(SUMMARY, rows_per_second=0.0)))
    (line,) = [each for each in console.file.getvalue().splitlines() if "one step alone" in each]
    assert "training speed" in line
    assert "rows/s" not in line


class Bars(Display):
    """Takes note of how full each bar was when its phase ended."""

    def __init__(self):
        self.file, self.ends = io.StringIO(), {}
        super().__init__(Console(file=self.file, force_terminal=True, width=150))

    def done(self):
        super().done()
        (task,) = self._progress.tasks
        self.ends[task.description] = (task.completed, task.total)


def test_a_bar_is_full_when_its_phase_ends(tmp_path):
    """Though malformed rows are none of those that were read, and the last batch is short."""
    rows = [["x"] if i % 40 == 7 else row for i, row in enumerate(ctr_files.random_rows(1010))]
    data = ctr_files.write_text(tmp_path / "clicks", rows)
    with Bars() as display:
        fit(Settings(data=str(data), **SMALL), display, Kept([]))
    phases = {"vocabulary": 808, "training": 808, "testing": 202}
    assert display.ends == {name: (rows, rows) for name, rows in phases.items()}
    for rows in phases.values():
        assert f"{rows}/{rows}" in display.file.getvalue()


def test_columns_of_a_preset_that_are_alike_are_shown_together():
    full = {f"C{i}": EmbedConfig(FullTable(10 * i), 4) for i in range(1, 10)}
    hashed = {f"C{i}": EmbedConfig(HashTrick(900, 30), 4) for i in (11, 14, 15)}
    configs = full | hashed | {"C12": EmbedConfig(KeyDigits(8, 2), 4)}
    sizes = {name: config.partition.num_embeddings for name, config in configs.items()}
    sizes |= dict.fromkeys(("C10", "C13"), 5000) | {"C12": None}
    categories = [Column(f"C{i}", "hex digits", "text", "category") for i in range(1, 16)]
    schema = replace(CRITEO, columns=(*CRITEO.columns[:14], *categories))
    assert overview(schema, sizes, configs) == [
        ("label", "0 or 1", "label", "", ""),
        ("I1 to I13", "integer", "number", "", ""),
        ("C1 to C9", "hex digits", "category", "10 to 90", "FullTable: 7,200 bytes"),
        ("C10, C13", "hex digits", "category", "5,000", "dropped"),
        ("C11, C14, C15", "hex digits", "category", "900", "HashTrick: 1,440 bytes"),
        ("C12", "hex digits", "category", "keys", "KeyDigits, mult: 512 bytes"),
    ]


def test_more_columns_than_can_be_looked_through_are_shown_together():
    ignored = [Column(f"c{i}", "double", "number", "ignored", "one value") for i in range(80)]
    others = [Column(f"d{i}", "int64", "integer", "number") for i in range(1, 80, 2)]
    label = Column("y", "int64", "integer", "label", "by its name")
    word = Column("w", "string", "text", "category")
    sizes, configs = {"w": 10}, {"w": EmbedConfig(FullTable(10), 4)}
    schema = replace(CRITEO, columns=(*ignored, *others, label, word), preset="table")
    shown = overview(schema, sizes, configs)
    assert shown[0] == ("c0 to c79", "double", "ignored (one value)", "", "")
    assert shown[1][0].startswith("d1, d3, d5, ")
    assert shown[1][0].endswith(" and 20 more")
    assert [row[1:3] for row in shown[1:]] == [
        ("int64", "number"),
        ("int64", "label"),
        ("string", "category"),
    ]
    few = replace(schema, columns=(*ignored[:9], label, word))
    assert len(overview(few, sizes, configs)) == 11


@pytest.mark.parametrize("terminal", [False, True])
def test_the_display_tells_lines_and_bars(terminal):
    file = io.StringIO()
    with Display(Console(file=file, force_terminal=terminal, width=150)) as display:
        display.phase("training", 1000)
        display.update(500, "log loss 0.5")
        display.line("[bold]skipped line 3[/]")
        display.phase("testing", 10)
        display.update(10)
    text = file.getvalue()
    assert "[bold]skipped line 3[/]" in text
    assert ("training: 500 of 1,000 rows  log loss 0.5" in text) != terminal
    assert ("10/10" in text) == terminal


def test_the_speed_is_of_the_steps_alone(monkeypatch):
    clock = 100.0
    monkeypatch.setattr("qrhash.ctr.run.progress.time.monotonic", lambda: clock)
    none = np.empty(0, np.int32)
    batch = Batch(np.zeros(50, np.float32), np.ones(50, np.float32), none, none, Keys.of(none))
    progress = Progress(lambda record: None, 50)
    progress.add(batch, np.zeros(50))
    assert "rows/s" not in progress.note()
    for _ in range(3):
        clock += 2
        progress.add(batch, np.zeros(50))
        with progress.pause(trained=()):
            clock += 1000
    assert (progress.rows_per_second, progress.seconds) == (25, 3006)
    assert progress.note().startswith("25 rows/s")
    again = Progress(lambda record: None, 50)
    again.take_over(progress.as_dict())
    assert again.rows_per_second == 25
    clock += 60  # It is compiled again.
    again.add(batch, np.zeros(50))
    assert (again.rows_per_second, "rows/s" in again.note()) == (25, False)
    clock += 1
    again.add(batch, np.zeros(50))
    assert again.note().startswith("50 rows/s")
    assert again.rows_per_second == pytest.approx(200 / 7)
