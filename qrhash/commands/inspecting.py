"""`qrhash inspect`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from qrhash.commands.parameters import Directory, Run, in_paragraphs, run_of
from qrhash.commands.running import shown
from qrhash.ctr.run.display import Display


def inspect_command() -> Any:
    """`inspect`."""

    def inspect(
        directory: Directory = None,
        run: Run = None,
        data: Annotated[
            str | None,
            typer.Option(
                help="File, folder or pattern with the run's columns, to be scored. Default: the "
                "rows that the run was tested on."
            ),
        ] = None,
        columns: Annotated[
            str, typer.Option(help="Columns to look at: a,b. Default: all that are embedded.")
        ] = "",
        neighbours: Annotated[
            list[str] | None,
            typer.Option(
                metavar="COLUMN=VALUE",
                help="Name the ids whose vectors are nearest to that of a value of a column. May "
                "be given several times.",
            ),
        ] = None,
        top: Annotated[int, typer.Option(min=1, help="How many neighbours to name.")] = 10,
        compared: Annotated[
            int,
            typer.Option(
                min=2,
                help="How many ids of a column are compared, each with each: the most frequent.",
            ),
        ] = 10_000,
        output_dir: Annotated[
            Path | None,
            typer.Option(help="Where picture and figures go. Default: the directory of the run."),
        ] = None,
    ) -> None:
        """Look at the embeddings of a run: which ids collide, which rows are hot, or idle.

        Counts how often the training met each id. Says of every column which ids share all their
        rows, or have nearly the same vector; how long vectors are; which rows most look-ups go to,
        and who shares them; and how good the model is for ids that are met often, and seldom:

        qrhash inspect runs/first --neighbours user=17
        """
        options = {
            "data": data,
            "columns": columns,
            "neighbours": neighbours or (),
            "top": top,
            "compared": compared,
        }
        raise typer.Exit(_inspect(directory, run, output_dir, options))

    return in_paragraphs(inspect)


def _inspect(
    directory: Path | None, run: Path | None, output_dir: Path | None, options: dict[str, Any]
) -> int:
    """Looks, and writes what was seen; returns the exit code."""
    from qrhash.ctr.run.inspect import inspect
    from qrhash.ctr.run.inspect_report import FIGURES, PICTURE, check_output, write
    from qrhash.ctr.run.inspect_report import shown as tables_of

    def look(display: Display) -> None:
        path = run_of(directory, run)
        output = output_dir or path
        check_output(output)
        with display:
            found = inspect(path, display, **options)
        write(found, output)
        for each in tables_of(found):
            Console().print(each)
        display.line(f"{FIGURES} and {PICTURE} are in {output}")

    return shown(look)
