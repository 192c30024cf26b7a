"""The hash of strings: the numbers of XXH64, of every kind of column; and what is refused."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrhash.strings import _AT_ONCE, hash_strings

MASK = 2**64 - 1
PRIMES = (
    *(0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9),
    *(0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5),
)

# Of the reference implementation (the xxhash library). These numbers never change.
GOLDEN = {
    b"": 0xEF46DB3751D8E999,
    b"a": 0xD24EC4F1A98C6E5B,
    b"abc": 0x44BC2CF5AD770999,
    b"embedding": 0xF5B1B2C9864ABA9A,
    b"0123456789abcdef0123456789abcdef": 0x642A94958E71E6C5,
    "naïve café".encode(): 0xF72D341B0C4BD8A6,
}


def _rotated(x, by):
    return (x << by | x >> (64 - by)) & MASK


def _oracle(data, seed=0):
    """The specification, byte by byte, in Python's integers."""
    p1, p2, p3, p4, p5 = PRIMES

    def lane(acc, word):
        return _rotated((acc + word * p2) & MASK, 31) * p1 & MASK

    at, n = 0, len(data)
    word = lambda at, size: int.from_bytes(data[at : at + size], "little")  # noqa: E731
    if n >= 32:
        lanes = [(seed + p1 + p2) & MASK, (seed + p2) & MASK, seed, (seed - p1) & MASK]
        while at + 32 <= n:
            lanes = [lane(acc, word(at + 8 * j, 8)) for j, acc in enumerate(lanes)]
            at += 32
        acc = sum(_rotated(x, by) for x, by in zip(lanes, (1, 7, 12, 18), strict=True)) & MASK
        for each in lanes:
            acc = ((acc ^ lane(0, each)) * p1 + p4) & MASK
    else:
        acc = (seed + p5) & MASK
    acc = (acc + n) & MASK
    while at + 8 <= n:
        acc = (_rotated(acc ^ lane(0, word(at, 8)), 27) * p1 + p4) & MASK
        at += 8
    if at + 4 <= n:
        acc = (_rotated(acc ^ (word(at, 4) * p1 & MASK), 23) * p2 + p3) & MASK
        at += 4
    while at < n:
        acc = _rotated(acc ^ (data[at] * p5 & MASK), 11) * p1 & MASK
        at += 1
    acc = (acc ^ acc >> 33) * p2 & MASK
    acc = (acc ^ acc >> 29) * p3 & MASK
    return acc ^ acc >> 32


@pytest.mark.parametrize("data", GOLDEN, ids=repr)
def test_golden_numbers(data):
    assert _oracle(data) == GOLDEN[data]
    assert hash_strings([data]).tolist() == [GOLDEN[data]]


@given(st.lists(st.binary(max_size=100), max_size=8), st.integers(0, MASK))
def test_bytes_of_any_length_beside_each_other(items, seed):
    assert hash_strings(items, seed).tolist() == [_oracle(item, seed) for item in items]


@given(st.lists(st.text(max_size=20), max_size=8))
def test_text_is_hashed_as_utf8(items):
    assert hash_strings(items).tolist() == [_oracle(item.encode()) for item in items]


@pytest.mark.parametrize("n", [*range(31, 35), 63, 64, 65, 1000])
def test_long_strings_beside_short_ones(n, rng):
    items = [rng.bytes(n), b"x", rng.bytes(n // 2), b"", rng.bytes(n + 1)]
    assert hash_strings(items).tolist() == [_oracle(item) for item in items]


@pytest.mark.parametrize("n", [_AT_ONCE - 1, _AT_ONCE, _AT_ONCE + 1, 2 * _AT_ONCE])
def test_columns_of_more_strings_than_are_hashed_at_once(n):
    items = [str(number).encode() * (number % 12) for number in range(n)]
    hashes = hash_strings(items)
    assert hashes.shape == (n,)
    for number in {0, 1, 11, _AT_ONCE - 2, _AT_ONCE - 1, _AT_ONCE, _AT_ONCE + 11, n - 1}:
        if number < n:
            assert hashes[number] == _oracle(items[number])
    assert len(np.unique(hashes)) == len(set(items))


WORDS = ["user_1", "", "café", "x" * 40, "user_1"]
COLUMNS = {
    "list": WORDS,
    "tuple": tuple(WORDS),
    "objects": np.array(WORDS, object),
    "unicode": np.array(WORDS),
    "string dtype": np.array(WORDS, np.dtypes.StringDType()),
    "bytes": [word.encode() for word in WORDS],
    "text and bytes": [WORDS[0].encode(), *WORDS[1:]],
    "arrow": pa.array(WORDS),
    "arrow, large": pa.array(WORDS, pa.large_string()),
    "arrow, binary": pa.array(WORDS, pa.binary()),
    "arrow, a slice": pa.array(["before", *WORDS, "after"])[1:6],
    "arrow, a dictionary": pa.array(WORDS).dictionary_encode(),
    "arrow, in chunks": pa.chunked_array([WORDS[:2], [], WORDS[2:]]),
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_every_kind_of_column_has_the_same_numbers(column):
    assert hash_strings(column).tolist() == [_oracle(word.encode()) for word in WORDS]


def test_shapes_are_kept_and_columns_may_be_empty():
    assert hash_strings(np.array([["a", "b"], ["c", "d"]])).shape == (2, 2)
    assert hash_strings("a").shape == ()
    for empty in (
        [],
        np.array([], "U3"),
        pa.array([], pa.string()),
        pa.chunked_array([], pa.string()),
    ):
        assert hash_strings(empty).tolist() == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None], r"missing, got None at position 1"),
        (["a", float("nan")], r"missing, got nan at position 1"),
        (["a", 3], r"all integers or all text, got 3 of int at position 1"),
        (pa.array(["a", None, "b"]), r"missing, got None at position 1"),
        ([["a"], ["b", "c"]], r"lists of different lengths"),
    ],
    ids=str,
)
def test_what_is_no_text_is_refused_with_its_position(values, message):
    with pytest.raises(ValueError, match=message):
        hash_strings(values)
