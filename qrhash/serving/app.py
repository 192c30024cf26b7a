"""The HTTP interface, as an application of Starlette."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import qrhash
from qrhash.serving.bodies import ARROW, JSON, json_of
from qrhash.serving.limits import Limits, Refused
from qrhash.serving.metrics import Metrics
from qrhash.serving.transfer import Intake, answer, kind_of, refusal, wants_arrow
from qrhash.serving.vectors import Vectors

if TYPE_CHECKING:
    # JAX is loaded by whoever needs it: vectors alone are served without.
    from qrhash.serving.batcher import Batcher
    from qrhash.serving.model import Model

SCORE, VECTORS, HEALTH, METRICS = "/score", "/vectors", "/health", "/metrics"
_PATHS = ("/", SCORE, VECTORS, HEALTH, METRICS)
_LONG = 1 << 16  # bytes of a body that others do not wait for
_GONE = 499  # the client has, before it was answered

_Handler = Callable[[Request], Awaitable[Response]]


@dataclass(kw_only=True)
class Service:
    """What serves.

    Attributes:
      limits: what it takes.
      metrics: what it has done.
      model: gives scores, if there is a run.
      batcher: the same.
      vectors: gives vectors, if there is a snapshot.
      notify: is told of errors that nobody foresaw.
    """

    limits: Limits
    metrics: Metrics
    model: "Model | None" = None
    batcher: "Batcher | None" = None
    vectors: Vectors | None = None
    notify: Callable[[str], None] = print
    workers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))

    @property
    def versions(self) -> dict[str, int]:
        """What serves now: "model" -> its step; name of a table that grows -> its version."""
        found = {} if self.model is None else {"model": self.model.weights.step}
        if self.vectors is not None:
            snapshot = self.vectors.snapshot
            versions = {name: snapshot.version(name) for name in snapshot.names}
            found |= {name: each for name, each in versions.items() if each is not None}
        return found


def build_app(service: Service) -> ASGIApp:
    """The application."""
    intake = Intake(service.limits)

    async def score(request: Request) -> Response:
        model, batcher = service.model, service.batcher
        if model is None or batcher is None:
            raise Refused(404, "No model is served here, vectors alone: start with RUN.")
        kind = kind_of(request)
        body = await intake.body(request)
        rows = await _in_time(service, body, lambda: model.columns.rows(body, kind))
        scored = await batcher.score(rows)
        return answer(scored.outputs, {"version": scored.step}, as_arrow=wants_arrow(request, kind))

    async def vectors(request: Request) -> Response:
        found = service.vectors
        if found is None:
            raise Refused(404, "No vectors are served here: start with --embeddings.")
        if kind_of(request) != JSON:
            raise Refused(415, f"Content-Type must be {JSON}.")
        body = await intake.body(request)

        def look_up() -> Response:
            looked_up = found.lookup(json_of(body))
            return answer({"vectors": looked_up}, {}, as_arrow=wants_arrow(request, JSON))

        return await _in_time(service, body, look_up)

    async def health(_: Request) -> Response:
        is_well = service.batcher is None or service.batcher.is_alive
        said = {"status": "ok" if is_well else "failed", "versions": service.versions}
        return JSONResponse(said, status_code=200 if is_well else 503)

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(
            service.metrics.text(_gauges(service)), media_type="text/plain; version=0.0.4"
        )

    async def index(_: Request) -> Response:
        return JSONResponse(_description(service))

    handlers: dict[str, tuple[_Handler, str]] = {
        "/": (index, "GET"),
        SCORE: (score, "POST"),
        VECTORS: (vectors, "POST"),
        HEALTH: (health, "GET"),
        METRICS: (metrics, "GET"),
    }
    routes = [
        Route(path, _answered(handler, service), methods=[method])
        for path, (handler, method) in handlers.items()
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _not_there})
    return _Measured(app, service.metrics)


async def _in_time(service: Service, body: bytes, work: Callable[[], Any]) -> Any:
    """What takes long is done beside the loop, so that others are heard meanwhile."""
    if len(body) < _LONG:
        return work()
    return await asyncio.get_running_loop().run_in_executor(service.workers, work)


def _answered(handler: _Handler, service: Service) -> _Handler:
    """A handler whose refusals are answers, and whose errors are told, and no one else's."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except Refused as refused:
            return refusal(refused)
        except ClientDisconnect:
            return Response(status_code=_GONE)
        except Exception as error:
            service.notify(f"{request.url.path} failed: {error!r}")
            return refusal(Refused(500, "The server failed; its log says how."))

    return handle


async def _not_there(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:80]
    if error.status_code == 405:
        sentence = f"{path} does not take {request.method}."
    else:
        sentence = f"There is no {path} here, but {', '.join(_PATHS)}."
    return refusal(Refused(error.status_code, sentence, headers=error.headers))


def _gauges(service: Service) -> Mapping[str, float]:
    found: dict[str, float] = {}
    if service.model is not None and service.batcher is not None:
        found["model_version"] = service.model.weights.step
        found["waiting_rows"] = service.batcher.waiting
    if service.vectors is not None:
        versions = service.versions
        versions.pop("model", None)
        found |= {f'embedding_version{{name="{name}"}}': each for name, each in versions.items()}
    return found


def _description(service: Service) -> dict[str, Any]:
    """What there is, for people and for `qrhash bench-serve`."""
    found: dict[str, Any] = {
        "qrhash": qrhash.__version__,
        "versions": service.versions,
        "endpoints": {
            f"GET {HEALTH}": "whether it serves, and which version",
            f"GET {METRICS}": "counts and latencies, as Prometheus reads them",
        },
    }
    if service.model is not None:
        schema = service.model.columns.schema
        found["endpoints"][f"POST {SCORE}"] = (
            f'the scores of rows, {{"rows": [{{"column": value, ...}}, ...]}} as {JSON}, or a '
            f"stream as {ARROW}"
        )
        found["columns"] = {column.name: column.use for column in schema.used}
        found["max_rows"] = service.limits.max_batch
        found["schema"] = service.model.columns.of_files.as_dict()
    if service.vectors is not None:
        found["endpoints"][f"POST {VECTORS}"] = (
            f'the vectors of ids, {{"name": "column", "ids": [...]}} as {JSON}'
        )
        found["embeddings"] = service.vectors.names
    return found


class _Measured:
    """An application whose requests are counted and timed."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            path = scope["path"] if scope["path"] in _PATHS else "other"
            self._metrics.request(path, status, time.perf_counter() - began)
