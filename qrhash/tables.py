"""Tables: the pure core. Initialise, gather, look up, attend.

A feature's tables are a tuple of arrays [rows_j, width_j]; the dense parameters of operation
"project" stay apart from them. A look-up is id -> row numbers -> rows -> vector, and its two
halves are public (`Partition.indices` and `gather`, then `combine`), because the gathered rows
are the place to differentiate at where a table is large.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.sharding import NamedSharding, PartitionSpec

from qrhash.arithmetic import as_ids
from qrhash.combine import Projection, as_projection, combine
from qrhash.config import EmbedConfig, Initializer

_INT32_MAX = 2**31 - 1


def init(key: chex.PRNGKey, config: EmbedConfig) -> tuple[jax.Array, ...]:
    """Creates a feature's tables.

    By default entries are uniform and symmetric around zero, with the variance per operation that
    gives an entry of the *vector* the variance `config.stddev**2`, as a full table's would have:
    for k independent factors the variances multiply, for k terms they add.

    Args:
      key: a JAX random key.
      config: the feature's `EmbedConfig`.

    Returns:
      k arrays [rows_j, width_j] of `config.param_dtype`.
    """
    keys = jax.random.split(key, config.num_tables)
    return tuple(init_table(keys[j], config, j) for j in range(config.num_tables))


def init_table(key: chex.PRNGKey, config: EmbedConfig, table: int) -> jax.Array:
    """Creates one of a feature's tables, given its number; see `init`."""
    initializer = table_initializers(config)[table]
    return initializer(key, config.table_shapes[table], config.param_dtype)


def table_initializers(config: EmbedConfig) -> tuple[Initializer, ...]:
    """The initializer of each table: the config's, or the default matched to the operation."""
    initializer = config.embedding_init or _symmetric_uniform(_row_stddev(config))
    return initializer if isinstance(initializer, tuple) else (initializer,) * config.num_tables


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
    kernel_init = _symmetric_uniform(_kernel_stddev(config))
    kernel = kernel_init(key, config.projection_shape, config.param_dtype)
    bias = jnp.zeros((config.features,), config.param_dtype) if config.use_bias else None
    return Projection(kernel, bias)


def gather(
    tables: Sequence[chex.Array], indices: Sequence[chex.Array], *, fill_value: float = jnp.nan
) -> tuple[jax.Array, ...]:
    """Gathers rows. A row number outside its table gives a row of `fill_value`.

    Args:
      tables: k arrays [rows_j, width_j].
      indices: k integer arrays [*shape], NumPy or JAX, as `Partition.indices` returns them.
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
    if len(tables) != len(indices):
        raise ValueError(
            f"indices must hold one array per table, {len(tables)}, got {len(indices)}."
        )
    return tuple(
        _take(jnp.asarray(table), _device_index(index, table.shape[0]), fill_value)
        for table, index in zip(tables, indices, strict=True)
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
    dtype = config.vector_dtype
    ids = _within_vocabulary(as_ids(ids), config)
    indices = config.partition.indices(ids)
    has_rows = indices[0] < config.partition.num_rows[0]
    if config.id_policy == "raise":
        _check_ids(ids, has_rows, config)
    fill_value = _fill_value(config)
    # A projection shared by all ids must not meet NaN: not even times zero, in a gradient.
    shared = config.operation == "project"
    rows = gather(tables, indices, fill_value=0 if shared else fill_value)
    vectors = combine(
        [row.astype(dtype) for row in rows], config.operation, _cast(projection, dtype)
    )
    return jnp.where(has_rows[..., None], vectors, fill_value) if shared else vectors


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
    indices = map(_device_index, config.partition.indices(ids), config.partition.num_rows)
    logits = (
        _take(jnp.einsum("rf,...f->r...", table.astype(dtype), part), index, _fill_value(config))
        for table, part, index in zip(tables, queries, indices, strict=True)
    )
    return jnp.moveaxis(functools.reduce(operator.add, logits), 0, -1)


def _row_stddev(config: EmbedConfig) -> float:
    """Standard deviation of the tables' entries that gives the vectors `config.stddev`."""
    if config.operation == "add":
        return config.stddev * config.num_tables**-0.5
    if config.operation == "mult":
        return config.stddev ** (1 / config.num_tables)
    if config.operation == "project":
        # Small rows under a kernel of about unit entries: optimizers that normalise each entry's
        # step, as Adagrad does, then move a row as readily as a full table's.
        return config.stddev * sum(width for _, width in config.table_shapes) ** -0.5
    return config.stddev


def _kernel_stddev(config: EmbedConfig) -> float:
    """The same for the kernel of "project", whose inputs are the rows and their product."""
    variance, k, width = _row_stddev(config) ** 2, config.num_tables, config.table_shapes[0][1]
    products = variance**k if k > 1 else 0
    return config.stddev * (width * (k * variance + products)) ** -0.5


def _symmetric_uniform(stddev: float) -> Initializer:
    return functools.partial(_uniform, limit=3**0.5 * stddev)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _uniform(
    key: chex.PRNGKey, shape: tuple[int, ...], dtype: jnp.dtype, limit: float
) -> jax.Array:
    # Drawn in float32 at least: the steps of a narrower type would shift the mean.
    wide = dtype if dtype.itemsize >= 4 else jnp.float32
    return jax.random.uniform(key, shape, wide, -limit, limit).astype(dtype)


def _fill_value(config: EmbedConfig) -> float:
    """What the vector of an id without rows holds."""
    return 0.0 if config.id_policy == "zero" else jnp.nan


def _take(table: jax.Array, index: jax.Array, fill_value: float) -> jax.Array:
    sharding = jax.typeof(table).sharding
    out_sharding = None
    if not sharding.mesh.empty and sharding.mesh.are_all_axes_explicit:
        # Rows are laid out over the mesh as their ids are.
        spec = PartitionSpec(*jax.typeof(index).sharding.spec, *sharding.spec[1:])
        out_sharding = NamedSharding(sharding.mesh, spec)
    return table.at[index].get(
        mode="fill",
        fill_value=fill_value,
        wrap_negative_indices=False,
        out_sharding=out_sharding,
    )


def _device_index(index: chex.Array, rows: int) -> jax.Array:
    """Row numbers for the device; from the host they are 64 bits wide and must not wrap."""
    index = as_ids(index)
    if not isinstance(index, np.ndarray):
        return index
    if rows > _INT32_MAX and jnp.asarray(0).dtype.itemsize < 8:
        raise ValueError(
            f"a table of {rows} rows needs 64-bit row numbers: set jax_enable_x64, or use more "
            "tables, for instance MixedRadix.balanced(num_embeddings, num_tables)."
        )
    in_table = (index >= 0) & (index < rows)
    return jnp.asarray(np.where(in_table, index, rows), jnp.int32 if rows <= _INT32_MAX else None)


def _within_vocabulary(ids: chex.Array, config: EmbedConfig) -> chex.Array:
    """Ids after the policies that move an id; the others leave it outside, without rows."""
    n = config.partition.num_ids_with_rows
    if ids.dtype.itemsize < 8 and n - 1 > _INT32_MAX:
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
