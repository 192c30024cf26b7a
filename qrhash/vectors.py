"""Vectors of ids: gather, combine, look up.

A look-up is id -> row numbers -> rows -> vector, and its three steps are public
(`EmbedConfig.indices`, `gather`, `combine_rows`), because the gathered rows are the place to
differentiate at where a table is large: see `qrhash.autodiff`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qrhash import tuning
from qrhash.batches import as_batch
from qrhash.config import EmbedConfig, check_config
from qrhash.kinds import as_table
from qrhash.operations import Projection, as_projection, combine
from qrhash.policies import fill_value as fill_of_policy
from qrhash.protocol import LookUps, TableLike, is_table
from qrhash.rows import device_index, fill_missing
from qrhash.tables import check_parameters
from qrhash.take import take
from qrhash.types import Array, Scalar


def gather(
    tables: Sequence[TableLike], indices: Sequence[Array], *, fill_value: float = jnp.nan
) -> tuple[jax.Array, ...]:
    """Gathers rows. A row number outside its table gives a row of `fill_value`.

    Args:
      tables: k arrays [rows_j, width_j].
      indices: k integer arrays [*shape], NumPy or JAX, as `EmbedConfig.indices` returns
        them. Negative numbers do not count from the end: they are outside the table.
      fill_value: what a row outside the table holds.

    Returns:
      k arrays [*shape, width_j], each of its table's dtype.

    Raises:
      ValueError: not one array of row numbers per table, a table too long for 32-bit indices, or
        row numbers that are not integers.

    >>> gather((jnp.arange(6.0).reshape(3, 2),), (np.array([2, 3]),))[0].tolist()
    [[4.0, 5.0], [nan, nan]]
    """
    _check_one_per_table(tables, indices=indices)
    return tuple(
        take_filled(table, index, fill_value) for table, index in zip(tables, indices, strict=True)
    )


def lookup(
    tables: Sequence[TableLike],
    ids: Array,
    config: EmbedConfig,
    projection: Projection | Array | None = None,
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
        narrow for it, or no integers; or the tables or the projection have other shapes than the
        config's.

    Source: Shi et al. 2020, algorithm 2, for any complementary partitions.

    >>> from qrhash.families import QuotientRemainder
    >>> from qrhash.tables import init
    >>> config = EmbedConfig(QuotientRemainder(1000, 4), features=8)
    >>> lookup(init(jax.random.key(0), config), jnp.array([[1, 2, 3]]), config).shape
    (1, 3, 8)
    """
    return look_up(tables, ids, config, projection, out_sharding=out_sharding)


def look_up(
    tables: Sequence[TableLike],
    ids: Array,
    config: EmbedConfig,
    projection: Projection | Array | None,
    *,
    out_sharding: Any = None,
    is_whole: bool = False,
) -> jax.Array:
    """See `lookup`; `is_whole`: of all ids, each once."""
    check_parameters(tables, config, projection)
    indices = as_batch(config.indices(ids), config.partition.num_rows, config.layout)

    def from_tables(
        tables: Sequence[TableLike],
        projection: Projection | Array | None,
        indices: Sequence[Array],
    ) -> jax.Array:
        rows = [
            take_filled(table, index, 0.0, is_whole=is_whole)
            for table, index in zip(tables, indices, strict=True)
        ]
        return combine_rows(rows, indices, config, projection)

    if out_sharding is not None:
        num_rows = config.partition.num_rows
        on_device = [device_index(*pair) for pair in zip(indices, num_rows, strict=True)]
        return placed(from_tables, out_sharding, tables, projection, on_device)
    if _is_gathered_again(tables, config):
        from_tables = jax.checkpoint(from_tables)
    return from_tables(tables, projection, indices)


def take_rows(
    tables: Sequence[TableLike], indices: Sequence[Array], *, fill_value: float = jnp.nan
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Gathers rows that are to be updated in the same step; see `gather`.

    XLA copies a donated table unless every read of it is ordered before its update. Each read here
    is one branch of a conditional, which is compiled as one piece: it happens once, however many
    results are computed from its rows, and the row numbers come out of the same conditional. Where
    the update goes by these row numbers, it cannot but come later.

    Args:
      tables: k arrays [rows_j, width_j].
      indices: k integer arrays [*shape], as `EmbedConfig.indices` returns them.
      fill_value: what a row outside the table holds.

    Returns:
      k arrays [*shape, width_j], and the k arrays of row numbers to make the `RowGrads` of; those
      outside the table are now all rows_j.

    Raises:
      ValueError: as `gather`.

    >>> (rows,), (index,) = take_rows((jnp.arange(6.0).reshape(3, 2),), (jnp.array([2, -1]),))
    >>> rows.tolist(), index.tolist()
    ([[4.0, 5.0], [nan, nan]], [2, 3])
    """
    _check_one_per_table(tables, indices=indices)
    taken = [_read(*pair, fill_value) for pair in zip(tables, indices, strict=True)]
    return tuple(rows for rows, _ in taken), tuple(named for _, named in taken)


def row_grads(
    tables: Sequence[TableLike], indices: Sequence[Array], values: Sequence[jax.Array]
) -> tuple[Any, ...]:
    """The gradients of tables, given those of rows gathered: what `value_and_grad` gives.

    Args:
      tables: k arrays [rows_j, width_j].
      indices: k integer arrays [*shape], as `take_rows` gives them back.
      values: k arrays [*shape, width_j], the derivatives with respect to its rows.

    Returns:
      For each table its unmerged `RowGrads`; of a `qrhash.ShardedTable`, one that holds them.

    Raises:
      ValueError: not one array of indices, and one of values, per table, or values of another
        shape than the rows.

    >>> (grads,) = row_grads((jnp.ones((3, 2)),), (jnp.array([2, 2]),), (jnp.ones((2, 2)),))
    >>> grads.to_dense().tolist()
    [[0.0, 0.0], [0.0, 0.0], [2.0, 2.0]]
    """
    _check_one_per_table(tables, indices=indices, values=values)
    grads = []
    for table, index, value in zip(map(as_table, tables), indices, values, strict=True):
        on_device = [device_index(index, table.shape[0])]
        if value.shape != (wanted := (*on_device[0].shape, *table.shape[1:])):
            raise ValueError(
                f"values must be of shape {wanted}, of rows of a table of shape {table.shape} at "
                f"indices of shape {on_device[0].shape}, got {value.shape}."
            )
        look_ups = LookUps.of(on_device, table.shape[0])
        grads.append(table.row_grads(on_device, [value], look_ups).as_given())
    return tuple(grads)


def _read(table: TableLike, index: Array, fill_value: float) -> tuple[jax.Array, jax.Array]:
    num_rows, index = table.shape[0], device_index(index, table.shape[0])
    (rows,), (named,) = as_table(table).read([index], LookUps.of([index], num_rows))
    return fill_missing(rows, named == num_rows, fill_value), named


def _is_gathered_again(tables: Sequence[TableLike], config: EmbedConfig) -> bool:
    """Whether the derivative gathers rows again: then neither pass ever writes them down."""
    is_traced = all(isinstance(table, jax.core.Tracer) for table in tables)
    is_small = is_traced and not any(config.large_tables)
    return is_small and tuning.gathers_again(tuning.traced_for())


def combine_rows(
    rows: Sequence[Array],
    indices: Sequence[Array],
    config: EmbedConfig,
    projection: Projection | Array | None = None,
) -> jax.Array:
    """The last step of `lookup`: gathered rows -> vectors.

    Args:
      rows: k arrays [*shape, width_j], gathered from the feature's tables.
      indices: the k arrays [*shape] of row numbers they were gathered by; those of `config.indices`
        tell the `padding_id` from ids without rows under policy "nan".
      config: the feature's `EmbedConfig`.
      projection: for operation "project", as from `init_projection`.

    Returns:
      Vectors [*shape, features] of `config.vector_dtype`.
    """
    check_config(config)
    for name, arrays in (("rows", rows), ("indices", indices)):
        if len(arrays) != config.num_tables:
            raise ValueError(
                f"{name} must hold one array per table, {config.num_tables}, got {len(arrays)}."
            )
    first = indices[0]
    found = (first >= 0) & (first < config.partition.num_rows[0])
    return combine_found(rows, found, config, projection, fill_value(first, config))


def combine_found(
    rows: Sequence[Array],
    found: Array,
    config: EmbedConfig,
    projection: Projection | Array | None,
    fill: Scalar,
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


def fill_value(first: Array, config: EmbedConfig) -> Scalar:
    """What the vectors of ids without rows hold; see `qrhash.policies.fill_value`."""
    return fill_of_policy(first, config.id_policy, config.padding_id, config.vector_dtype)


def placed(fun: Callable[..., jax.Array], out_sharding: Any, *args: Any) -> jax.Array:
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
    if any(map(is_table, jax.tree.leaves(args, is_leaf=is_table))):
        return jax.sharding.reshard(fun(*args), out_sharding)
    # Of a table split by rows and ids split alike, explicit axes do not say where rows belong.
    return jax.sharding.auto_axes(fun, out_sharding=out_sharding)(*args)


def _check_one_per_table(tables: Sequence[Any], **given: Sequence[Any]) -> None:
    """Raises a ValueError unless what is given is one array for each table."""
    for name, arrays in given.items():
        if len(arrays) != len(tables):
            raise ValueError(
                f"{name} must hold one array per table, {len(tables)}, got {len(arrays)}."
            )


def take_filled(
    table: TableLike, index: Array, fill_value: float, *, is_whole: bool = False
) -> jax.Array:
    """Rows [*shape, width] of indices [*shape]; see `gather`."""
    num_rows, index = table.shape[0], device_index(index, table.shape[0])
    look_ups = LookUps.of([index], num_rows, is_whole=is_whole)
    (rows,) = take(as_table(table), [index], look_ups)
    return fill_missing(rows, (index < 0) | (index >= num_rows), fill_value)


def _cast(projection: Projection | Array | None, dtype: np.dtype) -> Projection | None:
    if projection is None:
        return None
    return jax.tree.map(lambda parameter: parameter.astype(dtype), as_projection(projection))
