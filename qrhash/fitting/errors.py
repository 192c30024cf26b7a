"""How far the vectors of tables are from those of a full table, in all and by frequency."""

from typing import NamedTuple

import jax
import numpy as np

from qrhash.fitting.blocks import Source
from qrhash.inspection.blocks import Vectors, block_size, vector_blocks
from qrhash.inspection.frequency import BANDS, frequency_bands


class Errors(NamedTuple):
    """Relative squared errors: 0 for equal vectors, 1 for the mean in place of each.

    sum_i w_i |full_i - vector_i|^2 / sum_i w_i |full_i - mean|^2, with the weighted mean of all;
    for head, middle and tail both sums go over a third of the weight each, that of few ids, of
    more, and of many, as `qrhash.inspection.frequency_bands` has them.

    Attributes:
      all: of all ids that have rows and a weight.
      head: of the most frequent ones; None without weights, as are the other two.
      middle: of those between.
      tail: of the others.
    """

    all: float
    head: float | None = None
    middle: float | None = None
    tail: float | None = None


def errors_of(source: Source, vectors: Vectors, mean: np.ndarray) -> Errors:
    """The errors of vectors, looked up as they will be."""
    bands = np.zeros(source.num_ids, np.uint8)
    if source.weights is not None:
        bands = frequency_bands(source.weights / source.weights.sum())
    sums = np.zeros((3, len(BANDS)))
    at_once = min(source.block_rows, block_size(source.num_ids))
    for part, block in vector_blocks(vectors, source.ids, at_once=at_once, dtype=np.float64):
        weights, _ = source.met(part)
        is_met = weights > 0
        wanted, got, weights = source.read(part)[is_met], block[is_met], weights[is_met]
        band = bands[part][is_met]
        for each, of in zip(sums, (wanted - got, wanted - mean, wanted), strict=True):
            each += np.bincount(band, weights * np.einsum("ij,ij->i", of, of), len(BANDS))
    precision = float(jax.numpy.finfo(source.config.param_dtype).eps)
    sets = [sums.sum(axis=1), *sums.T[:3]]
    ratios = [_ratio(*map(float, each), precision=precision) for each in sets]
    return Errors(*ratios[: 1 if source.weights is None else 4])


def _ratio(missed: float, spread: float, squares: float, *, precision: float) -> float:
    """Missed by spread; where all vectors are equal, none if no more is missed than is rounded."""
    if spread > (float(np.finfo(np.float64).eps) ** 2) * squares:
        return float(missed / spread)
    return 0.0 if missed <= precision**2 * squares else float("inf")
