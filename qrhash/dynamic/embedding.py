"""The vectors of keys that come and go: pure functions of parameters, state and a `DynamicConfig`.

The parameters are floats, trained as any others: the table of rows, and the tables of compressed
vectors. The state is integers: which key has which row. A step of the training is

    state, found = dynamic.assign(state, keys, config, step)
    params, new = dynamic.start_rows(params, found, config)
    opt_state = qrhash.reset_rows(tx, opt_state, params, new)
    loss, grads = qrhash.value_and_grad(loss_fn, dynamic.large(config))(params, found)
    ...

with `dynamic.lookup(params, found, config)` in the loss; everything in one jitted function, with
parameters and both states donated. Elsewhere `dynamic.find(state, keys, config)` gives what is
known of keys, and changes nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qrhash import tables, vectors
from qrhash.batches import everywhere
from qrhash.dynamic import index as key_index
from qrhash.dynamic import sharded
from qrhash.dynamic.config import REFUSED, DynamicConfig, check_dynamic_config
from qrhash.dynamic.found import Found, as_keys, check_found, keys_of
from qrhash.dynamic.slots import places_where, read, some_keys
from qrhash.dynamic.upkeep import evict as evict_rows
from qrhash.initializers import SymmetricUniform
from qrhash.keys import Keys
from qrhash.kinds import set_table_rows
from qrhash.operations import Projection
from qrhash.threefry import fold_in
from qrhash.types import Array, Key, PyTree, Scalar, wide_dtype

# New rows that are started at once.
_AT_ONCE = 1024


class Parameters(NamedTuple):
    """What is trained.

    Attributes:
      table: the keys' own rows, [capacity, features].
      refused: the tables of compressed vectors, a tuple; empty without `config.refused`.
      projection: their `Projection`, for operation "project".
    """

    table: Any
    refused: Any = ()
    projection: Projection | None = None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("index", "admission", "home"), meta_fields=()
)
@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """Which key has which row: integers, that no gradient reaches.

    Attributes:
      index: a `KeyIndex`; on a mesh one for each shard, of its own places.
      admission: what the admission keeps.
      home: on a mesh the row of the table that goes with each place, int32 [S, R]; -1 for a place
        without one. None: places are rows.
    """

    index: key_index.KeyIndex
    admission: PyTree
    home: Any = None


def init(key: Key, config: DynamicConfig) -> Parameters:
    """The parameters before any key is known: rows of zeros, and the compressed vectors' tables."""
    check_dynamic_config(config)
    of_rows, of_refused, of_projection = jax.random.split(key, 3)
    (table,) = tables.init(of_rows, config.own)
    if config.refused is None:
        return Parameters(table)
    refused = tables.init(of_refused, config.refused)
    return Parameters(table, refused, tables.init_projection(of_projection, config.refused))


def init_state(config: DynamicConfig) -> State:
    """The state before any key is known."""
    check_dynamic_config(config)
    if config.layout is not None:
        return State(*sharded.create(config.layout, config.capacity, config.admission))
    return State(key_index.create(config.capacity), config.admission.init())


def large(config: DynamicConfig) -> Parameters:
    """Which tables are trained by rows: `large` of `qrhash.value_and_grad`."""
    (table,) = config.own.large_tables
    refused = config.refused
    if refused is None:
        return Parameters(table)
    fields = refused.projection_fields
    projection = Projection(False, False if "bias" in fields else None) if fields else None
    return Parameters(table, tuple(refused.large_tables), projection)


def assign(
    state: State, keys: Any, config: DynamicConfig, step: Scalar, *, where: Array | None = None
) -> tuple[State, Found]:
    """The rows of keys in a step of the training: they are counted, and new ones may get a row.

    Args:
      state: the `State`; donate it, and it is updated in place.
      keys: `Keys` [*shape], or what `Keys.of` takes; or a `qrhash.Bag` of such.
      config: the `DynamicConfig`.
      step: the number of the step, from 0 on.
      where: which of the keys are meant, bool [*shape]: not the padding. Of a bag it is those in
        bags.

    Returns:
      The state, and the keys as `lookup` and `start_rows` take them.
    """
    check_dynamic_config(config)
    keys, meant = as_keys(keys, where)
    given: dict[str, Any] = {"admission": config.admission, "state": state.admission}
    if config.layout is None:
        given["where"] = meant
        index, rows, admission = key_index.assign(state.index, keys_of(keys), step, **given)
    else:
        flat, given["where"], shape = key_index.flat_keys(keys_of(keys), meant)
        given |= {"home": state.home, "capacity": config.capacity}
        index, rows, admission = sharded.assign(config.layout, state.index, flat, step, **given)
        rows = rows.in_shape(shape)
    return dataclasses.replace(state, index=index, admission=admission), Found(keys, rows, meant)


def find(state: State, keys: Any, config: DynamicConfig, *, where: Array | None = None) -> Found:
    """The rows of keys, outside of the training: nothing is counted, and no key gets a row.

    Args:
      state: the `State`.
      keys: as in `assign`.
      config: the `DynamicConfig`.
      where: as in `assign`.
    """
    check_dynamic_config(config)
    keys, meant = as_keys(keys, where)
    if config.layout is None:
        return Found(keys, key_index.lookup_rows(state.index, keys_of(keys), where=meant), meant)
    flat, wanted, shape = key_index.flat_keys(keys_of(keys), meant)
    given = {"where": wanted, "home": state.home, "capacity": config.capacity}
    rows = sharded.lookup_rows(config.layout, state.index, flat, **given)
    return Found(keys, rows.in_shape(shape), meant)


def start_rows(
    parameters: Parameters, found: Found, config: DynamicConfig
) -> tuple[Parameters, Parameters]:
    """Writes the rows of new keys: compressed vectors copied, or drawn by the hash of the key.

    Args:
      parameters: the `Parameters`; donate them, and the table is updated in place.
      found: as `assign` gives it.
      config: the `DynamicConfig`.

    Returns:
      The parameters; and the numbers of the rows written, int32 [n], in the place of the table, as
      `qrhash.reset_rows` takes them.
    """
    check_found(found)
    rows = found.new_rows(config)
    if rows.size:
        is_new = found.rows.is_new.reshape(-1)
        table = _with_new_rows(parameters, found.flat_keys, is_new, rows, config)
        parameters = parameters._replace(table=table)
    return parameters, Parameters(rows, None, None)


# Jitted for its cache: outside of `jax.jit`, the loop would compile anew at every call.
@functools.partial(jax.jit, static_argnames="config")
def _with_new_rows(
    parameters: Parameters, keys: Keys, is_new: jax.Array, rows: jax.Array, config: DynamicConfig
) -> Any:
    """The table with the rows of new keys [n] written."""

    def compressed(table: Any, keys: Keys) -> jax.Array:
        del table
        of_refused = config.parts[REFUSED]
        return vectors.lookup(parameters.refused, keys, of_refused, parameters.projection)

    return write_new(parameters.table, keys, is_new, rows, config, compressed)


def write_new(
    table: Any,
    keys: Keys,
    is_new: jax.Array,
    rows: jax.Array,
    config: DynamicConfig,
    compressed: Callable[[Any, Keys], jax.Array],
) -> Any:
    """A table with the rows of new keys written.

    Args:
      table: with `config.capacity` rows or, where it is a stack, more.
      keys: `Keys` [n].
      is_new: which of them are new, bool [n].
      rows: the rows of these in the table, int32 [n].
      config: the `DynamicConfig`.
      compressed: the table so far and some keys -> compressed vectors of these.
    """
    keys, is_new, rows = everywhere((keys, is_new, rows), config.layout)
    num_rows, size = table.shape[0], min(_AT_ONCE, rows.shape[0])
    count = jnp.sum(is_new, dtype=jnp.int32)
    # As many places as the last turn may look at.
    places = places_where(is_new, -(-rows.shape[0] // size) * size)

    def turn(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        done, table = state
        at = jax.lax.dynamic_slice_in_dim(places, done, size)
        here = jnp.minimum(at, rows.shape[0] - 1)
        some = some_keys(keys, here)
        drawn = _drawn(some, config) if config.refused is None else compressed(table, some)
        named = jnp.where(at < rows.shape[0], read(rows, here), num_rows)
        return done + size, set_table_rows(table, named, everywhere(drawn, config.layout))

    state = (jnp.int32(0), table)
    return jax.lax.while_loop(lambda state: state[0] < count, turn, state)[1]


def _drawn(keys: Keys, config: DynamicConfig) -> jax.Array:
    """Vectors [n, features] that the rows of keys [n] start with, without compressed ones."""
    dtype = wide_dtype(config.param_dtype)
    seed = jax.random.key(config.seed)
    initializer = config.embedding_init or SymmetricUniform(config.stddev)

    def draw(hi: jax.Array, lo: jax.Array) -> jax.Array:
        of_key = fold_in(fold_in(seed, hi), lo)
        drawn: jax.Array = initializer(of_key, (config.features,), dtype)
        return drawn

    return jax.vmap(draw)(keys.hi, keys.lo).astype(config.param_dtype)


def lookup(
    parameters: Parameters, found: Found, config: DynamicConfig, *, out_sharding: Any = None
) -> jax.Array:
    """The vectors of keys: of those that have a row the one in it, of the others the compressed.

    Args:
      parameters: the `Parameters`.
      found: as `assign` or `find` gives it.
      config: the `DynamicConfig`.
      out_sharding: where the vectors are to be, on a mesh.

    Returns:
      Vectors [*shape, features] of `config.own.vector_dtype`; of a bag one for each, pooled.

    Raises:
      ValueError: keys that were neither assigned nor found.
    """
    check_dynamic_config(config)
    check_found(found)
    to = None if found.is_pooled_last(config) else out_sharding
    tables = {"": (parameters.table,), REFUSED: parameters.refused}
    projections = {"": None, REFUSED: parameters.projection}
    looked_up = {
        part: vectors.lookup(
            tables[part], ids, config.parts[part], projections[part], out_sharding=to
        )
        for part, ids in found.by_part(config).items()
    }
    return found.vectors(looked_up, config)


def evict(
    state: State, parameters: Parameters, config: DynamicConfig, step: Scalar
) -> tuple[State, jax.Array]:
    """Takes back the rows of keys that the config's eviction names.

    Args:
      state: the `State`; donate it, and it is updated in place.
      parameters: the `Parameters`; they do not change: a row is written when it is given away.
      config: the `DynamicConfig`.
      step: the number of the step.

    Returns:
      The state, and how many keys have lost their row.

    Raises:
      ValueError: the config has no eviction.
    """
    if config.eviction is None:
        raise ValueError("evict needs config.eviction, such as StepsSinceUse(1000), got None.")
    before = state.index.num_keys
    state = evicted(state, parameters.table, config, step)
    return state, before - state.index.num_keys


def evicted(
    state: State, table: Any, config: DynamicConfig, step: Scalar, *, offset: int = 0
) -> State:
    """The state without the keys that the config's eviction names.

    Args:
      state: the `State`.
      table: the keys' own rows, from the row `offset` on.
      config: the `DynamicConfig`.
      step: the number of the step.
      offset: the first of their rows in the table.
    """
    assert config.eviction is not None  # or there is nothing to ask
    (array,) = jax.tree.leaves(table)
    if config.layout is None:
        rows = slice(offset, offset + config.capacity)
        gone = config.eviction.gone(state.index, array, step, lambda each: each[rows])
        return dataclasses.replace(state, index=evict_rows(state.index, gone))
    by_place = functools.partial(sharded.by_place, config.layout, state.home + offset)
    gone = config.eviction.gone(state.index, array, step, by_place)
    return dataclasses.replace(state, index=sharded.evict(config.layout, state.index, gone))
