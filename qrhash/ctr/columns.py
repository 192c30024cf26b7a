"""Settings and vocabulary sizes -> one EmbedConfig for each categorical column.

`collisions` = c means the same for every family: of the n ids of a column, c share each row of
the largest table, which has ceil(n / c) rows, and the other tables, if the family has any, tell
them apart. So the tables have about n / c rows together, but never fewer than the family's
balanced ones, the fewest there can be.

Ids are numbered by falling frequency, and the largest table is indexed by id mod ceil(n / c):
the ids that share a row are far apart, a frequent one with rare ones. Measured on Criteo, that
is better than id // c, by which neighbours share it (the paper's layout, in which the quotients
are the large table).

For "mult", the largest table starts as a full table would and the others as random signs with a
little noise. A row then learns as fast as a full table's from the first step; with factors of
equal size each would be held back by the smallness of the other.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import chex
import jax

from qrhash import (
    ChineseRemainder,
    EmbedConfig,
    FullTable,
    HashTrick,
    MixedRadix,
    Partition,
    QuotientRemainder,
    Sharding,
)
from qrhash.arithmetic import ceil_div, ceil_root
from qrhash.ctr.errors import UserError
from qrhash.ctr.settings import ColumnSettings, Settings
from qrhash.tables import ByRows

# Options of a column's section that leave its embedding to the run's own options.
_SHARED = frozenset({"min_count", "hash_size", "init_stddev"})


def embed_configs(
    settings: Settings, sizes: Mapping[str, int], sharding: Sharding | None = None
) -> dict[str, EmbedConfig]:
    """The embeddings of a model.

    Args:
      settings: the options of the run.
      sizes: column name -> number of ids.
      sharding: how large tables are split over devices.

    Returns:
      {column name: config}, without the columns that are dropped.
    """
    configs = {}
    for name, size in sizes.items():
        column = settings.column(name)
        named = not _SHARED.issuperset(settings.columns.get(name, {}))
        if not named and size <= settings.threshold:
            column = replace(column, partition="full")
        if column.partition == "drop":
            continue
        try:
            partition = _partition(column, size)
            if not named and sum(partition.num_rows) >= size:
                partition = FullTable(size)
            config = _config(column, partition, settings.features)
            configs[name] = replace(
                config, large_table_rows=settings.large_table_rows, sharding=sharding
            )
        except ValueError as error:
            raise UserError(f"Column {name}, {size} ids: {error}") from error
    return configs


def _config(column: ColumnSettings, partition: Partition, features: int) -> EmbedConfig:
    # A single table is its own vector: nothing to combine or to project.
    operation = column.operation if partition.num_tables > 1 else "mult"
    return EmbedConfig(
        partition,
        features,
        operation,
        widths=column.widths if partition.num_tables > 1 else None,
        dtype="float32",
        param_dtype=column.param_dtype,
        use_bias=column.use_bias,
        **_start(column, partition),
    )


def _start(column: ColumnSettings, partition: Partition) -> dict[str, Any]:
    """How the tables start: options of `EmbedConfig`."""
    if column.operation != "mult" or partition.num_tables == 1:
        return {"init_stddev": column.init_stddev}
    largest = partition.num_rows.index(max(partition.num_rows))
    rows = ByRows(jax.nn.initializers.normal(column.init_stddev))
    tables = range(partition.num_tables)
    return {"embedding_init": tuple(rows if j == largest else ByRows(_signs) for j in tables)}


def _signs(key: chex.PRNGKey, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random +-(1 + 10 % noise)."""
    sign_key, noise_key = jax.random.split(key)
    noise = 0.1 * jax.random.normal(noise_key, shape, dtype)
    return jax.random.rademacher(sign_key, shape, dtype) * (1 + noise)


def _partition(column: ColumnSettings, size: int) -> Partition:
    c, k = column.collisions, column.num_tables
    large = ceil_div(size, max(1, c))
    # More ids to a row than this, and the other tables would be the longer ones.
    k = 2 if column.partition == "quotient-remainder" else k
    balanced = c == 0 or large <= ceil_root(size, k)
    match column.partition:
        case "quotient-remainder":
            return QuotientRemainder(size) if balanced else QuotientRemainder(size, large)
        case "mixed-radix":
            if column.radices is not None:
                return MixedRadix(size, column.radices)
            if balanced:
                return MixedRadix.balanced(size, k)
            small = (c,) if k == 2 else MixedRadix.balanced(c, k - 1).radices
            return MixedRadix(size, (large, *small))
        case "chinese-remainder":
            if column.moduli is not None:
                return ChineseRemainder(size, column.moduli)
            if balanced:
                return ChineseRemainder.balanced(size, k)
            small = (c,) if k == 2 else ChineseRemainder.balanced(c, k - 1).moduli
            while any(math.gcd(large, modulus) > 1 for modulus in small):
                large += 1
            return ChineseRemainder(size, (large, *small))
        case "hash-trick":
            if c == 0:
                raise ValueError("the hash trick needs collisions of at least 1, got 0.")
            return HashTrick(size, large)
    return FullTable(size)
