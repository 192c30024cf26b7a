"""The vectors of bags, summed up straight from the tables: see `qrhash.pooled`.

"mult" is one sum over bags. "add", "concat", "features" and "project" are linear in the sums of
each table's rows, "project" also in those of their products: nothing is combined before it is
summed. "path" is not, and is pooled when it is combined.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qrhash import tuning
from qrhash.bags import Bag
from qrhash.config import EmbedConfig
from qrhash.operations import Projection, as_projection, combine
from qrhash.pooled import pooled_sums
from qrhash.pooling import divided
from qrhash.protocol import Table
from qrhash.rows import add_rows, device_index
from qrhash.types import Array


def are_summed_at_once(tables: Sequence[Table], config: EmbedConfig, bag: Bag) -> bool:
    """Whether the vectors of bags are summed up so, rather than gathered, combined and pooled."""
    # How many places an exported program will be given is not known.
    if bag.length is not None or not isinstance(bag.capacity, int) or not bag.num_bags:
        return False
    is_sum = config.combiner != "max" and not config.pool_rows and config.operation != "path"
    is_alone = config.logical_axes is None and jax.sharding.get_abstract_mesh().empty
    is_many = tuning.sums_at_once(tuning.traced_for(), bag.capacity)
    return is_sum and is_alone and is_many and all(table.is_at_hand for table in tables)


def summed_at_once(
    tables: Sequence[Table],
    indices: Sequence[Array],
    found: Array,
    config: EmbedConfig,
    projection: Projection | Array | None,
    bag: Bag,
) -> jax.Array:
    """The vectors of bags.

    Args:
      tables: k tables that are at hand; of a collection, stacks.
      indices: rows of theirs, k arrays [n]; places of no bag name none.
      found: which places name rows, [n].
      config: of the feature.
      projection: for "project".
      bag: the bags.

    Returns:
      [*shape, *config.vector_shape], of `config.vector_dtype`.
    """
    segments, scale = bag.ends(), None if bag.weights is None else jnp.asarray(bag.weights)
    # What has no row: under "zero" it is left out of the sum, under "nan" the sum is NaN.
    if config.id_policy == "zero":
        segments = jnp.where(found, segments, bag.num_bags)

    def sums(*numbers: int) -> jax.Array:
        return pooled_sums(
            [tables[j] for j in numbers],
            [device_index(indices[j], tables[j].shape[0]) for j in numbers],
            segments,
            scale,
            num_bags=bag.num_bags,
            dtype=config.vector_dtype,
            misses_are_nan=config.id_policy == "nan",
        )

    every = range(config.num_tables)
    if config.operation == "mult":
        total = sums(*every)
    else:
        parts = [sums(j) for j in every]
        if config.operation == "project" and config.num_tables > 1:
            parts.append(sums(*every))
        total = combine(parts, "add" if config.operation == "add" else "concat")
    if config.operation == "project":
        counted = jnp.where(found, segments, bag.num_bags)
        total = _projected(total, projection, counted, scale)
    vectors = divided(total, bag, config.combiner).astype(config.vector_dtype)
    return vectors.reshape(*bag.shape, *config.vector_shape)


def _projected(
    inputs: jax.Array,
    projection: Projection | Array | None,
    segments: jax.Array,
    scale: jax.Array | None,
) -> jax.Array:
    """Sums of projected vectors, given those of what is projected."""
    kernel, bias = jax.tree.map(lambda each: each.astype(inputs.dtype), as_projection(projection))
    if bias is None:
        return inputs @ kernel
    counts = jnp.ones(segments.shape, inputs.dtype) if scale is None else scale.astype(inputs.dtype)
    times = add_rows(jnp.zeros(inputs.shape[0], inputs.dtype), segments, counts, is_merged=False)
    return inputs @ kernel + jnp.outer(times, bias)
