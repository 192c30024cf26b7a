"""How tables start: initializers matched to the operation, drawn into their place.

By default every row is drawn from a key of its own, so that a table starts with the same numbers on
any mesh, and a part of a stack with those that it would have alone. `per_row` makes such an
initializer of any of Flax's.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from qrhash.arithmetic import ceil_div
from qrhash.batches import replicate
from qrhash.config import EmbedConfig
from qrhash.layout import MeshLayout, Shard, owner_and_place
from qrhash.operations import path_of
from qrhash.sharded import ShardedTable
from qrhash.threefry import fold_in, unrolled
from qrhash.tuning import DRAWN_AT_ONCE, FEWEST_DRAWN
from qrhash.types import Initializer, Key, Scalar, wide_dtype


def per_row(initializer: Initializer) -> "PerRow":
    """A Flax initializer that draws every row of a table with the given one, from a key of its own.

    Args:
      initializer: a Flax initializer; it is called for one row [width] at a time.

    >>> from flax import linen as nn
    >>> init = per_row(nn.initializers.normal(0.02))
    >>> init(jax.random.key(0), (10, 8), jnp.float32).shape
    (10, 8)
    """
    return PerRow(initializer)


@dataclasses.dataclass(frozen=True)
class PerRow:
    """See `per_row`.

    Attributes:
      initializer: a Flax initializer of one row.
    """

    initializer: Initializer

    def __call__(self, key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """All rows of a table of this shape."""
        return self.rows(key, jnp.arange(shape[0]), shape[1:], dtype)

    def rows(self, key: Key, index: jax.Array, width: tuple[int, ...], dtype: Any) -> jax.Array:
        """The rows of these numbers."""
        # The steps of a narrow type would shift the mean.
        wide = wide_dtype(dtype)

        def row(number: jax.Array) -> jax.Array:
            return self.initializer(fold_in(key, number), width, wide)

        return jax.vmap(row)(index).astype(dtype)


# What a linear map multiplies a standard deviation by: see `linear_stddev`.
_GAIN = 2

# --- matched to the operation ---------------------------------------------------------------------


def table_initializers(config: EmbedConfig) -> tuple[Initializer, ...]:
    """The initializer of each table: the config's, or the default matched to the operation."""
    initializer = config.embedding_init or per_row(SymmetricUniform(_row_stddev(config)))
    if isinstance(initializer, tuple):
        return initializer
    if config.operation == "path" and config.embedding_init is None:
        return _path_initializers(config, initializer)
    if config.operation != "mult" or config.embedding_init is not None:
        return (initializer,) * config.num_tables
    num_rows = config.partition.num_rows
    largest = num_rows.index(max(num_rows))
    signs = per_row(_signs)
    return tuple(initializer if j == largest else signs for j in range(config.num_tables))


def _path_initializers(config: EmbedConfig, of_rows: Initializer) -> tuple[Initializer, ...]:
    assert config.widths is not None
    first, maps = path_of(config.widths)
    of_maps = {each.table: per_row(_AffineMap(each.num_inputs, each.num_outputs)) for each in maps}
    return tuple(of_rows if j == first else of_maps[j] for j in range(config.num_tables))


def kernel_initializer(config: EmbedConfig) -> Initializer:
    """The initializer of the kernel of operation "project"."""
    return per_row(SymmetricUniform(_kernel_stddev(config)))


def _row_stddev(config: EmbedConfig) -> float:
    """Standard deviation of the tables' entries that gives the vectors `config.stddev`."""
    if config.operation == "add":
        return config.stddev * config.num_tables**-0.5
    if config.operation == "path":
        return config.stddev / _GAIN ** (config.num_tables - 1)
    if config.operation == "project":
        return _project_row_stddev(config)
    return config.stddev


def _project_row_stddev(config: EmbedConfig) -> float:
    """Through the kernel come k rows and, for k > 1, their product: of variances v and v**k."""
    k, width = config.num_tables, config.table_shapes[0][1]
    wanted = (config.stddev / _kernel_stddev(config)) ** 2 / width
    if k == 1:
        return wanted**0.5
    low, high = 0.0, wanted / k
    for _ in range(100):
        variance = (low + high) / 2
        is_enough = k * variance + variance**k >= wanted
        low, high = (low, variance) if is_enough else (variance, high)
    return high**0.5


def _kernel_stddev(config: EmbedConfig) -> float:
    assert config.projection_shape is not None
    return linear_stddev(config.projection_shape[0])


def linear_stddev(num_inputs: int) -> float:
    """Of a linear map: twice one over the root of the number of inputs.

    By measurement, between two that are worse. With half of it, rows learn slowly where Adagrad
    makes steps of one size; with unit entries, a kernel trained by Adam is slow to turn.
    `benchmarks/quality.py` compares them.
    """
    return float(_GAIN * num_inputs**-0.5)


@dataclasses.dataclass(frozen=True)
class SymmetricUniform:
    """The Flax initializer of a uniform distribution around zero."""

    stddev: float

    def __call__(self, key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Entries of this shape."""
        # Rounded once, in the product: with a sum behind it, compilers may round once or twice, and
        # tables would not start with the same bits wherever they are drawn.
        width = float(2 * 3**0.5 * self.stddev)
        return (jax.random.uniform(unrolled(key), shape, dtype) - 0.5) * width


@dataclasses.dataclass(frozen=True)
class _AffineMap:
    """The Flax initializer of maps [inputs + 1, outputs] as flat rows: linear at the start."""

    num_inputs: int
    num_outputs: int

    def __call__(self, key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        lines = SymmetricUniform(linear_stddev(self.num_inputs))(key, shape, dtype)
        is_linear = jnp.arange(shape[-1]) < self.num_inputs * self.num_outputs
        return jnp.where(is_linear, lines, 0)


def _signs(key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The Flax initializer of random signs with some noise, of about unit variance."""
    sign_key, size_key = jax.random.split(unrolled(key))
    # A choice and no product, and steps that are powers of two: nothing is rounded in another way
    # where it is fused, and tables start with the same bits wherever they are drawn.
    steps = jax.random.randint(size_key, shape, -128, 129).astype(dtype)
    size = 1 + steps / 1024  # a standard deviation of 0.073
    return jnp.where(jax.random.bernoulli(sign_key, shape=shape), size, -size)


# --- drawn into place -----------------------------------------------------------------------------


class Draw(NamedTuple):
    """A part of a table yet to be created.

    Attributes:
      key: a JAX random key.
      initializer: a Flax initializer.
      offset: first row of the part.
      num_rows: its number of rows.
    """

    key: Key
    initializer: Initializer
    offset: int
    num_rows: int


def create(
    draws: Sequence[Draw],
    shape: tuple[int, int],
    dtype: Any,
    layout: MeshLayout | None,
    *,
    is_large: bool,
) -> Any:
    """Creates a table [rows, width] part by part in its place.

    On a mesh a large one is a `ShardedTable`, a small one on every device.
    """
    if layout is not None and not is_large:
        return replicate(create(draws, shape, dtype, None, is_large=False), layout)
    num_rows, width = shape
    if layout is not None:
        array = _empty_on_mesh(layout, layout.array_shape(num_rows, width), dtype)
    elif len(draws) == 1 and _is_drawn_in_one_go(draws[0], is_large):
        return draws[0].initializer(draws[0].key, shape, dtype)
    else:
        # Of itself it would not be of the mesh in use, as all else is (since jax 0.11).
        is_explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
        array = jnp.empty(shape, dtype, out_sharding=PartitionSpec() if is_explicit else None)
    for draw in draws:
        # Inside a transformation the array is not ours to donate: jax.vmap makes many of it.
        in_place = not isinstance(draw.key, jax.core.Tracer)
        if isinstance(draw.initializer, PerRow):
            of_shard = ceil_div(draw.num_rows, 1 if layout is None else layout.num_shards)
            at_once = _rows_at_once(of_shard, width)
            array = _jitted(_fill_per_row, in_place=in_place)(array, *draw, layout, at_once)
        else:
            array = _jitted(_fill_at_once, in_place=in_place)(array, *draw, layout)
    return array if layout is None else ShardedTable(array, num_rows, layout)


def _is_drawn_in_one_go(draw: Draw, is_large: bool) -> bool:
    """Inside `jax.jit` also rows of keys of their own: what splits the table then splits the draw.

    Blocks of a table that is split by its rows would make every device gather all of it.
    """
    may_be_split = is_large and isinstance(draw.key, jax.core.Tracer) and jax.device_count() > 1
    return may_be_split or not isinstance(draw.initializer, PerRow)


def _rows_at_once(num_rows: int, width: int) -> int:
    """Rows of a block. A short part is drawn in short ones; each of few lengths is compiled."""
    entries = DRAWN_AT_ONCE
    while entries > max(FEWEST_DRAWN, num_rows * width):
        entries //= 8
    return max(1, entries // width)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_on_mesh(layout: MeshLayout, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    local = (1, shape[1], shape[2] // layout.num_columns)
    return layout.run(lambda: jnp.empty(local, dtype), (), layout.table_spec())()


def _fill_per_row(
    array: jax.Array,
    key: Key,
    initializer: PerRow,
    offset: int,
    num_rows: int,
    layout: MeshLayout | None,
    at_once: int,
) -> jax.Array:
    """Draws block by block: random bits on their way need several times the memory of a table."""

    def fill(
        shard: Shard, array: jax.Array, key: Key, offset: jax.Array, num_rows: jax.Array
    ) -> jax.Array:
        places, width = array.shape
        size = min(places, at_once)
        first, end = _places(offset, num_rows, shard.num_shards)

        def block(number: jax.Array, array: jax.Array) -> jax.Array:
            start = jnp.minimum(first + number * size, places - size)
            index = shard.indices(start + jnp.arange(size)) - offset
            drawn = initializer.rows(key, index, (width * shard.num_columns,), array.dtype)
            drawn = jax.lax.dynamic_slice_in_dim(drawn, shard.column * width, width, axis=1)
            return _put_where((index >= 0) & (index < num_rows), array, drawn, start)

        return jax.lax.fori_loop(0, ceil_div(end - first, size), block, array)

    return _on_mesh(fill, layout)(array, key, jnp.asarray(offset), jnp.asarray(num_rows))


def _fill_at_once(
    array: jax.Array,
    key: Key,
    initializer: Initializer,
    offset: int,
    num_rows: int,
    layout: MeshLayout | None,
) -> jax.Array:
    """Calls an initializer for all the rows that a device has of the part, with its own key."""

    def fill(shard: Shard, array: jax.Array, key: Key) -> jax.Array:
        places, width = array.shape
        first, end = _places(offset, num_rows, shard.num_shards)
        end = min(end, places)
        key = key if shard.num_shards == 1 else jax.random.fold_in(key, shard.number)
        drawn = initializer(key, (end - first, width * shard.num_columns), array.dtype)
        drawn = jax.lax.dynamic_slice_in_dim(drawn, shard.column * width, width, axis=1)
        index = shard.indices(jnp.arange(first, end)) - offset
        return _put_where((index >= 0) & (index < num_rows), array, drawn, first)

    return _on_mesh(fill, layout)(array, key)


def _places(offset: Any, num_rows: Any, num_shards: int) -> tuple[Any, Any]:
    """Between which places a shard has all its rows of a part, and perhaps one of another part."""
    _, first = owner_and_place(offset, num_shards)
    return first, ceil_div(offset + num_rows, num_shards)


@functools.cache
def _jitted(fill: Callable[..., jax.Array], *, in_place: bool) -> Callable[..., jax.Array]:
    of_kind = ["offset", "num_rows"] if fill is _fill_at_once else ["at_once"]
    static = ["initializer", "layout", *of_kind]
    return jax.jit(fill, static_argnames=static, donate_argnums=(0,) * in_place)


def _on_mesh(fill: Callable[..., jax.Array], layout: MeshLayout | None) -> Callable[..., jax.Array]:
    """A function of what a device holds and of its rows [R, width], as one of the whole array."""
    if layout is None:
        return functools.partial(fill, Shard())

    def on_device(array: jax.Array, *others: jax.Array) -> jax.Array:
        return fill(layout.shard(), array[0], *others)[None]

    def on_mesh(array: jax.Array, *others: jax.Array) -> jax.Array:
        spec = layout.table_spec()
        in_specs = (spec, *[PartitionSpec()] * len(others))
        return layout.run(on_device, in_specs, spec)(array, *others)

    return on_mesh


def _put_where(wanted: jax.Array, array: jax.Array, rows: jax.Array, start: Scalar) -> jax.Array:
    """The array [R, width] with these rows [m, width] from `start` on, where wanted [m]."""
    old = jax.lax.dynamic_slice_in_dim(array, start, rows.shape[0], axis=0)
    new = jnp.where(wanted[:, None], rows, old)
    return jax.lax.dynamic_update_slice_in_dim(array, new, start, axis=0)
