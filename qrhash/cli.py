"""The command line: `qrhash train`, `predict`, `plan` and `compare`.

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
    app.command()(_plan_command())
    app.command()(_compare_command())
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

    return _with_parameters(
        train,
        _parameter(
            "config",
            Path | None,
            help="TOML file with any of these options, and a section columns.NAME for each "
            "column that differs. The command line wins over it.",
        ),
        *map(_of_settings, options()),
    )


def _with_parameters(command: Any, *parameters: inspect.Parameter) -> Any:
    """A command that typer takes to have these parameters."""
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def _parameter(name: str, kind: Any, **option: Any) -> inspect.Parameter:
    import typer

    annotation = Annotated[kind, typer.Option(f"--{name.replace('_', '-')}", **option)]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _of_settings(offered: tuple[str, Any, Any, Any]) -> inspect.Parameter:
    """The parameter of an option of the settings."""
    name, kind, default, option = offered
    return _parameter(
        name,
        kind | None,
        help=option.help if default is None else f"{option.help} Default: {default}.",
        rich_help_panel=option.panel,
        show_default=False,
    )


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


def _plan_command() -> Any:
    """`plan`, with its own options and those of the settings that say what the columns are."""
    from dataclasses import fields

    import typer

    from qrhash.ctr.options import options_of
    from qrhash.ctr.plan_settings import PLANNED_BY, PlanOptions
    from qrhash.ctr.settings import options

    own = {each.name: each.default for each in fields(PlanOptions)}

    def plan(config: Path | None = None, **given: Any) -> None:
        """Choose an embedding for each column, such that all keep a budget of memory.

        Reads the training rows once, or a table of vocabulary sizes. Says which columns to
        compress, how, what that takes of each device and what it is expected to lose, and writes
        the file by which qrhash train builds it:

        qrhash plan --data events.parquet --num-bytes 64MB --output plan.toml --picture plan.png

        qrhash train --config plan.toml
        """
        given = {name: value for name, value in given.items() if value is not None}
        of_plan = {name: given.pop(name) for name in own.keys() & given.keys()}
        raise typer.Exit(_plan(config, given, of_plan))

    data = [each for each in options() if each[-1].panel == "Data" or each[0] in PLANNED_BY]
    return _with_parameters(
        plan,
        *(_of_settings((name, kind, own[name], of)) for name, kind, of in options_of(PlanOptions)),
        _parameter(
            "config",
            Path | None,
            help="TOML file of qrhash train to begin with: the plan replaces its embeddings.",
        ),
        *(_of_settings(each) for each in data if each[0] != "synthetic_rows"),
    )


def _plan(config: Path | None, given: dict[str, Any], of_plan: dict[str, Any]) -> int:
    """Plans; returns the exit code."""
    from rich.console import Console

    from qrhash.ctr.config_file import load
    from qrhash.ctr.plan_settings import PlanOptions
    from qrhash.ctr.run.display import Display
    from qrhash.ctr.run.plan import run

    console = Console(stderr=True)

    def plan() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for shown in run(load(config, given), PlanOptions(**of_plan), Display(console)):
            Console().print(shown)

    return _guarded(plan, console)


def _compare_command() -> Any:
    """`compare`, with its own options and those of the settings that all trainings share."""
    from dataclasses import fields

    import typer

    from qrhash.ctr.compare_settings import NOT_COMPARED, CompareOptions
    from qrhash.ctr.options import options_of
    from qrhash.ctr.settings import options

    own = {each.name: each.default for each in fields(CompareOptions)}

    def compare(config: Path | None = None, **given: Any) -> None:
        """Train with several embeddings of several sizes and seeds, and compare their losses.

        Full tables, the hash trick, quotient and remainder by each operation, mixed radix and
        tables that grow, each at the same bytes. What is finished stays finished: the same command
        goes on where it was stopped. Leaves a table, a picture and the figures as JSON:

        qrhash compare --data events.parquet --compressions 4,16 --seeds 3
        """
        given = {name: value for name, value in given.items() if value is not None}
        of_all = {name: given.pop(name) for name in own.keys() & given.keys()}
        raise typer.Exit(_compare(config, given, of_all))

    shared = [each for each in options() if each[0] not in NOT_COMPARED | own.keys()]
    return _with_parameters(
        compare,
        *(
            _of_settings((name, kind, own[name], of))
            for name, kind, of in options_of(CompareOptions)
        ),
        _parameter("config", Path | None, help="TOML file of qrhash train, for all trainings."),
        *map(_of_settings, shared),
    )


def _compare(config: Path | None, given: dict[str, Any], of_all: dict[str, Any]) -> int:
    """Trains and compares; returns the exit code."""
    from rich.console import Console

    from qrhash.ctr.compare_settings import CompareOptions
    from qrhash.ctr.config_file import load
    from qrhash.ctr.run.compare import compare
    from qrhash.ctr.run.compare_report import FIGURES, PICTURE, compared, table_of, write
    from qrhash.ctr.run.display import Display

    console = Console(stderr=True)

    def run() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        options = CompareOptions(**of_all)
        with Display(console) as display:
            outcomes = compare(load(config, given), options, display)
        rows = compared(outcomes)
        write(outcomes, rows, Path(options.output_dir))
        Console().print(table_of(rows, options.seeds))
        display.line(f"{FIGURES} and {PICTURE} are in {options.output_dir}")

    return _guarded(run, console)


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
