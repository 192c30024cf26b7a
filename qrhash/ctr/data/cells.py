"""Arrow columns of text or numbers -> a block, and what is wrong with each bad row.

Every column is decoded as a whole, with a mask of the cells that cannot be read; only for
those few is a reason put into words. Categories of hex digits are padded to one width, so
that a column is a matrix of characters and its keys are one product with the powers of 16.
A negative integer has the key of its 64 bits in two's complement, as hashes have that were
written into a signed column; so has its text, a minus sign and hex digits.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrhash.ctr.data.block import CATEGORIES, INTEGERS, LABEL, Block
from qrhash.ctr.errors import UserError

_INTEGER = "^-?[0-9]{1,18}$"
_MAX_DIGITS = 16  # 64 bits
_NOT_HEX = 16
_DIGIT = np.full(256, _NOT_HEX, np.uint8)
for _value, _character in enumerate("0123456789abcdef"):
    _DIGIT[[ord(_character), ord(_character.upper())]] = _value


def decode(table: pa.Table) -> tuple[Block, dict[int, str]]:
    """Decodes the 40 columns of a table.

    Args:
      table: the columns named in `block.COLUMNS`; numbers, or text with "" or null for missing.

    Returns:
      The block of the rows that are well formed, and {row number: reason} for the others.
    """
    reasons: dict[int, str] = {}

    def read(name: str, decoder: Any, rule: str) -> Any:
        column = table[name].combine_chunks()
        values, bad = decoder(name, column)
        for row in np.flatnonzero(bad).tolist():
            reasons.setdefault(row, f"{name} is not {rule}: {_quote(column[row].as_py())}")
        return values

    labels = read(LABEL, _labels, "0 or 1")
    numbers = np.stack([read(name, _numbers, "an integer") for name in INTEGERS], axis=1)
    rule = f"a category of up to {_MAX_DIGITS} hex digits"
    cells = [read(name, _keys, rule) for name in CATEGORIES]
    keys, missing = (np.stack(columns, axis=1) for columns in zip(*cells, strict=True))
    good = np.ones(table.num_rows, bool)
    good[list(reasons)] = False
    return Block(labels[good], numbers[good], keys[good], missing[good]), reasons


def _labels(name: str, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    values, _ = _numbers(name, column)
    return values, ~np.isin(values, (0.0, 1.0))


def _numbers(name: str, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """-> values [rows] float32 (nan: missing), unreadable [rows] bool."""
    column, bad = _plain(column), np.zeros(len(column), bool)
    if pa.types.is_string(column.type):
        column = pc.if_else(pc.equal(column, ""), None, column)
        readable = pc.match_substring_regex(column, _INTEGER)
        bad = _mask(pc.invert(readable))
        column = pc.if_else(readable, column, None).cast(pa.int64())
    elif not _is(column, "integer", "floating", "boolean", "null"):
        raise UserError(f"Column {name} has type {column.type}; it must be an integer column.")
    values = column.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    return values, bad | np.isinf(values)


def _keys(name: str, column: pa.Array) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """-> (keys [rows] uint64, missing [rows] bool), unreadable [rows] bool."""
    column = _plain(column)
    if pa.types.is_string(column.type):
        return _hex_keys(column)
    if not _is(column, "integer", "null"):
        hint = ""
        if _is(column, "floating"):
            hint = ": write integers with missing cells as nullable ones (Int64 in pandas)"
        raise UserError(
            f"Column {name} has type {column.type}; it must hold hex strings or integers{hint}."
        )
    missing = column.is_null().to_numpy(zero_copy_only=False)
    kind = pa.int64() if _is(column, "signed_integer") else pa.uint64()
    keys = column.cast(kind).fill_null(0).to_numpy(zero_copy_only=False).view(np.uint64)
    return (keys, missing), np.zeros(len(column), bool)


def _hex_keys(column: pa.Array) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    text = column.fill_null("")
    missing = _mask(pc.equal(text, ""))
    signed = pc.starts_with(text, "-")
    text = pc.if_else(signed, pc.utf8_slice_codeunits(text, 1), text)
    lengths = pc.binary_length(text).to_numpy(zero_copy_only=False)
    bad = (lengths > _MAX_DIGITS) | ((lengths == 0) & ~missing)
    width = max(1, int(lengths[~bad].max(initial=0)))
    padded = pc.ascii_lpad(pc.if_else(pa.array(bad), "", text), width, padding="0")
    characters = np.frombuffer(padded.buffers()[2], np.uint8, count=len(column) * width)
    digits = _DIGIT[characters].reshape(len(column), width)
    powers = np.uint64(16) ** np.arange(width - 1, -1, -1, dtype=np.uint64)
    keys = digits.astype(np.uint64) @ powers
    negative = _mask(signed)
    bad |= (digits == _NOT_HEX).any(axis=1) | (negative & (keys > 2**63))
    return (np.where(negative, ~keys + np.uint64(1), keys), missing), bad


def _plain(column: pa.Array) -> pa.Array:
    """One text type instead of arrow's several, and no dictionary encoding."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is(column, "large_string", "string_view"):
        column = column.cast(pa.string())
    return column


def _is(column: pa.Array, *kinds: str) -> bool:
    return any(getattr(pa.types, f"is_{kind}")(column.type) for kind in kinds)


def _mask(condition: pa.Array) -> np.ndarray:
    return condition.fill_null(False).to_numpy(zero_copy_only=False)


def _quote(cell: Any) -> str:
    text = "" if cell is None else str(cell)
    return repr(text if len(text) <= 40 else text[:37] + "...")
