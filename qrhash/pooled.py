"""Sums over bags straight from the rows of tables: what lies between is never written down.

    sums[b] = sum over the places i of bag b:  scale_i * t_1[index_1i] * ... * t_k[index_ki]

A batch of bags has many more ids than vectors. To gather all their rows, multiply them and sum them
up would write arrays of all ids; here it is done for some thousand places at a time, which stay in
the cache, and the derivative gathers their rows again. "add" and "concat" are sums of one table
each.

The sum is a primitive of JAX, linear in each of its tables, so that its look-ups can be found in a
program (`qrhash.jaxprs`) and differentiated at their rows: `with_offsets` reads every row that is
named once, adds an offset there, and sums up from these rows in the table's place.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qrhash import tuning
from qrhash.merge import compact_rows
from qrhash.operations import combine
from qrhash.protocol import LookUps, Table
from qrhash.rows import (
    add_rows,
    apart,
    is_within,
    read_rows,
    rows_or_end,
    zeros_after,
    zeros_beside,
)
from qrhash.take import Site, take
from qrhash.types import wide_dtype


class Sums(NamedTuple):
    """The parameters of a sum over bags.

    Its operands are k tables [rows_j, width], k indices [n], the segments [n], and perhaps a scale
    [n]. A place of no bag has a segment outside [0, num_bags), and its indices name no row.

    Attributes:
      trees: structures of the tables, of one array each.
      num_bags: how many sums.
      dtype: that rows are multiplied in.
      misses_are_nan: whether a place in a bag that names no row makes the sum NaN.
    """

    trees: tuple[Any, ...]
    num_bags: int
    dtype: Any
    misses_are_nan: bool

    @property
    def num_tables(self) -> int:
        """How many tables, k."""
        return len(self.trees)

    def split(self, operands: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        """Operands -> tables, indices, segments, and the scale or None."""
        k = self.num_tables
        segments, *scale = operands[2 * k :]
        return operands[:k], operands[k : 2 * k], segments, scale[0] if scale else None

    def run(self, *operands: jax.Array) -> jax.Array:
        """The sums, [num_bags, width], of `wide_dtype`."""
        tables, indices, segments, scale = self.split(operands)
        width, wide = tables[0].shape[1], wide_dtype(self.dtype)
        is_apart = len(tables) > 1 and tuning.gathers_apart(tuning.traced_for(), width)

        def read(indices: Any, segments: jax.Array) -> list[jax.Array]:
            rows = lambda: list(map(_rows, tables, indices))  # noqa: E731
            return apart(rows, jnp.any(is_within(segments, self.num_bags))) if is_apart else rows()

        def add(sums: jax.Array, part: Any) -> jax.Array:
            indices, segments, scale = part
            scale = self._or_nan(scale, tables[0], indices[0])
            vectors = _scaled(self._product(read(indices, segments)).astype(wide), scale)
            return add_rows(sums, segments, vectors, is_merged=False)

        zeros = zeros_beside(segments, (self.num_bags, width), wide)
        return _in_parts(add, zeros, (indices, segments, scale))

    def of_table(
        self,
        number: int,
        cotangent: jax.Array,
        operands: Sequence[Any],
        *,
        after: Sequence[jax.Array] = (),
    ) -> jax.Array:
        """The derivative [rows, width] with respect to a table; see `zeros_after`."""
        tables, indices, segments, scale = self.split(operands)
        others = [n for n in range(self.num_tables) if n != number]
        kind = tables[number].aval
        wide = wide_dtype(kind.dtype)

        def add(gradient: jax.Array, part: Any) -> jax.Array:
            indices, segments, scale = part
            values = _scaled(_rows(cotangent, segments), scale)
            if others:
                rows = [_rows(tables[n], indices[n]) for n in others]
                values = values * self._product(rows).astype(values.dtype)
            return add_rows(gradient, indices[number], values.astype(wide), is_merged=False)

        zeros = zeros_after(after, zeros_beside(segments, kind.shape, wide))
        return _in_parts(add, zeros, (indices, segments, scale)).astype(kind.dtype)

    def of_scale(self, cotangent: jax.Array, operands: Sequence[Any]) -> jax.Array:
        """The derivative [n] with respect to the scale."""
        tables, indices, segments, scale = self.split(operands)

        def put(gradient: jax.Array, part: Any) -> jax.Array:
            indices, segments, places = part
            vectors = self._product(list(map(_rows, tables, indices))).astype(cotangent.dtype)
            products = (vectors * _rows(cotangent, segments)).sum(axis=1)
            is_summed = is_within(segments, self.num_bags)
            if self.misses_are_nan:
                is_summed &= is_within(indices[0], tables[0].shape[0])
            return gradient.at[places].set(jnp.where(is_summed, products, 0))

        zeros = zeros_beside(segments, segments.shape, cotangent.dtype)
        places = jnp.arange(segments.shape[0], dtype=jnp.int32)
        return _in_parts(put, zeros, (indices, segments, places)).astype(scale.aval.dtype)

    def site(self, number: int, operands: Sequence[Any]) -> Site:
        """The look-up in one of the tables, given operands or their types: every row once."""
        tables, indices, _, _ = self.split(operands)
        num_rows = tables[number].shape[0]
        look_ups = LookUps.of([indices[number]], num_rows, is_distinct=True)
        return Site(self.trees[number], look_ups)

    def with_offsets(
        self, operands: Sequence[Any], by_rows: Sequence[int], offsets: Iterator[Any]
    ) -> tuple[jax.Array, list[list[jax.Array]]]:
        """The sums, with offsets added to the rows of some of the tables; and which rows."""
        tables, indices, *_ = map(list, self.split(operands)[:2])
        rest, found = operands[2 * self.num_tables :], []
        for number in by_rows:
            num_rows = tables[number].shape[0]
            index = rows_or_end(indices[number], num_rows)
            named, indices[number] = compact_rows(index, num_rows)
            (rows,), named = read_rows((tables[number],), named)
            (offset,) = next(offsets)
            tables[number] = rows + offset
            found.append([named])
        return self._in_order(by_rows)(*tables, *indices, *rest), found

    def _in_order(self, by_rows: Sequence[int]) -> Callable[..., jax.Array]:
        """Operands -> the sums, differentiated with respect to some of the tables after all others.

        The derivative of the others is computed from the rows of these. Once it is there, the
        gradients of these rows, arrays as large, can have the same memory.
        """

        def bound(*operands: Any) -> jax.Array:
            sums: jax.Array = pooled_p.bind(*operands, sums=self)
            return sums

        if len(by_rows) == self.num_tables:
            return bound

        def forward(*operands: Any) -> tuple[jax.Array, Any]:
            values = [each.value for each in operands]
            # Trees without leaves, as what is kept must be arrays.
            wanted = [() if each.perturbed else None for each in operands]
            return bound(*values), (values, wanted)

        def backward(kept: Any, cotangent: Any) -> tuple[Any, ...]:
            operands, wanted = kept
            gradients: list[Any] = [None] * len(operands)
            if isinstance(cotangent, SymbolicZero):
                return tuple(gradients)
            numbers = [j for j in range(self.num_tables) if wanted[j] is not None]
            for j in (j for j in numbers if j not in by_rows):
                gradients[j] = self.of_table(j, cotangent, operands)
            after = [each for each in gradients if each is not None]
            for j in (j for j in numbers if j in by_rows):
                gradients[j] = self.of_table(j, cotangent, operands, after=after)
            *_, wants_scale = self.split(wanted)
            if wants_scale is not None:
                gradients[-1] = self.of_scale(cotangent, operands)
            return tuple(gradients)

        sums = jax.custom_vjp(bound)
        sums.defvjp(forward, backward, symbolic_zeros=True)
        return sums

    def _or_nan(
        self, scale: jax.Array | None, table: jax.Array, index: jax.Array
    ) -> jax.Array | None:
        """The scale of some places, or None for 1, with NaN where that is asked for."""
        if not self.misses_are_nan:
            return scale
        has_row = is_within(index, table.shape[0])
        return jnp.where(has_row, 1.0 if scale is None else scale, jnp.nan)

    def _product(self, rows: Sequence[jax.Array]) -> jax.Array:
        """Vectors [m, width] of the rows of some places."""
        return combine([each.astype(self.dtype) for each in rows], "mult")


def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
    # A place that names no row is dropped, or its sum is NaN: any row will do.
    return table.at[index].get(mode="clip", wrap_negative_indices=False)


def _scaled(vectors: jax.Array, scale: jax.Array | None) -> jax.Array:
    return vectors if scale is None else vectors * scale[:, None].astype(vectors.dtype)


def _in_parts(step: Callable[[Any, Any], Any], start: Any, arrays: Any) -> Any:
    """The steps over arrays [n, ...], some places at a time."""
    n = jax.tree.leaves(arrays)[0].shape[0]
    # In a program exported for any batch, n is a symbol.
    turns = n // tuning.PLACES_AT_ONCE if isinstance(n, int) else 0

    def turn(number: Any, carry: Any) -> Any:
        first = number * tuning.PLACES_AT_ONCE
        cut = lambda each: jax.lax.dynamic_slice_in_dim(each, first, tuning.PLACES_AT_ONCE)  # noqa: E731
        return step(carry, jax.tree.map(cut, arrays))

    done = turns * tuning.PLACES_AT_ONCE
    carry = jax.lax.fori_loop(0, turns, turn, start) if turns else start
    if isinstance(n, int) and done == n:
        return carry
    return step(carry, jax.tree.map(lambda each: each[done:], arrays))


def pooled_sums(
    tables: Sequence[Table],
    indices: Sequence[jax.Array],
    segments: jax.Array,
    scale: jax.Array | None,
    *,
    num_bags: int,
    dtype: Any,
    misses_are_nan: bool,
) -> jax.Array:
    """Sums over bags of the products of k rows.

    Args:
      tables: k tables [rows_j, width], each `is_at_hand`.
      indices: k arrays [n]; places of no bag name no row.
      segments: the number of each place's bag, [n].
      scale: a factor for each place, [n], differentiable; None: all 1.
      num_bags: how many bags.
      dtype: that rows are multiplied in.
      misses_are_nan: whether a place in a bag that names no row makes the sum NaN; else what it
        adds is not defined.

    Returns:
      [num_bags, width], of `wide_dtype(dtype)`.
    """
    arrays, trees = [], []
    for table in tables:
        (array,), tree = jax.tree.flatten(table)
        arrays.append(array)
        trees.append(tree)
    sums = Sums(tuple(trees), num_bags, jnp.dtype(dtype), misses_are_nan)
    rest = [segments] if scale is None else [segments, scale]
    return pooled_p.bind(*arrays, *indices, *rest, sums=sums)


pooled_p = Primitive("qrhash_pooled")


def _type(*operands: Any, sums: Sums) -> Any:
    shape = (sums.num_bags, operands[0].shape[1])
    return jax.core.ShapedArray(shape, wide_dtype(sums.dtype))


def _run(*operands: Any, sums: Sums) -> jax.Array:
    return sums.run(*operands)


def _jvp(primals: Any, tangents: Any, *, sums: Sums) -> tuple[Any, Any]:
    value = pooled_p.bind(*primals, sums=sums)
    # Linear in each of the tables, and in the scale.
    parts = []
    for place, tangent in enumerate(tangents):
        if type(tangent) is ad.Zero or jnp.issubdtype(primals[place].dtype, jnp.integer):
            continue
        linear = sums
        if sums.misses_are_nan and place > 2 * sums.num_tables:
            # A sum that is NaN stays so, whatever the scale of what it misses.
            tables, indices, _, _ = sums.split(primals)
            tangent = jnp.where(is_within(indices[0], tables[0].shape[0]), tangent, 0)
            linear = sums._replace(misses_are_nan=False)
        operands = [*primals[:place], tangent, *primals[place + 1 :]]
        parts.append(pooled_p.bind(*operands, sums=linear))
    if not parts:
        return value, ad.Zero(jax.typeof(value).to_tangent_aval())
    return value, sum(parts[1:], parts[0])


def _transpose(cotangent: Any, *operands: Any, sums: Sums) -> list[Any]:
    (place,) = (n for n, each in enumerate(operands) if ad.is_undefined_primal(each))
    if type(cotangent) is ad.Zero:
        gradient: Any = ad.Zero(operands[place].aval)
    elif place < sums.num_tables:
        gradient = sums.of_table(place, cotangent, operands)
    else:
        gradient = sums.of_scale(cotangent, operands)
    return [gradient if n == place else None for n in range(len(operands))]


def _batch(operands: Any, dims: Any, *, sums: Sums) -> tuple[Any, int]:
    """By look-ups, which know what a batch is."""

    def gathered(*operands: Any) -> jax.Array:
        tables, indices, segments, scale = sums.split(operands)
        rows = []
        for tree, array, index in zip(sums.trees, tables, indices, strict=True):
            table = jax.tree.unflatten(tree, [array])
            rows += take(table, [index], LookUps.of([index], array.shape[0]))
        vectors = combine([each.astype(sums.dtype) for each in rows], "mult")
        scale = sums._or_nan(scale, tables[0], indices[0])
        vectors = _scaled(vectors.astype(wide_dtype(sums.dtype)), scale)
        zeros = jnp.zeros((sums.num_bags, vectors.shape[1]), vectors.dtype)
        return add_rows(zeros, segments, vectors, is_merged=False)

    return jax.vmap(gathered, in_axes=tuple(dims))(*operands), 0


pooled_p.def_impl(jax.jit(_run, static_argnames="sums"))
pooled_p.def_abstract_eval(_type)
mlir.register_lowering(pooled_p, mlir.lower_fun(_run, multiple_results=False))
ad.primitive_jvps[pooled_p] = _jvp
ad.primitive_transposes[pooled_p] = _transpose
batching.primitive_batchers[pooled_p] = _batch
