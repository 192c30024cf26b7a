"""What a run makes of the columns of its data: shown before it trains."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from qrhash.ctr.data.inference import listed
from qrhash.ctr.data.schema import Column, Schema
from qrhash.ctr.model.columns import tables_of
from qrhash.ctr.model.room import ColumnConfig, dynamic_tables, num_bytes
from qrhash.dynamic import DynamicConfig

_MOST_ROWS = 60  # one for each column

HEADER = ("column", "type", "used as", "ids", "embedding")


def overview(
    schema: Schema,
    sizes: Mapping[str, int | None],
    configs: Mapping[str, ColumnConfig],
) -> list[tuple[str, ...]]:
    """The rows of a table with the columns of `HEADER`: one for each column; or of a preset, whose
    columns are known, and of more columns than can be looked through, one for all that are alike.

    Args:
      schema: the columns of the data.
      sizes: category -> number of ids; None, if it takes keys.
      configs: category -> its embedding, of those in the model.
    """
    if schema.preset == "table" and len(schema.columns) <= _MOST_ROWS:
        tables = dynamic_tables(configs).values()
        shared = {name: len(names) for names in tables if len(names) > 1 for name in names}
        return [tuple(_row(column, sizes, configs, shared)) for column in schema.columns]
    alike: dict[tuple[str, ...], list[Column]] = {}
    for column in schema.columns:
        config = configs.get(column.name)
        how = kind_of(config) if config else "dropped" if column.name in sizes else ""
        use = f"ignored ({column.reason})" if column.use == "ignored" else column.use
        alike.setdefault((column.type, use, how), []).append(column)
    return [
        (_names(columns), *kind, *_together(how, columns, sizes, configs))
        for (*kind, how), columns in alike.items()
    ]


def _together(
    how: str,
    columns: Sequence[Column],
    sizes: Mapping[str, int | None],
    configs: Mapping[str, ColumnConfig],
) -> tuple[str, str]:
    """From the fewest to the most ids of some columns, and what all of them take."""
    found = {sizes[column.name] for column in columns if column.name in sizes}
    known = sorted(size for size in found if size is not None)
    ends = " to ".join(f"{size:,}" for size in dict.fromkeys(known[:1] + known[-1:]))
    used = tables_of({each.name: configs[each.name] for each in columns if each.name in configs})
    taken = f": {sum(map(num_bytes, used)):,} bytes" if used else ""
    return "keys" if None in found else ends, how + taken


def _names(columns: Sequence[Column]) -> str:
    """Names such as C1, C2, C3 and C7, as C1 to C3, C7."""
    runs: list[list[str]] = []
    for name in (column.name for column in columns):
        if runs and name == _next(runs[-1][-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    shown = [run if len(run) < 3 else [f"{run[0]} to {run[-1]}"] for run in runs]
    return listed(itertools.chain.from_iterable(shown))


def _next(name: str) -> str:
    """The name with the next number."""
    letters = name.rstrip("0123456789")
    return f"{letters}{int(name[len(letters) :] or -1) + 1}"


def _row(
    column: Column,
    sizes: Mapping[str, int | None],
    configs: Mapping[str, ColumnConfig],
    shared: Mapping[str, int],
) -> Iterator[str]:
    """The cells of a column; `shared` says how many have its table, where others have it too."""
    yield column.name
    yield column.type
    use = f"{column.use} ({column.reason})" if column.reason else column.use
    yield use if column.length is None else f"{use}, at most {column.length:,}"
    if column.use not in ("category", "list"):
        yield from ("", "")
        return
    size = sizes[column.name]
    yield "keys" if size is None else f"{size:,}"
    config = configs.get(column.name)
    pooled = f", {config.combiner} of each list" if config and column.use == "list" else ""
    others = f", shared by {shared[column.name]} columns" if column.name in shared else ""
    yield "dropped" if config is None else _embedding(config) + others + pooled


def _embedding(config: ColumnConfig) -> str:
    return f"{kind_of(config, in_full=True)}: {num_bytes(config):,} bytes"


def kind_of(config: ColumnConfig, *, in_full: bool = False) -> str:
    """An embedding in a few words, or with the shapes of its tables."""
    if isinstance(config, DynamicConfig):
        rows = f"{config.capacity:,} x {config.features} " if in_full else ""
        first = "zeros" if config.refused is None else kind_of(config.refused, in_full=in_full)
        return f"rows that grow {rows}after {first}"
    shapes = " + ".join(f"{rows:,} x {width}" for rows, width in config.table_shapes)
    family = f"{type(config.partition).__name__} {shapes if in_full else ''}".rstrip()
    return f"{family}, {config.operation}" if config.num_tables > 1 else family
