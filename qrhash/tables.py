"""A feature's tables: created, taken over from elsewhere, checked.

They are a tuple of arrays [rows_j, width_j], or of `qrhash.protocol.Table`s of these shapes; the
dense parameters of operation "project" stay apart from them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qrhash.config import EmbedConfig, check_config
from qrhash.initializers import Draw, create, kernel_initializer, table_initializers
from qrhash.kinds import put_table, whole_table
from qrhash.operations import Projection
from qrhash.types import Array, Key


def init(key: Key, config: EmbedConfig) -> tuple[Any, ...]:
    """Creates a feature's tables.

    By default entries are uniform and symmetric around zero, with the variance per operation that
    gives an entry of the *vector* the variance `config.stddev**2`, as a full table's would have.
    For "mult" the largest table starts as a full table would, the others as random signs with some
    noise: a row then learns as fast as a full table's from the first step, where with factors of
    equal size each would be held back by the smallness of the other. Every row is drawn from a key
    of its own: the numbers are the same on any mesh.

    Args:
      key: a JAX random key.
      config: the feature's `EmbedConfig`.

    Returns:
      k arrays [rows_j, width_j] of `config.param_dtype`; with `config.layout`, large tables are
      `ShardedTable`s of these shapes, each shard created on its device.
    """
    check_config(config)
    keys = jax.random.split(key, config.num_tables)
    return tuple(init_table(keys[j], config, j) for j in range(config.num_tables))


def init_table(key: Key, config: EmbedConfig, table: int) -> Any:
    """Creates one of a feature's tables, given its number; see `init`."""
    draw = Draw(key, table_initializers(config)[table], 0, config.partition.num_rows[table])
    shape, is_large = config.table_shapes[table], config.large_tables[table]
    return create([draw], shape, config.param_dtype, config.layout, is_large=is_large)


def init_projection(key: Key, config: EmbedConfig) -> Projection | None:
    """Creates the dense parameters of operation "project"; None for the other operations.

    Args:
      key: a JAX random key; may be the one given to `init`.
      config: the feature's `EmbedConfig`.

    Returns:
      A `Projection` of a kernel [num_inputs, features], and a bias [features] of zeros if
      `config.use_bias`, both of `config.param_dtype`.
    """
    check_config(config)
    if config.projection_shape is None:
        return None
    key = jax.random.fold_in(key, config.num_tables)
    kernel = kernel_initializer(config)(key, config.projection_shape, config.param_dtype)
    bias = jnp.zeros((config.features,), config.param_dtype) if config.use_bias else None
    return Projection(kernel, bias)


def as_tables(arrays: Sequence[Array], config: EmbedConfig) -> tuple[Any, ...]:
    """A feature's tables made of given arrays, such as pre-trained ones, in place of `init`.

    Args:
      arrays: k arrays [rows_j, width_j] of `config.param_dtype`, NumPy or JAX; NumPy's float64
        counts as what JAX makes of it. For a `FullTable`, the one array [num_embeddings, features].
      config: the feature's `EmbedConfig`.

    Returns:
      k arrays, as from `init`: with `config.layout` in their places on the mesh.

    Raises:
      ValueError: another number of arrays, or another shape or dtype than the config's.

    >>> from qrhash.families import FullTable
    >>> config = EmbedConfig(FullTable(10), features=2)
    >>> (table,) = as_tables([np.ones((10, 2))], config)
    >>> table.shape, table.dtype
    ((10, 2), dtype('float32'))
    """
    check_config(config)
    check_shapes(arrays, config)
    return tuple(_as_table(array, config, j) for j, array in enumerate(arrays))


def _as_table(array: Any, config: EmbedConfig, table: int) -> Any:
    check_dtype(f"tables[{table}]", array, config.param_dtype)
    array = whole_table(array)
    if isinstance(array, np.ndarray):
        array = array.astype(config.param_dtype, copy=False)
    return put_table(array, config.layout, is_large=config.large_tables[table])


def check_dtype(name: str, array: Any, dtype: np.dtype) -> None:
    """Raises a ValueError unless an array has the dtype, as JAX counts it."""
    got = getattr(array, "dtype", None)
    if got is None or jax.dtypes.canonicalize_dtype(got) != dtype:
        raise ValueError(
            f"{name} must be of {dtype}, as param_dtype says, got {got}: cast it first."
        )


def check_parameters(tables: Sequence[Any], config: EmbedConfig, projection: Any) -> None:
    """Raises a ValueError unless tables and projection have the shapes that the config gives."""
    check_config(config)
    config.check_projection(projection)
    check_shapes(tables, config)


def check_shapes(tables: Any, config: EmbedConfig) -> None:
    """Raises a ValueError unless the tables have the shapes that the config gives."""
    single = hasattr(tables, "shape")
    if not single and not isinstance(tables, Sequence):
        raise ValueError(
            f"tables must be a tuple of {config.num_tables} arrays, got {type(tables)}."
        )
    shapes = tables.shape if single else tuple(getattr(each, "shape", None) for each in tables)
    if single or shapes != config.table_shapes:
        raise ValueError(
            f"tables must be {config.num_tables}, of shapes {config.table_shapes}, as init gives "
            f"them for {config.partition}, got {'one array of shape ' * single}{shapes}."
        )
