"""Strings to 64 bits on the host: XXH64 of their UTF-8, for a whole column at once.

The hash is a public one, the same on every machine, in every process and version, and in the xxhash
libraries of other languages. Here it runs in NumPy over all strings in step: a word of each, then
the next. Python's own `hash` is another one in every process.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_P1, _P2, _P3, _P4, _P5 = (
    np.uint64(prime)
    for prime in (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )
)
_STRIPE = 32  # bytes that four lanes take in one turn
_AT_ONCE = 16_384  # strings


class Column(NamedTuple):
    """Strings behind each other.

    Attributes:
      data: all bytes, uint8 [num_bytes].
      starts: where each string begins, int64 [n].
      lengths: its bytes, int64 [n].
    """

    data: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


def hash_strings(values: Any, seed: int = 0) -> np.ndarray:
    """XXH64 of strings.

    Args:
      values: strings, hashed as UTF-8, or bytes: a list, a NumPy array of any rank, or a column of
        Arrow or pandas.
      seed: an integer in [0, 2**64).

    Returns:
      Hashes, uint64 of the shape of the values.

    Raises:
      ValueError: a value is missing, or is no text; the message says where.

    Source: Collet, the XXH64 algorithm description.

    >>> [hex(each) for each in hash_strings(["", "a", "embedding"])]
    ['0xef46db3751d8e999', '0xd24ec4f1a98c6e5b', '0xf5b1b2c9864aba9a']
    """
    if is_arrow(values):
        return _of_arrow(values, seed)
    if _is_flat(values):
        return _xxh64(_column_of(values), seed)
    array = as_array(values)
    return _xxh64(_column_of(array.ravel().tolist()), seed).reshape(array.shape)


def is_text(values: Any) -> bool:
    """Whether values begin with text or bytes: what `hash_strings` is to look at."""
    if is_arrow(values):
        kind = str(getattr(values.type, "value_type", values.type))
        return "string" in kind or "binary" in kind
    if _is_flat(values):
        return bool(values) and isinstance(values[0], (str, bytes))
    return as_array(values).dtype.kind in "UST"


def _is_flat(values: Any) -> bool:
    """Whether values are a list that holds no lists, as far as the first of them tells."""
    return isinstance(values, (list, tuple)) and not isinstance(
        next(iter(values), None), (list, tuple)
    )


def as_array(values: Any, dtype: Any = None) -> np.ndarray:
    """Values of the host as an array."""
    try:
        return np.asarray(values, dtype)
    except ValueError:
        raise ValueError(
            f"keys must be an array, got lists of different lengths in {values!r:.60}."
        ) from None


def is_arrow(values: Any) -> bool:
    """Whether values are a column of Arrow."""
    return type(values).__module__.partition(".")[0] == "pyarrow" and hasattr(values, "null_count")


def _of_arrow(values: Any, seed: int) -> np.ndarray:
    """Of an Arrow array, chunked or not, of strings or a dictionary of them; without copies."""
    if hasattr(values, "combine_chunks") and hasattr(values, "chunks"):
        parts = [_of_arrow(chunk, seed) for chunk in values.chunks]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint64)
    if values.null_count:
        raise missing(int(np.flatnonzero(np.asarray(values.is_null()))[0]), None)
    if hasattr(values, "dictionary"):
        return _of_arrow(values.dictionary, seed)[np.asarray(values.indices)]
    _, offsets, data = values.buffers()
    width = np.int64 if str(values.type).startswith("large") else np.int32
    ends = np.frombuffer(offsets, width)[values.offset : values.offset + len(values) + 1]
    ends = ends.astype(np.int64)
    raw = np.frombuffer(data or b"", np.uint8)
    return _xxh64(Column(raw, ends[:-1], np.diff(ends)), seed)


def _column_of(items: Sequence[Any]) -> Column:
    """Strings or bytes, one after the other."""
    try:
        joined = "".join(items)
    except TypeError:
        return _joined(_as_bytes(items))
    if joined.isascii():
        lengths = np.fromiter(map(len, items), np.int64, len(items))
        return _laid_out(np.frombuffer(joined.encode("ascii"), np.uint8), lengths)
    return _joined([item.encode() for item in items])


def _as_bytes(items: Sequence[Any]) -> list[bytes]:
    """Bytes of a mixture of text and bytes."""
    found = []
    for position, item in enumerate(items):
        if isinstance(item, str):
            found.append(item.encode())
        elif isinstance(item, bytes):
            found.append(item)
        elif item is None or item != item:
            raise missing(position, item)
        else:
            raise ValueError(
                f"keys must be all integers or all text, got {item!r} of {type(item).__name__} at "
                f"position {position}."
            )
    return found


def missing(position: int, item: Any) -> ValueError:
    """What to say of a key that is not there."""
    return ValueError(
        f"keys must not be missing, got {item!r} at position {position}: fill in a key of its own, "
        "such as an empty string."
    )


def _joined(items: Sequence[bytes]) -> Column:
    lengths = np.fromiter(map(len, items), np.int64, len(items))
    return _laid_out(np.frombuffer(b"".join(items), np.uint8), lengths)


def _laid_out(data: np.ndarray, lengths: np.ndarray) -> Column:
    return Column(data, np.cumsum(lengths) - lengths, lengths)


# --- XXH64 ----------------------------------------------------------------------------------------


def _xxh64(column: Column, seed: int) -> np.ndarray:
    """The hash of each string; some thousand at a time, so that what is computed stays in cache."""
    # Eight bytes behind the last string, so that a word may be read from any of its own.
    padded = np.concatenate((column.data, np.zeros(8, np.uint8)))
    hashes = np.empty(len(column.lengths), np.uint64)
    for first in range(0, len(hashes), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        hashes[some] = _in_step(padded, column.starts[some], column.lengths[some], seed)
    return hashes


def _in_step(padded: np.ndarray, starts: np.ndarray, lengths: np.ndarray, seed: int) -> np.ndarray:
    """The hash of each string, by the steps of the specification, over all strings in step."""
    words = np.ndarray((len(padded) - 7,), "<u8", padded, strides=(1,))
    halves = np.ndarray((len(padded) - 3,), "<u4", padded, strides=(1,))
    with np.errstate(over="ignore"):
        start = np.uint64(seed)
        hashes = np.full(len(lengths), start + _P5, np.uint64)
        # 1. Strings of 32 bytes or more: four lanes, each a word of every stripe.
        long = np.flatnonzero(lengths >= _STRIPE)
        if long.size:
            hashes[long] = _stripes(words, starts[long], lengths[long] // _STRIPE, start)
        hashes += lengths.astype(np.uint64)
        # 2. What is left of each: words of eight bytes, one of four, then single bytes.
        left = lengths & (_STRIPE - 1)  # the remainder, without a division
        at = starts + (lengths - left)
        for _ in range(int(left.max(initial=0)) // 8):
            some = _where(left >= 8)
            mixed = _rotated(hashes[some] ^ _round(np.uint64(0), words[at[some]]), 27)
            hashes[some] = mixed * _P1 + _P4
            at[some] += 8
            left[some] -= 8
        some = _where(left >= 4)
        four = halves[at[some]].astype(np.uint64) * _P1
        hashes[some] = _rotated(hashes[some] ^ four, 23) * _P2 + _P3
        at[some] += 4
        left[some] -= 4
        for _ in range(int(left.max(initial=0))):
            some = _where(left >= 1)
            one = padded[at[some]].astype(np.uint64) * _P5
            hashes[some] = _rotated(hashes[some] ^ one, 11) * _P1
            at[some] += 1
            left[some] -= 1
        # 3. Every bit of the hash is made to depend on every bit so far.
        hashes = (hashes ^ (hashes >> np.uint64(33))) * _P2
        hashes = (hashes ^ (hashes >> np.uint64(29))) * _P3
        return hashes ^ (hashes >> np.uint64(32))


def _stripes(words: np.ndarray, at: np.ndarray, stripes: np.ndarray, seed: np.uint64) -> np.ndarray:
    """The four lanes of long strings over all their stripes, brought together."""
    first = (seed + _P1 + _P2, seed + _P2, seed, seed - _P1)
    lanes = [np.full(len(at), lane, np.uint64) for lane in first]
    for turn in range(int(stripes.max())):
        some = _where(stripes > turn)
        for number, lane in enumerate(lanes):
            lane[some] = _round(lane[some], words[at[some] + (_STRIPE * turn + 8 * number)])
    rotated = [_rotated(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18), strict=True)]
    hashes = rotated[0] + rotated[1] + rotated[2] + rotated[3]
    for lane in lanes:
        hashes = (hashes ^ _round(np.uint64(0), lane)) * _P1 + _P4
    return hashes


def _where(wanted: np.ndarray) -> Any:
    """What indexes the strings wanted; all of them without a copy of the numbers."""
    return slice(None) if wanted.all() else np.flatnonzero(wanted)


def _round(lane: Any, word: np.ndarray) -> np.ndarray:
    return _rotated(lane + word * _P2, 31) * _P1


def _rotated(x: np.ndarray, by: int) -> np.ndarray:
    return x << np.uint64(by) | x >> np.uint64(64 - by)
