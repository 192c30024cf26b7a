"""qrhash: a vector for every id, from a few small tables."""

import importlib
from types import ModuleType

from qrhash.combine import Projection, combine
from qrhash.config import EmbedConfig
from qrhash.partitions import (
    ChineseRemainder,
    DeepRecQuotientRemainder,
    FullTable,
    HashTrick,
    MixedRadix,
    Partition,
    QuotientRemainder,
)
from qrhash.tables import attend, gather, init, init_projection, lookup

__version__ = "0.1.0"

__all__ = [
    "ChineseRemainder",
    "DeepRecQuotientRemainder",
    "EmbedConfig",
    "FullTable",
    "HashTrick",
    "MixedRadix",
    "Partition",
    "Projection",
    "QuotientRemainder",
    "attend",
    "combine",
    "deeprec",
    "gather",
    "init",
    "init_projection",
    "linen",
    "lookup",
    "nnx",
]


def __getattr__(name: str) -> ModuleType:
    """Loads the Flax modules on first use: importing Flax takes longer than all the rest."""
    if name in ("deeprec", "linen", "nnx"):
        return importlib.import_module(f"qrhash.{name}")
    raise AttributeError(f"module 'qrhash' has no attribute {name!r}")
