"""Blocks -> batches of a fixed shape, prefetched in the background by grain.

The last batch is padded with rows of weight 0: no row is lost, and the compiled step sees one
shape only.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from grain import experimental as grain_experimental

from qrhash.ctr.data.block import Block, Lists, Source
from qrhash.ctr.data.schema import Column, Schema
from qrhash.ctr.data.vocabulary import Ids
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
    """

    labels: np.ndarray
    weights: np.ndarray
    numbers: np.ndarray
    ids: np.ndarray
    keys: Keys
    lists: tuple[Padded, ...] = ()
    items: np.ndarray | None = None
    importance: np.ndarray | None = None


def encode(block: Block, schema: Schema, ids: Mapping[str, Ids], find: Find | None = None) -> Batch:
    """Rows as a model takes them; `ids` names the columns of the model, in order."""
    numbers = np.nan_to_num(block.numbers)
    if schema.preset == "criteo":
        numbers = np.maximum(numbers, 0)
    numbers = np.sign(numbers) * np.log1p(np.abs(numbers))
    in_ids, in_keys = numbered(block.keys, block.missing, schema.categories, ids)
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


def numbered(
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
) -> Iterator[grain.DatasetIterator[Batch]]:
    """The rows of lines [start, stop) as batches of `batch_size`; on exit prefetching ends.

    With `find`, which tells the item of each row of a block, batches have their `items`.
    """

    def pad(batch: Batch) -> Batch:
        missing = batch_size - len(batch.labels)
        return jax.tree.map(lambda x: np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]), batch)

    blocks: grain.IterDataset[Any] = _Blocks(source, start, stop)
    encoded = blocks.map(lambda block: encode(block, source.schema, ids, find))
    batched = grain_experimental.RebatchIterDataset(encoded, batch_size).map(pad)
    prefetched = grain_experimental.ThreadPrefetchIterDataset(
        batched, prefetch_buffer_size=_PREFETCHED
    )
    with contextlib.closing(iter(prefetched)) as iterator:
        yield iterator


class _Blocks(grain.IterDataset[Block]):
    """The blocks of a source that hold any rows, as a grain dataset."""

    def __init__(self, source: Source, start: int, stop: int) -> None:
        super().__init__()
        self._range = (source, start, stop)

    def __iter__(self) -> grain.DatasetIterator[Block]:
        return _BlockIterator(*self._range)


class _BlockIterator(grain.DatasetIterator[Block]):
    def __init__(self, source: Source, start: int, stop: int) -> None:
        super().__init__()
        self._range = (source, start, stop)
        self._state: dict[str, Any] = {}
        self.set_state({"blocks": 0})

    def __next__(self) -> Block:
        block = next(self._blocks)
        self._state = {"blocks": self._state["blocks"] + 1}
        return block

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        source, start, stop = self._range
        self._blocks = (block for block in source.blocks(start, stop) if len(block.labels))
        self._state = state
        for _ in range(state["blocks"]):
            next(self._blocks)
