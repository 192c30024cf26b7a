"""What became of the embeddings of a run: what there is to be shown, drawn and written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qrhash.ctr.data.population import Population
from qrhash.ctr.run.by_frequency import ByFrequency
from qrhash.inspection import NearTwins, Neighbours, TableTraffic, Twins

MOST_NAMED = 20  # ids of a set of twins, of which there may be a million


@dataclass(frozen=True, kw_only=True)
class Room:
    """The rows of a table that grows.

    Attributes:
      columns: which share it.
      capacity: how many rows there are.
      num_keys: how many of them a key has.
      counts: how often each of these keys was met since it has it, [num_keys] int.
    """

    columns: tuple[str, ...]
    capacity: int
    num_keys: int
    counts: np.ndarray

    @property
    def count_quantiles(self) -> list[float]:
        """How often these keys were met: a tenth, a half and nine tenths of them at most, [3]."""
        return np.quantile(self.counts, (0.1, 0.5, 0.9)).tolist() if self.num_keys else [0.0] * 3


@dataclass(frozen=True, kw_only=True)
class ColumnReport:
    """What became of the embedding of a column. Ids are named by their place in `population`.

    Attributes:
      name: of the column.
      config: its embedding.
      population: its ids, the most frequent first.
      twins: of those that were met; None where the question has no meaning.
      near: near twins, of the most frequent ones.
      tables: where the look-ups go; none, in a table that grows.
      sampled: the places of the ids whose vectors' lengths are known, [m].
      norms: these lengths, [m].
      has_row: in a table that grows: which of the ids that were met have a row, bool [n].
      notes: what else is to be said, in sentences.
    """

    name: str
    config: Any
    population: Population
    twins: Twins | None
    near: NearTwins
    tables: tuple[TableTraffic, ...]
    sampled: np.ndarray
    norms: np.ndarray
    has_row: np.ndarray | None
    notes: tuple[str, ...]

    @property
    def longest(self) -> TableTraffic | None:
        """The look-ups of its table of most rows."""
        return max(self.tables, key=lambda table: table.num_rows, default=None)

    @property
    def with_row(self) -> tuple[int, float] | None:
        """How many of the keys that were met have a row, and their share of look-ups."""
        if self.has_row is None:
            return None
        counts = self.population.counts[: len(self.has_row)]
        return int(self.has_row.sum()), float(counts[self.has_row].sum() / max(1, counts.sum()))

    def norm_quantiles(self, band: int) -> np.ndarray | None:
        """The lengths of a band's vectors below which a tenth, a half and nine tenths are, [3]."""
        of_band = self.norms[self.population.bands[self.sampled] == band]
        return np.quantile(of_band, (0.1, 0.5, 0.9)) if len(of_band) else None


class Asked(NamedTuple):
    """The neighbours of an id that was asked for: its place, and theirs."""

    column: str
    value: str
    place: int
    found: Neighbours


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What became of the embeddings of a run.

    Attributes:
      run: its directory.
      steps: how many the model was trained for.
      columns: those of most ids first.
      rooms: the tables that grow.
      scores: how good the model is; None, where that is not known.
      neighbours: of the ids that were asked for.
      names: column name -> place of an id -> what it is called in the data.
      counted: which rows were counted, in words.
      num_counted: how many there are.
      scored: what was scored, in words; or why nothing was.
    """

    run: Path
    steps: int
    columns: tuple[ColumnReport, ...]
    rooms: tuple[Room, ...]
    scores: ByFrequency | None
    neighbours: tuple[Asked, ...]
    names: Mapping[str, Mapping[int, str]]
    counted: str
    num_counted: int
    scored: str
