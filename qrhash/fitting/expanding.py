"""Any config's tables as a full table, some thousand rows at a time."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qrhash.arithmetic import as_size
from qrhash.config import EmbedConfig
from qrhash.fitting.blocks import ids_of
from qrhash.inspection.blocks import Vectors, num_ids, vector_blocks
from qrhash.operations import Projection
from qrhash.protocol import TableLike
from qrhash.tables import check_parameters
from qrhash.types import Array
from qrhash.vectors import lookup


def expand(
    tables: Sequence[TableLike],
    config: EmbedConfig,
    projection: Projection | Array | None = None,
    *,
    keys: Any = None,
    out: Any = None,
    block_rows: int | None = None,
) -> Any:
    """The full table of any config: the vectors of all ids, on the host.

    `qrhash.all_vectors` gives the same on the device, at once. Here they are looked up block by
    block, and no more than a block is in memory if `out` is a file.

    Args:
      tables: the feature's tables, as from `qrhash.init`.
      config: the feature's `EmbedConfig`.
      projection: for operation "project", as from `qrhash.init_projection`.
      keys: for a family on keys, those whose vectors are wanted, [n].
      out: where to write them: an array of the host [num_embeddings, features], or a memory map, of
        any floats. None: a new array of `config.vector_dtype`.
      block_rows: how many to look up at once; None: 16384.

    Returns:
      `out`, [num_embeddings, features]; for keys [n, features], for operation "features"
      [num_embeddings, k, features]. An id that has no row has what its policy gives, with "raise"
      NaN; the `padding_id` zeros.

    Raises:
      ValueError: an argument breaks its rule; or as `qrhash.lookup`.

    >>> from qrhash.families import QuotientRemainder
    >>> from qrhash.tables import init
    >>> config = EmbedConfig(QuotientRemainder(10, 4), features=8)
    >>> expand(init(jax.random.key(0), config), config).shape
    (10, 8)
    """
    check_parameters(tables, config, projection)
    ids = ids_of(config, keys)
    shape = (num_ids(ids), *config.vector_shape)
    if out is None:
        out = np.empty(shape, config.vector_dtype)
    if isinstance(out, jax.Array) or tuple(getattr(out, "shape", ())) != shape:
        raise ValueError(
            f"out must be an array of the host, or a memory map, of shape {shape}, got "
            f"{type(out).__name__} of shape {getattr(out, 'shape', None)}."
        )
    at_once = None if block_rows is None else as_size("block_rows", block_rows)
    vectors = vectors_of(tables, config, projection)
    for part, block in vector_blocks(vectors, ids, at_once=at_once, dtype=None):
        out[part] = block.reshape(-1, *config.vector_shape)
    return out


def vectors_of(tables: Sequence[TableLike], config: EmbedConfig, projection: Any) -> Vectors:
    """The look-up of ids, or of keys, as a function of them alone."""
    if config.id_policy == "raise":
        config = dataclasses.replace(config, id_policy="nan")
    return functools.partial(lookup, tables, config=config, projection=projection)
