"""Blocks -> batches of a fixed shape, prefetched in the background by grain.

The last batch is padded with rows of weight 0: no row is lost, and the compiled step sees one
shape only.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from grain import experimental as grain_experimental

from qrhash.ctr.data.block import Block, Lists, Source, no_rows
from qrhash.ctr.data.schema import Column, Schema
from qrhash.ctr.data.shares import Share
from qrhash.ctr.data.vocabulary import Ids
from qrhash.ctr.errors import UserError
from qrhash.keys import Keys

Find = Callable[[Block], np.ndarray]

_PREFETCHED = 4  # batches made ahead of the step


class Padded(NamedTuple):
    """A column of lists as a step takes it.

    Attributes:
      ids: [batch, length] int32, or `Keys`; 0 in places that are not taken.
      mask: [batch, length] bool, which places are: the first ones of every row.
    """

    ids: Any
    mask: np.ndarray


class Batch(NamedTuple):
    """What a step takes.

    Of several processes each has the labels and weights of all rows, and the other columns of those
    that it gives, zeros in place of the others.

    Attributes:
      labels: [batch] float32, 0 or 1.
      weights: [batch] float32, 1 for a row, 0 for padding.
      numbers: [batch, N] float32, sign(x) log(1 + |x|), 0 for a missing number; in the Criteo
        format log(1 + max(x, 0)).
      ids: [batch, columns] int32, of the columns that have ids.
      keys: `Keys` [batch, columns], of those that have none.
      lists: the columns of lists.
      importance: [batch] float32, how much each row counts in the loss; None: all alike.
      items: [batch] int32, which item a row has, -1 for none that is known; None where nobody asks.
      found: within a step, the rows of keys in tables that grow; None: those that they have.
    """

    labels: np.ndarray
    weights: np.ndarray
    numbers: np.ndarray
    ids: np.ndarray
    keys: Keys
    lists: tuple[Padded, ...] = ()
    items: np.ndarray | None = None
    importance: np.ndarray | None = None
    found: Any = None


def encode(block: Block, schema: Schema, ids: Mapping[str, Ids], find: Find | None = None) -> Batch:
    """Rows as a model takes them; `ids` names the columns of the model, in order."""
    numbers = np.nan_to_num(block.numbers)
    if schema.preset == "criteo":
        numbers = np.maximum(numbers, 0)
    numbers = np.sign(numbers) * np.log1p(np.abs(numbers))
    in_ids, in_keys = _numbered(block.keys, block.missing, schema.categories, ids)
    return Batch(
        labels=block.labels,
        weights=np.ones(len(block.labels), np.float32),
        numbers=numbers,
        ids=in_ids,
        keys=in_keys,
        lists=tuple(
            _padded(lists, column, ids[column.name])
            for lists, column in zip(block.lists, schema.of_use("list"), strict=True)
            if column.name in ids
        ),
        items=None if find is None else find(block),
        importance=block.importance,
    )


def joined(parts: Sequence[Batch], size: int) -> Batch:
    """Rows behind each other, padded to so many with rows of weight 0."""
    whole: Batch = _within(_concatenated(parts), 0, size)
    return whole


def _concatenated(parts: Sequence[Batch]) -> Batch:
    """Rows behind each other."""
    whole: Batch = parts[0]
    if len(parts) > 1:
        whole = jax.tree.map(lambda *columns: np.concatenate(columns), *parts)
    return whole


def _numbered(
    keys: np.ndarray, missing: np.ndarray, names: Sequence[str], ids: Mapping[str, Ids]
) -> tuple[np.ndarray, Keys]:
    """Categories as a model takes them.

    Args:
      keys: [rows, names] uint64.
      missing: [rows, names] bool.
      names: of the columns.
      ids: of the columns of the model, in its order; those of lists are left out.

    Returns:
      The ids [rows, columns] int32 of those that have ids, and the keys of the others.
    """
    rows = len(keys)
    in_ids, in_keys = [np.zeros((rows, 0), np.int32)], [Keys.of(np.zeros((rows, 0), np.uint64))]
    for name, of_keys in ids.items():
        if name not in names:
            continue
        place = slice(at := names.index(name), at + 1)
        found = of_keys(keys[:, place], missing[:, place])
        (in_keys if of_keys.num_embeddings is None else in_ids).append(found)
    joined = jax.tree.map(lambda *words: np.concatenate(words, axis=1), *in_keys)
    return np.concatenate(in_ids, axis=1), joined


def _padded(lists: Lists, column: Column, ids: Ids) -> Padded:
    """Lists, none of them longer than the column allows, in rows of its length."""
    assert column.length is not None  # Once the data are open.
    mask = np.arange(column.length) < lists.lengths[:, None]

    def in_places(flat: np.ndarray) -> np.ndarray:
        padded = np.zeros(mask.shape, flat.dtype)
        padded[mask] = flat
        return padded

    found = ids(lists.keys, np.zeros(len(lists.keys), bool))
    return Padded(jax.tree.map(in_places, found), mask)


@contextlib.contextmanager
def batches(
    source: Source,
    start: int,
    stop: int,
    ids: Mapping[str, Ids],
    batch_size: int,
    find: Find | None = None,
    share: Share | None = None,
) -> Iterator[grain.DatasetIterator[Batch]]:
    """The rows of lines [start, stop) as batches of `batch_size`; on exit prefetching ends.

    The state of the iterator is how many batches it gave, whoever read them.

    Args:
      source: of the lines.
      start: the first one.
      stop: behind the last one.
      ids: of the columns of the model, in order.
      batch_size: rows of a batch.
      find: tells the item of each row of a block; with it, batches have their `items`.
      share: what this process is to read, if there are others; see `Batch`.
    """
    maker = _Maker(source, start, stop, ids, batch_size, find, share)
    prefetched = grain_experimental.ThreadPrefetchIterDataset(
        _Batches(maker), prefetch_buffer_size=_PREFETCHED
    )
    with contextlib.closing(iter(prefetched)) as iterator:
        yield iterator


class _Maker(NamedTuple):
    """What `batches` was given."""

    source: Source
    start: int
    stop: int
    ids: Mapping[str, Ids]
    batch_size: int
    find: Find | None = None
    share: Share | None = None

    def batches(self, first: int) -> Iterator[Batch]:
        """Yields the batches from number `first` on."""
        make = self._whole if self.share is None else self._shared
        return make(first * self.batch_size)

    def _whole(self, skipped: int) -> Iterator[Batch]:
        """Yields the batches behind so many rows."""
        blocks = self.source.blocks(self.start, self.stop)
        rows = self._rows(_behind(blocks, skipped))
        while len((batch := rows.take(self.batch_size)).labels):
            yield _within(batch, 0, self.batch_size)

    def _shared(self, skipped: int) -> Iterator[Batch]:
        """As `_whole`, of this process's share."""
        size, share = self.batch_size, self.share
        assert share is not None
        wanted = share.wanted(self.start, self.stop, skipped)
        rows = self._rows(self.source.blocks(self.start, self.stop, wanted))
        labels = share.labels_of(self.start, self.stop)
        for begin in range(skipped, len(labels), size):
            of_batch = labels[begin : begin + size].astype(np.float32)
            own = rows.take(len(of_batch[share.rows]))
            if not np.array_equal(own.labels, of_batch[share.rows]):
                raise UserError(
                    f"{self.source.name} changed during the run: there are other rows than at "
                    "first; start again when it is complete."
                )
            batch = _within(own, share.rows.start, size)
            weights = np.ones_like(of_batch)
            yield batch._replace(
                labels=_within(of_batch, 0, size), weights=_within(weights, 0, size)
            )

    def _rows(self, blocks: Iterable[Block]) -> "_Rows":
        def encoded(block: Block) -> Batch:
            return encode(block, self.source.schema, self.ids, self.find)

        some = (encoded(block) for block in blocks if len(block.labels))
        return _Rows(some, encoded(no_rows(self.source.schema)))


class _Rows:
    """Rows, as many at a time as are asked for.

    Args:
      parts: the rows.
      nothing: no rows.
    """

    def __init__(self, parts: Iterator[Batch], nothing: Batch) -> None:
        self._parts, self._nothing, self._rest = parts, nothing, nothing

    def take(self, rows: int) -> Batch:
        """The next rows, or fewer where there are no more."""
        found, count = [self._rest], len(self._rest.labels)
        while count < rows and (part := next(self._parts, None)) is not None:
            found.append(part)
            count += len(part.labels)
        found = [part for part in found if len(part.labels)] or [self._nothing]
        whole = _concatenated(found)
        self._rest = jax.tree.map(lambda column: column[rows:], whole)
        return jax.tree.map(lambda column: column[:rows], whole)


def _behind(blocks: Iterable[Block], skipped: int) -> Iterator[Block]:
    """The blocks without so many rows at their beginning."""
    for block in blocks:
        yield block.rows(min(skipped, len(block.labels)), len(block.labels)) if skipped else block
        skipped -= min(skipped, len(block.labels))


def _within(tree: Any, before: int, size: int) -> Any:
    """Arrays [rows, ...] in arrays of zeros [size, ...], behind so many rows."""

    def put(column: np.ndarray) -> np.ndarray:
        behind = size - before - len(column)
        return np.pad(column, [(before, behind), *[(0, 0)] * (column.ndim - 1)])

    return jax.tree.map(put, tree)


class _Batches(grain.IterDataset[Batch]):
    """Batches as a grain dataset."""

    def __init__(self, maker: _Maker) -> None:
        super().__init__()
        self._maker = maker

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        return _BatchIterator(self._maker)


class _BatchIterator(grain.DatasetIterator[Batch]):
    def __init__(self, maker: _Maker) -> None:
        super().__init__()
        self._maker = maker
        self._state: dict[str, Any] = {}
        self.set_state({"batches": 0})

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._state = {"batches": self._state["batches"] + 1}
        return batch

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        self._batches = self._maker.batches(state["batches"])
        self._state = state
