"""Checkpoints that restore on any mesh, device count and process count.

A tree of parameters, optimizer state and counters is saved with the configs that give its numbers
their meaning. Tables are kept in the order of their rows, however they were split: what eight
devices wrote one device reads, and the other way round. Orbax does the writing, in the background,
and a checkpoint counts only once all of it is on disk.

    with qrhash.checkpoint.Checkpoints("run/checkpoints", config) as checkpoints:
        checkpoints.save(step, {"params": params, "state": state})
        restored = checkpoints.restore({"params": params, "state": state})
"""

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
from jax.experimental import multihost_utils

from qrhash.collection import CollectionConfig
from qrhash.config import EmbedConfig
from qrhash.nnx import as_table
from qrhash.sharding import is_sharded_table

_STATE, _MEANING = "state", "meaning"

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
          step: the number of the step; saving one that is there already does nothing.
          state: a tree of arrays, `ShardedTable`s and variables of `flax.nnx`, as the parameters
            and the optimizer state are.
          extra: anything that JSON can hold.
        """
        if step in self.steps:
            return
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
          OSError: it is damaged, and so is every earlier one.
        """
        self.wait()
        steps = [step] if step is not None else self.steps[::-1]
        if not steps or (step is not None and step not in self.steps):
            wanted = "no complete checkpoint" if step is None else f"no checkpoint of step {step}"
            there = f"; there are those of steps {self.steps}" if self.steps else ""
            raise MismatchError(f"{self.directory} holds {wanted}{there}.")
        damaged: list[str] = []
        for each in steps:
            try:
                restored = self._restore(each, like, tuple(damaged))
            except MismatchError:
                raise
            # Whatever the libraries underneath make of a file that is not as it was written.
            except Exception as error:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                damaged.append(f"Checkpoint {self.directory / str(each)} is damaged: {reason[0]}")
            else:
                self._set_aside(steps[: len(damaged)])
                return restored
        raise OSError(" ".join(damaged))

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Renames damaged checkpoints, so that training can save those steps again."""
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                path = self.directory / str(step)
                shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
                path.rename(path.with_suffix(".damaged"))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    def _restore(self, step: int, like: Any, damaged: tuple[str, ...]) -> Restored:
        only_meaning = ocp.args.Composite(**{_MEANING: ocp.args.JsonRestore()})
        meaning = self._manager.restore(step, args=only_meaning)[_MEANING]
        where = self.directory / str(step)
        tables = _tables(like)
        _compare(where, "feature", meaning["features"], self._features)
        if meaning["order"] != self._order:
            raise MismatchError(
                f"{where} is of another model: the order of its features is {meaning['order']} in "
                f"the checkpoint, {self._order} in the model."
            )
        _compare(where, "array", meaning["arrays"], {n: _signature(t) for n, t in tables.items()})
        targets = {name: _target(leaf) for name, leaf in tables.items()}
        args = {
            name: ocp.ArrayRestoreArgs(
                sharding=to.sharding, global_shape=to.shape, dtype=to.dtype, strict=False
            )
            for name, to in targets.items()
        }
        only_state = ocp.args.Composite(
            **{_STATE: ocp.args.PyTreeRestore(item=targets, restore_args=args)}
        )
        arrays = self._manager.restore(step, args=only_state)[_STATE]
        restored = {name: _from_file(leaf, arrays[name]) for name, leaf in tables.items()}
        return Restored(step, _with_arrays(like, restored), meaning["extra"], damaged)

    def wait(self) -> None:
        """Returns when everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background work."""
        self._manager.close()


def _describe(config: Any) -> dict[str, Any]:
    """The configs of features as JSON."""
    if isinstance(config, Mapping):
        config = CollectionConfig(config)
    if isinstance(config, EmbedConfig):
        return {"": _describe_one(config)}
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
            field = next(field for field in ours if ours[field] != theirs.get(field))
            ours, theirs, named = ours[field], theirs.get(field), f"{field} of {what} {name!r}"
        else:
            named = f"{what} {name!r}"
        raise MismatchError(
            f"{where} is of another model: {named} is {theirs} in the checkpoint, {ours} in the "
            "model."
        )
