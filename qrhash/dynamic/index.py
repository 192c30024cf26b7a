"""`KeyIndex`: which row of a table a key has, as a pytree of arrays and pure functions.

Keys are 64 bits wide and come and go; rows are few. The index finds a key's row, gives rows to new
keys, counts how often a key was met and remembers the step of the last time. Slots hold row
numbers, so that an index grows by moving integers, and no vector moves. The same batches in the
same order give the same rows on every platform; and where no row is left, exactly the keys that
come too late get none.

Everything runs under `jax.jit`, in place where the index is donated; on the host, beside an
accelerator, under `jax.default_device(jax.devices("cpu")[0])`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qrhash.arithmetic import MOST_KEYS, as_size, ceil_div
from qrhash.dynamic.newcomers import Admission, AdmitAll, Newcomers, first_places
from qrhash.dynamic.slots import BUCKET, find, new_slots, on_few, place, read, some_keys
from qrhash.keys import Keys
from qrhash.rows import ranks, set_rows
from qrhash.types import Array, PyTree, Scalar

# Slots for each row: a key is then found at the first look, all but one in 25.
_SLOTS_PER_ROW = 2

_NEVER = -1  # the last step of a row that no key has

_ADMIT_ALL = AdmitAll()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("slots", "keys", "counts", "last_steps", "free", "num_free", "num_unused"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, eq=False)
class KeyIndex:
    """An index of at most `capacity` keys; see `create`.

    Attributes:
      slots: words of the key, row number, nothing: uint32 [num_slots // 4, 4, 4].
      keys: the key of each row, `Keys` [capacity].
      counts: how often each row's key was met, int32 [capacity]; 0 for a row that no key has.
      last_steps: the step it was last met at, int32 [capacity]; -1 for a row that no key has.
      free: a stack of the rows that no key has, int32 [capacity]; the last of them is given next.
      num_free: how many these are, int32 [].
      num_unused: how many slots were never used since the last rebuild, int32 [].
    """

    slots: Any
    keys: Keys
    counts: Any
    last_steps: Any
    free: Any
    num_free: Any
    num_unused: Any

    @property
    def capacity(self) -> int:
        """How many rows there are; on a mesh, how many places, of all shards."""
        return self.counts.size

    @property
    def num_slots(self) -> int:
        """How many slots there are, a power of two; on a mesh, of one shard."""
        return BUCKET * self.slots.shape[-3]

    @property
    def num_keys(self) -> Any:
        """How many keys have a row, int32 []."""
        if self.num_free.ndim:  # On a mesh some places may have no row.
            return jnp.sum(self.is_live, dtype=jnp.int32)
        return self.capacity - self.num_free

    @property
    def is_live(self) -> Any:
        """Which rows some key has, bool [capacity]; on a mesh [S, R]."""
        return self.last_steps > _NEVER

    def replace(self, **changes: Any) -> "KeyIndex":
        """The same with other arrays."""
        return dataclasses.replace(self, **changes)


class Rows(NamedTuple):
    """The rows of a batch of keys.

    Attributes:
      rows: row numbers, int32 [*shape]; the index's capacity for a key without a row.
      is_new: bool [*shape], where a key has just got its row: at its first place in the batch.
      not_admitted: how many distinct keys of the batch have not earned a row, int32 [].
      no_room: how many have, and there was none left, int32 [].
    """

    rows: Any
    is_new: Any
    not_admitted: Any
    no_room: Any

    def in_shape(self, shape: tuple[int, ...]) -> "Rows":
        """The same with rows of this shape."""
        return self._replace(rows=self.rows.reshape(shape), is_new=self.is_new.reshape(shape))


def create(capacity: int, num_slots: int | None = None) -> KeyIndex:
    """An index without keys.

    Args:
      capacity: how many keys can have a row.
      num_slots: a power of two, at least twice the capacity and 4; default: the lowest such.

    Raises:
      ValueError: a capacity below 1 or above 2**29, or another number of slots.

    >>> index = create(1000)
    >>> index.capacity, index.num_slots, int(index.num_keys)
    (1000, 2048, 0)
    """
    capacity = as_size("capacity", capacity)
    if capacity > MOST_KEYS:
        raise ValueError(f"capacity must be at most {MOST_KEYS} rows, got {capacity}: use a mesh.")
    num_slots = _checked_slots(num_slots, capacity)
    zeros = jnp.zeros(capacity, jnp.int32)
    return KeyIndex(
        new_slots(num_slots),
        Keys(jnp.zeros(capacity, jnp.uint32), jnp.zeros(capacity, jnp.uint32)),
        zeros,
        jnp.full(capacity, _NEVER, jnp.int32),
        jnp.arange(capacity - 1, -1, -1, dtype=jnp.int32),
        jnp.int32(capacity),
        jnp.int32(num_slots),
    )


def shard_bytes(capacity: int, admission: Admission, num_shards: int | None = None) -> int:
    """Bytes of an index and of what its admission keeps.

    Args:
      capacity: how many keys can have a row, on all shards together.
      admission: of the keys.
      num_shards: on a mesh, of how many shards this is one; None: without a mesh.

    >>> shard_bytes(2**16, _ADMIT_ALL) // 2**16
    52
    """
    rows = ceil_div(capacity, num_shards or 1)
    home = 0 if num_shards is None else 4 * rows  # `qrhash.dynamic.sharded`
    return num_bytes(rows) + home + admission.split(num_shards or 1).num_bytes


def num_bytes(capacity: int) -> int:
    """Bytes of the arrays of `create(capacity)`."""
    # Four words for each slot, five for each row, and two numbers.
    return 16 * _fewest_slots(capacity) + 20 * capacity + 8


def _fewest_slots(capacity: int) -> int:
    return max(BUCKET, 1 << (_SLOTS_PER_ROW * capacity - 1).bit_length())


def _checked_slots(num_slots: int | None, capacity: int) -> int:
    fewest = _fewest_slots(capacity)
    if num_slots is None:
        return fewest
    num_slots = as_size("num_slots", num_slots)
    if num_slots < fewest or num_slots & (num_slots - 1):
        raise ValueError(
            f"num_slots must be a power of two, at least {fewest} for a capacity of {capacity}, "
            f"got {num_slots}."
        )
    return num_slots


def lookup_rows(index: KeyIndex, keys: Any, *, where: Array | None = None) -> Rows:
    """The rows of keys, and nothing else: no key gets a row, and none is counted.

    Args:
      index: a `KeyIndex`.
      keys: `Keys` [*shape], or what `Keys.of` takes.
      where: which of them are meant, bool [*shape]; default: all.

    Returns:
      `Rows`. All keys without a row count as not admitted.

    >>> index, given, _ = assign(create(10), Keys.of([5, 7, 5]), step=0)
    >>> lookup_rows(index, [7, 6]).rows.tolist()
    [1, 10]
    """
    keys, wanted, shape = flat_keys(keys, where)
    return _lookup_rows(index, keys, wanted).in_shape(shape) if wanted.size else _no_rows(shape)


@jax.jit
def _lookup_rows(index: KeyIndex, keys: Keys, wanted: jax.Array) -> Rows:
    """See `lookup_rows`, of flat keys [m]."""
    rows = find(index.slots, keys, wanted, index.capacity)
    missing = wanted & (rows == index.capacity)
    _, is_first, _ = first_places(keys, missing, jnp.ones_like(rows))
    found = _no_rows(rows.shape)._replace(rows=rows)
    return found._replace(not_admitted=jnp.sum(is_first, dtype=jnp.int32))


def assign(
    index: KeyIndex,
    keys: Any,
    step: Scalar,
    *,
    where: Array | None = None,
    times: Array | None = None,
    admission: Admission = _ADMIT_ALL,
    state: PyTree = (),
) -> tuple[KeyIndex, Rows, Any]:
    """The rows of keys; new ones get one if they are admitted. All are counted.

    Args:
      index: a `KeyIndex`; donate it, and it is updated in place.
      keys: `Keys` [*shape], or what `Keys.of` takes; any of them several times.
      step: the number of the step, from 0 on, int32 [].
      where: which of them are meant, bool [*shape]; default: all.
      times: how often each of them counts, int32 [*shape], at least once where it is meant;
        default: once.
      admission: which new keys get a row.
      state: what the admission keeps from one batch to the next, at first `admission.init()`.

    Returns:
      The index, `Rows`, and the admission's state. Keys beyond the last free row, in the order of
      their first places, get none and leave nothing behind.

    >>> index, given, _ = assign(create(2), Keys.of([5, 7, 5, 9]), step=0)
    >>> given.rows.tolist(), given.is_new.tolist(), int(given.no_room)
    ([0, 1, 0, 2], [True, True, False, False], 1)
    """
    keys, wanted, shape = flat_keys(keys, where)
    if not wanted.size:
        return index, _no_rows(shape), state
    step = jnp.asarray(step, jnp.int32)
    counted = jnp.ones_like(wanted, jnp.int32) if times is None else _flat_times(times, shape)
    index, given, state = _assign(index, keys, wanted, step, counted, admission, state)
    return index, given.in_shape(shape), state


# Jitted for its cache: outside of `jax.jit`, the loops would compile anew at every call.
@functools.partial(jax.jit, static_argnames="admission")
def _assign(
    index: KeyIndex,
    keys: Keys,
    wanted: jax.Array,
    step: jax.Array,
    times: jax.Array,
    admission: Admission,
    state: PyTree,
) -> tuple[KeyIndex, Rows, PyTree]:
    """See `assign`, of flat keys [m] and times [m]."""
    capacity = index.capacity
    rows = find(index.slots, keys, wanted, capacity)
    found = _no_rows(rows.shape)._replace(rows=rows)

    def newcomers(carry: Any, places: jax.Array, meant: jax.Array) -> Any:
        index, given, state = carry
        of_few = some_keys(keys, places), meant, step, read(times, places)
        index, new, state = _insert(index, *of_few, admission, state)
        at = jnp.where(meant, places, wanted.shape[0])
        given = Rows(
            set_rows(given.rows, at, new.rows),
            set_rows(given.is_new, at, new.is_new),
            new.not_admitted,
            new.no_room,
        )
        return index, given, state

    def everything(carry: Any) -> Any:
        (index, given, state), missing = carry
        # Else XLA would mix the keys of every batch beforehand, and hardly any comes here.
        missing, of_all = jax.lax.optimization_barrier((missing, keys))
        index, new, state = _insert(index, of_all, missing, step, times, admission, state)
        rows = jnp.where(missing, new.rows, given.rows)
        return (index, new._replace(rows=rows), state), jnp.zeros_like(missing)

    missing = wanted & (rows == capacity)
    carry = on_few(missing, newcomers, (index, found, state))
    carry = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), everything, carry)
    index, given, state = carry[0]
    index = index.replace(
        counts=index.counts.at[given.rows].add(times, mode="drop"),
        last_steps=index.last_steps.at[given.rows].set(step, mode="drop"),
    )
    return index, given, state


def _insert(
    index: KeyIndex,
    keys: Keys,
    wanted: jax.Array,
    step: jax.Array,
    times: jax.Array,
    admission: Admission,
    state: Any,
) -> tuple[KeyIndex, Rows, Any]:
    """Rows for keys [n] that have none, where wanted: those admitted, as long as there are any."""
    capacity = index.capacity
    first, is_first, occurrences = first_places(keys, wanted, times)
    newcomers = Newcomers(keys, is_first, occurrences, step)
    state, (is_admitted, counts) = admission.judge(state, newcomers)
    rank = ranks(is_admitted)
    is_new = is_admitted & (rank < index.num_free)
    rows = read(index.free, jnp.maximum(index.num_free - 1 - rank, 0))
    rows = jnp.where(is_new, rows, capacity)
    state = admission.settle(state, newcomers, is_new)
    slots, num_fresh = place(index.slots, keys, is_new, rows)
    num_new = jnp.sum(is_new, dtype=jnp.int32)
    index = index.replace(
        slots=slots,
        keys=Keys(set_rows(index.keys.hi, rows, keys.hi), set_rows(index.keys.lo, rows, keys.lo)),
        counts=set_rows(index.counts, rows, counts),
        num_free=index.num_free - num_new,
        num_unused=index.num_unused - num_fresh,
    )
    num_admitted = jnp.sum(is_admitted, dtype=jnp.int32)
    given = Rows(
        jnp.where(wanted, read(rows, first), capacity),
        is_new,
        jnp.sum(is_first, dtype=jnp.int32) - num_admitted,
        num_admitted - num_new,
    )
    return index, given, state


def _no_rows(shape: tuple[int, ...]) -> Rows:
    zero = jnp.int32(0)
    return Rows(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), zero, zero)


def flat_keys(keys: Any, where: Array | None) -> tuple[Keys, jax.Array, tuple[int, ...]]:
    """Keys [m], which of them are meant [m], and the shape that they had."""
    keys = Keys.of(keys)
    shape = keys.shape
    flat = Keys(jnp.asarray(keys.hi).reshape(-1), jnp.asarray(keys.lo).reshape(-1))
    wanted = jnp.ones(shape, bool) if where is None else jnp.asarray(where)
    if wanted.shape != shape:
        raise ValueError(f"where must have the shape of the keys, {shape}, got {wanted.shape}.")
    return flat, wanted.reshape(-1), shape


def _flat_times(times: Array, shape: tuple[int, ...]) -> jax.Array:
    times = jnp.asarray(times)
    if times.shape != shape or not jnp.issubdtype(times.dtype, jnp.integer):
        raise ValueError(
            f"times must be integers in the shape of the keys, {shape}, got {times.dtype} of shape "
            f"{times.shape}."
        )
    return times.astype(jnp.int32).reshape(-1)
