"""`get_embedding_variable`: DeepRec's arguments, in DeepRec's order, of a table that grows.

And `get_dynamic_dimension_embedding_variable`: several of them, side by side.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qrhash.arithmetic import as_size
from qrhash.config import EmbedConfig
from qrhash.deeprec.options import EmbeddingVariableOption, NoMeaning, StorageOption, refuse
from qrhash.deeprec.tiered import TieredEmbeddingVariable
from qrhash.deeprec.variable import DynamicDimensionEmbeddingVariable, EmbeddingVariable
from qrhash.dynamic import AdmitAll, DynamicConfig, SmallNorm
from qrhash.layout import MeshLayout
from qrhash.types import Initializer

_BY_ROWS = "rows are trained as they are met; add a penalty on the vectors looked up to the loss"

_NO_MEANING: NoMeaning = {
    "regularizer": (None, _BY_ROWS),
    "collections": (None, "JAX has no graph collections; filter variables with flax.nnx filters"),
    "caching_device": (None, "JAX places arrays by sharding; use partitioner"),
    "validate_shape": (True, "JAX arrays always have the shape they are declared with"),
    "custom_getter": (None, "rows are made one by one, as keys come; use initializer"),
    "constraint": (None, _BY_ROWS),
    "init_data_source": (None, "qrhash.checkpoint restores"),
}

_OPTION = EmbeddingVariableOption()


def get_embedding_variable(
    name: str,
    embedding_dim: int,
    key_dtype: Any = np.int64,
    value_dtype: Any = None,
    initializer: Initializer | None = None,
    regularizer: Any = None,
    trainable: bool = True,
    collections: Any = None,
    caching_device: Any = None,
    partitioner: MeshLayout | None = None,
    validate_shape: bool = True,
    custom_getter: Any = None,
    constraint: Any = None,
    init_data_source: Any = None,
    ev_option: EmbeddingVariableOption = _OPTION,
    *,
    capacity: int,
    refused: EmbedConfig | None = None,
    rngs: nnx.Rngs | None = None,
) -> EmbeddingVariable:
    """Makes an embedding variable with DeepRec's arguments, in DeepRec's order.

    Args:
      name: the variable's name. New rows are drawn by the hashes of their key and of it.
      embedding_dim: width of the vectors.
      key_dtype: int64, int32 or `str`. Any key is one, DeepRec's invalid keys too.
      value_dtype: dtype of the rows; None or `float`: float32.
      initializer: a Flax initializer of one row (key, shape, dtype); `init_option` may have it too.
        Default: that of `qrhash.dynamic.DynamicConfig`. DeepRec's is a truncated normal.
      regularizer: no meaning here; refused.
      trainable: False makes the tables variables that `nnx.Param` filters leave out.
      collections: no meaning in JAX; refused.
      caching_device: no meaning in JAX; refused.
      partitioner: a `qrhash.MeshLayout`, by which the rows are split over a mesh; None: they are
        not.
      validate_shape: no meaning in JAX; False is refused.
      custom_getter: no meaning here; refused.
      constraint: no meaning here; refused.
      init_data_source: no meaning here; refused.
      ev_option: an `EmbeddingVariableOption`.
      capacity: how many keys can have a row; DeepRec's variables take memory as they grow.
      refused: the config of the compressed vectors of keys without a row, with which new rows
        start; DeepRec's `categorical_column_with_adaptive_embedding`. None: these have
        `default_value_no_permission` in every entry.
      rngs: random number generators. Default: seeded with the name.

    Returns:
      An `EmbeddingVariable`; with a storage of several tiers a `TieredEmbeddingVariable`.

    Raises:
      ValueError: an argument that breaks its rule or has no meaning here.

    Source: DeepRec, "Embedding Variable".

    >>> from qrhash.deeprec import CounterFilter, embedding_lookup
    >>> option = EmbeddingVariableOption(filter_option=CounterFilter(filter_freq=2))
    >>> var = get_embedding_variable("user", 16, ev_option=option, capacity=1000)
    >>> found = var.assign([7, 8, 7], step=0)
    >>> embedding_lookup(var, found).shape, (embedding_lookup(var, [8]) == 0).all().item()
    ((3, 16), True)
    """
    refuse(
        _NO_MEANING,
        regularizer=regularizer,
        collections=collections,
        caching_device=caching_device,
        validate_shape=validate_shape,
        custom_getter=custom_getter,
        constraint=constraint,
        init_data_source=init_data_source,
    )
    if not isinstance(name, str):
        raise ValueError(f"name must be a string, got {name!r}.")
    if not isinstance(ev_option, EmbeddingVariableOption):
        raise ValueError(f"ev_option must be an EmbeddingVariableOption, got {ev_option!r}.")
    if trainable not in (True, False):
        raise ValueError(f"trainable must be True or False, got {trainable!r}.")
    if partitioner is not None and not isinstance(partitioner, MeshLayout):
        raise ValueError(f"partitioner must be a qrhash.MeshLayout or None, got {partitioner!r}.")
    _check_key_dtype(key_dtype)
    of_rows, evicting = ev_option.init_option, ev_option.evict_option
    filtering = ev_option.filter_option
    if initializer is not None and of_rows.initializer is not None:
        raise ValueError("initializer must be given once: as an argument, or in init_option.")
    seed = zlib.crc32(name.encode())
    config = DynamicConfig(
        capacity,
        embedding_dim,
        admission=AdmitAll() if filtering is None else filtering.admission(capacity),
        eviction=None if evicting is None else evicting.eviction(),
        refused=refused,
        refused_value=of_rows.default_value_no_permission,
        embedding_init=of_rows.initializer if initializer is None else initializer,
        seed=seed,
        param_dtype=jnp.float32 if value_dtype in (None, float) else value_dtype,
        layout=partitioner,
    )
    rngs = nnx.Rngs(seed) if rngs is None else rngs
    storage = ev_option.storage_option
    if not storage.is_tiered:
        return EmbeddingVariable(name, config, trainable=trainable, rngs=rngs)
    _check_in_tiers(storage, config, trainable)
    return TieredEmbeddingVariable(name, config, storage, rngs=rngs)


def get_dynamic_dimension_embedding_variable(
    name: str, embedding_block_dimension: int, embedding_block_num: int, **arguments: Any
) -> DynamicDimensionEmbeddingVariable:
    """Makes a variable whose frequent keys have wide vectors, and whose rare ones narrow ones.

    It is an embedding variable for each block of the width. How many blocks a key has is said by
    the caller with the keys, as in DeepRec; memory is taken for the blocks' capacities.

    Args:
      name: the variable's name.
      embedding_block_dimension: width of a block.
      embedding_block_num: how many blocks there are.
      **arguments: the others of `get_embedding_variable`, for each block; `capacity` may also be a
        sequence, of a number for each.

    Returns:
      A `DynamicDimensionEmbeddingVariable`.

    Raises:
      ValueError: as `get_embedding_variable`; not one capacity for each block; or a storage of
        several tiers.

    Source: DeepRec, "Dynamic-dimension Embedding Variable".

    >>> from qrhash.deeprec import embedding_lookup
    >>> var = get_dynamic_dimension_embedding_variable("item", 4, 3, capacity=(100, 30, 10))
    >>> vectors = embedding_lookup(var, var.assign([7, 8], np.array([3, 1]), step=0))
    >>> (vectors != 0).sum(axis=1).tolist()
    [12, 4]
    """
    num_blocks = as_size("embedding_block_num", embedding_block_num)
    capacity = arguments.pop("capacity", None)
    of_blocks = capacity if isinstance(capacity, Sequence) else [capacity] * num_blocks
    if len(of_blocks) != num_blocks:
        raise ValueError(
            f"capacity must be a number, or one for each of {num_blocks} blocks, got {capacity!r}."
        )
    option = arguments.get("ev_option")
    if isinstance(option, EmbeddingVariableOption) and option.storage_option.is_tiered:
        raise ValueError(
            "storage_type must be None, StorageType.DRAM or StorageType.HBM for a variable of "
            f"dynamic dimension, got {option.storage_option.storage_type}: rows of its blocks are "
            "not brought to the device batch by batch."
        )
    blocks = [
        get_embedding_variable(
            f"{name}/block_{number}", embedding_block_dimension, capacity=rows, **arguments
        )
        for number, rows in enumerate(of_blocks)
    ]
    return DynamicDimensionEmbeddingVariable(name, blocks)


def _check_in_tiers(storage: StorageOption, config: DynamicConfig, trainable: bool) -> None:
    """Raises a ValueError for what a variable whose rows are in a store cannot have."""
    kind = storage.storage_type
    if not trainable:
        raise ValueError(
            f"trainable must be True with {kind}: rows are brought to the device together with the "
            "optimizer's state of them."
        )
    if config.layout is not None:
        raise ValueError(
            f"partitioner must be None with {kind}: a table in tiers is on one device."
        )
    if isinstance(config.eviction, SmallNorm):
        raise ValueError(
            f"evict_option must be a GlobalStepEvict or None with {kind}: an L2WeightEvict goes by "
            "the values of the rows, most of which are in the store."
        )


def _check_key_dtype(key_dtype: Any) -> None:
    if key_dtype is str or key_dtype == "string":
        return
    try:
        is_key = np.dtype(key_dtype) in (np.int64, np.int32)
    except TypeError:
        is_key = False
    if not is_key:
        raise ValueError(f"key_dtype must be int64, int32 or str, got {key_dtype!r}.")
