"""What look-ups, gradients and optimizers know of a table, whatever keeps it.

A `Table` is a node of the parameters' tree that is looked up: it says how its rows are read and
what their gradients are. Its leaves are arrays; for each of them a `Storage` says where the rows of
that array are, so that an optimizer finds the same rows in the parameter and in its own state.

A new kind of table is a new file with a subclass of `Table`, registered as a pytree
(`jax.tree_util.register_dataclass`). Its arrays' gradients may go by the storages there are. Nobody
outside asks which kind a table is; `qrhash.kinds.as_table` makes one of a plain array.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, TypeAlias, TypeGuard

import jax

from qrhash.types import Array, PyTree

TableLike: TypeAlias = "Array | Table"


class Segment(NamedTuple):
    """Some look-ups, next to each other, that all go to one part of a table.

    Attributes:
      offset: first row of the part.
      num_rows: its number of rows.
      lookups: how many look-ups.
    """

    offset: int
    num_rows: int
    lookups: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookUps:
    """What is known of the look-ups in a table, but for their row numbers.

    Attributes:
      segments: which look-ups, in the order of the indices, go to which part of the table.
      batch_axis: the axis of the indices that is the batch's: a mesh splits it.
      is_whole: whether all rows of the table are looked up, as `attend` does: its gradient is then
        one of the whole table, not one of the rows named.
      is_distinct: whether no row is named twice: its gradients are merged as they come.
    """

    segments: tuple[Segment, ...]
    batch_axis: int = 0
    is_whole: bool = False
    is_distinct: bool = False

    @classmethod
    def of(cls, indices: Sequence[Any], num_rows: int, **options: Any) -> "LookUps":
        """Of indices [*shape] that go anywhere in a table."""
        segments = tuple(Segment(0, num_rows, index.size) for index in indices)
        return cls(segments=segments, **options)

    def within(self, indices: Sequence[Any], num_rows: int) -> "LookUps":
        """The same, with these indices, anywhere in a table of so many rows."""
        return self.of(indices, num_rows, batch_axis=self.batch_axis, is_whole=self.is_whole)

    def times(self, size: int) -> "LookUps":
        """So many times as many: the new axis of the indices is `batch_axis`."""
        return self._scaled(lambda lookups: lookups * size)

    def over(self, devices: int) -> "LookUps":
        """Those of one device of so many."""
        return self._scaled(lambda lookups: lookups // devices)

    def _scaled(self, scale: Callable[[int], int]) -> "LookUps":
        segments = tuple(each._replace(lookups=scale(each.lookups)) for each in self.segments)
        return dataclasses.replace(self, segments=segments)


class Table(abc.ABC):
    """A table [num_rows, width]: a pytree whose leaves are its arrays.

    Its floating-point arrays are of rows [width] along one axis, and `take` is linear in them.
    Where it is said what a method does with arrays, the leaves may be abstract or of any other
    kind: a table of gradients, of shardings, of types.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """[num_rows, width]."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """Dtype of the rows."""

    @abc.abstractmethod
    def take(self, indices: Sequence[jax.Array], look_ups: LookUps) -> list[jax.Array]:
        """For each index [*shape], rows [*shape, width]; zeros for those outside the table."""

    @abc.abstractmethod
    def read(
        self, indices: Sequence[jax.Array], look_ups: LookUps
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The same rows, ordered before any update by the row numbers that come back with them.

        Of those outside the table, num_rows comes back.
        """

    @abc.abstractmethod
    def take_from_many(self, indices: Sequence[jax.Array], look_ups: LookUps) -> list[jax.Array]:
        """Under `jax.vmap` over tables: arrays [n, ...], and indices with n along `batch_axis`.

        The rows have n along the same axis.
        """

    @abc.abstractmethod
    def gradient(
        self, indices: Sequence[jax.Array], cotangents: Sequence[jax.Array], look_ups: LookUps
    ) -> Self:
        """The ordinary gradients of its arrays, of `wide_dtype`, given those of the rows."""

    @abc.abstractmethod
    def row_grads(
        self,
        indices: Sequence[jax.Array],
        values: Sequence[jax.Array],
        look_ups: LookUps,
        *,
        num_loops: int = 0,
    ) -> Self:
        """The gradients of its arrays as `RowGrads`, each with the storage of its array.

        Row numbers [*shape] and values [*shape, width] are those of look-ups; they have `num_loops`
        more leading axes than the look-ups. There may be none of them, see `no_grads`.
        """

    @abc.abstractmethod
    def products(self, query: jax.Array) -> "Table":
        """Inner products of its rows with queries [..., width]: a table [num_rows, ...]."""

    @abc.abstractmethod
    def to_array(self) -> jax.Array:
        """All rows in their order, [num_rows, width]."""

    @property
    def is_at_hand(self) -> bool:
        """Whether it is one array [num_rows, width] of this device, whose rows can be just read."""
        return False

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def no_grads(self) -> Self:
        """The gradients of its arrays where it was not looked up."""
        return self.row_grads([], [], LookUps(segments=()))

    def as_given(self) -> Any:
        """What stands for it in parameters: itself, or the one array that it wraps."""
        return self

    def shardings(self) -> PyTree | None:
        """Where its arrays belong, each as a `jax.sharding.Sharding`; None: wherever they are."""
        return None

    def warn_if_elsewhere(self) -> None:
        """Warns of arrays that are not where they belong."""
        return

    # A kind that is split saves what every device can write and read by itself, instead.
    def to_file(self) -> jax.Array:
        """Its rows in their order, perhaps with padding behind: what a checkpoint writes."""
        return self.to_array()

    def from_file(self, rows: jax.Array) -> Self:
        """A table of the same layout with these rows, as `to_file` gives them."""
        raise ValueError(f"tables of kind {type(self).__name__} cannot be restored.")

    @property
    def file_type(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of `to_file`; and its sharding, if it is not on one device."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)


def is_table(node: Any) -> TypeGuard[Table]:
    """Whether a node of a tree is a `Table`: what `is_leaf` of `jax.tree.map` takes."""
    return isinstance(node, Table)


class Storage(abc.ABC):
    """Where the rows of one array are: how an update reaches them.

    Row numbers are [m] until they are merged. Merged, each names its row once, and they stand where
    the rows are: [m] on one device, numbers within the shards [S, m] on a mesh.
    """

    @property
    @abc.abstractmethod
    def row_axis(self) -> int:
        """The axis of the array along which its rows are."""

    @abc.abstractmethod
    def array_shape(self, num_rows: int, row: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of an array of so many rows, each of the shape `row`."""

    @abc.abstractmethod
    def flatten(
        self, indices: Sequence[jax.Array], values: Sequence[jax.Array], *, batch_axis: int = 0
    ) -> tuple[jax.Array, jax.Array]:
        """Row numbers [*shape] and values [*shape, *row] of look-ups -> [m] and [m, *row]."""

    @abc.abstractmethod
    def merge(
        self, indices: jax.Array, values: jax.Array, num_rows: int
    ) -> tuple[jax.Array, jax.Array]:
        """Row numbers and sums, merged where the rows are."""

    @abc.abstractmethod
    def read(
        self, arrays: Sequence[jax.Array], indices: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The rows of several arrays named by merged row numbers; see `qrhash.rows.read_rows`."""

    @abc.abstractmethod
    def add(
        self, array: jax.Array, indices: jax.Array, values: jax.Array, *, seldom: bool = False
    ) -> jax.Array:
        """The array plus values at the rows named, merged; in place where XLA may.

        What `seldom` names any row is skipped where it does not.
        """

    @abc.abstractmethod
    def set(
        self, array: jax.Array, indices: jax.Array, values: jax.Array, *, seldom: bool = False
    ) -> jax.Array:
        """The array with other values at the rows named; as `add`."""

    def add_unmerged(
        self, array: jax.Array, indices: jax.Array, values: jax.Array, num_rows: int
    ) -> jax.Array:
        """The array plus values at row numbers [m] that are not merged yet."""
        return self.add(array, *self.merge(indices, values, num_rows))

    def pack(self, indices: jax.Array, values: jax.Array, num_rows: int) -> "Packed | None":
        """Gradients ready to be sent to their rows with little room; None: `merge` is the way."""
        del indices, values, num_rows
        return None

    def joined(self, other: "Storage") -> "Storage":
        """That of the row numbers of both, side by side."""
        del other
        return self

    def to_order(self, array: jax.Array, num_rows: int) -> jax.Array:
        """The array [num_rows, ...] of all rows in their order: for those that fit one device."""
        del num_rows
        return array

    def from_order(self, rows: jax.Array) -> jax.Array:
        """The inverse."""
        return rows

    def constrain(self, array: jax.Array) -> jax.Array:
        """The array laid out as its rows are to be."""
        return array


class Packed(abc.ABC):
    """Gradients packed for an exchange of fixed size.

    Attributes:
      overflows: whether there is too little room: a bool [], the same on all devices.
    """

    overflows: jax.Array

    @abc.abstractmethod
    def send(self) -> tuple[jax.Array, jax.Array]:
        """As `Storage.merge`, right unless it overflows; of fewer row numbers."""

    @abc.abstractmethod
    def send_all(self) -> tuple[jax.Array, jax.Array]:
        """As `Storage.merge`: every device gets everything, and keeps what is its own."""
