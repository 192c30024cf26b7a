"""Tables across the devices of a mesh.

A large table of N rows over S devices is an array [S, R, width], R = ceil(N / S), split along its
first axis: row r is row r // S of shard r % S. Low ids are the frequent ones, so neighbouring rows
stand on different devices and the load is even. What is padded, at most one row for each shard, is
never named by a row number.

A look-up moves rows of the batch, never a table, in one of two exchanges:

* "reduce": every device looks for all rows of its group, those of other shards being zeros, and the
  results are summed over the group. It never overflows.
* "all_to_all": every device merges its own row numbers, sends each to the shard that has the row,
  and gets rows back: the traffic of a device falls with the number of devices. There is room for
  `capacity` rows from one device to another; a batch that needs more, on any device, goes by
  "reduce" as a whole.

Gradients take the same ways in the other direction.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qrhash.arithmetic import as_fields, as_size, build, ceil_div
from qrhash.rows import (
    add_rows,
    device_index,
    distinct_rows,
    merge_rows,
    read_rows,
    rows_or_end,
    set_rows,
    wide_dtype,
)
from qrhash.take import LocalReader, Reader, take

EXCHANGES = ("auto", "reduce", "all_to_all")

_ROW_NUMBER_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharding:
    """How large tables, and the batch, are split over a mesh: `sharding` of an `EmbedConfig`.

    Attributes:
      mesh: the `jax.sharding.Mesh`.
      rows: mesh axis, or axes, over which the rows of large tables are split. Default: "model" if
        the mesh has it, else all axes. (): every device holds all rows.
      batch: mesh axis, or axes, over which the leading axis of ids is split. Default: "data" if
        the mesh has it, else none. May share axes with `rows`.
      columns: mesh axis over which the width of large tables is split too. Default: none.
      exchange: "reduce", "all_to_all", or "auto": whichever moves less in a step.
      capacity: rows that a device can send to another in one "all_to_all". Default: the mean for
        rows spread at random, and six standard deviations.

    Raises:
      ValueError: no mesh, or one whose axes are not all `AxisType.Auto` or all `Explicit`; an axis
        that it has not, or that is named twice; an unknown exchange.

    >>> Sharding(mesh=jax.make_mesh((1, 1), ("data", "model"))).rows
    ('model',)
    """

    mesh: Mesh
    rows: Any = None
    batch: Any = None
    columns: str | None = None
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
            "rows": ("model",) if "model" in names else names,
            "batch": ("data",) if "data" in names else (),
        }
        for field in ("rows", "batch"):
            axes = getattr(self, field)
            axes = default[field] if axes is None else axes
            if not isinstance(axes, (str, Sequence)):
                raise ValueError(f"{field} must be an axis of the mesh, or several, got {axes!r}.")
            object.__setattr__(self, field, (axes,) if isinstance(axes, str) else tuple(axes))
        columns = () if self.columns is None else (self.columns,)
        for field, axes in (("rows", self.rows), ("batch", self.batch), ("columns", columns)):
            unknown = [axis for axis in axes if axis not in names]
            if unknown:
                raise ValueError(
                    f"{field} must be axes of the mesh, {', '.join(map(str, names))}, got "
                    f"{unknown[0]!r}."
                )
            if len(set(axes)) < len(axes):
                raise ValueError(f"{field} must name an axis once, got {axes}.")
        if self.columns in (*self.rows, *self.batch):
            raise ValueError(f"columns must be an axis of its own, got {self.columns!r}.")
        if self.exchange not in EXCHANGES:
            raise ValueError(
                f"exchange must be one of {', '.join(EXCHANGES)}, got {self.exchange!r}."
            )
        if self.capacity is not None:
            object.__setattr__(self, "capacity", as_size("capacity", self.capacity))

    def to_dict(self) -> dict[str, Any]:
        """The sharding as JSON has it: of the mesh its axes, its shape and its devices' numbers."""
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
    ) -> "Sharding":
        """The sharding of which `to_dict` made these values.

        Args:
          values: a mapping, also one that was JSON in between.
          devices: those of the mesh, in order. Default: those with the same numbers; where they are
            not here, the first ones of `jax.devices()`.

        Raises:
          ValueError: too few devices, or values that make no sharding.
        """
        values = as_fields("sharding", values)
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
        return Sharding.from_dict, (self.to_dict(),)

    def __deepcopy__(self, _: Any) -> "Sharding":
        return self

    @property
    def num_shards(self) -> int:
        """Devices that the rows of a table are split over."""
        return self._size(self.rows)

    @property
    def is_explicit(self) -> bool:
        """Whether the mesh makes the sharding a part of an array's type."""
        return AxisType.Explicit in self.mesh.axis_types

    def rows_per_shard(self, num_rows: int) -> int:
        """Rows on each of these devices, padding included."""
        return ceil_div(num_rows, self.num_shards)

    def array_shape(self, num_rows: int, width: int) -> tuple[int, int, int]:
        """Shape [shards, rows per shard, width] of a table's array."""
        if self.columns is not None and width % self._size((self.columns,)):
            raise ValueError(
                f"a table's width must divide by the {self._size((self.columns,))} devices of mesh "
                f"axis {self.columns!r} that columns names, got {width}."
            )
        return (self.num_shards, self.rows_per_shard(num_rows), width)

    def table_spec(self, ndim: int = 3) -> PartitionSpec:
        """Of a table's array [S, R, width], and of optimizer state [S, R, width] or [S, R]."""
        return PartitionSpec(self.rows or None, *[None] * (min(ndim, 2) - 1), *self._columns(ndim))

    def batch_spec(self, ndim: int, axis: int = 0) -> PartitionSpec:
        """Of an array with the batch along an axis."""
        if axis >= ndim or not self.batch:
            return PartitionSpec()
        return PartitionSpec(*[None] * axis, self.batch)

    def place(self, tree: Any) -> Any:
        """For each leaf of a tree, its `NamedSharding`: tables split by rows, the rest replicated.

        What `out_shardings` of `jax.jit` takes; the leaves may be abstract. Optimizer state counts
        as a table where it stands in a `ShardedTable`.
        """

        def of(node: Any) -> Any:
            if not isinstance(node, ShardedTable):
                return NamedSharding(self.mesh, PartitionSpec())
            spec = node.sharding.table_spec(node.array.ndim)
            return node.with_array(NamedSharding(node.sharding.mesh, spec))

        return jax.tree.map(of, tree, is_leaf=is_sharded_table)

    def replicate(self, tree: Any) -> Any:
        """Arrays on every device of the mesh.

        Raises:
          ValueError: integers that JAX would cut to 32 bits.
        """
        exact = jax.tree_util.tree_map_with_path(as_device_has_it, tree)
        return jax.device_put(exact, NamedSharding(self.mesh, PartitionSpec()))

    def constrain(self, array: jax.Array) -> jax.Array:
        """A table's array where it belongs, as `jax.lax.with_sharding_constraint` does it."""
        to = NamedSharding(self.mesh, self.table_spec(array.ndim))
        return jax.lax.with_sharding_constraint(array, to)

    def put_batch(self, batch: Any, size: int) -> Any:
        """A batch on the devices, of which this process gives the rows `process_rows(size)`.

        Args:
          batch: a tree of NumPy arrays [rows of this process, ...]. JAX's types have 32 bits unless
            jax_enable_x64 is set: 64-bit integers that fit go on, those that do not are refused, as
            the `id_policy` that would have its say is not known here; floats are rounded.
          size: rows of the whole batch.

        Returns:
          The tree of global arrays [size, ...].

        Raises:
          ValueError: the size does not divide by the devices; an array of another number of rows;
            integers that JAX would cut to 32 bits; what is no array of numbers.
        """
        mine = self.process_rows(size)

        def put(path: Any, part: np.ndarray) -> jax.Array:
            if np.shape(part)[:1] != (mine.stop - mine.start,):
                raise ValueError(
                    f"batch must be a tree of arrays of {mine.stop - mine.start} rows, those from "
                    f"{mine.start} to {mine.stop} of {size} that this process gives, got shape "
                    f"{np.shape(part)}."
                )
            part = as_device_has_it(path, part)
            to = NamedSharding(self.mesh, self.batch_spec(part.ndim))
            return jax.make_array_from_process_local_data(to, part, (size, *part.shape[1:]))

        return jax.tree_util.tree_map_with_path(put, batch)

    def process_rows(self, size: int) -> slice:
        """The rows of a batch of that size that this process is to give."""
        self.check_batch(size)
        to = NamedSharding(self.mesh, self.batch_spec(1))
        parts = to.addressable_devices_indices_map((size,)).values()
        ends = [part.indices(size) for each in parts for part in each or ()]
        return slice(min(start for start, _, _ in ends), max(stop for _, stop, _ in ends))

    def check_batch(self, size: int) -> None:
        """Raises a ValueError unless a batch of that size can be split evenly."""
        if size % self._size(self.batch):
            raise ValueError(
                f"the batch size must divide by the {self._size(self.batch)} devices of mesh axes "
                f"{', '.join(self.batch)}, got {size}."
            )

    def for_batch(self, indices: Sequence[jax.Array], axis: int) -> "Sharding":
        """The same, but with nothing split of a batch that does not divide by the devices."""
        devices = self._size(self.batch)
        if all(index.ndim > axis and index.shape[axis] % devices == 0 for index in indices):
            return self
        return dataclasses.replace(self, batch=())

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

    def shard_number(self) -> jax.Array:
        """Which shard a device holds; inside `run`."""
        return jax.lax.axis_index(self.rows) if self.rows else jnp.int32(0)

    @property
    def _shared(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.rows if axis in self.batch)

    @property
    def _rows_alone(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.rows if axis not in self.batch)

    @property
    def _batch_alone(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.batch if axis not in self.rows)

    @property
    def _lookup_axes(self) -> tuple[str, ...]:
        """The axes over which a batch's look-ups are split before they are sent by all-to-all."""
        return (*self.batch, *self._rows_alone)

    def _size(self, axes: Sequence[str]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _columns(self, ndim: int) -> list[str | None]:
        return [self.columns] if ndim > 2 else []

    def _rows_spec(self, ndim: int, batch: PartitionSpec) -> PartitionSpec:
        """Of rows [*shape, width] of a batch."""
        dims = [*batch, *[None] * (ndim - 1 - len(batch))]
        return PartitionSpec(*dims, self.columns)

    def _capacity_of(self, lookups: int) -> int:
        """Rows from one device to another, for so many look-ups of one device."""
        if self.capacity is not None:
            return min(self.capacity, lookups)
        mean = lookups / self.num_shards
        return min(lookups, 8 * ceil_div(math.ceil(mean + 6 * mean**0.5), 8))

    def _by_all_to_all(self, lookups: int, row_bytes: float) -> bool:
        """Which exchange, for so many look-ups of one device, of rows of so many bytes."""
        if self.num_shards == 1 or lookups == 0 or self.exchange != "auto":
            return self.num_shards > 1 and lookups > 0 and self.exchange == "all_to_all"
        # What a device receives, forward and backward.
        named_row = row_bytes + _ROW_NUMBER_BYTES
        batch, shared, alone = map(self._size, (self.batch, self._shared, self._rows_alone))
        group = lookups * shared
        by_reduce = (shared - 1) * lookups * named_row + (batch - 1) * lookups * named_row
        by_reduce += 2 * (alone - 1) / alone * group * row_bytes
        mine = ceil_div(lookups, alone)
        sent = self.num_shards * self._capacity_of(mine)
        by_all_to_all = (1 + self._size(self._batch_alone)) * sent * named_row
        by_all_to_all += (alone - 1) * mine * row_bytes
        return by_all_to_all < by_reduce


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("array",), meta_fields=("num_rows", "sharding")
)
@dataclasses.dataclass(frozen=True, eq=False)
class ShardedTable:
    """A large table on a mesh: stands for an array [num_rows, width] in look-ups and in training.

    As a pytree it has one leaf, the array: optimizers keep their state in the same layout.

    Attributes:
      array: [S, R, width], see above.
      num_rows: rows of the table, without padding.
      sharding: its `Sharding`.
    """

    array: Any
    num_rows: int
    sharding: Sharding

    @property
    def shape(self) -> tuple[int, ...]:
        """[num_rows, width]."""
        return (self.num_rows, *self.array.shape[2:])

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """Of its entries."""
        return self.array.dtype

    def with_array(self, array: Any) -> "ShardedTable":
        """Another array in the same layout."""
        return dataclasses.replace(self, array=array)

    # Gradients of tables add up, and are scaled, as arrays and `RowGrads` are.
    def __add__(self, other: "ShardedTable") -> "ShardedTable":
        if not isinstance(other, ShardedTable):
            return NotImplemented
        if (self.num_rows, self.sharding) != (other.num_rows, other.sharding):
            raise ValueError("only tables, or gradients, of one number of rows and layout add up.")
        return self.with_array(self.array + other.array)

    def __radd__(self, other: Any) -> "ShardedTable":
        """0 + the table: where `sum` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    # An array left of an operator leaves it to the table.
    __array_ufunc__ = None

    def __neg__(self) -> "ShardedTable":
        return self.with_array(-self.array)

    def __sub__(self, other: "ShardedTable") -> "ShardedTable":
        return self + -other if isinstance(other, ShardedTable) else NotImplemented

    def __mul__(self, factor: chex.Numeric) -> "ShardedTable":
        return self.with_array(self.array * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: chex.Numeric) -> "ShardedTable":
        return self.with_array(self.array / divisor)

    def take(
        self, indices: Sequence[chex.Array], *, batch_axis: int = 0, is_whole: bool = False
    ) -> list[jax.Array]:
        """For each index [*shape], rows [*shape, width]; zeros for those outside the table."""
        indices, layout = self._on_mesh(indices, batch_axis)
        reader = ShardedReader(
            layout=layout, rows=self.num_rows, batch_axis=batch_axis, is_whole=is_whole
        )
        return take(self.array, indices, reader)

    def read(
        self, indices: Sequence[chex.Array], *, batch_axis: int = 0
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Rows, zeros outside, and the row numbers that an update is to go by; see `read_rows`."""
        indices, layout = self._on_mesh(indices, batch_axis)
        return _read((layout, self.num_rows, batch_axis), self.array, indices)

    def __reduce__(self) -> Any:
        return _unpickled, (self.array, self.num_rows, self.sharding)

    def in_place(self) -> "ShardedTable":
        """The table with its array where its sharding says, as pickle does not keep it."""
        is_concrete = isinstance(self.array, jax.Array) and not isinstance(
            self.array, jax.core.Tracer
        )
        return jax.device_put(self, self.sharding.place(self)) if is_concrete else self

    def warn_if_elsewhere(self) -> None:
        """Warns of an array that is not where its sharding says; of a traced one nothing is known.

        The numbers are right nonetheless, but every look-up moves the table, or every device holds
        all of it.
        """
        array, layout = self.array, self.sharding
        if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
            return
        to = NamedSharding(layout.mesh, layout.table_spec(array.ndim))
        if not array.sharding.is_equivalent_to(to, array.ndim):
            warnings.warn(
                f"a table of shape {self.shape} is not where its sharding says, {to.spec} of "
                f"{layout.num_shards} shards, but at {array.sharding}: it takes up to "
                f"{layout.num_shards} times the memory, and is moved in every look-up. Put it "
                "there with jax.device_put(tables, sharding.place(tables)).",
                stacklevel=3,
            )

    def _on_mesh(
        self, indices: Sequence[chex.Array], batch_axis: int
    ) -> tuple[list[jax.Array], Sharding]:
        self.warn_if_elsewhere()
        n = self.num_rows
        checked = [rows_or_end(device_index(index, n), n) for index in indices]
        return checked, self.sharding.for_batch(checked, batch_axis)

    def to_array(self) -> jax.Array:
        """All rows, [num_rows, width], in their order: for tables that fit one device."""
        array = self.array
        if self.sharding.is_explicit:
            array = jax.sharding.reshard(array, NamedSharding(self.sharding.mesh, PartitionSpec()))
        rows = jnp.swapaxes(array, 0, 1)
        return rows.reshape(-1, *rows.shape[2:])[: self.num_rows]

    def in_order(self) -> jax.Array:
        """All rows in their order and split in blocks, [n, width], n >= num_rows: for files.

        Every device sends its rows to where they belong: none ever holds more than two shards.
        """
        return _in_order(self.sharding, self.array)

    def from_order(self, rows: jax.Array) -> "ShardedTable":
        """The table of the same layout with these rows, as `in_order` gives them."""
        return self.with_array(_from_order(self.sharding, self.array.shape[1], rows))

    @property
    def ordered(self) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding of `in_order`."""
        shards, rows, *rest = self.array.shape
        shape = (shards * shards * ceil_div(rows, shards), *rest)
        to = NamedSharding(self.sharding.mesh, _ordered_spec(self.sharding, self.array.ndim))
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=to)

    @classmethod
    def from_array(cls, table: chex.Array, sharding: Sharding) -> "ShardedTable":
        """A table [num_rows, width] split over a mesh."""
        num_rows, width = table.shape
        shards, rows, _ = sharding.array_shape(num_rows, width)
        # From the host every device gets its own part alone.
        xp = np if isinstance(table, np.ndarray) else jnp
        padded = xp.pad(table, [(0, shards * rows - num_rows), (0, 0)])
        array = xp.swapaxes(padded.reshape(rows, shards, width), 0, 1)
        to = NamedSharding(sharding.mesh, sharding.table_spec())
        return cls(jax.device_put(array, to), num_rows, sharding)


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


def mesh_axes(spec: Any) -> tuple[Any, ...]:
    """Axes of a mesh, each in a tuple: to Flax's rules a string would be a logical name."""
    return tuple((axes,) if isinstance(axes, str) else axes for axes in spec)


def is_sharded_table(node: Any) -> bool:
    """Whether a node of a tree is a `ShardedTable`."""
    return isinstance(node, ShardedTable)


def _unpickled(array: Any, num_rows: int, sharding: Sharding) -> ShardedTable:
    return ShardedTable(array, num_rows, sharding).in_place()


def whole_table(table: Any) -> Any:
    """A table as one array [num_rows, width], however it is kept."""
    return table.to_array() if is_sharded_table(table) else table


def _ordered_spec(layout: Sharding, ndim: int) -> PartitionSpec:
    return PartitionSpec(layout.rows or None, *layout._columns(ndim))


@functools.partial(jax.jit, static_argnums=0)
def _in_order(layout: Sharding, array: jax.Array) -> jax.Array:
    shards, rows = array.shape[:2]
    block = ceil_div(rows, shards)

    def send(array: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, block * shards - rows), *[(0, 0)] * (array.ndim - 2)]
        parts = jnp.pad(array, padding)[0].reshape(shards, block, *array.shape[2:])
        if layout.rows:
            parts = jax.lax.all_to_all(parts, layout.rows, 0, 0, tiled=True)
        return jnp.swapaxes(parts, 0, 1).reshape(-1, *array.shape[2:])

    spec, ordered = layout.table_spec(array.ndim), _ordered_spec(layout, array.ndim)
    return layout.run(send, (spec,), ordered)(array)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _from_order(layout: Sharding, rows_per_shard: int, rows: jax.Array) -> jax.Array:
    shards, block = layout.num_shards, ceil_div(rows_per_shard, layout.num_shards)

    def send(rows: jax.Array) -> jax.Array:
        parts = jnp.swapaxes(rows.reshape(block, shards, *rows.shape[1:]), 0, 1)
        if layout.rows:
            parts = jax.lax.all_to_all(parts, layout.rows, 0, 0, tiled=True)
        return parts.reshape(1, -1, *rows.shape[1:])[:, :rows_per_shard]

    spec, ordered = layout.table_spec(rows.ndim + 1), _ordered_spec(layout, rows.ndim + 1)
    return layout.run(send, (ordered,), spec)(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedReader(Reader):
    """Of the array [S, R, width] of a table on a mesh.

    Attributes:
      layout: its `Sharding`.
      rows: of the table, without padding.
    """

    layout: Sharding
    rows: int

    def take(self, table: Any, indices: Sequence[jax.Array]) -> list[jax.Array]:
        """See `Reader`."""
        return self.read(table, indices)[0]

    def read(
        self, table: Any, indices: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """See `Reader`."""
        layout = self.layout.for_batch(indices, self.batch_axis)
        return _read((layout, self.rows, self.batch_axis), table, indices)

    def gradient(
        self, table: Any, indices: Sequence[jax.Array], cotangents: Sequence[jax.Array]
    ) -> jax.Array:
        """See `Reader`: its look-ups' gradients, added up where the rows are."""
        layout = self.layout.for_batch(indices, self.batch_axis)
        values = [each.astype(wide_dtype(each.dtype)) for each in cotangents]
        rows, flat = flatten_lookups(layout, self.batch_axis, indices, values)
        owned, sums = to_owners(layout, self.rows, rows, flat, None)
        end = layout.rows_per_shard(self.rows)

        def add(rows: jax.Array, sums: jax.Array) -> jax.Array:
            zeros = jnp.zeros((end, *sums.shape[2:]), sums.dtype)
            return add_rows(zeros, rows[0], sums[0], is_merged=True)[None]

        in_specs = (layout.table_spec(2), layout.table_spec(sums.ndim))
        return layout.run(add, in_specs, in_specs[1])(owned, sums)

    def flatten(
        self, indices: Sequence[jax.Array], values: Sequence[jax.Array], *, num_loops: int
    ) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """See `Reader`."""
        axis = self.batch_axis + num_loops
        layout = self.layout.for_batch(indices, axis)
        return flatten_lookups(layout, axis, indices, values), layout

    def num_rows(self, table: Any) -> int:
        """See `Reader`."""
        del table
        return self.rows

    def take_from_many(self, tables: Any, indices: Sequence[jax.Array]) -> list[jax.Array]:
        """See `Reader`: one after the other."""
        axis = self.batch_axis
        each = [
            take(table, [jnp.take(index, number, axis) for index in indices], self)
            for number, table in enumerate(tables)
        ]
        return [jnp.stack(rows, axis) for rows in zip(*each, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicatedReader(LocalReader):
    """Of a table that is on every device of a mesh: each reads for its part of the batch.

    Attributes:
      layout: how the batch is split.
    """

    layout: Sharding

    def take(self, table: Any, indices: Sequence[jax.Array]) -> list[jax.Array]:
        """See `Reader`."""
        layout, local, specs = self._on_mesh(indices)
        run = layout.run(local.take, (PartitionSpec(), specs), specs)
        return run(table, list(indices))

    def gradient(
        self, table: Any, indices: Sequence[jax.Array], cotangents: Sequence[jax.Array]
    ) -> jax.Array:
        """See `Reader`."""
        layout, local, specs = self._on_mesh(indices)

        def add(indices: Sequence[jax.Array], cotangents: Sequence[jax.Array]) -> jax.Array:
            gradient = local.gradient(table, indices, cotangents)
            return jax.lax.psum(gradient, layout.batch) if layout.batch else gradient

        run = layout.run(add, (specs, specs), PartitionSpec())
        return run(list(indices), list(cotangents))

    def take_from_many(self, tables: Any, indices: Sequence[jax.Array]) -> list[jax.Array]:
        """See `Reader`."""
        local = LocalReader(batch_axis=self.batch_axis, segments=self.segments)
        return local.take_from_many(tables, indices)

    def _on_mesh(
        self, indices: Sequence[jax.Array]
    ) -> tuple[Sharding, LocalReader, list[PartitionSpec]]:
        """The layout of these look-ups, what each device reads by, and specs of the indices."""
        layout = self.layout.for_batch(indices, self.batch_axis)
        devices = layout._size(layout.batch)
        segments = tuple(each._replace(lookups=each.lookups // devices) for each in self.segments)
        local = LocalReader(batch_axis=self.batch_axis, segments=segments)
        return layout, local, [layout.batch_spec(index.ndim, self.batch_axis) for index in indices]


_Layout = tuple[Sharding, int, int]  # how a table is split, its rows, and the axis of the batch


def _read(
    where: _Layout, array: jax.Array, indices: Sequence[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """For each index [*shape] rows [*shape, width]; and the row numbers, as results of the read."""
    layout, num_rows, batch_axis = where

    def read(array: jax.Array, *indices: jax.Array) -> Any:
        flat = jnp.concatenate([index.reshape(-1) for index in indices])
        rows, is_read = _read_flat(layout, num_rows, array[0], flat)
        parts = jax.lax.split(rows, [index.size for index in indices])
        shaped = [
            part.reshape(*index.shape, *part.shape[1:])
            for part, index in zip(parts, indices, strict=True)
        ]
        return shaped, [jnp.where(is_read, index, num_rows) for index in indices]

    if not sum(index.size for index in indices):
        none = [jnp.zeros((*index.shape, *array.shape[2:]), array.dtype) for index in indices]
        return none, list(indices)
    of_indices = [layout.batch_spec(index.ndim, batch_axis) for index in indices]
    of_rows = [
        layout._rows_spec(index.ndim + array.ndim - 2, spec)
        for index, spec in zip(indices, of_indices, strict=True)
    ]
    in_specs = (layout.table_spec(array.ndim), *of_indices)
    return layout.run(read, in_specs, (of_rows, of_indices))(array, *indices)


def _read_flat(
    layout: Sharding, num_rows: int, table: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """On one device: its shard [R, width] and row numbers [n] -> rows [n, width]; and True.

    The truth is a result of the read.
    """
    row_bytes = table.dtype.itemsize * math.prod(table.shape[1:])
    if not layout._by_all_to_all(rows.size, row_bytes):
        return _read_by_reduce(layout, num_rows, table, rows)
    mine = _my_part(layout, rows, num_rows)
    distinct, chosen = distinct_rows(mine, num_rows)
    slots, overflows = _slots(layout, num_rows, distinct)

    def by_all_to_all(table: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
        sent = layout.num_shards * layout._capacity_of(mine.size)
        wanted = jnp.full(sent, table.shape[0], distinct.dtype)
        wanted = set_rows(wanted, slots, distinct // layout.num_shards)
        local = jax.lax.all_to_all(wanted, layout.rows, 0, 0, tiled=True)
        (found,), local = read_rows((table,), local, fill_value=0.0)
        back = jax.lax.all_to_all(found, layout.rows, 0, 0, tiled=True)
        places = slots[chosen]
        taken = back.at[places].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        if layout._rows_alone:
            taken = jax.lax.all_gather(taken, layout._rows_alone, tiled=True)[: rows.size]
        return taken, _is_read(local)

    def by_reduce(table: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _read_by_reduce(layout, num_rows, table, rows)

    return jax.lax.cond(overflows, by_reduce, by_all_to_all, table, rows)


def _read_by_reduce(
    layout: Sharding, num_rows: int, table: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    group = rows
    if layout._shared:
        group = jax.lax.all_gather(rows, layout._shared, tiled=True)
    (found,), local = read_rows((table,), _local(layout, num_rows, group), fill_value=0.0)
    if layout._rows_alone:
        found = jax.lax.psum(found, layout._rows_alone)
    if layout._shared:
        found = jax.lax.psum_scatter(found, layout._shared, tiled=True)
    return found, _is_read(local)


def _is_read(local: jax.Array) -> jax.Array:
    """True; but to XLA, a result of the conditional that row numbers came out of."""
    return local[0] >= 0 if local.size else jnp.bool_(True)


def _local(layout: Sharding, num_rows: int, rows: jax.Array) -> jax.Array:
    """Row numbers in the device's own shard, one past its end for those of other shards."""
    shards, end = layout.num_shards, layout.rows_per_shard(num_rows)
    is_mine = (rows < num_rows) & (rows % shards == layout.shard_number())
    return jnp.where(is_mine, rows // shards, end)


def _my_part(layout: Sharding, each: jax.Array, fill_value: Any) -> jax.Array:
    """This device's part of what stands alike on all devices along the axes of the rows alone."""
    devices = layout._size(layout._rows_alone)
    if devices == 1:
        return each
    size = ceil_div(each.shape[0], devices)
    padding = [(0, size * devices - each.shape[0]), *[(0, 0)] * (each.ndim - 1)]
    padded = jnp.pad(each, padding, constant_values=fill_value)
    start = jax.lax.axis_index(layout._rows_alone) * size
    return jax.lax.dynamic_slice_in_dim(padded, start, size)


def _slots(layout: Sharding, num_rows: int, distinct: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Places [m] of row numbers in the buffer to be sent, [S * capacity], its end for no row.

    Also whether there is too little room, on any device.
    """
    shards, capacity = layout.num_shards, layout._capacity_of(distinct.size)
    named = distinct < num_rows
    owner = jnp.where(named, distinct % shards, shards).astype(jnp.int32)
    every = jnp.arange(shards, dtype=jnp.int32)[None]
    is_for = (owner[:, None] == every).astype(jnp.int32)
    rank = jnp.sum(jnp.cumsum(is_for, axis=0) * is_for, axis=1) - 1
    fits = named & (rank < capacity)
    slots = jnp.where(fits, owner * capacity + rank, shards * capacity)
    overflows = jnp.any(named & ~fits).astype(jnp.int32)
    axes = (*layout.rows, *layout._batch_alone)
    return slots, jax.lax.pmax(overflows, axes) > 0


def flatten_lookups(
    layout: Sharding, batch_axis: int, indices: Sequence[jax.Array], values: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Row numbers [*shape] and values [*shape, width] of look-ups -> [m] and [m, width].

    Each device puts its own part together: the order is by devices, and nothing is moved.
    """

    def flatten(indices: Sequence[jax.Array], values: Sequence[jax.Array]) -> Any:
        flat = [
            value.reshape(index.size, *value.shape[index.ndim :])
            for index, value in zip(indices, values, strict=True)
        ]
        return jnp.concatenate([index.reshape(-1) for index in indices]), jnp.concatenate(flat)

    of_indices = [layout.batch_spec(index.ndim, batch_axis) for index in indices]
    of_values = [
        layout._rows_spec(value.ndim, spec) for value, spec in zip(values, of_indices, strict=True)
    ]
    in_specs = (list(of_indices), of_values)
    return layout.run(flatten, in_specs, _batch_specs(layout))(list(indices), list(values))


def _batch_specs(layout: Sharding) -> tuple[PartitionSpec, PartitionSpec]:
    """Of row numbers [m] and gradients [m, width] where a batch's look-ups are."""
    of_rows = layout.batch_spec(1)
    return of_rows, layout._rows_spec(2, of_rows)


def to_owners(
    layout: Sharding, num_rows: int, rows: jax.Array, values: jax.Array, method: str | None
) -> tuple[jax.Array, jax.Array]:
    """Brings gradients to the shards that have the rows, and merges them, by "reduce".

    Args:
      layout: the table's `Sharding`.
      num_rows: rows of the table.
      rows: row numbers [m], split as the batch is.
      values: [m, width].
      method: see `merge_rows`.

    Returns:
      Row numbers within the shards [S, m], each named once, and their sums [S, m, width].
    """
    if rows.shape[0] == 0:
        none = (layout.num_shards, 0)
        return jnp.zeros(none, rows.dtype), jnp.zeros((*none, *values.shape[1:]), values.dtype)

    def bring(rows: jax.Array, values: jax.Array) -> Any:
        if layout.batch:
            rows = jax.lax.all_gather(rows, layout.batch, tiled=True)
            values = jax.lax.all_gather(values, layout.batch, tiled=True)
        return _merged_in_shard(layout, num_rows, _local(layout, num_rows, rows), values, method)

    return layout.run(bring, _batch_specs(layout), _shard_specs(layout))(rows, values)


def _shard_specs(layout: Sharding) -> tuple[PartitionSpec, PartitionSpec]:
    """Of row numbers [S, m] and gradients [S, m, width] where the rows are."""
    return layout.table_spec(2), layout.table_spec(3)


def _merged_in_shard(
    layout: Sharding, num_rows: int, local: jax.Array, values: jax.Array, method: str | None
) -> tuple[jax.Array, jax.Array]:
    local, sums = merge_rows(local, values, layout.rows_per_shard(num_rows), method)
    return local[None], sums[None]


class Parcels:
    """Gradients ready to be sent to the shards that have the rows, by "all_to_all".

    Args:
      layout: the table's `Sharding`.
      num_rows: rows of the table.
      rows: row numbers [m], split as the batch is.
      values: [m, width].
      method: see `merge_rows`.

    Attributes:
      overflows: whether there is too little room: a bool [], the same on all devices.
    """

    def __init__(
        self,
        layout: Sharding,
        num_rows: int,
        rows: jax.Array,
        values: jax.Array,
        method: str | None,
    ) -> None:
        self._layout, self._num_rows, self._method = layout, num_rows, method

        def prepare(rows: jax.Array, values: jax.Array) -> Any:
            rows, values = _my_part(layout, rows, num_rows), _my_part(layout, values, 0)
            distinct, sums = merge_rows(rows, values, num_rows, method)
            slots, overflows = _slots(layout, num_rows, distinct)
            return (distinct, sums, slots), overflows

        split = layout._lookup_axes or None
        self._specs = (
            PartitionSpec(split),
            PartitionSpec(split, layout.columns),
            PartitionSpec(split),
        )
        run = layout.run(prepare, _batch_specs(layout), (self._specs, PartitionSpec()))
        self._parts, self.overflows = run(rows, values)

    @staticmethod
    def are_right_for(layout: Sharding, rows: jax.Array, values: jax.Array) -> bool:
        """Whether "all_to_all" is the exchange for these gradients."""
        lookups = rows.size // layout._size(layout.batch)
        row_bytes = values.dtype.itemsize * math.prod(values.shape[1:])
        return layout._by_all_to_all(lookups, row_bytes)

    def send(self) -> tuple[jax.Array, jax.Array]:
        """As `to_owners`, right unless it overflows; of fewer row numbers."""
        layout = self._layout
        end = layout.rows_per_shard(self._num_rows)

        def send(distinct: jax.Array, sums: jax.Array, slots: jax.Array) -> Any:
            size = layout.num_shards * layout._capacity_of(distinct.size)
            rows = jnp.full(size, end, distinct.dtype)
            rows = set_rows(rows, slots, distinct // layout.num_shards)
            values = set_rows(jnp.zeros((size, *sums.shape[1:]), sums.dtype), slots, sums)
            rows = jax.lax.all_to_all(rows, layout.rows, 0, 0, tiled=True)
            values = jax.lax.all_to_all(values, layout.rows, 0, 0, tiled=True)
            if layout._batch_alone:
                rows = jax.lax.all_gather(rows, layout._batch_alone, tiled=True)
                values = jax.lax.all_gather(values, layout._batch_alone, tiled=True)
            return _merged_in_shard(layout, self._num_rows, rows, values, self._method)

        return layout.run(send, self._specs, _shard_specs(layout))(*self._parts)

    def send_all(self) -> tuple[jax.Array, jax.Array]:
        """As `to_owners`: every device gets everything, and keeps what is its own."""
        distinct, sums, _ = self._parts
        whole = dataclasses.replace(self._layout, batch=self._layout._lookup_axes)
        return to_owners(whole, self._num_rows, distinct, sums, self._method)


def read_in_shards(
    layout: Sharding, arrays: Sequence[jax.Array], rows: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """`read_rows` of row numbers within shards [S, m], from arrays [S, R, ...]."""

    def read(arrays: Sequence[jax.Array], rows: jax.Array) -> Any:
        found, rows = read_rows([array[0] for array in arrays], rows[0], fill_value=0.0)
        return tuple(each[None] for each in found), rows[None]

    of_arrays = tuple(layout.table_spec(array.ndim) for array in arrays)
    in_specs = (of_arrays, layout.table_spec(2))
    return layout.run(read, in_specs, in_specs)(tuple(arrays), rows)


def add_in_shards(
    layout: Sharding,
    array: jax.Array,
    rows: jax.Array,
    values: jax.Array,
    *,
    seldom: bool = False,
) -> jax.Array:
    """`add_rows` of merged values [S, m, ...] at row numbers within shards [S, m].

    What `seldom` names any row is skipped where it does not.
    """
    add = functools.partial(add_rows, is_merged=True)
    return _written(layout, add, array, rows, values, seldom)


def set_in_shards(
    layout: Sharding,
    array: jax.Array,
    rows: jax.Array,
    values: jax.Array,
    *,
    seldom: bool = False,
) -> jax.Array:
    """`set_rows` of the same, as `add_in_shards`."""
    return _written(layout, set_rows, array, rows, values, seldom)


def _written(
    layout: Sharding,
    write: Callable[..., jax.Array],
    array: jax.Array,
    rows: jax.Array,
    values: jax.Array,
    seldom: bool,
) -> jax.Array:
    def written(array: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
        array, rows, values = array[0], rows[0], values[0]
        if not seldom:
            return write(array, rows, values)[None]
        # A loop of no or one turn: a conditional would copy the array.
        turns = jnp.any(rows < array.shape[0]).astype(jnp.int32)
        return jax.lax.fori_loop(0, turns, lambda _, old: write(old, rows, values), array)[None]

    of_array = layout.table_spec(array.ndim)
    in_specs = (of_array, layout.table_spec(2), layout.table_spec(values.ndim))
    return layout.run(written, in_specs, of_array)(array, rows, values)
