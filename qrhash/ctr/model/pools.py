"""Columns of keys that share one set of tables, each by hashes of its own.

One size for all of them, and room that one column does not need is the others' ("unified
embedding", Coleman et al. 2023, arXiv 2305.12102). Which rows a column has goes by its name.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qrhash import EmbedConfig, KeyDigits
from qrhash.stacks import Shared, of_feature

# The seeds of pools, before a column's name is mixed in: of two towers each has one.
_SEEDS = (1, 2)


def in_pool(config: EmbedConfig, name: str, pool: int) -> EmbedConfig:
    """The config of a column in a pool, 0 or 1."""
    assert isinstance(config.partition, KeyDigits)  # What a pool is made of.
    partition = replace(config.partition, seed=_SEEDS[pool])
    return replace(config, partition=of_feature(partition, name))


def pools(configs: Mapping[str, Any]) -> dict[EmbedConfig, list[str]]:
    """The pools among configs, and the columns in each: the first one owns its tables."""
    found: dict[EmbedConfig, list[str]] = {}
    for name, config in configs.items():
        if isinstance(config, EmbedConfig) and isinstance(config.partition, KeyDigits):
            partition = of_feature(config.partition, name)
            if partition.seed in _SEEDS:
                # How the vectors of a list are pooled is a column's own affair.
                alike = replace(config, partition=partition, combiner="sum")
                found.setdefault(alike, []).append(name)
    return found


def as_embeddings(configs: Mapping[str, EmbedConfig]) -> dict[str, EmbedConfig | Shared]:
    """What a collection takes: configs, and what shares the tables of others."""
    embeddings: dict[str, EmbedConfig | Shared] = dict(configs)
    for owner, *others in pools(configs).values():
        for name in others:
            config = configs[name]
            embeddings[name] = Shared(owner, config.partition, config.combiner)
    return embeddings
