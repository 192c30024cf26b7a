"""Ways to keep a column, with what each costs and loses, for many sizes at once.

A way is a function: facts about a column -> `Candidates`. `WAYS` lists all of them for ids of a
vocabulary; a new one is one more function there. Tables that grow are one for keys (`growing`).
Nothing is built here: sizes and losses are arithmetic on arrays, and the config of a candidate is
made when it is chosen.

**What a candidate loses.** `traffic` says which share of a column's variance is known from rows of
one id each, `known`, and which from a table that ids share, `shared`. Tables beside that one tell
the ids apart again: of what is lost by sharing, a part remains. And rows narrower than the vector
cannot hold all of what is known: each halving loses a part. So of `known` there is left

    (known - sharing (known - shared)) (1 - narrow log2(features / width))

with two factors for each way, which are measured (`docs/planning.md`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from qrhash.arithmetic import ceil_root
from qrhash.budget import WORTH_ITS_BYTES, partition_of
from qrhash.config import EmbedConfig
from qrhash.families import FullTable
from qrhash.planning.memory import Memory
from qrhash.planning.traffic import Traffic, known_alone, known_by_rows


class Factors(NamedTuple):
    """What remains of what tables lose.

    Attributes:
      sharing: the part of what is lost by rows that ids share.
      narrow: the part of what is known that is lost by each halving of the rows' width.
    """

    sharing: float
    narrow: float = 0.0


# By (family, operation, number of tables). Between what fits clicks and what fits ratings best:
# "mult" .54 and .22, "concat" .77 and .39, "add" 1.2 and .46, narrow rows .01 and .04. Of three
# tables .29 and .24, which is no less than that of two by more than the noise.
FACTORS = {
    ("hash-trick", "mult", 1): Factors(1.0),
    ("quotient-remainder", "mult", 2): Factors(0.35),
    ("quotient-remainder", "project", 2): Factors(0.35, narrow=0.04),
    ("quotient-remainder", "concat", 2): Factors(0.55, narrow=0.11),
    ("quotient-remainder", "add", 2): Factors(0.75),
    ("quotient-remainder", "path", 2): Factors(0.35, narrow=0.04),
    ("mixed-radix", "mult", 3): Factors(0.36),
}

# Of narrow rows, one for each id, that a projection widens.
ALONE = Factors(0.0, narrow=0.04)

# A table that would take more than this of the full one is not worth its complications.
WORTHWHILE = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a column.

    Attributes:
      num_embeddings: number of ids.
      features: width of the vectors.
      traffic: how often they are met.
      prior_count: see `traffic`.
      memory: what is counted as bytes.
      options: other fields of its `EmbedConfig`.
      per_octave: how many budgets are tried from one to its double.
      admit_after: of a table that grows, how often a key is met before it has a row.
    """

    num_embeddings: int
    features: int
    traffic: Traffic
    prior_count: float
    memory: Memory
    options: Mapping[str, Any]
    per_octave: int = 8
    admit_after: int = 2

    @functools.cached_property
    def known(self) -> float:
        """The share of the column's variance that a full table knows."""
        return known_alone(self.traffic, self.prior_count)

    @functools.cached_property
    def _known_by_rows(self) -> tuple[np.ndarray, np.ndarray]:
        return known_by_rows(self.traffic, self.prior_count)

    @property
    def full_params(self) -> int:
        """Parameters of a full table."""
        return self.num_embeddings * self.features

    def lost(self, num_rows: Any, width: Any, factors: Factors) -> np.ndarray:
        """What tables lose, of the column's variance: the largest of so many rows of a width."""
        sizes, known = self._known_by_rows
        shared = np.interp(np.log(num_rows), np.log(sizes), known)
        kept = self.known - factors.sharing * np.maximum(self.known - shared, 0.0)
        halvings = np.log2(self.features / np.asarray(width))
        lost: np.ndarray = self.known - kept * np.maximum(1 - factors.narrow * halvings, 0.0)
        return lost


class Candidates(NamedTuple):
    """Candidates of one way.

    Attributes:
      costs: [m] bytes on each device, with state.
      losses: [m] what each loses, of the column's variance.
      make: number of a candidate -> its config, an `EmbedConfig` or a `DynamicConfig`.
    """

    costs: np.ndarray
    losses: np.ndarray
    make: Callable[[int], Any]


def full(facts: Facts) -> Candidates:
    """A row for every id."""
    cost = facts.memory.on_a_device(facts.num_embeddings, facts.features)
    return Candidates(
        np.array([float(cost)]),
        np.zeros(1),
        lambda _: EmbedConfig(
            FullTable(facts.num_embeddings), facts.features, "mult", **facts.options
        ),
    )


def narrow(facts: Facts) -> Candidates:
    """A narrow row for every id, widened by a projection."""
    n, features = facts.num_embeddings, facts.features
    widths = np.arange(1, max(1, features // 2) + 1)
    params = widths * (n + features) + features * facts.options.get("use_bias", True)
    widths = widths[params <= WORTHWHILE * facts.full_params]
    costs = facts.memory.on_a_device(n, widths) + facts.memory.of_dense((widths + 1) * features)
    losses = facts.lost(n, widths, ALONE)

    def make(number: int) -> EmbedConfig:
        return EmbedConfig(
            FullTable(n), features, "project", widths=(int(widths[number]),), **facts.options
        )

    return Candidates(costs, losses, make)


def shared(facts: Facts, family: str, operation: str, num_tables: int) -> Candidates:
    """Rows that ids share, in as many tables as the family has."""
    shape = _Shape(facts, family, operation, num_tables)
    octaves = np.arange(np.log2(facts.full_params) * facts.per_octave) / facts.per_octave
    budgets = np.unique((WORTHWHILE * facts.full_params / 2**octaves).astype(np.int64))
    budgets = budgets[shape.is_possible(budgets)]
    rows, width = shape.rows(budgets), shape.width(budgets)
    small_rows, small_width = shape.small_rows(rows), shape.small_width(budgets)
    memory = facts.memory
    costs = memory.on_a_device(rows, width) + memory.of_dense(shape.num_dense(width))
    # The smaller tables are about alike.
    others = max(1, num_tables - 1)
    costs += others * memory.on_a_device(small_rows / others, small_width)
    losses = facts.lost(rows, width, FACTORS[family, operation, num_tables])
    return Candidates(costs, losses, lambda number: shape.config(int(budgets[number])))


Way = Callable[[Facts], Candidates]

WAYS: tuple[Way, ...] = (
    full,
    narrow,
    *(functools.partial(shared, family=f, operation=o, num_tables=k) for f, o, k in FACTORS),
)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Sizes of the tables of a way, as `EmbedConfig.fit` has them, for many budgets at once."""

    facts: Facts
    family: str
    operation: str
    num_tables: int  # at most 3

    def config(self, budget: int) -> EmbedConfig:
        """The config of a budget in parameters; a budget of its own parameters gives the same."""
        while True:
            config = EmbedConfig.fit(
                self.facts.num_embeddings,
                self.facts.features,
                self.operation,
                num_params=budget,
                family=functools.partial(partition_of, self.family, num_tables=self.num_tables),
                **self.facts.options,
            )
            if config.num_params == budget:
                return config
            budget = config.num_params

    def width(self, budgets: np.ndarray) -> np.ndarray:
        """Of the largest table."""
        features, k = self.facts.features, self.num_tables
        per_id = np.ceil(budgets / self.facts.num_embeddings)
        if self.operation in ("project", "path"):
            return np.minimum(per_id, features)
        if self.operation == "concat":
            return np.maximum(features // k, np.minimum(per_id, features - (k - 1)))
        return np.full(len(budgets), features)

    def small_width(self, budgets: np.ndarray) -> np.ndarray:
        """Of the others, on average."""
        if self.operation == "concat":
            return (self.facts.features - self.width(budgets)) / (self.num_tables - 1)
        if self.operation == "path":  # maps
            return (self.width(budgets) + 1) * self.facts.features
        return self.width(budgets)

    def small_rows(self, rows: np.ndarray) -> np.ndarray:
        """Of the others together."""
        if self.num_tables == 1:
            return np.zeros(len(rows))
        others = np.ceil(self.facts.num_embeddings / rows)
        if self.num_tables == 2:
            return others
        # Two balanced radices, whose product is no less than that.
        root = np.ceil(np.sqrt(others))
        return 2 * root - ((root - 1) * root >= others)

    def num_dense(self, width: np.ndarray) -> np.ndarray:
        """Parameters of the projection."""
        if self.operation != "project":
            return np.zeros(len(width))
        inputs = width * (self.num_tables + 1) + self.facts.options.get("use_bias", True)
        return inputs * self.facts.features

    def num_params(self, rows: np.ndarray, budgets: np.ndarray) -> np.ndarray:
        """Parameters of tables with so many rows in the largest."""
        width = self.width(budgets)
        in_others = self.small_rows(rows) * self.small_width(budgets)
        return rows * width + in_others + self.num_dense(width)

    @property
    def fewest_rows(self) -> int:
        """Rows of the largest table, when there are fewest in all."""
        n, k = self.facts.num_embeddings, self.num_tables
        return 1 if k == 1 else ceil_root(n, k)

    def is_possible(self, budgets: np.ndarray) -> np.ndarray:
        """Which budgets have such tables; for some "project" has a narrow row for every id."""
        n, features = self.facts.num_embeddings, self.facts.features
        if self.operation == "concat" and features < self.num_tables:
            return np.zeros(len(budgets), bool)
        least = self.num_params(np.full(len(budgets), self.fewest_rows), budgets)
        possible = least <= budgets
        if self.operation == "project":
            bias = features * self.facts.options.get("use_bias", True)
            alone = (budgets - bias) // (n + features)
            possible &= (alone < 1) | (alone * (n + features) + bias < WORTH_ITS_BYTES * budgets)
        return possible

    def rows(self, budgets: np.ndarray) -> np.ndarray:
        """The most rows of the largest table."""
        low = np.full(len(budgets), self.fewest_rows)
        high = np.full(len(budgets), self.facts.num_embeddings)
        while (high - low > 1).any():
            middle = (low + high) // 2
            fits = self.num_params(middle, budgets) <= budgets
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        return low
