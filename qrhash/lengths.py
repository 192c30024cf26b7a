"""How long lists behind each other are: by their lengths, or by where each begins."""

from typing import Any

import numpy as np

from qrhash.arithmetic import as_ids


def checked_lengths(offsets: Any, lengths: Any, total: int) -> np.ndarray:
    """Lengths of the bags, given as such or by offsets."""
    if (offsets is None) == (lengths is None):
        raise ValueError("from_ragged takes either offsets or lengths, got both or neither.")
    name = "lengths" if offsets is None else "offsets"
    given = as_ids(lengths if offsets is None else offsets, name)
    given = np.asarray(given).astype(np.int64)
    if given.ndim != 1:
        raise ValueError(f"{name} must have one axis, got shape {given.shape}.")
    if offsets is not None:
        if not len(given) or given[0] != 0 or given[-1] != total:
            raise ValueError(
                f"offsets must begin with 0 and end with the number of values, {total}, got "
                f"{short(given)}: one more than there are bags."
            )
        given = np.diff(given)
    if len(given) and given.min() < 0:
        at = int(given.argmin())
        what = "not be below 0" if offsets is None else "not fall"
        raise ValueError(f"{name} must {what}, got a bag of {given[at]} ids at position {at}.")
    if given.sum() != total:
        raise ValueError(
            f"lengths must add up to the number of values, {total}, got {given.sum()} in all."
        )
    return given


def short(values: np.ndarray) -> str:
    """The first few of them, for a message."""
    text = ", ".join(map(str, values[:6].tolist()))
    return f"[{text}{', ...' * (len(values) > 6)}]"
