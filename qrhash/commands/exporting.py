"""`qrhash export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qrhash.commands.parameters import in_paragraphs
from qrhash.commands.running import shown
from qrhash.ctr.options import split_names
from qrhash.ctr.run.display import Display


def export_command() -> Any:
    """`export`."""

    def export(
        run: Annotated[
            Path,
            typer.Argument(
                metavar="RUN", help="Directory of a run of qrhash train.", show_default=False
            ),
        ],
        directory: Annotated[
            Path,
            typer.Argument(metavar="DIR", help="Directory to be made of it.", show_default=False),
        ],
        rows: Annotated[
            str,
            typer.Option(
                help="How the snapshot of the embeddings keeps its rows: float32, bfloat16, int8 "
                "or int4."
            ),
        ] = "float32",
        platforms: Annotated[
            str, typer.Option(help="Platforms that the model is compiled for: a,b.")
        ] = "cpu,cuda,tpu",
        also: Annotated[
            str,
            typer.Option(
                help="Formats of other systems to write the model in too: savedmodel,onnx. They "
                "need 'qrhash\\[savedmodel]' and 'qrhash\\[onnx]'.",
            ),
        ] = "",
        overwrite: Annotated[
            bool,
            typer.Option("--overwrite", help="Whether an earlier export is to be replaced."),
        ] = False,
    ) -> None:
        """Write a trained model as files that run without qrhash.

        The function that gives scores, compiled for any number of rows, its weights, the
        vocabularies, a few rows to try it on, and a README with the lines that run it; and a
        snapshot of the embeddings, to look vectors up without JAX:

        qrhash export runs/first model
        """
        raise typer.Exit(_export(run, directory, rows, platforms, also, overwrite))

    return in_paragraphs(export)


def _export(
    run: Path, directory: Path, rows: str, platforms: str, also: str, overwrite: bool
) -> int:
    """Writes the files; returns the exit code."""
    from qrhash.ctr.run.exported import export_run, report

    def write(display: Display) -> None:
        with display:
            result = export_run(
                run,
                directory,
                display,
                rows=rows,
                platforms=split_names(platforms),
                also=split_names(also),
                overwrite=overwrite,
            )
        display.line(report(result))

    return shown(write)
