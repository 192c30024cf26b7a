"""The look-up in a table as one operation of JAX, with the derivatives that tables need.

`take(table, indices, reader)` gathers rows; the `Reader` says how the table is kept. It is a JAX
primitive, so that a look-up can be found again in a traced program whatever it is inside of
(`jax.jit`, `jax.vmap`, `jax.checkpoint`, `jax.lax.scan`): `qrhash.autodiff` looks for it to
differentiate at the rows. Its ordinary derivative, that of the whole table, is the sum of the
gradients of each row, in float32 at least however narrow the table is.
"""

import abc
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import chex
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qrhash.rows import (
    add_rows,
    as_one,
    gather_rows,
    out_sharding,
    read_rows,
    varying_axes,
    wide_dtype,
    zeros_beside,
)

# Up to this many rows, a one-hot product gives a table's gradient faster than a scatter-add of
# all the batch's rows onto it, which on an accelerator waits for itself at every duplicate. On the
# CPU the scatter-add is a plain loop over rows, and faster for a table of any length.
_ONE_HOT_ROWS = {"cpu": 0}
_ONE_HOT_ROWS_ELSEWHERE = 2048
_ONE_HOT_ENTRIES = 2**26


class Segment(NamedTuple):
    """Some look-ups, next to each other, that all go to one part of a table.

    Attributes:
      offset: first row of the part.
      rows: its number of rows.
      lookups: number of row numbers.
    """

    offset: int
    rows: int
    lookups: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader(abc.ABC):
    """How the rows of a table are read, for several arrays of row numbers at once.

    Attributes:
      batch_axis: the axis of the indices that is the batch's: a mesh splits it.
      is_whole: whether all rows of the table are looked up, as `attend` does: its gradient is then
        one of the whole table, not one of the rows named.
    """

    batch_axis: int = 0
    is_whole: bool = False

    @abc.abstractmethod
    def take(self, table: Any, indices: Sequence[jax.Array]) -> list[jax.Array]:
        """For each index [*shape], rows [*shape, width]; zeros for those outside the table."""

    @abc.abstractmethod
    def read(
        self, table: Any, indices: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The same rows, and the row numbers that an update is to go by: see `read_rows`."""

    @abc.abstractmethod
    def gradient(
        self, table: Any, indices: Sequence[jax.Array], cotangents: Sequence[jax.Array]
    ) -> jax.Array:
        """The gradient of a table of this shape, of `wide_dtype`, given those of the rows."""

    @abc.abstractmethod
    def take_from_many(self, tables: Any, indices: Sequence[jax.Array]) -> list[jax.Array]:
        """Rows of as many tables [n, ...] as the batch axis of all indices is long."""

    @abc.abstractmethod
    def flatten(
        self, indices: Sequence[jax.Array], values: Sequence[jax.Array], *, num_loops: int
    ) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """Row numbers [*shape] and values [*shape, width] of look-ups -> [m] and [m, width].

        They have `num_loops` more leading axes than the look-up. Also the table's layout, if any.
        """

    def num_rows(self, table: Any) -> int:
        """Rows of a table."""
        return table.shape[0]

    def with_batch(self, size: int) -> Self:
        """The reader of `size` times as many look-ups: the new axis of indices is `batch_axis`."""
        del size
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalReader(Reader):
    """Of a table [num_rows, width] on one device, that may be a stack of others.

    Attributes:
      segments: which look-ups, in the order of the indices, go to which part of the table. The
        gradient of a part of few rows is, on accelerators, a product with one-hot rows.
    """

    segments: tuple[Segment, ...]

    def take(self, table: Any, indices: Sequence[jax.Array]) -> list[jax.Array]:
        """See `Reader`."""
        index, split = as_one(indices, table.shape[0])
        return split(gather_rows(table, index))

    def read(
        self, table: Any, indices: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """See `Reader`."""
        index, split = as_one(indices, table.shape[0])
        (rows,), index = read_rows((table,), index, fill_value=0.0)
        return split(rows), split(index)

    def gradient(
        self, table: Any, indices: Sequence[jax.Array], cotangents: Sequence[jax.Array]
    ) -> jax.Array:
        """See `Reader`."""
        index, _ = as_one(indices, table.shape[0])
        if out_sharding(table, index) is not None:
            return self._on_explicit_axes(table, indices, cotangents)
        width = table.shape[1:]
        values = cotangents[0]
        if len(cotangents) > 1:
            values = jnp.concatenate([each.reshape(-1, *width) for each in cotangents])
        values = values.astype(wide_dtype(values.dtype))
        if len(width) != 1 or not any(map(_is_for_one_hot, self.segments)):
            return self._added(table, index, values)
        return self._with_one_hot(table, index.reshape(-1), values.reshape(-1, *width))

    def _on_explicit_axes(
        self, table: Any, indices: Sequence[jax.Array], cotangents: Sequence[jax.Array]
    ) -> jax.Array:
        """Where every operation is to say how its result is laid out: by JAX's own transposes."""
        wide = wide_dtype(table.dtype)
        like = jax.ShapeDtypeStruct(table.shape, wide, sharding=table.sharding)
        transposed = jax.linear_transpose(lambda table: self.take(table, indices), like)
        (gradient,) = transposed([each.astype(wide) for each in cotangents])
        return gradient

    def _added(self, table: Any, index: jax.Array, values: jax.Array) -> jax.Array:
        zeros = zeros_beside(values, table.shape, values.dtype)
        return add_rows(zeros, index, values, is_merged=False)

    def _with_one_hot(self, table: Any, index: jax.Array, values: jax.Array) -> jax.Array:
        """By products where the part of the table is small, by one scatter-add for the others."""
        # What comes back for an id without a row may be NaN, and NaN times zero is NaN.
        found = (index >= 0) & (index < table.shape[0])
        values = jnp.where(found[:, None], values, 0)
        sizes = [segment.lookups for segment in self.segments]
        pieces = zip(
            self.segments, jax.lax.split(index, sizes), jax.lax.split(values, sizes), strict=True
        )
        by_kind = [(kind, list(run)) for kind, run in itertools.groupby(pieces, _kind_of_piece)]
        others = [
            piece for (is_for_one_hot, *_), run in by_kind if not is_for_one_hot for piece in run
        ]
        if others:
            _, indices, parts = zip(*others, strict=True)
            total = self._added(table, jnp.concatenate(indices), jnp.concatenate(parts))
        else:
            total = zeros_beside(values, table.shape, values.dtype)
        for (is_for_one_hot, num_rows, _), run in by_kind:
            if is_for_one_hot:
                segments, indices, parts = zip(*run, strict=True)
                local = [i - each.offset for i, each in zip(indices, segments, strict=True)]
                one_hot = jax.nn.one_hot(jnp.stack(local), num_rows, axis=1, dtype=values.dtype)
                highest = jax.lax.Precision.HIGHEST
                sums = jnp.einsum("srn,snf->srf", one_hot, jnp.stack(parts), precision=highest)
                for segment, of_part in zip(segments, sums, strict=True):
                    stop = segment.offset + num_rows
                    new = total[segment.offset : stop] + of_part
                    total = jax.lax.dynamic_update_slice(total, new, (segment.offset, 0))
        return total

    def flatten(
        self, indices: Sequence[jax.Array], values: Sequence[jax.Array], *, num_loops: int
    ) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """See `Reader`."""
        rows = jnp.concatenate([index.reshape(-1) for index in indices])
        return (rows, jnp.concatenate([each.reshape(-1, each.shape[-1]) for each in values])), None

    def take_from_many(self, tables: Any, indices: Sequence[jax.Array]) -> list[jax.Array]:
        """See `Reader`: the tables on top of each other are one."""
        number, num_rows, *width = tables.shape
        stacked = []
        for index in indices:
            along = [-1 if axis == self.batch_axis else 1 for axis in range(index.ndim)]
            first = (jnp.arange(number, dtype=index.dtype) * num_rows).reshape(along)
            found = (index >= 0) & (index < num_rows)
            stacked.append(jnp.where(found, index + first, number * num_rows))
        total = sum(index.size for index in indices)
        segments = (Segment(0, number * num_rows, total),)
        reader = dataclasses.replace(self, segments=segments)
        return take(tables.reshape(number * num_rows, *width), stacked, reader)

    def with_batch(self, size: int) -> Self:
        """See `Reader`."""
        segments = tuple(each._replace(lookups=each.lookups * size) for each in self.segments)
        return dataclasses.replace(self, segments=segments)


def _is_for_one_hot(segment: Segment) -> bool:
    most = _ONE_HOT_ROWS.get(jax.default_backend(), _ONE_HOT_ROWS_ELSEWHERE)
    # How many look-ups an exported program will be called with is not known.
    is_known = isinstance(segment.lookups, int)
    return is_known and segment.rows <= most and segment.rows * segment.lookups <= _ONE_HOT_ENTRIES


def _kind_of_piece(piece: tuple[Segment, Any, Any]) -> tuple[bool, int, int]:
    """What neighbouring segments must have in common to be handled in one product, or gather."""
    segment = piece[0]
    if _is_for_one_hot(segment):
        return (True, segment.rows, segment.lookups)
    return (False, 0, 0)


def take(table: chex.Array, indices: Sequence[jax.Array], reader: Reader) -> list[jax.Array]:
    """Gathers rows, differentiably.

    Args:
      table: the array that the reader reads from.
      indices: arrays of row numbers [*shape] each, on the device.
      reader: how it is read.

    Returns:
      For each index, rows [*shape, width] of the table's dtype; zeros for those outside it.
    """
    if not any(isinstance(each, jax.core.Tracer) for each in (table, *indices)):
        return reader.take(table, indices)
    # The shapes are taken from the program itself: on a mesh of explicit axes, and inside of
    # `jax.shard_map`, an array's type says more than its shape and dtype.
    program = jax.make_jaxpr(lambda *args: reader.take(args[0], args[1:]))(table, *indices)
    return take_p.bind(table, *indices, reader=reader, out_avals=tuple(program.out_avals))


take_p = Primitive("qrhash_take")
take_p.multiple_results = True


def _take(table: Any, *indices: Any, reader: Reader, out_avals: Any) -> list[jax.Array]:
    del out_avals
    return reader.take(table, indices)


def _jvp(primals: Any, tangents: Any, *, reader: Reader, out_avals: Any) -> tuple[Any, Any]:
    rows = take_p.bind(*primals, reader=reader, out_avals=out_avals)
    if type(tangents[0]) is ad.Zero:
        return rows, [ad.Zero(aval.to_tangent_aval()) for aval in out_avals]
    return rows, take(tangents[0], primals[1:], reader)


def _transpose(
    cotangents: Any, table: Any, *indices: Any, reader: Reader, out_avals: Any
) -> list[Any]:
    none = [None] * len(indices)
    if all(type(each) is ad.Zero for each in cotangents):
        return [ad.Zero(table.aval), *none]
    values = [ad.instantiate_zeros(each) for each in cotangents]
    gradient = reader.gradient(table.aval, indices, values)
    # Inside of `jax.shard_map` a table may be alike on devices that look up other rows.
    alike = set(varying_axes(gradient)).difference(varying_axes(table.aval))
    if alike:
        gradient = jax.lax.psum(gradient, tuple(sorted(alike)))
    return [gradient.astype(table.aval.dtype), *none]


def _batch(args: Any, dims: Any, *, reader: Reader, out_avals: Any) -> tuple[Any, Any]:
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    axis = reader.batch_axis
    table, *indices = args
    moved = [
        jnp.broadcast_to(jnp.expand_dims(index, axis), _with(index.shape, axis, size))
        if dim is None
        else jnp.moveaxis(index, dim, axis)
        for index, dim in zip(indices, dims[1:], strict=True)
    ]
    if dims[0] is None:
        rows = take(table, moved, reader.with_batch(size))
    else:
        rows = reader.take_from_many(jnp.moveaxis(table, dims[0], 0), moved)
    return rows, [axis] * len(rows)


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis:])


take_p.def_impl(_take)
take_p.def_abstract_eval(lambda *_, reader, out_avals: list(out_avals))
mlir.register_lowering(take_p, mlir.lower_fun(_take, multiple_results=True))
ad.primitive_jvps[take_p] = _jvp
ad.primitive_transposes[take_p] = _transpose
batching.primitive_batchers[take_p] = _batch
