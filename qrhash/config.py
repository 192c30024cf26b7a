"""`EmbedConfig`: everything that is fixed about the embedding of one feature.

A config holds no arrays. It is frozen and hashable, so it can be a static argument of `jax.jit`
and a field of a Flax module; what follows from it (shapes, counts) is a property.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from qrhash.arithmetic import as_fields, as_size, build
from qrhash.budget import fit
from qrhash.families import QuotientRemainder
from qrhash.fields import (
    as_axes,
    as_float_dtype,
    as_plain,
    check_layout_of,
    checked_init,
    checked_padding_id,
    checked_widths,
    require_bool,
    require_choice,
    without_init,
)
from qrhash.keys import Keys
from qrhash.layout import MeshLayout
from qrhash.operations import OPERATIONS, Projection, check_projection, projection_shape
from qrhash.partitions import Partition
from qrhash.policies import ID_POLICIES, indices_of
from qrhash.pooling import COMBINERS
from qrhash.tuning import LARGE_TABLE_ROWS
from qrhash.types import Array, Initializer

# By measurement (`benchmarks/quality.py`): on ratings .01 to .03 are best, and .18, that is
# features**-0.5 of 32, costs up to 2 %; on clicks .01 to .05 are the same within the noise.
INIT_STDDEV = 0.03


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """The embedding of one feature: `num_embeddings` ids as vectors of width `features`.

    Attributes:
      partition: id -> one row number per table.
      features: width of the vector.
      operation: how the k rows of an id become its vector: "add", "mult", "concat", "project",
        "path", or "features", with which they stay k vectors; see `qrhash.combine`.
        By measurement "path" and "project" lose least at equal bytes; see `fit`.
      widths: width of each table. Default: `features` for "add", "mult" and "features" (nothing
        else fits); `features` split evenly for "concat"; a quarter of `features` for "project", and
        for "path" in its longest table, beside the maps.
      id_policy: what an id outside [0, num_embeddings) gives:
        "nan": a vector of NaN, which no loss overlooks;
        "raise": a ValueError for concrete ids, checked on the host; inside `jax.jit` an error
        through `jax.experimental.checkify`, whose transformation is then required;
        "zero": a vector of zeros and no gradient at all;
        "clip": the nearest id's vector; "wrap": the vector of id mod num_embeddings.
      padding_id: an id of the vocabulary, 0 or any other, whose vector is zeros and which gets no
        gradient, whatever the `id_policy`; `torch.nn.Embedding` calls it padding_idx.
      combiner: how the vectors of a `qrhash.Bag` become one: "sum", "mean", "sqrtn" or "max".
      pool_rows: whether a bag's rows of each table are pooled first, and then combined, as DLRM's
        QREmbeddingBag does: another function for "mult" and "project".
      dtype: dtype of the maths and the vectors. Default: `param_dtype`.
      param_dtype: dtype of the tables and the projection.
      embedding_init: a Flax initializer for the tables, or a tuple of one per table. Default: one
        matched to the operation, see `init_stddev`. With a `layout` every shard of a large table
        is drawn by itself, from a key of its own and by the shard's shape;
        `qrhash.initializers.per_row(initializer)` draws every row from one, so that the numbers are
        the same on any mesh.
      init_stddev: standard deviation of a vector's entries at the start under the default
        initializer, which is symmetric around zero. Default: 0.03, by measurement on ratings and
        clicks, see `benchmarks/quality.py`. `flax.linen.Embed` has features**-0.5, which language
        models want.
      use_bias: whether "project" adds a bias.
      logical_axes: names of a table's two axes, for instance ("rows", "features"), in the partition
        metadata of the Flax modules: logical names, to be mapped to a mesh by rules. Default: no
        metadata, as `nn.Embed` has none. With a `layout` the tables go where that says instead.
      large_table_rows: a table of at least this many rows is large: its gradients name the rows
        they touch (`qrhash.RowGrads`), and it is split by rows over devices. Smaller tables are
        ordinary dense parameters, and replicated. The default is about a batch's number of
        look-ups: a table with fewer rows is updated faster as a whole.
      layout: how the large tables and the batch are split over a mesh; None: they are not.

    Raises:
      ValueError: an argument breaks its rule; the message names it, the rule and the value.

    >>> from qrhash.families import QuotientRemainder
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
    combiner: str = "mean"
    pool_rows: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    embedding_init: Initializer | tuple[Initializer, ...] | None = None
    init_stddev: float | None = None
    use_bias: bool = True
    logical_axes: tuple[str | None, str | None] | None = None
    large_table_rows: int = LARGE_TABLE_ROWS
    layout: MeshLayout | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.partition, Partition):
            raise ValueError(f"partition must be a qrhash partition, got {self.partition!r}.")
        require_choice("operation", self.operation, OPERATIONS)
        require_choice("id_policy", self.id_policy, ID_POLICIES)
        require_choice("combiner", self.combiner, COMBINERS)
        require_bool("pool_rows", self.pool_rows)
        require_bool("use_bias", self.use_bias)
        self._set("features", as_size("features", self.features))
        self._set("large_table_rows", as_size("large_table_rows", self.large_table_rows))
        self._set("param_dtype", as_float_dtype("param_dtype", self.param_dtype))
        if self.dtype is not None:
            self._set("dtype", as_float_dtype("dtype", self.dtype))
        widths = checked_widths(self.widths, self.operation, self.features, self.partition)
        self._set("widths", widths)
        inits = checked_init(self.embedding_init, self.init_stddev, self.num_tables)
        self._set("embedding_init", inits)
        check_layout_of(self.layout, self.table_shapes, self.large_tables)
        self._set("padding_id", checked_padding_id(self.padding_id, self.num_embeddings))
        self._set("logical_axes", as_axes(self.logical_axes))

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
        for all ids would not use the budget up. "project" and "path" have the narrowest rows that
        use it up, the best by measurement (`benchmarks/quality.py`), nearly one for every id;
        "project" one full table of narrow rows, if there is one that leaves at most 2 %. A budget
        that holds a full table of the vector's width gives one, with nothing to combine.

        Args:
          num_embeddings: size of the vocabulary.
          features: width of the vector.
          operation: as in `EmbedConfig`.
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
        return fit(
            cls,
            num_embeddings,
            features,
            operation,
            compression=compression,
            num_bytes=num_bytes,
            num_params=num_params,
            family=family,
            **options,
        )

    @property
    def num_embeddings(self) -> int:
        """Size of the vocabulary."""
        return self.partition.num_embeddings

    @property
    def num_tables(self) -> int:
        """Number of tables, k."""
        return self.partition.num_tables

    @property
    def vector_shape(self) -> tuple[int, ...]:
        """Shape of what an id becomes: (features,), for operation "features" (k, features)."""
        is_many = self.operation == "features"
        return (self.num_tables, self.features) if is_many else (self.features,)

    @property
    def table_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shape [rows, width] of each table."""
        assert self.widths is not None  # Filled in when built.
        return tuple(zip(self.partition.num_rows, self.widths, strict=True))

    @property
    def projection_shape(self) -> tuple[int, int] | None:
        """Shape [num_inputs, features] of the kernel of "project"; None for the others."""
        assert self.widths is not None
        return projection_shape(self.operation, self.widths, self.features)

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
        return INIT_STDDEV if self.init_stddev is None else self.init_stddev

    @property
    def vector_dtype(self) -> np.dtype:
        """Dtype of the maths and the vectors: `dtype`, by default `param_dtype`."""
        return self.dtype or self.param_dtype

    @property
    def large_tables(self) -> tuple[bool, ...]:
        """Whether each table is large: trained by rows, and split by rows over devices."""
        return tuple(rows >= self.large_table_rows for rows in self.partition.num_rows)

    def table_layout(self, table: int) -> MeshLayout | None:
        """How a table, given its number, is split over a mesh; small ones are not."""
        return self.layout if self.large_tables[table] else None

    @property
    def table_specs(self) -> tuple[PartitionSpec, ...]:
        """For each table, the `PartitionSpec` of its array: on a mesh a `ShardedTable`'s."""
        axes = (self.table_axes(j) or (None, None) for j in range(self.num_tables))
        return tuple(PartitionSpec(*each) for each in axes)

    def table_axes(self, table: int) -> tuple[Any, ...] | None:
        """Axis names of a table's array, given its number; small ones are not split by rows.

        Logical names, or None where there are none; or, with a `layout`, axes of its mesh.
        """
        if self.layout is not None:
            layout = self.table_layout(table)
            return None if layout is None else tuple(layout.table_spec())
        if self.logical_axes is None:
            return None
        row_axis, feature_axis = self.logical_axes
        return (row_axis if self.large_tables[table] else None, feature_axis)

    @property
    def projection_axes(self) -> Projection:
        """Logical axis names of the parameters of "project", or None for each."""
        if self.layout is not None or self.logical_axes is None:
            return Projection(kernel=None, bias=None)
        feature_axis = self.logical_axes[1]
        return Projection(kernel=(None, feature_axis), bias=(feature_axis,))

    def indices(self, ids: Array | Keys) -> tuple[Array, ...]:
        """Row numbers of ids, one array per table, after the id policy: a look-up's first step.

        Args:
          ids: integers [*shape] of any rank, NumPy or JAX; for a family on keys `qrhash.Keys`, or
            what `Keys.of` takes.

        Returns:
          k integer arrays [*shape]. An id that has no row, under the policies "nan" and "zero", has
          the row number `num_rows[j]`, one past the end, in every table; the `padding_id` has -1.

        Raises:
          ValueError: as `qrhash.lookup`.

        >>> from qrhash.families import QuotientRemainder
        >>> config = EmbedConfig(QuotientRemainder(1000, 4), 8, id_policy="clip")
        >>> config.indices(np.array([5, 2000]))
        (array([  1, 249], dtype=int32), array([1, 3], dtype=int32))
        """
        return indices_of(ids, self.partition, self.id_policy, self.padding_id)

    def check_projection(self, projection: Any) -> None:
        """Raises a ValueError unless the projection is there for "project", and of its shape."""
        num_inputs, features = self.projection_shape or (None, None)
        check_projection(projection, self.operation, num_inputs=num_inputs, features=features)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON has it; a mesh goes as its axes, shape and devices' numbers.

        Raises:
          ValueError: there is an `embedding_init`, which is a function.

        >>> from qrhash.families import FullTable
        >>> config = EmbedConfig(FullTable(100), 8)
        >>> EmbedConfig.from_dict(config.to_dict()) == config
        True
        """
        return {name: as_plain(value) for name, value in without_init(self).items()}

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
          devices: those of the mesh, where there is one; see `MeshLayout.from_dict`.

        Raises:
          ValueError: values that make no config.
        """
        values = as_fields("config", values)
        if values.get("partition") is not None:
            values["partition"] = Partition.from_dict(values["partition"])
        if values.get("layout") is not None:
            values["layout"] = MeshLayout.from_dict(values["layout"], devices)
        return build(cls, values | {"embedding_init": embedding_init})

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def check_config(config: Any) -> None:
    """Raises a ValueError unless it is an `EmbedConfig`."""
    if not isinstance(config, EmbedConfig):
        raise ValueError(
            f"config must be a qrhash.EmbedConfig, such as EmbedConfig(partition, features=16), "
            f"got {config!r}."
        )
