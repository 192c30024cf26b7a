"""qrhash: a vector for every id, from a few small tables."""

import importlib
from types import ModuleType

from qrhash import batches, collection, dynamic, initializers, inspection, planning
from qrhash.autodiff import value_and_grad
from qrhash.bags import Bag
from qrhash.code_partition import CodePartition
from qrhash.config import EmbedConfig
from qrhash.families import (
    ChineseRemainder,
    FullTable,
    HashTrick,
    MixedRadix,
    QuotientRemainder,
)
from qrhash.grads import add_grads, global_norm, sum_grads
from qrhash.key_families import KeyDigits, MultiHash
from qrhash.keys import Keys, cross
from qrhash.layout import MeshLayout
from qrhash.logits import all_vectors, attend
from qrhash.operations import Projection, combine
from qrhash.optim import (
    adagrad,
    apply_updates,
    grow_rows,
    reset_rows,
    rowwise_adagrad,
    touched_rows,
)
from qrhash.partitions import Partition
from qrhash.row_training import row_grads, take_rows
from qrhash.rowgrads import RowGrads
from qrhash.sharded import ShardedTable
from qrhash.stacks import CollectionConfig
from qrhash.tables import as_tables, init, init_projection
from qrhash.vectors import combine_rows, gather, lookup

__version__ = "0.1.0"

# Without the rooms whose names are Flax's, linen and nnx: `from qrhash import *` hides neither.

__all__ = [
    "Bag",
    "ChineseRemainder",
    "CodePartition",
    "CollectionConfig",
    "EmbedConfig",
    "FullTable",
    "HashTrick",
    "KeyDigits",
    "Keys",
    "MeshLayout",
    "MixedRadix",
    "MultiHash",
    "Partition",
    "Projection",
    "QuotientRemainder",
    "RowGrads",
    "ShardedTable",
    "adagrad",
    "add_grads",
    "all_vectors",
    "apply_updates",
    "as_tables",
    "attend",
    "batches",
    "checkpoint",
    "codes",
    "collection",
    "combine",
    "combine_rows",
    "cross",
    "deeprec",
    "dynamic",
    "fitting",
    "gather",
    "global_norm",
    "grow_rows",
    "init",
    "init_projection",
    "initializers",
    "inspection",
    "lookup",
    "planning",
    "reset_rows",
    "row_grads",
    "rowwise_adagrad",
    "sum_grads",
    "take_rows",
    "touched_rows",
    "value_and_grad",
]


def __getattr__(name: str) -> ModuleType:
    """Loads some rooms on first use: importing Flax takes longer than all the rest."""
    if name in ("checkpoint", "codes", "deeprec", "fitting", "linen", "nnx"):
        return importlib.import_module(f"qrhash.{name}")
    raise AttributeError(f"module 'qrhash' has no attribute {name!r}")
