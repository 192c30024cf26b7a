"""The rows of a run: which are trained, validated and tested on, and by which process read."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import jax

from qrhash import MeshLayout
from qrhash.batches import process_rows
from qrhash.ctr.data.block import Block, Source
from qrhash.ctr.data.counts import Counts
from qrhash.ctr.data.files import BadLines
from qrhash.ctr.data.pipeline import Batch, batches
from qrhash.ctr.data.shares import Share, Survey
from qrhash.ctr.data.sources import FileSource
from qrhash.ctr.data.vocabulary import Ids
from qrhash.ctr.errors import UserError
from qrhash.ctr.run.display import Display
from qrhash.ctr.run.goals import Goal
from qrhash.ctr.settings import Settings

_Item = TypeVar("_Item", Block, Batch)


def split_line(settings: Settings, num_lines: int) -> int:
    """The first line to test on; lines are counted from 0 and include malformed ones."""
    test_lines = settings.test_rows or max(1, round(num_lines * settings.test_fraction))
    if test_lines >= num_lines:
        raise UserError(
            f"Testing on the last {test_lines} of {num_lines} lines leaves none to train on."
        )
    return num_lines - test_lines


def splits(settings: Settings, source: Source) -> tuple[int, int]:
    """The first lines to validate and to test on, by the order of the lines or by their times."""
    split = split_line(settings, source.num_lines)
    held_back = settings.validation_fraction
    validated = max(1, round(split * held_back)) if held_back else 0
    if validated >= split:
        raise UserError(f"Validating on {validated} of {split} training lines leaves none.")
    if not isinstance(source, FileSource) or source.schema.time is None:
        return split - validated, split
    tested = source.num_lines - split
    *first, split = source.split_by_time(*([validated] if validated else []), tested)
    return (first[0] if first else split), split


def first_pass(
    goal: Goal,
    source: Source,
    counts: Counts,
    train: int,
    bad_lines: BadLines,
    batch_size: int,
    layout: MeshLayout | None,
    display: Display,
) -> tuple[dict[str, Ids], Share | None]:
    """The ids of every column, and what this process is to read, if there are others.

    Args:
      goal: what the run is for.
      source: the rows.
      counts: of its columns; is told what is met.
      train: the lines before it are trained on.
      bad_lines: those of the source.
      batch_size: rows of a batch.
      layout: how it is split.
      display: is told of the pass.
    """
    processes = jax.process_count()
    if layout is None or processes == 1:
        blocks = shown(source.blocks(0, train), display, "vocabulary", train)
        return goal.ids(counts, blocks), None
    survey = Survey(source, bad_lines)
    blocks = shown(survey.blocks(0, train), display, "vocabulary", train // processes)
    ids = goal.ids(counts, blocks)
    for _ in blocks:  # Where no vocabulary needs the pass, the batches do.
        pass
    for _ in survey.blocks(train, source.num_lines):
        pass
    return ids, Share(survey.labels, batch_size, process_rows(batch_size, layout))


class Rows(NamedTuple):
    """The rows of a run: up to `train` to train on, up to `split` to validate on."""

    source: Source
    train: int
    split: int
    ids: Mapping[str, Ids]
    batch_size: int
    goal: Goal
    share: Share | None

    @property
    def is_validated(self) -> bool:
        """Whether there are rows to validate on."""
        return self.train < self.split

    def training(self) -> AbstractContextManager[Any]:
        """The batches to train on."""
        return batches(self.source, 0, self.train, self.ids, self.batch_size, share=self.share)

    def test(self) -> AbstractContextManager[Iterator[Batch]]:
        """The batches to test on."""
        return self._judged(self.split, self.source.num_lines)

    def sample(self, rows: int) -> AbstractContextManager[Iterator[Batch]]:
        """Those to score at a point: of the first lines to validate on, or to test on."""
        end = self.split if self.is_validated else self.source.num_lines
        return self._judged(self.train, min(self.train + rows, end))

    def _judged(self, start: int, stop: int) -> AbstractContextManager[Iterator[Batch]]:
        return batches(
            self.source, start, stop, self.ids, self.batch_size, self.goal.find, self.share
        )


def shown(items: Iterable[_Item], display: Display, phase: str, total: int) -> Iterator[_Item]:
    """The same blocks or batches, with `display` told of them, and of their end."""
    display.phase(phase, total)
    rows = 0
    for item in items:
        yield item
        rows += len(item.labels)
        display.check()
        if display.is_due:
            display.update(rows)
    display.done()
