"""`get_multihash_variable`: DeepRec's arguments, in DeepRec's order."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from qrhash.arithmetic import as_size, ceil_div
from qrhash.carried_families import DeepRecQuotientRemainder
from qrhash.config import EmbedConfig
from qrhash.deeprec.options import NoMeaning, refuse
from qrhash.deeprec.variable import MOST_OF_32_BITS, MultiHashVariable, checked_shape
from qrhash.families import QuotientRemainder
from qrhash.initializers import table_initializers
from qrhash.partitions import Partition
from qrhash.types import Array, Initializer, Key

AUTO = "VariableSynchronization.AUTO"
NONE = "VariableAggregation.NONE"

_OPERATIONS = {"add": "add", "mult": "mult", "mul": "mult", "concat": "concat"}
_STRATEGIES = ("Q-R", "quotient-remainder")

_NO_MEANING: NoMeaning = {
    "collections": (None, "JAX has no graph collections; filter variables with flax.nnx filters"),
    "caching_device": (None, "JAX places arrays by sharding; use partitioner"),
    "validate_shape": (True, "JAX arrays always have the shape they are declared with"),
    "use_resource": (None, "JAX has no resource variables"),
    "synchronization": (AUTO, "jax.jit keeps sharded parameters consistent by itself"),
    "aggregation": (NONE, "jax.jit reduces gradients over devices by itself"),
}


def get_multihash_variable(
    name: str,
    dims: Sequence[Sequence[int]],
    num_of_partitions: int = 2,
    complementary_strategy: str = "Q-R",
    operation: str = "add",
    dtype: Any = float,
    initializer: Initializer | Sequence[Initializer] | None = None,
    regularizer: Callable[[jax.Array], jax.Array] | None = None,
    trainable: bool | None = None,
    collections: Any = None,
    caching_device: Any = None,
    partitioner: PartitionSpec | tuple[str | None, str | None] | None = None,
    validate_shape: bool = True,
    use_resource: Any = None,
    custom_getter: Callable[..., Array] | None = None,
    constraint: Callable[[jax.Array], jax.Array] | None = None,
    synchronization: Any = AUTO,
    aggregation: Any = NONE,
    *,
    num_embeddings: int | None = None,
    allow_collisions: bool = False,
    id_policy: str = "nan",
    rngs: nnx.Rngs | None = None,
) -> MultiHashVariable:
    """Makes a multi-hash variable with DeepRec's arguments, in DeepRec's order.

    Args:
      name: the variable's name.
      dims: shapes of the tables, [[rows_q, width_q], [rows_r, width_r]]. "add" and "mult" take
        equal widths; the widths of "concat" sum to the vector's.
      num_of_partitions: number of tables: 2.
      complementary_strategy: "Q-R", DeepRec's own arithmetic id // rows_q and id % rows_r; or
        "quotient-remainder", id // rows_r and id % rows_r, in which no sizes collide.
      operation: "add", "mult" (also "mul") or "concat".
      dtype: dtype of the tables; `float` is float32.
      initializer: a Flax initializer (key, shape, dtype), or one per table. Default: matched to
        the operation, see `qrhash.init`.
      regularizer: function of a table; `regularization_loss()` sums it over the tables.
      trainable: False makes the tables variables that `nnx.Param` filters leave out.
      collections: no meaning in JAX; refused.
      caching_device: no meaning in JAX; refused.
      partitioner: logical or mesh axis names of the tables' (rows, features), as a
        `PartitionSpec` or a pair: the variables' sharding metadata, of small tables too.
      validate_shape: no meaning in JAX; False is refused.
      use_resource: no meaning in JAX; refused.
      custom_getter: called for each table as custom_getter(getter, name=, shape=, dtype=,
        initializer=, trainable=) and returns the table's array; getter, given those arguments,
        makes the ordinary one.
      constraint: function from a table to the table it may be; `apply_constraint()` applies it.
      synchronization: no meaning in JAX; refused.
      aggregation: no meaning in JAX; refused.
      num_embeddings: size of the vocabulary. Default: all ids with rows of their own: rows_q**2,
        but at most 2**31 unless jax_enable_x64 is set, for JAX's ids end there; or
        rows_q * rows_r for "quotient-remainder".
      allow_collisions: accepts sizes with which ids collide or have no row.
      id_policy: what other ids give, see `qrhash.EmbedConfig`.
      rngs: random number generators. Default: seeded with the name.

    Returns:
      A `MultiHashVariable`.

    Raises:
      ValueError: an argument that breaks its rule or has no meaning in JAX, or sizes whose ids
        collide or run out of range.

    Source: DeepRec, "Multi-Hash Variable".

    >>> from qrhash.deeprec import embedding_lookup
    >>> var = get_multihash_variable("user", [[100, 16], [100, 16]], operation="mult")
    >>> embedding_lookup(var, jnp.array([[1, 2], [3, 9999]])).shape
    (2, 2, 16)
    """
    refuse(
        _NO_MEANING,
        collections=collections,
        caching_device=caching_device,
        validate_shape=validate_shape,
        use_resource=use_resource,
        synchronization=synchronization,
        aggregation=aggregation,
    )
    if not isinstance(name, str):
        raise ValueError(f"name must be a string, got {name!r}.")
    _check_functions(regularizer=regularizer, constraint=constraint, custom_getter=custom_getter)
    if trainable not in (None, True, False):
        raise ValueError(f"trainable must be True, False or None, got {trainable!r}.")
    if rngs is not None and not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"rngs must be an nnx.Rngs or None, got {rngs!r}.")
    if operation not in _OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(_OPERATIONS)}, got {operation!r}.")
    rows, widths = _checked_dims(dims, num_of_partitions)
    if operation != "concat" and widths[0] != widths[1]:
        raise ValueError(f"dims must have equal widths for {operation!r}, got {dims!r}.")
    if isinstance(initializer, Sequence) and len(initializer) != num_of_partitions:
        raise ValueError(f"initializer must be one or one per table, got {len(initializer)}.")
    partition = _partition(complementary_strategy, rows, num_embeddings, allow_collisions)
    trainable = True if trainable is None else trainable
    config = EmbedConfig(
        partition,
        sum(widths) if operation == "concat" else widths[0],
        _OPERATIONS[operation],
        widths=widths,
        id_policy=id_policy,
        param_dtype=jnp.float32 if dtype is float else dtype,
        embedding_init=tuple(initializer) if isinstance(initializer, Sequence) else initializer,
        logical_axes=_axes(partitioner),
        large_table_rows=EmbedConfig.large_table_rows if partitioner is None else 1,
    )
    if custom_getter is not None:
        config = _through_getter(custom_getter, name, trainable, config)
    return MultiHashVariable(
        name,
        config,
        regularizer=regularizer,
        constraint=constraint,
        trainable=trainable,
        rngs=nnx.Rngs(zlib.crc32(name.encode())) if rngs is None else rngs,
    )


def _check_functions(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and not callable(value):
            raise ValueError(f"{name} must be a function or None, got {value!r}.")


def _checked_dims(
    dims: Sequence[Sequence[int]], num_of_partitions: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows and widths of the two tables."""
    if num_of_partitions != 2:
        raise ValueError(f"num_of_partitions must be 2, got {num_of_partitions!r}.")
    try:
        shapes = [(rows, width) for rows, width in dims]
    except (TypeError, ValueError):
        shapes = []
    if len(shapes) != num_of_partitions:
        raise ValueError(
            f"dims must be [[rows_q, width_q], [rows_r, width_r]] for num_of_partitions=2, "
            f"got {dims!r}."
        )
    rows = tuple(as_size(f"dims[{j}][0]", shape[0]) for j, shape in enumerate(shapes))
    widths = tuple(as_size(f"dims[{j}][1]", shape[1]) for j, shape in enumerate(shapes))
    return rows, widths


def _partition(
    strategy: str, rows: tuple[int, ...], num_embeddings: int | None, allow_collisions: bool
) -> Partition:
    quotients, remainders = rows
    if strategy not in _STRATEGIES:
        raise ValueError(
            f"complementary_strategy must be one of {', '.join(_STRATEGIES)}, got {strategy!r}."
        )
    if strategy == "quotient-remainder":
        n = quotients * remainders if num_embeddings is None else num_embeddings
        n = as_size("num_embeddings", n)
        if ceil_div(n, remainders) != quotients:
            raise ValueError(
                f"num_embeddings must lie in ({(quotients - 1) * remainders}, "
                f"{quotients * remainders}] for a quotient table of {quotients} rows and a "
                f"remainder table of {remainders}, got {n}."
            )
        return QuotientRemainder(n, remainders)
    widest = jax.dtypes.canonicalize_dtype(np.int64).itemsize  # bytes of JAX's widest ids
    n = quotients**2 if widest == 8 else min(quotients**2, MOST_OF_32_BITS)
    n = n if num_embeddings is None else as_size("num_embeddings", num_embeddings)
    partition = DeepRecQuotientRemainder(n, quotients, remainders)
    if not partition.is_complementary and not allow_collisions:
        raise ValueError(
            f"dims: DeepRec's Q-R arithmetic, id // {quotients} and id % {remainders}, "
            f"{_faults(partition)}. Use complementary_strategy='quotient-remainder', which gives "
            f"all ids below {quotients * remainders} rows of their own, or allow_collisions=True "
            "to reproduce DeepRec."
        )
    return partition


def _faults(partition: DeepRecQuotientRemainder) -> str:
    """Which ids collide, and which have no row."""
    n, (quotients, remainders) = partition.num_embeddings, partition.num_rows
    faults = []
    if remainders < min(quotients, n):
        faults.append(
            f"gives ids 0 and {remainders} the same rows, and so all ids {remainders} apart "
            f"within a block of {quotients}"
        )
    if n > quotients**2:
        faults.append(f"has no quotient row for ids {quotients**2} to {n - 1}")
    return " and ".join(faults)


def _axes(
    partitioner: PartitionSpec | tuple[str | None, str | None] | None,
) -> tuple[str | None, str | None] | None:
    if partitioner is None:
        return EmbedConfig.logical_axes
    if not isinstance(partitioner, (PartitionSpec, tuple, list)) or len(partitioner) > 2:
        raise ValueError(
            "partitioner must be a PartitionSpec or a pair of axis names for a table's rows and "
            f"features, got {partitioner!r}."
        )
    rows, features = (*partitioner, None, None)[:2]
    return rows, features


def _through_getter(
    custom_getter: Callable[..., Array], name: str, trainable: bool, config: EmbedConfig
) -> EmbedConfig:
    """The config with initializers that ask the custom getter for each table."""

    def through(table: int, initializer: Initializer) -> Initializer:
        def init(key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            def getter(*, shape: Any, dtype: Any, initializer: Any, **_: Any) -> jax.Array:
                return initializer(key, shape, dtype)

            array = custom_getter(
                getter,
                name=f"{name}/table_{table}",
                shape=shape,
                dtype=dtype,
                initializer=initializer,
                trainable=trainable,
            )
            return jnp.asarray(checked_shape("custom_getter", array, shape), dtype)

        return init

    inits = (through(j, init) for j, init in enumerate(table_initializers(config)))
    return dataclasses.replace(config, embedding_init=tuple(inits), init_stddev=None)
