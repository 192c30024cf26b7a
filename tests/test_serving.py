"""`qrhash serve`: the scores of `qrhash predict`, whoever asks beside; and what is refused."""

import asyncio
import contextlib
import gc
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

import qrhash
from qrhash import cli, dynamic, export
from qrhash.ctr.data.schema import Column, Schema
from qrhash.ctr.errors import UserError
from qrhash.ctr.settings import Settings
from qrhash.serving import load, server
from qrhash.serving.batcher import Batcher
from qrhash.serving.bodies import ARROW, Columns
from qrhash.serving.limits import Limits, Refused
from qrhash.serving.metrics import Metrics
from qrhash.serving.model import Model
from qrhash.serving.reloading import Reloader
from qrhash.serving.vectors import Vectors
from support import ctr_files
from support.training_process import train

STANDARD_PROMOTION = True  # optax.adam needs it
UNCHECKED_KEYS = True

SMALL = ["--features=4", "--batch-size=32", "--evaluations=1", "--test-rows=60"]
SMALL += ["--checkpoint-every=2"]
CLICKS = [*SMALL, "--bottom-mlp=8", "--top-mlp=8", "--table-lr=0.3", "--init-stddev=0.3"]
TOWERS = [*SMALL, "--model=two-tower", "--tower-mlp=8-4"]
RATED = [*TOWERS, "--items=movie_id,genre", "--label=rating", "--positive-from=4"]
WATCHED = [*TOWERS, "--items=movie_id,genres", "--label=none"]
RUNS = {
    "vocabulary": (ctr_files.events, CLICKS),
    "lists": (ctr_files.tagged, [*CLICKS, "--ids=keys", "--key-bits=12"]),
    "growing": (ctr_files.tagged, [*CLICKS, "--ids=keys", "--dynamic=20"]),
    "towers": (ctr_files.ratings, RATED),
    "towers of lists": (ctr_files.films, WATCHED),
}
JSON = {"Content-Type": "application/json"}
LIMITS = Limits(max_batch=16, max_body=50_000, read_seconds=0.5, max_connections=50)


class _Quiet:
    """A display that keeps what it is told."""

    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)

    def phase(self, *_):
        pass

    move = update = phase

    def done(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By name: the directory of a run, its rows, and the scores of `qrhash predict`."""
    made = {}

    def of(name):
        if name not in made:
            events, options = RUNS[name]
            path, rows = tmp_path_factory.mktemp("run"), events(200)
            data = ctr_files.write_table(path / "e.parquet", rows)
            result = train("--data", data, "--output-dir", path / "run", *options)
            assert result.exit_code == 0, result.output
            arguments = ["predict", path / "run", "--data", data, "--output", path / "s.parquet"]
            assert CliRunner().invoke(cli.build_app(), list(map(str, arguments))).exit_code == 0
            scores = pyarrow.parquet.read_table(path / "s.parquet").to_pydict()
            made[name] = path / "run", rows, scores
        return made[name]

    return of


@pytest.fixture(scope="module")
def model(runs):
    return Model(runs("vocabulary")[0], LIMITS, _Quiet())


@contextlib.contextmanager
def _serving(**options):
    """A server in a thread: (its service, a client, what it has told)."""
    display = _Quiet()
    service, refreshes = server._service(server.Options(limits=LIMITS, **options), display)
    running = server._Server(server._config(service))
    begun = threading.Event()
    running.began = begun.set
    sock = server._bound("127.0.0.1", 0)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        assert begun.wait(20)
        address = "http://127.0.0.1:{1}".format(*sock.getsockname())
        with httpx.Client(base_url=address, timeout=20) as client:
            yield service, refreshes, client, display
    finally:
        running.should_exit = True
        thread.join()
        if service.batcher is not None:
            service.batcher.close()
        sock.close()
        gc.unfreeze()


@pytest.fixture(scope="module")
def serving(runs):
    with _serving(run=runs("vocabulary")[0], reload_every=0) as found:
        yield found


def _rows(rows, start, stop, *, without=("clicked", "when", "rating")):
    names = [name for name in rows if name not in without]
    return [{name: rows[name][row] for name in names} for row in range(start, stop)]


def _stream(table, compression=None):
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _score(client, rows):
    answer = client.post("/score", json={"rows": rows})
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- scores ---------------------------------------------------------------------------------------


SLOW = pytest.param("growing", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["vocabulary", "lists", "towers", "towers of lists", SLOW])
def test_scores_are_those_of_predict(name, runs):
    """As JSON and as Arrow, however many rows a request has, with columns that nobody asked for."""
    run, rows, wanted = runs(name)
    known = sorted(wanted["row"])
    count = 40
    assert known[:count] == list(range(count))
    with _serving(run=run, reload_every=0) as (_, _, client, _):
        found = {"score": [], "logit": []}
        for start, stop in ((0, 1), (1, 8), (8, 24), (24, count)):
            said = _score(client, _rows(rows, start, stop, without=("clicked", "rating", "when")))
            for column, values in found.items():
                values += said.get(column, [])
        table = pa.table({each: cells[:16] for each, cells in rows.items()})
        answer = client.post("/score", content=_stream(table), headers={"Content-Type": ARROW})
    for column in ("score", "logit"):
        if column in wanted:
            np.testing.assert_allclose(found[column], wanted[column][:count], rtol=2e-6, atol=1e-6)
    assert ("logit" in wanted) == bool(found["logit"])
    assert answer.headers["Content-Type"] == ARROW
    got = pa.ipc.open_stream(answer.content).read_all()
    assert got.schema.metadata == {b"version": str(said["version"]).encode()}
    np.testing.assert_allclose(got["score"], wanted["score"][:16], rtol=2e-6, atol=1e-6)


def test_a_value_is_the_same_however_json_writes_it(serving, runs):
    _, rows, _ = runs("vocabulary")
    client = serving[2]
    row = _rows(rows, 3, 4)[0] | {"price": 7.0, "age": 33}
    wanted = _score(client, [row])["score"]
    as_text = row | {"user": str(row["user"]), "price": "7.0", "age": 33.0}
    assert _score(client, [as_text])["score"] == wanted
    mixed = _score(client, [row, as_text, row | {"price": None, "user": None}])["score"]
    np.testing.assert_allclose(mixed[:2], wanted * 2, rtol=1e-6)
    assert mixed[2] != mixed[0]
    np.testing.assert_allclose(
        _score(client, [row | {"user": 17}, row | {"user": 17.0}, row | {"user": "17"}])["score"],
        _score(client, [row | {"user": 17}])["score"] * 3,
        rtol=1e-6,
    )
    # A list of rows alone; and the answer as it is asked for.
    answer = client.post("/score", json=[row], headers={"Accept": ARROW})
    np.testing.assert_allclose(pa.ipc.open_stream(answer.content).read_all()["score"], wanted)


ROW = {"user": 1, "ad": "red", "price": 1.5, "age": 3}
BODIES = {
    "no JSON": (b"{", 400, "not JSON"),
    "nan": (b'[{"user": NaN}]', 400, "NaN is no number"),
    "deep": (b"[" * 20_000, 400, "not JSON"),
    "bytes": (b"\xff\xfe[", 400, "not JSON"),
    "no rows": ([], 422, "no rows"),
    "no list": ({"rows": 3}, 400, "must be"),
    "no objects": ([ROW, 4], 400, "Row 1 is no object"),
    "no column": ([ROW, {"user": 3, "ad": "x", "age": 4}], 422, "Row 1 has no 'price'"),
    "no number": ([ROW, ROW | {"age": "old"}], 422, "Row 1: age is not a number: 'old'"),
    "an object": ([ROW | {"age": {}}], 422, "Row 0: age is not a number: {}"),
    "a list": ([ROW | {"ad": ["x"]}], 422, 'Row 0: ad is not a category: ["x"]'),
    "a fraction": ([ROW | {"user": 1.5}], 422, "Row 0: user is not a category: 1.5"),
    "large": ([ROW | {"user": 2**64}], 422, "Row 0: user is not a category"),
    "infinite": ([ROW | {"age": 1e200}], 422, "Row 0: age is not a number: '1e+200'"),
    "beyond floats": ([ROW | {"age": 10**400}], 422, "Row 0: age is not a number: 1000"),
    "a lone surrogate": (b'[{"user":1,"ad":"\\ud800","price":1,"age":1}]', 422, "no Unicode"),
    "too many": ([ROW] * 17, 413, "more than the 16"),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_cannot_be_read_is_refused_in_a_sentence(name, serving):
    body, status, sentence = BODIES[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = serving[2].post("/score", content=content, headers=JSON)
    assert answer.status_code == status
    assert sentence in answer.json()["error"]
    if status == 422 and "Row" in sentence:
        assert list(answer.json()["rows"]) == [re.search(r"Row (\d)", sentence)[1]]


def test_lists_of_a_request_are_written_in_one_way():
    schema = Schema(columns=(Column("tags", "list<string>", "list", "list", length=3),))
    columns = Columns(schema, Settings(), max_rows=9, max_body=999)
    for cells in (["a", "b"], "a|b"):
        body = json.dumps([{"tags": cells}, {"tags": None}]).encode()
        assert columns.rows(body, "application/json").table.num_rows == 2
    body = json.dumps([{"tags": ["a", "b"]}, {"tags": "a|b"}]).encode()
    sentence = "Row 1: tags is not written as a list, as it is in other rows of the request: a|b"
    with pytest.raises(Refused, match=re.escape(sentence)):
        columns.rows(body, "application/json")


TABLE = pa.table({name: [value] for name, value in ROW.items()})
STREAMS = {
    "no stream": (b"abc", 400, "no stream of Arrow"),
    "cut off": (_stream(TABLE)[:-200], 400, "no stream of Arrow"),
    "compressed": (_stream(TABLE, "zstd"), 415, "compressed"),
    "no column": (_stream(TABLE.drop("ad")), 422, "no column ad; they have user"),
    "two columns": (_stream(TABLE.append_column("ad", pa.array(["x"]))), 422, "two columns ad"),
    "a type": (
        _stream(TABLE.set_column(3, "age", pa.array([{"a": 1}]))),
        422,
        "age has type struct",
    ),
    "a list": (_stream(TABLE.set_column(1, "ad", pa.array([["x"]]))), 422, "Column ad has type"),
    "no number": (_stream(TABLE.set_column(3, "age", pa.array(["old"]))), 422, "age is not a"),
    "too many": (_stream(pa.concat_tables([TABLE] * 20)), 413, "more than the 16 rows"),
    # A dictionary of one long text, that stands in every row.
    "a small bomb": (
        _stream(
            pa.table(
                {"ad": pa.array(["x" * 9000] * 16).dictionary_encode()}
                | {name: [value] * 16 for name, value in ROW.items() if name != "ad"}
            )
        ),
        413,
        "stand for more",
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_of_arrow_are_trusted_no_more(name, serving):
    body, status, sentence = STREAMS[name]
    answer = serving[2].post("/score", content=body, headers={"Content-Type": ARROW})
    assert (answer.status_code, sentence in answer.json()["error"]) == (status, True), answer.text


def test_spoilt_streams_are_refused_whatever_is_spoilt(serving, rng):
    service = serving[0]
    whole = np.frombuffer(_stream(pa.concat_tables([TABLE] * 3)), np.uint8)
    for _ in range(300):
        spoilt = whole.copy()
        spoilt[rng.integers(0, whole.size, 3)] = rng.integers(0, 256, 3)
        with contextlib.suppress(Refused):
            service.model.columns.rows(spoilt.tobytes(), ARROW)


# --- requests, and what they take -----------------------------------------------------------------


def test_requests_that_are_no_requests(serving):
    client = serving[2]
    assert "Content-Type must be" in client.post("/score", content=b"[]").json()["error"]
    gzipped = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert client.post("/score", content=b"[]", headers=gzipped).status_code == 415
    assert client.get("/score").status_code == 405
    assert "There is no /scores here" in client.post("/scores", content=b"").json()["error"]
    answer = client.post("/vectors", json={"ids": []})
    assert (answer.status_code, "start with --embeddings" in answer.text) == (404, True)
    assert client.get("/health").json() == {"status": "ok", "versions": {"model": 5}}
    assert client.get("/").json()["columns"] == {
        "user": "category",
        "ad": "category",
        "price": "number",
        "age": "number",
    }


def _raw(client, data, *more, pause=0.0):
    """What a server says to some bytes until it hangs up."""
    address = client.base_url.host, client.base_url.port
    with socket.create_connection(address, timeout=10) as sock:
        sock.sendall(data)
        for each in more:
            time.sleep(pause)
            with contextlib.suppress(OSError):
                sock.sendall(each)
        found = b""
        with contextlib.suppress(OSError):
            while part := sock.recv(65536):
                found += part
    return found


HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_large_and_slow_bodies_are_refused_and_nothing_is_kept(serving):
    client = serving[2]
    large = b" " * 60_000
    refused = client.post("/score", content=large, headers=JSON)
    assert refused.status_code == 413
    # In pieces, of which nobody says how many there will be.
    refused = client.post(
        "/score",
        content=iter([b" " * 10_000] * 8),
        headers=JSON,
    )
    assert (refused.status_code, "--max-body-mb" in refused.json()["error"]) == (413, True)
    # So large that nobody waits for its end.
    assert b" 413 " in _raw(client, HEAD + b"Content-Length: 1000000000\r\n\r\n")
    began = time.monotonic()
    assert b" 408 " in _raw(client, HEAD + b"Content-Length: 100\r\n\r\n[", b" ", pause=0.1)
    # A head that never ends is not answered.
    assert _raw(client, HEAD, b"X-A: b\r\n", pause=0.1) == b""
    assert time.monotonic() - began < 5
    assert b" 400 " in _raw(client, b"nonsense\r\n\r\n")
    assert b"Exceeded" not in client.get("/health").content
    assert _score(client, [ROW])["version"] == 5


def test_too_many_bodies_at_a_time(serving, monkeypatch):
    client = serving[2]
    with monkeypatch.context() as patch:
        patch.setitem(vars(LIMITS), "max_held", 1000)
        answer = client.post("/score", json=[ROW | {"ad": "x" * 2000}])
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert _score(client, [ROW])


def _batcher(model, **limits):
    metrics, told = Metrics(), []
    return Batcher(model, Limits(max_batch=16, **limits), metrics, told.append), metrics, told


def test_requests_at_a_time_are_one_batch_and_a_bad_one_harms_no_other(model):
    batcher, metrics, told = _batcher(model, max_delay=0.3)

    async def ask():
        good = [json.dumps([ROW | {"age": age}] * 2).encode() for age in range(5)]
        bad = json.dumps([ROW, ROW | {"price": "much"}]).encode()
        bodies = [*good[:2], bad, *good[2:]]
        rows = [model.columns.rows(body, "application/json") for body in bodies]
        rows.append(model.columns.rows(_stream(TABLE), ARROW))
        return await asyncio.gather(*map(batcher.score, rows), return_exceptions=True)

    found = asyncio.run(ask())
    batcher.close()
    assert (metrics.batches, metrics.rows, told) == (1, 11, [])
    refused = found.pop(2)
    assert (refused.status, list(refused.rows)) == (422, [1])
    scores = [each.outputs["score"] for each in found]
    assert [len(each) for each in scores] == [2] * 5 + [1]
    assert len({float(each[0]) for each in scores[:5]}) == 5
    # The first and the last row differ in their age alone.
    alone, _, _ = _batcher(model, max_delay=0.0)
    rows = model.columns.rows(json.dumps([ROW]).encode(), "application/json")
    np.testing.assert_allclose(
        asyncio.run(alone.score(rows)).outputs["score"], scores[5], rtol=1e-6
    )
    alone.close()


def test_a_queue_that_is_full_and_a_model_that_fails(model, monkeypatch):
    batcher, _, told = _batcher(model, max_waiting=20, max_delay=0.0)
    rows = model.columns.rows(json.dumps([ROW] * 10).encode(), "application/json")
    blocked = threading.Event()

    def fails(_):
        blocked.wait(10)
        raise RuntimeError("broken")

    monkeypatch.setattr(model, "scored", fails)

    async def ask():
        tasks = [asyncio.create_task(batcher.score(rows))]
        await asyncio.sleep(0.1)  # taken: it waits no more
        tasks += [asyncio.create_task(batcher.score(rows)) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert batcher.waiting == 20
        blocked.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(ask())
    batcher.close()
    assert [each.status for each in found] == [500, 500, 500, 503]
    assert found[3].headers == {"Retry-After": "1"}
    assert "RuntimeError('broken')" in told[0]


# --- what is newer --------------------------------------------------------------------------------


def test_a_newer_checkpoint_is_taken_over_while_requests_come(runs, tmp_path):
    source, _, _ = runs("vocabulary")
    run = tmp_path / "run"
    shutil.copytree(source, run)
    steps = sorted(int(each.name) for each in (run / "checkpoints").iterdir())
    for step in steps[1:]:
        (run / "checkpoints" / str(step)).rename(tmp_path / str(step))
    with _serving(run=run, reload_every=0) as (service, refreshes, client, display):
        reloader = Reloader(refreshes, 0, service.metrics, display.line)
        found, stop = [], threading.Event()

        def ask():
            with httpx.Client(base_url=client.base_url) as other:
                while not stop.is_set():
                    found.append(_score(other, [ROW]))

        askers = [threading.Thread(target=ask) for _ in range(2)]
        for each in askers:
            each.start()
        reloader.look()
        assert service.versions == {"model": steps[0]}
        # Damaged: told once, and the one before serves on.
        damaged = run / "checkpoints" / str(steps[1])
        shutil.copytree(tmp_path / str(steps[1]), damaged)
        shutil.rmtree(damaged / "state")
        reloader.look()
        reloader.look()
        assert service.versions == {"model": steps[0]}
        shutil.copytree(tmp_path / str(steps[-1]), run / "checkpoints" / str(steps[-1]))
        reloader.look()
        time.sleep(0.2)
        stop.set()
        for each in askers:
            each.join()
        assert {each["version"] for each in found} == {steps[0], steps[-1]}
        assert len({(each["version"], *each["score"]) for each in found}) == 2
        warnings = [line for line in display.lines if "is not taken over" in line]
        assert len(warnings) == 1
        assert service.metrics.events == {("model", "failed"): 1, ("model", "taken over"): 1}
        # Another run in the same place.
        (run / "ids.npz").write_bytes((run / "ids.npz").read_bytes())
        os.utime(run / "ids.npz", (1, 1))
        os.utime(run / "checkpoints" / str(steps[-1]), (1, 1))
        with pytest.raises(UserError, match="another run now"):
            service.model.refresh()
    assert list(_statuses(service)) == [200]


def _statuses(service):
    return sorted({status for _, status in service.metrics.requests})


def _growing(tmp_path):
    """A table that grows, its snapshot, and what makes further deltas."""
    config = dynamic.DynamicConfig(100, 4)
    params, state = dynamic.init(jax.random.key(0), config), dynamic.init_state(config)
    published = dynamic.nothing_published(config)
    paths = []
    for version, word in enumerate(("shoes", "hats", "socks"), 1):
        state, found = dynamic.assign(state, qrhash.Keys.of([word]), config, version - 1)
        params, _ = dynamic.start_rows(params, found, config)
        delta, published = dynamic.delta_since(
            published, params, state, config, version=version, name="query"
        )
        paths.append(tmp_path / f"made.{version}")
        dynamic.save_delta(paths[-1], delta)
        exported = export.of_dynamic(config, params, state, version=version)
        export.save(tmp_path / f"whole.{version}", {"query": exported, "item": _fixed()})
    return paths


def _fixed():
    config = qrhash.EmbedConfig(qrhash.QuotientRemainder(100), 4)
    return export.of_feature(config, qrhash.init(jax.random.key(1), config))


def test_vectors_their_deltas_and_a_snapshot_that_is_replaced(tmp_path):
    made = _growing(tmp_path)
    path, deltas = tmp_path / "served.safetensors", tmp_path / "deltas"
    shutil.copy(tmp_path / "whole.1", path)
    deltas.mkdir()
    options = {"embeddings": path, "deltas": deltas, "reload_every": 0}
    with _serving(**options) as (service, refreshes, client, display):
        reloader = Reloader(refreshes, 0, service.metrics, display.line)
        snapshot = export.Snapshot(path)
        answer = client.post("/vectors", json={"name": "item", "ids": [3, 99]})
        assert answer.json()["vectors"] == snapshot.lookup([3, 99], "item").tolist()
        as_arrow = client.post(
            "/vectors", json={"name": "item", "ids": [3, 99]}, headers={"Accept": ARROW}
        )
        table = pa.ipc.open_stream(as_arrow.content).read_all()
        assert table["vectors"].to_pylist() == answer.json()["vectors"]
        pooled = {"name": "item", "ids": [3, 99, 5], "offsets": [0, 2, 3]}
        wanted = snapshot.lookup([3, 99, 5], "item", offsets=np.array([0, 2, 3])).tolist()
        assert client.post("/vectors", json=pooled).json()["vectors"] == wanted
        for body, status, sentence in (
            ({"name": "other", "ids": []}, 422, "must be one of"),
            ({"name": "item", "ids": [1.5]}, 422, "must be integers"),
            ({"name": "item", "ids": [2**64]}, 422, "64 bits"),
            ({"name": "item", "ids": ["x"]}, 422, ""),
            ({"name": "item", "ids": [1], "offsets": [0, 9]}, 422, "offsets"),
            ({"name": "item", "ids": [1] * 17}, 413, "more than 16"),
            ([], 400, "must be"),
        ):
            answer = client.post("/vectors", json=body)
            assert (answer.status_code, sentence in answer.json()["error"]) == (status, True)

        def rows():
            return client.post("/vectors", json={"name": "query", "ids": ["hats"]}).json()

        before = rows()
        # The third waits for the second; a damaged one is told of once.
        shutil.copy(made[2], deltas / "3.npz")
        (deltas / "0.npz").write_bytes(made[1].read_bytes()[:-50])
        reloader.look()
        reloader.look()
        assert (service.versions, rows()) == ({"query": 1}, before)
        assert sum("is not applied" in line for line in display.lines) == 1
        assert sum("is damaged" in line for line in display.lines) == 1
        shutil.copy(made[1], deltas / "2.npz")
        reloader.look()
        assert service.versions == {"query": 3}
        assert rows() != before
        assert 'qrhash_embedding_version{name="query"} 3' in client.get("/metrics").text
        # An older snapshot comes in its place, and what is newer is applied to it before it serves.
        shutil.copy(tmp_path / "whole.2", tmp_path / "part")
        (tmp_path / "part").replace(path)
        reloader.look()
        assert service.versions == {"query": 3}
        (tmp_path / "part").write_bytes(b"nonsense")
        (tmp_path / "part").replace(path)
        reloader.look()
        assert "is not taken over" in display.lines[-1]
        assert client.get("/health").json() == {"status": "ok", "versions": {"query": 3}}
        assert client.post("/score", json=[]).status_code == 404
    with pytest.raises(UserError, match="no directory"):
        Vectors(path, tmp_path / "none", max_ids=3)


def test_a_snapshot_that_is_not_there_is_one_sentence(tmp_path):
    sentence = f"^--embeddings {tmp_path / 'none'} cannot be read: No such file or directory.$"
    with pytest.raises(UserError, match=sentence):
        Vectors(tmp_path / "none", None, max_ids=3)


# --- figures --------------------------------------------------------------------------------------


def test_figures_are_of_the_last_seconds():
    now = 100.0
    metrics = Metrics(lambda: now)
    assert math.isnan(metrics.now().p50)
    for number in range(1000):
        now = 100.0 + 8 * number / 1000
        metrics.request("/score", 200, 1e-3 * (1 + number % 100))
    metrics.batch(30)
    metrics.batch(50)
    found = metrics.now()
    np.testing.assert_allclose(found[:2], [1000 / 7.992, 80 / 7.992], rtol=1e-6)
    np.testing.assert_allclose([found.p50, found.p99], [0.050, 0.099], rtol=0.03)
    assert found.fill == 40
    metrics.event("model", "failed")
    text = metrics.text({"model_version": 7})
    assert 'qrhash_requests_total{path="/score",status="200"} 1000\n' in text
    assert "qrhash_rows_total 80\n" in text
    assert 'qrhash_reloads_total{what="model",outcome="failed"} 1\n' in text
    assert "qrhash_model_version 7\n" in text
    now = 200.0
    assert metrics.now()[:2] == (0, 0)
    assert math.isnan(metrics.now().p99)
    assert 'quantile="0.99"} NaN' in metrics.text({})


def test_the_servers_figures_are_those_of_its_requests(serving):
    service, _, client, _ = serving
    _score(client, [ROW] * 3)
    text = client.get("/metrics").text
    counted = dict(re.findall(r"^(\S+) (\S+)$", text, flags=re.MULTILINE))
    assert float(counted["qrhash_model_version"]) == 5
    assert float(counted["qrhash_waiting_rows"]) == 0
    assert float(counted["qrhash_rows_total"]) == service.metrics.rows
    p50, p99 = (float(counted[f'qrhash_request_seconds{{quantile="{q}"}}']) for q in (0.5, 0.99))
    assert 0 < p50 <= p99 < 20
    assert "requests/s" in server.status_line(service)


# --- the commands ---------------------------------------------------------------------------------


def _command(*arguments):
    return CliRunner().invoke(
        cli.build_app(), list(map(str, arguments)), env={"COLUMNS": "200"}, catch_exceptions=False
    )


def test_what_cannot_be_served_is_told_in_a_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = _command("serve", tmp_path, "--port", port)
        assert (result.exit_code, "is in use: choose another --port" in result.stderr) == (1, True)
    for arguments, sentence in (
        ([], "nothing to serve"),
        ([tmp_path, "--deltas", tmp_path], "name it in --embeddings"),
        ([tmp_path / "none", "--port", "0"], "none"),
        (["--embeddings", tmp_path / "none", "--port", "0"], "none"),
        ([tmp_path, "--host", "no.such.host.invalid"], "--host"),
    ):
        result = _command("serve", *arguments)
        assert (result.exit_code, sentence in result.stderr) == (1, True), result.output
        assert "Traceback" not in result.output


def test_a_load_and_its_figures(serving, runs, tmp_path):
    run, _, _ = runs("vocabulary")
    client = serving[2]
    url, data = str(client.base_url), run.parent / "e.parquet"
    options = ["--data", data, "--seconds", 0.5, "--rows-per-request", 4, "--connections", 3]
    result = _command("bench-serve", url, *options, "--json", tmp_path / "f.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["requests"] > 3
    assert found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"] <= found["max_ms"]
    assert (found["refused"], found["connection_errors"]) == ({}, 0)
    assert "p99 ms" in result.stdout
    result = _command("bench-serve", url, *options, "--rate", 40, "--arrow")
    assert result.exit_code == 0, result.output
    result = _command("bench-serve", url, *options, "--rows-per-request", 40)
    assert "at most 16" in result.stderr
    result = _command("bench-serve", "http://127.0.0.1:1", "--data", data)
    assert (result.exit_code, "no server at" in result.stderr) == (1, True)
    # Errors are counted, and are the exit code.
    answered = load.Answered(4, elapsed=2.0, latencies=[0.1] * 10, broken=3)
    answered.refused[503] += 2
    assert answered.errors == 5
    assert answered.as_dict()["rows_per_second"] == 20


def test_a_server_that_is_ended_answers_what_it_has(runs):
    """The whole command, in a process of its own: it is told to end while a request waits."""
    run, _, _ = runs("vocabulary")
    options = ["--port", "0", "--max-batch", "8", "--max-delay-ms", "1500"]
    code = "from qrhash.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(run), *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if line.startswith("serving at "):
                break
        address = line.split()[-1]
        answers = []

        def ask():
            answers.append(httpx.post(f"{address}/score", json=[ROW], timeout=20))

        asker = threading.Thread(target=ask)
        asker.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        asker.join()
        rest = process.stderr.read()
        assert process.wait(20) == 0, rest
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert answers[0].status_code == 200
    assert "stopped after 1 requests" in rest
    assert "Traceback" not in rest
