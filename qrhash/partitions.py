"""Partitions: id -> one row number per table.

A partition splits a vocabulary {0, ..., n-1} into classes; class i of table j is row i of
that table. Several partitions are *complementary* when no two ids share all their classes,
so that k small tables tell all n ids apart: for every a != b some j has [a]_j != [b]_j
(Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient
Recommendation Systems", KDD 2020, section 3).

Every family (`qrhash.families`) is a frozen, hashable dataclass of plain integers, or of codes that
are hashed by a digest (`qrhash.code_partition`). The same lines of integer arithmetic serve NumPy
(int64 on the host, exact for vocabularies up to 2**63) and JAX (int32 on the device, traceable).
"""

import abc
import dataclasses
import functools
import importlib
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from qrhash.arithmetic import INT32_MAX, Array, as_ids, as_size, build_typed, typed_fields

# Where the families are: known once they are imported.
_FAMILIES = ("families", "carried_families", "key_families", "code_partition")

_MAX_NUM_EMBEDDINGS = 2**63
_MAX_ROWS = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Partition(abc.ABC):
    """What all families share.

    Attributes:
      num_embeddings: size n of the vocabulary; ids are the integers in [0, n).
    """

    num_embeddings: int

    takes_keys = False  # whether `indices` takes 64-bit keys in place of ids

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_embeddings", vocabulary_size(self.num_embeddings))

    @property
    @abc.abstractmethod
    def num_rows(self) -> tuple[int, ...]:
        """Rows of each table."""

    @property
    def num_tables(self) -> int:
        """Number of tables, k."""
        return len(self.num_rows)

    @property
    def is_complementary(self) -> bool:
        """Whether no two ids share all their row numbers: decided exactly, by arithmetic."""
        return True

    @property
    def num_ids_with_rows(self) -> int:
        """The ids below this have a row in every table: all ids, but for DeepRec's arithmetic."""
        return self.num_embeddings

    def indices(self, ids: Array) -> tuple[Array, ...]:
        """Row numbers of ids, one array per table.

        An id outside [0, num_embeddings) has no row: its row number is `num_rows[j]`, one past
        the end, in every table. NumPy indexing then raises, and `qrhash.gather` fills with NaN;
        no other id's row is ever read in its place.

        Args:
          ids: integers of any shape and integer dtype. NumPy (or Python) integers are computed
            on the host, JAX integers on the device, also under `jit` and `vmap`.

        Returns:
          k arrays of the shape of `ids`, NumPy for NumPy and JAX for JAX; int32, or int64 for a
          table of 2**31 rows or more.

        Raises:
          ValueError: the ids are not integers; JAX ids of 32 bits or fewer for a vocabulary or a
            table that needs more; or Python integers of more than 64 bits.

        >>> from qrhash.families import QuotientRemainder
        >>> QuotientRemainder(10, 4).indices(np.array([0, 5, 9]))
        (array([0, 1, 2], dtype=int32), array([0, 1, 1], dtype=int32))
        """
        ids = self._signed(as_ids(ids), "ids")
        xp = ids.__array_namespace__()
        has_rows = (ids >= 0) & (ids <= self.num_ids_with_rows - 1)
        # On the host it is known, and the usual case needs no choice.
        have_all = isinstance(has_rows, np.ndarray) and has_rows.all()
        digits = self._digits(ids if have_all else xp.where(has_rows, ids, 0))
        return tuple(
            (row if have_all else xp.where(has_rows, row, rows)).astype(
                xp.int32 if rows <= INT32_MAX else xp.int64
            )
            for row, rows in zip(digits, self.num_rows, strict=True)
        )

    def ids(self, *indices: Array) -> Array:
        """The inverse of `indices`: the id that has these row numbers.

        Args:
          *indices: k integer arrays of one shape, NumPy or JAX, as `indices` returns them.

        Returns:
          Ids of that shape, int64 for NumPy; -1 where no id has these row numbers.

        Raises:
          ValueError: the row numbers are not integers; the partition is not complementary, or the
            number of arrays is not k.

        >>> from qrhash.families import QuotientRemainder
        >>> QuotientRemainder(10, 4).ids(np.array([2, 2]), np.array([1, 3]))
        array([ 9, -1])
        """
        if not self.is_complementary:
            raise ValueError(
                f"{self} is not complementary: several ids share all their row numbers, "
                "so row numbers do not determine an id."
            )
        if len(indices) != self.num_tables:
            raise ValueError(
                f"ids() takes one array of row numbers per table, {self.num_tables}, "
                f"got {len(indices)}."
            )
        rows = tuple(as_ids(index) for index in indices)
        xp = rows[0].__array_namespace__()
        # Row numbers are narrower than ids may be: as wide as an integer is here by default.
        rows = tuple(self._signed(row.astype(xp.asarray(0).dtype), "row numbers") for row in rows)
        # Row numbers that no id has may overflow on the way; whatever comes out is an id only if
        # it has the row numbers that were asked for.
        with np.errstate(over="ignore"):
            ids = xp.asarray(self._compose(rows))
        found = zip(self.indices(ids), rows, strict=True)
        matches = (index.astype(row.dtype) == row for index, row in found)
        in_range = (ids >= 0) & (ids <= self.num_embeddings - 1)
        return xp.where(functools.reduce(operator.and_, matches, in_range), ids, -1)

    def to_dict(self) -> dict[str, Any]:
        """The partition as JSON has it: its type, and its numbers.

        >>> from qrhash.families import QuotientRemainder
        >>> QuotientRemainder(10, 4).to_dict()
        {'type': 'QuotientRemainder', 'num_embeddings': 10, 'num_collisions': 4}
        """
        return typed_fields(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Partition":
        """The partition of which `to_dict` made these values.

        Raises:
          ValueError: an unknown type, or values that do not make a partition of that type.

        >>> from qrhash.families import FullTable
        >>> Partition.from_dict({"type": "FullTable", "num_embeddings": 10})
        FullTable(num_embeddings=10)
        """
        for room in _FAMILIES:
            importlib.import_module(f"qrhash.{room}")
        made: Partition = build_typed("partition", Partition, values)
        return made

    @abc.abstractmethod
    def _digits(self, ids: Array) -> tuple[Array, ...]:
        """Row numbers of ids that have rows, in the dtype of the ids."""

    @abc.abstractmethod
    def _compose(self, rows: tuple[Array, ...]) -> Array:
        """The id with these row numbers, if there is one; anything if there is none."""

    def _check_rows(self) -> None:
        if max(self.num_rows) > _MAX_ROWS:
            raise ValueError(
                f"num_rows must be at most 2**63 - 1 per table, got {max(self.num_rows)} "
                f"from {self}."
            )

    def _signed(self, ids: Array, what: str) -> Array:
        """Integers of 32 or 64 signed bits; an unsigned value too large turns negative."""
        xp = ids.__array_namespace__()
        if ids.dtype.itemsize == 8:
            return ids.astype(xp.int64)
        if self.num_embeddings - 1 > INT32_MAX or max(self.num_rows) > INT32_MAX:
            raise ValueError(
                f"{what} are {ids.dtype} JAX integers, but {self} needs 64 bits: compute the row "
                "numbers on the host with partition.indices(numpy_int64_ids) and pass those to "
                "qrhash.gather, or set jax_enable_x64."
            )
        return ids.astype(xp.int32)


def vocabulary_size(value: int) -> int:
    """Checks the size of a vocabulary."""
    size = as_size("num_embeddings", value)
    if size > _MAX_NUM_EMBEDDINGS:
        raise ValueError(f"num_embeddings must be at most 2**63, got {size}.")
    return size
