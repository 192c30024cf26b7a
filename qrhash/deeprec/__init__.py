"""The interface of DeepRec's Multi-Hash and Embedding Variables, for models that are carried over.

`get_multihash_variable` takes DeepRec's arguments in DeepRec's order, and `embedding_lookup`
looks ids up. What it returns is a Flax NNX module, so it trains like any other.

DeepRec's strategy "Q-R" computes id // rows_q and id % rows_r. That gives every id rows of its
own only if rows_q <= rows_r, and only ids below rows_q**2 have a quotient row. Here such sizes
are refused with the ids that collide, unless `allow_collisions=True` asks for them.

DeepRec's ids have 64 bits, JAX's have 32 unless jax_enable_x64 is set. Then the default vocabulary
ends at 2**31; ids beyond it need a `num_embeddings` that says so, and NumPy's integers.

`get_embedding_variable` and its options, such as `CounterFilter`, do the same for tables in which
keys come and go, see `qrhash.dynamic`.
"""

from qrhash.carried_families import DeepRecQuotientRemainder
from qrhash.deeprec.embedding_variable import (
    get_dynamic_dimension_embedding_variable,
    get_embedding_variable,
)
from qrhash.deeprec.interface import AUTO, NONE, get_multihash_variable
from qrhash.deeprec.options import (
    CBFFilter,
    CounterFilter,
    EmbeddingVariableOption,
    GlobalStepEvict,
    InitializerOption,
    L2WeightEvict,
    StorageOption,
    StorageType,
)
from qrhash.deeprec.tiered import TieredEmbeddingVariable
from qrhash.deeprec.variable import (
    DynamicDimensionEmbeddingVariable,
    EmbeddingVariable,
    FrozenTable,
    MultiHashVariable,
    embedding_lookup,
)

__all__ = [
    "AUTO",
    "NONE",
    "CBFFilter",
    "CounterFilter",
    "DeepRecQuotientRemainder",
    "DynamicDimensionEmbeddingVariable",
    "EmbeddingVariable",
    "EmbeddingVariableOption",
    "FrozenTable",
    "GlobalStepEvict",
    "InitializerOption",
    "L2WeightEvict",
    "MultiHashVariable",
    "StorageOption",
    "StorageType",
    "TieredEmbeddingVariable",
    "embedding_lookup",
    "get_dynamic_dimension_embedding_variable",
    "get_embedding_variable",
    "get_multihash_variable",
]
