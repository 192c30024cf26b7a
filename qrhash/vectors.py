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
from qrhash.bag_sums import are_summed_at_once, summed_at_once
from qrhash.bags import Bag
from qrhash.batches import as_batch, everywhere, split_as_rows
from qrhash.config import EmbedConfig, check_config
from qrhash.keys import Keys
from qrhash.kinds import as_table
from qrhash.operations import Projection, as_projection, combine
from qrhash.policies import PADDING
from qrhash.policies import fill_value as fill_of_policy
from qrhash.pooling import pool
from qrhash.protocol import LookUps, TableLike, is_table
from qrhash.rows import device_index, fill_missing, is_within
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
    check_one_per_table(tables, indices=indices)
    return tuple(
        take_filled(table, index, fill_value) for table, index in zip(tables, indices, strict=True)
    )


def lookup(
    tables: Sequence[TableLike],
    ids: Array | Keys | Bag,
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
        function is no longer NumPy inside it, and was cut to 32 bits on the way in.) For a family
        on keys `qrhash.Keys`; or a `qrhash.Bag` of either, with `config.combiner`.
      config: the feature's `EmbedConfig`; ids outside the vocabulary follow its `id_policy`.
      projection: for operation "project", as from `init_projection`.
      out_sharding: where the vectors are to be, on a mesh: a `NamedSharding`, or a `PartitionSpec`
        for the mesh of `jax.set_mesh`.

    Returns:
      Vectors [*shape, features] of `config.vector_dtype`; of bags one for each, zeros for an empty
      one. For operation "features" k vectors for each, [*shape, k, features].

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
    ids: Array | Keys | Bag,
    config: EmbedConfig,
    projection: Projection | Array | None,
    *,
    out_sharding: Any = None,
    is_whole: bool = False,
) -> jax.Array:
    """See `lookup`; `is_whole`: of all ids, each once."""
    check_parameters(tables, config, projection)
    indices, bag = indices_of(ids, config)

    def from_tables(
        tables: Sequence[TableLike],
        projection: Projection | Array | None,
        indices: Sequence[Array],
        bag: Bag | None,
    ) -> jax.Array:
        rows = [
            take_filled(table, index, 0.0, is_whole=is_whole)
            for table, index in zip(tables, indices, strict=True)
        ]
        found, fill = _found(indices[0], config), fill_value(indices[0], config)
        return vectors_of(rows, found, config, projection, fill, bag)

    if out_sharding is not None:
        num_rows = config.partition.num_rows
        on_device = [device_index(*pair) for pair in zip(indices, num_rows, strict=True)]
        return placed(from_tables, out_sharding, tables, projection, on_device, bag)
    if bag is not None and are_summed_at_once(given := [*map(as_table, tables)], config, bag):
        found = _found(indices[0], config)
        return summed_at_once(given, indices, found, config, projection, bag)
    if _is_gathered_again(tables, config):
        from_tables = jax.checkpoint(from_tables)
    return from_tables(tables, projection, indices, bag)


def indices_of(ids: Array | Keys | Bag, config: EmbedConfig) -> tuple[Sequence[Array], Bag | None]:
    """Row numbers of ids, [*shape] each; of bags [n], and the bags.

    Places of no bag, and with the padding id, name no row, and are of no bag.
    """
    if not isinstance(ids, Bag):
        indices = config.indices(ids)
        return as_batch(indices, config.partition.num_rows, config.layout), None
    bag, num_rows = ids.without_what_is_in_none(), config.partition.num_rows
    indices, in_bag = config.indices(bag.ids), bag.in_bag
    if config.padding_id is not None:
        in_bag = in_bag & (indices[0] != PADDING)
    xp = np if all(isinstance(each, np.ndarray) for each in (in_bag, indices[0])) else jnp
    named = [xp.where(in_bag, *pair) for pair in zip(indices, num_rows, strict=True)]
    bag = bag.with_segments(xp.where(in_bag, bag.segments, xp.asarray(bag.num_bags, np.int32)))
    return as_batch(named, num_rows, config.layout), split_as_rows(bag.without_ids(), config.layout)


def vectors_of(
    rows: Sequence[Array],
    found: Array,
    config: EmbedConfig,
    projection: Projection | Array | None,
    fill: Scalar,
    bag: Bag | None,
) -> jax.Array:
    """Rows [*shape, width_j], where `found` [*shape] -> vectors; of bags, from rows [n, width_j].

    Combined, then pooled; or the other way round, with `config.pool_rows`.
    """
    if bag is None:
        vectors = _combine_found(rows, found, config, projection, fill)
        return _separated(vectors, config)
    if bag.length is None:
        rows, found, fill, bag = everywhere((rows, found, fill, bag), config.layout)
    if config.pool_rows:
        vectors = _combine_pooled(rows, found, config, projection, fill, bag)
    else:
        combined = _combine_found(rows, found, config, projection, fill)
        vectors = pool(combined, bag, config.combiner)
    return vectors.reshape(*bag.shape, *config.vector_shape)


def _combine_pooled(
    rows: Sequence[Array],
    found: Array,
    config: EmbedConfig,
    projection: Projection | Array | None,
    fill: Scalar,
    bag: Bag,
) -> jax.Array:
    """Vectors [num_bags, ...], side by side, combined of the rows of each table pooled."""
    dtype = config.vector_dtype
    filled = [jnp.where(found[:, None], row.astype(dtype), fill) for row in rows]
    pooled = [pool(row, bag, config.combiner) for row in filled]
    vectors = combine(pooled, _side_by_side(config.operation), _cast(projection, dtype))
    # The bias of a projection, say, is not to stand for an empty bag.
    return jnp.where(bag.counts()[:, None] > 0, vectors, 0)


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
      Vectors [*shape, features] of `config.vector_dtype`; for "features" [*shape, k, features].
    """
    check_config(config)
    for name, arrays in (("rows", rows), ("indices", indices)):
        if len(arrays) != config.num_tables:
            raise ValueError(
                f"{name} must hold one array per table, {config.num_tables}, got {len(arrays)}."
            )
    first = indices[0]
    found, fill = _found(first, config), fill_value(first, config)
    return _separated(_combine_found(rows, found, config, projection, fill), config)


def _found(first: Array, config: EmbedConfig) -> Array:
    """Where an id has rows, given its index into the first table."""
    return is_within(first, config.partition.num_rows[0])


def _side_by_side(operation: str) -> str:
    """The operation, by which several vectors of an id stand side by side until the end."""
    return "concat" if operation == "features" else operation


def _separated(vectors: jax.Array, config: EmbedConfig) -> jax.Array:
    """Vectors [*shape, ...], side by side where an id has several, as [*shape, *vector_shape]."""
    if len(config.vector_shape) == 1:
        return vectors
    return vectors.reshape(*vectors.shape[:-1], *config.vector_shape)


def _combine_found(
    rows: Sequence[Array],
    found: Array,
    config: EmbedConfig,
    projection: Projection | Array | None,
    fill: Scalar,
) -> jax.Array:
    """Combines rows [*shape, width_j] where `found` [*shape], and fills in the rest.

    Several vectors of an id stand side by side.
    """
    found = found[..., None]
    # What stands for rows that were not found must not reach a projection shared by all ids: in
    # its gradient even zero times NaN is NaN.
    if config.operation == "project":
        rows = [jnp.where(found, row, 0) for row in rows]
    dtype = config.vector_dtype
    typed = [row.astype(dtype) for row in rows]
    combined = combine(typed, _side_by_side(config.operation), _cast(projection, dtype))
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


def check_one_per_table(tables: Sequence[Any], **given: Sequence[Any]) -> None:
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
