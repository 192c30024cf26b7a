"""Every option of a run.

`Settings` is the one place where an option has its name, type, default, help and least value:
the command line and the configuration file are both made from its fields.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Annotated, Any, Literal

from qrhash import EmbedConfig
from qrhash.ctr.column_settings import (
    AMOUNTS,
    MULTI_TABLE,
    OF_IDS,
    OF_LISTS,
    WAYS,
    ColumnOptions,
    ColumnSettings,
    check_amount,
    check_separator,
)
from qrhash.ctr.data.criteo import CATEGORIES
from qrhash.ctr.data_settings import OF_TABLES, DataOptions, check_data
from qrhash.ctr.dynamic_settings import DynamicColumnOptions, DynamicOptions, check_dynamic
from qrhash.ctr.errors import UserError
from qrhash.ctr.options import PANELS, Option, build, check_values, offered, widths
from qrhash.ctr.tower_settings import TowerOptions, check_towers

_embeddings, _model, _training, _devices, _output = (partial(Option, panel) for panel in PANELS[1:])


@dataclass(frozen=True, kw_only=True)
class Settings(ColumnOptions, TowerOptions, DynamicOptions, DataOptions):
    """The options of a run.

    Attributes:
      columns: column name -> the `ColumnSettings` that differ there.
    """

    threshold: Annotated[
        int, _embeddings("Columns of at most this many ids keep a full table.", least=0)
    ] = 200
    features: Annotated[int, _embeddings("Width of an embedding vector.", least=1, most=2**16)] = 16
    large_table_rows: Annotated[
        int,
        _embeddings(
            "Tables of at least this many rows are updated by the rows touched, and split over "
            "the devices of a mesh.",
            least=1,
        ),
    ] = EmbedConfig.large_table_rows
    model: Annotated[
        Literal["dlrm", "dcn", "two-tower"],
        _model(
            "DLRM, or the deep and cross network (version 2), of clicks; or two towers, which "
            "find the --items of the positive rows."
        ),
    ] = "dlrm"
    bottom_mlp: Annotated[
        str, _model("DLRM: hidden widths over the integers; --features follows.")
    ] = "512-256-64"
    top_mlp: Annotated[str, _model("DLRM: hidden widths over the interactions.")] = "512-256"
    deep_mlp: Annotated[str, _model("DCN: hidden widths beside the cross layers.")] = "512-256-64"
    cross_layers: Annotated[int, _model("DCN: number of cross layers.", least=1)] = 3
    epochs: Annotated[int, _training("Passes over the training lines.", least=1)] = 1
    batch_size: Annotated[int, _training("Rows per step.", least=1)] = 128
    validation_fraction: Annotated[
        float,
        _training(
            "Last part of the training rows, held back to choose the best point of the learning "
            "curve by: its model is tested and kept. 0: none, the last model counts.",
            least=0,
        ),
    ] = 0.0
    patience: Annotated[
        int | None,
        _training(
            "Points of the learning curve in a row that may be no better on the validation rows "
            "before the training ends. Default: it goes to its end.",
            least=1,
        ),
    ] = None
    table_lr: Annotated[float, _training("Adagrad's learning rate, tables.", least=0)] = 0.05
    table_accumulator: Annotated[
        float,
        _training("Adagrad's initial accumulator: 0.1 would freeze the tables.", least=0),
    ] = 1e-8
    rounding: Annotated[
        Literal["stochastic", "nearest"],
        _training(
            "How tables of bfloat16 are rounded in a step: large ones by chance, and what is "
            "rounded off small ones is kept; or all to the nearest."
        ),
    ] = "stochastic"
    dense_updates: Annotated[
        bool,
        _training("Update whole tables at every step, not only the rows that the batch touches."),
    ] = False
    dense_lr: Annotated[float, _training("Adam's first learning rate, all else.", least=0)] = 1e-3
    seed: Annotated[
        int,
        _training(
            "The same seed gives the same numbers (and the same synthetic rows).",
            least=0,
            most=2**31 - 1,
        ),
    ] = 0
    mesh: Annotated[
        str | None,
        _devices(
            "Devices to train on, such as data=2,model=4: batches are split over the axis data, "
            "large tables over model (over data, if it is the only one). Default: one device."
        ),
    ] = None
    exchange: Annotated[
        Literal["auto", "reduce", "all_to_all"],
        _devices("How rows travel between devices; auto: whichever moves less."),
    ] = "auto"
    coordinator: Annotated[
        str | None,
        _devices("host:port of process 0, to train with several processes, each started so."),
    ] = None
    num_processes: Annotated[int | None, _devices("How many processes.", least=1)] = None
    process_id: Annotated[int | None, _devices("Which of them this is.", least=0)] = None
    coordinator_timeout: Annotated[
        int, _devices("Seconds to wait for the other processes.", least=1)
    ] = 300
    output_dir: Annotated[
        str | None,
        _output("New directory for metrics, picture and checkpoints; default runs/<date-time>."),
    ] = None
    checkpoint_every: Annotated[
        int | None,
        _output(
            "Steps from one checkpoint to the next; 0: none. Default: at every point of the "
            "learning curve.",
            least=0,
        ),
    ] = None
    keep_checkpoints: Annotated[int, _output("How many checkpoints to keep.", least=1)] = 3
    resume: Annotated[
        bool,
        _output(
            "Go on with the run in --output-dir (default: the last one under runs) from its last "
            "checkpoint, with the options that it began with."
        ),
    ] = False
    evaluations: Annotated[int, _output("Points of the learning curve.", least=1)] = 10
    eval_rows: Annotated[
        int,
        _output(
            "Rows to score at a point: test rows, or validation rows if there are any.", least=1
        ),
    ] = 10_000
    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_values(self)
        if not isinstance(self.columns, Mapping):
            raise UserError(f"columns must be sections, got {self.columns!r}.")
        is_criteo = self.data is None or self.preset == "criteo"
        check_data(self, is_criteo=is_criteo)
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction must be below 1, got {self.validation_fraction}.")
        if self.patience is not None and not self.validation_fraction:
            raise UserError("patience goes with a validation_fraction above 0.")
        if self.validation_fraction and self.checkpoint_every == 0:
            raise UserError(
                "validation_fraction keeps the best model as a checkpoint, and does not go with "
                "checkpoint_every=0."
            )
        check_towers(self, self.model)
        for name in ("bottom_mlp", "top_mlp", "deep_mlp", "tower_mlp"):
            widths(name, getattr(self, name))
        for name, section in self.columns.items():
            if name not in CATEGORIES and is_criteo:
                known = f"{CATEGORIES[0]} to {CATEGORIES[-1]}"
                raise UserError(f"columns.{name} goes with --data; Criteo's are {known}.")
            if not isinstance(section, Mapping):
                raise UserError(f"columns.{name} must be a section, got {section!r}.")
            column = self.column(name)
            unfit = [option for option in OF_LISTS if option in section]
            if unfit and (column.kind == "category" or is_criteo):
                raise UserError(f"columns.{name}: {unfit[0]} goes with kind 'list'.")
            if column.kind is not None and is_criteo:
                raise UserError(
                    f"columns.{name}: kind goes with a table in --data; partition 'drop' leaves a "
                    "category of the Criteo format out."
                )
            if column.kind in ("number", "ignore") and len(section) > 1:
                raise UserError(
                    f"columns.{name}: kind {column.kind!r} has no embedding, and takes no other "
                    "options."
                )
            unfit = [option for option in OF_IDS if section.get(option, "drop") != "drop"]
            if column.takes_keys and unfit:
                raise UserError(
                    f"columns.{name}: {unfit[0]} goes with ids from a vocabulary, not with 'keys', "
                    "whose tables are of key_bits and num_tables."
                )
            if "compression" in section and not column.is_sized_by_bytes:
                raise UserError(
                    f"columns.{name}: compression sets the rows of a compressed column, and has no "
                    f"meaning beside partition {column.partition!r} or radices or moduli."
                )
        check_dynamic(self, {name: self.column(name) for name in self.columns})
        check_amount(self)
        check_separator("list_separator", self.list_separator)
        of_columns = [self, *map(self.column, self.columns)]
        families = {options.partition for options in of_columns}
        has_keys = any(options.takes_keys for options in of_columns)
        if self.num_tables != Settings.num_tables and not (
            has_keys or families.intersection(MULTI_TABLE)
        ):
            raise UserError(
                f"num_tables goes with partition {' or '.join(MULTI_TABLE)}, or with ids 'keys', "
                f"not {self.family!r}."
            )
        if self.ids == "keys" and self.hash_size is not None:
            raise UserError("ids 'keys' and hash_size are two ways: give one of them.")
        is_plain = self.family == "quotient-remainder" or self.partition == "drop"
        if not is_plain and all(options.takes_keys for options in of_columns):
            raise UserError(
                f"partition {self.partition!r} goes with ids from a vocabulary, not with 'keys'."
            )
        if self.ids == "keys" and self.compression is not None:
            raise UserError(
                "compression goes with a vocabulary; the tables of ids 'keys' have the sizes that "
                "key_bits and num_tables give them."
            )

    def column(self, name: str) -> ColumnSettings:
        """The options of a column of categories, or of lists of them."""
        shared = {option.name: getattr(self, option.name) for option in fields(ColumnOptions)}
        shared |= {"length": self.list_length, "separator": self.list_separator}
        section = self.columns.get(name, {})
        if not section.keys().isdisjoint(AMOUNTS):
            shared |= dict.fromkeys(AMOUNTS)
        if not section.keys().isdisjoint(WAYS):
            shared |= {name: getattr(ColumnOptions, name) for name in WAYS}
        return build(ColumnSettings, shared | dict(section), f"the section columns.{name}")

    @property
    def kinds(self) -> dict[str, str | None]:
        """Column -> what its section makes it; None: a category, or a list of them."""
        kinds = {name: self.column(name).kind for name in self.columns}
        of_lists = dict.fromkeys(filter(self._speaks_of_lists, self.columns), "list")
        ignored = {name: "ignored" for name, kind in kinds.items() if kind == "ignore"}
        return kinds | of_lists | ignored

    @property
    def may_be_criteo(self) -> bool:
        """Whether the data may turn out to be in the Criteo format: no option speaks of columns."""
        is_given = any(getattr(self, name) is not None for name in OF_TABLES)
        kinds = {section.get("kind") for section in self.columns.values()}
        is_given |= self.delimiter != "auto" or self.header != "auto" or bool(kinds - {None})
        is_given |= any(map(self._speaks_of_lists, self.columns))
        return self.preset == "auto" and not is_given

    def _speaks_of_lists(self, name: str) -> bool:
        """Whether the section of a column has options that only lists have."""
        return not self.columns[name].keys().isdisjoint(OF_LISTS)

    def as_dict(self) -> dict[str, Any]:
        """The options as plain values, for the records of a run."""
        return asdict(self)


def options() -> list[tuple[str, Any, Any, Option]]:
    """(name, type, default, option) of all that the command line offers, panel by panel.

    In a panel the options come last that only some runs have.
    """
    some = {each[0] for kind in (TowerOptions, DynamicOptions) for each in offered(kind)}
    some |= {each[0] for each in offered(DynamicColumnOptions)}
    return sorted(
        offered(Settings), key=lambda each: (PANELS.index(each[-1].panel), each[0] in some)
    )
