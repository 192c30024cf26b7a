"""Retrieval: which of all items is wanted, learnt from the rows in which one was.

The columns that `--items` names, categories or lists of them, describe the item, all others the
query. The items to choose from are the distinct ones of the positive training rows, told by all of
their columns; a model is judged by the place of the item of a positive test row among all of them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from qrhash import MeshLayout
from qrhash.arithmetic import ceil_div
from qrhash.ctr.data.block import Block, Source
from qrhash.ctr.data.catalogue import Catalogue, Positives
from qrhash.ctr.data.counts import Counts, build_ids
from qrhash.ctr.data.inference import listed
from qrhash.ctr.data.pipeline import Batch, encode, joined
from qrhash.ctr.data.schema import Schema
from qrhash.ctr.data.vocabulary import Ids, Vocabulary
from qrhash.ctr.errors import UserError
from qrhash.ctr.model.losses import InBatchSoftmax
from qrhash.ctr.model.metrics import Judged
from qrhash.ctr.model.ranks import Retrieved, popularity_ranks, ranks, retrieved
from qrhash.ctr.model.room import ColumnConfig
from qrhash.ctr.model.towers import TwoTower, build_towers
from qrhash.ctr.options import split_names
from qrhash.ctr.run.learner import Learner
from qrhash.ctr.settings import Settings
from qrhash.ctr.tower_settings import recall_ranks

_ITEMS, _QUERIES = 4096, 1024  # about so many at once in a product


class Retrieval:
    """Finding the item of a positive row by all its other columns; a `Goal`.

    Args:
      settings: the options.
      schema: the columns of the data.

    Raises:
      UserError: there are no items, or they are no categories or lists, or nothing else describes a
        query.
    """

    wanted = "can be read and is positive"
    has_truth = False

    def __init__(self, settings: Settings, schema: Schema) -> None:
        self._settings, self._schema = settings, schema
        self.items = _items(settings, schema)
        self._recall_at = recall_ranks(settings)
        self._catalogue = Catalogue(schema, self.items)
        self._used: dict[str, Ids] = {}
        self._objective = InBatchSoftmax()
        self._functions: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def source(self, source: Source) -> Source:
        """The positive rows."""
        return Positives(source)

    def ids(self, counts: Counts, blocks: Iterable[Block]) -> dict[str, Ids]:
        """See `build_ids`; in the same pass the items are gathered."""
        blocks = self._catalogue.watching(blocks)
        found = build_ids(counts, blocks)
        for _ in blocks:  # Where no vocabulary needs the pass, the items do.
            pass
        self._catalogue.gather()
        if not self._catalogue.rows:
            raise UserError("None of the training rows is positive: there is nothing to find.")
        return found

    def num_rows(self, lines: int) -> int:
        """The positive rows there were."""
        return self._catalogue.rows

    def find(self, block: Block) -> np.ndarray:
        """Which item each row has; -1 for one that no training row has."""
        return self._catalogue.find(block)

    @property
    def note(self) -> str:
        """The items, in a sentence."""
        count = self._catalogue
        return (
            f"items by {', '.join(self.items)}: {len(count):,} in {count.rows:,} positive training "
            "rows"
        )

    def learner(
        self,
        configs: Mapping[str, ColumnConfig],
        ids: Mapping[str, Ids],
        *,
        num_steps: int,
        layout: MeshLayout | None = None,
        to_restore: bool = False,
    ) -> Learner:
        """Two towers, and the in-batch softmax: by counts, if the item is one vocabulary."""
        self._used = {name: ids[name] for name in configs if name in self.items}
        if not self._used:
            raise UserError("All items are dropped: there is nothing to describe them by.")
        num_numbers = len(self._schema.numbers)
        if len(self._used) == len(configs) and not num_numbers:
            raise UserError("There is nothing to describe a query by but columns that are dropped.")
        self._objective = InBatchSoftmax(self._counts())
        return Learner(
            lambda: build_towers(
                self._settings, configs, self.items, num_numbers, self._schema.lists
            ),
            self._settings,
            objective=self._objective,
            num_steps=num_steps,
            layout=layout,
            to_restore=to_restore,
        )

    def _counts(self) -> np.ndarray | None:
        """How many training rows each id of the item has, [ids]; None, if it is more than an id."""
        if len(self.items) > 1 or self.items[0] in self._schema.lists:
            return None
        (of_keys,) = self._used.values()
        if not isinstance(of_keys, Vocabulary):
            return None
        counts, items = np.zeros(of_keys.num_embeddings), self._catalogue.items
        ids = of_keys(items.keys[:, 0], items.missing[:, 0])
        np.add.at(counts, ids, self._catalogue.counts)
        return counts

    def running(self, labels: np.ndarray, outputs: np.ndarray) -> Judged:
        """The in-batch loss of training rows, by what the steps gave."""
        return Retrieved(float(np.mean(outputs)), {}, math.nan, math.nan, len(outputs))

    def scores(self, learner: Learner, batches: Iterable[Batch]) -> Judged:
        """Loss, recall and mean reciprocal rank of a model."""
        found, losses, _ = self._judged(learner, batches)
        return retrieved(found, self._recall_at, losses)

    def tested(
        self, learner: Learner, batches: Iterable[Batch], click_rate: float
    ) -> tuple[Judged, Judged]:
        """The scores of a model, and of always recommending the most popular items."""
        found, losses, wanted = self._judged(learner, batches)
        popular = popularity_ranks(self._catalogue.counts, wanted)
        return (
            retrieved(found, self._recall_at, losses),
            retrieved(popular, self._recall_at),
        )

    def _judged(
        self, learner: Learner, batches: Iterable[Batch]
    ) -> tuple[np.ndarray, float, np.ndarray]:
        """The ranks [rows] of the items of the rows, the mean of their losses, the items [rows]."""
        judge, vectors = self._functions_of(learner)
        items = list(self._item_vectors(vectors))
        every = [(np.zeros(0), np.zeros(0, np.float32), np.zeros(0, np.int32))]
        for chunk in _chunks(batches, ceil_div(_QUERIES, self._settings.batch_size)):
            queries, losses, wanted = (
                np.concatenate(list(map(np.asarray, column)))
                for column in zip(*map(judge, chunk), strict=True)
            )
            real = np.concatenate([each.weights for each in chunk]) > 0
            found = ranks(queries, items, wanted, len(self._catalogue))
            every.append((found[real], losses[real], wanted[real]))
        found, losses, wanted = map(np.concatenate, zip(*every, strict=True))
        loss = float(np.mean(losses, dtype=np.float64)) if len(losses) else math.nan
        return found, loss, wanted

    def _item_vectors(self, vectors: Callable[..., Any]) -> Iterator[np.ndarray]:
        """The vectors of the items, in blocks [n, width] whose last one is padded."""
        catalogue, size = self._catalogue, self._settings.batch_size
        size *= ceil_div(_ITEMS, size)  # which the devices divide, as they do a batch
        for first in range(0, len(catalogue), size):
            part = catalogue.items.rows(first, first + size)
            batch = joined([encode(part, catalogue.schema, self._used)], size)
            yield np.asarray(vectors((batch.ids, batch.keys, batch.lists)))

    def _functions_of(self, learner: Learner) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What judges a batch, and what makes vectors of items; compiled once."""
        if self._functions is None:
            objective = self._objective

            def judge(model: TwoTower, batch: Batch, kept: Any) -> tuple[Any, ...]:
                """Queries, losses, and items: those of all processes."""
                return (*objective.judge(model, batch, kept), batch.items)

            self._functions = (learner.compiled(judge), learner.compiled(_items_of))
        return self._functions


def _items_of(model: TwoTower, inputs: tuple[Any, ...], _: Any) -> jax.Array:
    return model.items(*inputs)


def _chunks(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Batches, so many at a time; the last chunk is padded with batches of no weight."""
    chunk: list[Batch] = []
    for batch in batches:
        chunk.append(batch)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        nothing = chunk[-1]._replace(weights=np.zeros_like(chunk[-1].weights))
        yield chunk + [nothing] * (size - len(chunk))


def _items(settings: Settings, schema: Schema) -> tuple[str, ...]:
    """The columns of the item, in the order of the data, those of lists last."""
    named = split_names(settings.items)
    if not named:
        raise UserError(
            "Which columns describe the item to be found? Name them with --items, of the "
            f"categories and lists {listed(schema.embedded)}."
        )
    for name in named:
        if name not in schema.embedded:
            raise UserError(
                f"--items: {name!r} is neither a category nor a list of the data; these are: "
                f"{listed(schema.embedded)}."
            )
    if set(named) == set(schema.embedded) and not schema.numbers:
        raise UserError("--items names every column: none is left to describe the query by.")
    return tuple(name for name in schema.embedded if name in named)
