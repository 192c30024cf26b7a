"""More ids for a vocabulary: every old one keeps its rows, and so its vector, bit for bit.

Families whose arithmetic does not depend on the size of the vocabulary go on where they stopped:
of "quotient-remainder" the table of quotients gets more rows, of "mixed radix" the last one does.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qrhash.arithmetic import as_size, ceil_div
from qrhash.carried_families import DeepRecQuotientRemainder, DLRMQuotientRemainder
from qrhash.config import EmbedConfig, check_config
from qrhash.families import (
    ChineseRemainder,
    FullTable,
    HashTrick,
    MixedRadix,
    QuotientRemainder,
)
from qrhash.initializers import Draw, create, table_initializers
from qrhash.kinds import set_table_rows, whole_table
from qrhash.partitions import Partition
from qrhash.protocol import TableLike
from qrhash.tables import check_shapes
from qrhash.types import Key


def grow(config: EmbedConfig, num_embeddings: int) -> EmbedConfig:
    """The config for more ids, whose old ones keep their row numbers.

    `FullTable` and `QuotientRemainder` get more rows in their (first) table, `MixedRadix` in its
    last; `HashTrick`, and `ChineseRemainder` as far as its moduli reach, have rows enough.

    Args:
      config: the `EmbedConfig`.
      num_embeddings: size of the larger vocabulary.

    Raises:
      ValueError: fewer ids than there are, or a family that has no place for more, with what to do.

    >>> from qrhash.families import QuotientRemainder
    >>> grow(EmbedConfig(QuotientRemainder(10, 4), 8), 14).partition
    QuotientRemainder(num_embeddings=14, num_collisions=4)
    """
    check_config(config)
    size = as_size("num_embeddings", num_embeddings)
    if config.partition.takes_keys:
        raise ValueError(
            f"config must be of a family on ids: {type(config.partition).__name__} has no "
            "vocabulary, and every key has its rows already."
        )
    if size < config.num_embeddings:
        raise ValueError(
            f"num_embeddings must be at least {config.num_embeddings}, the size of the vocabulary "
            f"that grows, got {size}."
        )
    # The widths stay, also those that another number of rows would choose otherwise.
    grown = dataclasses.replace(config, partition=_grown(config.partition, size))
    if config.layout is not None and grown.large_tables != config.large_tables:
        raise ValueError(
            f"large_table_rows must have the same tables on one side of it before and after, got "
            f"{config.large_table_rows} with {config.partition.num_rows} rows that become "
            f"{grown.partition.num_rows}: on a mesh small tables are on every device, large ones "
            "are split."
        )
    return grown


def grow_tables(
    key: Key, tables: Sequence[TableLike], config: EmbedConfig, num_embeddings: int
) -> tuple[Any, ...]:
    """The tables for more ids: the rows that they had, and new ones as `qrhash.init` draws them.

    A projection stays what it is. The optimizer's state grows beside the tables:

        grown = fitting.grow_tables(key, tables, config, num_embeddings)
        config = fitting.grow(config, num_embeddings)
        opt_state, tables = qrhash.grow_rows(tx, opt_state, tables, grown), grown

    Args:
      key: a JAX random key, of the new rows.
      tables: the feature's tables, of `config`.
      config: the `EmbedConfig` that they have.
      num_embeddings: size of the larger vocabulary.

    Returns:
      k tables, of the shapes of `grow(config, num_embeddings)`. Those that have rows enough are
      the ones given.

    Raises:
      ValueError: as `grow`; or tables of other shapes than the config's.

    >>> from qrhash.families import QuotientRemainder
    >>> from qrhash.tables import init
    >>> config = EmbedConfig(QuotientRemainder(10, 4), 8)
    >>> tables = init(jax.random.key(0), config)
    >>> [table.shape for table in grow_tables(jax.random.key(1), tables, config, 14)]
    [(4, 8), (4, 8)]
    """
    grown = grow(config, num_embeddings)
    check_shapes(tables, config)
    keys = jax.random.split(key, config.num_tables)
    return tuple(
        table if shape == table.shape else _longer(keys[j], table, config, grown, j)
        for j, (table, shape) in enumerate(zip(tables, grown.table_shapes, strict=True))
    )


def _longer(
    key: Key, table: TableLike, config: EmbedConfig, grown: EmbedConfig, number: int
) -> Any:
    """A table with its rows, and more of them, drawn as those that it has."""
    shape, is_large = grown.table_shapes[number], grown.large_tables[number]
    draw = Draw(key, table_initializers(config)[number], 0, shape[0])
    longer = create([draw], shape, config.param_dtype, config.layout, is_large=is_large)
    old = jnp.asarray(whole_table(table))
    return set_table_rows(longer, jnp.arange(len(old)), old)


def _grown(partition: Partition, size: int) -> Partition:
    """The partition for more ids; old ones have the row numbers that they had."""
    if size == partition.num_embeddings:
        return partition
    kind = type(partition).__name__
    if isinstance(partition, MixedRadix):
        *first, last = partition.radices
        radices = (*first, max(last, ceil_div(size, math.prod(first))))
        return dataclasses.replace(partition, num_embeddings=size, radices=radices)
    if isinstance(partition, ChineseRemainder):
        most = math.prod(partition.moduli)
    elif isinstance(partition, DeepRecQuotientRemainder):
        most = partition.num_quotients**2
        if partition.is_complementary and partition.num_remainders < partition.num_quotients:
            most = min(most, partition.num_remainders)
    elif isinstance(partition, (FullTable, HashTrick, QuotientRemainder, DLRMQuotientRemainder)):
        most = size
    else:
        raise ValueError(
            f"config must be of a family whose rows follow from the number of an id, got {kind}: "
            "make a partition for all ids, which keeps the rows of the old ones, and tables by "
            "qrhash.as_tables."
        )
    if size > most:
        raise ValueError(
            f"num_embeddings must be at most {most} for {partition}: another size of its tables "
            f"would give old ids other rows, got {size}. Fit larger tables to the expanded ones, "
            "by qrhash.fitting.expand and fit."
        )
    return dataclasses.replace(partition, num_embeddings=size)
