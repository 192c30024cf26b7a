"""A server under load: its rates and latencies, killed and started again, and asked by nobody good.

Starts `qrhash serve RUN` in a process of its own, and `qrhash bench-serve` against it, in others:

1. saturated, JSON and Arrow: the most that it does;
2. at half of that rate, for --seconds: p50, p99, errors, and its memory at the start and the end;
3. saturated again, while it is killed (SIGKILL) and started anew: what its clients see of it;
4. clients that send nonsense, too much, or nothing more, beside good ones at a tenth of the rate:
   what they are answered, and memory.

    pip install -e ".[serve]" && python benchmarks/serving.py RUN --data FILE
"""

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

_CODE = "from qrhash.cli import main; main()"
_HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


class _Server:
    """`qrhash serve` in a process."""

    def __init__(self, run: str, port: int, options: list[str]) -> None:
        arguments = ["serve", run, "--port", str(port), *options]
        self.url, self.port = f"http://127.0.0.1:{port}", port
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, *arguments], stderr=subprocess.DEVNULL
        )
        began = time.perf_counter()
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health").read()
                break
            if self._process.poll() is not None:
                raise SystemExit("qrhash serve ended: is the port free, and RUN a run?")
            time.sleep(0.1)
        self.start_seconds = time.perf_counter() - began

    @property
    def megabytes(self) -> float:
        """Its resident memory."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 1e6

    def kill(self) -> None:
        """Ends it as a lack of memory would."""
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        """Ends it as a supervisor does; returns its exit code."""
        self._process.terminate()
        return self._process.wait()


def _begin(url: str, data: str, options: list[str]) -> tuple[subprocess.Popen[bytes], Path]:
    path = Path(tempfile.mkstemp(suffix=".json")[1])
    arguments = ["bench-serve", url, "--data", data, "--json", str(path), *options]
    process = subprocess.Popen(
        [sys.executable, "-c", _CODE, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return process, path


def _bench(url: str, data: str, *options: object) -> dict[str, Any]:
    process, path = _begin(url, data, list(map(str, options)))
    process.wait()
    found: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    return found


def _show(name: str, found: dict[str, Any]) -> None:
    shown = ("requests_per_second", "rows_per_second", "p50_ms", "p99_ms", "max_ms")
    text = "  ".join(f"{each} {found[each]}" for each in shown)
    errors = f"refused {found['refused']}  connection errors {found['connection_errors']}"
    print(f"{name}: {text}  {errors}  load {os.getloadavg()[0]:.1f}", flush=True)


def _nonsense(port: int, stop: threading.Event, found: Counter[str], seed: int) -> None:
    """One client that means no good."""
    chance = random.Random(seed)
    kinds = {
        "no JSON": _HEAD + b"Content-Length: 9\r\n\r\n{[nonsense",
        "no rows": _HEAD + b"Content-Length: 2\r\n\r\n{}",
        "no column": _HEAD + b'Content-Length: 9\r\n\r\n[{"a":1}]',
        "no HTTP": bytes(chance.randrange(256) for _ in range(500)) + b"\r\n\r\n",
        "too large, declared": _HEAD + b"Content-Length: 100000000000\r\n\r\n",
        "too large, in pieces": _HEAD
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + (b"100000\r\n" + b" " * (1 << 20) + b"\r\n") * 12
        + b"0\r\n\r\n",
        "a body that stops": _HEAD + b"Content-Length: 1000\r\n\r\n[",
        "a head that stops": _HEAD,
        "gone at once": _HEAD + b'Content-Length: 9\r\n\r\n[{"a":1}]',
    }
    while not stop.is_set():
        kind, data = chance.choice(list(kinds.items()))
        answer = b""
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=30) as sock,
        ):
            sock.sendall(data)
            if kind != "gone at once":
                answer = sock.recv(4096)
        status = answer.split(None, 2)[1].decode() if answer.startswith(b"HTTP/1.1 ") else "closed"
        found[f"{kind}: {status}"] += 1


def main() -> None:
    """Runs all four parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--options", default="", help="of qrhash serve")
    given = parser.parse_args()
    options = given.options.split()
    server = _Server(given.run, given.port, options)
    print(f"started in {server.start_seconds:.1f} s, {server.megabytes:.0f} MB")
    many = ("--connections", given.connections)
    ask = (server.url, given.data, *many)
    _bench(*ask, "--seconds", 5)

    saturated = _bench(*ask, "--seconds", 20)
    _show("saturated, JSON", saturated)
    _show("saturated, Arrow", _bench(*ask, "--seconds", 20, "--arrow"))
    rate = saturated["requests_per_second"] / 2
    before = server.megabytes
    found = _bench(*ask, "--seconds", given.seconds, "--rate", rate)
    _show(f"at {rate:.0f} requests/s for {given.seconds:.0f} s", found)
    print(f"memory {before:.0f} MB before, {server.megabytes:.0f} MB after")

    process, path = _begin(*ask[:2], [*map(str, many), "--seconds", "60"])
    time.sleep(20)
    server.kill()
    server = _Server(given.run, given.port, options)
    process.wait()
    _show("killed and started again", json.loads(path.read_text()))
    print(f"it answered again after {server.start_seconds:.1f} s")

    before, stop, answers = server.megabytes, threading.Event(), Counter[str]()
    for round_ in range(2):
        clients = [
            threading.Thread(target=_nonsense, args=(given.port, stop, answers, seed))
            for seed in range(8)
        ]
        for each in clients:
            each.start()
        found = _bench(*ask, "--seconds", given.seconds / 2, "--rate", rate / 5)
        stop.set()
        for each in clients:
            each.join()
        stop.clear()
        _show("beside clients that send nonsense", found)
        print(f"memory {before:.0f} MB before, {server.megabytes:.0f} MB after round {round_ + 1}")
    for kind, count in sorted(answers.items()):
        print(f"  {kind:<32} {count:>6,}")
    print(f"ended by SIGTERM with exit code {server.end()}")


if __name__ == "__main__":
    main()
