"""What a run makes of the columns of its data: shown before it trains."""

from collections.abc import Iterator, Mapping

from qrhash import EmbedConfig
from qrhash.ctr.data.schema import Column, Schema
from qrhash.ctr.model.columns import num_bytes

HEADER = ("column", "type", "used as", "ids", "embedding")


def overview(
    schema: Schema, sizes: Mapping[str, int | None], configs: Mapping[str, EmbedConfig]
) -> list[tuple[str, ...]]:
    """The rows of a table with the columns of `HEADER`.

    Args:
      schema: the columns of the data.
      sizes: category -> number of ids; None, if it takes keys.
      configs: category -> its embedding, of those in the model.
    """
    return [tuple(_row(column, sizes, configs)) for column in schema.columns]


def _row(
    column: Column, sizes: Mapping[str, int | None], configs: Mapping[str, EmbedConfig]
) -> Iterator[str]:
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
    yield "dropped" if config is None else _embedding(config) + pooled


def _embedding(config: EmbedConfig) -> str:
    shapes = " + ".join(f"{rows:,} x {width}" for rows, width in config.table_shapes)
    family = type(config.partition).__name__
    operation = f", {config.operation}" if config.num_tables > 1 else ""
    return f"{family} {shapes}{operation}: {num_bytes(config):,} bytes"
