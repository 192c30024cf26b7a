"""Tables: the pure core. Initialise, gather, look up, attend.

A feature's tables are a tuple of arrays [rows_j, width_j]; the dense parameters of operation
"project" stay apart from them. A look-up is id -> row numbers -> rows -> vector, and its three
steps are public (`row_numbers`, `gather`, `vectors`), because the gathered rows are the place to
differentiate at where a table is large: see `qrhash.rowgrads`.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.sharding import PartitionSpec

from qrhash.arithmetic import as_ids, ceil_div
from qrhash.combine import Projection, as_projection, combine
from qrhash.config import EmbedConfig, Initializer
from qrhash.rows import INT32_MAX, RowTable, as_one, device_index, out_sharding, wide_dtype
from qrhash.sharding import ShardedTable, Sharding

# Up to this many rows, a one-hot product gives a table's gradient faster than a scatter-add of
# all the batch's rows onto it, which on an accelerator waits for itself at every duplicate. On the
# CPU the scatter-add is a plain loop over rows, and faster for a table of any length.
_ONE_HOT_ROWS = {"cpu": 0}
_ONE_HOT_ROWS_ELSEWHERE = 2048
_ONE_HOT_ENTRIES = 2**26

_DRAWN_AT_ONCE = 2**22  # random numbers


class Segment(NamedTuple):
    """Some look-ups, next to each other, that all go to one part of a table.

    Attributes:
      offset: first row of the part.
      rows: its number of rows.
      lookups: number of row numbers.
    """

    offset: int
    rows: int
    lookups: int


def init(key: chex.PRNGKey, config: EmbedConfig) -> tuple[Any, ...]:
    """Creates a feature's tables.

    By default entries are uniform and symmetric around zero, with the variance per operation that
    gives an entry of the *vector* the variance `config.stddev**2`, as a full table's would have:
    for k independent factors the variances multiply, for k terms they add. Every row is drawn from
    a key of its own: the numbers are the same on any mesh.

    Args:
      key: a JAX random key.
      config: the feature's `EmbedConfig`.

    Returns:
      k arrays [rows_j, width_j] of `config.param_dtype`; with `config.sharding`, large tables are
      `ShardedTable`s of these shapes, each shard created on its device.
    """
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
        array = fill(array, *part, sharding)
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
    initializers = [initializer] * config.num_tables
    if config.operation == "mult" and config.embedding_init is None:
        largest = config.partition.num_rows.index(max(config.partition.num_rows))
        initializers = [initializer if j == largest else ByRows(_signs) for j in range(len(initializers))]
    return tuple(initializers)


def init_projection(key: chex.PRNGKey, config: EmbedConfig) -> Projection | None:
    """Creates the dense parameters of operation "project"; None for the other operations.

    Args:
      key: a JAX random key; may be the one given to `init`.
      config: the feature's `EmbedConfig`.

    Returns:
      A `Projection` of a kernel [num_inputs, features], and a bias [features] of zeros if
      `config.use_bias`, both of `config.param_dtype`.
    """
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
) -> jax.Array:
    """Looks up the vectors of ids.

    Args:
      tables: the feature's tables, as from `init`.
      ids: integers [*shape] of any rank, NumPy or JAX. NumPy ids are turned into row numbers on
        the host, in 64 bits: the way for vocabularies beyond 2**31. (An argument of a jitted
        function is no longer NumPy inside it, and was cut to 32 bits on the way in.)
      config: the feature's `EmbedConfig`; ids outside the vocabulary follow its `id_policy`.
      projection: for operation "project", as from `init_projection`.

    Returns:
      Vectors [*shape, features] of `config.vector_dtype`.

    Raises:
      ValueError: policy "raise" met a concrete id outside the vocabulary; or the ids are too
        narrow for it.
      TypeError: the ids are not integers.
      AssertionError: tables of other shapes than the config's.

    Source: Shi et al. 2020, algorithm 2, for any complementary partitions.

    >>> from qrhash.partitions import QuotientRemainder
    >>> config = EmbedConfig(QuotientRemainder(1000, 4), features=8)
    >>> lookup(init(jax.random.key(0), config), jnp.array([[1, 2, 3]]), config).shape
    (1, 3, 8)
    """
    chex.assert_shape(
        list(tables), list(config.table_shapes), custom_message=f"The tables do not fit {config}."
    )
    indices = row_numbers(ids, config)

    def from_tables(
        tables: Sequence[chex.Array], projection: Projection | chex.Array | None
    ) -> jax.Array:
        rows = gather(tables, indices, fill_value=0.0)
        return vectors(rows, indices, config, projection)

    if _is_gathered_again(tables, config):
        from_tables = jax.checkpoint(from_tables)
    return from_tables(tables, projection)


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
      row number `num_rows[j]`, one past the end, in every table.

    Raises:
      ValueError, TypeError: as `lookup`.
    """
    ids = _within_vocabulary(as_ids(ids), config)
    indices = config.partition.indices(ids)
    if config.id_policy == "raise":
        _check_ids(ids, indices[0] < config.partition.num_rows[0], config)
    return indices


def vectors(
    rows: Sequence[chex.Array],
    indices: Sequence[chex.Array],
    config: EmbedConfig,
    projection: Projection | chex.Array | None = None,
) -> jax.Array:
    """The last step of `lookup`: gathered rows -> vectors.

    Args:
      rows: k arrays [*shape, width_j], gathered from the feature's tables.
      indices: the k arrays [*shape] of row numbers they were gathered by.
      config: the feature's `EmbedConfig`.
      projection: for operation "project", as from `init_projection`.

    Returns:
      Vectors [*shape, features] of `config.vector_dtype`.
    """
    return combine_found(rows, indices[0] < config.partition.num_rows[0], config, projection)


def combine_found(
    rows: Sequence[chex.Array],
    found: chex.Array,
    config: EmbedConfig,
    projection: Projection | chex.Array | None = None,
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
    return jnp.where(found, combined, _fill_value(config))


def attend(
    tables: Sequence[chex.Array],
    query: chex.Array,
    config: EmbedConfig,
    projection: Projection | chex.Array | None = None,
) -> jax.Array:
    """Inner products of queries with the vectors of all ids, as `flax.linen.Embed.attend`.

    For "add" and "concat" each table is multiplied with the query once, and the vectors of the
    vocabulary are never formed; the other operations form all [num_embeddings, features] of them.

    Args:
      tables: the feature's tables, as from `init`.
      query: [*shape, features].
      config: the feature's `EmbedConfig`.
      projection: for operation "project", as from `init_projection`.

    Returns:
      Logits [*shape, num_embeddings] of `config.dtype`, by default of the type to which the query
      and the tables promote.
    """
    chex.assert_axis_dimension(query, -1, config.features)
    dtype = config.dtype or jnp.result_type(query, config.param_dtype)
    query = query.astype(dtype)
    ids = jnp.arange(config.num_embeddings)
    if config.id_policy == "raise":
        config = dataclasses.replace(config, id_policy="nan")  # All ids here are in range.
    if config.operation not in ("add", "concat"):
        return query @ lookup(tables, ids, config, projection).astype(dtype).T
    queries = [query] * config.num_tables
    if config.operation == "concat":
        ends = np.cumsum([width for _, width in config.table_shapes])
        queries = jnp.split(query, ends[:-1].tolist(), axis=-1)
    indices = config.partition.indices(ids)
    logits = (
        _take(_products(table, part), index, _fill_value(config))
        for table, part, index in zip(tables, queries, indices, strict=True)
    )
    return jnp.moveaxis(functools.reduce(operator.add, logits), 0, -1)


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
    """One over the root of the number of inputs, as for a dense layer."""
    assert config.projection_shape is not None
    return config.projection_shape[0] ** -0.5


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
    """The Flax initializer of random signs with 10 % noise, of unit variance."""
    sign_key, noise_key = jax.random.split(key)
    size = (1 + 0.1 * jax.random.normal(noise_key, shape, dtype)) / 1.01**0.5
    return jax.random.rademacher(sign_key, shape, dtype) * size


@functools.partial(jax.jit, static_argnames=("initializer", "sharding"), donate_argnums=0)
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


@functools.partial(
    jax.jit, static_argnames=("initializer", "offset", "rows", "sharding"), donate_argnums=0
)
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


def _fill_value(config: EmbedConfig) -> float:
    """What the vector of an id without rows holds."""
    return 0.0 if config.id_policy == "zero" else jnp.nan


def check_one_index_per_table(tables: Sequence[Any], indices: Sequence[Any]) -> None:
    """Raises a ValueError unless there is one array of row numbers for each table."""
    if len(tables) != len(indices):
        raise ValueError(
            f"indices must hold one array per table, {len(tables)}, got {len(indices)}."
        )


def _take(table: Any, index: chex.Array, fill_value: float) -> jax.Array:
    index = device_index(index, table.shape[0])
    segment = Segment(0, table.shape[0], index.size)
    return take_segments(table, [index], (segment,), fill_value)[0]


def take_segments(
    table: chex.Array | RowTable,
    indices: Sequence[jax.Array],
    segments: tuple[Segment, ...],
    fill_value: float,
    *,
    batch_axis: int = 0,
    sharding: Sharding | None = None,
) -> list[jax.Array]:
    """For each index [*shape], gathers rows [*shape, width] of a table that is a stack of others.

    `segments` say which look-ups, in the order of the indices, go to which part of the table. The
    gradient of a part of few rows is then, on accelerators, a product with one-hot rows. With a
    `sharding`, every device does that for its part of the batch.
    """
    if isinstance(table, RowTable):
        return table.take(indices, fill_value, batch_axis=batch_axis)
    table = jnp.asarray(table)
    if sharding is None:
        return _take_locally(table, indices, segments, fill_value)
    layout = sharding.for_batch(indices, batch_axis)
    devices = math.prod(layout.mesh.shape[axis] for axis in layout.batch)
    local = tuple(each._replace(lookups=each.lookups // devices) for each in segments)
    specs = [layout.batch_spec(index.ndim, batch_axis) for index in indices]
    take = functools.partial(_take_locally, segments=local, fill_value=fill_value)
    return layout.run(take, (PartitionSpec(), specs), specs)(table, list(indices))


def _take_locally(
    table: jax.Array,
    indices: Sequence[jax.Array],
    segments: tuple[Segment, ...],
    fill_value: float,
) -> list[jax.Array]:
    index, split = as_one(indices, table.shape[0])
    if not any(map(_is_for_one_hot, segments)) or out_sharding(table, index) is not None:
        return split(_take_from_large(table, index, fill_value))
    return split(_take_from_small(segments, fill_value, table, index))


def _take_from_large(table: jax.Array, index: jax.Array, fill_value: float) -> jax.Array:
    return table.at[index].get(
        mode="fill",
        fill_value=fill_value,
        wrap_negative_indices=False,
        out_sharding=out_sharding(table, index),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _take_from_small(
    segments: tuple[Segment, ...], fill_value: float, table: jax.Array, index: jax.Array
) -> jax.Array:
    del segments  # Of concern to the derivative alone.
    return _take_from_large(table, index, fill_value)


@_take_from_small.defjvp
def _take_from_small_jvp(
    segments: tuple[Segment, ...],
    fill_value: float,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> tuple[jax.Array, jax.Array]:
    """The derivative, in a form whose transpose is the table's gradient."""
    (table, index), (table_dot, _) = primals, tangents
    numbers = jax.lax.split(index.reshape(-1), [segment.lookups for segment in segments])
    tangents_of = _tangents_of_parts(table_dot, segments)
    parts = []
    for (is_for_one_hot, num_rows, lookups), run in itertools.groupby(
        zip(segments, numbers, strict=True), lambda pair: _kind(pair[0])
    ):
        of_run, numbers_of_run = zip(*run, strict=True)
        if not is_for_one_hot:
            parts.append(_take_from_large(table_dot, jnp.concatenate(numbers_of_run), 0.0))
            continue
        local = [
            each - segment.offset for each, segment in zip(numbers_of_run, of_run, strict=True)
        ]
        one_hot = jax.nn.one_hot(jnp.stack(local), num_rows, axis=1, dtype=table.dtype)
        of_parts = jnp.stack([tangents_of[segment.offset] for segment in of_run])
        product = jnp.einsum("srn,srf->snf", one_hot, of_parts, precision=jax.lax.Precision.HIGHEST)
        parts.append(product.reshape(len(of_run) * lookups, table.shape[1]))
    rows_dot = jnp.concatenate(parts).reshape(*index.shape, table.shape[1])
    # What comes back for an id without a row may be NaN, and NaN times zero is NaN.
    in_table = (index >= 0) & (index < table.shape[0])
    return (
        _take_from_large(table, index, fill_value),
        jnp.where(in_table[..., None], rows_dot, 0),
    )


def _tangents_of_parts(table_dot: jax.Array, segments: Sequence[Segment]) -> dict[int, jax.Array]:
    """First row -> tangents, of each part of the table that segments go to."""
    edges = {0, table_dot.shape[0]}
    edges.update(edge for each in segments for edge in (each.offset, each.offset + each.rows))
    starts = sorted(edges)
    parts = jax.lax.split(table_dot, [b - a for a, b in itertools.pairwise(starts)])
    return dict(zip(starts, parts, strict=False))


def _is_for_one_hot(segment: Segment) -> bool:
    most = _ONE_HOT_ROWS.get(jax.default_backend(), _ONE_HOT_ROWS_ELSEWHERE)
    return segment.rows <= most and segment.rows * segment.lookups <= _ONE_HOT_ENTRIES


def _kind(segment: Segment) -> tuple[bool, int, int]:
    """What neighbouring segments must have in common to be handled in one product, or gather."""
    if _is_for_one_hot(segment):
        return (True, segment.rows, segment.lookups)
    return (False, 0, 0)


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
