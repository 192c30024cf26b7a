"""`qrhash serve` and `qrhash bench-serve`."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from qrhash.commands.parameters import in_paragraphs
from qrhash.commands.running import shown
from qrhash.ctr.errors import UserError
from qrhash.ctr.run.display import Display

_SERVE_EXTRA = ("starlette", "uvicorn")


def serve_command() -> Any:
    """`serve`."""

    def serve(
        run: Annotated[
            Path | None,
            typer.Argument(
                metavar="RUN", help="Directory of a run of qrhash train.", show_default=False
            ),
        ] = None,
        embeddings: Annotated[
            Path | None,
            typer.Option(
                help="Snapshot of embeddings whose vectors are served, with RUN or alone."
            ),
        ] = None,
        deltas: Annotated[
            Path | None,
            typer.Option(help="Directory of the snapshot's deltas: new ones are applied."),
        ] = None,
        host: Annotated[
            str, typer.Option(help="Address to listen at; by default this machine's alone.")
        ] = "127.0.0.1",
        port: Annotated[
            int, typer.Option(min=0, max=65535, help="Port; 0: any that is free.")
        ] = 8000,
        reload_every: Annotated[
            float,
            typer.Option(
                min=0,
                help="Seconds from one look for a newer checkpoint, snapshot or delta to the next; "
                "0: never.",
            ),
        ] = 10.0,
        max_batch: Annotated[
            int,
            typer.Option(
                min=1,
                max=1 << 16,
                help="Rows that are scored at once, and the most that a request may have.",
            ),
        ] = 512,
        max_delay_ms: Annotated[
            float,
            typer.Option(min=0, help="Milliseconds that a row waits for others to be scored with."),
        ] = 2.0,
        max_waiting: Annotated[
            int, typer.Option(min=1, help="Rows that may wait; beyond it requests are refused.")
        ] = 8192,
        max_body_mb: Annotated[
            float, typer.Option(min=0.001, help="Megabytes that a body may have.")
        ] = 8.0,
        read_seconds: Annotated[
            float,
            typer.Option(
                min=0.1,
                help="Seconds in which a request must have come, and its answer been taken.",
            ),
        ] = 10.0,
        max_connections: Annotated[int, typer.Option(min=1, help="Connections at a time.")] = 512,
    ) -> None:
        """Answer with the scores of a trained model, and with vectors, over HTTP.

        For trying out and for small loads: JSON and Arrow, requests scored together, a newer
        checkpoint taken over while it serves. The address itself, asked by GET, tells what there
        is:

        qrhash serve runs/first

        curl localhost:8000/score --json '{"rows": [{"user": 17, "item": "x"}]}'
        """
        limits = {
            "max_batch": max_batch,
            "max_delay": max_delay_ms / 1e3,
            "max_waiting": max(max_waiting, max_batch),
            "max_body": int(max_body_mb * 1e6),
            "max_held": max(int(16e6 * max_body_mb), 1 << 20),
            "read_seconds": read_seconds,
            "max_connections": max_connections,
        }
        options = {
            "run": run,
            "embeddings": embeddings,
            "deltas": deltas,
            "host": host,
            "port": port,
            "reload_every": reload_every,
        }
        raise typer.Exit(_serve(options, limits))

    return in_paragraphs(serve)


def _serve(options: dict[str, Any], limits: dict[str, Any]) -> int:
    """Serves; returns the exit code."""

    def run(display: Display) -> None:
        _check_extra()
        from qrhash.serving.limits import Limits
        from qrhash.serving.server import Options, serve

        serve(Options(**options, limits=Limits(**limits)), display, Console(stderr=True))

    return shown(run)


def _check_extra() -> None:
    missing = [name for name in _SERVE_EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"Serving needs {', '.join(missing)}; install them with: pip install 'qrhash[serve]'"
        )


def bench_serve_command() -> Any:
    """`bench-serve`."""

    def bench_serve(
        url: Annotated[
            str,
            typer.Argument(
                metavar="URL",
                help="Where qrhash serve answers: http://localhost:8000.",
                show_default=False,
            ),
        ],
        *,
        data: Annotated[str, typer.Option(help="File, folder or pattern with the run's columns.")],
        rows_per_request: Annotated[int, typer.Option(min=1, help="Rows of a request.")] = 16,
        seconds: Annotated[float, typer.Option(min=0.1, help="For how long.")] = 10.0,
        connections: Annotated[int, typer.Option(min=1, help="Connections at a time.")] = 8,
        rate: Annotated[
            float | None,
            typer.Option(
                min=0.01,
                help="Requests a second, which come by chance whether or not those before were "
                "answered. Default: each connection asks again as soon as it is answered.",
            ),
        ] = None,
        arrow: Annotated[bool, typer.Option("--arrow", help="Send Arrow instead of JSON.")] = False,
        json: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
    ) -> None:
        """Ask a server for the scores of real rows, and say how fast it answers.

        The exit code is 1 if any request was refused, or not answered:

        qrhash bench-serve http://localhost:8000 --data events.parquet --rate 100
        """
        asked = {
            "rows_per_request": rows_per_request,
            "seconds": seconds,
            "connections": connections,
            "rate": rate,
            "as_arrow": arrow,
        }
        raise typer.Exit(_bench_serve(url, data, asked, json))

    return in_paragraphs(bench_serve)


def _bench_serve(url: str, data: str, asked: dict[str, Any], output: Path | None) -> int:
    """Asks; returns the exit code."""
    errors = 0

    def run(display: Display) -> None:
        nonlocal errors
        from qrhash.serving.load import Asked, bench, show, write

        with display:
            answered = bench(url, data, Asked(**asked), display)
            display.done()
        show(answered, Display(Console()).table)
        if output is not None:
            write(answered, output)
        errors = answered.errors

    return shown(run) or int(errors > 0)
