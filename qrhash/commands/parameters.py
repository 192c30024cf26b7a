"""Options of dataclasses as parameters that typer understands."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from qrhash.ctr.errors import UserError

# The directory of a run, by its place on the command line, or by --run.
Directory: TypeAlias = Annotated[
    Path | None,
    typer.Argument(metavar="RUN", help="Directory of a run of qrhash train.", show_default=False),
]
Run: TypeAlias = Annotated[Path | None, typer.Option(help="The same, as an option.")]


def run_of(directory: Path | None, run: Path | None) -> Path:
    """The directory of a run, given in one way or the other.

    Raises:
      UserError: it was given in neither, or in both.
    """
    if (directory is None) == (run is None):
        given = "neither" if run is None else f"{directory} and {run}"
        raise UserError(f"One run must be given, as RUN or with --run, got {given}.")
    found = directory or run
    assert found is not None
    return found


def split(given: dict[str, Any], own: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options given: those of the settings, and those of a command's own."""
    names = {name for name, *_ in own}
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, value in given.items():
        if value is not None:
            parts[name in names][name] = value
    return parts


def in_paragraphs(command: Any) -> Any:
    """A command whose help is wrapped by whoever shows it."""
    paragraphs = inspect.cleandoc(command.__doc__).split("\n\n")
    command.__doc__ = "\n\n".join(" ".join(each.split()) for each in paragraphs)
    return command


def with_parameters(command: Any, *parameters: inspect.Parameter) -> Any:
    """A command that typer takes to have these parameters."""
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return in_paragraphs(command)


def parameter(name: str, kind: Any, **option: Any) -> inspect.Parameter:
    """A parameter, `--name` of a type; further arguments are `typer.Option`'s."""
    annotation = Annotated[kind, typer.Option(f"--{name.replace('_', '-')}", **option)]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def of_settings(offered: tuple[str, Any, Any, Any]) -> inspect.Parameter:
    """The parameter of an option of the settings."""
    name, kind, default, option = offered
    return parameter(
        name,
        kind | None,
        help=option.help if default is None else f"{option.help} Default: {default}.",
        rich_help_panel=option.panel,
        show_default=False,
    )
