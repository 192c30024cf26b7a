"""A column of weights: how much a row counts in the training, and in nothing else."""

import numpy as np
import pytest
from rich.console import Console

from qrhash.ctr.data.counts import Counts, build_ids
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.pipeline import encode
from qrhash.ctr.data.sources import open_source
from qrhash.ctr.errors import UserError
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.predict import predict
from qrhash.ctr.settings import Settings
from support import ctr_files
from support.training_process import numbers_of, train

STANDARD_PROMOTION = True  # for schedules
UNCHECKED_KEYS = True
SMALL = ["--features=4", "--bottom-mlp=8", "--top-mlp=8", "--batch-size=32", "--evaluations=2"]
SMALL += ["--epochs=3", "--dense-lr=0.02", "--table-lr=0.3", "--init-stddev=0.3", "--test-rows=100"]


def _events(weights):
    events = ctr_files.tagged(500)
    return events | {"counts": [weights(click) for click in events["clicked"]]}


def _open(path, weight="counts", bad=0):
    return open_source(Settings(data=str(path), weight=weight), BadLines(bad, lambda _: None))


def test_weights_go_with_their_rows(tmp_path):
    events = _events(lambda click: 0.5 + click)
    source = _open(ctr_files.write_table(tmp_path / "e.parquet", events))
    (block,) = source.blocks(0, 500)
    assert block.importance.tolist() == events["counts"]
    assert block.rows(3, 7).importance.tolist() == events["counts"][3:7]
    ids = build_ids(Counts(Settings(), source.schema.categories, source.schema.lists), [block])
    batch = encode(block, source.schema, ids)
    assert batch.importance.tolist() == events["counts"]
    assert batch.weights.tolist() == [1] * 500
    assert source.schema.numbers == ()


def test_rows_without_a_weight_are_malformed_and_counted(tmp_path):
    events = _events(lambda click: 1.0)
    events["counts"][:4] = [None, -1.0, float("inf"), 0.0]
    path = ctr_files.write_table(tmp_path / "e.parquet", events)
    bad = BadLines(3, (said := []).append)
    source = open_source(Settings(data=str(path), weight="counts"), bad)
    (block,) = source.blocks(0, 500)
    assert len(bad) == 3
    assert "counts is not a weight, a number of at least 0" in said[0]
    assert len(block.importance) == 497
    assert block.importance[0] == 0


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [("nothing", "--weight: there is no column 'nothing'"), ("tags", "takes numbers")],
)
def test_what_is_no_weight(weight, sentence, tmp_path):
    path = ctr_files.write_table(tmp_path / "e.parquet", _events(lambda _: 1))
    with pytest.raises(UserError, match=sentence):
        _open(path, weight)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By what the weights are (the records, the run's directory, the data)."""
    found = {}
    weights = {"alike": lambda _: 2, "clicks alone": float, "none": lambda _: 0}
    for name, of in weights.items():
        path = tmp_path_factory.mktemp(name.replace(" ", "_"))
        data = ctr_files.write_table(path / "e.parquet", _events(of))
        options = ["--weight=counts"]
        result = train("--data", data, "--output-dir", path / "run", *SMALL, *options)
        assert result.exit_code == 0, result.output
        found[name] = numbers_of(path / "run")
        if name == "alike":
            plain = ["--ignore=counts"]
            train("--data", data, "--output-dir", path / "plain", *SMALL, *plain)
            found["no column"] = numbers_of(path / "plain")
    return found


def test_predict_needs_no_weights(tmp_path):
    events = _events(lambda click: 1 + click)
    data = ctr_files.write_table(tmp_path / "e.parquet", events)
    run = tmp_path / "run"
    assert train("--data", data, "--output-dir", run, *SMALL, "--weight=counts").exit_code == 0
    del events["counts"], events["clicked"]
    new = str(ctr_files.write_table(tmp_path / "new.parquet", events))
    display = Display(Console(stderr=True, quiet=True))
    assert predict(run, new, tmp_path / "scores.csv", display).rows == 500


def test_weights_that_are_alike_change_nothing(runs):
    names = ("test_log_loss", "test_auc", "train_rows", "test_rows")
    with_them, without = runs["alike"][-1], runs["no column"][-1]
    for name in names:
        np.testing.assert_allclose(with_them[name], without[name], rtol=1e-4)


def test_rows_of_weight_zero_are_not_learnt_and_yet_counted_and_judged(runs):
    alike, clicks, none = (runs[name][-1] for name in ("alike", "clicks alone", "none"))
    assert clicks["train_rows"] == none["train_rows"] == alike["train_rows"] == 1200
    assert clicks["test_rows"] == none["test_rows"] == alike["test_rows"] == 100
    # Of clicks alone it learns that everything is one.
    assert clicks["test_log_loss"] > 1.5 * alike["test_log_loss"]
    # Nothing was learnt, and nothing is NaN.
    assert none["test_log_loss"] == pytest.approx(np.log(2), abs=0.2)
