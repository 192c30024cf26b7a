"""`EmbedConfig`: everything that is fixed about the embedding of one feature.

A config holds no arrays. It is frozen and hashable, so it can be a static argument of `jax.jit`
and a field of a Flax module; what follows from it (shapes, counts) is a property.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qrhash.arithmetic import as_fields, as_size, build
from qrhash.combine import OPERATIONS, Projection, check_projection
from qrhash.partitions import Partition
from qrhash.sharding import Sharding

ID_POLICIES = ("raise", "nan", "zero", "clip", "wrap")

Initializer = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """The embedding of one feature: `num_embeddings` ids as vectors of width `features`.

    Attributes:
      partition: id -> one row number per table.
      features: width of the vector.
      operation: how the k rows of an id become its vector: "add", "mult", "concat" or "project".
        By measurement "concat" is best down to about a quarter of a full table's memory, "mult"
        at higher compression, "project" best of all there.
      widths: width of each table. Default: `features` for "add" and "mult" (nothing else fits);
        `features` split evenly for "concat"; a quarter of `features` for "project".
      id_policy: what an id outside [0, num_embeddings) gives:
        "nan": a vector of NaN, which no loss overlooks;
        "raise": a ValueError for concrete ids, checked on the host; inside `jax.jit` an error
        through `jax.experimental.checkify`, whose transformation is then required;
        "zero": a vector of zeros and no gradient at all;
        "clip": the nearest id's vector; "wrap": the vector of id mod num_embeddings.
      padding_id: an id of the vocabulary, 0 or any other, whose vector is zeros and which gets no
        gradient, whatever the `id_policy`; `torch.nn.Embedding` calls it padding_idx.
      dtype: dtype of the maths and the vectors. Default: `param_dtype`.
      param_dtype: dtype of the tables and the projection.
      embedding_init: a Flax initializer for the tables, or a tuple of one per table. Default: one
        matched to the operation, see `init_stddev`. With a `sharding` every shard of a large table
        is drawn by itself, from a key of its own and by the shard's shape;
        `qrhash.tables.ByRows(initializer)` draws every row from one, so that the numbers are the
        same on any mesh.
      init_stddev: standard deviation of a vector's entries at the start under the default
        initializer, which is symmetric around zero. Default: features**-0.5, that of
        `flax.linen.Embed`.
      use_bias: whether "project" adds a bias.
      logical_axes: names of a table's two axes, for instance ("rows", "features"), in the partition
        metadata of the Flax modules: logical names, to be mapped to a mesh by rules. Default: no
        metadata, as `nn.Embed` has none. With a `sharding` the tables go where that says instead.
      large_table_rows: a table of at least this many rows is large: its gradients name the rows
        they touch (`qrhash.RowGrads`), and it is split by rows over devices. Smaller tables are
        ordinary dense parameters, and replicated. The default is about a batch's number of
        look-ups: a table with fewer rows is updated faster as a whole.
      sharding: how the large tables and the batch are split over a mesh; None: they are not.

    Raises:
      ValueError: an argument breaks its rule; the message names it, the rule and the value.

    >>> from qrhash.partitions import QuotientRemainder
    >>> config = EmbedConfig(QuotientRemainder(1_000_000, 4), 16, operation="concat")
    >>> config.table_shapes
    ((250000, 8), (4, 8))
    """

    partition: Partition
    features: int
    operation: str = "mult"
    _: dataclasses.KW_ONLY
    widths: tuple[int, ...] | None = None
    id_policy: str = "nan"
    padding_id: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    embedding_init: Initializer | tuple[Initializer, ...] | None = None
    init_stddev: float | None = None
    use_bias: bool = True
    logical_axes: tuple[str | None, str | None] | None = None
    large_table_rows: int = 16384
    sharding: Sharding | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.partition, Partition):
            raise ValueError(f"partition must be a qrhash partition, got {self.partition!r}.")
        _require_choice("operation", self.operation, OPERATIONS)
        _require_choice("id_policy", self.id_policy, ID_POLICIES)
        self._set("features", as_size("features", self.features))
        self._set("large_table_rows", as_size("large_table_rows", self.large_table_rows))
        self._set("param_dtype", _as_float_dtype("param_dtype", self.param_dtype))
        if self.dtype is not None:
            self._set("dtype", _as_float_dtype("dtype", self.dtype))
        self._set("widths", self._checked_widths())
        self._check_init()
        if self.sharding is not None:
            if not isinstance(self.sharding, Sharding):
                raise ValueError(f"sharding must be a qrhash.Sharding, got {self.sharding!r}.")
            for (rows, width), is_large in zip(self.table_shapes, self.large_tables, strict=True):
                if is_large:
                    self.sharding.array_shape(rows, width)
        self._set("padding_id", self._checked_padding_id())
        self._set("logical_axes", _as_axes(self.logical_axes))

    @property
    def num_embeddings(self) -> int:
        """Size of the vocabulary."""
        return self.partition.num_embeddings

    @property
    def num_tables(self) -> int:
        """Number of tables, k."""
        return self.partition.num_tables

    @property
    def table_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shape [rows, width] of each table."""
        assert self.widths is not None  # Filled in when built.
        return tuple(zip(self.partition.num_rows, self.widths, strict=True))

    @property
    def projection_shape(self) -> tuple[int, int] | None:
        """Shape [num_inputs, features] of the kernel of "project"; None for the others."""
        if self.operation != "project":
            return None
        widths = [width for _, width in self.table_shapes]
        products = widths[0] if self.num_tables > 1 else 0
        return (sum(widths) + products, self.features)

    @property
    def projection_fields(self) -> tuple[str, ...]:
        """Which fields of `Projection` the feature has: none but for "project"."""
        if self.operation != "project":
            return ()
        return Projection._fields if self.use_bias else ("kernel",)

    @property
    def num_params(self) -> int:
        """Parameters in all, tables and projection."""
        count = sum(rows * width for rows, width in self.table_shapes)
        if self.projection_shape is not None:
            count += self.projection_shape[0] * self.features + self.features * self.use_bias
        return count

    @property
    def stddev(self) -> float:
        """Standard deviation of a vector's entries under the default initializer."""
        return self.features**-0.5 if self.init_stddev is None else self.init_stddev

    @property
    def vector_dtype(self) -> np.dtype:
        """Dtype of the maths and the vectors: `dtype`, by default `param_dtype`."""
        return self.dtype or self.param_dtype

    @property
    def large_tables(self) -> tuple[bool, ...]:
        """Whether each table is large: trained by rows, and split by rows over devices."""
        return tuple(rows >= self.large_table_rows for rows in self.partition.num_rows)

    def table_sharding(self, table: int) -> Sharding | None:
        """How a table, given its number, is split over a mesh; small ones are not."""
        return self.sharding if self.large_tables[table] else None

    @property
    def table_specs(self) -> tuple[PartitionSpec, ...]:
        """For each table, the `PartitionSpec` of its array: on a mesh a `ShardedTable`'s."""
        axes = (self.table_axes(j) or (None, None) for j in range(self.num_tables))
        return tuple(PartitionSpec(*each) for each in axes)

    def table_axes(self, table: int) -> tuple[Any, ...] | None:
        """Axis names of a table's array, given its number; small ones are not split by rows.

        Logical names, or None where there are none; or, with a `sharding`, axes of its mesh.
        """
        if self.sharding is not None:
            sharding = self.table_sharding(table)
            return None if sharding is None else tuple(sharding.table_spec())
        if self.logical_axes is None:
            return None
        row_axis, feature_axis = self.logical_axes
        return (row_axis if self.large_tables[table] else None, feature_axis)

    @property
    def projection_axes(self) -> Projection:
        """Logical axis names of the parameters of "project", or None for each."""
        if self.sharding is not None or self.logical_axes is None:
            return Projection(kernel=None, bias=None)
        feature_axis = self.logical_axes[1]
        return Projection(kernel=(None, feature_axis), bias=(feature_axis,))

    def check_projection(self, projection: Any) -> None:
        """Raises a ValueError unless the projection is there for "project", and of its shape."""
        num_inputs, features = self.projection_shape or (None, None)
        check_projection(projection, self.operation, num_inputs=num_inputs, features=features)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON has it; a mesh goes as its axes, shape and devices' numbers.

        Raises:
          ValueError: there is an `embedding_init`, which is a function.

        >>> from qrhash.partitions import FullTable
        >>> config = EmbedConfig(FullTable(100), 8)
        >>> EmbedConfig.from_dict(config.to_dict()) == config
        True
        """
        if self.embedding_init is not None:
            raise ValueError(
                "embedding_init must be None in JSON, which holds no functions, got "
                f"{self.embedding_init!r}: leave it out with dataclasses.replace, and give it to "
                "from_dict."
            )
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["embedding_init"]
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        *,
        embedding_init: Initializer | tuple[Initializer, ...] | None = None,
        devices: Sequence[Any] | None = None,
    ) -> Self:
        """The config of which `to_dict` made these values.

        Args:
          values: a mapping, also one that was JSON in between.
          embedding_init: as in `EmbedConfig`.
          devices: those of the mesh, where there is one; see `Sharding.from_dict`.

        Raises:
          ValueError: values that make no config.
        """
        values = as_fields("config", values)
        if values.get("partition") is not None:
            values["partition"] = Partition.from_dict(values["partition"])
        if values.get("sharding") is not None:
            values["sharding"] = Sharding.from_dict(values["sharding"], devices)
        return build(cls, values | {"embedding_init": embedding_init})

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _default_widths(self) -> tuple[int, ...]:
        k = self.num_tables
        if self.operation == "concat":
            if self.features < k:
                raise ValueError(
                    f"features must be at least one per table for 'concat', got "
                    f"features={self.features} for {k} tables."
                )
            return tuple(self.features // k + (j < self.features % k) for j in range(k))
        if self.operation == "project":
            return (max(1, self.features // 4),) * k
        return (self.features,) * k

    def _checked_widths(self) -> tuple[int, ...]:
        if self.widths is None:
            return self._default_widths()
        try:
            widths = tuple(as_size(f"widths[{j}]", w) for j, w in enumerate(self.widths))
        except TypeError:
            raise ValueError(f"widths must be a tuple of sizes, got {self.widths!r}.") from None
        if len(widths) != self.num_tables:
            raise ValueError(
                f"widths must hold one width per table, {self.num_tables}, got {widths}."
            )
        if self.operation == "concat" and sum(widths) != self.features:
            raise ValueError(
                f"widths must sum to features={self.features} for 'concat', got {widths}."
            )
        if self.operation in ("add", "mult") and set(widths) != {self.features}:
            raise ValueError(
                f"widths must all be features={self.features} for {self.operation!r}, got {widths}."
            )
        if self.operation == "project" and len(set(widths)) > 1:
            raise ValueError(f"widths must be equal for 'project', got {widths}.")
        return widths

    def _checked_padding_id(self) -> int | None:
        if self.padding_id is None:
            return None
        try:
            padding_id = operator.index(self.padding_id)
        except TypeError:
            padding_id = -1
        if isinstance(self.padding_id, bool) or not 0 <= padding_id < self.num_embeddings:
            raise ValueError(
                f"padding_id must be an id in [0, {self.num_embeddings}), or None, got "
                f"{self.padding_id!r}."
            )
        return padding_id

    def _check_init(self) -> None:
        if isinstance(self.embedding_init, list):
            self._set("embedding_init", tuple(self.embedding_init))
        inits = self.embedding_init
        if isinstance(inits, tuple) and len(inits) != self.num_tables:
            raise ValueError(
                f"embedding_init must hold one initializer per table, {self.num_tables}, "
                f"got {len(inits)}."
            )
        for init in inits if isinstance(inits, tuple) else (inits,):
            if init is not None and not callable(init):
                raise ValueError(f"embedding_init must be a Flax initializer, got {init!r}.")
        if self.init_stddev is not None and not 0 < float(self.init_stddev) < float("inf"):
            raise ValueError(f"init_stddev must be positive and finite, got {self.init_stddev}.")
        if self.init_stddev is not None and inits is not None:
            raise ValueError(
                "init_stddev scales the default initializer and has no meaning beside "
                f"embedding_init, got {self.init_stddev} and {inits!r}."
            )


def check_config(config: Any) -> None:
    """Raises a ValueError unless it is an `EmbedConfig`."""
    if not isinstance(config, EmbedConfig):
        raise ValueError(
            f"config must be a qrhash.EmbedConfig, such as EmbedConfig(partition, features=16), "
            f"got {config!r}."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, (Partition, Sharding)):
        return value.to_dict()
    if isinstance(value, np.dtype):
        return value.name
    return list(value) if isinstance(value, tuple) else value


def _as_axes(given: Any) -> tuple[str | None, str | None] | None:
    if given is None:
        return None
    axes = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if len(axes) != 2 or not all(axis is None or isinstance(axis, str) for axis in axes):
        raise ValueError(f"logical_axes must be two names or None, got {given!r}.")
    return axes


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def _as_float_dtype(name: str, value: Any) -> np.dtype:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    # To NumPy, None is float64.
    if value is None or dtype is None:
        raise ValueError(f"{name} must be a floating-point dtype, got {value!r}.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be a floating-point dtype, got {dtype}.")
    return dtype
