"""Row numbers that take no arithmetic.

A gradient that names its rows travels through code that knows nothing of it: tree maps, `psum`,
optimizers. Whoever adds up its row numbers, or scales them, names other rows, and nothing would
look wrong. In the tree they are therefore of a dtype for which JAX refuses every operation, and
whose name says what to do instead.
"""

from typing import Any, NoReturn

import jax
import jax.extend.random
import jax.numpy as jnp


def _no_random_numbers(*_: Any, **__: Any) -> NoReturn:
    raise TypeError("the row numbers of RowGrads are no keys to draw random numbers from.")


def _row_number_type(words: int) -> Any:
    """An opaque dtype of so many 32-bit words: JAX refuses any arithmetic on it, and names it.

    JAX has one kind of opaque dtypes, that of random keys; nothing is ever drawn from these.
    """
    refuse = dict.fromkeys(("seed", "split", "random_bits", "fold_in"), _no_random_numbers)
    return jax.extend.random.define_prng_impl(
        key_shape=(words,),
        **refuse,
        name=f"row numbers of qrhash.RowGrads, {32 * words} bits",
        tag="row numbers of qrhash.RowGrads, whose optimizers go inside qrhash.touched_rows",
    )


_ROW_NUMBERS = {4: _row_number_type(1), 8: _row_number_type(2)}


def as_opaque(indices: jax.Array) -> jax.Array:
    """Row numbers of 32 or 64 bits in the dtype that takes no arithmetic."""
    words = jax.lax.bitcast_convert_type(indices, jnp.uint32)
    words = words[..., None] if indices.dtype.itemsize == 4 else words
    return jax.random.wrap_key_data(words, impl=_ROW_NUMBERS[indices.dtype.itemsize])


def as_integers(opaque: Any) -> Any:
    """The inverse; whatever else stands for an array in a tree is kept as it is."""
    if not jax.dtypes.issubdtype(getattr(opaque, "dtype", None), jax.dtypes.prng_key):
        return opaque
    words = jax.random.key_data(opaque)
    if words.shape[-1] == 1:
        return jax.lax.bitcast_convert_type(words[..., 0], jnp.int32)
    return jax.lax.bitcast_convert_type(words, jnp.int64)
