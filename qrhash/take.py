"""The look-up in a table as one operation of JAX.

`take(table, indices, look_ups)` gathers rows. It is a JAX primitive, so that a look-up can be found
again in a traced program whatever it is inside of (`jax.jit`, `jax.vmap`, `jax.checkpoint`,
`jax.lax.scan`): `qrhash.program` looks for it to differentiate at the rows. The table itself says
what the operation does (see `qrhash.protocol.Table`): its arrays are operands, and the structure of
the tree that they are leaves of is a parameter, so that the table can be put together again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qrhash.protocol import LookUps, Table
from qrhash.rows import varying_axes


class Site(NamedTuple):
    """The parameters of a look-up in a program, but for the types of its results.

    Attributes:
      tree: structure of the table, whose arrays are the first operands.
      look_ups: see `LookUps`.
    """

    tree: Any
    look_ups: LookUps

    @property
    def num_arrays(self) -> int:
        """Arrays of the table: as many operands; all others are row numbers."""
        return self.tree.num_leaves

    def table(self, arrays: Sequence[Any]) -> Table:
        """The table of these arrays, or of their types."""
        return jax.tree.unflatten(self.tree, arrays)

    def split(self, operands: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Operands -> arrays of the table, and row numbers."""
        return operands[: self.num_arrays], operands[self.num_arrays :]

    def run(self, *operands: Any) -> list[jax.Array]:
        """The look-up itself."""
        arrays, indices = self.split(operands)
        return self.table(arrays).take(indices, self.look_ups)


def take(table: Table, indices: Sequence[jax.Array], look_ups: LookUps) -> list[jax.Array]:
    """Gathers rows, differentiably.

    Args:
      table: the table.
      indices: arrays of row numbers [*shape] each, on the device.
      look_ups: what else is known of them.

    Returns:
      For each index, rows [*shape, width] of the table's dtype; zeros for those outside it.
    """
    arrays, tree = jax.tree.flatten(table)
    operands = [*arrays, *indices]
    if not any(isinstance(each, jax.core.Tracer) for each in operands):
        return table.take(indices, look_ups)
    site = Site(tree, look_ups)
    # The types are taken from the program itself: on a mesh of explicit axes, and inside of
    # `jax.shard_map`, an array's type says more than its shape and dtype.
    program = jax.make_jaxpr(site.run)(*operands)
    return take_p.bind(*operands, site=site, out_avals=tuple(program.out_avals))


take_p = Primitive("qrhash_take")
take_p.multiple_results = True


def _run(*operands: Any, site: Site, out_avals: Any) -> list[jax.Array]:
    del out_avals
    return site.run(*operands)


def _jvp(primals: Any, tangents: Any, *, site: Site, out_avals: Any) -> tuple[Any, Any]:
    rows = take_p.bind(*primals, site=site, out_avals=out_avals)
    of_arrays, _ = site.split(tangents)
    if all(type(each) is ad.Zero for each in of_arrays):
        return rows, [ad.Zero(aval.to_tangent_aval()) for aval in out_avals]
    _, indices = site.split(primals)
    # The look-up is linear in the table.
    table = site.table([ad.instantiate_zeros(each) for each in of_arrays])
    return rows, take(table, indices, site.look_ups)


def _transpose(cotangents: Any, *operands: Any, site: Site, out_avals: Any) -> list[Any]:
    del out_avals
    arrays, indices = site.split(operands)
    none = [None] * len(indices)
    if all(type(each) is ad.Zero for each in cotangents):
        return [
            ad.Zero(each.aval) if ad.is_undefined_primal(each) else None for each in arrays
        ] + none
    types = [each.aval if ad.is_undefined_primal(each) else jax.typeof(each) for each in arrays]
    values = [ad.instantiate_zeros(each) for each in cotangents]
    gradient = site.table(types).gradient(indices, values, site.look_ups)
    return [
        _as_type(each, kind) if ad.is_undefined_primal(array) else None
        for each, kind, array in zip(jax.tree.leaves(gradient), types, arrays, strict=True)
    ] + none


def _as_type(gradient: jax.Array, kind: Any) -> jax.Array:
    # Inside of `jax.shard_map` a table may be alike on devices that look up other rows.
    alike = set(varying_axes(gradient)).difference(varying_axes(kind))
    if alike:
        gradient = jax.lax.psum(gradient, tuple(sorted(alike)))
    return gradient.astype(kind.dtype)


def _batch(operands: Any, dims: Any, *, site: Site, out_avals: Any) -> tuple[Any, Any]:
    del out_avals
    size = next(each.shape[d] for each, d in zip(operands, dims, strict=True) if d is not None)
    look_ups, axis = site.look_ups, site.look_ups.batch_axis
    arrays, indices = site.split(operands)
    of_arrays, of_indices = site.split(dims)
    moved = [_moved(*each, axis, size) for each in zip(indices, of_indices, strict=True)]
    if all(dim is None for dim in of_arrays):
        rows = take(site.table(arrays), moved, look_ups.times(size))
    else:
        many = [_moved(*each, 0, size) for each in zip(arrays, of_arrays, strict=True)]
        rows = site.table(many).take_from_many(moved, look_ups)
    return rows, [axis] * len(rows)


def _moved(each: jax.Array, dim: int | None, axis: int, size: int) -> jax.Array:
    """The array with its batch dimension along an axis; without one, as often as needed."""
    if dim is not None:
        return jnp.moveaxis(each, dim, axis)
    shape = (*each.shape[:axis], size, *each.shape[axis:])
    return jnp.broadcast_to(jnp.expand_dims(each, axis), shape)


take_p.def_impl(_run)
take_p.def_abstract_eval(lambda *_, site, out_avals: list(out_avals))
mlir.register_lowering(take_p, mlir.lower_fun(_run, multiple_results=True))
ad.primitive_jvps[take_p] = _jvp
ad.primitive_transposes[take_p] = _transpose
batching.primitive_batchers[take_p] = _batch
