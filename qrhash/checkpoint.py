"""Checkpoints that restore on any mesh, device count and process count.

A tree of parameters, optimizer state and counters is saved with the configs that give its numbers
their meaning. Tables are kept in the order of their rows, however they were split: what eight
devices wrote one device reads, and the other way round. Orbax does the writing, in the background,
and a checkpoint counts only once all of it is on disk.

    with qrhash.checkpoint.Checkpoints("run/checkpoints", config) as checkpoints:
        checkpoints.save(step, {"params": params, "state": state})
        restored = checkpoints.restore({"params": params, "state": state})

JAX arrays come back as JAX arrays. Whatever else there are numbers of, NumPy's and Python's own,
stays on the host from end to end: JAX would cut its 64 bits to 32.
"""

import atexit
import concurrent.futures.thread
import contextlib
import json
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from qrhash.arithmetic import as_size
from qrhash.collection import CollectionConfig
from qrhash.config import EmbedConfig
from qrhash.nnx import as_table
from qrhash.sharding import is_sharded_table

_STATE, _MEANING = "state", "meaning"

# Errors of a restore that tell nothing of the files.
_NOT_DAMAGE = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)

# What the files can hold; NumPy has wider floats, and JAX other narrow numbers.
_DTYPES = re.compile(
    r"bool|int[24]|u?int(8|16|32|64)|float[48]_\w+|b?float16|float(32|64)|complex(64|128)"
)

# What an id's numbers depend on. The names of logical axes, the mesh and the like do not matter.
_FIELDS = ("partition", "operation", "features", "widths", "use_bias", "param_dtype")


class MismatchError(ValueError):
    """A checkpoint of another model, or none where one is wanted."""


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
      config: the model's `EmbedConfig`, `CollectionConfig`, or mapping of names to configs.
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
        config: EmbedConfig | CollectionConfig | Mapping[str, Any],
        *,
        max_to_keep: int | None = 3,
    ) -> None:
        self.directory = Path(directory).absolute()
        self._features = _describe(config)
        # Stacks hold the tables of features in this order; a feature that shares has none.
        self._order = [name for name, one in self._features.items() if not isinstance(one, str)]
        if max_to_keep is not None:
            max_to_keep = as_size("max_to_keep", max_to_keep)
        with _writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        self._is_closed = False
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=(_STATE, _MEANING),
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in order; the last may be still on its way."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, extra: Any = None) -> None:
        """Saves a tree; returns when it may be changed, and writes on in the background.

        Args:
          step: the number of the step, above those before; saving the last one again does nothing.
          state: a tree of arrays, `ShardedTable`s, numbers of NumPy and Python, and variables of
            `flax.nnx`, as the parameters and the optimizer state are.
          extra: anything that JSON can hold; a tuple comes back as a list.

        Raises:
          ValueError: JSON cannot hold `extra`, the step is negative or below the last one, or the
            tree holds nothing, or what is no number, or one too large.
          OSError: this checkpoint or the one before could not be written.
        """
        self._check_open()
        _check_extra(extra)
        step = as_size("step", step, minimum=0)
        tables = _tables(state)
        if not tables:
            raise ValueError(f"state must hold arrays or numbers, got {state!r}.")
        for name, leaf in tables.items():
            _check_present(name, leaf)
        self.wait()
        last = max(self.steps, default=-1)
        if step == last:
            return
        if step < last:
            raise ValueError(
                f"step must be above the last one saved in {self.directory}, {last}, got {step}: "
                "use another directory."
            )
        arrays = {name: _in_file(leaf) for name, leaf in tables.items() if not _is_empty(leaf)}
        meaning = {
            "features": self._features,
            "order": self._order,
            "arrays": {name: _signature(leaf) for name, leaf in tables.items()},
            "extra": extra,
        }
        args: dict[str, Any] = {_MEANING: ocp.args.JsonSave(meaning)}
        if arrays:
            args[_STATE] = ocp.args.PyTreeSave(arrays)
        _unfinished[self._manager] = self.directory
        with _writing(self.directory):
            self._manager.save(step, args=ocp.args.Composite(**args))

    def restore(self, like: Any, step: int | None = None) -> Restored:
        """Reads a checkpoint onto the devices that a tree is on, or is to be on.

        Args:
          like: a tree as it was saved, of arrays or of `jax.ShapeDtypeStruct`s with shardings. Each
            leaf comes back as what stands here: a JAX array, a NumPy array or scalar, a number of
            Python. Where JAX has no such dtype (64 bits without jax_enable_x64), a
            `jax.ShapeDtypeStruct` gives a NumPy array.
          step: which one; by default the last one that can be read.

        Raises:
          ValueError: the tree holds what is no number.
          MismatchError: it is of another model, or there is none.
          OSError: it is damaged, and so is every earlier one; with several processes, of which
            each may see another damage, none earlier is tried.
        """
        self._check_open()
        self.wait()
        tables = _tables(like)
        only_state = _restore_args(tables)
        steps = [step] if step is not None else self.steps[::-1]
        if not steps or (step is not None and step not in self.steps):
            wanted = "no complete checkpoint" if step is None else f"no checkpoint of step {step}"
            there = f"; there are those of steps {self.steps}" if self.steps else ""
            raise MismatchError(f"{self.directory} holds {wanted}{there}.")
        damaged: list[str] = []
        for each in steps:
            path = self.directory / str(each)
            try:
                extra = self._read_meaning(each, tables)
                arrays = _empty(tables)
                if only_state is not None:
                    arrays |= self._manager.restore(each, args=only_state)[_STATE]
            except (MismatchError, *_NOT_DAMAGE):
                raise
            # Whatever the libraries underneath make of a file that is not as it was written.
            except Exception as error:
                damaged.append(f"Checkpoint {path} is damaged: {_first_line(error)}")
                if len(steps) > 1 and jax.process_count() > 1:
                    advice = "move it away, then the one before it is read."
                    raise OSError(f"{damaged[0]}; {advice}") from error
            else:
                leaves = {name: _from_file(leaf, arrays[name]) for name, leaf in tables.items()}
                state = _with_arrays(like, leaves)
                self._set_aside(steps[: len(damaged)])
                return Restored(each, state, extra, tuple(damaged))
        raise OSError(" ".join(damaged))

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Renames damaged checkpoints, so that training can save those steps again."""
        for step in steps:
            path = self.directory / str(step)
            shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
            path.rename(path.with_suffix(".damaged"))
        if steps:
            self._manager.reload()

    def _read_meaning(self, step: int, tables: Mapping[str, Any]) -> Any:
        """What was saved beside the arrays, once it is sure that they are of this model."""
        only_meaning = ocp.args.Composite(**{_MEANING: ocp.args.JsonRestore()})
        meaning = self._manager.restore(step, args=only_meaning)[_MEANING]
        where = self.directory / str(step)
        _compare(where, "feature", meaning["features"], self._features)
        if meaning["order"] != self._order:
            raise MismatchError(
                f"{where} is of another model: the order of its features is {meaning['order']} in "
                f"the checkpoint, {self._order} in the model."
            )
        saved = meaning["arrays"]
        signatures = {
            # A number of Python is of no dtype: here is which one held the number saved.
            name: saved[name]
            if type(leaf) is int and saved.get(name) == {"shape": [], "dtype": "uint64"}
            else _signature(leaf)
            for name, leaf in tables.items()
        }
        _compare(where, "array", saved, signatures)
        return meaning["extra"]

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
          OSError: it could not be.
        """
        _finish(self._manager, self.directory)

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


# --- writing, to the end of the program -----------------------------------------------------------

_unfinished: dict[ocp.CheckpointManager, Path] = {}  # whose last save may be on its way
_failed_at_exit = threading.Event()


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Whatever the system or Orbax make of files that cannot be written, as an OSError."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None
        message = f"{directory} cannot be written: {reason or _first_line(error)}"
        raise OSError(message) from error


def _finish(manager: ocp.CheckpointManager, directory: Path) -> None:
    """Returns when what was saved is written."""
    try:
        with _writing(directory):
            manager.wait_until_finished()
    finally:
        _unfinished.pop(manager, None)


def _finish_all() -> None:
    for manager, directory in list(_unfinished.items()):
        try:
            _finish(manager, directory)
        except Exception as error:
            print(f"Error: {error}", file=sys.stderr)
            _failed_at_exit.set()


def _fail_at_exit() -> None:
    if _failed_at_exit.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


# Orbax writes with executors of concurrent.futures. They end before the functions of atexit are
# called, so this is to come before their end: the last to be registered is the first to be called.
assert concurrent.futures.thread
threading._register_atexit(_finish_all)  # type: ignore[attr-defined]
atexit.register(_fail_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unfinished.clear)  # the parent's threads are not there


# --- what is saved --------------------------------------------------------------------------------


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _describe(config: Any) -> dict[str, Any]:
    """The configs of features as JSON."""
    if isinstance(config, Mapping):
        config = CollectionConfig(config)
    if isinstance(config, EmbedConfig):
        return {"": _describe_one(config)}
    if not isinstance(config, CollectionConfig):
        raise ValueError(
            "config must be an EmbedConfig, a CollectionConfig or a mapping of names to configs, "
            f"got {config!r}."
        )
    return {
        name: value if isinstance(value, str) else _describe_one(value)
        for name, value in config.features
    }


def _describe_one(config: EmbedConfig) -> dict[str, Any]:
    return {field: _plain(getattr(config, field)) for field in _FIELDS}


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, str)):
        return value
    return list(value) if isinstance(value, tuple) else str(value)


def _check_extra(extra: Any) -> None:
    try:
        back = json.loads(json.dumps(extra))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"extra must be what JSON can hold: {error}.") from error
    if not _same_keys(extra, back):
        raise ValueError(
            f"extra must be what JSON can hold, dictionaries whose keys are text, got {extra!r}."
        )


def _same_keys(value: Any, back: Any) -> bool:
    """Whether dictionaries still have their keys: JSON makes text of numbers."""
    if isinstance(value, dict):
        return value.keys() == back.keys() and all(_same_keys(value[k], back[k]) for k in value)
    if isinstance(value, (list, tuple)):
        return all(map(_same_keys, value, back))
    return True


def _is_table(node: Any) -> bool:
    return is_sharded_table(node) or isinstance(node, nnx.Variable)


def _tables(state: Any) -> dict[str, Any]:
    """Name -> array, number or `ShardedTable`, of all leaves of a tree."""
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="."), _value(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_table)
    ]
    named = {name: leaf for name, leaf in leaves if leaf is not None}
    if len(named) < sum(leaf is not None for _, leaf in leaves):
        raise ValueError("the leaves of a tree to be saved need names of their own.")
    for name, leaf in named.items():
        _check_leaf(name, leaf)
    return named


def _value(leaf: Any) -> Any:
    return as_table(leaf) if isinstance(leaf, nnx.Variable) else leaf


def _with_arrays(state: Any, tables: Mapping[str, Any]) -> Any:
    """The tree with these arrays and tables in place of its own."""

    def of(path: Any, leaf: Any) -> Any:
        table: Any = tables.get(jax.tree_util.keystr(path, simple=True, separator="."))
        if not isinstance(leaf, nnx.Variable):
            return table
        return leaf.replace(table.array if is_sharded_table(table) else table)

    return jax.tree_util.tree_map_with_path(of, state, is_leaf=_is_table)


def _check_leaf(name: str, leaf: Any) -> None:
    """Raises a ValueError unless a file can hold it."""
    if is_sharded_table(leaf) or _is_key(leaf):
        return
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError(f"array {name!r} is being traced: save and restore outside jax.jit.")
    if isinstance(leaf, int) and not -(2**63) <= leaf < 2**64:
        raise ValueError(f"number {name!r} must have at most 64 bits, got {leaf}.")
    try:
        dtype = np.dtype(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)
    except (TypeError, ValueError) as error:  # of ragged lists and the like
        raise ValueError(f"leaf {name!r} is no array of numbers: {_first_line(error)}") from error
    if not _DTYPES.fullmatch(dtype.name) or isinstance(leaf, np.ma.MaskedArray):
        raise ValueError(
            f"leaf {name!r} must be an array or a number of a dtype that files can hold, got "
            f"{type(leaf).__name__} of dtype {dtype}: what is no number goes into extra."
        )


def _check_present(name: str, leaf: Any) -> None:
    """Raises a ValueError if there are no numbers to save."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(f"array {name!r} is the shape of one, {leaf}, without numbers to save.")
    if any(isinstance(each, jax.Array) and each.is_deleted() for each in jax.tree.leaves(leaf)):
        raise ValueError(
            f"array {name!r} was donated or deleted: save what the step returned in its place."
        )


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_on_host(leaf: Any) -> bool:
    """Whether it is NumPy's or Python's, or has a dtype that JAX would cut."""
    if is_sharded_table(leaf) or _is_key(leaf):
        return False
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return True
    return jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype


def _signature(leaf: Any) -> dict[str, Any]:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _in_file(leaf: Any) -> Any:
    if is_sharded_table(leaf):
        return leaf.in_order()
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _is_empty(leaf: Any) -> bool:
    """Arrays without elements, which Orbax does not write."""
    return math.prod(np.shape(leaf)) == 0


def _empty(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> the arrays without elements."""
    return {
        name: np.zeros(leaf.shape, leaf.dtype)
        if _is_on_host(leaf)
        else jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), _target(leaf).sharding)
        for name, leaf in tables.items()
        if _is_empty(leaf)
    }


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of what is read from the file onto devices."""
    if is_sharded_table(leaf):
        return leaf.ordered
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _restore_args(tables: Mapping[str, Any]) -> ocp.args.Composite | None:
    """What Orbax is to read, and onto which devices; None: nothing."""
    items: dict[str, Any] = {}
    args: dict[str, Any] = {}
    for name, leaf in tables.items():
        if _is_empty(leaf):
            continue
        if _is_on_host(leaf):
            items[name], args[name] = 0, ocp.RestoreArgs(restore_type=np.ndarray)
            continue
        items[name] = to = _target(leaf)
        args[name] = ocp.ArrayRestoreArgs(
            sharding=to.sharding, global_shape=to.shape, dtype=to.dtype, strict=False
        )
    if not items:
        return None
    return ocp.args.Composite(**{_STATE: ocp.args.PyTreeRestore(item=items, restore_args=args)})


def _from_file(leaf: Any, array: Any) -> Any:
    """What was read, as what stands in the tree."""
    if is_sharded_table(leaf):
        return leaf.from_order(array)
    if _is_on_host(leaf):
        if isinstance(leaf, np.generic):
            return array[()]
        is_number = isinstance(leaf, (bool, int, float, complex))
        return type(leaf)(array[()].item()) if is_number else array
    if not isinstance(leaf, jax.Array) or leaf.committed or _is_key(leaf):
        return array
    return jnp.asarray(np.asarray(array))  # what is bound to no device can be used on all


def _compare(where: Path, what: str, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises a MismatchError unless both are the same."""
    for name in {**saved, **wanted}:
        if name not in saved or name not in wanted:
            side, other = ("model", "checkpoint") if name in wanted else ("checkpoint", "model")
            raise MismatchError(
                f"{where} is of another model: {what} {name!r} is in the {side} alone, not in the "
                f"{other}."
            )
        ours, theirs = wanted[name], saved[name]
        if ours == theirs:
            continue
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            pairs = {of: (ours.get(of), theirs.get(of)) for of in {**theirs, **ours}}
            field = next(of for of, (our, their) in pairs.items() if our != their)
            ours, theirs, named = *pairs[field], f"{field} of {what} {name!r}"
        else:
            named = f"{what} {name!r}"
        raise MismatchError(
            f"{where} is of another model: {named} is {theirs} in the checkpoint, {ours} in the "
            "model."
        )
