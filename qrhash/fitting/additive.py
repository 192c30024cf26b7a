"""Sums of rows: the normal equations of all tables at once, by conjugate gradients.

For "add" the vector is linear in all tables together. Were every combination of rows met alike, the
best tables would be the weighted means of their rows, less the mean of all for each table but one.
That is where it starts; the rest are conjugate gradients on the normal equations, each row divided
by its weight. They need what the full table sums up to by row, and no more of it: after one pass
only row numbers and weights are read.
"""

import numpy as np

from qrhash.fitting.blocks import Source, add_by_row
from qrhash.fitting.equations import Model

_PRECISION = 1e-9  # of the right-hand sides, a residual that is none
_MOST_STEPS = 500

Rows = list[np.ndarray]


def fit_sums(source: Source, mean: np.ndarray) -> Model:
    """The best tables for "add"."""
    model = Model(source.config)
    shapes = model.config.table_shapes
    wanted = [np.zeros(shape) for shape in shapes]
    for block in source.blocks():
        weighted = block.weights[:, None] * block.vectors
        for j, index in enumerate(block.indices):
            add_by_row(wanted[j], index, weighted)
    weights = [each[:, None] for each in source.row_weights]
    per_row = [1 / np.where(each > 0, each, 1.0) for each in weights]
    for j, inverse in enumerate(per_row):
        around = wanted[j] * inverse - (mean if j else 0.0)
        model.rows[j] = np.where(weights[j] > 0, around, 0.0)
    if len(shapes) == 1:
        return model

    def scaled(rows: Rows) -> Rows:
        return [each * inverse for each, inverse in zip(rows, per_row, strict=True)]

    residual = _less(wanted, 1.0, _sums_back(source, model.rows))
    least = _PRECISION**2 * _products(wanted, scaled(wanted))
    direction = scaled(residual)
    left = _products(residual, direction)
    for _ in range(_MOST_STEPS):
        is_open = left > least
        if not is_open.any():
            break
        onwards = _sums_back(source, direction)
        step = np.where(is_open, left / _positive(_products(direction, onwards)), 0.0)
        model.rows = _less(model.rows, -step, direction)
        residual = _less(residual, step, onwards)
        by_row = scaled(residual)
        now = _products(residual, by_row)
        turn = np.where(is_open, now / _positive(left), 0.0)
        direction = _less(by_row, -turn, direction)
        left = now
    return model


def _sums_back(source: Source, rows: Rows) -> Rows:
    """The normal matrix times rows: the sums of ids, weighted, summed up by row."""
    sums = [np.zeros_like(each) for each in rows]
    for block in source.blocks(with_vectors=False):
        total = np.zeros((len(block.weights), rows[0].shape[1]))
        for each, index in zip(rows, block.indices, strict=True):
            total += each[index]
        total *= block.weights[:, None]
        for summed, index in zip(sums, block.indices, strict=True):
            add_by_row(summed, index, total)
    return sums


def _less(a: Rows, factor: np.ndarray | float, b: Rows) -> Rows:
    return [x - factor * y for x, y in zip(a, b, strict=True)]


def _products(a: Rows, b: Rows) -> np.ndarray:
    """Inner products over all tables, of each column by itself, [features]."""
    return np.sum([np.einsum("ij,ij->j", x, y) for x, y in zip(a, b, strict=True)], axis=0)


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, 1.0)
