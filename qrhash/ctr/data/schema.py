"""What the columns of the data are used as."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from qrhash.ctr.data.criteo import CATEGORIES, COLUMNS, INTEGERS, LABEL

Use = Literal["label", "number", "category", "list", "time", "weight", "ignored"]

# What a column holds. A CSV file holds text alone: there it is what the text says.
Holds = Literal["integer", "number", "boolean", "time", "text", "list", "nothing", "nested"]


@dataclass(frozen=True)
class Column:
    """A column of the data.

    Attributes:
      name: its name.
      type: its type, in the words of the file.
      holds: what kind of values.
      use: what it is used as.
      reason: why, where that is no matter of course.
      length: of a column of lists: how many elements one may have, the same for the whole run.
      separator: where text is cut into lists; None: it is written as JSON or Python write them.
      decimal_comma: of numbers in text: whether a comma stands before the fraction.
    """

    name: str
    type: str
    holds: Holds
    use: Use
    reason: str = ""
    length: int | None = None
    separator: str | None = None
    decimal_comma: bool = False


@dataclass(frozen=True, kw_only=True)
class Schema:
    """All columns of the data.

    Attributes:
      columns: in the order of the data.
      preset: "criteo": integers that are clipped at 0, and categories of hex digits; "table":
        signed numbers, and categories of integers or text.
      positive: the labels that are clicks, where labels are words.
      positive_from: else, from which value on a label is a click; None: labels are 0 and 1.
      label_required: whether a row without one is malformed, and data without the column.
      all_positive: whether there is no label, because every row is a click.
    """

    columns: tuple[Column, ...]
    preset: Literal["criteo", "table"] = "table"
    positive: tuple[str, ...] = ()
    positive_from: float | None = None
    label_required: bool = True
    all_positive: bool = False

    @property
    def label(self) -> str | None:
        """The column of clicks, where there is one."""
        return next(iter(self._names("label")), None)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The columns of numbers."""
        return self._names("number")

    @property
    def categories(self) -> tuple[str, ...]:
        """The columns of categories."""
        return self._names("category")

    @property
    def lists(self) -> tuple[str, ...]:
        """The columns of lists of categories."""
        return self._names("list")

    @property
    def embedded(self) -> tuple[str, ...]:
        """The columns that have ids and vectors: those of categories, and then those of lists."""
        return self.categories + self.lists

    @property
    def time(self) -> str | None:
        """The column that says which rows come last, where one is named."""
        return next(iter(self._names("time")), None)

    @property
    def weight(self) -> str | None:
        """The column that says how much a row counts in the training, where one is named."""
        return next(iter(self._names("weight")), None)

    @property
    def used(self) -> tuple[Column, ...]:
        """The columns that are read."""
        return tuple(column for column in self.columns if column.use != "ignored")

    def without(self, *uses: Use) -> "Schema":
        """The same columns, with those of some uses left out."""
        kept = tuple(column for column in self.columns if column.use not in uses)
        return replace(self, columns=kept)

    def only(self, names: Collection[str]) -> "Schema":
        """The same columns, of these names alone."""
        return replace(self, columns=tuple(each for each in self.columns if each.name in names))

    def with_lengths(self, lengths: Mapping[str, int]) -> "Schema":
        """The same columns, with the lengths of some columns of lists."""
        columns = tuple(
            replace(column, length=lengths.get(column.name, column.length))
            for column in self.columns
        )
        return replace(self, columns=columns)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Schema":
        """The schema of which `as_dict` made these values."""
        columns = tuple(Column(**column) for column in values["columns"])
        positive = tuple(values.get("positive", ()))  # An earlier version knew none.
        return cls(**{**values, "columns": columns, "positive": positive})

    def of_use(self, use: Use) -> tuple[Column, ...]:
        """The columns that are used so."""
        return tuple(column for column in self.columns if column.use == use)

    def _names(self, use: Use) -> tuple[str, ...]:
        return tuple(column.name for column in self.of_use(use))


def _criteo(name: str) -> Column:
    if name == LABEL:
        return Column(name, "0 or 1", "integer", "label")
    if name in INTEGERS:
        return Column(name, "integer", "integer", "number")
    assert name in CATEGORIES
    return Column(name, "hex digits", "text", "category")


CRITEO = Schema(columns=tuple(map(_criteo, COLUMNS)), preset="criteo")
