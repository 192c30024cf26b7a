"""`qrhash convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qrhash.commands.parameters import in_paragraphs
from qrhash.commands.running import shown
from qrhash.ctr.errors import UserError
from qrhash.ctr.run.display import Display

_SYSTEMS = ("dlrm", "deeprec", "tables")


def convert_command() -> Any:
    """`convert`."""

    def convert(
        source: Annotated[
            Path,
            typer.Argument(
                help="File of PyTorch (.pt), Keras (.h5, .keras), safetensors or NumPy (.npz), or "
                "the prefix of a checkpoint of TensorFlow.",
                show_default=False,
            ),
        ],
        output: Annotated[
            Path,
            typer.Argument(help="Snapshot to be written: NAME.safetensors.", show_default=False),
        ],
        system: Annotated[
            str,
            typer.Option(
                "--from",
                help="What it is of: dlrm, deeprec, or tables: full tables of any system.",
            ),
        ],
        operation: Annotated[
            str | None,
            typer.Option(
                help="How rows were combined: mult, add or concat. Default: mult of DLRM, add of "
                "DeepRec."
            ),
        ] = None,
        name: Annotated[
            list[str] | None,
            typer.Option(
                metavar="NAME=ARRAY",
                help="With --from tables: name of an embedding, and of its array in the source. "
                "May be given several times. Default: those whose names say so.",
            ),
        ] = None,
        float32_division: Annotated[
            bool,
            typer.Option(
                "--float32-division",
                help="With --from dlrm: give ids above 2**24 the same wrong rows that DLRM does.",
            ),
        ] = False,
        rows: Annotated[
            str, typer.Option(help="How rows are kept: float32, bfloat16, int8 or int4.")
        ] = "float32",
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Whether there may be such a file.")
        ] = False,
    ) -> None:
        """Carry the embeddings of another system over, into a snapshot.

        Their vectors stay as they are, to the last digit of the format of the rows:

        qrhash convert dlrm.pt items.safetensors --from dlrm --operation mult
        """
        options = {
            "operation": operation,
            "names": name or [],
            "float32_division": float32_division,
        }
        raise typer.Exit(_convert(source, output, system, options, rows, overwrite))

    return in_paragraphs(convert)


def _convert(
    source: Path,
    output: Path,
    system: str,
    options: dict[str, Any],
    rows: str,
    overwrite: bool,
) -> int:
    """Writes the snapshot; returns the exit code."""

    def write(display: Display) -> None:
        from qrhash import export, importing

        if system not in _SYSTEMS:
            raise UserError(f"--from must be one of {', '.join(_SYSTEMS)}, got {system}.")
        if rows not in export.ROW_FORMATS:
            raise UserError(f"--rows must be one of {', '.join(export.ROW_FORMATS)}, got {rows}.")
        if output.exists() and not overwrite:
            raise UserError(f"{output} exists; choose another file, or --overwrite it.")
        if not output.parent.is_dir():
            raise UserError(f"There is no directory {output.parent} for {output.name}.")
        with display:
            display.phase(f"reading {source}", 0)
            try:
                carried = _carried(importing.read_arrays(source), system, options)
                display.phase("writing the snapshot", 0)
                exported = {name: each.exported() for name, each in carried.items()}
                export.save(output, exported, rows=rows)
            except (ValueError, ImportError) as error:
                raise UserError(str(error)) from error
            display.table(str(output), ("embedding", "is", "features"), _lines(carried))

    return shown(write)


def _carried(arrays: Any, system: str, options: dict[str, Any]) -> dict[str, Any]:
    from qrhash import importing

    operation, names = options["operation"], options["names"]
    if names and system != "tables":
        raise UserError(f"--name goes with --from tables, not with {system}.")
    if options["float32_division"] and system != "dlrm":
        raise UserError(f"--float32-division goes with --from dlrm, not with {system}.")
    if system == "tables":
        if operation is not None:
            raise UserError("--operation goes with --from dlrm and deeprec, not with tables.")
        if wrong := [each for each in names if not all(each.partition("="))]:
            raise UserError(f"--name must be NAME=ARRAY, got {wrong[0]}.")
        pairs = dict(each.split("=", 1) for each in names)
        return dict(importing.from_full_tables(arrays, pairs or None))
    given = {} if operation is None else {"operation": operation}
    if system == "dlrm":
        flag = options["float32_division"]
        return dict(importing.from_dlrm(arrays, float32_division=flag, **given))
    return dict(importing.from_deeprec(arrays, **given))


def _lines(carried: dict[str, Any]) -> list[tuple[str, str, str]]:
    lines = []
    for name, each in carried.items():
        config = each.config
        if hasattr(config, "partition"):
            rows = " + ".join(f"{rows:,}" for rows, _ in config.table_shapes)
            what = f"{type(config.partition).__name__} of {rows} rows"
            what += f", {config.operation}" if len(config.table_shapes) > 1 else ""
        else:
            what = f"{config.capacity:,} keys"
        lines.append((name, what, str(config.features)))
    return lines
