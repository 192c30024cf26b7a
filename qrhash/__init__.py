"""qrhash: a vector for every id, from a few small tables."""

import importlib
from types import ModuleType

from qrhash import collection
from qrhash.autodiff import value_and_grad
from qrhash.collection import CollectionConfig
from qrhash.combine import Projection, combine
from qrhash.config import EmbedConfig
from qrhash.optim import adagrad, apply_updates, rowwise_adagrad, touched_rows
from qrhash.partitions import (
    ChineseRemainder,
    DeepRecQuotientRemainder,
    FullTable,
    HashTrick,
    MixedRadix,
    Partition,
    QuotientRemainder,
)
from qrhash.rowgrads import RowGrads, add_grads, global_norm, sum_grads, take_rows
from qrhash.sharding import ShardedTable, Sharding
from qrhash.tables import (
    all_vectors,
    as_tables,
    attend,
    gather,
    init,
    init_projection,
    lookup,
    row_numbers,
    vectors,
)

__version__ = "0.1.0"

# Without the rooms whose names are Flax's, linen and nnx: `from qrhash import *` hides neither.

__all__ = [
    "ChineseRemainder",
    "CollectionConfig",
    "DeepRecQuotientRemainder",
    "EmbedConfig",
    "FullTable",
    "HashTrick",
    "MixedRadix",
    "Partition",
    "Projection",
    "QuotientRemainder",
    "RowGrads",
    "ShardedTable",
    "Sharding",
    "adagrad",
    "add_grads",
    "all_vectors",
    "apply_updates",
    "as_tables",
    "attend",
    "checkpoint",
    "collection",
    "combine",
    "deeprec",
    "gather",
    "global_norm",
    "init",
    "init_projection",
    "lookup",
    "row_numbers",
    "rowwise_adagrad",
    "sum_grads",
    "take_rows",
    "touched_rows",
    "value_and_grad",
    "vectors",
]


def __getattr__(name: str) -> ModuleType:
    """Loads the Flax modules on first use: importing Flax takes longer than all the rest."""
    if name in ("checkpoint", "deeprec", "linen", "nnx"):
        return importlib.import_module(f"qrhash.{name}")
    raise AttributeError(f"module 'qrhash' has no attribute {name!r}")
