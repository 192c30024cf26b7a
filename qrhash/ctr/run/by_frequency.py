"""How good a model of clicks is for ids of the head, the middle and the tail.

A look-up of an id is an event of it: a row is one event of each of its categories, and one of each
element of its lists.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from qrhash.ctr.data.block import Source
from qrhash.ctr.data.pipeline import Batch, batches
from qrhash.ctr.data.population import Population
from qrhash.ctr.model.metrics import Scores, click_rates, scores
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.rows import shown
from qrhash.ctr.run.trained import Trained
from qrhash.inspection import BANDS


class Judged(NamedTuple):
    """How good the scores of some events are.

    Attributes:
      scores: log loss and AUC; nan where they are not defined.
      clicked: share of the events that are clicks.
      predicted: mean of their scores: what the share should be, if the model is right.
    """

    scores: Scores
    clicked: float
    predicted: float


class ByFrequency(NamedTuple):
    """How good a model is.

    Attributes:
      rows: on all rows that have a label.
      bands: column name -> the same of each of `qrhash.inspection.BANDS`.
    """

    rows: Judged
    bands: Mapping[str, tuple[Judged, ...]]


def by_frequency(
    trained: Trained,
    source: Source,
    lines: tuple[int, int],
    populations: Mapping[str, Population],
    batch_size: int,
    display: Display,
) -> ByFrequency:
    """Scores the rows of some lines.

    Args:
      trained: a model of clicks.
      source: the rows.
      lines: from the first one to behind the last one.
      populations: column name -> which ids are of which band.
      batch_size: rows scored at once.
      display: is told how far it is.
    """
    lists = [column.name for column in source.schema.of_use("list")]
    events: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in populations}
    labels, logits = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    rows = 0
    with batches(source, *lines, trained.ids, batch_size) as stream:
        for batch in shown(stream, display, "scoring", lines[1] - lines[0]):
            known = (batch.weights > 0) & ~np.isnan(batch.labels)
            number_of = (rows + np.cumsum(known) - 1).astype(np.int32)
            labels.append(batch.labels[known])
            logits.append(np.asarray(trained.learner.logits(batch))[known])
            for name, taken, mask in _columns(batch, trained, lists):
                if name not in populations:
                    continue
                meant = mask & known[:, None]
                at = np.broadcast_to(number_of[:, None], mask.shape)[meant]
                events[name].append((at, populations[name].bands_of(taken)[meant]))
            rows += int(known.sum())
    every = np.concatenate(labels), np.concatenate(logits)
    return ByFrequency(
        _judged(*every),
        {name: tuple(_of_bands(of_column, *every)) for name, of_column in events.items()},
    )


def _columns(
    batch: Batch, trained: Trained, lists: list[str]
) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Yields (name, ids or keys [batch, n], which of them are meant) of every column."""
    places = {True: 0, False: 0}
    one = np.ones((len(batch.labels), 1), bool)
    for name, of_keys in trained.ids.items():
        if name not in lists:
            takes_keys = of_keys.num_embeddings is None
            at = places[takes_keys]
            places[takes_keys] += 1
            yield name, (batch.keys if takes_keys else batch.ids)[:, at : at + 1], one
    used = [name for name in lists if name in trained.ids]
    for name, padded in zip(used, batch.lists, strict=True):
        yield name, padded.ids, padded.mask


def _of_bands(
    events: list[tuple[np.ndarray, np.ndarray]], labels: np.ndarray, logits: np.ndarray
) -> Iterator[Judged]:
    nothing = (np.zeros(0, np.int32), np.zeros(0, np.uint8))
    rows, bands = (np.concatenate(each) for each in zip(nothing, *events, strict=True))
    for band in range(len(BANDS)):
        of_band = rows[bands == band]
        yield _judged(labels[of_band], logits[of_band])


def _judged(labels: np.ndarray, logits: np.ndarray) -> Judged:
    if not len(labels):
        return Judged(scores(labels, logits), math.nan, math.nan)
    rate = float(click_rates(logits).mean())
    return Judged(scores(labels, logits), float(labels.mean()), rate)
