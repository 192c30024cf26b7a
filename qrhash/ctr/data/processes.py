"""What several processes do together: each reads its lines, and tells the others what it found.

All of them must call these functions in the same order, as they run collectives of JAX. One process
alone has all lines, and nobody to tell.
"""

import pickle
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from qrhash.ctr.errors import UserError

_Item = TypeVar("_Item")

_PIECE = 1 << 26  # bytes sent at once: every device holds a piece of every process


def own_lines(start: int, stop: int) -> tuple[int, int]:
    """Those of the lines [start, stop) that this process reads, where all share one pass.

    They follow each other, and are behind those of the processes before: what the processes found,
    joined in their order, is in the order of the data.
    """
    count, number, lines = jax.process_count(), jax.process_index(), stop - start
    return start + lines * number // count, start + lines * (number + 1) // count


def gather(value: Any) -> list[Any]:
    """What each process gives, in their order; anything that can be pickled."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value, protocol=5), np.uint8)
    # As bytes: JAX's integers have 32 bits.
    told = multihost_utils.process_allgather(np.frombuffer(len(data).to_bytes(8, "little"), "u1"))
    sizes = [int.from_bytes(each.tobytes(), "little") for each in told]
    pieces = []
    for first in range(0, max(sizes), _PIECE):
        # Of few different lengths: each is compiled.
        length = min(_PIECE, 1 << (max(sizes) - first - 1).bit_length())
        piece = data[first : first + length]
        padded = np.pad(piece, (0, length - len(piece)))
        pieces.append(multihost_utils.process_allgather(padded))
    found = np.concatenate(pieces, axis=1)
    return [pickle.loads(row[:size]) for row, size in zip(found, sizes, strict=True)]


def together(items: Iterable[_Item]) -> Iterator[_Item]:
    """The same items; a `UserError` that ends those of one process ends those of all.

    Each goes through its own ones first: nobody waits for a process that is gone.
    """
    error = None
    try:
        yield from items
    except UserError as found:
        error = str(found)
    for each in gather(error):
        if each is not None:
            raise UserError(each)
