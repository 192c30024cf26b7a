"""What each of several processes reads: its own rows of every batch, and together the same run."""

import itertools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from qrhash.ctr.data import parquet, processes, sources, text
from qrhash.ctr.data.catalogue import Catalogue, Positives
from qrhash.ctr.data.counts import Counts, build_ids
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.pipeline import batches
from qrhash.ctr.data.processes import gather, own_lines, together
from qrhash.ctr.data.shares import Share, Survey
from qrhash.ctr.data.sources import open_source
from qrhash.ctr.data.synthetic import SyntheticSource
from qrhash.ctr.data.vocabulary import HashedIds
from qrhash.ctr.errors import UserError
from qrhash.ctr.settings import Settings
from support import ctr_files
from support.many_processes import in_processes

UNCHECKED_KEYS = True

# --- what processes tell each other ---------------------------------------------------------------


@pytest.mark.parametrize("piece", [1 << 26, 16])
def test_each_gets_what_all_have_told(piece, monkeypatch):
    monkeypatch.setattr(processes, "_PIECE", piece)
    values = [{"keys": np.arange(9, dtype=np.uint64) + np.uint64(2**63)}, None, "späte " * 50]

    def tell():
        return gather(values[jax.process_index()])

    for first, second, third in in_processes(3, tell):
        np.testing.assert_array_equal(first["keys"], values[0]["keys"])
        assert (second, third) == tuple(values[1:])


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (3, 4), (5, 5), (7, 1000)])
def test_own_lines_are_all_lines_once_and_in_order(start, stop):
    ends = in_processes(3, lambda: own_lines(start, stop))
    assert [line for each in ends for line in range(*each)] == list(range(start, stop))
    sizes = [last - first for first, last in ends]
    assert max(sizes) - min(sizes) <= 1


def test_what_ends_one_process_ends_all():
    def items():
        yield 1
        if jax.process_index() == 1:
            raise UserError("the second file is damaged")
        yield 2

    def run():
        found = []
        with pytest.raises(UserError, match="the second file is damaged"):
            found.extend(together(items()))

    in_processes(3, run)


# --- the data -------------------------------------------------------------------------------------

ROWS, BATCH = 700, 48


def _spoilt_events():
    """Events in no order of time, some of them malformed or without a time."""
    events = ctr_files.events(ROWS)
    order = np.random.default_rng(3).permutation(ROWS).tolist()
    events = {name: [values[i] for i in order] for name, values in events.items()}
    events["clicked"] = [7 if i % 90 == 5 else value for i, value in enumerate(events["clicked"])]
    events["when"] = [None if i % 120 == 9 else value for i, value in enumerate(events["when"])]
    rng = np.random.default_rng(4)
    tags = [[f"t{rng.integers(30)}" for _ in range(rng.integers(4))] for _ in range(ROWS)]
    tags[ROWS - 2] = [f"t{k}" for k in range(7)]
    return events | {"tags": ["|".join(each) for each in tags]}


def _text(folder, name="e.csv"):
    return ctr_files.write_csv(folder / name, _spoilt_events())


def _criteo(folder):
    rows = [["x"] if i % 61 == 7 else row for i, row in enumerate(ctr_files.random_rows(ROWS))]
    return ctr_files.write_text(folder / "clicks", rows)


def _folder(folder):
    events = _spoilt_events()
    for k, (start, stop) in enumerate([(0, 150), (150, 600), (600, ROWS)]):
        (folder / "data" / f"day={k}").mkdir(parents=True)
        part = ctr_files.rows_of(events, start, stop)
        ctr_files.write_table(folder / "data" / f"day={k}" / "e.parquet", part)
    return folder / "data"


class Case(NamedTuple):
    """Data, and the options that they are read with."""

    write: object
    options: dict


LISTS = {"lists": "tags"}
CASES = {
    "csv": Case(_text, LISTS),
    "csv by time": Case(_text, LISTS | {"time": "when"}),
    "gzip": Case(lambda folder: _text(folder, "e.csv.gz"), LISTS),
    "weights": Case(_text, LISTS | {"weight": "age", "numbers": "price"}),
    "criteo": Case(_criteo, {}),
    "folder of Parquet": Case(_folder, LISTS),
    "folder of Parquet by time": Case(_folder, LISTS | {"time": "when"}),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path, monkeypatch):
    """The settings of a case, read in many blocks."""
    monkeypatch.setattr(text, "_CHUNK_BYTES", 4000)
    monkeypatch.setattr(parquet, "_PARQUET_ROWS", 32)
    write, options = CASES[request.param]
    path = str(write(tmp_path))
    return Settings(data=path, batch_size=BATCH, max_bad_lines=50, min_count=2, **options)


class Run(NamedTuple):
    """What one process has of a run."""

    batches: list
    ids: dict
    bad_lines: int
    messages: list
    schema: object
    splits: list
    rows: slice
    decoded: int


def _run(settings, *, first=0, positives=False):
    """One process of a run, whose batches to train, from a first one on, and to test are read."""
    messages, decoded = [], []
    bad_lines = BadLines(settings.max_bad_lines, messages.append)
    source = open_source(settings, bad_lines)
    train, stop = 500, source.num_lines
    splits = []
    if source.schema.time is not None:
        splits = source.split_by_time(100, 120)
        train = splits[0]
    source = Positives(source) if positives else source
    share, survey = None, source
    categories = source.schema.categories
    count, number = jax.process_count(), jax.process_index()
    rows = slice(BATCH * number // count, BATCH * (number + 1) // count)
    if count > 1:
        survey = Survey(source, bad_lines)
    catalogue = Catalogue(source.schema, (*categories[:2], *source.schema.lists))
    blocks = catalogue.watching(survey.blocks(0, train))
    ids = build_ids(Counts(settings, categories, source.schema.lists), blocks)
    catalogue.gather()
    if count > 1:
        for _ in survey.blocks(train, stop):
            pass
        share = Share(survey.labels, BATCH, rows)

    def watched(block):
        decoded.append(len(block.labels))
        return catalogue.find(block)

    found = []
    ends = [0, *splits, stop] if splits else [0, train, stop]
    for begin, end in itertools.pairwise(ends):
        with batches(source, begin, end, ids, BATCH, watched, share) as stream:
            if begin == 0 and first:
                stream.set_state({"batches": first})
            for k, batch in enumerate(stream, first if begin == 0 else 0):
                assert stream.get_state() == {"batches": k + 1}
                found.append(batch)
    return Run(found, ids, len(bad_lines), messages, source.schema, splits, rows, sum(decoded))


def _assert_same_batches(run, alone):
    """That a process has its rows, the labels and weights of all, and nothing else."""
    assert len(run.batches) == len(alone.batches)
    others = np.ones(BATCH, bool)
    others[run.rows] = False
    for batch, whole in zip(run.batches, alone.batches, strict=True):
        np.testing.assert_array_equal(batch.labels, whole.labels)
        np.testing.assert_array_equal(batch.weights, whole.weights)
        rest = [each._replace(labels=None, weights=None) for each in (batch, whole)]
        for column, of_whole in zip(*map(jax.tree.leaves, rest), strict=True):
            assert (column.dtype, column.shape) == (of_whole.dtype, of_whole.shape)
            np.testing.assert_array_equal(column[run.rows], of_whole[run.rows])
            assert not column[others].any()


@pytest.mark.parametrize(("count", "first", "positives"), [(2, 0, False), (3, 4, True)])
def test_processes_read_the_batches_of_one(case, count, first, positives):
    alone = _run(case, first=first, positives=positives)
    assert alone.bad_lines > 5
    runs = in_processes(count, lambda: _run(case, first=first, positives=positives))
    for run in runs:
        _assert_same_batches(run, alone)
        assert (run.schema, run.splits) == (alone.schema, alone.splits)
        assert run.bad_lines == alone.bad_lines
        assert list(run.ids) == list(alone.ids)
        for name, of_keys in run.ids.items():
            np.testing.assert_array_equal(of_keys.keys, alone.ids[name].keys)
            np.testing.assert_array_equal(of_keys.ids, alone.ids[name].ids)
            assert of_keys.missing_id == alone.ids[name].missing_id
    rows = int(sum(batch.weights.sum() for batch in alone.batches))
    assert sum(run.decoded for run in runs) == rows
    assert max(run.decoded for run in runs) <= rows / count + 2 * BATCH
    if case.time is None:
        assert runs[0].messages == alone.messages


def test_no_row_is_decoded_by_two_processes_in_one_pass(case, monkeypatch):
    """The passes are the first look at all lines, and the batches."""
    decoded = []
    decode = sources.decode

    def counted(table, schema):
        decoded.append(table.num_rows)
        return decode(table, schema)

    monkeypatch.setattr(sources, "decode", counted)
    runs = in_processes(2, lambda: _run(case))
    of_batches = sum(run.decoded for run in runs)
    assert 2 * of_batches <= sum(decoded) <= of_batches + ROWS


def test_too_many_malformed_rows_stop_all_processes(tmp_path, monkeypatch):
    """As many in all as one process would skip, wherever they are."""
    monkeypatch.setattr(text, "_CHUNK_BYTES", 4000)
    path = _criteo(tmp_path)
    bad = sum(i % 61 == 7 for i in range(ROWS))
    _run(settings := Settings(data=str(path), max_bad_lines=bad))
    in_processes(2, lambda: _run(settings))
    few = Settings(data=str(path), max_bad_lines=bad - 1)
    with pytest.raises(UserError, match=f"More than {bad - 1} malformed lines.*line 679") as alone:
        _run(few)

    def run():
        with pytest.raises(UserError, match="More than") as found:
            _run(few)
        return str(found.value)

    first, second = in_processes(2, run)
    assert first == str(alone.value)
    assert f"More than {bad - 1} malformed lines" in second


def test_a_process_without_any_row_of_a_batch_gives_none(tmp_path):
    """Of the last batch, or of all there are."""
    path = ctr_files.write_text(tmp_path / "few", ctr_files.random_rows(20))
    settings = Settings(data=str(path), hash_size=9)

    def run():
        source = open_source(settings, bad_lines := BadLines(0, print))
        survey = Survey(source, bad_lines)
        assert sum(len(block.labels) for block in survey.blocks(0, 20)) == 10
        rows = slice(24 * jax.process_index(), 24 * (jax.process_index() + 1))
        share = Share(survey.labels, 48, rows)
        with batches(source, 0, 20, {"C2": HashedIds(7)}, 48, share=share) as stream:
            (batch,) = stream
        return batch

    first, second = in_processes(2, run)
    assert first.ids.any()
    assert not second.ids.any()
    assert second.weights.sum() == 20


def test_synthetic_rows_are_split_alike():
    def run():
        source = SyntheticSource(20_000, 0)
        survey = Survey(source, BadLines(0, print))
        for _ in survey.blocks(0, 20_000):
            pass
        rows = slice(500 * jax.process_index(), 500 * (jax.process_index() + 1))
        share = Share(survey.labels, 1000, rows)
        with batches(source, 100, 20_000, {"C2": HashedIds(7)}, 1000, share=share) as stream:
            return list(stream)

    with batches(SyntheticSource(20_000, 0), 100, 20_000, {"C2": HashedIds(7)}, 1000) as stream:
        whole = list(stream)
    for *parts, batch in zip(*in_processes(2, run), whole, strict=True):
        for column in ("numbers", "ids"):
            joined = sum(getattr(part, column) for part in parts)
            np.testing.assert_array_equal(joined, getattr(batch, column))


def test_rows_that_are_others_than_at_first_are_told(tmp_path):
    path = ctr_files.write_text(tmp_path / "clicks", ctr_files.random_rows(100))
    source = open_source(Settings(data=str(path)), BadLines(0, print))
    survey = Survey(source, BadLines(0, print))
    for _ in survey.blocks(0, 100):
        pass
    survey.labels[70] = 1 - survey.labels[70]
    share = Share(survey.labels, 10, slice(0, 10))
    with (
        pytest.raises(UserError, match="clicks changed during the run: there are other rows"),
        batches(source, 0, 100, {}, 10, share=share) as stream,
    ):
        list(stream)
