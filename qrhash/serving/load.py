"""`qrhash bench-serve`: how fast a server answers real rows.

Closed: each connection asks again as soon as it is answered, which finds the most that a server
does. Open: requests come by chance at a given rate, whether or not those before were answered, as
those of many people do; a request's time counts from when it was to be sent, so that a server that
stands still is not spared the requests that would have come meanwhile.
"""

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.schema import Schema
from qrhash.ctr.data.sources import open_source
from qrhash.ctr.errors import UserError
from qrhash.ctr.run.display import Display
from qrhash.ctr.settings import Settings
from qrhash.serving.bodies import ARROW, JSON

_DIFFERENT = 1000  # requests that are made before; then they begin anew
_AGAIN = 0.25  # seconds from a connection that failed to the next
_PATIENCE = 30.0  # seconds that an answer may take


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of a server.

    Attributes:
      rows_per_request: of the data.
      seconds: for how long.
      connections: at a time.
      rate: requests a second; None: as many as there are answers.
      as_arrow: whether bodies are Arrow, or JSON.
    """

    rows_per_request: int = 16
    seconds: float = 10.0
    connections: int = 8
    rate: float | None = None
    as_arrow: bool = False


@dataclass
class Answered:
    """What came of it.

    Attributes:
      rows_per_request: see `Asked`.
      elapsed: seconds.
      latencies: seconds of each request that was answered with scores.
      refused: status -> how many requests were answered with it.
      broken: requests that were not answered: there was no server, or none any more.
    """

    rows_per_request: int
    elapsed: float = 0.0
    latencies: list[float] = field(default_factory=list)
    refused: Counter[int] = field(default_factory=Counter)
    broken: int = 0

    @property
    def errors(self) -> int:
        """How many requests were not answered with scores."""
        return self.broken + sum(self.refused.values())

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it; latencies in milliseconds."""
        rate = len(self.latencies) / self.elapsed if self.elapsed else 0.0
        found = np.array(self.latencies) if self.latencies else np.full(1, math.nan)
        quantiles = {
            f"p{share}_ms": round(float(1e3 * np.quantile(found, share / 100)), 3)
            for share in (50, 90, 99)
        }
        return {
            "requests": len(self.latencies),
            "seconds": round(self.elapsed, 2),
            "requests_per_second": round(rate, 1),
            "rows_per_second": round(rate * self.rows_per_request, 1),
            **(quantiles if self.latencies else dict.fromkeys(quantiles)),
            "max_ms": round(1e3 * max(self.latencies), 3) if self.latencies else None,
            "refused": {str(status): count for status, count in sorted(self.refused.items())},
            "connection_errors": self.broken,
        }


class _BrokenError(Exception):
    """There was no answer."""


class _Connection:
    """One connection, made anew when it breaks: as little as HTTP/1.1 takes of this machine."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """The status and the body of an answer.

        Raises:
          _BrokenError: there is none.
        """
        try:
            async with asyncio.timeout(_PATIENCE):
                if self._streams is None:
                    self._streams = await asyncio.open_connection(self._host, self._port)
                reader, writer = self._streams
                writer.write(request)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
                body = await reader.readexactly(size)
        except (OSError, EOFError, TimeoutError, ValueError, asyncio.LimitOverrunError) as error:
            self.close()
            raise _BrokenError(str(error) or type(error).__name__) from error
        if b"connection: close" in head:
            self.close()
        return int(head.split(None, 2)[1]), body

    def close(self) -> None:
        """Closes it."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def bench(url: str, data: str, asked: Asked, display: Display) -> Answered:
    """Asks a server for the scores of some data.

    Args:
      url: of the server, such as http://localhost:8000.
      data: as in `Settings`, with the columns of the server's run.
      asked: how much.
      display: is told how far it is.

    Raises:
      UserError: there is no such server; or the data cannot be used.
    """
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme != "http" or parts.hostname is None:
        raise UserError(f"URL must be like http://localhost:8000, got {url}.")
    host, port = parts.hostname, parts.port or 80
    said = asyncio.run(_describe(host, port, url))
    if "schema" not in said:
        raise UserError(f"{url} serves no model, but vectors alone.")
    if asked.rows_per_request > said["max_rows"]:
        raise UserError(
            f"--rows-per-request must be at most {said['max_rows']:,}, the server's --max-batch, "
            f"got {asked.rows_per_request:,}."
        )
    display.phase("reading rows", 0)
    bodies = _bodies(said, data, asked, display)
    kind = ARROW if asked.as_arrow else JSON
    requests = [
        (
            f"POST /score HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        + body
        for body in bodies
    ]
    display.phase("asking, seconds", round(asked.seconds))
    return asyncio.run(_Run(requests, asked, display).run(host, port))


async def _describe(host: str, port: int, url: str) -> dict[str, Any]:
    connection = _Connection(host, port)
    try:
        status, body = await connection.ask(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        said = json.loads(body)
    except _BrokenError as error:
        raise UserError(f"There is no server at {url}: {error}.") from error
    except ValueError:
        status, said = 0, {}
    finally:
        connection.close()
    if status != 200 or "qrhash" not in said:
        raise UserError(f"{url} is no server of qrhash.")
    return dict(said)


def _bodies(said: dict[str, Any], data: str, asked: Asked, display: Display) -> list[bytes]:
    """Bodies of requests with rows of the data, as they are in the files."""
    schema = Schema.from_dict(said["schema"])
    bad_lines = BadLines(1 << 30, lambda _: None)
    source = open_source(Settings(data=data), bad_lines, display.line, schema)
    names = list(said["columns"])
    size = asked.rows_per_request
    wanted = min(source.num_lines, _DIFFERENT * size) // size * size
    if not wanted:
        raise UserError(f"{data} has fewer rows than the {size:,} of a request.")
    tables = list(source.tables(names, 0, wanted))
    table = pa.concat_tables(tables, promote_options="permissive")
    if asked.as_arrow:
        plain = table.combine_chunks()
        return [_stream(plain.slice(at, size)) for at in range(0, table.num_rows, size)]
    rows = [{name: _plain(cell) for name, cell in row.items()} for row in table.to_pylist()]
    return [
        json.dumps({"rows": rows[at : at + size]}, default=str).encode()
        for at in range(0, len(rows), size)
    ]


def _plain(cell: Any) -> Any:
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


class _Run:
    """One load.

    Args:
      requests: what is sent, again and again.
      asked: how much.
      display: is told how far it is.
    """

    def __init__(self, requests: Sequence[bytes], asked: Asked, display: Display) -> None:
        self._requests, self._asked, self._display = requests, asked, display
        self._found = Answered(asked.rows_per_request)
        self._number = 0

    async def run(self, host: str, port: int) -> Answered:
        """Asks for as long as it was told to."""
        asked = self._asked
        began = time.perf_counter()
        end = began + asked.seconds
        queue: asyncio.Queue[float] = asyncio.Queue()
        connections = [_Connection(host, port) for _ in range(asked.connections)]
        tasks = [asyncio.create_task(self._connection(each, queue, end)) for each in connections]
        if asked.rate is not None:
            async for moment in _arrivals(asked.rate, began, end):
                queue.put_nowait(moment)
                self._show(began)
        else:
            while time.perf_counter() < end:
                await asyncio.sleep(0.05)
                self._show(began)
        if asked.rate is not None:
            # What was to be sent by now is sent, and answered.
            with suppress(TimeoutError):
                await asyncio.wait_for(queue.join(), _PATIENCE)
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._found.elapsed = time.perf_counter() - began
        for each in connections:
            each.close()
        return self._found

    def _show(self, began: float) -> None:
        self._display.move(int(time.perf_counter() - began))

    async def _connection(
        self, connection: _Connection, queue: "asyncio.Queue[float]", end: float
    ) -> None:
        if self._asked.rate is None:
            while (now := time.perf_counter()) < end:
                await self._ask(connection, now)
            return
        while True:
            moment = await queue.get()
            await self._ask(connection, moment)
            queue.task_done()

    async def _ask(self, connection: _Connection, since: float) -> None:
        request = self._requests[self._number % len(self._requests)]
        self._number += 1
        try:
            status, _ = await connection.ask(request)
        except _BrokenError:
            self._found.broken += 1
            await asyncio.sleep(_AGAIN)
            return
        if status == 200:
            self._found.latencies.append(time.perf_counter() - since)
        else:
            self._found.refused[status] += 1
            if status == 503:
                await asyncio.sleep(_AGAIN)


async def _arrivals(rate: float, began: float, end: float) -> AsyncIterator[float]:
    """The moments of a Poisson process, each when it has come."""
    chance = random.Random(0)
    moment = began
    while (moment := moment + chance.expovariate(rate)) < end:
        while (left := moment - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        yield moment


def write(answered: Answered, path: Path) -> None:
    """Writes the figures as JSON.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(answered.as_dict(), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def show(answered: Answered, table: Callable[[str, Sequence[str], Any], None]) -> None:
    """Prints the figures by `Display.table`."""
    said = answered.as_dict()
    refused = said.pop("refused")
    rows = [(name, f"{value:,}" if value is not None else "-") for name, value in said.items()]
    rows += [(f"answered {status}", f"{count:,}") for status, count in refused.items()]
    table("what the server did", ("", "figure"), [(name.replace("_", " "), v) for name, v in rows])
