"""`Checkpoints`: saved in the background, restored on any mesh."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp

from qrhash.arithmetic import as_size
from qrhash.checkpoint.damage import reason
from qrhash.checkpoint.files import FILES, FilesSave, ReadFiles, WriteFiles
from qrhash.checkpoint.leaves import (
    STATE,
    check_present,
    empty,
    from_file,
    in_file,
    is_empty,
    leaves_of,
    restore_args,
    signature,
    with_arrays,
)
from qrhash.checkpoint.metadata import MismatchError, check_extra, compare, describe
from qrhash.checkpoint.shards import Moved, admissions_of, moved_states
from qrhash.checkpoint.writing import finish, unfinished, writing
from qrhash.config import EmbedConfig
from qrhash.dynamic.config import DynamicConfig
from qrhash.stacks import CollectionConfig

_METADATA = "metadata"

# Errors of a restore that tell nothing of the files.
_NOT_DAMAGE = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)


class Restored(NamedTuple):
    """What `Checkpoints.restore` gives.

    Attributes:
      step: the step it was saved at.
      state: the tree.
      extra: what was saved beside it.
      damaged: a sentence about each later checkpoint that cannot be read; these are set aside, as
        "<step>.damaged".
    """

    step: int
    state: Any
    extra: Any
    damaged: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one training, in a directory of their own.

    Args:
      directory: where they are, or are to be; with several processes, one that all of them see.
      config: the model's `EmbedConfig`, `DynamicConfig`, `CollectionConfig`, or mapping of names to
        configs.
      max_to_keep: how many to keep, the latest ones; None: all.

    A program does not end before what was saved is written, also without `close`; if it cannot be
    written, its exit code is 1.

    Raises:
      ValueError: it is no such config, or none are to be kept.
      OSError: there is no such directory, and it cannot be made.
    """

    def __init__(
        self,
        directory: str | Path,
        config: EmbedConfig | DynamicConfig | CollectionConfig | Mapping[str, Any],
        *,
        max_to_keep: int | None = 3,
    ) -> None:
        self.directory = Path(directory).absolute()
        self._features = describe(config)
        self._admissions = admissions_of(config)
        # Stacks hold the tables of features in this order; a feature that shares has none.
        self._order = [name for name, one in self._features.items() if not isinstance(one, str)]
        if max_to_keep is not None:
            max_to_keep = as_size("max_to_keep", max_to_keep)
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        self._is_closed = False
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=(STATE, _METADATA, FILES),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=max_to_keep,
                enable_async_checkpointing=True,
                create=True,
                # Otherwise threads wait for minutes for the directories of a save that failed.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in order; the last may be still on its way."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: Any, extra: Any = None, *, files: WriteFiles | None = None
    ) -> None:
        """Saves a tree; returns when it may be changed, and writes on in the background.

        Args:
          step: the number of the step, above those before; saving the last one again does nothing.
          state: a tree of arrays, `ShardedTable`s, numbers of NumPy and Python, and variables of
            `flax.nnx`, as the parameters and the optimizer state are.
          extra: anything that JSON can hold; a tuple comes back as a list.
          files: writes files that belong to the checkpoint into a directory that it is given, such
            as `Tiered.save`; they are there once it has returned, and the checkpoint is complete.

        Raises:
          ValueError: JSON cannot hold `extra`, the step is negative or below the last one, or the
            tree holds nothing, or what is no number, or one too large.
          OSError: this checkpoint or the one before could not be written.
        """
        self._check_open()
        check_extra(extra)
        step = as_size("step", step, minimum=0)
        leaves = leaves_of(state)
        if not leaves:
            raise ValueError(f"state must hold arrays or numbers, got {state!r}.")
        for name, leaf in leaves.items():
            check_present(name, leaf)
        self.wait()
        last = max(self.steps, default=-1)
        if step == last:
            return
        if step < last:
            raise ValueError(
                f"step must be above the last one saved in {self.directory}, {last}, got {step}: "
                "use another directory."
            )
        arrays = {name: in_file(leaf) for name, leaf in leaves.items() if not is_empty(leaf)}
        metadata = {
            "features": self._features,
            "order": self._order,
            "arrays": {name: signature(leaf) for name, leaf in leaves.items()},
            "extra": extra,
        }
        args: dict[str, Any] = {_METADATA: ocp.args.JsonSave(metadata)}
        if arrays:
            args[STATE] = ocp.args.PyTreeSave(arrays)
        if files is not None:
            args[FILES] = FilesSave(files)
        unfinished[self._manager] = self.directory
        with writing(self.directory):
            self._manager.save(step, args=ocp.args.Composite(**args))

    def restore(
        self, like: Any, step: int | None = None, *, files: ReadFiles | None = None
    ) -> Restored:
        """Reads a checkpoint onto the devices that a tree is on, or is to be on.

        Args:
          like: a tree as it was saved, of arrays or of `jax.ShapeDtypeStruct`s with shardings. Each
            leaf comes back as what stands here: a JAX array, a NumPy array or scalar, a number of
            Python. Where JAX has no such dtype (64 bits without jax_enable_x64), a
            `jax.ShapeDtypeStruct` gives a NumPy array.
          step: which one; by default the last one that can be read.
          files: reads what was written beside it, of the directory that it is given; what it raises
            means that the checkpoint is damaged.

        Raises:
          ValueError: the tree holds what is no number.
          MismatchError: it is of another model, or was saved without files, or there is none.
          OSError: it is damaged, and so is every earlier one; with several processes, of which
            each may see another damage, none earlier is tried.
        """
        self._check_open()
        self.wait()
        leaves = leaves_of(like)
        steps = [step] if step is not None else self.steps[::-1]
        if not steps or (step is not None and step not in self.steps):
            wanted = "no complete checkpoint" if step is None else f"no checkpoint of step {step}"
            there = f"; there are those of steps {self.steps}" if self.steps else ""
            raise MismatchError(f"{self.directory} holds {wanted}{there}.")
        damaged: list[str] = []
        for each in steps:
            path = self.directory / str(each)
            try:
                metadata = self._read_metadata(each)
                moved = moved_states(like, metadata["arrays"], self._admissions)
                in_file = _as_in_file(leaves, moved)
                self._check_arrays(path, metadata["arrays"], in_file)
                arrays = empty(in_file)
                only_state = restore_args(in_file)
                if only_state is not None:
                    arrays |= self._manager.restore(each, args=only_state)[STATE]
                if files is not None:
                    _check_files(path)
                    files(path / FILES)
            except (MismatchError, *_NOT_DAMAGE):
                raise
            # Whatever the libraries underneath make of a file that is not as it was written.
            except Exception as error:
                damaged.append(f"Checkpoint {path} is damaged: {reason(error, path)}.")
                if len(steps) > 1 and jax.process_count() > 1:
                    advice = "move it away, then the one before it is read."
                    raise OSError(f"{damaged[0][:-1]}; {advice}") from error
            else:
                read = {name: from_file(leaf, arrays[name]) for name, leaf in in_file.items()}
                for table in moved:
                    read |= table.dealt(path, read)
                state = with_arrays(like, read)
                self._set_aside(steps[: len(damaged)])
                return Restored(each, state, metadata["extra"], tuple(damaged))
        raise OSError(" ".join(damaged))

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Renames damaged checkpoints, so that training can save those steps again."""
        for step in steps:
            path = self.directory / str(step)
            shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
            path.rename(path.with_suffix(".damaged"))
        if steps:
            self._manager.reload()

    def _read_metadata(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays, once it is sure that it is of these features."""
        only_metadata = ocp.args.Composite(**{_METADATA: ocp.args.JsonRestore()})
        metadata: dict[str, Any] = self._manager.restore(step, args=only_metadata)[_METADATA]
        where = self.directory / str(step)
        compare(where, "feature", metadata["features"], self._features)
        if metadata["order"] != self._order:
            raise MismatchError(
                f"{where} is of another model: the order of its features is {metadata['order']} in "
                f"the checkpoint, {self._order} in the model."
            )
        return metadata

    def _check_arrays(self, where: Path, saved: Mapping[str, Any], leaves: Any) -> None:
        """Raises a MismatchError unless a file holds these arrays."""
        signatures = {
            # A number of Python is of no dtype: here is which one held the number saved.
            name: saved[name]
            if type(leaf) is int and saved.get(name) == {"shape": [], "dtype": "uint64"}
            else signature(leaf)
            for name, leaf in leaves.items()
        }
        compare(where, "array", saved, signatures)

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
          OSError: it could not be.
        """
        finish(self._manager, self.directory)

    def close(self) -> None:
        """Waits, and ends the background work; nothing is saved or restored after it.

        Raises:
          OSError: something could not be written.
        """
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self.wait()
        finally:
            self._manager.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError(f"The Checkpoints of {self.directory} are closed: make new ones.")


def _check_files(path: Path) -> None:
    """Raises a MismatchError unless a checkpoint was saved with files."""
    if not (path / FILES).is_dir():
        raise MismatchError(f"{path} holds no files: it was saved without what is to be read.")


def _as_in_file(leaves: Mapping[str, Any], moved: Sequence[Moved]) -> dict[str, Any]:
    """The leaves of a tree, and what the file holds in place of some of them."""
    replaced = {name for table in moved for name in table.names_in_tree}
    in_file = {name: leaf for name, leaf in leaves.items() if name not in replaced}
    for table in moved:
        in_file |= table.in_file
    return in_file
