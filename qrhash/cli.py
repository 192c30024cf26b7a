"""The command line: `qrhash train` and `qrhash predict`.

The options of `train` are the fields of `qrhash.ctr.settings.Settings`; an option that is not given
leaves the word to the configuration file, and then to the default.
"""

import importlib.util
import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import qrhash

if TYPE_CHECKING:
    import typer
    from rich.console import Console

_INTERRUPTED = 130  # exit code of a program that a SIGINT ended
_TRAIN_EXTRA = ("grain", "matplotlib", "pyarrow", "rich", "typer")


def main() -> None:
    """Entry point of the console script."""
    # Until a run has something to keep, an interrupt ends it at once, whoever is being imported.
    signal.signal(signal.SIGINT, _interrupted_early)
    missing = [name for name in _TRAIN_EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"qrhash needs {', '.join(missing)}; install them with: pip install 'qrhash[train]'"
        )
    try:
        build_app()(prog_name="qrhash")
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            _leave()  # Threads that read ahead may still be running; nobody waits for them.
        raise


def _interrupted_early(*_: Any) -> None:
    print("Interrupted before training began; nothing was written.", file=sys.stderr)
    _leave()


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_INTERRUPTED)


def build_app() -> "typer.Typer":
    """The typer application."""
    import typer

    app = typer.Typer(
        help="Compositional embeddings: a vector for every id, from a few small tables.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            print(f"qrhash {qrhash.__version__}")
            raise typer.Exit

    @app.callback()
    def callback(
        version: Annotated[
            bool,
            typer.Option(
                "--version", callback=show_version, is_eager=True, help="Show the version."
            ),
        ] = False,
    ) -> None:
        pass

    app.command()(_train_command())
    app.command()(_predict_command())
    return app


def _train_command() -> Any:
    """`train`, with one option for each field of the settings."""
    import typer

    from qrhash.ctr.settings import options

    def train(config: Path | None = None, **given: Any) -> None:
        """Train DLRM, DCN-v2 or two towers on a table of events, with compressed embeddings.

        Columns are inferred, shown before training, and said otherwise by options. Without --data
        the rows are synthetic, and the best possible scores are known.
        """
        code = _run(config, {name: value for name, value in given.items() if value is not None})
        raise typer.Exit(code)

    def parameter(name: str, kind: Any, **option: Any) -> inspect.Parameter:
        annotation = Annotated[kind, typer.Option(f"--{name.replace('_', '-')}", **option)]
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
        )

    parameters = [
        parameter(
            "config",
            Path | None,
            help="TOML file with any of these options, and a section columns.NAME for each "
            "column that differs. The command line wins over it.",
        )
    ]
    for name, kind, default, option in options():
        parameters.append(
            parameter(
                name,
                kind | None,
                help=option.help if default is None else f"{option.help} Default: {default}.",
                rich_help_panel=option.panel,
                show_default=False,
            )
        )
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {each.name: each.annotation for each in parameters}
    return train


def _predict_command() -> Any:
    """`predict`."""
    import typer

    def predict(
        run: Annotated[Path, typer.Option(help="Directory of a run of qrhash train.")],
        data: Annotated[str, typer.Option(help="File, folder or pattern with the run's columns.")],
        output: Annotated[
            Path, typer.Option(help="Where the scores go: a file ending in .parquet or .csv.")
        ] = Path("scores.parquet"),
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Whether there may be such a file.")
        ] = False,
        max_bad_lines: Annotated[
            int | None,
            typer.Option(
                min=0, help="Malformed lines to skip before giving up. Default: as in the run."
            ),
        ] = None,
    ) -> None:
        """Write the score of every row of some data, by the last checkpoint of a run.

        Each row has its number, from 0, the logit and the probability of a click, and its label,
        if there is one. Of a run of --model two-tower, each row has the score of its query and its
        item, which is no probability.
        """
        raise typer.Exit(_predict(run, data, output, overwrite, max_bad_lines))

    return predict


def _predict(run: Path, data: str, output: Path, overwrite: bool, max_bad_lines: int | None) -> int:
    """Writes scores; returns the exit code."""
    from rich.console import Console

    from qrhash.ctr.run.display import Display
    from qrhash.ctr.run.predict import predict, report

    console = Console(stderr=True)
    display = Display(console)

    def write() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with display:
            result = predict(
                run, data, output, display, overwrite=overwrite, max_bad_lines=max_bad_lines
            )
        display.line(report(result, output))

    return _guarded(write, console)


def _guarded(action: Callable[[], None], console: "Console") -> int:
    """Runs it; returns the exit code, and says in a sentence what went wrong."""
    from rich.console import Console

    from qrhash.ctr.errors import UserError

    # Orbax logs, with a traceback, what it raises all the same: an interrupt, say.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        action()
    except (UserError, OSError, MemoryError) as error:
        Console(stderr=True).print(
            f"Error: {error or 'out of memory.'}", markup=False, highlight=False, soft_wrap=True
        )
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted.", markup=False, highlight=False, soft_wrap=True)
        return _INTERRUPTED
    return 0


def _run(config: Path | None, given: dict[str, Any]) -> int:
    """Trains; returns the exit code."""
    from rich.console import Console

    from qrhash.ctr.config_file import load
    from qrhash.ctr.run.devices import connect
    from qrhash.ctr.run.display import Display
    from qrhash.ctr.run.report import METRICS, PICTURE, RunDirectory, final_table
    from qrhash.ctr.run.train import fit

    console = Console(stderr=True)
    display = Display(console)
    directory: RunDirectory | None = None

    def train() -> None:
        nonlocal directory
        settings = load(config, given)
        console.quiet = bool(settings.process_id)  # Of several processes the first one speaks.
        directory = RunDirectory(
            settings.output_dir,
            resume=settings.resume,
            is_writer=not settings.process_id,
            begun=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        if settings.resume:
            settings = load(config, given, directory.settings)
        connect(settings, display)
        with directory, display:
            summary = fit(settings, display, directory)
        if not settings.process_id:
            Console().print(final_table(summary))

    try:
        return _guarded(train, console)
    finally:
        if directory is not None and directory.path is not None:
            display.line(f"{METRICS} and {PICTURE} are in {directory.path}")
