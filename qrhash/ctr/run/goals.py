"""What a run is for: telling clicks, or finding items.

A goal says which rows are learnt from, which model learns from them by which loss, and how good it
is on others.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import numpy as np

from qrhash import MeshLayout
from qrhash.ctr.data.block import Block, Source
from qrhash.ctr.data.counts import Counts, build_ids
from qrhash.ctr.data.pipeline import Batch
from qrhash.ctr.data.schema import Schema
from qrhash.ctr.data.vocabulary import Ids
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.metrics import Judged, constant_logit, scores
from qrhash.ctr.model.models import build_model
from qrhash.ctr.model.room import ColumnConfig, stored_table
from qrhash.ctr.run.learner import Learner
from qrhash.ctr.run.progress import collect
from qrhash.ctr.run.retrieval import Retrieval
from qrhash.ctr.settings import Settings
from qrhash.ctr.tower_settings import TWO_TOWER


class Goal(Protocol):
    """What a run is for.

    Attributes:
      wanted: what must be true of some lines, in words.
      has_truth: whether the synthetic stream knows the best possible scores.
    """

    wanted: str
    has_truth: bool

    @property
    def find(self) -> Callable[[Block], np.ndarray] | None:
        """What tells the item of each row of a block, for the batches to be judged by."""
        ...

    def source(self, source: Source) -> Source:
        """Those rows of a source that it is about."""
        ...

    def ids(self, counts: Counts, blocks: Iterable[Block]) -> dict[str, Ids]:
        """The ids of every column, by a pass over the training rows; see `build_ids`."""
        ...

    @property
    def note(self) -> str:
        """What to tell beside the columns, when there are ids."""
        ...

    def num_rows(self, lines: int) -> int:
        """How many rows there are to train on in so many lines, at most."""
        ...

    def learner(
        self,
        configs: Mapping[str, ColumnConfig],
        ids: Mapping[str, Ids],
        *,
        num_steps: int,
        layout: MeshLayout | None = None,
        to_restore: bool = False,
    ) -> Learner:
        """Its model in training.

        Args:
          configs: of the embeddings.
          ids: of every column.
          num_steps: see `Learner`.
          layout: see `Learner`.
          to_restore: see `Learner`.

        Raises:
          UserError: nothing is left to learn from.
        """
        ...

    def running(self, labels: np.ndarray, outputs: np.ndarray) -> Judged:
        """The scores of training rows, by what the steps gave."""
        ...

    def scores(self, learner: Learner, batches: Iterable[Batch]) -> Judged:
        """The scores of a model."""
        ...

    def tested(
        self, learner: Learner, batches: Iterable[Batch], click_rate: float
    ) -> tuple[Judged, Judged]:
        """The scores of a model, and of a baseline that knows no columns."""
        ...


class Clicks:
    """Telling the probability of a click."""

    wanted = "can be read"
    has_truth = True
    note = ""
    find: Callable[[Block], np.ndarray] | None = None

    def __init__(self, settings: Settings, schema: Schema) -> None:
        self._settings, self._schema = settings, schema

    def source(self, source: Source) -> Source:
        """All rows."""
        return source

    def ids(self, counts: Counts, blocks: Iterable[Block]) -> dict[str, Ids]:
        """See `build_ids`."""
        return build_ids(counts, blocks)

    def num_rows(self, lines: int) -> int:
        """All of them."""
        return lines

    def learner(
        self,
        configs: Mapping[str, ColumnConfig],
        ids: Mapping[str, Ids],
        *,
        num_steps: int,
        layout: MeshLayout | None = None,
        to_restore: bool = False,
    ) -> Learner:
        """DLRM or DCN-v2, and the log loss."""
        num_numbers = len(self._schema.numbers)
        if not configs and not num_numbers:
            raise UserError("All categories are dropped, and there are no numbers to learn from.")
        return Learner(
            lambda: build_model(self._settings, configs, num_numbers, self._schema.lists),
            self._settings,
            num_steps=num_steps,
            layout=layout,
            stored=stored_table(self._settings, configs),
            to_restore=to_restore,
        )

    def running(self, labels: np.ndarray, outputs: np.ndarray) -> Judged:
        """Log loss and AUC."""
        return scores(labels, outputs)

    def scores(self, learner: Learner, batches: Iterable[Batch]) -> Judged:
        """Log loss and AUC."""
        return scores(*collect((batch, learner.logits(batch)) for batch in batches))

    def tested(
        self, learner: Learner, batches: Iterable[Batch], click_rate: float
    ) -> tuple[Judged, Judged]:
        """The scores of the model, and of always saying the click rate."""
        labels, logits = collect((batch, learner.logits(batch)) for batch in batches)
        constant = np.full(len(labels), constant_logit(click_rate))
        return scores(labels, logits), scores(labels, constant)


def make_goal(settings: Settings, schema: Schema) -> Goal:
    """The goal that the settings' model is for.

    Raises:
      UserError: the columns of the data are not what it needs.
    """
    return (Retrieval if settings.model == TWO_TOWER else Clicks)(settings, schema)
