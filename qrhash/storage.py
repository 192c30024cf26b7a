"""`LocalStorage`: the rows of an array [num_rows, ...] on one device, along its first axis."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qrhash.merge import merge_rows
from qrhash.protocol import Storage
from qrhash.rows import add_rows, flatten_rows, read_rows, set_rows


@dataclasses.dataclass(frozen=True)
class LocalStorage(Storage):
    """See `Storage`."""

    row_axis = 0

    def array_shape(self, num_rows: int, row: tuple[int, ...]) -> tuple[int, ...]:
        """See `Storage`."""
        return (num_rows, *row)

    def flatten(
        self, indices: Sequence[jax.Array], values: Sequence[jax.Array], *, batch_axis: int = 0
    ) -> tuple[jax.Array, jax.Array]:
        """See `Storage`."""
        del batch_axis
        flat = jnp.concatenate([index.reshape(-1) for index in indices])
        return flat, flatten_rows(indices, values)

    def merge(
        self, indices: jax.Array, values: jax.Array, num_rows: int
    ) -> tuple[jax.Array, jax.Array]:
        """See `Storage`."""
        return merge_rows(indices, values, num_rows)

    def read(
        self, arrays: Sequence[jax.Array], indices: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """See `Storage`."""
        return read_rows(arrays, indices)

    def add(
        self, array: jax.Array, indices: jax.Array, values: jax.Array, *, seldom: bool = False
    ) -> jax.Array:
        """See `Storage`."""
        del seldom
        return add_rows(array, indices, values, is_merged=True)

    def add_unmerged(
        self, array: jax.Array, indices: jax.Array, values: jax.Array, num_rows: int
    ) -> jax.Array:
        """See `Storage`: a scatter-add sums duplicates by itself."""
        del num_rows
        return add_rows(array, indices, values, is_merged=False)

    def set(
        self, array: jax.Array, indices: jax.Array, values: jax.Array, *, seldom: bool = False
    ) -> jax.Array:
        """See `Storage`."""
        del seldom
        return set_rows(array, indices, values)
