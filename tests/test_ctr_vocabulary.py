"""Keys -> ids, held against `collections.Counter`."""

import collections

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from qrhash.ctr.data.block import Block
from qrhash.ctr.data.counts import Counts, KeyCounts, build_ids
from qrhash.ctr.data.criteo import CATEGORIES
from qrhash.ctr.data.vocabulary import MISSING_KEY, UNSEEN_ID, HashedIds, RawKeys
from qrhash.ctr.settings import Settings


def _arrays(cells):
    """Keys, None for a missing one -> uint64 keys and where they are missing."""
    keys = np.array([0 if cell is None else cell for cell in cells], np.uint64)
    return keys, np.array([cell is None for cell in cells], bool)


def _oracle(keys, min_count):
    counts = collections.Counter(keys)
    common = [key for key in counts if counts[key] >= min_count]
    ranked = sorted(common, key=lambda key: (-counts[key], -1 if key is None else key))
    return {key: 1 + rank for rank, key in enumerate(ranked)}


@pytest.mark.parametrize("min_count", [1, 2, 5])
@pytest.mark.parametrize("least_pending", [1, 40, 1 << 16])
def test_vocabulary_equals_a_counter(min_count, least_pending, rng, monkeypatch):
    monkeypatch.setattr(KeyCounts, "_LEAST_PENDING", least_pending)
    known = [None, 0, 2**64 - 1, 2**63, 2**60, *range(1, 300)]
    keys = [known[place] for place in (rng.zipf(1.3, 2000) % 300).tolist()]
    assert {None, 0, 2**64 - 1, 2**63} < set(keys)
    counts = KeyCounts()
    for part in np.array_split(np.arange(2000), 23):
        counts.add(*_arrays([keys[i] for i in part]))
    vocabulary = counts.vocabulary(min_count)
    wanted = _oracle(keys, min_count)
    asked = [*known, *range(300, 400), 2**63 - 1]
    assert vocabulary.num_embeddings == len(wanted) + 1
    got = vocabulary(*_arrays(asked))
    assert got.dtype == np.int32
    assert got.tolist() == [wanted.get(key, UNSEEN_ID) for key in asked]


CELLS = st.lists(st.none() | st.integers(0, 2**64 - 1), min_size=1)


@hypothesis.given(CELLS, CELLS)
def test_a_vocabulary_tells_all_keys_and_the_missing_cell_apart(cells, others):
    counts = KeyCounts()
    counts.add(*_arrays(cells))
    vocabulary = counts.vocabulary(min_count=1)
    asked = list(dict.fromkeys([*cells, *others]))
    ids = vocabulary(*_arrays(asked)).tolist()
    for cell, number in zip(asked, ids, strict=True):
        assert (number == UNSEEN_ID) == (cell not in cells)
    known = [number for number in ids if number != UNSEEN_ID]
    assert sorted(known) == list(range(1, vocabulary.num_embeddings))


@hypothesis.given(CELLS, st.integers(2, 2**31 - 1))
def test_hashed_ids_are_the_remainders_of_unsigned_keys(cells, size):
    ids = HashedIds(size)(*_arrays(cells))
    assert ids.dtype == np.int32
    assert ids.tolist() == [0 if cell is None else 1 + cell % (size - 1) for cell in cells]


def test_a_vocabulary_without_keys_knows_none():
    counts = KeyCounts()
    counts.add(*_arrays([7, 8]))
    vocabulary = counts.vocabulary(min_count=2)
    assert vocabulary.num_embeddings == 1
    assert vocabulary(*_arrays([7, 2**64 - 1, None])).tolist() == [UNSEEN_ID] * 3


def test_hashed_ids():
    ids = HashedIds(10)
    keys = _arrays([None, 0, 8, 9, 2**60 - 1, 2**64 - 1])
    assert ids(*keys).tolist() == [0, 1, 9, 1, 1 + (2**60 - 1) % 9, 1 + (2**64 - 1) % 9]
    assert ids(*keys).dtype == np.int32


def test_every_column_has_ids_of_its_own():
    keys = np.arange(4, dtype=np.uint64)[:, None] * np.arange(1, 27, dtype=np.uint64)
    block = Block(np.zeros(4, np.float32), np.zeros((4, 13), np.float32), keys, keys > 100)
    settings = Settings(columns={"C2": {"hash_size": 5}, "C3": {"min_count": 2}})
    ids = build_ids(Counts(settings, CATEGORIES), iter([block, block]))
    assert list(ids) == list(CATEGORIES)
    assert ids["C1"](*_arrays([0, 3, 4])).tolist() == [1, 4, 0]
    assert ids["C4"](*_arrays([0, 12, 3])).tolist() == [1, 4, 0]
    assert ids["C2"] == HashedIds(5)
    assert ids["C3"].num_embeddings == 5


def test_hashing_all_columns_reads_no_rows():
    def blocks():
        raise AssertionError("read")
        yield

    for settings, ids in ((Settings(hash_size=9), HashedIds(9)), (Settings(ids="keys"), RawKeys())):
        assert set(build_ids(Counts(settings, CATEGORIES), blocks()).values()) == {ids}


def test_a_column_may_have_keys_among_others_with_ids():
    keys = np.arange(12, dtype=np.uint64).reshape(4, 3)
    block = Block(np.zeros(4, np.float32), np.zeros((4, 0), np.float32), keys, keys > 100)
    columns = {"a": {"ids": "keys"}, "b": {"ids": "vocabulary"}, "c": {"hash_size": 3}}
    settings = Settings(data="events", ids="keys", columns=columns)
    ids = build_ids(Counts(settings, ("a", "b", "c")), [block])
    assert (ids["a"], ids["c"]) == (RawKeys(), HashedIds(3))
    assert ids["b"].num_embeddings == 5


@hypothesis.given(CELLS)
def test_raw_keys_are_the_keys_and_one_for_a_missing_cell(cells):
    keys = RawKeys()(*_arrays(cells))
    assert (keys.hi.dtype, keys.lo.dtype) == (np.uint32, np.uint32)
    wanted = [MISSING_KEY if cell is None else cell for cell in cells]
    assert keys.to_numpy().tolist() == wanted
