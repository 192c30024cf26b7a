"""A plan for the columns of a run, as settings that build exactly its embeddings."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qrhash import EmbedConfig, FullTable, HashTrick, MixedRadix
from qrhash.ctr.column_settings import ColumnOptions
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.columns import FULL_DTYPE, SHARED, embed_configs
from qrhash.ctr.model.room import num_bytes
from qrhash.ctr.settings import Settings
from qrhash.planning import Column, Plan, plan

# What a plan says for every column, in place of the run's own words.
SAID = ("partition", "operation", "compression", "collisions", "num_tables")

# What a column's section says of other things than sizes: also that it has no rows that grow.
_KEPT = SHARED | {"dynamic"}


def planned(
    settings: Settings, columns: Mapping[str, Column], budget: int, **arguments: Any
) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """The plan for some columns, and the sections of settings by which the trainer builds it.

    Args:
      settings: the run's; of what they say of embeddings, that stays which does not go by sizes.
      columns: column name -> what is known of it.
      budget: bytes on each device.
      **arguments: `devices`, `optimizer` and `num_examples` of `qrhash.planning.plan`.

    Returns:
      The plan, and `Settings.columns`, of the columns that the settings had sections for too.
      `embed_configs` of them gives the plan's configs, with each column's own `combiner` and
      `init_stddev`.

    Raises:
      UserError: there is no column to plan for, or the budget is too small.
    """
    if not columns:
        raise UserError("There is no column with a vocabulary to plan for.")
    try:
        found = plan(
            columns,
            budget,
            features=settings.features,
            threshold=settings.threshold,
            dtype="float32",
            large_table_rows=settings.large_table_rows,
            init_stddev=settings.init_stddev,
            combiner=settings.combiner,
            **arguments,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    sections = {name: dict(section) for name, section in settings.columns.items()}
    for name, each in found.columns:
        kept = {key: v for key, v in sections.get(name, {}).items() if key in _KEPT}
        sections[name] = kept | section_of(each.config)
    defaults = {name: getattr(ColumnOptions, name) for name in SAID}
    as_planned = replace(settings, data=settings.data or "to come", columns=sections, **defaults)
    sizes = {name: column.num_embeddings for name, column in columns.items()}
    built: Mapping[str, Any] = embed_configs(as_planned, sizes)
    assert {name: each.table_shapes for name, each in built.items()} == {
        name: config.table_shapes for name, config in found.configs.items()
    }
    return found, sections


def section_of(config: EmbedConfig) -> dict[str, Any]:
    """The options of a column that has this embedding."""
    partition = config.partition
    if isinstance(partition, FullTable) and config.operation != "project":
        return {"partition": "full"}
    taken = num_bytes(config)
    full = config.num_embeddings * config.features * FULL_DTYPE.itemsize
    # A little more than its bytes, less than one parameter: the quotient is no whole number.
    section: dict[str, Any] = {"compression": full / (taken + FULL_DTYPE.itemsize / 2)}
    if isinstance(partition, HashTrick):
        return {"partition": "hash-trick"} | section
    if isinstance(partition, MixedRadix):
        of_tables = {"partition": "mixed-radix", "num_tables": partition.num_tables}
    else:  # also a narrow row for every id, which is what "project" makes of such a budget
        of_tables = {"partition": "quotient-remainder"}
    return of_tables | {"operation": config.operation} | section
