"""64-bit keys without 64-bit integers: two words of 32 bits, and a bijection that scrambles them.

What names a thing in real data is a hash or a number of 64 bits, and JAX cuts integers to 32 unless
jax_enable_x64 is set. `Keys` are two arrays of uint32, made on the host. The same lines compute on
NumPy and on JAX, bit for bit; JAX itself is not needed here (`qrhash.keys` makes it know them).

`scramble` is a Feistel network of four rounds: a bijection for every seed, after which all bits of
keys in any pattern (counters, multiples, addresses) look alike. So digits of the scrambled key are
row numbers (`qrhash.key_families`) without a vocabulary.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from qrhash.strings import as_array, hash_strings, is_arrow, is_text, missing

_ROUNDS = (0x9E3779B9, 0x7F4A7C15, 0xF39CC060, 0x5CEDC834)
_WORD = 2**32


@dataclasses.dataclass(frozen=True, eq=False)
class Keys:
    """Keys of 64 bits [*shape].

    Attributes:
      hi: the upper words, uint32 [*shape], of NumPy or JAX.
      lo: the lower words.

    >>> keys = Keys.of(np.array([5, -1, 2**40]))
    >>> keys.hi.tolist(), keys.lo.tolist(), keys.to_numpy().tolist()
    ([0, 4294967295, 256], [5, 4294967295, 0], [5, 18446744073709551615, 1099511627776])
    """

    hi: Any
    lo: Any

    @classmethod
    def of(cls, values: Any) -> "Keys":
        """Keys of integers of any width, or of text.

        Negative integers count as the same 64 bits without a sign: -1 is 2**64 - 1. Text becomes
        its XXH64, see `qrhash.strings.hash_strings`.

        Args:
          values: `Keys`; integers, or strings or bytes, [*shape] of the host: NumPy's, Python's, or
            a column of Arrow or pandas; or a JAX array of integers, which holds no more than 32
            bits unless jax_enable_x64 is set.

        Raises:
          ValueError: they are neither integers nor text, have more than 64 bits, or one is missing.
        """
        if isinstance(values, Keys):
            return values
        if hasattr(values, "__array_namespace__") and not isinstance(
            values, (np.ndarray, np.generic)
        ):
            return cls._of_device(values)
        bits = hash_strings(values) if is_text(values) else _as_bits(values)
        return cls((bits >> np.uint64(32)).astype(np.uint32), bits.astype(np.uint32))

    @classmethod
    def _of_device(cls, values: Any) -> "Keys":
        if values.dtype.kind not in "iu":
            raise ValueError(f"keys must be integers, got a JAX array of {values.dtype}.")
        if values.dtype.itemsize == 8:
            bits = values.astype(np.uint64)
            return cls((bits >> np.uint64(32)).astype(np.uint32), bits.astype(np.uint32))
        low = values.astype(np.int32 if values.dtype.kind == "i" else np.uint32)
        sign = (values < 0).astype(np.uint32) * np.uint32(_WORD - 1)
        return cls(sign, low.astype(np.uint32))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the keys."""
        return self.lo.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.lo.ndim

    @property
    def size(self) -> int:
        """Number of keys."""
        return self.lo.size

    def __len__(self) -> int:
        return len(self.lo)

    def __getitem__(self, index: Any) -> "Keys":
        return Keys(self.hi[index], self.lo[index])

    def reshape(self, *shape: Any) -> "Keys":
        """The same keys in another shape."""
        return Keys(self.hi.reshape(*shape), self.lo.reshape(*shape))

    def __eq__(self, other: Any) -> Any:
        """Key by key, as arrays compare: of keys, or of an integer."""
        other = Keys.of(other)
        return (self.hi == other.hi) & (self.lo == other.lo)

    __hash__ = None  # type: ignore[assignment]

    def to_numpy(self) -> np.ndarray:
        """The keys as uint64 of the host."""
        hi, lo = (np.asarray(word).astype(np.uint64) for word in (self.hi, self.lo))
        return hi << np.uint64(32) | lo


def _as_bits(values: Any) -> np.ndarray:
    """Integers of the host as the same 64 bits without a sign."""
    if is_arrow(values) and values.null_count:
        raise missing(int(np.flatnonzero(np.asarray(values.is_null()))[0]), None)
    array = as_array(values)
    if array.dtype.kind == "f" and not isinstance(values, np.ndarray):
        array = as_array(values, object)  # which NumPy makes floats of, if some need 64 bits
    if not array.size:
        return np.zeros(array.shape, np.uint64)  # NumPy makes floats of an empty list
    if array.dtype.kind == "i":
        return array.astype(np.int64).view(np.uint64)
    if array.dtype.kind == "u":
        return array.astype(np.uint64)
    if array.dtype.kind in "UST":
        raise ValueError("keys must be all integers or all text, got both.")
    if array.dtype.kind != "O":
        raise ValueError(f"keys must be integers or text, got an array of {array.dtype}.")
    if not all(isinstance(each, (int, np.integer)) for each in array.flat):
        return hash_strings(array)
    wide = next((each for each in array.flat if not -(2**63) <= each < 2**64), None)
    if wide is not None:
        raise ValueError(f"keys must have at most 64 bits, from -2**63 to 2**64 - 1, got {wide}.")
    bits = [int(each) % 2**64 for each in array.flat]
    return np.array(bits, np.uint64).reshape(array.shape)


def scramble(keys: Keys, seed: int = 0) -> Keys:
    """A bijection of 64 bits, another one for each seed.

    Args:
      keys: `Keys` [*shape], of NumPy or JAX.
      seed: an integer in [0, 2**32).

    Returns:
      `Keys` [*shape], of the host for keys of the host.

    Source: Luby and Rackoff 1988 (four Feistel rounds); the round function is MurmurHash3's
    finalizer.

    >>> scramble(Keys.of([0, 1, 2])).to_numpy().tolist()
    [12631321989986513636, 6606002205257027019, 13919194442636417706]
    """
    hi, lo = keys.hi, keys.lo
    with np.errstate(over="ignore"):
        for key in _round_keys(seed):
            hi, lo = lo, hi ^ mixed(lo + key)
    return Keys(hi, lo)


def unscramble(keys: Keys, seed: int = 0) -> Keys:
    """The inverse of `scramble`."""
    hi, lo = keys.hi, keys.lo
    with np.errstate(over="ignore"):
        for key in reversed(_round_keys(seed)):
            hi, lo = lo ^ mixed(hi + key), hi
    return Keys(hi, lo)


def cross(*features: Any, seed: int = 0) -> Keys:
    """Keys of several features at once, such as user x hour: keys of keys.

    Args:
      *features: two or more, each `Keys` or what `Keys.of` takes, of shapes that broadcast.
      seed: see `scramble`.

    Returns:
      `Keys`. They are hashes of 64 bits: of N distinct combinations about N**2 / 2**65 pairs meet.
      The order of the features matters.

    Raises:
      ValueError: fewer than two features.

    >>> hours = cross(np.array([7, 8]), np.array([[0], [1]]))
    >>> hours.shape, len(np.unique(hours.to_numpy()))
    ((2, 2), 4)
    """
    if len(features) < 2:
        raise ValueError(f"features to be crossed must be at least 2, got {len(features)}.")
    first, *others = map(Keys.of, features)
    crossed = scramble(first, seed)
    for other in others:
        crossed = scramble(Keys(crossed.hi ^ other.hi, crossed.lo ^ other.lo), seed)
    return crossed


def check_seed(seed: Any) -> int:
    """Raises a ValueError unless a seed is an integer in [0, 2**32)."""
    is_integer = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
    if not is_integer or not 0 <= seed < _WORD:
        raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}.")
    return int(seed)


@functools.lru_cache(maxsize=1024)
def _round_keys(seed: int) -> tuple[np.uint32, ...]:
    """A word for each round, mixed of the seed: neighbouring seeds have nothing in common."""
    seed = check_seed(seed)
    words = (
        _mixed_integer((word + 0x9E3779B9 * (_mixed_integer(seed + number) + number)) % _WORD)
        for number, word in enumerate(_ROUNDS)
    )
    return tuple(map(np.uint32, words))


def _mixed_integer(x: int) -> int:
    x = x % _WORD
    x = (x ^ (x >> 16)) * 0x85EBCA6B % _WORD
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % _WORD
    return x ^ (x >> 16)


def mixed(x: Any) -> Any:
    """Mixes the bits of uint32 of NumPy or JAX: the finalizer of MurmurHash3."""
    u = np.uint32
    x = (x ^ (x >> u(16))) * u(0x85EBCA6B)
    x = (x ^ (x >> u(13))) * u(0xC2B2AE35)
    return x ^ (x >> u(16))
