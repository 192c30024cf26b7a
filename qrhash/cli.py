"""The command line: `qrhash train`, `predict`, `export`, `serve` and the others.

The options of `train` are the fields of `qrhash.ctr.settings.Settings`; an option that is not given
leaves the word to the configuration file, and then to the default.
"""

import importlib.util
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import qrhash
from qrhash.commands.interrupts import INTERRUPTED, interrupted_early, leave

if TYPE_CHECKING:
    import typer

_TRAIN_EXTRA = ("flatbuffers", "grain", "matplotlib", "pyarrow", "rich", "safetensors", "typer")


def main() -> None:
    """Entry point of the console script."""
    # Until a run has something to keep, an interrupt ends it at once, whoever is being imported.
    signal.signal(signal.SIGINT, interrupted_early)
    missing = [name for name in _TRAIN_EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"qrhash needs {', '.join(missing)}; install them with: pip install 'qrhash[train]'"
        )
    try:
        build_app()(prog_name="qrhash")
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            leave()
        raise


def build_app() -> "typer.Typer":
    """The typer application."""
    import typer

    from qrhash.commands.choosing import compare_command, plan_command
    from qrhash.commands.converting import convert_command
    from qrhash.commands.exporting import export_command
    from qrhash.commands.inspecting import inspect_command
    from qrhash.commands.serving import bench_serve_command, serve_command
    from qrhash.commands.training import predict_command, train_command

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

    commands = (
        *(train_command, predict_command, inspect_command, export_command),
        *(convert_command, plan_command, compare_command),
        *(serve_command, bench_serve_command),
    )
    for make in commands:
        command = make()
        app.command(command.__name__.replace("_", "-"))(command)
    return app
