"""Head, middle and tail: ids by how often they are met.

Each of the three has a third of the look-ups: the head in few ids, the tail in many, so that what
is measured of them is measured on about as many events.
"""

from typing import Any

import numpy as np

from qrhash.inspection.blocks import checked_counts

BANDS = ("head", "middle", "tail", "never met")

_PARTS = 3


def frequency_bands(counts: Any) -> np.ndarray:
    """Which of `BANDS` each id is in.

    By falling count, an id is in the head if those before it have less than a third of all
    look-ups, in the middle if less than two thirds, and else in the tail; without any count it was
    never met.

    Args:
      counts: how often each id is met, [n], 0 or more, in any order.

    Returns:
      Places in `BANDS`, uint8 [n].

    >>> frequency_bands([50, 1, 30, 0, 1, 18]).tolist()
    [0, 2, 1, 3, 2, 2]
    """
    met = checked_counts(counts, len(counts))
    order = np.argsort(-met, kind="stable")
    in_order = met[order]
    before = np.cumsum(in_order) - in_order
    bands = np.empty(len(met), np.uint8)
    bands[order] = np.minimum(_PARTS * before // max(1.0, met.sum()), _PARTS - 1)
    bands[met == 0] = _PARTS
    return bands
