"""The options of `qrhash plan` itself; what the columns are, the settings of a run say."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from qrhash.ctr.column_settings import ColumnOptions
from qrhash.ctr.errors import UserError
from qrhash.ctr.options import Option, bytes_of, check_values, split_names

_plan = partial(Option, "Plan")

# What of a run's settings a plan goes by, beside its data: the command line offers these.
PLANNED_BY = (
    "model",
    "items",
    "features",
    "threshold",
    "min_count",
    "hash_size",
    "large_table_rows",
    "mesh",
)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is planned, and where it goes."""

    num_bytes: Annotated[
        str | None,
        _plan(
            "The budget, such as 64MB or 1.5GiB: what each device may hold of tables, projections "
            "and optimizer state, padding included. Required."
        ),
    ] = None
    sizes: Annotated[
        str | None,
        _plan(
            "Without --data: a table of vocabulary sizes, .csv (column,size and, if known, "
            "length,counts), .json or .toml. Without counts Zipf's law is assumed."
        ),
    ] = None
    devices: Annotated[
        int | None,
        _plan("Devices that large tables are split over. Default: by --mesh, or 1.", least=1),
    ] = None
    optimizer: Annotated[
        Literal["none", "sgd", "rowwise_adagrad", "adagrad", "adam"],
        _plan(
            "Whose state is counted; qrhash train learns tables by adagrad. none: the parameters "
            "alone, as of a model that is served."
        ),
    ] = "adagrad"
    num_examples: Annotated[
        int | None,
        _plan(
            "With --sizes: how many rows there will be to learn from. Default: as many as the "
            "counts say, or as meet the rarest id of the longest column once.",
            least=1,
        ),
    ] = None
    dynamic_columns: Annotated[
        str | None,
        _plan(
            "Columns whose keys keep coming, a,b: they get tables that grow, with rows of their "
            "own for the keys met often enough, and compressed vectors for all others."
        ),
    ] = None
    allow_dynamic: Annotated[
        bool,
        _plan(
            "Whether other columns of 1,000 keys or more may have tables that grow too, where "
            "that loses less."
        ),
    ] = False
    admit_after: Annotated[
        int,
        _plan("Of tables that grow: how often a key is met before it has a row.", least=1),
    ] = ColumnOptions.admit_after
    output: Annotated[
        str | None, _plan("Where the file for qrhash train --config goes, such as plan.toml.")
    ] = None
    picture: Annotated[str | None, _plan("Where the picture goes, such as plan.png.")] = None
    overwrite: Annotated[bool, _plan("Whether there may be such files.")] = False

    def __post_init__(self) -> None:
        check_values(self)
        if self.num_bytes is None:
            raise UserError("--num-bytes must be given: what each device may hold, such as 64MB.")
        if bytes_of(self.num_bytes) is None:
            raise UserError(
                f"num_bytes must be a size such as 64MB, 1.5GiB or 5000000, got {self.num_bytes!r}."
            )
        if self.picture is not None and not self.picture.endswith(".png"):
            raise UserError(f"--picture must end in .png, got {self.picture!r}.")
        if self.sizes is None and self.num_examples is not None:
            raise UserError("--num-examples goes with --sizes; data are counted.")
        is_any = self.allow_dynamic or split_names(self.dynamic_columns)
        if self.admit_after != PlanOptions.admit_after and not is_any:
            raise UserError("--admit-after goes with --dynamic-columns or --allow-dynamic.")

    @property
    def budget(self) -> int:
        """Bytes on each device."""
        return bytes_of(self.num_bytes or "") or 0
