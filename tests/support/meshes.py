"""Meshes of host devices, and what is on them seen as on one device."""

import jax
from jax.sharding import AxisType

from qrhash import MeshLayout, RowGrads
from qrhash.protocol import is_table

BOTH = ("data", "model")


def make_layout(shape, names, kind=AxisType.Auto, **options):
    """A `MeshLayout` of host devices."""
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
    return MeshLayout(mesh=mesh, **options)


def layout_2x4(kind=AxisType.Auto, **options):
    """Of eight, the batch over two and the rows over four."""
    return make_layout((2, 4), BOTH, kind, **options)


def whole(tree):
    """With arrays [rows, width] in place of tables, however they are kept."""
    of = lambda node: node.to_array() if is_table(node) else node  # noqa: E731
    return jax.tree.map(of, tree, is_leaf=is_table)


def dense(grads):
    """With arrays in place of `RowGrads`, wherever they stand, and of tables."""
    is_leaf = lambda node: isinstance(node, RowGrads)  # noqa: E731
    of = lambda node: node.to_dense() if is_leaf(node) else node  # noqa: E731
    return whole(jax.tree.map(of, grads, is_leaf=is_leaf))
