"""The ids of a column by how often they were met, and the keys that they stand for.

A vocabulary has a key for each id, but for those that have none; a hash has several keys for one
id, which the most frequent of them then names; and where keys are taken as they are, those that
were met are all there is.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from qrhash.ctr.data.counts import KeyCounts
from qrhash.ctr.data.vocabulary import UNSEEN_ID, HashedIds, Ids, Vocabulary
from qrhash.inspection import BANDS, frequency_bands
from qrhash.keys import Keys

_NO_KEY, _ONE_KEY, _MISSING, _OTHERS = range(4)


@dataclass(frozen=True, eq=False)
class Population:
    """The ids of a column, the most frequent first.

    Attributes:
      ids: what a model takes: ids [n], or `Keys` [n].
      counts: how often each was met, int64 [n], falling.
      bands: which of `qrhash.inspection.BANDS` each is in, uint8 [n].
      keys: a key of each, uint64 [n]; 0 where there is none.
      kinds: whether there is such a key, or what the id stands for instead, uint8 [n].
    """

    ids: Any
    counts: np.ndarray
    bands: np.ndarray
    keys: np.ndarray
    kinds: np.ndarray

    @property
    def num_met(self) -> int:
        """How many were met: the first ones."""
        return int((self.counts > 0).sum())

    def has_key(self, place: int) -> bool:
        """Whether a key names the id at a place."""
        return bool(self.kinds[place] == _ONE_KEY)

    def nameless(self, place: int) -> str:
        """What the id at a place stands for, where no key does."""
        words = {_MISSING: "(missing)", _OTHERS: "(all others)"}
        return words.get(int(self.kinds[place]), f"(id {self.ids[place]}, never met)")

    def place_of(self, taken: Any) -> int:
        """The place of an id, or of a key of `Keys`, [1]; -1 for one that was not met."""
        (place,) = self._places(taken)
        return int(place) if place >= 0 and self.counts[place] else -1

    def bands_of(self, taken: Any) -> np.ndarray:
        """The bands of ids, or of `Keys`, [*shape] uint8; of what was not met the last one."""
        if not len(self.counts):
            return np.full(taken.shape, len(BANDS) - 1, np.uint8)
        places = self._places(taken)
        return np.where(places >= 0, self.bands[places], np.uint8(len(BANDS) - 1))

    def _places(self, taken: Any) -> np.ndarray:
        """Where ids or keys [*shape] are, int64 [*shape]; -1 for what is not there."""
        wanted, (order, every) = _plain(taken), self._sorted
        if not len(every):
            return np.full(wanted.shape, -1)
        at = np.searchsorted(every, wanted).clip(max=len(every) - 1)
        return np.where(every[at] == wanted, order[at], -1)

    @functools.cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """The places of all ids in the order of these, and the ids in this order."""
        every = _plain(self.ids)
        order = np.argsort(every, kind="stable")
        return order, every[order]


def _plain(taken: Any) -> np.ndarray:
    """Ids, or keys as integers, of NumPy."""
    return taken.to_numpy() if isinstance(taken, Keys) else np.asarray(taken)


def population(of_keys: Ids, met: KeyCounts) -> Population:
    """The ids of a column.

    Args:
      of_keys: what makes them.
      met: how often each key was met.
    """
    keys, counts, num_missing = met.found()
    keys = np.append(keys, np.uint64(0))
    counts = np.append(counts, num_missing)
    is_missing = np.arange(len(keys)) == len(keys) - 1
    by_count = np.argsort(-counts, kind="stable")
    keys, counts, is_missing = keys[by_count], counts[by_count], is_missing[by_count]
    kinds = np.where(is_missing, _MISSING, _ONE_KEY).astype(np.uint8)
    size = of_keys.num_embeddings
    if size is None:
        some = counts > 0
        keys, counts, kinds = keys[some], counts[some], kinds[some]
        ids = of_keys(keys, kinds == _MISSING)
        return Population(ids, counts, frequency_bands(counts), keys, kinds)
    of_id = of_keys(keys, is_missing)
    total = np.zeros(size, np.int64)
    np.add.at(total, of_id, counts)
    named, stands = np.zeros(size, np.uint64), np.full(size, _NO_KEY, np.uint8)
    if isinstance(of_keys, Vocabulary):
        named[of_keys.ids], stands[of_keys.ids] = of_keys.keys, _ONE_KEY
        stands[of_keys.missing_id], stands[UNSEEN_ID] = _MISSING, _OTHERS
    else:
        assert isinstance(of_keys, HashedIds)
        # Backwards, so that the most frequent key has the last word.
        named[of_id[::-1]], stands[of_id[::-1]] = keys[::-1], kinds[::-1]
    order = np.argsort(-total, kind="stable")
    bands = frequency_bands(total[order])
    ids = order.astype(np.int32)
    return Population(ids, total[order], bands, named[order], stands[order])
