"""`qrhash train --compression`: by how often ids are met, a plan says what each column gets."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from qrhash import FullTable, cli
from qrhash.ctr.data.block import Block
from qrhash.ctr.data.counts import Counts, build_ids
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.columns import FULL_DTYPE, embed_configs
from qrhash.ctr.model.planned import compressed
from qrhash.ctr.model.room import num_bytes
from qrhash.ctr.run.learner import Learner
from qrhash.ctr.run.report import METRICS
from qrhash.ctr.settings import Settings
from support import ctr_files
from support.training_process import train

STANDARD_PROMOTION = True  # optax.adam needs it
UNCHECKED_KEYS = True

SMALL = (
    *("--features=8", "--threshold=20", "--bottom-mlp=8", "--top-mlp=8", "--batch-size=64"),
    *("--evaluations=2", "--eval-rows=64"),
)


def _counted(options, sizes, rows=4000, seed=0):
    """Keys of columns of about so many ids, of falling frequency, and clicks that go by them."""
    rng = np.random.default_rng(seed)
    keys = np.stack([rng.zipf(1.2, rows) % size for size in sizes], axis=1).astype(np.uint64)
    labels = (rng.random(rows) < 0.2 + 0.6 * (keys[:, 0] % 3 == 1)).astype(np.float32)
    block = Block(labels, np.zeros((rows, 0), np.float32), keys, np.zeros(keys.shape, bool), None)
    names = [f"C{number}" for number in range(1, len(sizes) + 1)]
    counts = Counts(options, names, with_clicks=True)
    ids = build_ids(counts, [block.take(labels > 0), block.take(labels == 0)])
    return counts, {name: each.num_embeddings for name, each in ids.items()}


def _built(options, counts, sizes):
    """The embeddings by the sections of a plan, once these were written and read again."""
    plan, sections = compressed(options, counts, 4000)
    recorded = json.loads(json.dumps({**options.as_dict(), "columns": sections}))
    return plan, embed_configs(Settings(**recorded), sizes)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(2, 3000), min_size=1, max_size=4),
    st.floats(1.5, 40),
    st.sampled_from([1, 5, 16]),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_a_plan_has_the_bytes_of_the_compression(sizes, compression, features, dtype):
    options = Settings(compression=compression, features=features, threshold=30, param_dtype=dtype)
    counts, found = _counted(options, sizes)
    full = sum(found.values()) * features * FULL_DTYPE.itemsize
    try:
        plan, built = _built(options, counts, found)
    except UserError as error:
        if "smallest ones take" not in str(error):
            raise
        hypothesis.reject()
    assert built.keys() == found.keys()
    taken = sum(map(num_bytes, built.values()))
    assert taken == plan.table_bytes <= full / compression
    for name, size in found.items():
        if size <= 30:
            assert built[name].partition == FullTable(size)


def test_ids_that_are_met_often_and_tell_much_get_more():
    options = Settings(compression=10.0)
    counts, sizes = _counted(options, [2000, 2000])
    assert abs(sizes["C1"] - sizes["C2"]) < 100
    _, built = _built(options, counts, sizes)
    # Clicks go by the ids of C1 alone.
    assert num_bytes(built["C1"]) > 2 * num_bytes(built["C2"])


def test_columns_of_their_own_are_paid_first():
    own = {
        "C1": {"operation": "concat"},
        "C2": {"partition": "full"},
        "C3": {"min_count": 2, "combiner": "mean"},
        "C4": {"compression": 3.0},
        "C5": {"partition": "drop"},
    }
    options = Settings(data="x", compression=4.0, columns=own)
    counts, sizes = _counted(options, [3000, 300, 2500, 1500, 1000, 2000])
    plan, built = _built(options, counts, sizes)
    assert [name for name, _ in plan.columns] == ["C3", "C6"]
    assert built["C1"].operation == "concat"
    full = {name: size * 64 for name, size in sizes.items()}
    assert 4 < full["C1"] / num_bytes(built["C1"]) < 10  # C2 takes more than a fourth.
    assert built["C2"].partition == FullTable(sizes["C2"])
    assert built["C4"].operation == "path"
    assert full["C4"] / num_bytes(built["C4"]) == pytest.approx(3, rel=0.02)
    assert built["C3"].num_embeddings == sizes["C3"] < _counted(Settings(), [3000] * 3)[1]["C3"]
    kept = sum(size for name, size in full.items() if name != "C5")
    taken = sum(map(num_bytes, built.values()))
    assert kept / 4.1 < taken <= kept / 4


def test_no_plan_where_every_column_is_of_its_own():
    options = Settings(compression=4.0, columns={"C1": {"operation": "mult"}})
    counts, sizes = _counted(options, [3000])
    plan, built = _built(options, counts, sizes)
    assert plan is None
    assert built["C1"].operation == "mult"


@pytest.mark.parametrize("own", [{}, {"C1": {"partition": "full"}}])
def test_too_few_bytes_are_told(own):
    options = Settings(compression=3000.0, columns=own)
    counts, _ = _counted(options, [3000, 100])
    with pytest.raises(UserError, match=r"compression=3000.* bytes, but the smallest .*threshold"):
        compressed(options, counts, 4000)


def test_what_is_said_is_not_planned():
    assert Settings(compression=4.0).is_planned
    for said in ({"operation": "path"}, {"partition": "quotient-remainder"}):
        assert not Settings(compression=4.0, **said).is_planned
    assert not Settings().is_planned


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def planned_run(request, tmp_path_factory):
    """The options, and the directory of a run that was planned."""
    folder = tmp_path_factory.mktemp("planned")
    table = ctr_files.events(600, users=120)
    data = ctr_files.write_table(folder / "events.parquet", table)
    arguments = (f"--data={data}", "--compression=3", *SMALL, "--epochs=2")
    arguments += (f"--param-dtype={request.param}", "--large-table-rows=50")
    result = train(*arguments, "--output-dir", folder / "run")
    assert result.exit_code == 0, result.output
    assert "planned to lose " in result.output
    return arguments, folder / "run"


def _records(run):
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def test_a_run_says_what_it_was_asked_and_what_was_planned(planned_run):
    first, *_, summary = _records(planned_run[1])
    assert (first["compression"], first["partition"], first["columns"]) == (3.0, "auto", {})
    assert first["planned"].keys() == {"user", "ad"}
    assert summary["embedding_bytes"] <= summary["full_bytes"] / 3


def test_a_planned_run_goes_on_as_it_began(planned_run, tmp_path):
    arguments, run = planned_run
    take = Learner.step

    def stop(self, batch):
        if self.steps == 12:
            raise KeyboardInterrupt
        return take(self, batch)

    output = ("--checkpoint-every=5", "--output-dir", tmp_path / "broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", stop)
        assert train(*arguments, *output).exit_code == 130
    result = train("--resume", "--output-dir", tmp_path / "broken")
    assert result.exit_code == 0, result.output
    assert "planned to" not in result.output
    ends = [_records(each)[-1]["test_log_loss"] for each in (run, tmp_path / "broken")]
    assert ends[0] == ends[1]


def test_a_planned_run_predicts(planned_run, tmp_path):
    (data, *_), run = planned_run
    scores = tmp_path / "scores.csv"
    arguments = ["predict", "--run", str(run), data, "--output", str(scores)]
    result = CliRunner().invoke(cli.build_app(), arguments)
    assert result.exit_code == 0, result.output
    assert len(scores.read_text().splitlines()) == 601


def test_columns_of_their_own_may_be_short_or_leave_no_more():
    own = {
        "C3": {"operation": "mult"},
        "C2": {"param_dtype": "bfloat16"},
        "C1": {"partition": "auto"},
    }
    options = Settings(data="x", compression=4.0, threshold=5, columns=own)
    counts, sizes = _counted(options, [3000, 12, 8])
    plan, built = _built(options, counts, sizes)
    assert [name for name, _ in plan.columns] == ["C1"]
    assert sum(map(num_bytes, built.values())) <= sum(sizes.values()) * 16
    # What full tables leave is all that another column has.
    own = {"C1": {"operation": "mult"}, "C2": {"partition": "full"}}
    options = Settings(data="x", compression=2.0, columns=own)
    counts, sizes = _counted(options, [1000, 500, 9])
    _, built = _built(options, counts, sizes)
    taken = sum(map(num_bytes, built.values()))
    assert 0.95 * sum(sizes.values()) * 32 < taken <= sum(sizes.values()) * 32


@pytest.mark.parametrize("options", [{"ids": "keys"}, {"dynamic": "500"}])
def test_an_earlier_version_named_the_partition(options):
    named = Settings(partition="quotient-remainder", **options)
    sizes = {"C1": None, "C2": None}
    assert embed_configs(named, sizes) == embed_configs(Settings(**options), sizes)
