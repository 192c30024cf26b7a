"""`plan`: vocabularies and a budget of memory -> an embedding for each column.

Every column has candidates: a full table and smaller ones by each operation and family at many
sizes (`candidates`), and tables that grow (`growing`), each with its bytes on a device and with
what it is expected to lose of what a full table would know of the column's ids. Of each column one
is chosen, such that all together stay within the budget and lose least (`knapsack`).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qrhash.arithmetic import as_size
from qrhash.config import EmbedConfig
from qrhash.fields import as_float_dtype
from qrhash.planning.candidates import WAYS, WORTHWHILE, Facts, Way
from qrhash.planning.columns import Column, checked, examples_of, prior_count_of
from qrhash.planning.growing import growing
from qrhash.planning.knapsack import choose
from qrhash.planning.memory import Memory
from qrhash.planning.traffic import of_counts, of_zipf

# Columns of at most this many ids keep full tables.
THRESHOLD = 200

# Of a budget: a full table that takes less than this is not worth compressing.
_NEGLIGIBLE = 0.001

# Ids of a column that may grow: each such table has an index of its own to look keys up in.
LEAST_GROWING = 1000

# Budgets tried from one to its double: of all columns together, and of each at least.
_SIZES, _LEAST_SIZES = 256, 8


class BudgetError(ValueError):
    """A budget below what the smallest embeddings take.

    Args:
      sentence: what is wrong.
      least: the bytes that they take, on each device.
    """

    def __init__(self, sentence: str, least: int) -> None:
        super().__init__(sentence)
        self.least = least


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnPlan:
    """What was planned for a column.

    Attributes:
      config: its embedding, an `EmbedConfig`; or, of a table that grows, a
        `qrhash.dynamic.DynamicConfig`.
      num_embeddings: number of ids that it was planned for.
      table_bytes: of its tables and projection, on all devices together.
      state_bytes: the optimizer's state for them.
      index_bytes: of a table that grows the index of keys.
      bytes_per_device: of all that, on each device, with the padding of this column alone.
      full_bytes: of a full table, without state.
      loss: share, from 0 to 1, of what a full table would know that is expected to be lost.
      why: the reason, in words.
    """

    config: Any
    num_embeddings: int
    table_bytes: int
    state_bytes: int
    index_bytes: int
    bytes_per_device: int
    full_bytes: int
    loss: float
    why: str

    @property
    def share(self) -> float:
        """The share of the bytes of a full table, the index of keys included."""
        return (self.table_bytes + self.index_bytes) / self.full_bytes

    @property
    def is_compressed(self) -> bool:
        """Whether it is anything but a full table."""
        return self.is_dynamic or self.share < 1

    @property
    def is_dynamic(self) -> bool:
        """Whether its table grows."""
        return not isinstance(self.config, EmbedConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Embeddings that keep a budget: what `plan` returns.

    Attributes:
      columns: (name, `ColumnPlan`) of every column, in the order given.
      num_bytes: the budget, for each device.
      devices: how many devices large tables are split over.
      optimizer: whose state is counted.
      bytes_per_device: tables, projections, state and indexes of keys on each device, padding
        included.
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
    def configs(self) -> dict[str, Any]:
        """Column name -> config, as `qrhash.CollectionConfig` takes them.

        An `EmbedConfig`, or of a table that grows a `qrhash.dynamic.DynamicConfig`.
        """
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
    def index_bytes(self) -> int:
        """The indexes of keys of tables that grow."""
        return sum(column.index_bytes for _, column in self.columns)

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
      num_bytes: what each device may hold of tables, projections, optimizer state and, of tables
        that grow, indexes of keys, padding included.
      features: width of the vectors.
      devices: how many devices the rows of large tables are split over; small tables and
        projections are on each.
      optimizer: "sgd" (no state), "rowwise_adagrad" (a number for each row), "adagrad" (one for
        each entry) or "adam" (two); projections have Adam's with each. "none": the parameters
        alone are counted, as of a model that is not trained.
      num_examples: how many examples there are to learn from. Default: as many as the counts say;
        without counts, as many as meet the rarest id of the longest column once.
      threshold: columns of at most this many ids keep full tables, but where `dynamic` is "must".
      **options: other fields of all `EmbedConfig`s, such as `large_table_rows` or `init_stddev`.

    Returns:
      A `Plan`. Its loss is within 0.1 % of the least that the candidates allow.

    Raises:
      ValueError: an argument breaks its rule; `BudgetError`, one of these: the budget is too small,
        with the least possible.

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
    of_columns = checked(columns)
    examples = examples_of(of_columns, num_examples)
    facts = {
        name: Facts(
            num_embeddings=column.num_embeddings,
            features=as_size("features", features),
            traffic=of_zipf(column.num_embeddings, examples * column.length)
            if column.counts is None
            else of_counts(column.counts),
            prior_count=prior_count_of(column),
            memory=memory,
            options=options,
            per_octave=max(_LEAST_SIZES, _SIZES // len(of_columns)),
            admit_after=column.admit_after,
        )
        for name, column in of_columns.items()
    }
    weights = {
        name: min(1.0, column.length) / prior_count_of(column)
        for name, column in of_columns.items()
    }
    classes = {
        name: _Class(_ways(of_columns[name].dynamic, each, threshold), each, weights[name])
        for name, each in facts.items()
    }
    picks, configs, bound = _picked(classes, budget, memory)
    known = sum(weights[name] * each.known for name, each in facts.items()) or 1.0
    planned = {}
    for name, config in configs.items():
        lost = classes[name].losses[picks[name]] / (weights[name] * facts[name].known or 1.0)
        planned[name] = ColumnPlan(
            config=config,
            num_embeddings=facts[name].num_embeddings,
            table_bytes=memory.tables(config),
            state_bytes=memory.state(config),
            index_bytes=memory.index(config) * memory.devices,
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


def _ways(dynamic: str, facts: Facts, threshold: int) -> Sequence[Way]:
    """The ways to keep a column, with a full table first if that is one."""
    if dynamic == "must":
        return (growing,)
    if facts.num_embeddings <= threshold:
        return WAYS[:1]
    if dynamic == "no" or facts.num_embeddings < LEAST_GROWING:
        return WAYS
    full_bytes = facts.memory.on_a_device(facts.num_embeddings, facts.features)
    return (*WAYS, functools.partial(growing, most_bytes=WORTHWHILE * full_bytes))


class _Class:
    """The candidates of a column, of some ways behind each other.

    Args:
      ways: see `_ways`.
      facts: about the column.
      weight: of what it loses.

    Attributes:
      costs, losses: [m] of each; losses times the weight.
    """

    def __init__(self, ways: Sequence[Way], facts: Facts, weight: float) -> None:
        self._ways = [way(facts) for way in ways]
        self.costs = np.concatenate([way.costs for way in self._ways])
        self.losses = np.concatenate([way.losses for way in self._ways]) * weight

    def make(self, number: int) -> Any:
        """The config of a candidate."""
        for way in self._ways:
            if number < len(way.costs):
                return way.make(number)
            number -= len(way.costs)
        raise IndexError(number)

    def why(self, pick: int, config: Any, budget: int) -> str:
        """The reason for a candidate, or what it means."""
        if not isinstance(config, EmbedConfig):
            num_rows = config.refused.partition.num_rows
            shared = f"{len(num_rows)} x {num_rows[0]:,}"
            return f"{config.capacity:,} rows of their own, the others share {shared}"
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
) -> tuple[dict[str, int], dict[str, Any], float]:
    """The candidates chosen, by number, their configs, and the bound of what they lose."""
    bound, allowed = None, float(budget)
    costs = [each.costs for each in classes.values()]
    losses = [each.losses for each in classes.values()]
    while True:
        choice = choose(costs, losses, allowed)
        if choice is None:
            least = int(np.ceil(sum(cost.min() for cost in costs) + budget - allowed))
            raise BudgetError(
                f"num_bytes must be at least {least:,}, what the smallest embeddings "
                f"of columns of more than threshold ids, and full tables of the others, take on "
                f"each of {memory.devices} devices with {memory.optimizer!r}, got {budget:,}.",
                least,
            )
        bound = choice.bound if bound is None else bound
        picks = dict(zip(classes, choice.picks, strict=True))
        configs = {name: classes[name].make(pick) for name, pick in picks.items()}
        taken = memory.per_device(configs)
        if taken <= budget:
            return picks, configs, bound
        # Padding, which is of all columns together, and no cost of one of them.
        allowed -= taken - budget
