"""Deltas: what a training has changed since a version, for copies that serve.

A version is a number of steps done. A row has changed since version v exactly if its key was met in
step v or later, which the index knows; a key has lost its row if it had one at version v and has
none now, which the host knows from the keys of that version. So no log is kept on the device. A
delta holds the rows of the former, the keys of the latter, and the tables of compressed vectors
whole: they are small, and every step changes them all over.

    delta, published = dynamic.delta_since(published, params, state, config, version=step + 1)
    dynamic.save_delta(path, delta)  # and where vectors are served:
    served = dynamic.apply_delta(served, dynamic.load_delta(path), config)

Optimizer state is left out: who goes on training restores a checkpoint.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qrhash.arithmetic import as_size
from qrhash.delta_files import NOTHING, Delta
from qrhash.dynamic import index as key_index
from qrhash.dynamic.config import DynamicConfig, check_dynamic_config
from qrhash.dynamic.embedding import Parameters, State, init_state
from qrhash.dynamic.upkeep import evict
from qrhash.keys import Keys
from qrhash.kinds import set_table_rows, whole_table
from qrhash.types import PyTree


class Published(NamedTuple):
    """What has been said to others: NumPy arrays, which a checkpoint can hold beside the state.

    Attributes:
      version: of the last delta; -1: there was none.
      keys: the key of each row then, uint64 [capacity].
      is_live: which rows some key had, bool [capacity].
    """

    version: np.int64
    keys: np.ndarray
    is_live: np.ndarray


jax.tree_util.register_dataclass(
    Delta,
    data_fields=[each.name for each in dataclasses.fields(Delta) if each.name != "name"],
    meta_fields=["name"],
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("parameters", "state", "version"),
    meta_fields=("name",),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """A copy that serves: `lookup(served.parameters, find(served.state, keys, config), config)`.

    Attributes:
      parameters: its `Parameters`.
      state: its `State`, of which the index alone is kept up.
      version: the version of the training that it is a copy of; -1: it holds nothing yet.
      name: of the table.
    """

    parameters: Parameters
    state: State
    version: int
    name: str = ""


def nothing_published(config: DynamicConfig) -> Published:
    """Before the first delta, which then holds everything."""
    check_dynamic_config(config)
    shape = config.capacity
    return Published(np.int64(NOTHING), np.zeros(shape, np.uint64), np.zeros(shape, bool))


def delta_since(
    published: Published,
    parameters: Parameters,
    state: State,
    config: DynamicConfig,
    version: int,
    *,
    name: str = "",
) -> tuple[Delta, Published]:
    """What has changed since the last delta.

    A table that is trained by rows changes in those that were met. One of fewer rows than
    `large_table_rows` is a dense parameter, which an optimizer may move anywhere: it goes whole.

    Args:
      published: what the last call gave; at first `nothing_published(config)`. A training that goes
        back to a checkpoint goes back to what was published then, or starts from nothing.
      parameters: the `Parameters`.
      state: the `State`.
      config: the `DynamicConfig`.
      version: how many steps are done: the number of the last one, and one.
      name: of the table; a delta is applied to copies of the same name.

    Returns:
      The delta, and what is published now.

    Raises:
      ValueError: the version is not above the last one, or steps were trained beyond it.
    """
    check_dynamic_config(config)
    version, since = as_size("version", version), int(published.version)
    last_steps = _by_rows(state.index.last_steps, state, config)
    is_live = last_steps >= 0
    latest = int(last_steps.max(initial=NOTHING))
    if version <= max(since, latest):
        raise ValueError(
            f"version must be above that of the last delta, {since}, and above the last step "
            f"trained, {latest}, got {version}."
        )
    keys = _by_rows(state.index.keys.to_numpy(), state, config)
    (is_by_rows,) = config.own.large_tables
    changed = is_live & (last_steps >= since) if is_by_rows else is_live
    rows = np.flatnonzero(changed)
    delta = Delta(
        from_version=np.int64(since),
        to_version=np.int64(version),
        keys=keys[rows],
        vectors=_rows_of(parameters.table, rows),
        counts=_by_rows(state.index.counts, state, config)[rows],
        last_steps=last_steps[rows],
        removed=_removed(published, keys, is_live),
        refused=tuple(np.array(whole_table(table)) for table in parameters.refused),
        projection=jax.tree.map(np.array, parameters.projection),
        name=name,
    )
    return delta, Published(np.int64(version), keys, is_live)


def _by_rows(array: Any, state: State, config: DynamicConfig) -> np.ndarray:
    """An array of the index by row number."""
    if state.home is None:
        return np.array(array)
    # One row more, the last, of the places that have none.
    by_rows = np.empty(config.capacity + 1, array.dtype)
    by_rows[np.asarray(state.home)] = array
    return by_rows[:-1]


def _rows_of(table: Any, rows: np.ndarray) -> np.ndarray:
    """Some rows of a table, [n, features]."""
    whole = whole_table(table)
    # Only as many different shapes as there are powers of two, or each delta would compile.
    padded = np.zeros(_padded(rows.size), np.int32)
    padded[: rows.size] = rows
    return np.array(whole[padded])[: rows.size]


def _removed(published: Published, keys: np.ndarray, is_live: np.ndarray) -> np.ndarray:
    """Keys that had a row, and have none."""
    before = np.zeros_like(keys), np.zeros_like(is_live)
    for longer, shorter in zip(before, (published.keys, published.is_live), strict=True):
        longer[: shorter.size] = shorter
    # Where nothing was given or taken back there is nothing to compare.
    moved = (before[0] != keys) | (before[1] != is_live)
    return np.setdiff1d(before[0][moved & before[1]], keys[moved & is_live])


def nothing_served(parameters: Parameters, config: DynamicConfig, *, name: str = "") -> Served:
    """A copy before the first delta.

    Args:
      parameters: of the config, such as `init` gives them: only their shapes matter.
      config: a `DynamicConfig` without a layout, of at least as many rows as there will be keys.
      name: of the table.

    Raises:
      ValueError: the config has a layout.
    """
    check_dynamic_config(config)
    if config.layout is not None:
        raise ValueError(f"a copy that serves is on one device, got the layout {config.layout}.")
    return Served(parameters, init_state(config), NOTHING, name)


def apply_delta(served: Served, delta: Delta, config: DynamicConfig) -> Served:
    """A copy of the next version; the one given stays as it is, for those that still read it.

    Args:
      served: the copy.
      delta: of the version that the copy has, or of everything. One that makes a version no newer
        than the copy's does nothing, so that applying it twice does no harm.
      config: the copy's `DynamicConfig`.

    Raises:
      ValueError: a delta is missing in between; or it is of another table or config; or there are
        more keys than rows. The copy is as it was.
    """
    check_dynamic_config(config)
    _check_same(served, delta)
    otherwise = "start with one of everything"
    if not delta.goes_on_from(served.version, of="copy", otherwise=otherwise):
        return served
    since, to = int(delta.from_version), int(delta.to_version)
    index = key_index.create(config.capacity) if since == NOTHING else served.state.index
    gone, upserts = _as_keys(delta.removed), _as_keys(delta.keys)
    index = _without(index, *gone)
    found = np.asarray(_found(index, *upserts))[: delta.keys.size]
    num_new = int((found == config.capacity).sum())
    if num_new > int(index.num_free):
        raise ValueError(
            f"config.capacity must be at least {int(index.num_keys) + num_new}, as many as version "
            f"{to} has keys, got {config.capacity}: start a longer copy with one of everything."
        )
    values = jax.tree.map(_long, (delta.vectors, delta.counts, delta.last_steps))
    index, table = _with(index, served.parameters.table, *upserts, *values)
    parameters = jax.tree.map(jnp.asarray, Parameters(table, delta.refused, delta.projection))
    return Served(parameters, dataclasses.replace(served.state, index=index), to, served.name)


def _check_same(served: Served, delta: Delta) -> None:
    if delta.name != served.name:
        raise ValueError(
            f"delta must be of the table {served.name!r}, as the copy is, got {delta.name!r}."
        )
    parameters = served.parameters
    ours = _forms((parameters.table[:0], parameters.refused, parameters.projection))
    theirs = _forms((delta.vectors[:0], delta.refused, delta.projection))
    if ours != theirs:
        raise ValueError(
            "delta must be of the copy's config, with vectors and compressed tables "
            f"{ours}, got {theirs}."
        )


def _forms(tree: PyTree) -> Any:
    return jax.tree.leaves(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree))


def _padded(count: int) -> int:
    """The next power of two: so few shapes are compiled."""
    return 1 << max(count - 1, 0).bit_length()


def _long(array: np.ndarray) -> np.ndarray:
    """Longer, up to a power of two."""
    more = _padded(array.shape[0]) - array.shape[0]
    return np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)])


def _as_keys(keys: np.ndarray) -> tuple[Keys, np.ndarray]:
    """Keys up to a power of two, and which of them are meant."""
    keys = np.asarray(keys, np.uint64)
    return Keys.of(_long(keys)), np.arange(_padded(keys.size)) < keys.size


@jax.jit
def _found(index: key_index.KeyIndex, keys: Keys, is_meant: jax.Array) -> jax.Array:
    """The rows of keys [n]; the capacity for one without."""
    rows: jax.Array = key_index.lookup_rows(index, keys, where=is_meant).rows
    return rows


@jax.jit
def _without(index: key_index.KeyIndex, keys: Keys, is_meant: jax.Array) -> key_index.KeyIndex:
    """The index without keys [n]."""
    rows = _found(index, keys, is_meant)
    return evict(index, jnp.zeros(index.capacity, bool).at[rows].set(True, mode="drop"))


@jax.jit
def _with(
    index: key_index.KeyIndex,
    table: Any,
    keys: Keys,
    is_meant: jax.Array,
    vectors: jax.Array,
    counts: jax.Array,
    last_steps: jax.Array,
) -> tuple[key_index.KeyIndex, Any]:
    """Index and table with what keys [n] have."""
    index, found, _ = key_index.assign(index, keys, 0, where=is_meant)
    rows = found.rows
    index = index.replace(
        counts=index.counts.at[rows].set(counts, mode="drop"),
        last_steps=index.last_steps.at[rows].set(last_steps, mode="drop"),
    )
    return index, set_table_rows(table, rows, vectors)
