"""The options that may differ from column to column."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from qrhash.ctr.dynamic_settings import DynamicColumnOptions
from qrhash.ctr.errors import UserError
from qrhash.ctr.options import PANELS, Option, check_values

PartitionName = Literal[
    "auto", "quotient-remainder", "mixed-radix", "chinese-remainder", "hash-trick", "full", "drop"
]
Operation = Literal["mult", "concat", "add", "project", "path"]
Combiner = Literal["mean", "sum", "sqrtn", "max"]
MULTI_TABLE = ("mixed-radix", "chinese-remainder")

# How much a column is compressed, by bytes or by rows: one of these says it.
AMOUNTS = ("compression", "collisions")
DEFAULT_COLLISIONS = 4
DEFAULT_KEY_BITS = 36

# What a column without ids has no use for.
OF_IDS = ("min_count", "partition", "compression", "collisions", "radices", "moduli")

# What only a column of lists has a use for.
OF_LISTS = ("combiner", "length", "separator")

# From keys to what a model takes: a section that says one has not the run's other.
WAYS = ("ids", "hash_size", "dynamic")

_data, _embeddings = (partial(Option, panel) for panel in PANELS[:2])


@dataclass(frozen=True, kw_only=True)
class ColumnOptions(DynamicColumnOptions):
    """What may differ from column to column."""

    partition: Annotated[
        PartitionName,
        _embeddings(
            "Family for columns longer than --threshold; 'drop' leaves them out of the model. "
            "'auto': quotient-remainder; but with --compression, and no --operation, what a plan "
            "says of each column, by how often its ids are met."
        ),
    ] = "auto"
    compression: Annotated[
        float | None,
        _embeddings(
            "How many times fewer bytes all embeddings have than full tables of float32, whatever "
            "the operation; in a column's section, its own.",
            least=1,
        ),
    ] = None
    collisions: Annotated[
        int | None,
        _embeddings(
            "Or by rows: how many ids share a row of a column's largest table, in every family. "
            "The tables have about so many times fewer rows than a full one, whose bytes go by "
            "the operation: 'concat' has rows of half the width, 'project' of a quarter. 0: as "
            "few rows as the family can. Default: 4, without --compression.",
            least=0,
        ),
    ] = None
    num_tables: Annotated[
        int,
        _embeddings(
            "Tables per column for mixed-radix, chinese-remainder, --ids keys and the compressed "
            "vectors of --dynamic.",
            least=2,
        ),
    ] = 2
    operation: Annotated[
        Operation | None,
        _embeddings(
            "How the rows of an id become its vector. Default: as planned (see --partition); else "
            "'path' with --compression, 'mult' without."
        ),
    ] = None
    combiner: Annotated[
        Combiner, _embeddings("How the vectors of a list's elements become one.")
    ] = "mean"
    param_dtype: Annotated[
        Literal["float32", "bfloat16"], _embeddings("Dtype of the tables; the maths is float32.")
    ] = "float32"
    init_stddev: Annotated[
        float, _embeddings("Standard deviation of a vector's entries at the start.", least=0)
    ] = 0.05
    min_count: Annotated[
        int, _embeddings("Categories met less often in the training lines share id 0.", least=1)
    ] = 1
    ids: Annotated[
        Literal["vocabulary", "keys"],
        _embeddings(
            "'vocabulary': number the categories of the training lines; 'keys': take the 64-bit "
            "keys as they are, without that pass and without memory for what was met."
        ),
    ] = "vocabulary"
    key_bits: Annotated[
        int | None,
        _embeddings(
            "--ids keys: how many of a key's scrambled bits name its rows, in --num-tables tables, "
            "which all such columns share; in a column's section, tables of its own. With all 64 "
            "no two keys of a column share all their rows. Default: 36; of the compressed vectors "
            "of --dynamic, tables with a quarter of its rows.",
            least=1,
            most=64,
        ),
    ] = None
    hash_size: Annotated[
        int | None,
        _embeddings(
            "Take ids modulo this size instead of from a vocabulary pass over the training lines.",
            least=2,
            most=2**31 - 1,
        ),
    ] = None

    @property
    def family(self) -> str:
        """The partition, given or not."""
        return "quotient-remainder" if self.partition == "auto" else self.partition

    @property
    def is_planned(self) -> bool:
        """Whether only `compression` says what the embeddings are: how is left to a plan."""
        return self.compression is not None and self.partition == "auto" and self.operation is None

    @property
    def takes_keys(self) -> bool:
        """Whether there is no vocabulary, and are no ids."""
        return (self.ids == "keys" or self.is_dynamic) and self.hash_size is None


@dataclass(frozen=True, kw_only=True)
class ColumnSettings(ColumnOptions):
    """The options of one column: a section of the configuration file over the run's own."""

    radices: Annotated[tuple[int, ...] | None, _embeddings("Radices of mixed-radix.")] = None
    moduli: Annotated[tuple[int, ...] | None, _embeddings("Moduli of chinese-remainder.")] = None
    widths: Annotated[tuple[int, ...] | None, _embeddings("Width of each table.")] = None
    kind: Annotated[
        Literal["category", "number", "list", "ignore"] | None, _data("What the column is used as.")
    ] = None
    length: Annotated[int | None, _data("How many elements a list may have.", least=1)] = None
    separator: Annotated[str | None, _data("What stands between the elements of text.")] = None
    use_bias: Annotated[bool, _embeddings("Whether 'project' adds a bias.")] = True

    def __post_init__(self) -> None:
        check_values(self)
        for name, family in (("radices", "mixed-radix"), ("moduli", "chinese-remainder")):
            if getattr(self, name) is not None and self.partition != family:
                raise UserError(f"{name} goes with partition {family!r}, not {self.partition!r}.")
        check_amount(self)
        check_separator("separator", self.separator)

    @property
    def is_sized_by_bytes(self) -> bool:
        """Whether `compression` says how many rows the tables have."""
        is_fixed = self.partition in ("full", "drop") or self.radices or self.moduli
        return self.compression is not None and not is_fixed and not self.takes_keys

    @property
    def combined_by(self) -> Operation:
        """The operation, given or not."""
        if self.operation is not None:
            return self.operation
        is_for_path = self.is_sized_by_bytes and self.family == "quotient-remainder"
        return "path" if is_for_path and self.widths is None else "mult"


def check_amount(settings: ColumnOptions) -> None:
    """Raises a UserError if two options say how much is compressed."""
    if settings.compression is not None and settings.collisions is not None:
        raise UserError(
            "compression (in bytes) and collisions (in rows) say the same thing in two ways: give "
            f"one of them, got {settings.compression} and {settings.collisions}."
        )


def check_separator(name: str, separator: str | None) -> None:
    """Raises a UserError for a separator that separates nothing."""
    if separator == "":
        raise UserError(f"{name} must be what stands between the elements of a list, got ''.")
