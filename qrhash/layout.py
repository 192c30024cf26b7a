"""`MeshLayout`: how tables and batches are split over a mesh, and which device owns a row.

A large table of N rows over S devices is an array [S, R, width], R = ceil(N / S), split along its
first axis: row r is row r // S of shard r % S. Low ids are the frequent ones, so neighbouring rows
stand on different devices and the load is even. What is padded, at most one row for each shard, is
never named by a row number.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qrhash.arithmetic import as_fields, as_size, build, ceil_div
from qrhash.protocol import is_table
from qrhash.types import Array, PyTree, Scalar

EXCHANGES = ("auto", "reduce", "all_to_all")


# --- the law of placement: these four functions, and nothing else, know it ------------------------


def owner_and_place(indices: Any, num_shards: int) -> tuple[Any, Any]:
    """Which shard owns rows, and where they stand in it."""
    return indices % num_shards, indices // num_shards


def index_of(owner: Scalar, place: Scalar, num_shards: int) -> Any:
    """The inverse: row numbers of the rows at these places."""
    return place * num_shards + owner


def split_rows(table: Array, num_shards: int) -> Any:
    """Rows [N, ...] -> [S, R, ...], of the host or of the device; the padding is zeros."""
    num_rows, *rest = table.shape
    rows = ceil_div(num_rows, num_shards)
    # From the host every device gets its own part alone.
    xp = np if isinstance(table, np.ndarray) else jnp
    padded = xp.pad(table, [(0, num_shards * rows - num_rows), *[(0, 0)] * len(rest)])
    return xp.swapaxes(padded.reshape(rows, num_shards, *rest), 0, 1)


def join_rows(array: jax.Array, num_rows: int) -> jax.Array:
    """The inverse: [S, R, ...] -> [N, ...]."""
    rows = jnp.swapaxes(array, 0, 1)
    return rows.reshape(-1, *rows.shape[2:])[:num_rows]


class Shard(NamedTuple):
    """The part of every table that a device holds.

    Attributes:
      num_shards: into how many the rows are split.
      number: which one it is.
      column: which part of the width.
      num_columns: into how many that is split.
    """

    num_shards: int = 1
    number: Any = 0
    column: Any = 0
    num_columns: int = 1

    def indices(self, place: Scalar) -> Any:
        """Row numbers of its rows at these places."""
        return index_of(self.number, place, self.num_shards)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshLayout:
    """How large tables, and the batch, are split over a mesh: `layout` of an `EmbedConfig`.

    Attributes:
      mesh: the `jax.sharding.Mesh`.
      row_axes: mesh axis, or axes, over which the rows of large tables are split. Default: "model"
        if the mesh has it, else all axes. (): every device holds all rows.
      batch_axes: mesh axis, or axes, over which the leading axis of ids is split. Default: "data"
        if the mesh has it, else none. May share axes with `row_axes`.
      column_axis: mesh axis over which the width of large tables is split too. Default: none.
      exchange: "reduce", "all_to_all", or "auto": whichever moves less in a step.
      capacity: rows, or keys of a table that grows, that a device can send to another in one
        "all_to_all". Default: the mean for those spread at random, and six standard deviations.

    Raises:
      ValueError: no mesh, or one whose axes are not all `AxisType.Auto` or all `Explicit`; an axis
        that it has not, or that is named twice; an unknown exchange.

    >>> MeshLayout(mesh=jax.make_mesh((1, 1), ("data", "model"))).row_axes
    ('model',)
    """

    mesh: Mesh
    row_axes: Any = None
    batch_axes: Any = None
    column_axis: str | None = None
    exchange: str = "auto"
    capacity: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh):
            raise ValueError(f"mesh must be a jax.sharding.Mesh, got {self.mesh!r}.")
        types = dict.fromkeys(self.mesh.axis_types)
        if len(types) > 1 or AxisType.Manual in types:
            raise ValueError(
                "mesh must have axes of one type, AxisType.Auto or AxisType.Explicit, got "
                f"{', '.join(str(each) for each in self.mesh.axis_types)}: make it with "
                "jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * "
                f"{len(self.mesh.axis_types)})."
            )
        names = self.mesh.axis_names
        default = {
            "row_axes": ("model",) if "model" in names else names,
            "batch_axes": ("data",) if "data" in names else (),
        }
        for field in ("row_axes", "batch_axes"):
            axes = getattr(self, field)
            axes = default[field] if axes is None else axes
            if not isinstance(axes, (str, Sequence)):
                raise ValueError(f"{field} must be an axis of the mesh, or several, got {axes!r}.")
            object.__setattr__(self, field, (axes,) if isinstance(axes, str) else tuple(axes))
        columns = () if self.column_axis is None else (self.column_axis,)
        for field, axes in (
            ("row_axes", self.row_axes),
            ("batch_axes", self.batch_axes),
            ("column_axis", columns),
        ):
            unknown = [axis for axis in axes if axis not in names]
            if unknown:
                raise ValueError(
                    f"{field} must be axes of the mesh, {', '.join(map(str, names))}, got "
                    f"{unknown[0]!r}."
                )
            if len(set(axes)) < len(axes):
                raise ValueError(f"{field} must name an axis once, got {axes}.")
        if self.column_axis in (*self.row_axes, *self.batch_axes):
            raise ValueError(f"column_axis must be an axis of its own, got {self.column_axis!r}.")
        if self.exchange not in EXCHANGES:
            raise ValueError(
                f"exchange must be one of {', '.join(EXCHANGES)}, got {self.exchange!r}."
            )
        if self.capacity is not None:
            object.__setattr__(self, "capacity", as_size("capacity", self.capacity))

    def to_dict(self) -> dict[str, Any]:
        """The layout as JSON has it: of the mesh its axes, its shape and its devices' numbers."""
        mesh = {
            "axis_names": list(self.mesh.axis_names),
            "shape": list(self.mesh.devices.shape),
            "axis_types": [each.name for each in self.mesh.axis_types],
            "devices": [device.id for device in self.mesh.devices.flat],
        }
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        lists = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        return lists | {"mesh": mesh}

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], devices: Sequence[Any] | None = None
    ) -> "MeshLayout":
        """The layout of which `to_dict` made these values.

        Args:
          values: a mapping, also one that was JSON in between.
          devices: those of the mesh, in order. Default: those with the same numbers; where they are
            not here, the first ones of `jax.devices()`.

        Raises:
          ValueError: too few devices, or values that make no layout.
        """
        values = as_fields("layout", values)
        mesh = as_fields("mesh", values.get("mesh"))
        missing = {"axis_names", "shape", "axis_types"} - set(mesh)
        if missing:
            raise ValueError(f"mesh needs {min(missing)!r}, got {', '.join(mesh) or 'none'}.")
        shape = tuple(mesh["shape"])
        size = math.prod(shape)
        if devices is None:
            here = {device.id: device for device in jax.devices()}
            numbers = mesh.get("devices", [])
            known = len(numbers) == size and all(number in here for number in numbers)
            devices = [here[number] for number in numbers] if known else jax.devices()
        if len(devices) < size:
            raise ValueError(
                f"devices must be at least {size}, for a mesh of shape {shape}, got {len(devices)}."
            )
        of_mesh = np.array(devices[:size], dtype=object).reshape(shape)
        if not set(mesh["axis_types"]) <= set(AxisType.__members__):
            raise ValueError(f"axis_types must be Auto or Explicit, got {mesh['axis_types']}.")
        kinds = tuple(AxisType[name] for name in mesh["axis_types"])
        values["mesh"] = Mesh(of_mesh, tuple(mesh["axis_names"]), axis_types=kinds)
        return build(cls, values)

    def __reduce__(self) -> Any:
        # Devices do not pickle.
        return MeshLayout.from_dict, (self.to_dict(),)

    def __deepcopy__(self, _: Any) -> "MeshLayout":
        return self

    @property
    def num_shards(self) -> int:
        """Devices that the rows of a table are split over."""
        return self.size(self.row_axes)

    @property
    def num_columns(self) -> int:
        """Devices that the width of a table is split over."""
        return 1 if self.column_axis is None else self.size((self.column_axis,))

    @property
    def is_explicit(self) -> bool:
        """Whether the mesh makes the layout a part of an array's type."""
        return AxisType.Explicit in self.mesh.axis_types

    def rows_per_shard(self, num_rows: int) -> int:
        """Rows on each of these devices, padding included."""
        return ceil_div(num_rows, self.num_shards)

    def array_shape(self, num_rows: int, width: int) -> tuple[int, int, int]:
        """Shape [shards, rows per shard, width] of a table's array."""
        if width % self.num_columns:
            raise ValueError(
                f"a table's width must divide by the {self.num_columns} devices of mesh axis "
                f"{self.column_axis!r} that column_axis names, got {width}."
            )
        return (self.num_shards, self.rows_per_shard(num_rows), width)

    def table_spec(self, ndim: int = 3) -> PartitionSpec:
        """Of a table's array [S, R, width], and of optimizer state [S, R, width] or [S, R]."""
        return PartitionSpec(
            self.row_axes or None, *[None] * (min(ndim, 2) - 1), *self._column_specs(ndim)
        )

    def batch_spec(self, ndim: int, axis: int = 0) -> PartitionSpec:
        """Of an array with the batch along an axis."""
        if axis >= ndim or not self.batch_axes:
            return PartitionSpec()
        return PartitionSpec(*[None] * axis, self.batch_axes)

    def table_sharding(self, ndim: int = 3) -> NamedSharding:
        """The same as a sharding."""
        return NamedSharding(self.mesh, self.table_spec(ndim))

    def shardings(self, tree: PyTree) -> PyTree:
        """For each leaf of a tree, its `NamedSharding`: tables split by rows, the rest replicated.

        What `out_shardings` of `jax.jit` takes; the leaves may be abstract. Optimizer state counts
        as a table where it stands in a `ShardedTable`.
        """

        def of(node: Any) -> Any:
            here = node.shardings() if is_table(node) else None
            return NamedSharding(self.mesh, PartitionSpec()) if here is None else here

        return jax.tree.map(of, tree, is_leaf=is_table)

    def for_batch(self, indices: Sequence[jax.Array], axis: int) -> "MeshLayout":
        """The same, but with nothing split of a batch that does not divide by the devices."""
        devices = self.size(self.batch_axes)
        if all(index.ndim > axis and index.shape[axis] % devices == 0 for index in indices):
            return self
        return dataclasses.replace(self, batch_axes=())

    def run(self, fun: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`jax.shard_map` over the mesh, which takes arrays however they are laid out."""
        mapped = jax.shard_map(
            fun, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        if not self.is_explicit:
            return mapped

        def resharded(*args: Any) -> Any:
            to = jax.tree.map(
                lambda spec: NamedSharding(self.mesh, spec),
                in_specs,
                is_leaf=lambda node: isinstance(node, PartitionSpec),
            )
            return mapped(*jax.sharding.reshard(args, to))

        return resharded

    def shard(self) -> Shard:
        """What this device holds; inside `run`."""
        number = jax.lax.axis_index(self.row_axes) if self.row_axes else jnp.int32(0)
        if self.column_axis is None:
            return Shard(self.num_shards, number)
        column = jax.lax.axis_index(self.column_axis)
        return Shard(self.num_shards, number, column, self.num_columns)

    @property
    def shared_axes(self) -> tuple[str, ...]:
        """Those of the rows and of the batch: a device there owns rows, and looks others up."""
        return tuple(axis for axis in self.row_axes if axis in self.batch_axes)

    @property
    def row_axes_alone(self) -> tuple[str, ...]:
        """Those of the rows alone: devices along them look up the same ids."""
        return tuple(axis for axis in self.row_axes if axis not in self.batch_axes)

    @property
    def batch_axes_alone(self) -> tuple[str, ...]:
        """Those of the batch alone: devices along them own the same rows."""
        return tuple(axis for axis in self.batch_axes if axis not in self.row_axes)

    @property
    def lookup_axes(self) -> tuple[str, ...]:
        """The axes over which a batch's look-ups are split before they are sent by all-to-all."""
        return (*self.batch_axes, *self.row_axes_alone)

    def size(self, axes: Sequence[str]) -> int:
        """Devices along mesh axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _column_specs(self, ndim: int) -> list[str | None]:
        return [self.column_axis] if ndim > 2 else []

    def rows_spec(self, ndim: int, batch: PartitionSpec) -> PartitionSpec:
        """Of rows [*shape, width] of a batch."""
        dims = [*batch, *[None] * (ndim - 1 - len(batch))]
        return PartitionSpec(*dims, self.column_axis)


def check_layout(layout: Any) -> None:
    """Raises a ValueError unless it is a `MeshLayout`."""
    if not isinstance(layout, MeshLayout):
        raise ValueError(
            f"layout must be a qrhash.MeshLayout, such as MeshLayout(mesh=mesh), got {layout!r}."
        )


def mesh_axes(spec: Any) -> tuple[Any, ...]:
    """Axes of a mesh, each in a tuple: to Flax's rules a string would be a logical name."""
    return tuple((axes,) if isinstance(axes, str) else axes for axes in spec)
