"""`qrhash train` and `qrhash predict`."""

import signal
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from qrhash.commands.interrupts import INTERRUPTED, Interrupts
from qrhash.commands.parameters import (
    Directory,
    Run,
    in_paragraphs,
    of_settings,
    parameter,
    run_of,
    split,
    with_parameters,
)
from qrhash.commands.running import guarded, shown
from qrhash.ctr.config_file import load
from qrhash.ctr.run.display import Display
from qrhash.ctr.settings import options


def train_command() -> Any:
    """`train`, with one option for each field of the settings."""

    def train(config: Path | None = None, **given: Any) -> None:
        """Train DLRM, DCN-v2 or two towers on a table of events, with compressed embeddings.

        Columns are inferred, shown before training, and said otherwise by options. Without --data
        the rows are synthetic, and the best possible scores are known.
        """
        raise typer.Exit(_run(config, split(given, ())[0]))

    return with_parameters(
        train,
        parameter(
            "config",
            Path | None,
            help="TOML file with any of these options, and a section columns.NAME for each "
            "column that differs. The command line wins over it.",
        ),
        *map(of_settings, options()),
    )


def _run(config: Path | None, given: dict[str, Any]) -> int:
    """Trains; returns the exit code."""
    from qrhash.ctr.run.devices import connect
    from qrhash.ctr.run.report import RunDirectory, final_table
    from qrhash.ctr.run.train import fit

    console = Console(stderr=True)
    directory: RunDirectory | None = None

    def left() -> list[str]:
        if directory is None or directory.path is None:
            return []
        return [line for line in (directory.note, directory.going_on) if line]

    interrupts = Interrupts(left)
    display = Display(console, check=interrupts.check)

    def train() -> None:
        nonlocal directory
        settings = load(config, given)
        console.quiet = bool(settings.process_id)  # Of several processes the first one speaks.
        directory = RunDirectory(
            settings.output_dir,
            resume=settings.resume,
            is_writer=not settings.process_id,
            begun=lambda: signal.signal(signal.SIGINT, interrupts),
        )
        if settings.resume:
            settings = load(config, given, directory.settings)
        connect(settings, display)
        with directory, display:
            summary = fit(settings, display, directory)
        if not settings.process_id:
            Console().print(final_table(summary))

    code = guarded(train, console)
    if code in (0, INTERRUPTED):
        for line in left() if code else left()[:1]:
            display.line(line)
    return code


def predict_command() -> Any:
    """`predict`."""

    def predict(
        *,
        directory: Directory = None,
        run: Run = None,
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
        raise typer.Exit(_predict((directory, run), data, output, overwrite, max_bad_lines))

    return in_paragraphs(predict)


def _predict(
    runs: tuple[Path | None, Path | None],
    data: str,
    output: Path,
    overwrite: bool,
    max_bad_lines: int | None,
) -> int:
    """Writes scores; returns the exit code."""
    from qrhash.ctr.run.predict import predict, report

    def write(display: Display) -> None:
        with display:
            result = predict(
                run_of(*runs),
                data,
                output,
                display,
                overwrite=overwrite,
                max_bad_lines=max_bad_lines,
            )
        display.line(report(result, output))

    return shown(write)
