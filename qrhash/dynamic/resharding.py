"""An index on another number of shards, or on one device: every key keeps its row of the table.

Which shard knows a key goes by the key's hash; which row the key has does not (`State.home`). So
the entries of the index move, some 20 bytes for each row, and neither the table nor the optimizer's
state: what a checkpoint holds of them, in the order of their rows, is right as it is.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrhash.arithmetic import ceil_div
from qrhash.dynamic import sharded
from qrhash.dynamic.config import DynamicConfig, check_dynamic_config
from qrhash.dynamic.embedding import State
from qrhash.dynamic.index import KeyIndex, create
from qrhash.dynamic.key_exchange import owner_of
from qrhash.dynamic.newcomers import Admission
from qrhash.dynamic.upkeep import rebuild
from qrhash.keys import Keys
from qrhash.types import PyTree

_rebuild = jax.jit(rebuild)


class _Entries(NamedTuple):
    """What an index knows of its keys, [n] each, of the host."""

    keys: Keys
    counts: np.ndarray
    last_steps: np.ndarray
    rows: np.ndarray

    def some(self, places: np.ndarray) -> "_Entries":
        """Those at some places, in this order."""
        chosen: _Entries = jax.tree.map(lambda each: each[places], self)
        return chosen


def reshard(state: State, config: DynamicConfig) -> State:
    """The state of a table on another number of shards, or on one device.

    Keys keep their rows, counts and last steps, so that parameters and optimizer state stay as they
    are, row by row. Candidates of `ExactCount` keep their counts; a `SketchCount`, whose counters
    are nobody's, starts anew. On more shards than before one may get more keys than it has places:
    those of them that were met longest ago lose their rows. A warning tells of either.
    `Checkpoints.restore` does all this by itself.

    Args:
      state: the `State`, on any number of shards or on none.
      config: the `DynamicConfig` that it is to be for.

    Returns:
      The state, on the devices of `config.layout`.

    Raises:
      ValueError: the state is of another capacity or kind of admission.

    >>> import dataclasses
    >>> from qrhash.dynamic.embedding import assign, find, init_state
    >>> from qrhash.layout import MeshLayout
    >>> config = DynamicConfig(10, 8)
    >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> on_mesh = dataclasses.replace(config, layout=MeshLayout(mesh=mesh))
    >>> state, _ = assign(init_state(config), [7, 5, 7], config, step=0)
    >>> find(reshard(state, on_mesh), [5, 7], on_mesh).rows.rows.tolist()
    [1, 0]
    """
    check_dynamic_config(config)
    ours, theirs = jax.eval_shape(config.admission.init), state.admission
    kinds = [str(jax.tree.structure(each)) for each in (ours, theirs)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"state.admission must be what {config.admission} remembers, {kinds[0]}, got "
            f"{kinds[1]}."
        )
    num_rows = int(np.sum(_rows_of_places(state) >= 0))
    if num_rows != config.capacity:
        raise ValueError(
            f"state must be of the capacity of the config, {config.capacity} rows, got one of "
            f"{num_rows}."
        )
    layout = config.layout
    dealt = deal(state, None if layout is None else layout.num_shards, config.admission)
    if layout is None:
        return jax.tree.map(jnp.asarray, dealt)
    return jax.device_put(dealt, sharded.shard_sharding(layout))


def deal(state: State, num_shards: int | None, admission: Admission) -> State:
    """The same on the host alone.

    Args:
      state: the `State`, of arrays of the host or of JAX.
      num_shards: over how many shards it is to be split; None: no mesh.
      admission: the admission of the table, for keys of all shards.

    Returns:
      The `State`, of NumPy arrays.
    """
    rows = _rows_of_places(state)
    capacity = int(np.sum(rows >= 0))
    entries = _entries(state.index, rows)
    remembered = _remembered(state.admission, num_shards, admission)
    if num_shards is None:
        return State(_index_of(entries, entries.rows, np.ones(capacity, bool)), remembered)
    places = ceil_div(capacity, num_shards)
    parts = _split(entries, num_shards, places)
    _warn_of_lost(len(entries.rows) - sum(len(part.rows) for part in parts), len(entries.rows))
    home = _homes([part.rows for part in parts], places, capacity)
    indexes = [
        _index_of(part, np.arange(len(part.rows)), of_shard >= 0)
        for part, of_shard in zip(parts, home, strict=True)
    ]
    return State(_stacked(indexes), remembered, home)


def _rows_of_places(state: State) -> np.ndarray:
    """The row of each place of an index, [capacity] or [S, R]; -1: none."""
    return np.arange(state.index.capacity) if state.home is None else np.asarray(state.home)


def _entries(index: KeyIndex, rows: np.ndarray) -> _Entries:
    """The keys that have a row, in the order of their rows, which are those of the places given."""
    last_steps = np.asarray(index.last_steps)
    live = last_steps >= 0
    keys = Keys(np.asarray(index.keys.hi)[live], np.asarray(index.keys.lo)[live])
    entries = _Entries(keys, np.asarray(index.counts)[live], last_steps[live], rows[live])
    return entries.some(np.argsort(entries.rows))


def _split(entries: _Entries, num_shards: int, places: int) -> list[_Entries]:
    """Of each shard its keys, in their order; of too many for its places, those met last."""
    owners = np.asarray(owner_of(entries.keys, num_shards))
    by_owner = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[by_owner], np.arange(1, num_shards))
    parts = []
    for mine in np.split(by_owner, bounds):
        # Of those met last at the same step, the ones met more often.
        latest = np.lexsort((-entries.counts[mine], -entries.last_steps[mine]))[:places]
        parts.append(entries.some(mine[np.sort(latest)]))
    return parts


def _warn_of_lost(lost: int, num_keys: int) -> None:
    if lost:
        warnings.warn(
            f"{lost:,} of {num_keys:,} keys have lost their rows, those met longest ago: by their "
            "hashes, their shards got more keys than these have places.",
            stacklevel=4,
        )


def _homes(taken: Sequence[np.ndarray], places: int, capacity: int) -> np.ndarray:
    """The row of each place, int32 [S, R]: of keys the ones taken, of free places the others.

    Without keys these are the rows of `qrhash.layout`.
    """
    home = np.full((len(taken), places), -1, np.int32)
    is_taken = np.zeros(capacity, bool)
    for of_shard, rows in zip(home, taken, strict=True):
        of_shard[: len(rows)] = rows
        is_taken[rows] = True
    is_free, others = home.T < 0, np.flatnonzero(~is_taken)
    home.T[is_free] = np.pad(others, (0, is_free.sum() - len(others)), constant_values=-1)
    return home


def _index_of(entries: _Entries, places: np.ndarray, has_row: np.ndarray) -> KeyIndex:
    """The index of one shard, of NumPy arrays.

    Args:
      entries: its keys [n].
      places: where they are [n].
      has_row: which places have a row of the table, bool [R].
    """

    def spread(values: Any, fill: int) -> np.ndarray:
        spread = np.full(has_row.shape, fill, values.dtype)
        spread[places] = values
        return spread

    last_steps = spread(entries.last_steps, -1)
    free = np.flatnonzero(has_row & (last_steps < 0))[::-1].astype(np.int32)
    index = create(len(has_row)).replace(
        keys=Keys(spread(entries.keys.hi, 0), spread(entries.keys.lo, 0)),
        counts=spread(entries.counts, 0),
        last_steps=last_steps,
        free=np.pad(free, (0, len(has_row) - len(free))),
        num_free=np.int32(len(free)),
    )
    made: KeyIndex = jax.tree.map(np.asarray, _rebuild(index))
    return made


def _remembered(saved: PyTree, num_shards: int | None, admission: Admission) -> PyTree:
    """What the admission keeps: each candidate with its shard, and all else as at the start."""
    part = admission if num_shards is None else admission.split(num_shards)
    start_anew = False

    def of(new: Any, old: Any) -> Any:
        nonlocal start_anew
        if not isinstance(new, KeyIndex):
            start_anew |= bool(np.any(np.asarray(old)))
            return np.asarray(new) if num_shards is None else _stacked([new] * num_shards)
        places = np.arange(old.capacity).reshape(np.shape(old.counts))
        parts = _split(_entries(old, places), num_shards or 1, new.capacity)
        has_row = np.ones(new.capacity, bool)
        indexes = [_index_of(each, np.arange(len(each.rows)), has_row) for each in parts]
        return indexes[0] if num_shards is None else _stacked(indexes)

    made = jax.tree.map(of, part.init(), saved, is_leaf=lambda node: isinstance(node, KeyIndex))
    if start_anew:
        warnings.warn(
            f"{type(admission).__name__} counts anew on another number of shards: keys without a "
            "row have to earn it once more.",
            stacklevel=4,
        )
    return made


def _stacked(each: Sequence[PyTree]) -> Any:
    """With an axis of shards in front."""
    return jax.tree.map(lambda *parts: np.stack(parts), *each)
