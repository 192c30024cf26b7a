"""A plan for the columns of a run, as settings that build exactly its embeddings.

For a budget of memory on each device (`qrhash plan`); or for the bytes that the `compression` of a
run leaves to its tables, where nothing else says what these are.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qrhash import EmbedConfig, FullTable, HashTrick, KeyDigits, MixedRadix
from qrhash.ctr.column_settings import OF_IDS, WAYS, ColumnOptions
from qrhash.ctr.data.counts import Counts
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.columns import FULL_DTYPE, SHARED, embed_configs, has_own, too_few_bytes
from qrhash.ctr.model.room import ColumnConfig, num_bytes
from qrhash.ctr.settings import Settings
from qrhash.dynamic import DynamicConfig, ExactCount
from qrhash.planning import BudgetError, Column, Plan, plan

# What a plan says for every column, in place of the run's own words.
SAID = ("partition", "operation", "compression", "collisions", "num_tables")

# What a column's section says of other things than sizes: also that it has no rows that grow.
_KEPT = SHARED | {"dynamic"}

# Of that, what a column has no use for whose rows grow.
_OF_IDS = {*OF_IDS, *WAYS} - {"dynamic"}

# Of a column whose ids differ by no more than chance; it weighs a hundredth of others then.
_MOST_PRIOR = 1000.0


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
      BudgetError: the budget is too small.
      UserError: there is no column to plan for, or one cannot have what the settings say.
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
            param_dtype=settings.param_dtype,
            large_table_rows=settings.large_table_rows,
            init_stddev=settings.init_stddev,
            combiner=settings.combiner,
            **arguments,
        )
    except BudgetError:
        raise
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


def known_of(counts: Counts) -> dict[str, Column]:
    """What the training rows say of the columns that have ids.

    Args:
      counts: how often the keys were met, in rows and in those that are clicks.

    Returns:
      Column name -> `Column`, without others that are dropped or take keys as they are, with how
      much the click rates of their ids differ.
    """
    columns = {}
    for name, options in counts.columns.items():
        if options.partition == "drop":
            continue
        if name in counts.of:
            met = counts.of[name]
            numbers = met.counts(options.min_count)
            length = max(1, numbers.sum()) / max(1, counts.rows)
            variance = met.variance_between(counts.clicked[name])
            columns[name] = Column(len(numbers), numbers, length, _prior_count(variance))
        elif options.hash_size is not None:
            columns[name] = Column(options.hash_size)
    return columns


def _prior_count(variance: float) -> float | None:
    """After how many meetings half of an id's effect is known; None, where labels say nothing."""
    return None if math.isnan(variance) else 1 / min(1.0, max(1 / _MOST_PRIOR, variance))


def compressed(
    settings: Settings, counts: Counts, num_rows: int
) -> tuple[Plan | None, Mapping[str, Mapping[str, Any]]]:
    """The plan for the bytes that `compression` leaves to columns without sections of their own.

    Those whose section says how, but not how much, they are compressed have as much as if all
    columns were compressed alike.

    Args:
      settings: the run's, which leave to a plan what the embeddings are (`is_planned`).
      counts: see `known_of`.
      num_rows: how many rows there are to train on.

    Returns:
      The plan, None if all columns have sections of their own; and `Settings.columns`, which say of
      all others what their embedding is.

    Raises:
      UserError: the bytes are too few.
    """
    assert settings.compression is not None
    columns = known_of(counts)
    free = {n: each for n, each in columns.items() if not has_own(settings.columns.get(n, {}))}
    if not free:
        return None, settings.columns
    taken = 0
    if len(free) < len(columns):
        sizes = {name: column.num_embeddings for name, column in columns.items()}
        alike = embed_configs(replace(settings, partition="quotient-remainder"), sizes)
        taken = sum(num_bytes(config) for name, config in alike.items() if name not in free)
    full = sum(each.num_embeddings for each in columns.values())
    budget = full * settings.features * FULL_DTYPE.itemsize / settings.compression
    arguments = {"devices": 1, "optimizer": "none", "num_examples": num_rows}
    try:
        return planned(settings, free, max(1, math.floor(budget - taken)), **arguments)
    except BudgetError as error:
        raise too_few_bytes(settings, budget, error.least + taken) from error


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
    section: dict[str, Any] = {"compression": full / (taken + config.param_dtype.itemsize / 2)}
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
