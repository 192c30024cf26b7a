"""Settings -> the tables that grow: one that columns share, or one of a column's own.

A table's bytes are all it takes besides the optimizer's state: the keys' own rows, the compressed
vectors of the others, the index of the keys, and the candidates that are counted until they have
earned a row, of which there may be as many as rows.

The compressed vectors come from tables with a quarter as many rows, all of them together, as there
are rows of keys' own; and what bytes are left where the index would leap to its next size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from qrhash import EmbedConfig, KeyDigits, MeshLayout, MultiHash, Partition
from qrhash.arithmetic import MOST_KEYS
from qrhash.ctr.column_settings import ColumnSettings
from qrhash.ctr.dynamic_settings import Room, room
from qrhash.ctr.errors import UserError
from qrhash.ctr.options import split_names
from qrhash.ctr.settings import Settings
from qrhash.dynamic import DynamicConfig, StepsSinceUse
from qrhash.dynamic.admission import admit_after
from qrhash.dynamic.eviction import longest_unused
from qrhash.dynamic.index import shard_bytes

ColumnConfig: TypeAlias = EmbedConfig | DynamicConfig

# Rows of keys' own for each row of the tables of compressed vectors.
_OWN_ROWS = 4


def dynamic_configs(
    settings: Settings, names: Sequence[str], layout: MeshLayout | None
) -> dict[str, DynamicConfig]:
    """The tables of the columns that grow.

    Args:
      settings: the options of the run.
      names: the columns.
      layout: how large tables are split over devices.

    Returns:
      {column name: config}. Columns of equal configs share one table. Of two towers each has one,
      of half the room.

    Raises:
      UserError: there is room for no row.
    """
    shared = [name for name in names if "dynamic" not in settings.columns.get(name, {})]
    items = split_names(settings.items)
    towers = [
        tower
        for is_item in (False, True)
        if (tower := [name for name in shared if (name in items) == is_item])
    ]
    configs: dict[str, DynamicConfig] = {}
    for seed, tower in enumerate(towers):
        options = settings.column(tower[0])
        config = _config("dynamic", settings, options, layout, seed, parts=len(towers))
        configs |= dict.fromkeys(tower, config)
    for seed, name in enumerate(names, start=len(towers)):
        if name not in shared:
            options = settings.column(name)
            configs[name] = _config(f"columns.{name}: dynamic", settings, options, layout, seed)
    return configs


def dynamic_tables(configs: Mapping[str, Any]) -> dict[DynamicConfig, list[str]]:
    """The tables that grow among configs, and the columns that each of them is shared by."""
    tables: dict[DynamicConfig, list[str]] = {}
    for name, config in configs.items():
        if isinstance(config, DynamicConfig):
            # How the vectors of a list are pooled is a column's own affair.
            tables.setdefault(replace(config, combiner="sum"), []).append(name)
    return tables


def stored_table(settings: Settings, configs: Mapping[str, Any]) -> DynamicConfig | None:
    """The one table that grows, if it has more rows than are to be on the device."""
    tables = list(dynamic_tables(configs))
    if settings.cache_rows is None or not tables or tables[0].capacity <= settings.cache_rows:
        return None
    return tables[0]


def unsized(options: ColumnSettings) -> dict[str, Any]:
    """What of a config does not go by its size."""
    return {
        "dtype": "float32",
        "param_dtype": options.param_dtype,
        "use_bias": options.use_bias,
        "init_stddev": options.init_stddev,
    }


def num_bytes(config: ColumnConfig) -> int:
    """The memory of what is trained of an embedding: tables and projection."""
    return config.num_params * config.param_dtype.itemsize


def num_rows(config: ColumnConfig) -> int:
    """How many rows its tables have."""
    if isinstance(config, EmbedConfig):
        return sum(config.partition.num_rows)
    return config.capacity + (0 if config.refused is None else num_rows(config.refused))


def index_bytes(config: DynamicConfig) -> int:
    """The memory of a table's index, and of the candidates beside it."""
    if config.layout is None:
        return shard_bytes(config.capacity, config.admission)
    shards = config.layout.num_shards
    return shards * shard_bytes(config.capacity, config.admission, shards)


def _config(
    what: str,
    settings: Settings,
    options: ColumnSettings,
    layout: MeshLayout | None,
    seed: int,
    parts: int = 1,
) -> DynamicConfig:
    """A table of what the options give room to, or of one of so many parts of it."""
    assert options.dynamic is not None  # What dynamic means.
    wanted = room(options.dynamic)

    def of_rows(capacity: int, more: int = 0) -> DynamicConfig:
        refused = None
        if options.newcomers == "compressed":
            refused = EmbedConfig(
                _partition_of_newcomers(options, capacity, more, seed),
                settings.features,
                options.combined_by,
                widths=options.widths,
                large_table_rows=settings.large_table_rows,
                **unsized(options),
            )
        by_age = options.evict_after
        return DynamicConfig(
            capacity,
            settings.features,
            admission=admit_after(options.admit_after, capacity),
            eviction=StepsSinceUse(by_age) if by_age else longest_unused(capacity),
            refused=refused,
            init_stddev=options.init_stddev if refused is None else None,
            seed=seed,
            dtype="float32",
            param_dtype=options.param_dtype,
            large_table_rows=settings.large_table_rows,
        )

    try:
        config = of_rows(*_rows(wanted, parts, of_rows))
        refused = config.refused and replace(config.refused, layout=layout)
        return replace(config, layout=layout, refused=refused)
    except ValueError as error:
        raise UserError(f"{what}={options.dynamic!r}: {error}") from error


def _partition_of_newcomers(
    options: ColumnSettings, capacity: int, more: int, seed: int
) -> Partition:
    """Tables of compressed vectors, with so many more rows each than the capacity asks for."""
    if options.key_bits is not None:
        return KeyDigits(options.key_bits, options.num_tables, seed)
    rows = max(1, capacity // (_OWN_ROWS * options.num_tables)) + more
    return MultiHash((rows,) * options.num_tables, seed)


def _rows(wanted: Room, parts: int, of_rows: Any) -> tuple[int, int]:
    """How many rows there is room for in one of so many parts, and how many more for newcomers.

    The latter in each of the tables of compressed vectors: what is left before an index leaps.
    """
    if wanted.rows is not None:
        return max(1, wanted.rows // parts), 0
    assert wanted.num_bytes is not None
    allowed = wanted.num_bytes // parts

    def taken(capacity: int) -> int:
        config: DynamicConfig = of_rows(capacity)
        return num_bytes(config) + index_bytes(config)

    if taken(1) > allowed:
        raise ValueError(f"one row takes {taken(1):,} bytes, more than the {allowed:,} there are.")
    least, most = 1, 2
    while most <= MOST_KEYS and taken(most) <= allowed:
        least, most = most, 2 * most
    most = min(most, MOST_KEYS + 1)
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if taken(middle) <= allowed else (least, middle)
    if least == MOST_KEYS:
        of_most = f"the most rows, {least:,}, take {taken(least):,} bytes"
        raise ValueError(f"{of_most} of the {allowed:,} there are.")
    of_one_more = num_bytes(of_rows(least, 1)) - num_bytes(of_rows(least))
    return least, (allowed - taken(least)) // of_one_more if of_one_more else 0
