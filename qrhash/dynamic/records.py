"""Records: a row of a table and all the optimizer's state of it, as bytes.

Values of any dtype go from the arrays into records and back with the same bits. The first byte of
a record is 1; a record of zeros was never written, and its row starts as `qrhash.init` and
`tx.init` would start it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qrhash.dynamic.embedding import Parameters
from qrhash.initializers import PerRow
from qrhash.optim.refusals import check_transformation
from qrhash.optim.state import owners_of
from qrhash.rows import set_rows
from qrhash.types import Array, Key, PyTree


class RowArrays:
    """Which arrays of the parameters and of the optimizer's state go by the rows of one table.

    Args:
      tx: the transformation.
      params: the parameters, or types of them.
      table: gives the table of a tree like them.

    Raises:
      ValueError: there is no such table, or it is no array [num_rows, width] of one device; or `tx`
        keeps state for it that does not go by rows.
    """

    def __init__(
        self, tx: optax.GradientTransformation, params: PyTree, table: Callable[[PyTree], Any]
    ) -> None:
        check_transformation(tx)
        leaves, tree = jax.tree.flatten(params)
        self.number = table(jax.tree.unflatten(tree, range(len(leaves))))
        if not isinstance(self.number, int) or len(leaves[self.number].shape) != 2:
            raise ValueError(
                "table must give the one array [cache_rows, features] in the parameters that is "
                f"the table, got {table(params)!r:.200}."
            )
        self.types = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        self._tx, self._tree = tx, tree
        owners = owners_of(tx, tree, leaves, {self.number: 0})
        self._num_state = len(owners)
        self.of_state = [place for place, owner in enumerate(owners) if owner is not None]

    @property
    def table(self) -> jax.ShapeDtypeStruct:
        """The type of the table."""
        return self.types[self.number]

    def of(self, params: PyTree, opt_state: PyTree) -> list[Any]:
        """These arrays: the table, then those of the state."""
        state = jax.tree.leaves(opt_state)
        if len(state) != self._num_state:
            raise ValueError(
                f"opt_state must be that of tx, of {self._num_state} arrays, got {len(state)}."
            )
        return [jax.tree.leaves(params)[self.number], *(state[n] for n in self.of_state)]

    def put(
        self, params: PyTree, opt_state: PyTree, arrays: Sequence[Array]
    ) -> tuple[PyTree, PyTree]:
        """Parameters and state with others in their places."""
        leaves, tree = jax.tree.flatten(params)
        state, state_tree = jax.tree.flatten(opt_state)
        leaves[self.number] = arrays[0]
        for place, array in zip(self.of_state, arrays[1:], strict=True):
            state[place] = array
        return jax.tree.unflatten(tree, leaves), jax.tree.unflatten(state_tree, state)

    def at_start(self, rows: jax.Array) -> list[jax.Array]:
        """Rows [n, width] of the table, and the state that they start with."""
        types = list(self.types)
        types[self.number] = jax.ShapeDtypeStruct(rows.shape, rows.dtype)
        # The others say nothing of these rows, and XLA leaves them out.
        leaves: list[Any] = [jnp.zeros(each.shape, each.dtype) for each in types]
        leaves[self.number] = rows
        params = jax.tree.unflatten(self._tree, leaves)
        return self.of(params, self._tx.init(params))


def only_table(params: PyTree) -> Any:
    """The table of `Parameters`, or the only leaf of parameters; else raises a ValueError."""
    if isinstance(params, Parameters):
        return params.table
    leaves = jax.tree.leaves(params)
    if len(leaves) != 1:
        raise ValueError(
            f"table must say which of the {len(leaves)} parameters is the table, such as "
            'lambda params: params["embedding"][0].'
        )
    return leaves[0]


class Records:
    """How records are made of the rows of arrays.

    Args:
      arrays: which arrays.
      initializer: how rows of the table start.
      key: the key that these are drawn from.
    """

    def __init__(self, arrays: RowArrays, initializer: PerRow, key: Key) -> None:
        width, dtype = arrays.table.shape[1:], arrays.table.dtype

        def start(key: Key, rows: jax.Array) -> list[jax.Array]:
            return arrays.at_start(initializer.rows(key, rows, width, dtype))

        self._start, self._key = jax.jit(start), key
        # Of this thread: another one, which fetches, may not have been told.
        self._is_wide = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
        types = jax.eval_shape(start, key, jax.ShapeDtypeStruct((1,), jnp.int32))
        self._parts = [(each.shape[1:], np.dtype(each.dtype)) for each in types]

    @functools.cached_property
    def _ends(self) -> list[int]:
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._parts]
        return np.cumsum([1, *sizes]).tolist()

    @property
    def width(self) -> int:
        """Bytes of a record."""
        return self._ends[-1]

    def pack(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Rows of arrays, each [n, ...] -> records, uint8 [n, width]."""
        records = np.empty((len(arrays[0]), self.width), np.uint8)
        records[:, 0] = 1
        for array, start, end in zip(arrays, self._ends, self._ends[1:], strict=False):
            flat = np.ascontiguousarray(array).reshape(len(records), -1)
            records[:, start:end] = flat.view(np.uint8)
        return records

    def unpack(self, records: np.ndarray, rows: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
        """Records [n, width] of rows [n] -> of each array [size, ...], behind the n anything.

        Rows that were never written are as they start.
        """
        new = np.flatnonzero(records[:, 0] == 0)
        started = self._started(rows[new]) if new.size else None
        arrays = []
        for (shape, dtype), start, end in zip(
            self._parts, self._ends, self._ends[1:], strict=False
        ):
            array = np.empty((size, *shape), dtype)
            flat = array.reshape(size, -1).view(np.uint8)
            flat[: len(records)] = records[:, start:end]
            arrays.append(array)
        if started is not None:
            for array, drawn in zip(arrays, started, strict=True):
                array[new] = np.asarray(drawn)[: new.size]
        return tuple(arrays)

    def _started(self, rows: np.ndarray) -> list[jax.Array]:
        with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(self._is_wide):
            started: list[jax.Array] = self._start(self._key, padded(rows, 0))
        return started


def padded(numbers: np.ndarray, end: int) -> np.ndarray:
    """Numbers [n] with some `end` behind them, int32 [size]: few sizes, as each is compiled."""
    step = 1 << max(len(numbers).bit_length() - 3, 6)
    longer = np.full(-(-len(numbers) // step) * step, end, np.int32)
    longer[: len(numbers)] = numbers
    return longer


def rows_of(
    arrays: Sequence[jax.Array], rows: np.ndarray
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Rows [n] of arrays, some thousand at a time: their numbers, and their values of each."""
    for start in range(0, len(rows), _AT_ONCE):
        some = rows[start : start + _AT_ONCE]
        values = _read(arrays, padded(some, 0))
        yield some, [np.asarray(each)[: len(some)] for each in values]


_AT_ONCE = 2**14


@jax.jit
def _read(arrays: Sequence[jax.Array], rows: jax.Array) -> list[jax.Array]:
    return [each.at[rows].get(mode="promise_in_bounds") for each in arrays]


@functools.partial(jax.jit, donate_argnums=0)
def swap_rows(
    arrays: Sequence[jax.Array], rows: jax.Array, values: Sequence[jax.Array]
) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    """Sets rows of some arrays, in place, and gives what was in them before.

    Args:
      arrays: each [num_rows, ...]; they are donated.
      rows: row numbers [n], none of them twice; those outside name none.
      values: for each array the new rows [n, ...].

    Returns:
      The arrays, and for each its old rows [n, ...].
    """
    num_rows = arrays[0].shape[0]

    def read(arrays: Sequence[jax.Array], rows: jax.Array) -> Any:
        here = jnp.minimum(rows, num_rows - 1)
        return tuple(each.at[here].get(mode="promise_in_bounds") for each in arrays), rows

    def skip(arrays: Sequence[jax.Array], rows: jax.Array) -> Any:
        return tuple(map(jnp.zeros_like, values)), jnp.full_like(rows, num_rows)

    # In order before the writes, as in `qrhash.rows.read_rows`. But that multiplies what it reads
    # by one, and a number of bfloat16 that is close to zero becomes zero by it.
    old, at = jax.lax.cond(jnp.any(rows < num_rows), read, skip, tuple(arrays), rows)
    new = [set_rows(array, at, value) for array, value in zip(arrays, values, strict=True)]
    return new, old
