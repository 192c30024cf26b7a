"""`Column`: what is known of a column of categories, and whether that can be.

A column whose table may grow has ids all the same here: they stand for the keys of the log by which
the plan is made.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qrhash.arithmetic import as_size
from qrhash.fields import require_choice
from qrhash.planning.traffic import PRIOR_COUNT, of_zipf

# Whether a table grows.
DYNAMIC = ("no", "may", "must")

# Of a column; its tables are of 2**31 rows at most.
_MOST_IDS = 2**40


class Column(NamedTuple):
    """What is known of a column of categories.

    Attributes:
      num_embeddings: number of ids.
      counts: how often each is met, [num_embeddings] in falling order; None: Zipf's law with
        exponent 1.05 is assumed.
      length: mean number of ids in an example: of lists any, and below 1 where some have none.
      prior_count: after how many meetings half of the variance of an id's effect is known: the
        variance of the noise, divided by that between ids. A column whose effects are larger has a
        smaller one, and weighs more. None: 10.
      dynamic: whether its table grows, and takes keys as they come: "no", "may" (of 1,000
        ids or more, where that loses less) or "must".
      admit_after: how often a key is met before it has a row of its own there.
    """

    num_embeddings: int
    counts: Any = None
    length: float = 1.0
    prior_count: float | None = None
    dynamic: str = "no"
    admit_after: int = 2


def checked(columns: Any) -> dict[str, Column]:
    """Columns whose fields are what they must be."""
    if not isinstance(columns, Mapping) or not columns:
        raise ValueError(
            f"columns must be a mapping of names to Columns or sizes, one at least, got {columns!r}"
            "."
        )
    found = {}
    for name, given in columns.items():
        column = given if isinstance(given, Column) else Column(given)
        size = as_size(f"columns[{name!r}].num_embeddings", column.num_embeddings)
        if size > _MOST_IDS:
            raise ValueError(
                f"columns[{name!r}] must have at most {_MOST_IDS:,} ids, got {size:,}."
            )
        if not 0 < column.length < np.inf:
            raise ValueError(
                f"columns[{name!r}].length must be a positive number, got {column.length!r}."
            )
        if not 0 < prior_count_of(column) < np.inf:
            raise ValueError(
                f"columns[{name!r}].prior_count must be a positive number, got "
                f"{column.prior_count!r}."
            )
        counts = _counts(name, size, column.counts)
        require_choice(f"columns[{name!r}].dynamic", column.dynamic, DYNAMIC)
        times = as_size(f"columns[{name!r}].admit_after", column.admit_after)
        found[name] = column._replace(num_embeddings=size, counts=counts, admit_after=times)
    return found


def prior_count_of(column: Column) -> float:
    """Its own, or the default."""
    return PRIOR_COUNT if column.prior_count is None else column.prior_count


def _counts(name: str, size: int, given: Any) -> np.ndarray | None:
    if given is None:
        return None
    counts = np.asarray(given, np.float64)
    rule = f"columns[{name!r}].counts must be"
    if counts.shape != (size,):
        raise ValueError(f"{rule} one for each of {size} ids, got shape {counts.shape}.")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError(f"{rule} 0 or more, got {counts.min()} to {counts.max()}.")
    if (np.diff(counts) > 0).any():
        place = int(np.argmax(np.diff(counts) > 0))
        raise ValueError(
            f"{rule} in falling order, as ids are numbered, got {counts[place]:g} before "
            f"{counts[place + 1]:g}."
        )
    return counts


def examples_of(columns: Mapping[str, Column], given: float | None) -> float:
    """How many examples there are to learn from."""
    if given is not None:
        if not 0 < given < np.inf:
            raise ValueError(f"num_examples must be a positive number, got {given!r}.")
        return float(given)
    known = [column for column in columns.values() if column.counts is not None]
    if known:
        return max(float(column.counts.sum()) / column.length for column in known)
    most = max(column.num_embeddings for column in columns.values())
    return float(of_zipf(most, 1.0).counts[-1]) ** -1
