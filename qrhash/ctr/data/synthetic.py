"""A click stream whose true click rates are known.

The logit of a row is a sum of known parts: one effect per category of its 26 columns, whose
categories follow Zipf's law, two effects that belong to pairs of columns, and the logarithms
of some of its integers. A label is drawn with the probability the logit says, so no model
can expect a better log loss than that of the true logits: the report shows it.
Rows are made block by block from the seed and the block's number; nothing is stored.
"""

from collections.abc import Iterator

import numpy as np

from qrhash.arithmetic import ceil_div
from qrhash.ctr.data.block import Block
from qrhash.ctr.data.criteo import CATEGORIES, INTEGERS
from qrhash.ctr.data.schema import CRITEO

_BLOCK_ROWS = 8192

# Vocabulary sizes: Criteo's 26, with the millions brought down to tens of thousands.
_SIZES = (
    1460, 583, 40_000, 20_000, 305, 24, 8_000, 633, 3, 15_000, 5_683, 30_000, 3_194,
    27, 9_000, 25_000, 10, 5_652, 2_173, 4, 28_000, 18, 15, 12_000, 105, 10_000,
)  # fmt: skip
_ZIPF = 1.15  # probability of the r-th category ~ r ** -_ZIPF
_PAIRS = ((5, 13), (21, 22))  # positions of two pairs of short columns
_EFFECT, _PAIR_EFFECT = 0.3, 0.5  # standard deviations
_INTEGER_EFFECTS = (0.4, -0.3, 0.2) + (0.0,) * (len(INTEGERS) - 3)
_MISSING = 0.1  # share of the integer cells that are missing; they count as 0
_BIAS = -1.4  # about a quarter of the rows are clicks


class SyntheticSource:
    """`num_lines` synthetic rows; a `Source`.

    Args:
      num_lines: rows of the stream.
      seed: of the effects and the rows.
    """

    name = "synthetic click stream"
    schema = CRITEO
    checksum = 0  # the settings say it all

    def __init__(self, num_lines: int, seed: int) -> None:
        self.num_lines = num_lines
        self._seed = seed
        random = np.random.default_rng([seed, 0])
        self._effects = [random.normal(0, _EFFECT, size) for size in _SIZES]
        self._pair_effects = [
            random.normal(0, _PAIR_EFFECT, (_SIZES[i], _SIZES[j])) for i, j in _PAIRS
        ]
        self._cumulative = [_zipf_cumulative(size) for size in _SIZES]

    def blocks(self, start: int, stop: int, wanted: np.ndarray | None = None) -> Iterator[Block]:
        """Yields the rows of lines [start, stop); see `Source`. Blocks are made whole."""
        for number in range(start // _BLOCK_ROWS, ceil_div(stop, _BLOCK_ROWS)):
            first = number * _BLOCK_ROWS
            begin, end = max(0, start - first), min(stop - first, _BLOCK_ROWS)
            rows = self._block(number).rows(begin, end)
            if wanted is not None:
                rows = rows.take(wanted[first + begin - start : first + end - start])
            yield rows

    def _block(self, number: int) -> Block:
        random = np.random.default_rng([self._seed, 1, number])
        uniform = random.random((_BLOCK_ROWS, len(CATEGORIES)))
        ranks = [np.searchsorted(c, u) for c, u in zip(self._cumulative, uniform.T, strict=True)]
        numbers = np.floor(random.lognormal(1.0, 1.5, (_BLOCK_ROWS, len(INTEGERS))))
        absent = random.random(numbers.shape) < _MISSING
        numbers[absent] = 0
        logits = _BIAS + (np.log1p(numbers) - 1.4) @ np.array(_INTEGER_EFFECTS)
        for effects, rank in zip(self._effects, ranks, strict=True):
            logits += effects[rank]
        for pair_effects, (i, j) in zip(self._pair_effects, _PAIRS, strict=True):
            logits += pair_effects[ranks[i], ranks[j]]
        labels = random.random(_BLOCK_ROWS) < 1 / (1 + np.exp(-logits))
        # In every third column the second most frequent category is the missing cell.
        missing = np.stack([(rank == 1) & (j % 3 == 0) for j, rank in enumerate(ranks)], axis=1)
        keys = np.stack([_keys(j, rank) for j, rank in enumerate(ranks)], axis=1)
        keys[missing] = 0
        numbers[absent] = np.nan
        labels, numbers = labels.astype(np.float32), numbers.astype(np.float32)
        places = np.arange(_BLOCK_ROWS) + number * _BLOCK_ROWS
        return Block(labels, numbers, keys, missing, logits, places)


def _zipf_cumulative(size: int) -> np.ndarray:
    cumulative = np.cumsum(np.arange(1, size + 1) ** -_ZIPF)
    return cumulative / cumulative[-1]


def _keys(column: int, ranks: np.ndarray) -> np.ndarray:
    """Ranks as 32-bit keys that look hashed; an odd factor keeps them apart."""
    return (((ranks + 1) * 2_654_435_761 + column * 40_503) % 2**32).astype(np.uint64)
