"""Alternating least squares: one table after the other, all others given, and the projection.

Every step is the best that there is for its table, so that the error only falls. A step goes once
through the full table; several times where the systems of all rows would need much more memory than
the tables. Between sweeps the tables go on in the direction in which they went, further with every
sweep that gains by it: several times fewer sweeps are needed.

Source: Mitchell, Ye and De Sterck 2020, "Nesterov acceleration of alternating least squares for
canonical tensor decomposition: momentum step size and restart mechanisms".
"""

from collections.abc import Callable, Sequence

import numpy as np

from qrhash.fitting.blocks import Source, add_by_row
from qrhash.fitting.equations import Equations, Model, solve
from qrhash.operations import Projection

_AT_ONCE = 1 << 23  # numbers of the equations that are summed up at once, at least
_EXACT = 1e-14  # of the squares of the vectors: an error that is none

_FURTHER, _FURTHEST = 0.3, 1.2  # what is added to the momentum by a sweep, and the most of it
_TINY = float(np.finfo(np.float64).tiny)

Progress = Callable[[int, float], None]


def alternate(
    source: Source,
    model: Model,
    order: Sequence[int],
    *,
    scale: float,
    num_iterations: int,
    tolerance: float,
    progress: Progress | None = None,
) -> float:
    """Sweeps over the tables, in place, until a sweep gains too little.

    Args:
      source: the full table.
      model: the tables as they start.
      order: of the tables in a sweep; the projection goes before them.
      scale: weighted squares of the vectors around their mean, that an error is a share of.
      num_iterations: how many sweeps at most.
      tolerance: the share of its error that a sweep must gain.
      progress: is called with the sweep and the relative error before it.

    Returns:
      The weighted squared error before the last sweep that counts.
    """
    best, least, momentum = (model.rows, model.projection), np.inf, 0.0
    for sweep in range(num_iterations):
        if model.projection is not None:
            fit_projection(source, model)
        error = fit_table(source, model, order[0])
        if error > least and momentum:  # It went too far.
            (model.rows, model.projection), momentum = best, 0.0
            continue
        for table in order[1:]:
            fit_table(source, model, table)
        if progress is not None:
            progress(sweep, error / max(scale, _TINY))
        gained = least - error > tolerance * error
        (before, _), best, least = best, (model.rows, model.projection), error
        if error <= _EXACT * scale or not (gained or momentum):
            break
        # Where a sweep with momentum gains too little, one without it has the last word.
        momentum = min(momentum + _FURTHER, _FURTHEST) if gained and sweep else 0.0
        if momentum:
            pairs = zip(model.rows, before, strict=True)
            model.rows = [new + momentum * (new - old) for new, old in pairs]
    model.rows, model.projection = best
    return least


def fit_table(source: Source, model: Model, table: int) -> float:
    """The best rows of a table; returns the weighted squared error before."""
    num_rows = len(model.rows[table])
    of_gram, of_rhs = model.shapes(table)
    most = max(_AT_ONCE, 4 * sum(rows.size for rows in model.rows))
    at_once = max(1, most // max(int(np.prod(of_gram)), int(np.prod(of_rhs))))
    error, made = 0.0, []
    for start in range(0, num_rows, at_once):
        some = range(start, min(start + at_once, num_rows))
        sums = Equations(np.zeros((len(some), *of_gram)), np.zeros((len(some), *of_rhs)))
        for block in source.blocks(table, some):
            rows = model.gather(block.indices)
            missed = block.vectors - model.vectors(rows)
            error += float(block.weights @ np.einsum("ij,ij->i", missed, missed))
            index = block.indices[table] - start
            for summed, each in zip(sums, model.equations(rows, table, block.vectors), strict=True):
                weights = block.weights.reshape(-1, *[1] * (each.ndim - 1))
                add_by_row(summed, index, weights * each)
        made.append(solve(sums, model.rows[table][start : some.stop]))
    model.rows = [*model.rows[:table], np.concatenate(made), *model.rows[table + 1 :]]
    return error


def keep_sizes(source: Source, model: Model, order: Sequence[int]) -> None:
    """The factors of "mult" with rows as large as what they stand for, in place.

    Of ids whose vectors have little to do with the rows that they share, least squares make next to
    nothing: the error is least, and what is multiplied with it can hardly be trained. So rows of
    all tables but the first in `order` get the sign that they had, and the size that gives their
    ids' vectors the squares of the full table's. Where the fit is exact they are what they were.
    """
    for table in order[1:]:
        of_full, of_others, products = (np.zeros_like(model.rows[table]) for _ in range(3))
        for block in source.blocks():
            gram, rhs = model.equations(model.gather(block.indices), table, block.vectors)
            pairs = ((of_full, block.vectors**2), (of_others, gram), (products, rhs))
            for summed, each in pairs:
                add_by_row(summed, block.indices[table], block.weights[:, None] * each)
        is_told = (of_full > 0) & (of_others > 0)
        size = np.sqrt(np.where(is_told, of_full, 0.0) / np.where(is_told, of_others, 1.0))
        model.rows[table] = np.where(is_told, np.copysign(size, products), model.rows[table])
    if len(order) > 1:
        fit_table(source, model, order[0])


def fit_projection(source: Source, model: Model) -> None:
    """The best projection, all tables given."""
    assert model.config.projection_shape is not None
    num_inputs, features = model.config.projection_shape
    has_bias = model.config.use_bias
    size = num_inputs + has_bias
    gram, rhs = np.zeros((size, size)), np.zeros((size, features))
    for block in source.blocks():
        inputs = inputs_of(model.gather(block.indices), has_bias=has_bias)
        weighted = block.weights[:, None] * inputs
        gram += weighted.T @ inputs
        rhs += weighted.T @ block.vectors
    # Inputs of any size count alike for what is too little to be told.
    size_of = np.sqrt(np.maximum(np.diag(gram), _TINY))
    found = np.linalg.lstsq(gram / size_of / size_of[:, None], rhs / size_of[:, None], rcond=1e-13)
    solution = found[0] / size_of[:, None]
    model.projection = Projection(solution[:num_inputs], solution[num_inputs] if has_bias else None)


def inputs_of(rows: Sequence[np.ndarray], *, has_bias: bool) -> np.ndarray:
    """What the kernel of "project" is multiplied with, [m, num_inputs], and a one for the bias."""
    parts = [*rows]
    if len(rows) > 1:
        parts.append(np.prod(rows, axis=0))
    if has_bias:
        parts.append(np.ones((len(rows[0]), 1)))
    return np.concatenate(parts, axis=1)
