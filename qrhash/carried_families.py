"""The arithmetic of other systems, for models carried over; new models want `qrhash.families`."""

import dataclasses

from qrhash.arithmetic import Array, ceil_div, digit
from qrhash.families import set_size
from qrhash.partitions import Partition

_EXACT = 2**24  # below it every integer is a float32


@dataclasses.dataclass(frozen=True)
class DeepRecQuotientRemainder(Partition):
    """DeepRec's own "Q-R" arithmetic, for models carried over: id // rows_q and id mod rows_r.

    It divides by the length of the *quotient* table, so it is complementary only if that is no
    longer than the remainder table, and only ids below rows_q**2 have a quotient row; the others
    are treated as out of range. New models want `QuotientRemainder`.

    Attributes:
      num_embeddings: size n of the vocabulary.
      num_quotients: rows_q, rows of the quotient table.
      num_remainders: rows_r, rows of the remainder table.

    Raises:
      ValueError: a size is not a positive integer.

    Source: DeepRec, "Multi-Hash Variable" (its get_multihash_variable, strategy "Q-R").
    """

    num_quotients: int
    num_remainders: int

    def __post_init__(self) -> None:
        super().__post_init__()
        set_size(self, "num_quotients")
        set_size(self, "num_remainders")
        self._check_rows()

    @property
    def num_rows(self) -> tuple[int, ...]:
        return (self.num_quotients, self.num_remainders)

    @property
    def is_complementary(self) -> bool:
        # Two ids collide when they lie num_remainders apart within one block of num_quotients ids.
        block = min(self.num_quotients, self.num_embeddings)
        return self.num_remainders >= block and self.num_ids_with_rows == self.num_embeddings

    @property
    def num_ids_with_rows(self) -> int:
        return min(self.num_embeddings, self.num_quotients**2)

    def _digits(self, ids: Array) -> tuple[Array, ...]:
        return (
            digit(ids, self.num_quotients, self.num_quotients, self.num_ids_with_rows),
            digit(ids, 1, self.num_remainders, self.num_ids_with_rows),
        )

    def _compose(self, rows: tuple[Array, ...]) -> Array:
        start = rows[0] * self.num_quotients
        return start + (rows[1] - start) % self.num_remainders


@dataclasses.dataclass(frozen=True)
class DLRMQuotientRemainder(Partition):
    """DLRM's own arithmetic: the quotient by a division in float32, and id mod num_collisions.

    Up to 2**24 ids it is `QuotientRemainder`. Beyond, ids are rounded before they are divided: some
    get a neighbour's quotient, and so another id's vector. An id whose quotient is past the end,
    with which DLRM ends in an error, has no row.

    Attributes:
      num_embeddings: size n of the vocabulary.
      num_collisions: m, the number of ids that share a row of the quotient table.

    Raises:
      ValueError: a size is not a positive integer.

    Source: facebookresearch/dlrm, tricks/qr_embedding_bag.py.
    """

    num_collisions: int

    def __post_init__(self) -> None:
        super().__post_init__()
        set_size(self, "num_collisions")
        self._check_rows()

    @property
    def num_rows(self) -> tuple[int, ...]:
        return (ceil_div(self.num_embeddings, self.num_collisions), self.num_collisions)

    @property
    def is_complementary(self) -> bool:
        return self.num_embeddings <= _EXACT

    def indices(self, ids: Array) -> tuple[Array, ...]:
        """Row numbers of ids; see `Partition.indices`."""
        quotient, remainder = super().indices(ids)
        xp, rows = quotient.__array_namespace__(), self.num_rows
        return quotient, xp.where(quotient == rows[0], rows[1], remainder).astype(remainder.dtype)

    def _digits(self, ids: Array) -> tuple[Array, ...]:
        xp = ids.__array_namespace__()
        quotient = (ids.astype(xp.float32) / xp.float32(self.num_collisions)).astype(ids.dtype)
        remainder = digit(ids, 1, self.num_collisions, self.num_embeddings)
        return xp.minimum(quotient, self.num_rows[0]), remainder

    def _compose(self, rows: tuple[Array, ...]) -> Array:
        return rows[0] * self.num_collisions + rows[1]
