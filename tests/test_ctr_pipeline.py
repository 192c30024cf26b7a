"""Batches: every row once, in order, in one shape."""

import numpy as np
import pytest

from qrhash.ctr.data.block import Block
from qrhash.ctr.data.pipeline import batches, encode
from qrhash.ctr.data.schema import CRITEO, Column, Schema
from qrhash.ctr.data.synthetic import SyntheticSource
from qrhash.ctr.data.vocabulary import MISSING_KEY, HashedIds, RawKeys
from qrhash.ctr.errors import UserError

UNCHECKED_KEYS = True

IDS = {"C2": HashedIds(7), "C26": HashedIds(100)}


class _Uneven:
    """Blocks of 3, 0, 5, 1 and 0 rows whose first integer counts the rows."""

    name, num_lines, schema = "uneven", 9, CRITEO

    def blocks(self, start, stop, wanted=None):
        first = 0
        for rows in (3, 0, 5, 1, 0):
            numbers = np.tile(np.arange(first, first + rows)[:, None], 13).astype(np.float32)
            keys = np.zeros((rows, 26), np.uint64)
            yield Block(np.ones(rows, np.float32), numbers, keys, keys > 0)
            first += rows


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 9, 20])
def test_no_row_is_lost_or_met_twice(batch_size):
    with batches(_Uneven(), 0, 9, IDS, batch_size) as stream:
        found = list(stream)
    assert {len(batch.labels) for batch in found} == {batch_size}
    assert len(found) == -(-9 // batch_size)
    numbers = np.concatenate([batch.numbers[batch.weights == 1] for batch in found])
    np.testing.assert_allclose(np.expm1(numbers[:, 0]), np.arange(9), rtol=1e-6)
    assert sum(batch.weights.sum() for batch in found) == 9
    padding = np.concatenate([batch.weights == 0 for batch in found])
    assert not np.concatenate([batch.ids for batch in found])[padding].any()


def test_encoding_of_a_row():
    numbers = np.array([[np.nan, -3, 0, 1] + [np.e - 1] * 9], np.float32)
    keys = np.arange(26, dtype=np.uint64)[None] + 100
    batch = encode(Block(np.ones(1, np.float32), numbers, keys, keys > 200), CRITEO, IDS)
    np.testing.assert_allclose(batch.numbers[0, :5], [0, 0, 0, np.log(2), 1], rtol=1e-6)
    assert batch.ids.tolist() == [[1 + 101 % 6, 1 + 125 % 99]]
    assert (batch.numbers.dtype, batch.ids.dtype) == (np.float32, np.int32)


def test_keys_are_left_as_they_are():
    keys = np.array([[5, 2**63, 7], [0, 9, 0]], np.uint64)
    missing = np.array([[False, False, False], [True, False, False]])
    columns = tuple(Column(name, "int64", "integer", "category") for name in "abc")
    block = Block(np.ones(2, np.float32), np.zeros((2, 0), np.float32), keys, missing)
    ids = {"a": RawKeys(), "b": HashedIds(7), "c": RawKeys()}
    batch = encode(block, Schema(columns=columns), ids)
    assert batch.keys.to_numpy().tolist() == [[5, 7], [MISSING_KEY, 0]]
    assert batch.ids.tolist() == [[1 + 2**63 % 6], [1 + 9 % 6]]
    assert encode(block, Schema(columns=columns), {}).keys.shape == (2, 0)


def test_numbers_of_a_table_keep_their_signs():
    columns = (Column("x", "double", "number", "number"), Column("y", "double", "number", "number"))
    numbers = np.array([[-3, 3], [np.nan, 1.5]], np.float32)
    keys = np.zeros((2, 0), np.uint64)
    block = Block(np.ones(2, np.float32), numbers, keys, keys > 0)
    batch = encode(block, Schema(columns=columns), {})
    wanted = np.log([[1 / 4, 4], [1, 2.5]]).astype(np.float32)
    np.testing.assert_allclose(batch.numbers, wanted, rtol=1e-6)


def test_a_model_without_categories_gets_no_ids():
    block = next(SyntheticSource(10, 0).blocks(0, 10))
    assert encode(block, CRITEO, {}).ids.shape == (10, 0)


@pytest.mark.parametrize("taken", [0, 1, 3, 7])
def test_grain_can_save_and_restore_the_position(taken):
    """Which is a number of batches; behind the last one there is nothing."""
    arguments = (SyntheticSource(30_000, 0), 100, 30_000, IDS, 5000)
    with batches(*arguments) as stream:
        before = [next(stream) for _ in range(min(taken, 6))]
        state = stream.get_state()
        wanted = list(stream)
    assert state == {"batches": len(before)}
    with batches(*arguments) as stream:
        stream.set_state({"batches": taken})
        found = list(stream)
    assert len(found) == len(wanted) == max(0, 6 - taken)
    for batch, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(batch.numbers, other.numbers)
        np.testing.assert_array_equal(batch.weights, other.weights)


def test_an_error_in_the_background_arrives():
    class Broken(_Uneven):
        def blocks(self, start, stop, wanted=None):
            yield from super().blocks(start, stop)
            raise UserError("line 10")

    with pytest.raises(UserError, match="line 10"), batches(Broken(), 0, 9, IDS, 2) as stream:
        list(stream)
