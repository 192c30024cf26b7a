"""The random bits of `jax.random.key`, drawn in one pass.

On a CPU JAX takes the rounds of its generator, Threefry-2x32 (Salmon et al., "Parallel Random
Numbers: As Easy as 1, 2, 3", SC 2011), one by one through memory, which is most of the time that it
takes to create a table. Unrolled, as JAX has them on accelerators, the compiler makes one loop of
them and of what comes behind. Not a bit is another.
"""

import math
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp

from qrhash.types import Key

_JAX = "threefry2x32"
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def unrolled(key: Key) -> Key:
    """The same key for functions of `jax.random`, which then draw the same numbers in one pass.

    It is for our own initializers: `jax.random.poisson` refuses it, and it mixes with no other key.

    Args:
      key: a JAX random key, typed or of uint32. One of another generator, or under JAX's older
        numbering of the bits (`jax_threefry_partitionable=False`), is returned as it is.
    """
    if jax.random.key_impl(key) != _JAX or not jax.config.values["jax_threefry_partitionable"]:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_UNROLLED)


def fold_in(key: Key, number: Any) -> Key:
    """As `jax.random.fold_in`, in one pass."""
    folded = jax.random.fold_in(unrolled(key), number)
    if folded.dtype == key.dtype:
        return folded
    words = jax.random.key_data(folded)
    is_raw = not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    return words if is_raw else jax.random.wrap_key_data(words, impl=_JAX)


def _hash(words: Any, high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Twenty rounds on the words of a counter, by those of a key [2]."""
    schedule = (words[0], words[1], words[0] ^ words[1] ^ jnp.uint32(0x1BD11BDA))
    high, low = high + schedule[0], low + schedule[1]
    for number in range(5):
        for bits in _ROTATIONS[number % 2]:
            high = high + low
            low = high ^ ((low << jnp.uint32(bits)) | (low >> jnp.uint32(32 - bits)))
        high = high + schedule[(number + 1) % 3]
        low = low + schedule[(number + 2) % 3] + jnp.uint32(number + 1)
    return high, low


def _counted(words: Any, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The hashes of the numbers of all places in a shape, of less than 2**32 of them."""
    number = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return _hash(words, jnp.zeros_like(number), number)


def _seed(seed: jax.Array) -> jax.Array:
    return jax.random.key_data(jax.random.key(seed, impl=_JAX))


def _split(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.stack(_counted(words, shape), axis=-1)


def _fold_in(words: jax.Array, number: Any) -> jax.Array:
    number = number.astype(jnp.uint32)
    return jnp.stack(_hash(words, jnp.zeros_like(number), number))


def _random_bits(words: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    if bit_width != 32 or math.prod(shape) >= 2**32:
        key = jax.random.wrap_key_data(words, impl=_JAX)
        return jax.random.bits(key, shape, jnp.dtype(f"uint{bit_width}"))
    high, low = _counted(words, shape)
    return high ^ low


_UNROLLED = jax.extend.random.define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="threefry2x32, unrolled",
    tag="unrolled",
)
