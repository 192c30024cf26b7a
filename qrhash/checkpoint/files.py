"""Files of a checkpoint that somebody else writes and reads, beside its arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

FILES = "files"

WriteFiles = Callable[[Path], None]
ReadFiles = Callable[[Path], Any]


class _Handler(ocp.CheckpointHandler):
    """Lets a function write into the directory, while the checkpoint is not there yet."""

    def save(self, directory: Any, args: "FilesSave") -> None:
        """See `ocp.CheckpointHandler`."""
        args.write(Path(directory))

    def restore(self, directory: Any, args: Any = None) -> Any:
        """See `ocp.CheckpointHandler`: the files are read by whom they are of."""
        raise NotImplementedError


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclass
class FilesSave(ocp.args.CheckpointArgs):
    """Who writes the files, into a directory that is given."""

    write: WriteFiles
