"""A plan for the columns of a run, as settings that build exactly its embeddings."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qrhash import EmbedConfig, FullTable, HashTrick, KeyDigits, MixedRadix
from qrhash.ctr.column_settings import OF_IDS, WAYS, ColumnOptions
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.columns import FULL_DTYPE, SHARED, embed_configs
from qrhash.ctr.model.room import ColumnConfig, num_bytes
from qrhash.ctr.settings import Settings
from qrhash.dynamic import DynamicConfig, ExactCount
from qrhash.planning import Column, Plan, plan

# What a plan says for every column, in place of the run's own words.
SAID = ("partition", "operation", "compression", "collisions", "num_tables")

# What a column's section says of other things than sizes: also that it has no rows that grow.
_KEPT = SHARED | {"dynamic"}

# Of that, what a column has no use for whose rows grow.
_OF_IDS = {*OF_IDS, *WAYS} - {"dynamic"}


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
      `init_stddev`, and of tables that grow other seeds.

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
        unfit = _OF_IDS if each.is_dynamic else set()
        kept = {k: v for k, v in sections.get(name, {}).items() if k in _KEPT - unfit}
        sections[name] = kept | section_of(each.config)
    defaults = {name: getattr(ColumnOptions, name) for name in SAID}
    as_planned = replace(settings, data=settings.data or "to come", columns=sections, **defaults)
    sizes = {name: None if each.is_dynamic else each.num_embeddings for name, each in found.columns}
    built: Mapping[str, Any] = embed_configs(as_planned, sizes)
    assert {name: _sizes(config) for name, config in built.items()} == {
        name: _sizes(config) for name, config in found.configs.items()
    }
    return found, sections


def _sizes(config: ColumnConfig) -> Any:
    """What the bytes of an embedding go by."""
    if isinstance(config, EmbedConfig):
        return config.table_shapes
    assert config.refused is not None  # None that a plan has is without.
    return config.capacity, config.admission, config.refused.table_shapes


def section_of(config: ColumnConfig) -> dict[str, Any]:
    """The options of a column that has this embedding."""
    if isinstance(config, DynamicConfig):
        return _section_of_dynamic(config)
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


def _section_of_dynamic(config: DynamicConfig) -> dict[str, Any]:
    """The same of a table that grows, as a plan has it."""
    assert config.refused is not None
    digits, admission = config.refused.partition, config.admission
    assert isinstance(digits, KeyDigits)
    return {
        "dynamic": str(config.capacity),
        "admit_after": admission.threshold if isinstance(admission, ExactCount) else 1,
        "newcomers": "compressed",
        "operation": config.refused.operation,
        "key_bits": digits.bits,
        "num_tables": digits.num_tables,
    }
