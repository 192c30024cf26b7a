"""Checkpoints that restore on any mesh, device count and process count.

A tree of parameters, optimizer state and counters is saved with the configs that give its numbers
their meaning. Tables are kept in the order of their rows, however they were split: what eight
devices wrote one device reads, and the other way round. Orbax does the writing, in the background,
and a checkpoint counts only once all of it is on disk.

    with qrhash.checkpoint.Checkpoints("run/checkpoints", config) as checkpoints:
        checkpoints.save(step, {"params": params, "state": state})
        restored = checkpoints.restore({"params": params, "state": state})
"""

import json
import shutil
from collections.abc import Mapping, Sequence
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

    Raises:
      ValueError: it is no such config, or none are to be kept.
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
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=(_STATE, _MEANING),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=max_to_keep, enable_async_checkpointing=True, create=True
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
          state: a tree of arrays, `ShardedTable`s and variables of `flax.nnx`, as the parameters
            and the optimizer state are.
          extra: anything that JSON can hold.

        Raises:
          ValueError: JSON cannot hold `extra`, or the step is negative or below the last one.
          OSError: the checkpoint before could not be written.
        """
        try:
            json.dumps(extra)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"extra must be what JSON can hold: {error}.") from error
        step = as_size("step", step, minimum=0)
        self.wait()
        last = max(self.steps, default=-1)
        if step == last:
            return
        if step < last:
            raise ValueError(
                f"step must be above the last one saved in {self.directory}, {last}, got {step}: "
                "use another directory."
            )
        tables = _tables(state)
        arrays = {name: _in_file(leaf) for name, leaf in tables.items()}
        meaning = {
            "features": self._features,
            "order": self._order,
            "arrays": {name: _signature(leaf) for name, leaf in tables.items()},
            "extra": extra,
        }
        args = {_STATE: ocp.args.PyTreeSave(arrays), _MEANING: ocp.args.JsonSave(meaning)}
        self._manager.save(step, args=ocp.args.Composite(**args))

    def restore(self, like: Any, step: int | None = None) -> Restored:
        """Reads a checkpoint onto the devices that a tree is on, or is to be on.

        Args:
          like: a tree as it was saved, of arrays or of `jax.ShapeDtypeStruct`s with shardings.
          step: which one; by default the last one that can be read.

        Raises:
          MismatchError: it is of another model, or there is none.
          OSError: it is damaged, and so is every earlier one; with several processes, of which
            each may see another damage, none earlier is tried.
        """
        self.wait()
        tables = _tables(like)
        signatures = {name: _signature(leaf) for name, leaf in tables.items()}
        only_state = _restore_args({name: _target(leaf) for name, leaf in tables.items()})
        steps = [step] if step is not None else self.steps[::-1]
        if not steps or (step is not None and step not in self.steps):
            wanted = "no complete checkpoint" if step is None else f"no checkpoint of step {step}"
            there = f"; there are those of steps {self.steps}" if self.steps else ""
            raise MismatchError(f"{self.directory} holds {wanted}{there}.")
        damaged: list[str] = []
        for each in steps:
            path = self.directory / str(each)
            try:
                extra = self._read_meaning(each, signatures)
                arrays = self._manager.restore(each, args=only_state)[_STATE]
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

    def _read_meaning(self, step: int, signatures: Mapping[str, Any]) -> Any:
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
        _compare(where, "array", meaning["arrays"], signatures)
        return meaning["extra"]

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
          OSError: it could not be.
        """
        try:
            self._manager.wait_until_finished()
        except ValueError as error:  # what Orbax makes of a full disk
            message = f"{self.directory} cannot be written: {_first_line(error)}"
            raise OSError(message) from error

    def close(self) -> None:
        """Waits, and ends the background work.

        Raises:
          OSError: something could not be written.
        """
        try:
            self.wait()
        finally:
            self._manager.close()


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


def _is_table(node: Any) -> bool:
    return is_sharded_table(node) or isinstance(node, nnx.Variable)


def _tables(state: Any) -> dict[str, Any]:
    """Name -> array or `ShardedTable`, of all leaves of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_table)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("the leaves of a tree to be saved need names of their own.")
    return {
        name: as_table(leaf) if isinstance(leaf, nnx.Variable) else leaf
        for name, leaf in named.items()
    }


def _with_arrays(state: Any, tables: Mapping[str, Any]) -> Any:
    """The tree with these arrays and tables in place of its own."""

    def of(path: Any, leaf: Any) -> Any:
        table = tables[jax.tree_util.keystr(path, simple=True, separator=".")]
        if not isinstance(leaf, nnx.Variable):
            return table
        return leaf.replace(table.array if is_sharded_table(table) else table)

    return jax.tree_util.tree_map_with_path(of, state, is_leaf=_is_table)


def _signature(leaf: Any) -> dict[str, Any]:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _in_file(leaf: Any) -> Any:
    return leaf.in_order() if is_sharded_table(leaf) else leaf


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of what is read from the file."""
    if is_sharded_table(leaf):
        return leaf.ordered
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _restore_args(targets: Mapping[str, jax.ShapeDtypeStruct]) -> ocp.args.Composite:
    """What Orbax is to read, and onto which devices."""
    args = {
        name: ocp.ArrayRestoreArgs(
            sharding=to.sharding, global_shape=to.shape, dtype=to.dtype, strict=False
        )
        for name, to in targets.items()
    }
    return ocp.args.Composite(**{_STATE: ocp.args.PyTreeRestore(item=targets, restore_args=args)})


def _from_file(leaf: Any, array: jax.Array) -> Any:
    if is_sharded_table(leaf):
        return leaf.from_order(array)
    is_key = jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    if not isinstance(leaf, jax.Array) or leaf.committed or is_key:
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
