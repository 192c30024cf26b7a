"""qrhash: a vector for every id, from a few small tables.

Every name here is loaded on first use: what is only looked up in a snapshot (`qrhash.export`) is
looked up without JAX, and Flax takes longer to import than all the rest.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        compensated_rounding,
        grow_rows,
        reset_rows,
        rowwise_adagrad,
        stochastic_rounding,
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

# The same as above, for when it is run: room -> what is taken from it.
_TAKEN = {
    "autodiff": "value_and_grad",
    "bags": "Bag",
    "code_partition": "CodePartition",
    "config": "EmbedConfig",
    "families": "ChineseRemainder FullTable HashTrick MixedRadix QuotientRemainder",
    "grads": "add_grads global_norm sum_grads",
    "key_families": "KeyDigits MultiHash",
    "keys": "Keys cross",
    "layout": "MeshLayout",
    "logits": "all_vectors attend",
    "operations": "Projection combine",
    "optim": "adagrad apply_updates compensated_rounding grow_rows reset_rows rowwise_adagrad "
    "stochastic_rounding touched_rows",
    "partitions": "Partition",
    "row_training": "row_grads take_rows",
    "rowgrads": "RowGrads",
    "sharded": "ShardedTable",
    "stacks": "CollectionConfig",
    "tables": "as_tables init init_projection",
    "vectors": "combine_rows gather lookup",
}
_HOMES = {name: room for room, names in _TAKEN.items() for name in names.split()}

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
    "compensated_rounding",
    "cross",
    "deeprec",
    "dynamic",
    "export",
    "fitting",
    "gather",
    "global_norm",
    "grow_rows",
    "importing",
    "init",
    "init_projection",
    "initializers",
    "inspection",
    "lookup",
    "planning",
    "reset_rows",
    "row_grads",
    "rowwise_adagrad",
    "stochastic_rounding",
    "sum_grads",
    "take_rows",
    "touched_rows",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    """Loads a name, or a room, on first use."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f"qrhash.{_HOMES[name]}"), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"qrhash.{name}") is not None:
        value = importlib.import_module(f"qrhash.{name}")
    else:
        raise AttributeError(f"module 'qrhash' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "linen", "nnx"})
