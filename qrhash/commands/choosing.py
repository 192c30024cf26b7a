"""`qrhash plan` and `qrhash compare`."""

import signal
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from qrhash.commands.parameters import of_settings, parameter, split, with_parameters
from qrhash.commands.running import shown
from qrhash.ctr.compare_settings import NOT_COMPARED, CompareOptions
from qrhash.ctr.config_file import load
from qrhash.ctr.options import offered
from qrhash.ctr.plan_settings import PLANNED_BY, PlanOptions
from qrhash.ctr.run.display import Display
from qrhash.ctr.settings import options


def plan_command() -> Any:
    """`plan`, with its own options and those of the settings that say what the columns are."""
    own = offered(PlanOptions)

    def plan(config: Path | None = None, **given: Any) -> None:
        """Choose an embedding for each column, such that all keep a budget of memory.

        Reads the training rows once, or a table of vocabulary sizes. Says which columns to
        compress, how, what that takes of each device and what it is expected to lose, and writes
        the file by which qrhash train builds it:

        qrhash plan --data events.parquet --num-bytes 64MB --output plan.toml --picture plan.png

        qrhash train --config plan.toml
        """
        raise typer.Exit(_plan(config, *split(given, own)))

    data = [each for each in options() if each[-1].panel == "Data" or each[0] in PLANNED_BY]
    return with_parameters(
        plan,
        *map(of_settings, own),
        parameter(
            "config",
            Path | None,
            help="TOML file of qrhash train to begin with: the plan replaces its embeddings.",
        ),
        *(of_settings(each) for each in data if each[0] != "synthetic_rows"),
    )


def _plan(config: Path | None, given: dict[str, Any], of_plan: dict[str, Any]) -> int:
    """Plans; returns the exit code."""
    from qrhash.ctr.run.plan import run

    def plan(display: Display) -> None:
        for each in run(load(config, given), PlanOptions(**of_plan), display):
            Console().print(each)

    return shown(plan)


def compare_command() -> Any:
    """`compare`, with its own options and those of the settings that all trainings share."""
    own = offered(CompareOptions)

    def compare(config: Path | None = None, **given: Any) -> None:
        """Train with several embeddings of several sizes and seeds, and compare their losses.

        Full tables, the hash trick, quotient and remainder by each operation, mixed radix and
        tables that grow, each at the same bytes. What is finished stays finished: the same command
        goes on where it was stopped. Leaves a table, a picture and the figures as JSON:

        qrhash compare --data events.parquet --compressions 4,16 --seeds 3
        """
        raise typer.Exit(_compare(config, *split(given, own)))

    return with_parameters(
        compare,
        *map(of_settings, own),
        parameter("config", Path | None, help="TOML file of qrhash train, for all trainings."),
        *(of_settings(each) for each in options() if each[0] not in NOT_COMPARED),
    )


def _compare(config: Path | None, given: dict[str, Any], of_all: dict[str, Any]) -> int:
    """Trains and compares; returns the exit code."""
    from qrhash.ctr.run.compare import compare
    from qrhash.ctr.run.compare_report import FIGURES, PICTURE, compared, table_of, write

    def run(display: Display) -> None:
        # Trainings end with what has begun them, however that is ended.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        options = CompareOptions(**of_all)
        with display:
            outcomes = compare(load(config, given), options, display)
        rows = compared(outcomes)
        write(outcomes, rows, Path(options.output_dir))
        Console().print(table_of(rows, options.seeds))
        display.line(f"{FIGURES} and {PICTURE} are in {options.output_dir}")

    return shown(run)
