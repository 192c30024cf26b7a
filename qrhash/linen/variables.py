"""`Table`: the box around a table, and how large ones are found by it."""

import re
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import struct
from jax.sharding import PartitionSpec

from qrhash.config import EmbedConfig
from qrhash.layout import mesh_axes
from qrhash.protocol import is_table

# Names of tables of one feature, and of stacks of small ones.
_SMALL = r"table(_\d+)?|refused_\d+|small_\d+_\w+"


class Table(nn.LogicallyPartitioned):
    """A large table, or one with axis names, as `init` returns it, until `nn.unbox` takes it out.

    Attributes:
      names: logical axis names, which rules map to a mesh; or axes of a mesh, each in a tuple; or
        None, and then nothing asks for rules, nor for the name of an axis that `nn.vmap` adds.
      is_large: whether it is trained by rows.
    """

    names: Any = struct.field(pytree_node=False)
    is_large: bool = struct.field(default=False, pytree_node=False)

    @property
    def _is_logical(self) -> bool:
        return any(isinstance(name, str) for name in self.names or ())

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The table; where the names are logical and there are rules, with their constraint."""
        return super().unbox(apply_constraint) if self._is_logical else self.value

    def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
        """With the name of an axis that a transformation adds, where there are logical names."""
        return super().add_axis(index, params) if self._is_logical else self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Any:
        """The inverse of `add_axis`."""
        return super().remove_axis(index, params) if self._is_logical else self

    def get_partition_spec(self) -> PartitionSpec:
        """The names as a spec: what `nn.get_partition_spec` collects."""
        if self.names is None or self._is_logical:
            return PartitionSpec(*self.names or ())
        return _spec_of_mesh_axes(self.names)

    def to_nnx_metadata(self) -> dict[str, Any]:
        """Value and metadata as `nnx.bridge` makes an `nnx.Variable` of them."""
        metadata = {"value": self.value, "is_large": self.is_large}
        if self.names is None:
            return metadata
        of_names = {"out_sharding": self.names, "sharding_rules": self.rules or ()}
        return metadata | of_names | {"eager_sharding": False}

    @classmethod
    def from_nnx_metadata(cls, metadata: dict[str, Any]) -> "Table":
        """The inverse of `to_nnx_metadata`."""
        return cls(
            metadata["value"],
            metadata.get("out_sharding"),
            rules=metadata.get("sharding_rules") or None,
            is_large=metadata.get("is_large", False),
        )


def _spec_of_mesh_axes(names: Sequence[Any]) -> PartitionSpec:
    """A spec that `nn.logical_to_mesh_sharding` leaves as it is.

    To that function a string is a logical name, and one without a rule is no axis at all; a tuple
    is axes of the mesh. But `PartitionSpec(("model",))` is made `PartitionSpec("model")`, unless it
    is made as here. Should that way close, tables come out replicated, and a test fails.
    """
    create = getattr(PartitionSpec, "_create", None)
    if create is None:
        return PartitionSpec(*names)
    return create(tuple(names), frozenset(), frozenset())


def boxed(value: Any, axes: Any, *, is_large: bool) -> Any:
    """A table with its metadata, or alone if there are none."""
    if axes is None and not is_large:
        return value
    axes = mesh_axes(axes) if is_table(value) else axes
    return Table(value, axes, is_large=is_large)


def large_tables(variables: Any) -> Any:
    """Finds the tables that are trained by rows: `large` of `qrhash.value_and_grad`.

    Args:
      variables: variables or parameters as `model.init` returns them, not yet unboxed; also from
        `jax.eval_shape`.

    Returns:
      A tree of bools, of the structure that `nn.unbox` gives.

    Raises:
      ValueError: there is no table of qrhash in them, or only such as were large, but are unboxed.
    """

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, nn.meta.AxisMetadata)

    leaves = jax.tree_util.tree_leaves_with_path(variables, is_leaf=is_box)
    boxed = any(isinstance(leaf, Table) for _, leaf in leaves)
    small = any(map(_is_small_table, *zip(*leaves, strict=True))) if leaves else False
    unboxed = any(map(_was_large_table, *zip(*leaves, strict=True))) if leaves else False
    if not boxed and (unboxed or not small):
        raise ValueError(
            "variables hold no table of qrhash: pass them as model.init returns them, before "
            "nn.unbox, unless the model has none."
        )
    return jax.tree.map(
        lambda leaf: isinstance(leaf, Table) and leaf.is_large, variables, is_leaf=is_box
    )


def _is_small_table(path: Any, leaf: Any) -> bool:
    return re.fullmatch(_SMALL, _last_name(path)) is not None


def _was_large_table(path: Any, leaf: Any) -> bool:
    """Whether a leaf without a box has the name, and the rows, of a table that had one."""
    is_long = getattr(leaf, "shape", (0,))[:1] >= (EmbedConfig.large_table_rows,)
    name = _last_name(path)
    return re.fullmatch(r"large_\d+_\w+", name) is not None or (
        is_long and _is_small_table(path, leaf)
    )


def _last_name(path: Any) -> str:
    return str(getattr(path[-1], "key", "")) if path else ""
