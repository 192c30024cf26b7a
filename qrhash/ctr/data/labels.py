"""Whether the first labels of a table are clicks and what are none, as the options say."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrhash.ctr.data import cells
from qrhash.ctr.data.schema import Schema
from qrhash.ctr.errors import UserError

_LABELS_OK = 0.9  # share of labels that are to be 0 or 1
_COUNTS = 0.01  # share of labels above 1, of those of 1 and above, from which on they are counts


def check_label(
    label: str, column: pa.ChunkedArray, schema: Schema, *, is_all: bool = False
) -> None:
    """Raises a UserError if many of the first labels are not what they must be.

    Args:
      label: the name of the column.
      column: its first cells.
      schema: says which labels are clicks.
      is_all: whether there are no more: else a click may yet come.
    """
    array = cells.plain(column.combine_chunks())

    def read(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        return cells.labels(label, array, schema.positive_from, schema.positive)

    try:
        clicks, bad = read(array)
    except UserError:
        clicks, bad = np.zeros(len(array)), np.ones(len(array), bool)
    if not len(bad):
        return
    is_missing = bad if schema.positive else cells.mask(cells.told(array).is_null(nan_is_null=True))
    told = array.filter(pa.array(~is_missing))
    if _are_many(bad) and len(told) and not _are_many(read(told)[1]):
        raise UserError(
            f"The label {label} is missing in {len(array) - len(told):,} of the first "
            f"{len(array):,} rows: leave out the rows without one, or fill it in."
        )
    shown = ", ".join(cells.quote(each) for each in cells.some(column)) or "nothing"
    if schema.positive and not clicks.any() and (is_all or _differ_in_case(array, schema.positive)):
        words = " or ".join(map(repr, schema.positive))
        raise UserError(
            f"--positive: none of the first {len(array):,} labels is {words}; the label {label} "
            f"holds {shown}."
        )
    are_clicks = schema.positive or schema.positive_from is not None
    if not _are_many(bad) and (are_clicks or not _are_counts(label, array)):
        return
    hint = "; --positive WORD,... says which words are clicks"
    if not _are_many(cells.labels(label, array, -np.inf)[1]):
        hint = "; --positive-from X makes a click of a label of at least X"
    rule = "it must be 0 or 1, true or false, or yes or no"
    raise UserError(f"The label {label} holds {shown}: {rule}{hint}.")


def _are_many(bad: np.ndarray) -> bool:
    return bool(bad.mean() > 1 - _LABELS_OK)


def _differ_in_case(array: pa.Array, words: Sequence[str]) -> bool:
    if not pa.types.is_string(array.type):
        return False
    lower = pc.utf8_lower(pc.utf8_trim_whitespace(array))
    return bool(cells.mask(pc.is_in(lower, pa.array([word.lower() for word in words]))).any())


def _are_counts(label: str, array: pa.Array) -> bool:
    """Whether so many labels are above 1 that it is something counted: 2 is among them then."""
    values, _ = cells.numbers(label, array)
    above = int(np.sum(values > 1))
    is_two = bool(np.any(values == 2))
    return is_two and above > max(1, _COUNTS * (above + np.sum(values == 1)))
