"""Budgets: the partition and the widths that so many bytes allow, for any operation.

What `EmbedConfig.fit` does, and says; and the families by name, whose partitions it tries.
"""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax.numpy as jnp

from qrhash.arithmetic import as_size, ceil_div, ceil_root
from qrhash.families import (
    ChineseRemainder,
    FullTable,
    HashTrick,
    MixedRadix,
    QuotientRemainder,
)
from qrhash.fields import as_float_dtype, default_widths, require_choice
from qrhash.operations import OPERATIONS
from qrhash.partitions import Partition

# Of a budget: what a full table of narrow rows must use to be taken in place of shared rows.
WORTH_ITS_BYTES = 0.98

FAMILIES = ("quotient-remainder", "mixed-radix", "chinese-remainder", "hash-trick")


def partition_of(family: str, num_embeddings: int, num_rows: int, num_tables: int = 2) -> Partition:
    """The partition of a family with so many rows in its largest table.

    Ids are indexed there by id mod rows: of ids numbered by falling frequency, the frequent ones
    share no row. Where balanced tables are longer than that, it is the balanced partition.

    Args:
      family: one of `FAMILIES`.
      num_embeddings: number of ids.
      num_rows: rows of the largest table.
      num_tables: of "mixed-radix" and "chinese-remainder".

    Raises:
      ValueError: an unknown family.

    >>> partition_of("quotient-remainder", 1_000_000, 250_000).num_rows
    (4, 250000)
    """
    require_choice("family", family, FAMILIES)
    if family == "hash-trick":
        return HashTrick(num_embeddings, num_rows)
    k = 2 if family == "quotient-remainder" else num_tables
    # Fewer rows than this, and the other tables would be the longer ones.
    is_balanced = num_rows <= ceil_root(num_embeddings, k)
    if family == "quotient-remainder":
        return QuotientRemainder(num_embeddings, None if is_balanced else num_rows)  # type: ignore[arg-type]
    kind = MixedRadix if family == "mixed-radix" else ChineseRemainder
    if is_balanced:
        return kind.balanced(num_embeddings, k)
    others = ceil_div(num_embeddings, num_rows)
    small = (others,) if k == 2 else kind.balanced(others, k - 1).num_rows
    while family == "chinese-remainder" and any(math.gcd(num_rows, each) > 1 for each in small):
        num_rows += 1
    return kind(num_embeddings, (num_rows, *small))


def fit(
    make: Callable[..., Any],
    num_embeddings: int,
    features: int,
    operation: str,
    *,
    compression: float | None,
    num_bytes: int | None,
    num_params: int | None,
    family: Callable[[int, int], Partition],
    **options: Any,
) -> Any:
    """The config that a budget allows: see `EmbedConfig.fit`, whose arguments these are.

    But for the first: (partition, features, operation, **options) -> config, an `EmbedConfig`.
    """
    num_embeddings = as_size("num_embeddings", num_embeddings)
    features = as_size("features", features)
    require_choice("operation", operation, OPERATIONS)
    budget = _budget(
        num_embeddings * features,
        options.get("param_dtype", jnp.float32),
        compression=compression,
        num_bytes=num_bytes,
        num_params=num_params,
    )
    if budget >= num_embeddings * features:
        operation = "mult" if operation == "project" else operation
        alone = {name: value for name, value in options.items() if name != "widths"}
        return make(FullTable(num_embeddings), features, operation, **alone)

    def of_rows(rows: int) -> Any:
        partition = family(num_embeddings, rows)
        widths = default_widths(operation, features, partition, ceil_div(budget, num_embeddings))
        return make(partition, features, operation, **{"widths": widths, **options})

    if operation == "project" and "widths" not in options:
        narrow = _narrow(of_rows(1), budget)
        if narrow is not None:
            return narrow
    return _largest(of_rows, min(num_embeddings, budget), budget)


def _budget(
    full: int,
    param_dtype: Any,
    *,
    compression: float | None,
    num_bytes: int | None,
    num_params: int | None,
) -> int:
    """The parameters of a budget, of which exactly one form is given."""
    given = {"compression": compression, "num_bytes": num_bytes, "num_params": num_params}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(
            "Exactly one budget must be given, compression, num_bytes or num_params, got "
            + (", ".join(f"{n}={v!r}" for n, v in given.items() if v is not None) or "none")
            + "."
        )
    if num_params is not None:
        return as_size("num_params", num_params)
    if num_bytes is not None:
        dtype = as_float_dtype("param_dtype", param_dtype)
        return as_size("num_bytes", num_bytes) // dtype.itemsize
    is_number = isinstance(compression, (int, float)) and not isinstance(compression, bool)
    if not is_number or not 1 <= (compression or 0) < math.inf:
        raise ValueError(f"compression must be a number of at least 1, got {compression!r}.")
    return int(full / Fraction(compression or 1))


def _narrow(config: Any, budget: int) -> Any | None:
    """A full table of narrow rows under the projection of a config, if it is worth its bytes."""
    num_embeddings, features = config.num_embeddings, config.features
    width = (budget - features * config.use_bias) // (num_embeddings + features)
    if width < 1:
        return None
    partition = FullTable(num_embeddings)
    narrow = dataclasses.replace(config, partition=partition, widths=(width,))
    return narrow if narrow.num_params >= WORTH_ITS_BYTES * budget else None


def _largest(of_rows: Callable[[int], Any], most: int, budget: int) -> Any:
    """The config with the most rows in its large table, at most so many, that keeps the budget."""
    rows, too_many, config = max(1, most), most + 1, None
    least = math.inf
    while rows > 0 and config is None:
        tried = of_rows(rows)
        least = min(least, tried.num_params)
        if tried.num_params <= budget:
            config = tried
        else:
            rows, too_many = rows - ceil_div(rows, 16), rows
    if config is None:
        raise ValueError(
            f"A budget of {budget:,} parameters is too small for {tried.num_embeddings:,} ids as "
            f"{tried.operation!r} vectors of {tried.features} features: the smallest tables of "
            f"{type(tried.partition).__name__} take {least:,}. Choose less compression, fewer "
            "features, or another operation or family."
        )
    while too_many - rows > 1:
        middle = (rows + too_many) // 2
        tried = of_rows(middle)
        if tried.num_params <= budget:
            rows, config = middle, tried
        else:
            too_many = middle
    return config
