"""`EmbedConfig`: everything that is fixed about the embedding of one feature.

A config holds no arrays. It is frozen and hashable, so it can be a static argument of `jax.jit`
and a field of a Flax module; what follows from it (shapes, counts) is a property.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Self, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qrhash.arithmetic import as_fields, as_size, build, ceil_div
from qrhash.combine import OPERATIONS, Projection, check_projection
from qrhash.partitions import FullTable, Partition, QuotientRemainder
from qrhash.sharding import Sharding

ID_POLICIES = ("raise", "nan", "zero", "clip", "wrap")

Initializer = Callable[..., Any]

_Config = TypeVar("_Config", bound="EmbedConfig")

# By measurement (`benchmarks/quality.py`): on ratings .01 to .03 are best, and .18, that is
# features**-0.5 of 32, costs up to 2 %; on clicks .01 to .05 are the same within the noise.
_INIT_STDDEV = 0.03

# Of a budget: what a full table of narrow rows must use to be taken in place of shared rows.
_WORTH_ITS_BYTES = 0.98


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
        initializer, which is symmetric around zero. Default: 0.03, by measurement on ratings and
        clicks, see `benchmarks/quality.py`. `flax.linen.Embed` has features**-0.5, which language
        models want.
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

    @classmethod
    def fit(
        cls,
        num_embeddings: int,
        features: int,
        operation: str = "mult",
        *,
        compression: float | None = None,
        num_bytes: int | None = None,
        num_params: int | None = None,
        family: Callable[[int, int], Partition] = QuotientRemainder,
        **options: Any,
    ) -> Self:
        """The config that a memory budget allows, projection included: for any operation.

        So many ids to a row are other bytes for each operation: "concat" has rows of half the
        width, "project" of a quarter, and a matrix besides. Configs of one budget can be compared.

        The large table gets as many rows as the budget allows, so that less than one more of them
        is left over. "concat" has its default widths; a wider large table, where rows of that width
        for all ids would not use the budget up. "project" has the narrowest rows that use it up,
        the best by measurement (`benchmarks/quality.py`), nearly one for every id; or one full
        table of narrow rows, if there is one that leaves at most 2 %. A budget that holds a full
        table of the vector's width gives one, with nothing to combine or to project.

        Args:
          num_embeddings: size of the vocabulary.
          features: width of the vector.
          operation: "add", "mult", "concat" or "project".
          compression: how many times fewer bytes than a full table of the same dtype, at least 1.
          num_bytes: or the bytes, of tables and projection in `param_dtype`.
          num_params: or the parameters. Exactly one of the three is given.
          family: (size of the vocabulary, rows of the large table) -> partition. The default's
            large table is that of the remainders: of ids numbered by falling frequency, the
            frequent ones then share no row of it.
          **options: other fields of the config.

        Returns:
          A config whose `num_params` is at most the budget's, and as near to it as can be.

        Raises:
          ValueError: no budget or several; one that is too small, with what is the least.

        >>> for operation in ("mult", "concat", "project"):
        ...     config = EmbedConfig.fit(1_000_000, 16, operation, compression=8)
        ...     print(config.table_shapes, config.num_params)
        ((9, 16), (124991, 16)) 2000000
        ((5, 8), (249995, 8)) 2000000
        ((2, 2), (999942, 2)) 2000000
        """
        num_embeddings = as_size("num_embeddings", num_embeddings)
        features = as_size("features", features)
        _require_choice("operation", operation, OPERATIONS)
        budget = _budget(
            num_embeddings * features,
            options.get("param_dtype", cls.param_dtype),
            compression=compression,
            num_bytes=num_bytes,
            num_params=num_params,
        )
        if budget >= num_embeddings * features:
            operation = "mult" if operation == "project" else operation
            alone = {name: value for name, value in options.items() if name != "widths"}
            return cls(FullTable(num_embeddings), features, operation, **alone)

        def of_rows(rows: int) -> Any:
            partition = family(num_embeddings, rows)
            widths = _widths(operation, features, partition, ceil_div(budget, num_embeddings))
            return cls(partition, features, operation, **{"widths": widths, **options})

        if operation == "project" and "widths" not in options:
            narrow = _narrow(of_rows(1), budget)
            if narrow is not None:
                return narrow
        return _largest(of_rows, min(num_embeddings, budget), budget)

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
        return _INIT_STDDEV if self.init_stddev is None else self.init_stddev

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

    def _checked_widths(self) -> tuple[int, ...]:
        if self.widths is None:
            return _widths(self.operation, self.features, self.partition)
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


def _widths(
    operation: str, features: int, partition: Partition, largest: int = 0
) -> tuple[int, ...]:
    """The default widths; or, if the largest table is to have at least one width, by that."""
    k = partition.num_tables
    if operation == "project":
        return (min(largest, features) or max(1, features // 4),) * k
    if operation != "concat":
        return (features,) * k
    if features < k:
        raise ValueError(
            f"features must be at least one per table for 'concat', got "
            f"features={features} for {k} tables."
        )
    even = [features // k + (j < features % k) for j in range(k)]
    place = partition.num_rows.index(max(partition.num_rows))
    if k == 1 or even[place] >= largest:
        return tuple(even)
    wide = min(largest, features - (k - 1))
    others = [
        (features - wide) // (k - 1) + (j < (features - wide) % (k - 1)) for j in range(k - 1)
    ]
    return (*others[:place], wide, *others[place:])


def _budget(
    full: int,
    param_dtype: Any,
    *,
    compression: float | None,
    num_bytes: int | None,
    num_params: int | None,
) -> int:
    """The parameters of a budget, of which exactly one form is given."""
    given = {"compression": compression, "num_bytes": num_bytes, "num_params": num_params}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(
            "Exactly one budget must be given, compression, num_bytes or num_params, got "
            + (", ".join(f"{n}={v!r}" for n, v in given.items() if v is not None) or "none")
            + "."
        )
    if num_params is not None:
        return as_size("num_params", num_params)
    if num_bytes is not None:
        dtype = _as_float_dtype("param_dtype", param_dtype)
        return as_size("num_bytes", num_bytes) // dtype.itemsize
    is_number = isinstance(compression, (int, float)) and not isinstance(compression, bool)
    if not is_number or not 1 <= (compression or 0) < math.inf:
        raise ValueError(f"compression must be a number of at least 1, got {compression!r}.")
    return int(full / Fraction(compression or 1))


def _narrow(config: _Config, budget: int) -> _Config | None:
    """A full table of narrow rows under the projection of a config, if it is worth its bytes."""
    num_embeddings, features = config.num_embeddings, config.features
    width = (budget - features * config.use_bias) // (num_embeddings + features)
    if width < 1:
        return None
    partition = FullTable(num_embeddings)
    narrow = dataclasses.replace(config, partition=partition, widths=(width,))
    return narrow if narrow.num_params >= _WORTH_ITS_BYTES * budget else None


def _largest(of_rows: Callable[[int], _Config], most: int, budget: int) -> _Config:
    """The config with the most rows in its large table, at most so many, that keeps the budget."""
    rows, too_many, config = max(1, most), most + 1, None
    least = math.inf
    while rows > 0 and config is None:
        tried = of_rows(rows)
        least = min(least, tried.num_params)
        if tried.num_params <= budget:
            config = tried
        else:
            rows, too_many = rows - ceil_div(rows, 16), rows
    if config is None:
        raise ValueError(
            f"A budget of {budget:,} parameters is too small for {tried.num_embeddings:,} ids as "
            f"{tried.operation!r} vectors of {tried.features} features: the smallest tables of "
            f"{type(tried.partition).__name__} take {least:,}. Choose less compression, fewer "
            "features, or another operation or family."
        )
    while too_many - rows > 1:
        middle = (rows + too_many) // 2
        tried = of_rows(middle)
        if tried.num_params <= budget:
            rows, config = middle, tried
        else:
            too_many = middle
    return config


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
