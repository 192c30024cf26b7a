"""Keys -> ids, held against `collections.Counter`."""

import collections

import numpy as np
import pytest

from qrhash.ctr.block import CATEGORIES, MISSING_KEY, Block
from qrhash.ctr.settings import Settings
from qrhash.ctr.vocabulary import UNSEEN_ID, HashedIds, KeyCounts, build_ids


def _oracle(keys, min_count):
    counts = collections.Counter(keys)
    common = [key for key in counts if counts[key] >= min_count]
    ranked = sorted(common, key=lambda key: (-counts[key], key))
    return {key: 1 + rank for rank, key in enumerate(ranked)}


@pytest.mark.parametrize("min_count", [1, 2, 5])
@pytest.mark.parametrize("least_pending", [1, 40, 1 << 16])
def test_vocabulary_equals_a_counter(min_count, least_pending, rng, monkeypatch):
    monkeypatch.setattr(KeyCounts, "_LEAST_PENDING", least_pending)
    keys = rng.zipf(1.3, 2000) % 300 - 1  # holds MISSING_KEY, -1
    assert MISSING_KEY in keys
    counts = KeyCounts()
    for part in np.array_split(keys, 23):
        counts.add(part)
    vocabulary = counts.vocabulary(min_count)
    wanted = _oracle(keys.tolist(), min_count)
    asked = np.arange(-1, 400)
    assert vocabulary.num_embeddings == len(wanted) + 1
    got = vocabulary(asked)
    assert got.dtype == np.int32
    assert got.tolist() == [wanted.get(key, UNSEEN_ID) for key in asked.tolist()]


def test_a_vocabulary_without_keys_knows_none():
    counts = KeyCounts()
    counts.add(np.array([7, 8]))
    vocabulary = counts.vocabulary(min_count=2)
    assert vocabulary.num_embeddings == 1
    assert vocabulary(np.array([7, -1])).tolist() == [UNSEEN_ID] * 2


def test_hashed_ids():
    ids = HashedIds(10)
    keys = np.array([MISSING_KEY, 0, 8, 9, 2**60 - 1])
    assert ids(keys).tolist() == [0, 1, 9, 1, 1 + (2**60 - 1) % 9]
    assert ids(keys).dtype == np.int32


def test_every_column_has_ids_of_its_own():
    keys = np.arange(4)[:, None] * np.arange(1, 27)[None, :]
    block = Block(np.zeros(4, np.float32), np.zeros((4, 13), np.float32), keys)
    settings = Settings(columns={"C2": {"hash_size": 5}, "C3": {"min_count": 2}})
    ids = build_ids(settings, iter([block, block]))
    assert list(ids) == list(CATEGORIES)
    assert ids["C1"](np.array([0, 3, 4])).tolist() == [1, 4, 0]
    assert ids["C4"](np.array([0, 12, 3])).tolist() == [1, 4, 0]
    assert ids["C2"] == HashedIds(5)
    assert ids["C3"].num_embeddings == 5


def test_hashing_all_columns_reads_no_rows():
    def blocks():
        raise AssertionError("read")
        yield

    assert set(build_ids(Settings(hash_size=9), blocks()).values()) == {HashedIds(9)}
