"""Over the whole vocabulary: the vectors of all ids, and inner products with them."""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qrhash.arithmetic import INT32_MAX
from qrhash.batches import as_batch
from qrhash.config import EmbedConfig, check_config
from qrhash.kinds import as_table
from qrhash.operations import Projection
from qrhash.protocol import TableLike
from qrhash.tables import check_parameters
from qrhash.types import Array
from qrhash.vectors import look_up, placed, take_filled


def all_vectors(
    tables: Sequence[TableLike],
    config: EmbedConfig,
    projection: Projection | Array | None = None,
) -> jax.Array:
    """The vectors of all ids, [num_embeddings, features]: what a full table would hold.

    For operation "features" they are [num_embeddings, k, features].

    Args:
      tables: the feature's tables, as from `init`.
      config: the feature's `EmbedConfig`.
      projection: for operation "project", as from `init_projection`.

    Raises:
      ValueError: more ids than fit 32 bits; or as `lookup`.

    >>> from qrhash.families import QuotientRemainder
    >>> from qrhash.tables import init
    >>> config = EmbedConfig(QuotientRemainder(10, 4), features=8)
    >>> all_vectors(init(jax.random.key(0), config), config).shape
    (10, 8)
    """
    return look_up(tables, *_all_ids(config), projection, is_whole=True)


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
    tables: Sequence[TableLike],
    query: Array,
    config: EmbedConfig,
    projection: Projection | Array | None = None,
    *,
    out_sharding: Any = None,
) -> jax.Array:
    """Inner products of queries with the vectors of all ids, as `flax.linen.Embed.attend`.

    For "add", "concat" and "features" each table is multiplied with the query once, and the vectors
    of the vocabulary are never formed; the other operations form all [num_embeddings, features].

    Args:
      tables: the feature's tables, as from `init`.
      query: [*shape, features]; for "features" [*shape, k, features], and the inner products are
        summed up over the k.
      config: the feature's `EmbedConfig`.
      projection: for operation "project", as from `init_projection`.
      out_sharding: where the logits are to be, as in `lookup`.

    Returns:
      Logits [*shape, num_embeddings] of `config.dtype`, by default of the type to which the query
      and the tables promote. That of the `padding_id`, whose vector is zeros, is zero.

    Raises:
      ValueError: a query of another width; or as `all_vectors`.
    """
    check_parameters(tables, config, projection)
    query = jnp.asarray(query)
    if query.shape[-len(config.vector_shape) :] != config.vector_shape:
        several = "k, " * (len(config.vector_shape) - 1)
        raise ValueError(
            f"query must have shape [*shape, {several}features], {config.vector_shape} at its end, "
            f"got {query.shape}."
        )
    ids, config = _all_ids(config)

    def from_tables(tables: Any, projection: Any, query: jax.Array, ids: jax.Array) -> jax.Array:
        return _logits(tables, query, ids, config, projection)

    if out_sharding is not None:
        return placed(from_tables, out_sharding, tables, projection, query, ids)
    return from_tables(tables, projection, query, ids)


def _logits(
    tables: Sequence[TableLike],
    query: jax.Array,
    ids: jax.Array,
    config: EmbedConfig,
    projection: Projection | Array | None,
) -> jax.Array:
    dtype = config.dtype or jnp.result_type(query, config.param_dtype)
    query = query.astype(dtype)
    if config.operation not in ("add", "concat", "features"):
        return query @ look_up(tables, ids, config, projection, is_whole=True).astype(dtype).T
    queries = [query] * config.num_tables
    if config.operation == "features":
        queries = [query[..., j, :] for j in range(config.num_tables)]
    elif config.operation == "concat":
        ends = np.cumsum([width for _, width in config.table_shapes])
        queries = jnp.split(query, ends[:-1].tolist(), axis=-1)
    indices = as_batch(config.indices(ids), config.partition.num_rows, config.layout)
    fill = 0.0 if config.id_policy == "zero" else jnp.nan
    products = (
        take_filled(as_table(table).products(part), index, fill, is_whole=True)
        for table, part, index in zip(tables, queries, indices, strict=True)
    )
    logits = jnp.moveaxis(functools.reduce(operator.add, products), 0, -1)
    if config.padding_id is None:
        return logits
    return jnp.where(jnp.expand_dims(ids == config.padding_id, range(logits.ndim - 1)), 0, logits)
