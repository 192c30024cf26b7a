"""Tables after a fit, as training wants them: no vector of an id that was met is changed.

A product of rows does not say how large each is, and neither does a row under a kernel. Training
does: a step is as large as what a row is multiplied with. So they get the sizes that `qrhash.init`
gives: for "mult" entries of mean square 1 in all tables but the longest, for "path" lines of the
maps of the size drawn; for "project" both, the lines of the kernel being those that multiply a row
of the longest table. A row that no id of any weight leads to was
not fitted: it becomes the mean of those of its table, by weight.
"""

import numpy as np

from qrhash.fitting.equations import Model
from qrhash.fitting.starts import longest
from qrhash.initializers import linear_stddev
from qrhash.operations import Projection, path_of


def finish(model: Model, weights: list[np.ndarray]) -> None:
    """Sizes and rows without ids, in place.

    Args:
      model: the tables.
      weights: of each row of each table, k arrays [rows_j].
    """
    operation = model.config.operation
    if operation == "mult":
        _balance_factors(model, weights)
    elif operation == "project":
        _balance_projected(model, weights)
    elif operation == "path":
        _balance_path(model, weights)
    for j, rows in enumerate(model.rows):
        mean = weights[j] @ rows / weights[j].sum()
        model.rows[j] = np.where(weights[j][:, None] > 0, rows, mean)


def _balance_factors(model: Model, weights: list[np.ndarray]) -> None:
    first = longest(model.config)
    for j, rows in enumerate(model.rows):
        if j != first:
            size = _positive(np.sqrt(np.mean(rows[weights[j] > 0] ** 2, axis=0)))
            model.rows[j] = rows / size
            model.rows[first] = model.rows[first] * size


def _balance_projected(model: Model, weights: list[np.ndarray]) -> None:
    assert model.projection is not None
    kernel, bias = model.projection
    first, rows = longest(model.config), model.rows
    parts = kernel.reshape(-1, rows[0].shape[1], kernel.shape[1]).copy()
    for j in range(len(rows)):
        if j != first:
            size = _positive(np.sqrt(np.mean(rows[j][weights[j] > 0] ** 2, axis=0)))
            rows[j] = rows[j] / size
            parts[j] *= size[:, None]
            parts[-1] *= size[:, None]
    # What a row of the longest table is multiplied with: its own lines, and those of the product.
    of_first = [first] if len(rows) == 1 else [first, -1]
    wanted = linear_stddev(kernel.shape[0]) * kernel.shape[1] ** 0.5
    size = _positive(np.sqrt((parts[of_first] ** 2).sum(axis=(0, 2))) / wanted)
    rows[first] = rows[first] * size
    parts[of_first] /= size[:, None]
    model.projection = Projection(parts.reshape(kernel.shape), bias)


def _balance_path(model: Model, weights: list[np.ndarray]) -> None:
    first, maps = path_of([rows.shape[1] for rows in model.rows])
    if not maps:
        return
    table, inputs, outputs = maps[0]
    lines = model.rows[table].reshape(-1, inputs + 1, outputs).copy()
    size = np.sqrt(np.mean(lines[weights[table] > 0, :-1] ** 2, axis=(0, 2))) / linear_stddev(
        inputs
    )
    size = np.where(size > 0, size, 1.0)
    lines[:, :-1] /= size[:, None]
    model.rows[first] = model.rows[first] * size
    model.rows[table] = lines.reshape(model.rows[table].shape)


def _positive(size: np.ndarray) -> np.ndarray:
    return np.where(size > 0, size, 1.0)
