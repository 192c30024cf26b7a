"""`cached`: the config of the rows that are on the device, of those of a whole table."""

import dataclasses
from typing import Any

from qrhash.arithmetic import INT32_MAX, as_size
from qrhash.config import EmbedConfig
from qrhash.dynamic.config import DynamicConfig
from qrhash.families import FullTable
from qrhash.initializers import PerRow, table_initializers


def cached(config: Any, cache_rows: int) -> Any:
    """The config of the rows on the device, `cache_rows` of those of a whole table.

    Args:
      config: an `EmbedConfig` of one full table, or a `DynamicConfig`.
      cache_rows: how many rows are on the device.

    Returns:
      A config of the same kind, for `init`, `large_tables` and the look-ups of the training.

    Raises:
      ValueError: a config of several tables, on a mesh, or whose rows are not drawn one by one; or
        a padding id beside the policy "nan".

    >>> config = EmbedConfig(FullTable(10**9), features=16)
    >>> cached(config, 10**6).table_shapes
    ((1000000, 16),)
    """
    cache_rows = as_size("cache_rows", cache_rows)
    check_tiered(config)
    if isinstance(config, DynamicConfig):
        return dataclasses.replace(config, capacity=cache_rows, large_table_rows=1)
    return dataclasses.replace(
        config,
        partition=FullTable(cache_rows),
        id_policy="nan" if config.id_policy == "nan" else "zero",
        padding_id=None,
        large_table_rows=1,
    )


def check_tiered(config: Any) -> None:
    """Raises a ValueError unless the rows of it can be in a store."""
    if not isinstance(config, (EmbedConfig, DynamicConfig)):
        raise ValueError(f"config must be an EmbedConfig or a DynamicConfig, got {config!r}.")
    if config.layout is not None:
        raise ValueError("config.layout must be None: a tiered table is on one device.")
    if isinstance(config, DynamicConfig):
        return
    if not isinstance(config.partition, FullTable):
        raise ValueError(
            f"config must be of a FullTable, one row for each id, got {config.partition!r}."
        )
    if config.num_embeddings > INT32_MAX:
        raise ValueError(
            f"config must be of at most {INT32_MAX} rows, got {config.num_embeddings}."
        )
    if not isinstance(table_initializers(config)[0], PerRow):
        raise ValueError(
            "config.embedding_init must draw every row by itself, qrhash.initializers.per_row(...)"
            f", got {config.embedding_init!r}."
        )
    if config.id_policy == "nan" and config.padding_id is not None:
        raise ValueError('config.padding_id must be None with the id_policy "nan".')
