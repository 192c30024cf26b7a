"""The families of partitions.

Each says how ids become row numbers (`_digits`) and back (`_compose`); what they share is
`qrhash.partitions.Partition`, where the methods are documented.
"""

import dataclasses
import functools
import itertools
import math
import operator
from typing import Self

from qrhash.arithmetic import (
    Array,
    as_size,
    balanced_radices,
    ceil_div,
    ceil_root,
    coprime_moduli,
    digit,
    multiply_mod,
)
from qrhash.partitions import Partition, vocabulary_size


@dataclasses.dataclass(frozen=True)
class FullTable(Partition):
    """One row per id: the naive partition, and the plain embedding table.

    Attributes:
      num_embeddings: size n of the vocabulary.

    Raises:
      ValueError: `num_embeddings` is not a positive integer.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rows()

    @property
    def num_rows(self) -> tuple[int, ...]:
        return (self.num_embeddings,)

    def _digits(self, ids: Array) -> tuple[Array, ...]:
        return (ids,)

    def _compose(self, rows: tuple[Array, ...]) -> Array:
        return rows[0]


@dataclasses.dataclass(frozen=True)
class HashTrick(Partition):
    """One table of id mod num_buckets: the baseline whose ids collide.

    Attributes:
      num_embeddings: size n of the vocabulary.
      num_buckets: rows of the table. Below n the partition is not complementary.

    Raises:
      ValueError: a size is not a positive integer.
    """

    num_buckets: int

    def __post_init__(self) -> None:
        super().__post_init__()
        set_size(self, "num_buckets")
        self._check_rows()

    @property
    def num_rows(self) -> tuple[int, ...]:
        return (self.num_buckets,)

    @property
    def is_complementary(self) -> bool:
        return self.num_buckets >= self.num_embeddings

    def _digits(self, ids: Array) -> tuple[Array, ...]:
        return (digit(ids, 1, self.num_buckets, self.num_embeddings),)

    def _compose(self, rows: tuple[Array, ...]) -> Array:
        return rows[0]


@dataclasses.dataclass(frozen=True)
class QuotientRemainder(Partition):
    """The quotient-remainder trick: tables of floor(id / m) and id mod m.

    Attributes:
      num_embeddings: size n of the vocabulary.
      num_collisions: m, the number of ids that share a row of the quotient table. The tables
        have ceil(n / m) and m rows. Default: ceil(sqrt(n)), which makes them equally long and
        their sum smallest.

    Raises:
      ValueError: a size is not a positive integer.

    Source: Shi et al. 2020, definition 2 (quotient-remainder).

    >>> QuotientRemainder(10_000_000, 4).num_rows
    (2500000, 4)
    """

    num_collisions: int = None  # type: ignore[assignment]  # an int once built

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_collisions is None:
            object.__setattr__(self, "num_collisions", ceil_root(self.num_embeddings, 2))
        set_size(self, "num_collisions")
        self._check_rows()

    @property
    def num_rows(self) -> tuple[int, ...]:
        return (ceil_div(self.num_embeddings, self.num_collisions), self.num_collisions)

    def _digits(self, ids: Array) -> tuple[Array, ...]:
        quotients, remainders = self.num_rows
        return (
            digit(ids, remainders, quotients, self.num_embeddings),
            digit(ids, 1, remainders, self.num_embeddings),
        )

    def _compose(self, rows: tuple[Array, ...]) -> Array:
        return rows[0] * self.num_collisions + rows[1]


@dataclasses.dataclass(frozen=True)
class MixedRadix(Partition):
    """The generalised quotient-remainder trick: the digits of the id in a mixed radix.

    Table j holds digit j, floor(id / M_j) mod m_j, with M_j the product of the radices before it:
    the first table is the remainder modulo m_1.

    Attributes:
      num_embeddings: size n of the vocabulary.
      radices: (m_1, ..., m_k), k >= 2, the rows of each table; their product is at least n.

    Raises:
      ValueError: a size is not a positive integer, fewer than two radices, or a product below n.

    Source: Shi et al. 2020, section 3.1 (generalised quotient-remainder).

    >>> import numpy as np
    >>> MixedRadix(1000, (10, 10, 10)).indices(np.array(123))[0]
    array(3, dtype=int32)
    """

    radices: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _set_sizes(self, "radices")
        self._check_rows()

    @classmethod
    def balanced(cls, num_embeddings: int, num_tables: int) -> Self:
        """The radices with the smallest sum, that is the fewest rows in all.

        Args:
          num_embeddings: size n of the vocabulary.
          num_tables: k >= 2.

        Raises:
          ValueError: a size is not a positive integer, or `num_tables` is below 2.

        >>> MixedRadix.balanced(1_000, 3).radices
        (10, 10, 10)
        """
        num_embeddings = vocabulary_size(num_embeddings)
        num_tables = as_size("num_tables", num_tables, minimum=2)
        return cls(num_embeddings, balanced_radices(num_embeddings, num_tables))

    @property
    def num_rows(self) -> tuple[int, ...]:
        return self.radices

    @property
    def _places(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate(self.radices[:-1], operator.mul, initial=1))

    def _digits(self, ids: Array) -> tuple[Array, ...]:
        return tuple(
            digit(ids, place, radix, self.num_embeddings)
            for place, radix in zip(self._places, self.radices, strict=True)
        )

    def _compose(self, rows: tuple[Array, ...]) -> Array:
        # Digits whose place is n or more are zero for every id.
        places = [place for place in self._places if place < self.num_embeddings]
        return functools.reduce(operator.add, map(operator.mul, rows, places or [1]))


@dataclasses.dataclass(frozen=True)
class ChineseRemainder(Partition):
    """Remainders modulo pairwise coprime numbers: table j holds id mod m_j.

    Attributes:
      num_embeddings: size n of the vocabulary.
      moduli: (m_1, ..., m_k), k >= 2, pairwise coprime, the rows of each table; their product is
        at least n.

    Raises:
      ValueError: a size is not a positive integer, fewer than two moduli, a product below n, or
        two moduli with a common factor.

    Source: Shi et al. 2020, section 3.1 (Chinese remainder); the inverse is Garner's algorithm.

    >>> import numpy as np
    >>> ChineseRemainder(12, (3, 4)).indices(np.array(7))
    (array(1, dtype=int32), array(3, dtype=int32))
    """

    moduli: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _set_sizes(self, "moduli")
        for a, b in itertools.combinations(self.moduli, 2):
            if math.gcd(a, b) > 1:
                raise ValueError(
                    f"moduli must be pairwise coprime, got {self.moduli}: {a} and {b} share the "
                    f"factor {math.gcd(a, b)}."
                )
        self._check_rows()

    @classmethod
    def balanced(cls, num_embeddings: int, num_tables: int) -> Self:
        """Pairwise coprime moduli with the smallest sum, that is the fewest rows in all.

        Found by branch and bound; where many tables make the search long it stops early, with
        the best moduli found until then.

        Args:
          num_embeddings: size n of the vocabulary.
          num_tables: k >= 2.

        Raises:
          ValueError: a size is not a positive integer, or `num_tables` is below 2.

        >>> ChineseRemainder.balanced(1_000, 3).moduli
        (7, 11, 13)
        """
        num_embeddings = vocabulary_size(num_embeddings)
        num_tables = as_size("num_tables", num_tables, minimum=2)
        return cls(num_embeddings, coprime_moduli(num_embeddings, num_tables))

    @property
    def num_rows(self) -> tuple[int, ...]:
        return self.moduli

    def _digits(self, ids: Array) -> tuple[Array, ...]:
        return tuple(digit(ids, 1, modulus, self.num_embeddings) for modulus in self.moduli)

    def _compose(self, rows: tuple[Array, ...]) -> Array:
        ids, product = rows[0], self.moduli[0]
        for row, modulus in zip(rows[1:], self.moduli[1:], strict=True):
            # The moduli so far determine the id.
            if product >= self.num_embeddings:
                break
            inverse = pow(product, -1, modulus)
            ids = ids + product * multiply_mod((row - ids) % modulus, inverse, modulus)
            product *= modulus
        return ids


def set_size(partition: Partition, name: str) -> None:
    """Checks a size of a partition, and stores it as a Python integer."""
    object.__setattr__(partition, name, as_size(name, getattr(partition, name)))


def _set_sizes(partition: Partition, name: str) -> None:
    """Checks and stores the sizes of k >= 2 tables whose product must reach the vocabulary."""
    values = getattr(partition, name)
    try:
        sizes = tuple(as_size(f"{name}[{j}]", value) for j, value in enumerate(values))
    except TypeError:
        raise ValueError(
            f"{name} must be a sequence of positive integers, got {values!r}."
        ) from None
    if len(sizes) < 2:
        raise ValueError(f"{name} must name at least 2 tables, got {values!r}.")
    if math.prod(sizes) < partition.num_embeddings:
        raise ValueError(
            f"{name} must have a product of at least num_embeddings={partition.num_embeddings}, "
            f"got {sizes} with product {math.prod(sizes)}."
        )
    object.__setattr__(partition, name, sizes)
