"""Partitions on 64-bit keys, with no vocabulary at all.

`KeyDigits` cuts the scrambled key into digits: with all 64 bits no two keys ever share all their
rows, for ever, with four tables of 65,536 rows. `MultiHash` hashes it into tables of any length.
Of either the expected share of keys with a twin, one that shares all rows, is known beforehand.

Source: Yan et al. 2021, "Binary Code based Hash Embedding for Web-scale Applications" (digits);
Shi et al. 2020 (the tables); Svenstrup et al. 2017, "Hash Embeddings" (several hashes).
"""

import abc
import dataclasses
import math
import operator
from typing import Any

import numpy as np

from qrhash.arithmetic import Array, as_size
from qrhash.partitions import Partition
from qrhash.words import Keys, check_seed, scramble, unscramble

_NUM_KEYS = 2**64
_MOST_BITS = 31  # of a digit: row numbers are int32


@dataclasses.dataclass(frozen=True)
class KeyPartition(Partition):
    """What the families on keys share: `indices` takes `Keys`, or what `Keys.of` takes."""

    num_embeddings: int = dataclasses.field(init=False, repr=False, default=_NUM_KEYS)

    takes_keys = True

    def indices(self, ids: Any) -> tuple[Array, ...]:
        """Row numbers of keys, one array per table.

        Args:
          ids: `Keys` [*shape], of NumPy or JAX, or what `Keys.of` takes.

        Returns:
          k int32 arrays [*shape]. Every key has a row in every table.

        Raises:
          ValueError: as `Keys.of`.
        """
        return self._of_keys(Keys.of(ids))

    @abc.abstractmethod
    def _of_keys(self, keys: Keys) -> tuple[Array, ...]:
        """Row numbers of keys."""

    @property
    @abc.abstractmethod
    def num_codes(self) -> int:
        """How many tuples of rows there are."""

    def twin_rate(self, num_keys: int) -> float:
        """The expected share of so many distinct keys that share all their rows with another one.

        1 - exp(-(N - 1) / M) of M tuples of rows that are all alike likely.
        """
        num_keys = as_size("num_keys", num_keys)
        return 0.0 if self.is_complementary else -math.expm1(-(num_keys - 1) / self.num_codes)

    def _digits(self, ids: Array) -> tuple[Array, ...]:
        raise NotImplementedError  # of ids; keys have `_of_keys`

    def _compose(self, rows: tuple[Array, ...]) -> Array:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class KeyDigits(KeyPartition):
    """Digits of the scrambled key: k tables of 2**(bits / k) rows.

    Attributes:
      bits: how many of the 64 bits are used. With all of them no two keys share all rows.
      num_tables: number of tables, k.
      seed: of the bijection that scrambles the key first.

    Raises:
      ValueError: bits not from 1 to 64, fewer bits than tables, or so few tables that one would
        have more than 2**31 rows; a seed that is no integer in [0, 2**32).

    >>> digits = KeyDigits(num_tables=4)
    >>> digits.num_rows, digits.is_complementary
    ((65536, 65536, 65536, 65536), True)
    >>> digits.ids(*digits.indices(np.array([7, -1]))).to_numpy().tolist()
    [7, 18446744073709551615]
    >>> f"{KeyDigits(bits=48, num_tables=3).twin_rate(10**8):.1e}"
    '3.6e-07'
    """

    bits: int = 64
    num_tables: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        bits, num_tables = as_size("bits", self.bits), as_size("num_tables", self.num_tables)
        if bits > 64:
            raise ValueError(f"bits must be at most 64, got {bits}.")
        if not bits / _MOST_BITS <= num_tables <= bits:
            raise ValueError(
                f"num_tables must be from {math.ceil(bits / _MOST_BITS)} to {bits} for {bits} "
                f"bits, got {num_tables}."
            )
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "num_tables", num_tables)
        object.__setattr__(self, "seed", check_seed(self.seed))

    @property
    def _widths(self) -> tuple[int, ...]:
        """Bits of each digit, as even as they go."""
        each, more = divmod(self.bits, self.num_tables)
        return tuple(each + (j < more) for j in range(self.num_tables))

    @property
    def num_rows(self) -> tuple[int, ...]:
        """Rows of each table."""
        return tuple(2**width for width in self._widths)

    @property
    def num_codes(self) -> int:
        """How many tuples of rows there are."""
        return 2**self.bits

    @property
    def is_complementary(self) -> bool:
        """Whether no two keys share all their rows."""
        return self.bits == 64

    def _of_keys(self, keys: Keys) -> tuple[Array, ...]:
        mixed = scramble(keys, self.seed)
        digits, at = [], 0
        for width in self._widths:
            digits.append(_bits(mixed, at, width).astype(np.int32))
            at += width
        return tuple(digits)

    def ids(self, *indices: Array) -> Any:
        """The inverse of `indices`: the keys that have these rows.

        Args:
          *indices: k integer arrays of one shape, NumPy or JAX, as `indices` returns them.

        Returns:
          `Keys` of that shape.

        Raises:
          ValueError: fewer than 64 bits are used, or the number of arrays is not k.
        """
        if not self.is_complementary:
            raise ValueError(
                f"{self} is not complementary: its row numbers do not determine a key."
            )
        if len(indices) != self.num_tables:
            raise ValueError(
                f"ids() takes one array of row numbers per table, {self.num_tables}, got "
                f"{len(indices)}."
            )
        lo = hi = indices[0].astype(np.uint32) & np.uint32(0)
        at = 0
        for index, width in zip(indices, self._widths, strict=True):
            digit = index.astype(np.uint32)
            if at < 32:
                lo = lo | digit << np.uint32(at)
            if at >= 32:
                hi = hi | digit << np.uint32(at - 32)
            elif at + width > 32:
                hi = hi | digit >> np.uint32(32 - at)
            at += width
        return unscramble(Keys(hi, lo), self.seed)


@dataclasses.dataclass(frozen=True)
class MultiHash(KeyPartition):
    """Independent hashes of the key into k tables of any length.

    Attributes:
      num_rows: rows of each table.
      seed: the hash of table j is of seed + j.

    Raises:
      ValueError: no tables, a size that is no positive integer of at most 2**31 - 1, or a seed that
        is no integer in [0, 2**32).

    >>> hashes = MultiHash((100_000, 100_000, 100_000))
    >>> [index.shape for index in hashes.indices(np.array([7, -1]))]
    [(2,), (2,), (2,)]
    >>> f"{hashes.twin_rate(10**8):.0e}"
    '1e-07'
    """

    num_rows: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            sizes = tuple(as_size(f"num_rows[{j}]", n) for j, n in enumerate(self.num_rows))
        except TypeError:
            raise ValueError(
                f"num_rows must be a sequence of sizes, one for each table, got {self.num_rows!r}."
            ) from None
        if not sizes or max(sizes) >= 2**_MOST_BITS:
            raise ValueError(
                f"num_rows must hold sizes below 2**{_MOST_BITS} of one table or more, got {sizes}."
            )
        object.__setattr__(self, "num_rows", sizes)
        object.__setattr__(self, "seed", check_seed(self.seed))

    @property
    def num_codes(self) -> int:
        """How many tuples of rows there are."""
        return math.prod(self.num_rows)

    @property
    def is_complementary(self) -> bool:
        """Never: hashes of different keys may meet in every table."""
        return False

    def _of_keys(self, keys: Keys) -> tuple[Array, ...]:
        mixed = (scramble(keys, (self.seed + j) % 2**32) for j in range(self.num_tables))
        with np.errstate(over="ignore"):
            return tuple(
                _scaled(each.hi ^ each.lo, rows).astype(np.int32)
                for each, rows in zip(mixed, self.num_rows, strict=True)
            )

    def ids(self, *indices: Array) -> Any:
        """Raises a ValueError: row numbers do not determine a key."""
        raise ValueError(f"{self} is not complementary: its row numbers do not determine a key.")


def _bits(keys: Keys, at: int, width: int) -> Any:
    """So many bits of keys, from a position on, at most 31."""
    u, mask = np.uint32, np.uint32(2**width - 1)
    if at >= 32:
        return keys.hi >> u(at - 32) & mask
    if at + width <= 32:
        return keys.lo >> u(at) & mask
    return operator.or_(keys.lo >> u(at), keys.hi << u(32 - at)) & mask


def _scaled(word: Any, rows: int) -> Any:
    """floor(word * rows / 2**32), in 32 bits: by halves, as one does it on paper."""
    u, low = np.uint32, np.uint32(0xFFFF)
    a, b, c, d = word >> u(16), word & low, u(rows >> 16), u(rows & 0xFFFF)
    middle = a * d + (b * d >> u(16))
    return a * c + (middle >> u(16)) + (b * c + (middle & low) >> u(16))
