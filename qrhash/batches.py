"""Feeding batches to a mesh, from one process or from several."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qrhash.arithmetic import as_size
from qrhash.bags import Bag
from qrhash.layout import MeshLayout, check_layout
from qrhash.rows import device_index
from qrhash.types import Array, PyTree


def put_batch(batch: PyTree, size: int, layout: MeshLayout) -> PyTree:
    """A batch on the devices, of which this process gives the rows `process_rows`.

    Args:
      batch: a tree of NumPy arrays [rows of this process, ...]. JAX's types have 32 bits unless
        jax_enable_x64 is set: 64-bit integers that fit go on, those that do not are refused, as
        the `id_policy` that would have its say is not known here; floats are rounded.
      size: rows of the whole batch.
      layout: how it is split.

    Returns:
      The tree of global arrays [size, ...].

    Raises:
      ValueError: the size does not divide by the devices; an array of another number of rows; a
        `Bag`, which goes as padded arrays; integers that JAX would cut to 32 bits; what is no array
        of numbers.
    """
    mine = process_rows(size, layout)

    def put(path: Any, part: np.ndarray) -> jax.Array:
        if isinstance(part, Bag):
            raise ValueError(
                "batch must be a tree of arrays, got a Bag, which is not split by rows: put padded "
                "arrays [rows, length], and call Bag.from_padded inside of the jitted function."
            )
        if np.shape(part)[:1] != (mine.stop - mine.start,):
            raise ValueError(
                f"batch must be a tree of arrays of {mine.stop - mine.start} rows, those from "
                f"{mine.start} to {mine.stop} of {size} that this process gives, got shape "
                f"{np.shape(part)}."
            )
        part = as_device_has_it(path, part)
        to = NamedSharding(layout.mesh, layout.batch_spec(part.ndim))
        return jax.make_array_from_process_local_data(to, part, (size, *part.shape[1:]))

    return jax.tree_util.tree_map_with_path(put, batch, is_leaf=lambda x: isinstance(x, Bag))


def process_rows(size: int, layout: MeshLayout) -> slice:
    """The rows of a batch of that size that this process is to give."""
    check_batch(size, layout)
    to = NamedSharding(layout.mesh, layout.batch_spec(1))
    parts = to.addressable_devices_indices_map((size,)).values()
    ends = [part.indices(size) for each in parts for part in each or ()]
    return slice(min(start for start, _, _ in ends), max(stop for _, stop, _ in ends))


def check_batch(size: int, layout: MeshLayout) -> None:
    """Raises a ValueError unless a batch of that size can be split evenly."""
    check_layout(layout)
    size = as_size("size", size)
    if size % layout.size(layout.batch_axes):
        raise ValueError(
            f"the batch size must divide by the {layout.size(layout.batch_axes)} devices of mesh "
            f"axes {', '.join(layout.batch_axes)}, got {size}."
        )


def as_batch(
    indices: Sequence[Array], num_rows: Sequence[int], layout: MeshLayout | None
) -> Sequence[Array]:
    """On a mesh of explicit axes, row numbers laid out as the rows of large tables come."""
    if layout is None or not layout.is_explicit:
        return indices
    on_device = [device_index(*pair) for pair in zip(indices, num_rows, strict=True)]
    return split_as_rows(on_device, layout)


def split_as_rows(tree: PyTree, layout: MeshLayout | None) -> PyTree:
    """On a mesh of explicit axes, arrays [*shape] laid out as the rows of large tables come."""
    if layout is None or not layout.is_explicit or not (arrays := jax.tree.leaves(tree)):
        return tree
    spec = layout.for_batch(arrays, 0).batch_spec(arrays[0].ndim)
    to = NamedSharding(layout.mesh, spec)
    return jax.tree.map(lambda array: jax.sharding.reshard(jnp.asarray(array), to), tree)


def everywhere(tree: PyTree, layout: MeshLayout | None) -> PyTree:
    """On a mesh of explicit axes, arrays on every device: then sums over them need no axes."""
    if layout is None or not layout.is_explicit:
        return tree
    to = NamedSharding(layout.mesh, PartitionSpec())
    return jax.tree.map(lambda array: jax.sharding.reshard(jnp.asarray(array), to), tree)


def replicate(tree: PyTree, layout: MeshLayout) -> PyTree:
    """Arrays on every device of the mesh.

    Raises:
      ValueError: integers that JAX would cut to 32 bits.
    """
    exact = jax.tree_util.tree_map_with_path(as_device_has_it, tree)
    return jax.device_put(exact, NamedSharding(layout.mesh, PartitionSpec()))


def as_device_has_it(path: Any, leaf: Any) -> Any:
    """A leaf of a tree in the type that it has on a device; integers change no value.

    Raises:
      ValueError: an integer does not fit, or the leaf is no array of numbers.
    """
    if isinstance(leaf, jax.Array):
        return leaf
    array, name = np.asarray(leaf), jax.tree_util.keystr(path)
    where = f"batch{name}" if name else "batch"
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise ValueError(f"{where} must hold numbers, got an array of {array.dtype}.")
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if jnp.issubdtype(dtype, jnp.integer) and dtype != array.dtype:
        limits = np.iinfo(dtype)
        misfits = array[(array < limits.min) | (array > limits.max)]
        if misfits.size:
            raise ValueError(
                f"{where} must hold integers that fit {dtype}, JAX's type for {array.dtype}, got "
                f"{misfits[0]}, which would turn into {misfits[:1].astype(dtype)[0]}: compute row "
                "numbers on the host, with partition.indices(ids), and give these; or set "
                "jax_enable_x64."
            )
    return array.astype(dtype, copy=False)
