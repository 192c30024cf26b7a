"""`qrhash serve`: from the command line to the last answer."""

import errno
import gc
import logging
import math
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn
from rich.console import Console
from rich.text import Text

from qrhash.ctr.errors import UserError
from qrhash.ctr.run.display import Display
from qrhash.serving.app import Service, build_app
from qrhash.serving.limits import Limits
from qrhash.serving.metrics import Metrics
from qrhash.serving.protocol import Impatient
from qrhash.serving.reloading import Refresh, Reloader
from qrhash.serving.vectors import Vectors

_GRACE = 30  # seconds that answers under way have when the server is to stop
_KEEP_ALIVE = 75  # seconds that a connection may wait for its next request
_BACKLOG = 1024  # connections that wait to be taken
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is served, and where.

    Attributes:
      run: the directory of a run; None: vectors alone.
      embeddings: a snapshot.
      deltas: the directory of its deltas.
      host: the address to listen at.
      port: of it; 0: any that is free.
      reload_every: seconds from one look for something newer to the next; 0: never.
      limits: see `Limits`.
    """

    run: Path | None = None
    embeddings: Path | None = None
    deltas: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    reload_every: float = 10.0
    limits: Limits = field(default_factory=Limits)


def serve(options: Options, display: Display, console: Console) -> None:
    """Serves until a signal ends it: what has come by then is answered.

    Args:
      options: what, and where.
      display: is told how far it is.
      console: where the state goes, while it serves.

    Raises:
      UserError: nothing is to be served, or cannot be; or the address is in use.
      KeyboardInterrupt: a SIGINT ended it.
    """
    if options.run is None and options.embeddings is None:
        raise UserError("There is nothing to serve: give RUN, or --embeddings, or both.")
    if options.deltas is not None and options.embeddings is None:
        raise UserError("--deltas are of a snapshot: name it in --embeddings.")
    # First of all: nobody waits for a model to hear that the port is in use.
    sock = _bound(options.host, options.port)
    with sock:
        with display:
            service, refreshes = _service(options, display)
            display.done()
        host, port = sock.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        if host not in _LOOPBACK:
            display.line("Warning: other machines may ask; nobody is asked for a password.")
        reloader = Reloader(refreshes, options.reload_every, service.metrics, display.line)
        server = _Server(_config(service))
        server.began = lambda: display.line(f"serving at {address}")
        status = _Status(service, console)
        try:
            server.run(sockets=[sock])
        finally:
            status.close()
            reloader.close()
            if service.batcher is not None:
                service.batcher.close()
            service.workers.shutdown(wait=False)
    display.line(f"stopped after {sum(service.metrics.requests.values()):,} requests")
    if server.ended_by == signal.SIGINT:
        raise KeyboardInterrupt


def _bound(host: str, port: int) -> socket.socket:
    """The socket of an address, on which nobody is heard yet: clients are refused till then.

    Raises:
      UserError: it is in use, or is none of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind)
    except OSError as error:
        raise UserError(f"--host {host} is no address here: {error.strerror}.") from error
    # A server that was killed leaves connections that are not quite closed.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"Port {port} of {host} is in use: choose another --port.") from error
        raise UserError(f"{host}, port {port}, cannot be used: {error.strerror}.") from error
    return sock


def _service(options: Options, display: Display) -> tuple[Service, dict[str, Refresh]]:
    """What serves, and what looks for something newer."""
    service = Service(limits=options.limits, metrics=Metrics(), notify=display.line)
    refreshes: dict[str, Refresh] = {}
    if options.embeddings is not None:
        vectors = Vectors(options.embeddings, options.deltas, max_ids=options.limits.max_batch)
        for sentence in vectors.refresh():
            display.line(sentence)
        display.line(f"{options.embeddings}: {', '.join(map(repr, vectors.names))}")
        service.vectors, refreshes["vectors"] = vectors, vectors.refresh
    if options.run is not None:
        # JAX is loaded by whoever needs it: vectors alone are served without.
        from qrhash.serving.batcher import Batcher
        from qrhash.serving.model import Model
        from qrhash.serving.reading import warm_up

        model = Model(options.run, options.limits, display)
        warm_up(model)
        service.model, refreshes["model"] = model, model.refresh
        service.batcher = Batcher(model, options.limits, service.metrics, display.line)
    return service, refreshes


def _config(service: Service) -> uvicorn.Config:
    limits = service.limits
    # What clients do wrong is counted, not told: they could fill a disk with it.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    return uvicorn.Config(
        build_app(service),
        http=type("Protocol", (Impatient,), {"seconds": limits.read_seconds}),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        limit_concurrency=limits.max_connections + 1,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_GRACE,
    )


class _Server(uvicorn.Server):
    """A server that ends with what has come being answered, and tells who ended it.

    Attributes:
      began: called when it serves.
      ended_by: the signal.
    """

    began: Callable[[], None]
    ended_by: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins."""
        # All that there is by now stays: nobody looks through it for garbage while others wait.
        gc.collect()
        gc.freeze()
        await super().startup(sockets)
        self.began()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends it; for the second time, at once."""
        self.force_exit = self.should_exit
        self.should_exit, self.ended_by = True, sig


class _Status:
    """How it goes: on a terminal a line that changes, elsewhere one now and then.

    Args:
      service: what serves.
      console: where to.
    """

    def __init__(self, service: Service, console: Console) -> None:
        self._service, self._console = service, console
        self._closed = threading.Event()
        self._line = console.status("") if console.is_terminal else None
        self._thread = threading.Thread(target=self._work, name="status", daemon=True)
        if self._line is not None:
            self._line.start()
        self._thread.start()

    def close(self) -> None:
        """Ends it."""
        self._closed.set()
        self._thread.join()
        if self._line is not None:
            self._line.stop()

    def _work(self) -> None:
        told = 0.0
        while not self._closed.wait(1.0 if self._line is not None else 30.0):
            text = status_line(self._service)
            if self._line is not None:
                self._line.update(Text(text))
            elif (seconds := self._service.metrics.seconds) != told:
                told = seconds
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def status_line(service: Service) -> str:
    """The last seconds in words."""
    now = service.metrics.now()
    parts = [f"{now.requests:,.0f} requests/s"]
    if service.batcher is not None:
        parts.append(f"{now.rows:,.0f} rows/s")
    if not math.isnan(now.p50):
        parts.append(f"p50 {1e3 * now.p50:.1f} ms  p99 {1e3 * now.p99:.1f} ms")
    if not math.isnan(now.fill):
        parts.append(f"{now.fill:.0f} rows a batch")
    parts += [f"{name} {version:,}" for name, version in service.versions.items()]
    return "  ".join(parts)
