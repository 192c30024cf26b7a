"""Partitions by codes with a meaning: categories, clusters, semantic ids.

The paper's "partitions by meaning" (a car's make, model and year), written down id by id. What two
ids share is then chosen, and no accident of their numbers: ids of equal codes learn together. Where
ids have all their codes in common, one more partition, by rank among them, tells them apart.

Source: Shi et al. 2020, section 3.1; Singh et al. 2024, "Better Generalization with Semantic IDs".
"""

import base64
import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from qrhash.arithmetic import Array, as_fields, as_ids, as_size, typed_fields
from qrhash.partitions import Partition

_MOST_ROWS = 2**31 - 1
_TWINS_NAMED = 3  # in a message


@dataclasses.dataclass(frozen=True)
class CodePartition(Partition):
    """Tables of given codes: row `codes[id, j]` of table j.

    It is compared, and hashed, by a digest of its codes. They are kept in the narrowest type that
    holds them. A jitted program holds them as a constant, one byte for each code below 256; with
    NumPy ids the row numbers are looked up on the host, and a program holds nothing of them.

    Attributes:
      codes: integers [num_embeddings, k] from 0 on, NumPy or JAX; kept as NumPy's, read-only.
      num_codes: rows of each of the k tables. Default: one more than the greatest code of each.
      tie_breaker: whether there is one more table, whose row is an id's rank among the ids of equal
        codes, in the order of their numbers. The partition is complementary then.
      digest: of the codes.

    Raises:
      ValueError: codes that are no integers of that shape, below 0 or not below `num_codes`.

    Source: Shi et al. 2020, section 3.1 (partitions by meaning).

    >>> make_and_year = np.array([[0, 0], [0, 1], [1, 0], [0, 1]])
    >>> cars = CodePartition(make_and_year)
    >>> cars.num_rows, cars.is_complementary, [ids.tolist() for ids in cars.twins()]
    ((2, 2), False, [[1, 3]])
    >>> CodePartition(make_and_year, tie_breaker=True).indices(np.array([1, 3]))[2]
    array([0, 1], dtype=int32)
    """

    num_embeddings: int = dataclasses.field(init=False)
    codes: Array = dataclasses.field(compare=False, repr=False)
    num_codes: tuple[int, ...] = None  # type: ignore[assignment]  # a tuple once built
    tie_breaker: bool = False
    digest: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        codes = _checked(_unpacked(self.codes))
        num_codes = _checked_num_codes(self.num_codes, codes)
        if not isinstance(self.tie_breaker, (bool, np.bool_)):
            raise ValueError(f"tie_breaker must be true or false, got {self.tie_breaker!r}.")
        codes = _read_only(codes.astype(_narrowest(max(num_codes))))
        object.__setattr__(self, "num_embeddings", len(codes))
        object.__setattr__(self, "codes", codes)
        object.__setattr__(self, "num_codes", num_codes)
        object.__setattr__(self, "tie_breaker", bool(self.tie_breaker))
        object.__setattr__(self, "digest", hashlib.blake2b(codes.data, digest_size=16).hexdigest())
        super().__post_init__()

    @property
    def num_rows(self) -> tuple[int, ...]:
        """Rows of each table; of the tie-breaker, last, as many as the most ids of equal codes."""
        return (*self.num_codes, self._most_equal) if self.tie_breaker else self.num_codes

    @property
    def is_complementary(self) -> bool:
        """Whether no two ids share all their row numbers: decided by sorting the codes."""
        return self.tie_breaker or self._most_equal == 1

    def twins(self) -> list[np.ndarray]:
        """The ids that have all their codes in common with others.

        Returns:
          One array of ids for each such set of at least two, by their lowest. A tie-breaker makes
          no difference to them.
        """
        starts = self._starts
        ends = np.append(starts[1:], self.num_embeddings)
        sets = [self._order[a:b] for a, b in zip(starts, ends, strict=True) if b - a > 1]
        return sorted(sets, key=lambda ids: int(ids[0]))

    def ids(self, *indices: Array) -> Array:
        """The inverse of `indices`, as of every partition.

        Raises:
          ValueError: as `Partition.ids`; where the partition is not complementary, with ids of
            equal codes by name.
        """
        if not self.is_complementary:
            twins = self.twins()
            named = "; ".join(
                ", ".join(map(str, each[: _TWINS_NAMED + 1])) for each in twins[:_TWINS_NAMED]
            )
            raise ValueError(
                f"{self} is not complementary: {len(twins)} sets of ids have equal codes, such as "
                f"{named}. With tie_breaker=True one more table tells them apart."
            )
        return super().ids(*indices)

    def to_dict(self) -> dict[str, Any]:
        """The partition as JSON has it, with all its codes: deflated, as text.

        About 1.3 characters for each code below 256, fewer where they repeat.

        >>> made = CodePartition(np.zeros((1000, 1), int)).to_dict()
        >>> made["codes"]["shape"], len(made["codes"]["deflated"]) < 50
        ([1000, 1], True)
        """
        return typed_fields(self) | {"codes": _packed(self.codes)}

    def _digits(self, ids: Array) -> tuple[Array, ...]:
        rows = ids.__array_namespace__().asarray(self._table)[ids]
        return tuple(rows[..., j].astype(ids.dtype) for j in range(self.num_tables))

    def _compose(self, rows: tuple[Array, ...]) -> Array:
        # A binary search among the rows of all ids in lexicographic order.
        xp, n = rows[0].__array_namespace__(), self.num_embeddings
        table, order = xp.asarray(self._sorted), xp.asarray(self._order)
        low = rows[0] * 0
        high = low + n
        for _ in range(n.bit_length()):
            middle = low + (high - low) // 2
            found = table[xp.minimum(middle, n - 1)]
            is_below, is_equal = low < low, low == low
            for j, row in enumerate(rows):
                entry = found[..., j].astype(row.dtype)
                is_below = is_below | (is_equal & (entry < row))
                is_equal = is_equal & (entry == row)
            is_open = low < high
            low = xp.where(is_open & is_below, middle + 1, low)
            high = xp.where(is_open & ~is_below, middle, high)
        return order[xp.minimum(low, n - 1)].astype(rows[0].dtype)

    @functools.cached_property
    def _order(self) -> np.ndarray:
        """Ids in the lexicographic order of their codes, those of equal codes by number."""
        keys = self.codes[:, ::-1].T
        return _read_only(np.lexsort(keys).astype(np.int32))

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """Where in that order ids of other codes than the ones before begin."""
        codes = self.codes[self._order]
        is_new = np.append(True, (codes[1:] != codes[:-1]).any(axis=1))
        return np.flatnonzero(is_new)

    @functools.cached_property
    def _most_equal(self) -> int:
        """The most ids of equal codes."""
        return int(np.diff(self._starts, append=self.num_embeddings).max())

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """Row numbers of all ids, [num_embeddings, num_tables]."""
        if not self.tie_breaker:
            return self.codes
        lengths = np.diff(self._starts, append=self.num_embeddings)
        ranks = np.empty(self.num_embeddings, np.int32)
        ranks[self._order] = np.arange(self.num_embeddings) - np.repeat(self._starts, lengths)
        table = np.concatenate([self.codes, ranks[:, None]], axis=1)
        return _read_only(table.astype(_narrowest(max(self.num_rows))))

    @functools.cached_property
    def _sorted(self) -> np.ndarray:
        """The row numbers of all ids in lexicographic order."""
        return _read_only(self._table[self._order])


def _checked(codes: Any) -> np.ndarray:
    codes = np.asarray(as_ids(codes, "codes"))
    if codes.ndim != 2 or 0 in codes.shape:
        raise ValueError(
            f"codes must have shape [num_embeddings, k], a row for each id, got {codes.shape}."
        )
    if codes.min() < 0 or codes.max() >= _MOST_ROWS:
        wrong = codes.min() if codes.min() < 0 else codes.max()
        raise ValueError(f"codes must be in [0, 2**31 - 1), got {wrong}.")
    return codes


def _checked_num_codes(given: Any, codes: np.ndarray) -> tuple[int, ...]:
    greatest = codes.max(axis=0).tolist()
    if given is None:
        return tuple(most + 1 for most in greatest)
    try:
        sizes = tuple(as_size(f"num_codes[{j}]", size) for j, size in enumerate(given))
    except TypeError:
        sizes = ()
    if len(sizes) != len(greatest) or max(sizes) > _MOST_ROWS:
        raise ValueError(
            f"num_codes must hold a size below 2**31 for each of {len(greatest)} columns of codes, "
            f"got {given!r}."
        )
    for j, (most, size) in enumerate(zip(greatest, sizes, strict=True)):
        if most >= size:
            raise ValueError(f"codes[:, {j}] must be below num_codes[{j}]={size}, got {most}.")
    return sizes


def _narrowest(num_rows: int) -> Any:
    return np.uint8 if num_rows <= 2**8 else np.uint16 if num_rows <= 2**16 else np.int32


def _read_only(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    array.setflags(write=False)
    return array


def _packed(codes: np.ndarray) -> dict[str, Any]:
    """Codes as JSON has them."""
    little = codes.astype(codes.dtype.newbyteorder("<"), copy=False)
    deflated = base64.b64encode(zlib.compress(little.tobytes())).decode("ascii")
    return {"dtype": codes.dtype.name, "shape": list(codes.shape), "deflated": deflated}


def _unpacked(codes: Any) -> Any:
    """The codes that `_packed` made this of; others as they are."""
    if not isinstance(codes, Mapping):
        return codes
    values = as_fields("codes", codes)
    try:
        dtype = np.dtype(values["dtype"]).newbyteorder("<")
        flat = np.frombuffer(zlib.decompress(base64.b64decode(values["deflated"])), dtype)
        return flat.reshape(values["shape"]).astype(np.int64)
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(
            f"codes must be integers, or what to_dict made of them: {error}."
        ) from error
