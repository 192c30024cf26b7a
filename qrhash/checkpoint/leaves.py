"""The leaves of a tree: what of them a file holds, and what is made of it again.

A table is saved in the order of its rows (`Table.to_file`), whatever keeps it. JAX arrays come back
as JAX arrays, where the tree says; NumPy's and Python's numbers stay on the host.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from qrhash.checkpoint.writing import first_line
from qrhash.nnx.variables import KeyState, array_of, as_table
from qrhash.protocol import is_table

STATE = "state"  # name of the item that holds the arrays

# What the files can hold; NumPy has wider floats, and JAX other narrow numbers.
_DTYPES = re.compile(
    r"bool|int[24]|u?int(8|16|32|64)|float[48]_\w+|b?float16|float(32|64)|complex(64|128)"
)


def _is_table(node: Any) -> bool:
    """Whether it is a table, or a variable that may hold one: others are trees of arrays."""
    is_array = isinstance(node, nnx.Variable) and not isinstance(node, KeyState)
    return is_array or is_table(node)


def leaves_of(state: Any) -> dict[str, Any]:
    """Name -> array, number or `Table`, of all leaves of a tree."""
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="."), _value(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_table)
    ]
    named = {name: leaf for name, leaf in leaves if leaf is not None}
    if len(named) < sum(leaf is not None for _, leaf in leaves):
        raise ValueError("the leaves of a tree to be saved need names of their own.")
    for name, leaf in named.items():
        _check_leaf(name, leaf)
    return named


def _value(leaf: Any) -> Any:
    """What a leaf holds; None: nothing, as a variable that is masked in an optimizer's state."""
    if not isinstance(leaf, nnx.Variable):
        return leaf
    return as_table(leaf) if jax.tree.leaves(leaf) else None


def with_arrays(state: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with these arrays and tables in place of its own."""

    def of(path: Any, leaf: Any) -> Any:
        table: Any = leaves.get(jax.tree_util.keystr(path, simple=True, separator="."))
        if not isinstance(leaf, nnx.Variable):
            return table
        return leaf if table is None else leaf.replace(array_of(table))

    return jax.tree_util.tree_map_with_path(of, state, is_leaf=_is_table)


def _check_leaf(name: str, leaf: Any) -> None:
    """Raises a ValueError unless a file can hold it."""
    if is_table(leaf) or _is_key(leaf):
        return
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError(f"array {name!r} is being traced: save and restore outside jax.jit.")
    if isinstance(leaf, int) and not -(2**63) <= leaf < 2**64:
        raise ValueError(f"number {name!r} must have at most 64 bits, got {leaf}.")
    try:
        dtype = np.dtype(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)
    except (TypeError, ValueError) as error:  # of ragged lists and the like
        raise ValueError(f"leaf {name!r} is no array of numbers: {first_line(error)}") from error
    if not _DTYPES.fullmatch(dtype.name) or isinstance(leaf, np.ma.MaskedArray):
        raise ValueError(
            f"leaf {name!r} must be an array or a number of a dtype that files can hold, got "
            f"{type(leaf).__name__} of dtype {dtype}: what is no number goes into extra."
        )


def check_present(name: str, leaf: Any) -> None:
    """Raises a ValueError if there are no numbers to save."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(f"array {name!r} is the shape of one, {leaf}, without numbers to save.")
    if any(isinstance(each, jax.Array) and each.is_deleted() for each in jax.tree.leaves(leaf)):
        raise ValueError(
            f"array {name!r} was donated or deleted: save what the step returned in its place."
        )


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_on_host(leaf: Any) -> bool:
    """Whether it is NumPy's or Python's, or has a dtype that JAX would cut."""
    if is_table(leaf) or _is_key(leaf):
        return False
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return True
    return jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype


def signature(leaf: Any) -> dict[str, Any]:
    """Shape and dtype of a leaf, as JSON has them."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def in_file(leaf: Any) -> Any:
    """What is written for a leaf."""
    if is_table(leaf):
        return leaf.to_file()
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def is_empty(leaf: Any) -> bool:
    """Arrays without elements, which Orbax does not write."""
    return math.prod(np.shape(leaf)) == 0


def empty(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> the arrays without elements."""
    return {
        name: np.zeros(leaf.shape, leaf.dtype)
        if _is_on_host(leaf)
        else jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), _target(leaf).sharding)
        for name, leaf in leaves.items()
        if is_empty(leaf)
    }


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of what is read from the file onto devices."""
    leaf = leaf.file_type if is_table(leaf) else leaf
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def restore_args(leaves: Mapping[str, Any]) -> ocp.args.Composite | None:
    """What Orbax is to read, and onto which devices; None: nothing."""
    items: dict[str, Any] = {}
    args: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if is_empty(leaf):
            continue
        if _is_on_host(leaf):
            items[name], args[name] = 0, ocp.RestoreArgs(restore_type=np.ndarray)
            continue
        items[name] = to = _target(leaf)
        args[name] = ocp.ArrayRestoreArgs(
            sharding=to.sharding, global_shape=to.shape, dtype=to.dtype, strict=False
        )
    if not items:
        return None
    return ocp.args.Composite(**{STATE: ocp.args.PyTreeRestore(item=items, restore_args=args)})


def put(leaf: Any, array: np.ndarray) -> Any:
    """An array of the host, as what stands in the tree."""
    if not _is_on_host(leaf):
        array = jax.device_put(array, _target(leaf).sharding)
    return from_file(leaf, array)


def from_file(leaf: Any, array: Any) -> Any:
    """What was read, as what stands in the tree."""
    if is_table(leaf):
        return leaf.from_file(array)
    if _is_on_host(leaf):
        if isinstance(leaf, np.generic):
            return array[()]
        is_number = isinstance(leaf, (bool, int, float, complex))
        return type(leaf)(array[()].item()) if is_number else array
    if not isinstance(leaf, jax.Array) or leaf.committed or _is_key(leaf):
        return array
    return jnp.asarray(np.asarray(array))  # what is bound to no device can be used on all
