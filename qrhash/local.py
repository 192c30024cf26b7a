"""`LocalTable`: a table [num_rows, width] on one device; the array itself stands in parameters."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from qrhash import tuning
from qrhash.protocol import LookUps, Segment, Table
from qrhash.rowgrads import RowGrads
from qrhash.rows import (
    add_rows,
    flatten_indices,
    flatten_rows,
    gather_rows,
    is_within,
    out_sharding,
    read_rows,
    varying_axes,
    zeros_beside,
)
from qrhash.storage import LocalStorage
from qrhash.take import take
from qrhash.types import wide_dtype


@functools.partial(jax.tree_util.register_dataclass, data_fields=("array",), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False)
class LocalTable(Table):
    """See `Table`.

    Attributes:
      array: [num_rows, width].
    """

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """[num_rows, width]."""
        return self.array.shape

    @property
    def dtype(self) -> Any:
        """Of its entries."""
        return self.array.dtype

    @property
    def is_at_hand(self) -> bool:
        """See `Table`."""
        return True

    def as_given(self) -> Any:
        """See `Table`."""
        return self.array

    def to_array(self) -> jax.Array:
        """See `Table`."""
        return self.array

    def with_array(self, array: Any) -> Self:
        """Another array in the same place."""
        return dataclasses.replace(self, array=array)

    def take(self, indices: Sequence[jax.Array], look_ups: LookUps) -> list[jax.Array]:
        """See `Table`."""
        del look_ups
        index, split = flatten_indices(indices, self.shape[0])
        return split(gather_rows(self.array, index))

    def read(
        self, indices: Sequence[jax.Array], look_ups: LookUps
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """See `Table`."""
        del look_ups
        index, split = flatten_indices(indices, self.shape[0])
        (rows,), index = read_rows((self.array,), index)
        return split(rows), split(index)

    def take_from_many(self, indices: Sequence[jax.Array], look_ups: LookUps) -> list[jax.Array]:
        """See `Table`: the tables on top of each other are one."""
        number, num_rows, *width = self.array.shape
        stacked = []
        for index in indices:
            along = [-1 if axis == look_ups.batch_axis else 1 for axis in range(index.ndim)]
            first = (jnp.arange(number, dtype=index.dtype) * num_rows).reshape(along)
            found = is_within(index, num_rows)
            stacked.append(jnp.where(found, index + first, number * num_rows))
        one = self.with_array(self.array.reshape(number * num_rows, *width))
        return take(one, stacked, look_ups.within(stacked, number * num_rows))

    def gradient(
        self, indices: Sequence[jax.Array], cotangents: Sequence[jax.Array], look_ups: LookUps
    ) -> Self:
        """See `Table`."""
        index, _ = flatten_indices(indices, self.shape[0])
        if out_sharding(self.array, index) is not None:
            return self._gradient_on_explicit_axes(indices, cotangents, look_ups)
        values = cotangents[0] if len(cotangents) == 1 else flatten_rows(indices, cotangents)
        values = values.astype(wide_dtype(values.dtype))

        def by_product(platform: str) -> tuple[bool, ...]:
            if len(self.shape) != 2:
                return (False,) * len(look_ups.segments)
            return tuple(_is_for_one_hot(each, platform) for each in look_ups.segments)

        static = (tuple(self.shape), look_ups.segments)
        return self.with_array(tuning.by_platform(by_product, _sums, static, index, values))

    def _gradient_on_explicit_axes(
        self, indices: Sequence[jax.Array], cotangents: Sequence[jax.Array], look_ups: LookUps
    ) -> Self:
        """Where every operation is to say how its result is laid out: by JAX's own transposes."""
        wide, array = wide_dtype(self.dtype), self.array
        like = jax.ShapeDtypeStruct(array.shape, wide, sharding=array.sharding)
        transposed = jax.linear_transpose(
            lambda array: self.with_array(array).take(indices, look_ups), like
        )
        (gradient,) = transposed([each.astype(wide) for each in cotangents])
        return self.with_array(gradient)

    def row_grads(
        self,
        indices: Sequence[jax.Array],
        values: Sequence[jax.Array],
        look_ups: LookUps,
        *,
        num_loops: int = 0,
    ) -> Self:
        """See `Table`."""
        num_rows, *row = self.shape
        is_merged = look_ups.is_distinct and num_loops == 0 and len(indices) == 1
        if indices:
            flat = LocalStorage().flatten(indices, values)
        else:
            flat = jnp.zeros(0, jnp.int32), jnp.zeros((0, *row), self.dtype)
        named, grads = (_from_devices_alike(each, flat[1], self.array) for each in flat)
        is_merged = is_merged and named is flat[0]
        return self.with_array(RowGrads(named, grads, num_rows, is_merged))

    def products(self, query: jax.Array) -> "LocalTable":
        """See `Table`."""
        return LocalTable(jnp.einsum("rf,...f->r...", self.array.astype(query.dtype), query))


def _is_for_one_hot(segment: Segment, platform: str) -> bool:
    # How many look-ups an exported program will be called with is not known.
    if not isinstance(segment.lookups, int):
        return False
    entries = segment.num_rows * segment.lookups
    return segment.num_rows <= tuning.one_hot_rows(platform) and entries <= tuning.ONE_HOT_ENTRIES


def _sums(
    by_product: tuple[bool, ...],
    shape: tuple[int, ...],
    segments: tuple[Segment, ...],
    index: jax.Array,
    values: jax.Array,
) -> jax.Array:
    """The sum of values [*shape, ...] onto the rows named, of some segments by products."""
    if any(by_product):
        kinds = tuple(zip(by_product, segments, strict=True))
        return _add_by_products(shape, kinds, index, values)
    return _add(shape, index, values)


def _add(shape: tuple[int, ...], index: jax.Array, values: jax.Array) -> jax.Array:
    """By one scatter-add."""
    zeros = zeros_beside(values, shape, values.dtype)
    return add_rows(zeros, index, values, is_merged=False)


def _add_by_products(
    shape: tuple[int, ...],
    kinds: tuple[tuple[bool, Segment], ...],
    index: jax.Array,
    values: jax.Array,
) -> jax.Array:
    """Where the part of the table is small, by a product with one-hot rows.

    Neighbouring parts of one size are one batched product; what is left, one scatter-add.
    """
    index, values = index.reshape(-1), values.reshape(-1, *shape[1:])
    # What comes back for an id without a row may be NaN, and NaN times zero is NaN.
    found = is_within(index, shape[0])
    values = jnp.where(found[:, None], values, 0)
    sizes = [segment.lookups for _, segment in kinds]
    pieces = zip(kinds, jax.lax.split(index, sizes), jax.lax.split(values, sizes), strict=True)

    def kind_of(piece: Any) -> tuple[int, int] | None:
        (by_product, segment), *_ = piece
        return (segment.num_rows, segment.lookups) if by_product else None

    by_kind = [(kind, list(run)) for kind, run in itertools.groupby(pieces, kind_of)]
    others = [piece for kind, run in by_kind if kind is None for piece in run]
    if others:
        _, indices, parts = zip(*others, strict=True)
        total = _add(shape, jnp.concatenate(indices), jnp.concatenate(parts))
    else:
        total = zeros_beside(values, shape, values.dtype)
    for kind, run in by_kind:
        if kind is None:
            continue
        num_rows, _ = kind
        offsets = [segment.offset for (_, segment), *_ in run]
        local = [index - offset for (_, index, _), offset in zip(run, offsets, strict=True)]
        one_hot = jax.nn.one_hot(jnp.stack(local), num_rows, axis=1, dtype=values.dtype)
        stacked = jnp.stack([part for *_, part in run])
        highest = jax.lax.Precision.HIGHEST
        sums = jnp.einsum("srn,snf->srf", one_hot, stacked, precision=highest)
        for offset, of_part in zip(offsets, sums, strict=True):
            new = total[offset : offset + num_rows] + of_part
            total = jax.lax.dynamic_update_slice(total, new, (offset, 0))
    return total


def _from_devices_alike(each: jax.Array, values: jax.Array, table: Any) -> jax.Array:
    """Row numbers or values [m, ...] -> [n * m, ...], those of all devices with the same table.

    Inside of `jax.shard_map`, the gradient of a table that is alike on several devices is that of
    all their losses, as the dense gradient is.
    """
    axes = tuple(sorted(set(varying_axes(values)).difference(varying_axes(table))))
    if not axes:
        return each
    number, size = jax.lax.axis_index(axes), jax.lax.axis_size(axes)
    of_all = zeros_beside(values, (size, *each.shape), each.dtype).at[number].set(each)
    return jax.lax.psum(of_all, axes).reshape(-1, *each.shape[1:])
