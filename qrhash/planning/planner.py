"""`plan`: vocabularies and a budget of memory -> an `EmbedConfig` for each column.

Every column has candidates (`candidates`): a full table, and smaller ones by each operation and
family at many sizes, each with its bytes on a device and with what it is expected to lose of what a
full table would know of the column's ids. Of each column one is chosen, such that all together stay
within the budget and lose least (`knapsack`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qrhash.arithmetic import as_size
from qrhash.config import EmbedConfig
from qrhash.fields import as_float_dtype
from qrhash.planning.candidates import WAYS, Facts, Way
from qrhash.planning.knapsack import choose
from qrhash.planning.memory import Memory
from qrhash.planning.traffic import PRIOR_COUNT, of_counts, of_zipf

# Columns of at most this many ids keep full tables.
THRESHOLD = 200

# Of a budget: a full table that takes less than this is not worth compressing.
_NEGLIGIBLE = 0.001

# Of a column; its tables are of 2**31 rows at most.
_MOST_IDS = 2**40

# Budgets tried from one to its double: of all columns together, and of each at least.
_SIZES, _LEAST_SIZES = 256, 8


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
    """

    num_embeddings: int
    counts: Any = None
    length: float = 1.0
    prior_count: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnPlan:
    """What was planned for a column.

    Attributes:
      config: its embedding.
      table_bytes: of its tables and projection, on all devices together.
      state_bytes: the optimizer's state for them.
      bytes_per_device: of both, on each device, with the padding of this column alone.
      full_bytes: of a full table, without state.
      loss: share, from 0 to 1, of what a full table would know that is expected to be lost.
      why: the reason, in words.
    """

    config: EmbedConfig
    table_bytes: int
    state_bytes: int
    bytes_per_device: int
    full_bytes: int
    loss: float
    why: str

    @property
    def share(self) -> float:
        """The share of the bytes of a full table."""
        return self.table_bytes / self.full_bytes

    @property
    def is_compressed(self) -> bool:
        """Whether it is anything but a full table."""
        return self.share < 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Embeddings that keep a budget: what `plan` returns.

    Attributes:
      columns: (name, `ColumnPlan`) of every column, in the order given.
      num_bytes: the budget, for each device.
      devices: how many devices large tables are split over.
      optimizer: whose state is counted.
      bytes_per_device: tables, projections and state on each device, padding included.
      loss: share of what full tables would know that is expected to be lost, over all columns.
      least_loss: no choice among the candidates loses less than this.
    """

    columns: tuple[tuple[str, ColumnPlan], ...]
    num_bytes: int
    devices: int
    optimizer: str
    bytes_per_device: int
    loss: float
    least_loss: float

    @property
    def configs(self) -> dict[str, EmbedConfig]:
        """Column name -> `EmbedConfig`, as `qrhash.CollectionConfig` takes them."""
        return {name: column.config for name, column in self.columns}

    @property
    def table_bytes(self) -> int:
        """Tables and projections, on all devices together, without padding."""
        return sum(column.table_bytes for _, column in self.columns)

    @property
    def state_bytes(self) -> int:
        """The optimizer's state for them."""
        return sum(column.state_bytes for _, column in self.columns)

    @property
    def full_bytes(self) -> int:
        """Full tables for all columns, without state."""
        return sum(column.full_bytes for _, column in self.columns)


def plan(
    columns: Mapping[str, Column | int],
    num_bytes: int,
    *,
    features: int,
    devices: int = 1,
    optimizer: str = "adagrad",
    num_examples: float | None = None,
    threshold: int = THRESHOLD,
    **options: Any,
) -> Plan:
    """The embeddings of many columns that a budget of memory allows, and that lose least.

    What is made small is the mean, over the columns, of the share of variance between ids that
    is lost by what the tables are; see the docstrings of `qrhash.planning.traffic` and
    `qrhash.planning.candidates`. In short: an id whose row is met by others knows the less of
    itself, the less of the row's traffic is its own; an id that is met a few times only has little
    to lose; a second table makes up for a part of it, by a factor measured for each operation. Of
    columns without counts Zipf's law is assumed. A column weighs by the variance between its ids,
    in units of the noise; where that is not known, all weigh the same.

    Args:
      columns: name -> `Column`, or its number of ids. Ids are to be numbered by falling frequency.
      num_bytes: what each device may hold of tables, projections and optimizer state, padding
        included.
      features: width of the vectors.
      devices: how many devices the rows of large tables are split over; small tables and
        projections are on each.
      optimizer: "sgd" (no state), "rowwise_adagrad" (a number for each row), "adagrad" (one for
        each entry) or "adam" (two).
      num_examples: how many examples there are to learn from. Default: as many as the counts say;
        without counts, as many as meet the rarest id of the longest column once.
      threshold: columns of at most this many ids keep full tables.
      **options: other fields of all `EmbedConfig`s, such as `large_table_rows` or `init_stddev`.

    Returns:
      A `Plan`. Its loss is within 0.1 % of the least that the candidates allow.

    Raises:
      ValueError: an argument breaks its rule; or the budget is too small, with the least possible.

    >>> sizes = {"user": 1_000_000, "item": 200_000, "day": 7}
    >>> planned = plan(sizes, 16_000_000, features=16)
    >>> planned.bytes_per_device <= 16_000_000
    True
    >>> planned.configs["day"].partition
    FullTable(num_embeddings=7)
    """
    budget = as_size("num_bytes", num_bytes)
    threshold = as_size("threshold", threshold, minimum=0)
    memory = Memory(
        optimizer=optimizer,
        devices=as_size("devices", devices),
        large_table_rows=as_size(
            "large_table_rows", options.get("large_table_rows", EmbedConfig.large_table_rows)
        ),
        itemsize=as_float_dtype("param_dtype", options.get("param_dtype", np.float32)).itemsize,
    )
    checked = _checked(columns)
    examples = _examples(checked, num_examples)
    facts = {
        name: Facts(
            num_embeddings=column.num_embeddings,
            features=as_size("features", features),
            traffic=of_zipf(column.num_embeddings, examples * column.length)
            if column.counts is None
            else of_counts(column.counts),
            prior_count=_prior_count(column),
            memory=memory,
            options=options,
            per_octave=max(_LEAST_SIZES, _SIZES // len(checked)),
        )
        for name, column in checked.items()
    }
    weights = {
        name: min(1.0, column.length) / _prior_count(column) for name, column in checked.items()
    }
    classes = {
        name: _Class(WAYS if each.num_embeddings > threshold else WAYS[:1], each, weights[name])
        for name, each in facts.items()
    }
    picks, configs, bound = _picked(classes, budget, memory)
    known = sum(weights[name] * each.known for name, each in facts.items()) or 1.0
    planned = {}
    for name, config in configs.items():
        lost = classes[name].losses[picks[name]] / (weights[name] * facts[name].known or 1.0)
        planned[name] = ColumnPlan(
            config=config,
            table_bytes=memory.tables(config),
            state_bytes=memory.state(config),
            bytes_per_device=memory.per_device({name: config}),
            full_bytes=facts[name].full_params * memory.itemsize,
            loss=float(lost),
            why=classes[name].why(picks[name], config, budget),
        )
    total = sum(classes[name].losses[pick] for name, pick in picks.items())
    return Plan(
        columns=tuple(planned.items()),
        num_bytes=budget,
        devices=memory.devices,
        optimizer=optimizer,
        bytes_per_device=memory.per_device(configs),
        loss=float(total / known),
        least_loss=bound / known,
    )


class _Class:
    """The candidates of a column, of some ways behind each other.

    Args:
      ways: the first one has one candidate, the full table.
      facts: about the column.
      weight: of what it loses.

    Attributes:
      costs, losses: [m] of each; losses times the weight.
    """

    def __init__(self, ways: Sequence[Way], facts: Facts, weight: float) -> None:
        self._ways = [way(facts) for way in ways]
        self.costs = np.concatenate([way.costs for way in self._ways])
        self.losses = np.concatenate([way.losses for way in self._ways]) * weight

    def make(self, number: int) -> EmbedConfig:
        """The config of a candidate."""
        for way in self._ways:
            if number < len(way.costs):
                return way.make(number)
            number -= len(way.costs)
        raise IndexError(number)

    def why(self, pick: int, config: EmbedConfig, budget: int) -> str:
        """The reason for a candidate, or what it means."""
        if pick == 0:
            is_small = len(self.costs) == 1 or self.costs[0] < _NEGLIGIBLE * budget
            return "not worth compressing" if is_small else "worth its bytes"
        rows, width = max(config.table_shapes)
        if rows >= config.num_embeddings:
            return f"rows of {width} numbers"
        each = config.num_embeddings / rows
        ids = f"{f'{each:.3g}' if each < 100 else f'{each:,.0f}'} ids to a row"
        return ids if width == config.features else f"{ids} of {width}"


def _picked(
    classes: Mapping[str, _Class], budget: int, memory: Memory
) -> tuple[dict[str, int], dict[str, EmbedConfig], float]:
    """The candidates chosen, by number, their configs, and the bound of what they lose."""
    bound, allowed = None, float(budget)
    costs = [each.costs for each in classes.values()]
    losses = [each.losses for each in classes.values()]
    while True:
        choice = choose(costs, losses, allowed)
        if choice is None:
            least = sum(cost.min() for cost in costs) + budget - allowed
            raise ValueError(
                f"num_bytes must be at least {int(np.ceil(least)):,}, what the smallest embeddings "
                f"of columns of more than threshold ids, and full tables of the others, take on "
                f"each of {memory.devices} devices with {memory.optimizer!r}, got {budget:,}."
            )
        bound = choice.bound if bound is None else bound
        picks = dict(zip(classes, choice.picks, strict=True))
        configs = {name: classes[name].make(pick) for name, pick in picks.items()}
        taken = memory.per_device(configs)
        if taken <= budget:
            return picks, configs, bound
        # Padding, which is of all columns together, and no cost of one of them.
        allowed -= taken - budget


def _checked(columns: Any) -> dict[str, Column]:
    """Columns whose fields are what they must be."""
    if not isinstance(columns, Mapping) or not columns:
        raise ValueError(
            f"columns must be a mapping of names to Columns or sizes, one at least, got {columns!r}"
            "."
        )
    checked = {}
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
        if not 0 < _prior_count(column) < np.inf:
            raise ValueError(
                f"columns[{name!r}].prior_count must be a positive number, got "
                f"{column.prior_count!r}."
            )
        counts = _counts(name, size, column.counts)
        checked[name] = column._replace(num_embeddings=size, counts=counts)
    return checked


def _prior_count(column: Column) -> float:
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


def _examples(columns: Mapping[str, Column], given: float | None) -> float:
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
