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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qrhash import tables, vectors
from qrhash.bags import Bag
from qrhash.dynamic import index as key_index
from qrhash.dynamic import sharded
from qrhash.dynamic.config import DynamicConfig, check_dynamic_config
from qrhash.dynamic.slots import places_where, read, some_keys
from qrhash.dynamic.upkeep import evict as evict_rows
from qrhash.initializers import SymmetricUniform
from qrhash.keys import Keys
from qrhash.kinds import set_table_rows
from qrhash.operations import Projection
from qrhash.pooling import divided, pool
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


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("keys", "rows", "meant"), meta_fields=()
)
@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """Keys of a batch with their rows: what look-ups take.

    Attributes:
      keys: `Keys` [*shape], or a `qrhash.Bag` of n keys.
      rows: their `Rows`; of a bag [n].
      meant: which of the keys are meant, bool; None: all. The others have vectors of zeros.
    """

    keys: Any
    rows: key_index.Rows
    meant: Any = None

    @property
    def _flat_keys(self) -> Keys:
        flat = _of(self.keys).reshape(-1)
        return Keys(jnp.asarray(flat.hi), jnp.asarray(flat.lo))


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
    keys, meant = _as_keys(keys, where)
    given: dict[str, Any] = {"admission": config.admission, "state": state.admission}
    if config.layout is None:
        given["where"] = meant
        index, rows, admission = key_index.assign(state.index, _of(keys), step, **given)
    else:
        flat, given["where"], shape = key_index.flat_keys(_of(keys), meant)
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
    keys, meant = _as_keys(keys, where)
    if config.layout is None:
        return Found(keys, key_index.lookup_rows(state.index, _of(keys), where=meant), meant)
    flat, wanted, shape = key_index.flat_keys(_of(keys), meant)
    given = {"where": wanted, "home": state.home, "capacity": config.capacity}
    rows = sharded.lookup_rows(config.layout, state.index, flat, **given)
    return Found(keys, rows.in_shape(shape), meant)


def _of(keys: Keys | Bag) -> Keys:
    """The keys [*shape], or those in the places of bags [n]."""
    return keys.ids if isinstance(keys, Bag) else keys


def _as_keys(keys: Any, where: Array | None) -> tuple[Keys | Bag, Any]:
    if not isinstance(keys, Bag):
        return Keys.of(keys), where
    if where is not None:
        raise ValueError("where must be left out with a Bag, whose segments say the same.")
    return dataclasses.replace(keys, ids=Keys.of(keys.ids)), jnp.asarray(keys.in_bag)


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
    rows = new_rows(found, config)
    if rows.size:
        is_new = found.rows.is_new.reshape(-1)
        table = _with_new_rows(parameters, found._flat_keys, is_new, rows, config)
        parameters = parameters._replace(table=table)
    return parameters, Parameters(rows, None, None)


# Jitted for its cache: outside of `jax.jit`, the loop would compile anew at every call.
@functools.partial(jax.jit, static_argnames="config")
def _with_new_rows(
    parameters: Parameters, keys: Keys, is_new: jax.Array, rows: jax.Array, config: DynamicConfig
) -> Any:
    """The table with the rows of new keys [n] written."""
    capacity, size = config.capacity, min(_AT_ONCE, rows.shape[0])
    count = jnp.sum(is_new, dtype=jnp.int32)
    # As many places as the last turn may look at.
    places = places_where(is_new, -(-rows.shape[0] // size) * size)

    def turn(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        done, table = state
        at = jax.lax.dynamic_slice_in_dim(places, done, size)
        here = jnp.minimum(at, rows.shape[0] - 1)
        vectors = _first_vectors(parameters, some_keys(keys, here), config)
        named = jnp.where(at < rows.shape[0], read(rows, here), capacity)
        return done + size, set_table_rows(table, named, vectors)

    state = (jnp.int32(0), parameters.table)
    return jax.lax.while_loop(lambda state: state[0] < count, turn, state)[1]


def new_rows(found: Found, config: DynamicConfig) -> jax.Array:
    """The rows that keys have just got, int32 [n]: at their first places; else the capacity."""
    return jnp.where(found.rows.is_new, found.rows.rows, config.capacity).reshape(-1)


def _first_vectors(parameters: Parameters, keys: Keys, config: DynamicConfig) -> jax.Array:
    """Vectors [n, features] that the rows of keys [n] start with."""
    if config.refused is not None:
        return vectors.lookup(parameters.refused, keys, config.refused, parameters.projection)
    dtype = wide_dtype(config.param_dtype)
    seed = jax.random.key(config.seed)
    initializer = config.embedding_init or SymmetricUniform(config.stddev)

    def draw(hi: jax.Array, lo: jax.Array) -> jax.Array:
        of_key = jax.random.fold_in(jax.random.fold_in(seed, hi), lo)
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
    """
    check_dynamic_config(config)
    if not isinstance(found.keys, Bag):
        return _vectors(parameters, found, config, out_sharding)
    bag = found.keys
    if config.combiner == "max" or (config.refused is None and config.refused_value):
        single = dataclasses.replace(found, keys=bag.ids)
        each = _vectors(parameters, single, config, None)
        return pool(each, bag, config.combiner).reshape(*bag.shape, config.features)
    has_row = found.rows.rows < config.capacity
    own = _some_of(bag, has_row, found.rows.rows)
    sums = _sums((parameters.table,), own, config.own, None, out_sharding)
    if config.refused is not None:
        others = _some_of(bag, ~has_row, bag.ids)
        more = (parameters.refused, others, config.refused, parameters.projection)
        sums = sums + _sums(*more, out_sharding).astype(sums.dtype)
    flat = sums.reshape(bag.num_bags, config.features)
    return divided(flat, bag, config.combiner).reshape(sums.shape)


def _some_of(bag: Bag, where: jax.Array, ids: Any) -> Bag:
    """The bags with some of their places, and these ids."""
    segments = jnp.where(where, bag.segments, bag.num_bags)
    return dataclasses.replace(bag, ids=ids, segments=segments)


def _sums(
    given: Any, bag: Bag, config: Any, projection: Projection | None, out_sharding: Any
) -> jax.Array:
    config = dataclasses.replace(config, combiner="sum")
    return vectors.lookup(given, bag, config, projection, out_sharding=out_sharding)


def _vectors(
    parameters: Parameters, found: Found, config: DynamicConfig, out_sharding: Any
) -> jax.Array:
    """The vectors of keys [*shape] that are in no bags."""
    rows = found.rows.rows
    own = vectors.lookup((parameters.table,), rows, config.own, out_sharding=out_sharding)
    is_refused = rows == config.capacity
    if found.meant is not None:
        is_refused = is_refused & found.meant
    if config.refused is None:
        return jnp.where(is_refused[..., None], config.refused_value, own).astype(own.dtype)
    # One place for each key, which is empty where it has a row: nothing is read for it, and no
    # gradient is sent anywhere.
    keys = found.keys.reshape(*rows.shape, 1)
    bag = Bag.from_padded(keys, mask=is_refused[..., None])
    more = _sums(parameters.refused, bag, config.refused, parameters.projection, out_sharding)
    return own + more.astype(own.dtype)


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
    (table,) = jax.tree.leaves(parameters.table)
    if config.layout is None:
        index = evict_rows(state.index, config.eviction.gone(state.index, table, step))
    else:
        by_place = functools.partial(sharded.by_place, config.layout, state.home)
        gone = config.eviction.gone(state.index, table, step, by_place)
        index = sharded.evict(config.layout, state.index, gone)
    return dataclasses.replace(state, index=index), state.index.num_keys - index.num_keys
