"""The trainer on tables that grow: options, the step against dictionaries, whole runs."""

import io
import itertools
import json
import re
import shutil

import jax
import numpy as np
import pyarrow.parquet
import pytest
from rich.console import Console
from typer.testing import CliRunner

from qrhash import Keys, MultiHash, cli, dynamic
from qrhash.checkpoint import Checkpoints
from qrhash.ctr.config_file import load
from qrhash.ctr.data.block import no_rows
from qrhash.ctr.data.pipeline import Batch, Padded
from qrhash.ctr.dynamic_settings import room
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.columns import embed_configs, tables_of
from qrhash.ctr.model.models import build_model
from qrhash.ctr.model.room import dynamic_tables, index_bytes, num_bytes
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.learner import Learner
from qrhash.ctr.run.trained import kept_of, load_trained
from qrhash.ctr.settings import Settings
from qrhash.keys import cross
from qrhash.serving.limits import Limits
from qrhash.serving.model import Model
from support import ctr_files
from support.cases import assert_close
from support.training_process import assert_same_curve, numbers_of, train

STANDARD_PROMOTION = True  # optax.adam needs it
UNCHECKED_KEYS = True

SMALL = [
    *("--features=4", "--bottom-mlp=8", "--top-mlp=8", "--batch-size=32"),
    *("--evaluations=2", "--eval-rows=100", "--evict-every=5", "--large-table-rows=16"),
    *("--init-stddev=0.35", "--table-lr=0.3", "--dense-lr=0.01"),
]


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rows", "num_bytes"),
    [
        ("100000", 100_000, None),
        ("100_000", 100_000, None),
        ("100,000", 100_000, None),
        ("64MB", None, 64_000_000),
        ("64 mb", None, 64_000_000),
        ("1.5GiB", None, 3 * 2**29),
        ("2KiB", None, 2048),
        ("7B", None, 7),
    ],
)
def test_room_is_rows_or_bytes(text, rows, num_bytes):
    assert room(text) == (rows, num_bytes)


@pytest.mark.parametrize(
    "text", ["", "0", "0MB", "-5", "1.5", "64 PB", "MB", "many", "1e6", "1.2.3MB"]
)
def test_no_other_text_is_room(text):
    with pytest.raises(UserError, match="dynamic must be a number of rows such as 100000, or"):
        room(text)


WRONG = {
    "room": ("dynamic = 'lots'", "got 'lots'"),
    "room of a column": ("[columns.a]\ndynamic = '0'", "above 0, got '0'"),
    "none for all": ("dynamic = 'none'\nadmit_after = 3", "admit_after goes with dynamic"),
    "without it": ("evict_every = 7", "evict_every goes with dynamic, which is not given"),
    "hashed": ("dynamic = '9'\nhash_size = 9", "hash_size goes with ids from a vocabulary"),
    "compression": ("dynamic = '9'\ncompression = 4.0", "compression goes with ids from a"),
    "family": ("dynamic = '9'\npartition = 'hash-trick'", "goes with ids from a vocabulary"),
    "column without": ("[columns.a]\nnewcomers = 'zeros'", r"columns.a: newcomers goes with dyn"),
    "cache without": ("cache_rows = 7", "cache_rows goes with dynamic, which is not given"),
    "store alone": ("dynamic = '9'\nstore = '.'", "store goes with cache_rows, which is not given"),
    "no directory": (
        "dynamic = '9'\ncache_rows = 7\nstore = 'nowhere'",
        "store must be a directory, got 'nowhere'",
    ),
    "cache on a mesh": ("dynamic = '9'\ncache_rows = 7\nmesh = 'data=8'", "not with a mesh"),
    "cache of towers": (
        "dynamic = '9'\ncache_rows = 7\nmodel = 'two-tower'\nitems = 'a'",
        "cache_rows goes with the models of clicks, not with 'two-tower'",
    ),
    "cache, dense": ("dynamic = '9'\ncache_rows = 7\ndense_updates = true", "by rows, not with d"),
    "cache, own rows": (
        "dynamic = '9'\ncache_rows = 7\n[columns.a]\ndynamic = '9'",
        "the one table that all columns of --dynamic share",
    ),
    "two ways": (
        "[columns.a]\ndynamic = '9'\nids = 'keys'",
        "columns.a: dynamic, ids and hash_size are three ways",
    ),
    "of a shared table": (
        "dynamic = '9'\n[columns.a]\nadmit_after = 3",
        r"columns.a: admit_after is the same for all columns that share the table",
    ),
    "vocabulary": ("[columns.a]\ndynamic = '9'\nmin_count = 2", "columns.a: min_count goes with"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name, tmp_path):
    text, sentence = WRONG[name]
    (path := tmp_path / "run.toml").write_text(f"data = 'x'\n{text}\n")
    with pytest.raises(UserError, match=sentence):
        load(path, {})


def test_a_file_may_say_a_number(tmp_path):
    (path := tmp_path / "run.toml").write_text(
        "data = 'x'\ndynamic = 500\n[columns.a]\ndynamic = 30\n[columns.b]\ndynamic = 'none'\n"
    )
    settings = load(path, {})
    assert settings.dynamic == "500"
    assert load(path, {}, settings.as_dict()) == settings  # of a run that is resumed
    a, b, c = map(settings.column, "abc")
    assert (a.dynamic, b.is_dynamic, b.takes_keys, c.takes_keys) == ("30", False, False, True)


def _settings(**options):
    return Settings(**{"data": "x", "features": 4} | options)


def test_columns_share_the_rows_unless_they_have_their_own():
    columns = {
        "b": {"dynamic": 30, "admit_after": 1, "newcomers": "zeros", "evict_after": 9},
        "c": {"ids": "vocabulary"},
        "d": {"combiner": "sum"},
        "e": {"dynamic": 40, "key_bits": 6},
    }
    settings = _settings(dynamic="80", columns=columns)
    sizes = {"a": None, "b": None, "c": 9, "d": None, "e": None}
    configs = embed_configs(settings, sizes)
    assert list(configs) == list("abcde")
    shared = configs["a"]
    assert shared.capacity == 80
    assert shared.refused.partition == MultiHash((10, 10))
    assert shared.admission == dynamic.ExactCount(2, 80)
    assert shared.eviction == dynamic.LeastUsed(70, by="step")
    assert list(dynamic_tables(configs).values()) == [["a", "d"], ["b"], ["e"]]
    assert configs["d"].combiner == "sum"
    own = configs["b"]
    assert (own.capacity, own.refused) == (30, None)
    assert (own.admission, own.eviction) == (dynamic.AdmitAll(), dynamic.StepsSinceUse(9))
    assert configs["e"].refused.partition.bits == 6
    assert len(tables_of(configs)) == 4


@pytest.mark.parametrize("text", ["20KB", "100KB", "1MB"])
def test_bytes_are_those_of_all_but_the_optimizer(text):
    config = embed_configs(_settings(dynamic=text), {"a": None})["a"]
    taken = sum(leaf.nbytes for leaf in jax.tree.leaves(dynamic.init(jax.random.key(0), config)))
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(dynamic.init_state(config)))
    assert (taken, state) == (num_bytes(config), index_bytes(config))
    assert taken + state <= room(text).num_bytes
    assert room(text).num_bytes - taken - state < 2 * 4 * 4  # A row more in each small table
    more = embed_configs(_settings(dynamic=str(config.capacity + 1)), {"a": None})["a"]
    assert num_bytes(more) + index_bytes(more) > room(text).num_bytes


def test_too_many_rows_are_refused():
    with pytest.raises(UserError, match=r"dynamic must be at most 536,870,912 rows, got '9{11}'"):
        room("9" * 11)


def test_more_bytes_than_the_largest_table_has_are_refused():
    message = r"dynamic='999GB': the most rows, 536,870,912, take [0-9,]+ bytes of the 999,0{3}"
    with pytest.raises(UserError, match=message):
        embed_configs(_settings(dynamic="999GB"), {"a": None})


def test_room_for_no_row_is_refused():
    with pytest.raises(UserError, match=r"dynamic='100B': one row takes [0-9]+ bytes, more than"):
        embed_configs(_settings(dynamic="100B"), {"a": None})


def test_two_towers_have_half_the_room_each():
    settings = _settings(dynamic="80", model="two-tower", items="b")
    configs = embed_configs(settings, {"a": None, "b": None, "c": None})
    assert list(dynamic_tables(configs).values()) == [["a", "c"], ["b"]]
    assert [config.capacity for config in configs.values()] == [40, 40, 40]


# --- the step, against dictionaries ---------------------------------------------------------------


def _batches(rng, count, rows=16, keys=40):
    """Of two columns of keys and one of lists, the last rows of some of them padding."""
    for number in range(count):
        real = rows if number % 3 else rows - 5
        mask = np.arange(3) < rng.integers(0, 4, (rows, 1))
        numbers = rng.zipf(1.4, (rows, 5)) % keys
        lists = Padded(Keys.of(np.where(mask, numbers[:, 2:], 0)), mask)
        yield Batch(
            labels=rng.integers(0, 2, rows).astype(np.float32),
            weights=(np.arange(rows) < real).astype(np.float32),
            numbers=rng.normal(size=(rows, 2)).astype(np.float32),
            ids=np.zeros((rows, 0), np.int32),
            keys=Keys.of(numbers[:, :2]),
            lists=(lists,),
        )


def _keys_of(batch):
    """(column, key) of every real cell, in the order in which rows are given."""
    (lists,) = batch.lists
    singles, inside = batch.keys.to_numpy(), lists.ids.to_numpy()
    for row in np.flatnonzero(batch.weights):
        yield from (("ab"[j], int(singles[row, j])) for j in range(2))
        yield from (("tags", int(key)) for key in inside[row][lists.mask[row]])


def _learner(**options):
    settings = _settings(
        **{"dynamic": "24", "evict_every": 4, "bottom_mlp": "8", "top_mlp": "8"} | options
    )
    configs = embed_configs(settings, dict.fromkeys(("a", "b", "tags")))
    return Learner(lambda: build_model(settings, configs, 2, ["tags"]), settings, num_steps=20)


@pytest.mark.parametrize(
    ("admit_after", "keys", "dense"), [(1, 40, False), (2, 4, False), (2, 4, True)]
)
@pytest.mark.usefixtures("keys_used_once")
def test_rows_come_and_go_as_in_dictionaries(admit_after, keys, dense, rng):
    """Counted are few enough for the candidates: none of them is forgotten."""
    learner = _learner(dense_updates=dense, large_table_rows=8, admit_after=admit_after)
    counts, last, rows = {}, {}, set()
    want = dict.fromkeys(("looked_up", "in_rows", "admitted", "no_room", "evicted"), 0)
    for step, batch in enumerate(_batches(rng, 12, keys=keys)):
        learner.step(batch)
        met = list(_keys_of(batch))
        for key in met:
            counts[key] = counts.get(key, 0) + 1
        earned = [key for key in dict.fromkeys(met) if key not in rows]
        earned = [key for key in earned if counts[key] >= admit_after]
        given = earned[: 24 - len(rows)]
        rows |= set(given)
        last |= {key: step for key in met if key in rows}
        want["looked_up"] += len(met)
        want["in_rows"] += sum(key in rows for key in met)
        want["admitted"] += len(given)
        want["no_room"] += len(earned) - len(given)
        if (step + 1) % 4 == 0:
            # Of 24 rows 21 may stay; of those met last at the same step any may go: so many.
            excess = max(0, len(rows) - 21)
            want["evicted"] += excess
            found = _rows_of(learner, counts)
            gone = rows - found
            assert len(gone) == excess
            if gone:
                assert max(last[key] for key in gone) <= min(last[key] for key in found)
            rows = found
            for key in gone:
                counts[key] = 0
        assert _rows_of(learner, counts) == rows
    learner.count_keys()
    assert learner.growth.totals == want
    assert (learner.growth.num_keys, learner.growth.capacity) == (len(rows), 24)
    assert (want["evicted"] > 0) == (want["no_room"] > 0) == (admit_after == 1)
    assert learner._step._cache_size() == 1


def _rows_of(learner, known):
    """Which of the (column, key) known have a row."""
    (table,) = learner._model(learner.params).growing
    names = list(known)
    keys = [cross([column], np.array([key]))[0] for column, key in names]
    every = jax.tree.map(lambda *words: np.stack(words), *keys)
    found = np.asarray(table.table.find(every).rows.rows)
    return {name for name, row in zip(names, found, strict=True) if row < 24}


def test_a_new_row_starts_as_its_compressed_vector(rng):
    """After a step at a rate of zero, which leaves every vector as it is."""
    batch = next(_batches(rng, 1))
    learner = _learner(table_lr=0.0)
    learner.step(batch)
    (table,) = learner._model(learner.params).growing
    where = table.table.find(table.joined(_named(batch), {"tags": batch.lists[0]})[0])
    rows = np.asarray(where.rows.rows)
    has_row = rows < 24
    compressed = dynamic.lookup(
        table.table.parameters,
        dynamic.Found(where.keys, where.rows._replace(rows=np.full_like(rows, 24))),
        table.table.config,
    )
    own = np.asarray(table.table(where))
    assert has_row.any()
    np.testing.assert_array_equal(own[has_row], np.asarray(compressed)[has_row])
    sums = _accumulators(learner)
    learner.count_keys()
    assert sum(np.any(sums > 1e-8, axis=1)) == learner.growth.num_keys == len(set(rows[has_row]))


def _named(batch):
    return {"a": batch.keys[:, 0], "b": batch.keys[:, 1]}


def _accumulators(learner):
    """Adagrad's sums of the keys' own rows [24, 4]."""
    leaves = jax.tree.leaves(learner._state)
    (found,) = [leaf for leaf in leaves if leaf.shape == (24, 4)]
    return np.asarray(found)


def test_a_look_at_the_counts_counts_nothing(rng):
    """Of several processes each looks when it likes; counting takes all of them."""
    learner = _learner(batch_size=2**22)  # Counted at every step
    (batch,) = _batches(rng, 1)
    assert not learner.growth.note
    learner.step(batch)
    said, totals = learner.growth.note, dict(learner.growth.totals)
    learner.count_keys()
    assert (learner.growth.note, learner.growth.totals) == (said, totals)
    assert "of 24, " in said


def test_scores_change_nothing(rng):
    learner = _learner()
    first, second = _batches(rng, 2)
    learner.step(first)
    before = jax.device_get(learner._keys)
    logits = np.asarray(learner.logits(second))
    assert len(set(logits.tolist())) > 10
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(learner._keys), before)


# --- whole runs -----------------------------------------------------------------------------------


def _train(*arguments):
    result = train(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Events with two categories and lists, whose clicks follow the user."""
    events = ctr_files.events(600)
    tags = ctr_files.tagged(600)["tags"]
    return ctr_files.write_table(
        tmp_path_factory.mktemp("data") / "e.parquet", events | {"tags": tags}
    )


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """The directory of a run of 15 steps, and its output."""
    output = tmp_path_factory.mktemp("run") / "unbroken"
    result = _train("--data", data, *SMALL, "--dynamic=64", "--output-dir", output)
    return output, result


def test_a_run_says_what_became_of_its_keys(unbroken):
    output, result = unbroken
    summary = numbers_of(output)[-1]
    assert summary["embedding_rows"] == 64 + 8 + 8
    assert summary["test_log_loss"] < summary["constant_log_loss"]
    admitted, evicted = summary["dynamic_admitted"], summary["dynamic_evicted"]
    assert summary["dynamic_num_keys"] == admitted - evicted > 50
    assert evicted > 0
    assert f"{admitted:,} " in result.stdout
    refused = f"{summary['dynamic_no_room']:,} refused for want of room"
    assert f"{evicted:,} evicted, {refused}" in result.stdout
    assert f"{summary['index_bytes']:,}" in result.stdout
    overview = [line.split() for line in result.stderr.splitlines() if "rows that grow" in line]
    assert [words[0] for words in overview] == ["user", "ad", "tags"]
    shown = "rows that grow 64 x 4 after MultiHash 8 x 4 + 8 x 4, mult: 1,280 bytes, shared by 3"
    assert result.stderr.count(shown) == 3


def test_a_stopped_run_goes_on_with_its_keys(unbroken, data, tmp_path, monkeypatch):
    take = Learner.step

    def step_or_stop(self, batch):
        if self.steps == 11:
            raise KeyboardInterrupt
        return take(self, batch)

    monkeypatch.setattr(Learner, "step", step_or_stop)
    output = tmp_path / "run"
    options = ("--dynamic=64", "--checkpoint-every=3", "--output-dir", output)
    assert train("--data", data, *SMALL, *options).exit_code == 130
    monkeypatch.setattr(Learner, "step", take)
    result = _train("--resume", "--output-dir", output)
    assert "9 steps" in result.stderr
    assert numbers_of(output)[1:] == numbers_of(unbroken[0])[1:]


def _assert_predicts_as_tested(run, data, output):
    """That `qrhash predict`, on one device, gives the test rows the loss of the run."""
    arguments = ["--run", run, "--data", data, "--output", output]
    invoked = CliRunner().invoke(cli.build_app(), ["predict", *map(str, arguments)])
    assert invoked.exit_code == 0, invoked.output
    table = pyarrow.parquet.read_table(output).to_pydict()
    logits, labels = (np.array(table[name])[480:] for name in ("logit", "label"))
    losses = np.logaddexp(0, logits) - labels * logits
    assert numbers_of(run)[-1]["test_log_loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_predict_gives_keys_the_rows_that_they_have(unbroken, data, tmp_path):
    _assert_predicts_as_tested(unbroken[0], data, tmp_path / "s.parquet")


def _assert_same_run(output, resident):
    """That a run with a store is as one without: the curve, and what became of every key."""
    got, want = numbers_of(output), numbers_of(resident)
    assert_same_curve(got, want)
    counts = {name for name in want[-1] if name.startswith("dynamic_")}
    assert {name: got[-1][name] for name in counts} == {name: want[-1][name] for name in counts}


@pytest.fixture(scope="module")
def in_files(unbroken, data, tmp_path_factory):
    """The directory of a run whose rows are in a file, and its output."""
    folder = tmp_path_factory.mktemp("store")
    stored = ("--cache-rows=60", "--store", folder, "--checkpoint-every=3")
    result = _train(
        *("--data", data, *SMALL, "--dynamic=64", *stored, "--output-dir", folder / "run")
    )
    return folder, result


def test_rows_in_a_store_are_trained_to_the_same_numbers(in_files, unbroken):
    folder, result = in_files
    _assert_same_run(folder / "run", unbroken[0])
    assert [path.name for path in folder.iterdir()] == ["run"]  # no file of rows is left
    summary = numbers_of(folder / "run")[-1]
    assert 0.5 < summary["store_hit_rate"] < 1
    assert summary["store_bytes_moved"] > 60 * summary["store_bytes"] / 64
    assert f"{summary['store_hit_rate']:.1%}" in result.stdout
    assert f"{summary['store_bytes_moved']:,} bytes moved" in result.stdout


def test_a_stopped_run_goes_on_with_its_store(in_files, unbroken, data, tmp_path):
    """From a checkpoint in the middle; of a later one that is damaged the rows are not taken."""
    output = shutil.copytree(in_files[0] / "run", tmp_path / "run")
    checkpoints = output / "checkpoints"
    steps = sorted(int(path.name) for path in checkpoints.iterdir())
    shutil.rmtree(checkpoints / str(steps[-1]))
    rows = checkpoints / str(steps[-2]) / "files" / "rows.zip"
    damaged = bytearray(rows.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    rows.write_bytes(damaged)
    result = _train("--resume", "--output-dir", output)
    assert f"{rows} cannot be read as rows of this table" in result.stderr
    assert f"{steps[-3]} steps" in result.stderr
    _assert_same_run(output, unbroken[0])
    # And to the last bit as the one that was not stopped.
    for got, want in zip(numbers_of(output)[1:], numbers_of(in_files[0] / "run")[1:], strict=True):
        scores = [name for name in want if name.endswith(("loss", "auc"))]
        assert [got[name] for name in scores] == [want[name] for name in scores]


def test_predict_reads_rows_from_the_store(in_files, data, tmp_path):
    _assert_predicts_as_tested(in_files[0] / "run", data, tmp_path / "s.parquet")


def _weights(run):
    """The weights of a run, all rows among them: as it is, and read once more."""
    kept = kept_of(run)
    display = Display(Console(file=io.StringIO()))
    trained = load_trained(kept, display, is_whole=True)
    with Checkpoints(kept.checkpoints, trained.configs, max_to_keep=None) as checkpoints:
        again = trained.learner.reading(checkpoints, trained.learner.steps)
    return trained.learner.scoring[1], again


def test_all_rows_of_a_store_are_those_of_a_table_without(in_files, unbroken):
    """For what takes the model as it is: export, inspect and serve."""
    got, again = _weights(in_files[0] / "run")
    want, _ = _weights(unbroken[0])
    (state,) = jax.tree.leaves(want[1], is_leaf=lambda node: isinstance(node, dynamic.State))
    index = state.index
    assert 20 < index.num_keys < 64

    def in_use(array):
        # What a row holds that was taken back, nobody reads.
        return array[index.is_live] if array.shape == (64, 4) else array

    jax.tree.map(lambda one, other: assert_close(in_use(one), in_use(other), 1e-5), got, want)
    jax.tree.map(lambda one, other: assert_close(one, other, 0), again, got)


def test_a_model_with_a_store_can_be_inspected_exported_and_served(in_files, data, tmp_path):
    run = shutil.copytree(in_files[0] / "run", tmp_path / "run")
    for command in (["inspect", run], ["export", run, tmp_path / "exported"]):
        invoked = CliRunner().invoke(cli.build_app(), list(map(str, command)))
        assert invoked.exit_code == 0, invoked.output
    display = Display(Console(file=io.StringIO()))
    model = Model(run, Limits(max_batch=16), display)
    nothing = model.encoded(no_rows(model.columns.schema), model.columns.schema)
    assert model.scored([nothing]).outputs["score"].shape == (0,)


def test_where_the_directory_of_a_store_is_gone_rows_are_in_memory(in_files, data, tmp_path):
    run = shutil.copytree(in_files[0] / "run", tmp_path / "run")
    records = (run / "metrics.jsonl").read_text()
    store = json.dumps(str(in_files[0]))
    assert store in records
    (run / "metrics.jsonl").write_text(records.replace(store, '"nowhere"'))
    _assert_predicts_as_tested(run, data, tmp_path / "s.parquet")


def test_a_server_goes_on_where_the_directory_of_a_store_is_gone(in_files, tmp_path):
    run, store = shutil.copytree(in_files[0] / "run", tmp_path / "run"), tmp_path / "store"
    store.mkdir()
    records = (run / "metrics.jsonl").read_text()
    path = json.dumps(str(in_files[0]))
    (run / "metrics.jsonl").write_text(records.replace(path, json.dumps(str(store))))
    steps = sorted((int(each.name) for each in (run / "checkpoints").iterdir()), reverse=True)
    newest = (run / "checkpoints" / str(steps[0])).rename(tmp_path / "newest")
    model = Model(run, Limits(max_batch=16), Display(Console(file=io.StringIO())))
    assert model.weights.step == steps[1]
    store.rmdir()
    newest.rename(run / "checkpoints" / str(steps[0]))
    model.refresh()
    assert model.weights.step == steps[0]


def test_more_rows_on_the_device_than_there_are_need_no_store(unbroken, data, tmp_path):
    options = ("--dynamic=64", "--cache-rows=64", "--checkpoint-every=0")
    _train("--data", data, *SMALL, *options, "--output-dir", tmp_path / "run")
    assert numbers_of(tmp_path / "run")[1:] == numbers_of(unbroken[0])[1:]


def test_a_cache_too_small_for_a_batch_is_told(data, tmp_path):
    options = (
        "--dynamic=64",
        "--cache-rows=9",
        "--admit-after=1",
        "--output-dir",
        tmp_path / "run",
    )
    result = train("--data", data, *SMALL, *options)
    assert result.exit_code == 1
    assert re.search(
        r"Error: cache_rows must be at least the \d+ rows that one batch", result.stderr
    )
    assert "make the cache larger or the batch smaller" in result.stderr


@pytest.mark.slow
def test_a_mesh_gives_the_same_rows(data, tmp_path):
    """Where no shard is full: each is so by itself. And one device goes on with them."""
    options = ("--data", data, *SMALL, "--dynamic=401")
    _train(*options, "--checkpoint-every=0", "--output-dir", tmp_path / "alone")
    _train(*options, "--mesh=data=2,model=4", "--output-dir", tmp_path / "mesh")
    alone, meshed = numbers_of(tmp_path / "alone"), numbers_of(tmp_path / "mesh")
    assert_same_curve(meshed, alone)
    counts = {name for name in alone[-1] if name.startswith("dynamic_")}
    assert {name: meshed[-1][name] for name in counts} == {name: alone[-1][name] for name in counts}
    assert alone[-1]["dynamic_admitted"] > 80
    _assert_predicts_as_tested(tmp_path / "mesh", data, tmp_path / "s.parquet")


@pytest.mark.slow
def test_two_towers_grow(tmp_path):
    data = ctr_files.write_table(tmp_path / "r.parquet", ctr_files.ratings(600))
    options = ["--model=two-tower", "--items=movie_id,genre", "--tower-mlp=8-4"]
    options += ["--positive-from=4", "--label=rating"]
    output = tmp_path / "run"
    _train("--data", data, *SMALL, *options, "--dynamic=200", "--output-dir", output)
    summary = numbers_of(output)[-1]
    assert summary["dynamic_num_keys"] > 80
    assert summary["embedding_rows"] == 2 * (100 + 12 + 12)
    settings = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert settings["dynamic"] == "200"


def test_every_option_is_told(data, tmp_path):
    """A mistake is one sentence, and nothing is written."""
    for given, sentence in itertools.chain(
        [("--dynamic=10B", "Error: dynamic='10B': one row takes ")],
        [("--dynamic=x", "Error: dynamic must be a number of rows such as 100000")],
        [("--newcomers=zeros", "Error: newcomers goes with dynamic, which is not given.")],
    ):
        result = train("--data", data, given, "--output-dir", tmp_path / "run")
        assert result.exit_code == 1
        assert sentence in result.stderr
    assert not list(tmp_path.iterdir())
