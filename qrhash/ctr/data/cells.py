"""Arrow columns of text or numbers -> arrays, with a mask of the cells that cannot be read.

Every column is decoded as a whole. A key is 64 bits: those of an integer, in two's complement, as
hashes have them that were written into a signed column; or the XXH64 of text. Text that is an
integer as Python writes it, from -2**63 to 2**64 - 1, has the key of that integer, and so has a
float or its text, 42.0: a value has one key whatever file it is in. In the Criteo format text is
hex digits instead: they are padded to one width, so that a column is a matrix of characters and its
keys are one product with the powers of 16.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrhash.ctr.errors import UserError
from qrhash.strings import hash_strings

INTEGER = "^-?[0-9]{1,18}$"  # of Criteo
DECIMAL = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
CANONICAL = "^(0|-?[1-9][0-9]{0,19})$"  # an integer as it is written, if it has 64 bits
WHOLE = r"^(0|-?[1-9][0-9]{0,19})(\.0)?$"  # or as a data frame writes it beside missing ones
_EXACT = 2**53  # below it every integer is a float
BOOLEANS = {"true": 1.0, "false": 0.0}
YES_OR_NO = {"yes": 1.0, "no": 0.0, "y": 1.0, "n": 0.0, "t": 1.0, "f": 0.0}  # of labels, besides
_NOTHING = ("", "NA", "N/A", "#N/A", "<NA>", "n/a", "NaN", "nan", "NULL", "null", r"\N")
NO_NUMBER = (*_NOTHING, "None", "?", "-", ".")  # which as words may say something

_TIME = (
    r"^(?P<y>[0-9]{4})[-/](?P<m>[0-9]{1,2})[-/](?P<d>[0-9]{1,2})"
    r"(?:[ T](?P<clock>[0-9]{1,2}:[0-9]{2})(?P<s>:[0-9]{2})?(?P<f>\.[0-9]{1,6})?[0-9]*"
    r" ?(?P<zone>Z|UTC|[+-][0-9]{2}:?[0-9]{2})?)?$"
)

MAX_DIGITS = 16  # 64 bits
_NOT_HEX = 16
_DIGIT = np.full(256, _NOT_HEX, np.uint8)
for _value, _character in enumerate("0123456789abcdef"):
    _DIGIT[[ord(_character), ord(_character.upper())]] = _value


def integers(name: str, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Integers of the Criteo format -> values [rows] float32 (nan: missing), unreadable [rows]."""
    column, bad = plain(column), np.zeros(len(column), bool)
    if pa.types.is_string(column.type):
        column = pc.if_else(pc.equal(column, ""), None, column)
        readable = pc.match_substring_regex(column, INTEGER)
        bad = mask(pc.invert(readable))
        column = pc.if_else(readable, column, None).cast(pa.int64())
    elif not is_a(column.type, "integer", "floating", "boolean", "null"):
        raise UserError(f"Column {name} has type {column.type}; it must be an integer column.")
    values = column.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    return values, bad | np.isinf(values)


def numbers(name: str, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """-> values [rows] float32 (nan: missing), unreadable [rows] bool."""
    values, bad = _decimals(name, column)
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    return narrow, bad | np.isinf(narrow)


def told(column: pa.Array) -> pa.Array:
    """Text without space around it, null where a word says that there is nothing.

    What is no text stays.
    """
    if not pa.types.is_string(column.type):
        return column
    text = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.is_in(text, pa.array(NO_NUMBER)), None, text)


def with_points(column: pa.Array) -> pa.Array:
    """Text of numbers with a decimal comma -> with a point; what is no text stays."""
    column = plain(column)
    if not pa.types.is_string(column.type):
        return column
    return pc.replace_substring(column, ",", ".", max_replacements=1)


def labels(
    name: str,
    column: pa.Array,
    positive_from: float | None = None,
    positive: Sequence[str] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """-> clicks [rows] float32, 0 or 1; unreadable [rows] bool, the missing ones too."""
    if positive:
        return _named_labels(name, column, positive)
    words = BOOLEANS | YES_OR_NO if positive_from is None else BOOLEANS
    values, bad = _decimals(name, column, words)
    if positive_from is None:
        return values.astype(np.float32), bad | ~np.isin(values, (0.0, 1.0))
    return (values >= positive_from).astype(np.float32), bad | np.isnan(values)


def _named_labels(
    name: str, column: pa.Array, positive: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    column = plain(column)
    if is_a(column.type, "floating", "decimal"):
        # Of floats in their own precision: 0.1 of 32 bits is not that of 64.
        kind = column.type if is_a(column.type, "floating") else pa.float64()
        wanted = pa.array([float(each) for each in positive if re.match(DECIMAL, each)])
        values, _ = _decimals(name, column)
        clicks = np.isin(values, np.asarray(wanted.cast(kind, safe=False).cast(pa.float64())))
        return clicks.astype(np.float32), np.isnan(values)
    if not is_a(column.type, "string", "integer", "boolean", "null"):
        raise UserError(f"Column {name} has type {column.type}; it must hold words.")
    if pa.types.is_boolean(column.type):
        positive = [each.lower() for each in positive]

    def as_named(text: pa.Array) -> pa.Array:  # A data frame writes 3.0 beside missing ones.
        return pc.replace_substring_regex(pc.utf8_trim_whitespace(text), r"^(-?[0-9]+)\.0$", r"\1")

    text = as_named(column.cast(pa.string()))
    clicks = mask(pc.is_in(text, as_named(pa.array(list(positive), pa.string()))))
    missing = mask(pc.is_in(text, pa.array([*_NOTHING, None])))
    return clicks.astype(np.float32), missing & ~clicks


def _decimals(
    name: str, column: pa.Array, words: Mapping[str, float] = BOOLEANS
) -> tuple[np.ndarray, np.ndarray]:
    """-> values [rows] float64 (nan: missing), of words too; unreadable [rows] bool."""
    column, bad = plain(column), np.zeros(len(column), bool)
    if pa.types.is_string(column.type):
        text = told(column)
        lower = pc.utf8_lower(text)
        for word, value in words.items():
            text = pc.if_else(pc.equal(lower, word), str(value), text)
        readable = pc.match_substring_regex(text, DECIMAL)
        bad = mask(pc.invert(readable))
        column = pc.if_else(readable, text, None)
    elif not is_a(column.type, "integer", "floating", "boolean", "decimal", "null"):
        raise UserError(f"Column {name} has type {column.type}; it must hold numbers.")
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return values, bad


def keys(name: str, column: pa.Array) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """-> (keys [rows] uint64, missing [rows] bool), unreadable [rows] bool.

    Unreadable are floats with a fraction, or so large that they may stand for several integers.
    """
    column = plain(column)
    if pa.types.is_floating(column.type):
        return _float_keys(column)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.string())
    if not is_a(column.type, "string", "binary"):
        return _integer_keys(name, column, "integers or text")
    # Of text only what is distinct is hashed.
    encoded = column.dictionary_encode()
    distinct = encoded.dictionary
    found = _text_keys(distinct)
    missing = mask(encoded.is_null())
    places = encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)
    if len(distinct):
        missing |= mask(pc.equal(distinct, pa.scalar("", distinct.type)))[places]
        found = found[places]
    else:
        found = np.zeros(len(column), np.uint64)
    return (np.where(missing, np.uint64(0), found), missing), np.zeros(len(column), bool)


def _float_keys(column: pa.Array) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    missing = np.isnan(values)
    whole = (np.abs(values) < _EXACT) & (np.floor(values) == values)
    found = np.where(whole, values, 0).astype(np.int64).view(np.uint64)
    return (found, missing), ~whole & ~missing


def _text_keys(text: pa.Array) -> np.ndarray:
    """Text without nulls -> keys: of the integer that it is, or its hash."""
    if pa.types.is_string(text.type):  # A truth value is written in many ways.
        is_truth = pc.match_substring_regex(text, "^(true|false)$", ignore_case=True)
        text = pc.if_else(is_truth, pc.ascii_lower(text), text)
    found = hash_strings(text)
    whole = np.flatnonzero(mask(pc.match_substring_regex(text, WHOLE)))
    for place, digits in zip(whole.tolist(), text.take(pa.array(whole)).to_pylist(), strict=True):
        number = int(digits[:-2] if digits[-2:] in (".0", b".0") else digits)
        if -(2**63) <= number < 2**64:
            found[place] = number % 2**64
    return found


def hex_keys(name: str, column: pa.Array) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Keys of the Criteo format, as from `keys`; what is no hex digits is unreadable."""
    column = plain(column)
    if pa.types.is_string(column.type):
        return _hex_keys(column)
    return _integer_keys(name, column, "hex strings or integers")


def _integer_keys(
    name: str, column: pa.Array, rule: str
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    if not is_a(column.type, "integer", "null"):
        hint = ""
        if is_a(column.type, "floating"):
            hint = ": write integers with missing cells as nullable ones (Int64 in pandas)"
        raise UserError(f"Column {name} has type {column.type}; it must hold {rule}{hint}.")
    missing = column.is_null().to_numpy(zero_copy_only=False)
    kind = pa.int64() if is_a(column.type, "signed_integer") else pa.uint64()
    found = column.cast(kind).fill_null(0).to_numpy(zero_copy_only=False).view(np.uint64)
    return (found, missing), np.zeros(len(column), bool)


def _hex_keys(column: pa.Array) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    text = column.fill_null("")
    missing = mask(pc.equal(text, ""))
    signed = pc.starts_with(text, "-")
    text = pc.if_else(signed, pc.utf8_slice_codeunits(text, 1), text)
    lengths = pc.binary_length(text).to_numpy(zero_copy_only=False)
    bad = (lengths > MAX_DIGITS) | ((lengths == 0) & ~missing)
    width = max(1, int(lengths[~bad].max(initial=0)))
    padded = pc.ascii_lpad(pc.if_else(pa.array(bad), "", text), width, padding="0")
    characters = np.frombuffer(padded.buffers()[2], np.uint8, count=len(column) * width)
    digits = _DIGIT[characters].reshape(len(column), width)
    powers = np.uint64(16) ** np.arange(width - 1, -1, -1, dtype=np.uint64)
    found = digits.astype(np.uint64) @ powers
    negative = mask(signed)
    bad |= (digits == _NOT_HEX).any(axis=1) | (negative & (found > 2**63))
    return (np.where(negative, ~found + np.uint64(1), found), missing), bad


def times(name: str, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """-> points in time [rows] int64, in microseconds or the column's own integers; unreadable.

    A missing time is unreadable too.
    """
    column = plain(column)
    if pa.types.is_string(column.type):
        column = _times_of_text(pc.utf8_trim_whitespace(column))
    elif is_a(column.type, "date"):
        column = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    elif is_a(column.type, "timestamp"):
        zone = column.type.tz
        column = column.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64())
    elif is_a(column.type, "integer"):
        column = column.cast(pa.int64(), safe=False)
    else:
        raise UserError(
            f"Column {name} has type {column.type}; --time takes timestamps, dates, integers or "
            "text such as 2024-01-31 12:00:00."
        )
    bad = mask(column.is_null())
    return column.fill_null(0).to_numpy(zero_copy_only=False), bad


def _times_of_text(text: pa.Array) -> pa.Array:
    """Timestamps or integers in text -> int64, null where it is neither."""
    whole = pc.match_substring_regex(text, INTEGER)
    parts = pc.extract_regex(text, _TIME)
    y, m, d, clock, s, f, zone = (
        parts.field(name) for name in ("y", "m", "d", "clock", "s", "f", "zone")
    )
    m, d = (pc.utf8_lpad(each, 2, padding="0") for each in (m, d))
    day = pc.binary_join_element_wise(y, m, d, "-")
    clock = pc.utf8_lpad(pc.if_else(pc.equal(clock, ""), "00:00", clock), 5, padding="0")
    s = pc.if_else(pc.equal(s, ""), ":00", s)
    zone = pc.if_else(pc.is_in(zone, pa.array(["", "UTC"])), "Z", zone)
    stamps = pc.binary_join_element_wise(day, "T", clock, s, f, zone, "")
    stamps = pc.if_else(parts.is_valid(), stamps, None)
    try:
        moments = stamps.cast(pa.timestamp("us", "UTC")).cast(pa.int64())
    except pa.ArrowInvalid:  # A day that no month has: one cell after the other.
        moments = pa.array([_moment(each) for each in stamps.to_pylist()], pa.int64())
    return pc.coalesce(moments, pc.if_else(whole, text, None).cast(pa.int64()))


def _moment(stamp: str | None) -> int | None:
    try:
        moment = datetime.fromisoformat(stamp or "")
    except ValueError:
        return None
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def plain(column: pa.Array) -> pa.Array:
    """One text type instead of arrow's several, no dictionary encoding, whole decimals as text."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if is_a(column.type, "large_string", "string_view"):
        column = column.cast(pa.string())
    if is_a(column.type, "large_binary", "binary_view", "fixed_size_binary"):
        column = column.cast(pa.binary())
    # Integers of databases whose numbers are all decimal; text holds every one exactly.
    if is_a(column.type, "decimal") and column.type.scale == 0:
        column = column.cast(pa.string())
    return column


def is_a(kind: pa.DataType, *names: str) -> bool:
    """Whether a type is one of these, by the names of `pyarrow.types`."""
    return any(getattr(pa.types, f"is_{name}")(kind) for name in names)


def mask(condition: pa.Array) -> np.ndarray:
    """A condition on cells, [rows] bool; not of one that is missing."""
    return condition.fill_null(False).to_numpy(zero_copy_only=False)


def quote(cell: Any) -> str:
    """A cell as a message shows it."""
    text = "" if cell is None else str(cell)
    return repr(text if len(text) <= 40 else text[:37] + "...")


def some(column: pa.ChunkedArray) -> list[Any]:
    """A few values of a column, for a message."""
    values = column.slice(0, 1000).drop_null().to_pylist()
    return list({str(value): value for value in values}.values())[:5]
