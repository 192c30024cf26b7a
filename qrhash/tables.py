"""Tables: the pure core. Initialise, gather, look up, attend.

A feature's tables are a tuple of arrays [rows_j, width_j]; the dense parameters of operation
"project" stay apart from them. A look-up is id -> row numbers -> rows -> vector, and its three
steps are public (`row_numbers`, `gather`, `vectors`), because the gathered rows are the place to
differentiate at where a table is large: see `qrhash.rowgrads`.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qrhash.arithmetic import as_ids, ceil_div
from qrhash.combine import Projection, as_projection, combine
from qrhash.config import EmbedConfig, Initializer, check_config
from qrhash.rows import INT32_MAX, across, device_index, wide_dtype
from qrhash.sharding import (
    ReplicatedReader,
    ShardedTable,
    Sharding,
    is_sharded_table,
    whole_table,
)
from qrhash.take import LocalReader, Segment, take

_DRAWN_AT_ONCE = 2**22  # random numbers

_PADDING = -1  # row number of the padding id, in every table


def init(key: chex.PRNGKey, config: EmbedConfig) -> tuple[Any, ...]:
    """Creates a feature's tables.

    By default entries are uniform and symmetric around zero, with the variance per operation that
    gives an entry of the *vector* the variance `config.stddev**2`, as a full table's would have.
    For "mult" the largest table starts as a full table would, the others as random signs with some
    noise: a row then learns as fast as a full table's from the first step, where with factors of
    equal size each would be held back by the smallness of the other. Every row is drawn from a key
    of its own: the numbers are the same on any mesh.

    Args:
      key: a JAX random key.
      config: the feature's `EmbedConfig`.

    Returns:
      k arrays [rows_j, width_j] of `config.param_dtype`; with `config.sharding`, large tables are
      `ShardedTable`s of these shapes, each shard created on its device.
    """
    check_config(config)
    keys = jax.random.split(key, config.num_tables)
    return tuple(init_table(keys[j], config, j) for j in range(config.num_tables))


def init_table(key: chex.PRNGKey, config: EmbedConfig, table: int) -> Any:
    """Creates one of a feature's tables, given its number; see `init`."""
    part = Part(key, table_initializers(config)[table], 0, config.partition.num_rows[table])
    shape = config.table_shapes[table]
    is_large = config.large_tables[table]
    return init_parts([part], shape, config.param_dtype, config.sharding, is_large=is_large)


class Part(NamedTuple):
    """A part of a table yet to be created.

    Attributes:
      key: a JAX random key.
      initializer: a Flax initializer.
      offset: first row of the part.
      rows: its number of rows.
    """

    key: chex.PRNGKey
    initializer: Initializer
    offset: int
    rows: int


def init_parts(
    parts: Sequence[Part],
    shape: tuple[int, int],
    dtype: Any,
    sharding: Sharding | None,
    *,
    is_large: bool,
) -> Any:
    """Creates a table [rows, width] part by part in its place.

    On a mesh a large one is a `ShardedTable`, a small one on every device.
    """
    if sharding is not None and not is_large:
        return sharding.replicate(init_parts(parts, shape, dtype, None, is_large=False))
    num_rows, width = shape
    if sharding is not None:
        array = _empty_on_mesh(sharding, sharding.array_shape(num_rows, width), dtype)
    elif len(parts) == 1 and _is_drawn_in_one_go(parts[0], is_large):
        return parts[0].initializer(parts[0].key, shape, dtype)
    else:
        array = jnp.empty(shape, dtype)
    for part in parts:
        fill = _fill_by_rows if isinstance(part.initializer, ByRows) else _fill_at_once
        # Inside a transformation the array is not ours to donate: jax.vmap makes many of it.
        in_place = not isinstance(part.key, jax.core.Tracer)
        array = _jitted(fill, in_place=in_place)(array, *part, sharding)
    return array if sharding is None else ShardedTable(array, num_rows, sharding)


def _is_drawn_in_one_go(part: Part, is_large: bool) -> bool:
    """Inside `jax.jit` also rows of keys of their own: what splits the table then splits the draw.

    Blocks of a table that is split by its rows would make every device gather all of it.
    """
    may_be_split = is_large and isinstance(part.key, jax.core.Tracer) and jax.device_count() > 1
    return may_be_split or not isinstance(part.initializer, ByRows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_on_mesh(sharding: Sharding, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    spec = sharding.table_spec()
    columns = 1 if sharding.columns is None else sharding.mesh.shape[sharding.columns]
    local = (1, shape[1], shape[2] // columns)
    return sharding.run(lambda: jnp.empty(local, dtype), (), spec)()


def table_initializers(config: EmbedConfig) -> tuple[Initializer, ...]:
    """The initializer of each table: the config's, or the default matched to the operation."""
    initializer = config.embedding_init or ByRows(_SymmetricUniform(_row_stddev(config)))
    if isinstance(initializer, tuple):
        return initializer
    if config.operation != "mult" or config.embedding_init is not None:
        return (initializer,) * config.num_tables
    num_rows = config.partition.num_rows
    largest = num_rows.index(max(num_rows))
    signs = ByRows(_signs)
    return tuple(initializer if j == largest else signs for j in range(config.num_tables))


def init_projection(key: chex.PRNGKey, config: EmbedConfig) -> Projection | None:
    """Creates the dense parameters of operation "project"; None for the other operations.

    Args:
      key: a JAX random key; may be the one given to `init`.
      config: the feature's `EmbedConfig`.

    Returns:
      A `Projection` of a kernel [num_inputs, features], and a bias [features] of zeros if
      `config.use_bias`, both of `config.param_dtype`.
    """
    check_config(config)
    if config.projection_shape is None:
        return None
    key = jax.random.fold_in(key, config.num_tables)
    kernel_init = ByRows(_SymmetricUniform(_kernel_stddev(config)))
    kernel = kernel_init(key, config.projection_shape, config.param_dtype)
    bias = jnp.zeros((config.features,), config.param_dtype) if config.use_bias else None
    return Projection(kernel, bias)


def gather(
    tables: Sequence[chex.Array], indices: Sequence[chex.Array], *, fill_value: float = jnp.nan
) -> tuple[jax.Array, ...]:
    """Gathers rows. A row number outside its table gives a row of `fill_value`.

    Args:
      tables: k arrays [rows_j, width_j].
      indices: k integer arrays [*shape], NumPy or JAX, as `row_numbers` returns them.
        Negative numbers do not count from the end: they are outside the table.
      fill_value: what a row outside the table holds.

    Returns:
      k arrays [*shape, width_j], each of its table's dtype.

    Raises:
      ValueError: not one array of row numbers per table, or a table too long for 32-bit indices.
      TypeError: row numbers that are not integers.

    >>> gather((jnp.arange(6.0).reshape(3, 2),), (np.array([2, 3]),))[0].tolist()
    [[4.0, 5.0], [nan, nan]]
    """
    check_one_index_per_table(tables, indices)
    return tuple(
        _take(table, index, fill_value) for table, index in zip(tables, indices, strict=True)
    )


def lookup(
    tables: Sequence[chex.Array],
    ids: chex.Array,
    config: EmbedConfig,
    projection: Projection | chex.Array | None = None,
    *,
    out_sharding: Any = None,
) -> jax.Array:
    """Looks up the vectors of ids.

    Args:
      tables: the feature's tables, as from `init`.
      ids: integers [*shape] of any rank, NumPy or JAX. NumPy ids are turned into row numbers on
        the host, in 64 bits: the way for vocabularies beyond 2**31. (An argument of a jitted
        function is no longer NumPy inside it, and was cut to 32 bits on the way in.)
      config: the feature's `EmbedConfig`; ids outside the vocabulary follow its `id_policy`.
      projection: for operation "project", as from `init_projection`.
      out_sharding: where the vectors are to be, on a mesh: a `NamedSharding`, or a `PartitionSpec`
        for the mesh of `jax.set_mesh`.

    Returns:
      Vectors [*shape, features] of `config.vector_dtype`.

    Raises:
      ValueError: policy "raise" met a concrete id outside the vocabulary; or the ids are too
        narrow for it; or the tables or the projection have other shapes than the config's.
      TypeError: the ids are not integers.

    Source: Shi et al. 2020, algorithm 2, for any complementary partitions.

    >>> from qrhash.partitions import QuotientRemainder
    >>> config = EmbedConfig(QuotientRemainder(1000, 4), features=8)
    >>> lookup(init(jax.random.key(0), config), jnp.array([[1, 2, 3]]), config).shape
    (1, 3, 8)
    """
    return _lookup(tables, ids, config, projection, out_sharding=out_sharding)


def _lookup(
    tables: Sequence[chex.Array],
    ids: chex.Array,
    config: EmbedConfig,
    projection: Projection | chex.Array | None,
    *,
    out_sharding: Any = None,
    is_whole: bool = False,
) -> jax.Array:
    _check_parameters(tables, config, projection)
    indices = as_batch(row_numbers(ids, config), config)

    def from_tables(
        tables: Sequence[chex.Array],
        projection: Projection | chex.Array | None,
        indices: Sequence[chex.Array],
    ) -> jax.Array:
        rows = [
            _take(table, index, 0.0, is_whole=is_whole)
            for table, index in zip(tables, indices, strict=True)
        ]
        return vectors(rows, indices, config, projection)

    if out_sharding is not None:
        num_rows = config.partition.num_rows
        on_device = [device_index(*pair) for pair in zip(indices, num_rows, strict=True)]
        return _placed(from_tables, out_sharding, tables, projection, on_device)
    if _is_gathered_again(tables, config):
        from_tables = jax.checkpoint(from_tables)
    return from_tables(tables, projection, indices)


def as_batch(indices: Sequence[chex.Array], config: EmbedConfig) -> Sequence[chex.Array]:
    """On a mesh of explicit axes, row numbers laid out as the rows of large tables come."""
    layout = config.sharding
    if layout is None or not layout.is_explicit:
        return indices
    num_rows = config.partition.num_rows
    on_device = [device_index(*pair) for pair in zip(indices, num_rows, strict=True)]
    spec = layout.for_batch(on_device, 0).batch_spec(on_device[0].ndim)
    return jax.sharding.reshard(on_device, NamedSharding(layout.mesh, spec))


def _is_gathered_again(tables: Sequence[chex.Array], config: EmbedConfig) -> bool:
    """Whether the derivative of a look-up gathers the rows it needs again.

    On the CPU rows of small tables come faster from the tables, in its caches, than from where the
    look-up would have kept them: then neither pass ever writes them down.
    """
    is_traced = all(isinstance(table, jax.core.Tracer) for table in tables)
    return is_traced and not any(config.large_tables) and jax.default_backend() == "cpu"


def row_numbers(ids: chex.Array, config: EmbedConfig) -> tuple[chex.Array, ...]:
    """The first step of `lookup`: row numbers of ids, after the config's id policy.

    Args:
      ids: integers [*shape] of any rank, NumPy or JAX.
      config: the feature's `EmbedConfig`.

    Returns:
      k integer arrays [*shape]. An id that has no row, under the policies "nan" and "zero", has the
      row number `num_rows[j]`, one past the end, in every table; the `padding_id` has -1.

    Raises:
      ValueError, TypeError: as `lookup`.
    """
    check_config(config)
    ids = _within_vocabulary(as_ids(ids), config)
    is_padding = _is_padding(ids, config)
    xp = ids.__array_namespace__()
    if is_padding is not None:
        ids = xp.where(is_padding, 0, ids)
    indices = config.partition.indices(ids)
    if config.id_policy == "raise":
        _check_ids(ids, indices[0] < config.partition.num_rows[0], config)
    if is_padding is None:
        return indices
    return tuple(xp.where(is_padding, _PADDING, index) for index in indices)


def vectors(
    rows: Sequence[chex.Array],
    indices: Sequence[chex.Array],
    config: EmbedConfig,
    projection: Projection | chex.Array | None = None,
) -> jax.Array:
    """The last step of `lookup`: gathered rows -> vectors.

    Args:
      rows: k arrays [*shape, width_j], gathered from the feature's tables.
      indices: the k arrays [*shape] of row numbers they were gathered by; those of `row_numbers`
        tell the `padding_id` from ids without rows under policy "nan".
      config: the feature's `EmbedConfig`.
      projection: for operation "project", as from `init_projection`.

    Returns:
      Vectors [*shape, features] of `config.vector_dtype`.
    """
    first = indices[0]
    found = (first >= 0) & (first < config.partition.num_rows[0])
    return combine_found(rows, found, config, projection, fill_value(first, config))


def combine_found(
    rows: Sequence[chex.Array],
    found: chex.Array,
    config: EmbedConfig,
    projection: Projection | chex.Array | None,
    fill: chex.Numeric,
) -> jax.Array:
    """Combines rows [*shape, width_j] where `found` [*shape], and fills in the rest."""
    found = found[..., None]
    # What stands for rows that were not found must not reach a projection shared by all ids: in
    # its gradient even zero times NaN is NaN.
    if config.operation == "project":
        rows = [jnp.where(found, row, 0) for row in rows]
    dtype = config.vector_dtype
    combined = combine(
        [row.astype(dtype) for row in rows], config.operation, _cast(projection, dtype)
    )
    return jnp.where(found, combined, fill)


def fill_value(first: chex.Array, config: EmbedConfig) -> chex.Numeric:
    """What the vectors of ids without rows hold, given their first row numbers [*shape].

    A number; or [*shape, 1], where some are zeros, of the padding id, and others NaN.
    """
    if config.id_policy == "zero":
        return 0.0
    if config.padding_id is None:
        return jnp.nan
    # Under the other policies nothing else has no row.
    if config.id_policy != "nan":
        return 0.0
    fill = jnp.where(first == _PADDING, 0.0, jnp.nan)
    return fill.astype(config.vector_dtype)[..., None]


def all_vectors(
    tables: Sequence[chex.Array],
    config: EmbedConfig,
    projection: Projection | chex.Array | None = None,
) -> jax.Array:
    """The vectors of all ids, [num_embeddings, features]: what a full table would hold.

    Args:
      tables: the feature's tables, as from `init`.
      config: the feature's `EmbedConfig`.
      projection: for operation "project", as from `init_projection`.

    Raises:
      ValueError: more ids than fit 32 bits; or as `lookup`.

    >>> from qrhash.partitions import QuotientRemainder
    >>> config = EmbedConfig(QuotientRemainder(10, 4), features=8)
    >>> all_vectors(init(jax.random.key(0), config), config).shape
    (10, 8)
    """
    return _lookup(tables, *_all_ids(config), projection, is_whole=True)


def as_tables(arrays: Sequence[chex.Array], config: EmbedConfig) -> tuple[Any, ...]:
    """A feature's tables made of given arrays, such as pre-trained ones, in place of `init`.

    Args:
      arrays: k arrays [rows_j, width_j] of `config.param_dtype`, NumPy or JAX; NumPy's float64
        counts as what JAX makes of it. For a `FullTable`, the one array [num_embeddings, features].
      config: the feature's `EmbedConfig`.

    Returns:
      k arrays, as from `init`: with `config.sharding` in their places on the mesh.

    Raises:
      ValueError: another number of arrays, or another shape or dtype than the config's.

    >>> from qrhash.partitions import FullTable
    >>> config = EmbedConfig(FullTable(10), features=2)
    >>> (table,) = as_tables([np.ones((10, 2))], config)
    >>> lookup((table,), jnp.array([9]), config).tolist()
    [[1.0, 1.0]]
    """
    check_config(config)
    _check_shapes(arrays, config)
    return tuple(_as_table(array, config, j) for j, array in enumerate(arrays))


def _as_table(array: Any, config: EmbedConfig, table: int) -> Any:
    check_dtype(f"tables[{table}]", array, config.param_dtype)
    array = whole_table(array)
    sharding = config.table_sharding(table)
    if sharding is not None:
        host = isinstance(array, np.ndarray)
        array = array.astype(config.param_dtype, copy=False) if host else array
        return ShardedTable.from_array(array, sharding)
    array = jnp.asarray(array, config.param_dtype)
    return array if config.sharding is None else config.sharding.replicate(array)


def check_dtype(name: str, array: Any, dtype: np.dtype) -> None:
    """Raises a ValueError unless an array has the dtype, as JAX counts it."""
    got = getattr(array, "dtype", None)
    if got is None or jax.dtypes.canonicalize_dtype(got) != dtype:
        raise ValueError(
            f"{name} must be of {dtype}, as param_dtype says, got {got}: cast it first."
        )


def _all_ids(config: EmbedConfig) -> tuple[jax.Array, EmbedConfig]:
    """All ids [num_embeddings], and a config that need not check them."""
    check_config(config)
    if config.num_embeddings - 1 > INT32_MAX:
        raise ValueError(
            f"num_embeddings must be at most 2**31 where the vectors of all ids are formed, got "
            f"{config.num_embeddings}: look up the ids that are needed."
        )
    if config.id_policy == "raise":
        config = dataclasses.replace(config, id_policy="nan")  # All ids here are in range.
    return jnp.arange(config.num_embeddings, dtype=jnp.int32), config


def attend(
    tables: Sequence[chex.Array],
    query: chex.Array,
    config: EmbedConfig,
    projection: Projection | chex.Array | None = None,
    *,
    out_sharding: Any = None,
) -> jax.Array:
    """Inner products of queries with the vectors of all ids, as `flax.linen.Embed.attend`.

    For "add" and "concat" each table is multiplied with the query once, and the vectors of the
    vocabulary are never formed; the other operations form all [num_embeddings, features] of them.

    Args:
      tables: the feature's tables, as from `init`.
      query: [*shape, features].
      config: the feature's `EmbedConfig`.
      projection: for operation "project", as from `init_projection`.
      out_sharding: where the logits are to be, as in `lookup`.

    Returns:
      Logits [*shape, num_embeddings] of `config.dtype`, by default of the type to which the query
      and the tables promote. That of the `padding_id`, whose vector is zeros, is zero.

    Raises:
      ValueError: a query of another width; or as `all_vectors`.
    """
    _check_parameters(tables, config, projection)
    query = jnp.asarray(query)
    if query.shape[-1:] != (config.features,):
        raise ValueError(
            f"query must have shape [*shape, features], features={config.features}, got "
            f"{query.shape}."
        )
    ids, config = _all_ids(config)

    def from_tables(tables: Any, projection: Any, query: jax.Array, ids: jax.Array) -> jax.Array:
        return _logits(tables, query, ids, config, projection)

    if out_sharding is not None:
        return _placed(from_tables, out_sharding, tables, projection, query, ids)
    return from_tables(tables, projection, query, ids)


def _logits(
    tables: Sequence[chex.Array],
    query: jax.Array,
    ids: jax.Array,
    config: EmbedConfig,
    projection: Projection | chex.Array | None,
) -> jax.Array:
    dtype = config.dtype or jnp.result_type(query, config.param_dtype)
    query = query.astype(dtype)
    if config.operation not in ("add", "concat"):
        return query @ _lookup(tables, ids, config, projection, is_whole=True).astype(dtype).T
    queries = [query] * config.num_tables
    if config.operation == "concat":
        ends = np.cumsum([width for _, width in config.table_shapes])
        queries = jnp.split(query, ends[:-1].tolist(), axis=-1)
    indices = as_batch(row_numbers(ids, config), config)
    fill = 0.0 if config.id_policy == "zero" else jnp.nan
    products = (
        _take(_products(table, part), index, fill, is_whole=True)
        for table, part, index in zip(tables, queries, indices, strict=True)
    )
    logits = jnp.moveaxis(functools.reduce(operator.add, products), 0, -1)
    if config.padding_id is None:
        return logits
    return jnp.where(jnp.expand_dims(ids == config.padding_id, range(query.ndim - 1)), 0, logits)


def _products(table: Any, query: jax.Array) -> Any:
    """Inner products [rows, ...] of a table's rows with queries [..., width]."""
    if isinstance(table, ShardedTable):
        products = jnp.einsum("srf,...f->sr...", table.array.astype(query.dtype), query)
        sharding = dataclasses.replace(table.sharding, columns=None)
        return ShardedTable(products, table.num_rows, sharding)
    return jnp.einsum("rf,...f->r...", table.astype(query.dtype), query)


def _row_stddev(config: EmbedConfig) -> float:
    """Standard deviation of the tables' entries that gives the vectors `config.stddev`."""
    if config.operation == "add":
        return config.stddev * config.num_tables**-0.5
    if config.operation == "project":
        return _project_row_stddev(config)
    return config.stddev


def _project_row_stddev(config: EmbedConfig) -> float:
    """Through the kernel come k rows and, for k > 1, their product: of variances v and v**k."""
    k, width = config.num_tables, config.table_shapes[0][1]
    wanted = (config.stddev / _kernel_stddev(config)) ** 2 / width
    if k == 1:
        return wanted**0.5
    low, high = 0.0, wanted / k
    for _ in range(100):
        variance = (low + high) / 2
        is_enough = k * variance + variance**k >= wanted
        low, high = (low, variance) if is_enough else (variance, high)
    return high**0.5


def _kernel_stddev(config: EmbedConfig) -> float:
    """Twice one over the root of the number of inputs: by measurement, between two that are worse.

    With half of it, rows learn slowly where Adagrad makes steps of one size; with unit entries, a
    kernel trained by Adam is slow to turn. `benchmarks/quality.py` compares them.
    """
    assert config.projection_shape is not None
    return 2 * config.projection_shape[0] ** -0.5


@dataclasses.dataclass(frozen=True)
class ByRows:
    """A Flax initializer that draws every row from a key of its own.

    So a table starts with the same numbers on any mesh.

    Attributes:
      initializer: a Flax initializer of one row.
    """

    initializer: Initializer

    def __call__(self, key: chex.PRNGKey, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """All rows of a table of this shape."""
        return self.rows(key, jnp.arange(shape[0]), shape[1:], dtype)

    def rows(
        self, key: chex.PRNGKey, index: jax.Array, width: tuple[int, ...], dtype: Any
    ) -> jax.Array:
        """The rows of these numbers."""
        # The steps of a narrow type would shift the mean.
        wide = wide_dtype(dtype)
        row = lambda number: self.initializer(jax.random.fold_in(key, number), width, wide)  # noqa: E731
        return jax.vmap(row)(index).astype(dtype)


@dataclasses.dataclass(frozen=True)
class _SymmetricUniform:
    """The Flax initializer of a uniform distribution around zero."""

    stddev: float

    def __call__(self, key: chex.PRNGKey, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        limit = 3**0.5 * self.stddev
        return jax.random.uniform(key, shape, dtype, -limit, limit)


def _signs(key: chex.PRNGKey, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The Flax initializer of random signs with some noise, of about unit variance."""
    sign_key, size_key = jax.random.split(key)
    # A choice and no product, and steps that are powers of two: nothing is rounded in another way
    # where it is fused, and tables start with the same bits wherever they are drawn.
    steps = jax.random.randint(size_key, shape, -128, 129).astype(dtype)
    size = 1 + steps / 1024  # a standard deviation of 0.073
    return jnp.where(jax.random.bernoulli(sign_key, shape=shape), size, -size)


def _fill_by_rows(
    array: jax.Array,
    key: chex.PRNGKey,
    initializer: ByRows,
    offset: int,
    rows: int,
    sharding: Sharding | None,
) -> jax.Array:
    """Draws block by block: random bits on their way need several times the memory of a table."""

    def fill(array: jax.Array, key: chex.PRNGKey, offset: jax.Array, rows: jax.Array) -> jax.Array:
        shards, shard, column, num_columns = _where_on_mesh(sharding)
        local_rows, width = array.shape
        at_once = min(local_rows, max(1, _DRAWN_AT_ONCE // (width * num_columns)))
        first, end = offset // shards, -(-(offset + rows) // shards)

        def block(number: jax.Array, array: jax.Array) -> jax.Array:
            start = jnp.minimum(first + number * at_once, local_rows - at_once)
            index = (start + jnp.arange(at_once)) * shards + shard - offset
            drawn = initializer.rows(key, index, (width * num_columns,), array.dtype)
            drawn = jax.lax.dynamic_slice_in_dim(drawn, column * width, width, axis=1)
            return _put_where((index >= 0) & (index < rows), array, drawn, start)

        return jax.lax.fori_loop(0, -(-(end - first) // at_once), block, array)

    return _on_mesh(fill, sharding)(array, key, jnp.asarray(offset), jnp.asarray(rows))


def _fill_at_once(
    array: jax.Array,
    key: chex.PRNGKey,
    initializer: Initializer,
    offset: int,
    rows: int,
    sharding: Sharding | None,
) -> jax.Array:
    """Calls an initializer for all the rows that a device has of the part, with its own key."""

    def fill(array: jax.Array, key: chex.PRNGKey) -> jax.Array:
        shards, shard, column, num_columns = _where_on_mesh(sharding)
        local_rows, width = array.shape
        first, end = offset // shards, min(local_rows, ceil_div(offset + rows, shards))
        key = key if shards == 1 else jax.random.fold_in(key, shard)
        drawn = initializer(key, (end - first, width * num_columns), array.dtype)
        drawn = jax.lax.dynamic_slice_in_dim(drawn, column * width, width, axis=1)
        index = jnp.arange(first, end) * shards + shard - offset
        return _put_where((index >= 0) & (index < rows), array, drawn, first)

    return _on_mesh(fill, sharding)(array, key)


@functools.cache
def _jitted(fill: Callable[..., jax.Array], *, in_place: bool) -> Callable[..., jax.Array]:
    static = ["initializer", "sharding"] + ["offset", "rows"] * (fill is _fill_at_once)
    return jax.jit(fill, static_argnames=static, donate_argnums=(0,) * in_place)


def _where_on_mesh(sharding: Sharding | None) -> tuple[int, Any, Any, int]:
    """Number of shards, of this device's shard, of its columns, and into how many these are."""
    if sharding is None:
        return 1, 0, 0, 1
    if sharding.columns is None:
        return sharding.num_shards, sharding.shard_number(), 0, 1
    column = jax.lax.axis_index(sharding.columns)
    number = sharding.mesh.shape[sharding.columns]
    return sharding.num_shards, sharding.shard_number(), column, number


def _on_mesh(fill: Callable[..., jax.Array], sharding: Sharding | None) -> Callable[..., jax.Array]:
    if sharding is None:
        return fill

    def on_device(array: jax.Array, *others: jax.Array) -> jax.Array:
        return fill(array[0], *others)[None]

    def on_mesh(array: jax.Array, *others: jax.Array) -> jax.Array:
        spec = sharding.table_spec()
        in_specs = (spec, *[PartitionSpec()] * len(others))
        return sharding.run(on_device, in_specs, spec)(array, *others)

    return on_mesh


def _put_where(
    wanted: jax.Array, array: jax.Array, rows: jax.Array, start: chex.Numeric
) -> jax.Array:
    """The array [R, width] with these rows [m, width] from `start` on, where wanted [m]."""
    old = jax.lax.dynamic_slice_in_dim(array, start, rows.shape[0], axis=0)
    new = jnp.where(wanted[:, None], rows, old)
    return jax.lax.dynamic_update_slice_in_dim(array, new, start, axis=0)


def _placed(fun: Callable[..., jax.Array], out_sharding: Any, *args: Any) -> jax.Array:
    """The array fun(*args), laid out as said; without a mesh there is nothing to lay out."""
    if not isinstance(out_sharding, (NamedSharding, PartitionSpec)):
        raise ValueError(
            f"out_sharding must be a NamedSharding or a PartitionSpec, got {out_sharding!r}."
        )
    context = jax.sharding.get_abstract_mesh()
    mesh = out_sharding.mesh if isinstance(out_sharding, NamedSharding) else context
    if mesh.empty:
        return fun(*args)
    if AxisType.Explicit not in mesh.axis_types:
        return jax.lax.with_sharding_constraint(fun(*args), out_sharding)
    if context.empty:
        return jax.device_put(fun(*args), out_sharding)
    if any(map(is_sharded_table, jax.tree.leaves(args, is_leaf=is_sharded_table))):
        return jax.sharding.reshard(fun(*args), out_sharding)
    # Of a table split by rows and ids split alike, explicit axes do not say where rows belong.
    return jax.sharding.auto_axes(fun, out_sharding=out_sharding)(*args)


def _check_parameters(tables: Sequence[Any], config: EmbedConfig, projection: Any) -> None:
    """Raises a ValueError unless tables and projection have the shapes that the config gives."""
    check_config(config)
    config.check_projection(projection)
    _check_shapes(tables, config)


def _check_shapes(tables: Any, config: EmbedConfig) -> None:
    single = hasattr(tables, "shape")
    if not single and not isinstance(tables, Sequence):
        raise ValueError(
            f"tables must be a tuple of {config.num_tables} arrays, got {type(tables)}."
        )
    shapes = tables.shape if single else tuple(getattr(each, "shape", None) for each in tables)
    if single or shapes != config.table_shapes:
        raise ValueError(
            f"tables must be {config.num_tables}, of shapes {config.table_shapes}, as init gives "
            f"them for {config.partition}, got {'one array of shape ' * single}{shapes}."
        )


def check_one_index_per_table(tables: Sequence[Any], indices: Sequence[Any]) -> None:
    """Raises a ValueError unless there is one array of row numbers for each table."""
    if len(tables) != len(indices):
        raise ValueError(
            f"indices must hold one array per table, {len(tables)}, got {len(indices)}."
        )


def _take(table: Any, index: chex.Array, fill_value: float, *, is_whole: bool = False) -> jax.Array:
    num_rows = table.shape[0]
    index = device_index(index, num_rows)
    segments = (Segment(0, num_rows, index.size),)
    (rows,) = take_segments(table, [index], segments, is_whole=is_whole)
    if fill_value == 0:
        return rows
    return jnp.where(across((index >= 0) & (index < num_rows), rows), rows, fill_value)


def take_segments(
    table: chex.Array | ShardedTable,
    indices: Sequence[jax.Array],
    segments: tuple[Segment, ...],
    *,
    batch_axis: int = 0,
    sharding: Sharding | None = None,
    is_whole: bool = False,
) -> list[jax.Array]:
    """For each index [*shape], gathers rows [*shape, width] of a table that is a stack of others.

    Rows outside the table are zeros. `segments` say which look-ups, in the order of the indices,
    go to which part of the table. With a `sharding`, every device does its part of the batch.
    """
    if isinstance(table, ShardedTable):
        return table.take(indices, batch_axis=batch_axis, is_whole=is_whole)
    options: dict[str, Any] = {"segments": segments, "batch_axis": batch_axis, "is_whole": is_whole}
    reader = (
        LocalReader(**options) if sharding is None else ReplicatedReader(**options, layout=sharding)
    )
    return take(jnp.asarray(table), indices, reader)


def _is_padding(ids: chex.Array, config: EmbedConfig) -> chex.Array | None:
    """Where ids are the padding id; None if none can be."""
    if config.padding_id is None or config.padding_id > jnp.iinfo(ids.dtype).max:
        return None
    return ids == config.padding_id


def _within_vocabulary(ids: chex.Array, config: EmbedConfig) -> chex.Array:
    """Ids after the policies that move an id; the others leave it outside, without rows."""
    n = config.partition.num_ids_with_rows
    if ids.dtype.itemsize < 8 and n - 1 > INT32_MAX:
        return ids  # Too narrow for the vocabulary, which `Partition.indices` refuses.
    if config.id_policy == "clip":
        return ids.clip(0, n - 1)
    if config.id_policy == "wrap":
        # n itself need not fit the ids' dtype where n - 1, then all ones in binary, does.
        return ids & (n - 1) if n & (n - 1) == 0 else ids % n
    return ids


def _check_ids(ids: chex.Array, has_rows: chex.Array, config: EmbedConfig) -> None:
    """Policy "raise"."""
    if isinstance(ids, jax.core.Tracer):
        if ids.size:
            first = ids.reshape(-1)[jnp.argmin(has_rows)]
            checkify.check(has_rows.all(), f"id {{id}} has no row in {config.partition}", id=first)
        return
    # Constants of a jitted function are concrete, what is computed of them there is not.
    ids = np.asarray(ids)
    bad = np.argwhere(config.partition.indices(ids)[0] == config.partition.num_rows[0])
    if len(bad):
        position = tuple(bad[0].tolist())
        raise ValueError(
            f"{len(bad)} of {ids.size} ids have no row in {config.partition}, the first is "
            f"{ids[position]} at position {position}. Correct the ids, or choose another "
            "id_policy ('nan', 'zero', 'clip', 'wrap')."
        )


def _cast(projection: Projection | chex.Array | None, dtype: np.dtype) -> Projection | None:
    if projection is None:
        return None
    return jax.tree.map(lambda parameter: parameter.astype(dtype), as_projection(projection))
