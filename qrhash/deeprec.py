"""The interface of DeepRec's Multi-Hash Variable, for models that are carried over.

`get_multihash_variable` takes DeepRec's arguments in DeepRec's order, and `embedding_lookup`
looks ids up. What it returns is a Flax NNX module, so it trains like any other.

DeepRec's strategy "Q-R" computes id // rows_q and id % rows_r. That gives every id rows of its
own only if rows_q <= rows_r, and only ids below rows_q**2 have a quotient row. Here such sizes
are refused with the ids that collide, unless `allow_collisions=True` asks for them.

DeepRec's ids have 64 bits, JAX's have 32 unless jax_enable_x64 is set. Then the default vocabulary
ends at 2**31; ids beyond it need a `num_embeddings` that says so, and NumPy's integers.
"""

import dataclasses
import functools
import math
import numbers
import operator
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from qrhash.arithmetic import as_size, ceil_div
from qrhash.config import EmbedConfig, Initializer
from qrhash.nnx import MultiHashEmbed
from qrhash.partitions import DeepRecQuotientRemainder, Partition, QuotientRemainder
from qrhash.tables import table_initializers

AUTO = "VariableSynchronization.AUTO"
NONE = "VariableAggregation.NONE"

_OPERATIONS = {"add": "add", "mult": "mult", "mul": "mult", "concat": "concat"}
_STRATEGIES = ("Q-R", "quotient-remainder")
_MOST_OF_32_BITS = 2**31  # ids from 0 on that an int32 can hold

# Arguments of DeepRec's that mean nothing in JAX: the value that says nothing, and the reason.
_NO_MEANING: dict[str, tuple[Any, str]] = {
    "collections": (None, "JAX has no graph collections; filter variables with flax.nnx filters"),
    "caching_device": (None, "JAX places arrays by sharding; use partitioner"),
    "validate_shape": (True, "JAX arrays always have the shape they are declared with"),
    "use_resource": (None, "JAX has no resource variables"),
    "synchronization": (AUTO, "jax.jit keeps sharded parameters consistent by itself"),
    "aggregation": (NONE, "jax.jit reduces gradients over devices by itself"),
}


class FrozenTable(nnx.Variable):
    """A table made with `trainable=False`: not an `nnx.Param`, so no optimizer sees it."""


class MultiHashVariable(MultiHashEmbed):
    """What `get_multihash_variable` returns: a `qrhash.nnx.MultiHashEmbed` with a name.

    Attributes:
      name: the variable's name.
      config: its `EmbedConfig`.
      regularizer: function of a table, summed by `regularization_loss`; or None.
      constraint: function from a table to the table it may be, used by `apply_constraint`; or
        None.
    """

    def __init__(
        self,
        name: str,
        config: EmbedConfig,
        *,
        regularizer: Callable[[jax.Array], jax.Array] | None = None,
        constraint: Callable[[jax.Array], jax.Array] | None = None,
        trainable: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, rngs=rngs)
        self.name = name
        self.regularizer = regularizer
        self.constraint = constraint
        if not trainable:
            for variable in self._table_names:
                table = getattr(self, variable)
                setattr(self, variable, FrozenTable(table.get_value(), **table.get_metadata()))

    def __call__(self, inputs: chex.Array, *options: Any, **named: Any) -> jax.Array:
        """Looks up the vectors of ids; see `qrhash.nnx.MultiHashEmbed`.

        Raises:
          ValueError: JAX ids of 32 bits for a vocabulary that needs more; or as there.
        """
        n = self.config.num_embeddings
        if isinstance(inputs, jax.Array) and inputs.dtype.itemsize <= 4 and n > _MOST_OF_32_BITS:
            raise ValueError(
                f"ids are {inputs.dtype} JAX integers, but num_embeddings={n} needs 64 bits: give "
                f"get_multihash_variable num_embeddings={_MOST_OF_32_BITS} or less, and dims to "
                "match, pass NumPy ids, or set jax_enable_x64."
            )
        return super().__call__(inputs, *options, **named)

    def regularization_loss(self) -> jax.Array:
        """The regularizer summed over the tables, a scalar to add to the loss; 0 without one."""
        if self.regularizer is None:
            return jnp.zeros(())
        return functools.reduce(operator.add, map(self.regularizer, self.tables))

    def apply_constraint(self) -> None:
        """Replaces each table by its constraint's value; call it after the optimizer's update."""
        if self.constraint is None:
            return
        for variable in self._table_names:
            table = getattr(self, variable)
            table[...] = _checked_shape("constraint", self.constraint(table[...]), table.shape)


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
    custom_getter: Callable[..., chex.Array] | None = None,
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

    >>> var = get_multihash_variable("user", [[100, 16], [100, 16]], operation="mult")
    >>> embedding_lookup(var, jnp.array([[1, 2], [3, 9999]])).shape
    (2, 2, 16)
    """
    given = dict(locals())
    for argument, (silent, reason) in _NO_MEANING.items():
        if given[argument] is not silent and given[argument] != silent:
            raise ValueError(f"{argument}={given[argument]!r} has no meaning here: {reason}.")
    if not isinstance(name, str):
        raise ValueError(f"name must be a string, got {name!r}.")
    for argument in ("regularizer", "constraint", "custom_getter"):
        if given[argument] is not None and not callable(given[argument]):
            raise ValueError(f"{argument} must be a function or None, got {given[argument]!r}.")
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


def embedding_lookup(
    params: MultiHashVariable, ids: chex.Array, max_norm: float | None = None
) -> jax.Array:
    """Looks up the vectors of ids, of any rank.

    Args:
      params: a multi-hash variable.
      ids: integers [*shape].
      max_norm: vectors with a larger Euclidean norm are scaled down to it; None or infinite: none.

    Returns:
      Vectors [*shape, features].

    Raises:
      ValueError: `params` is no multi-hash variable, `max_norm` is no positive number, JAX ids
        have too few bits for the vocabulary, or an id breaks the variable's policy.
    """
    if not isinstance(params, MultiHashVariable):
        raise ValueError(
            f"params must be what get_multihash_variable returns, got {type(params).__name__}."
        )
    limit = math.inf if max_norm is None else _positive("max_norm", max_norm)
    vectors = params(ids)
    return vectors if limit == math.inf else _scaled_down(vectors, limit)


def _positive(name: str, value: Any) -> float:
    """A number above zero, infinity included, as a Python float."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
    if not is_number and isinstance(value, (np.ndarray, jax.Array)) and value.ndim == 0:
        is_number = not isinstance(value, jax.core.Tracer) and value.dtype.kind in "iuf"
    if not is_number or not float(value) > 0:
        raise ValueError(f"{name} must be a positive number or None, got {value!r}.")
    return float(value)


def _scaled_down(vectors: jax.Array, max_norm: float) -> jax.Array:
    """Vectors [*shape, features], of a norm of at most `max_norm`."""
    wide = vectors.astype(jnp.float32) if vectors.dtype.itemsize < 4 else vectors
    limit = min(max_norm, float(jnp.finfo(wide.dtype).max))
    # In units of the largest entry no square leaves the range of floats.
    fixed = jax.lax.stop_gradient(wide)
    unit = jnp.max(jnp.abs(fixed), axis=-1, keepdims=True)
    unit = jnp.where(unit > 0, unit, 1)
    squared = jnp.sum((fixed / unit) ** 2, axis=-1, keepdims=True)
    is_longer = squared > (limit / unit) ** 2
    # Other vectors are left alone: the gradient of a norm of zero is infinite.
    part = wide / jnp.where(is_longer, unit, 1)
    squared = jnp.where(is_longer, jnp.sum(part**2, axis=-1, keepdims=True), 1)
    scaled = part * jax.lax.rsqrt(squared) * jnp.where(is_longer, limit, 1)
    return jnp.where(is_longer, scaled, wide).astype(vectors.dtype)


def _checked_shape(name: str, array: Any, shape: tuple[int, ...]) -> Any:
    if jnp.shape(array) != tuple(shape):
        raise ValueError(
            f"{name} must return a table of shape {tuple(shape)}, got {jnp.shape(array)}."
        )
    return array


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
    n = quotients**2 if widest == 8 else min(quotients**2, _MOST_OF_32_BITS)
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
    custom_getter: Callable[..., chex.Array], name: str, trainable: bool, config: EmbedConfig
) -> EmbedConfig:
    """The config with initializers that ask the custom getter for each table."""

    def through(table: int, initializer: Initializer) -> Initializer:
        def init(key: chex.PRNGKey, shape: tuple[int, ...], dtype: Any) -> jax.Array:
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
            return jnp.asarray(_checked_shape("custom_getter", array, shape), dtype)

        return init

    inits = (through(j, init) for j, init in enumerate(table_initializers(config)))
    return dataclasses.replace(config, embedding_init=tuple(inits), init_stddev=None)
