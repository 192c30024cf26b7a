"""Where alternating least squares start: what decides which of several valleys they end in.

"mult": in every column, the full table is an array of numbers, one for each combination of rows,
that is to be near a product of vectors, one for each table. Power iterations find its leading ones:
they start from random signs and end with signs that agree with each other, which the least squares
alone would hardly change any more. "project" and "path": the longest table starts with the
principal components of the full table, the others at random.

Where weights are very uneven, most of a table is of no account, and there are more valleys. So the
first sweeps are by the roots of the weights.
"""

import math

import numpy as np

from qrhash.config import EmbedConfig
from qrhash.fitting.blocks import Source, add_by_row
from qrhash.fitting.equations import Model
from qrhash.operations import Projection, path_of

_POWER_SWEEPS = 8


def start(
    source: Source, model: Model, mean: np.ndarray, rng: np.random.Generator, number: int
) -> list[int]:
    """Starts the tables, in place; returns the order in which they are to be fitted.

    Args:
      source: the full table.
      model: the tables.
      mean: weighted mean of the full table.
      rng: what is drawn, is drawn by.
      number: of the start; "path" draws the rows of the longest table as well but for the first.
    """
    operation = model.config.operation
    if operation == "mult":
        return _start_factors(source, model, rng)
    if operation == "project":
        return _start_projected(source, model, mean, rng)
    return _start_path(source, model, mean, rng, is_drawn=number > 0)


def longest(config: EmbedConfig) -> int:
    """The table with the most rows."""
    num_rows = config.partition.num_rows
    return num_rows.index(max(num_rows))


def _longest_first(config: EmbedConfig) -> list[int]:
    num_rows = config.partition.num_rows
    return sorted(range(len(num_rows)), key=lambda table: -num_rows[table])


def _start_factors(source: Source, model: Model, rng: np.random.Generator) -> list[int]:
    order = _longest_first(model.config)
    sizes = _sizes_by_row(source, model)
    for table in order[1:]:
        model.rows[table] = rng.choice([-1.0, 1.0], model.rows[table].shape)
    for _ in range(_POWER_SWEEPS):
        for table in order:
            _power_step(source, model, table, sizes)
    model.rows = [rows * size for rows, size in zip(model.rows, sizes, strict=True)]
    return order


def _sizes_by_row(source: Source, model: Model) -> list[np.ndarray]:
    """Of each row of each table, the root mean square of its ids, column by column; 1 for none."""
    sums = [np.zeros_like(rows) for rows in model.rows]
    for block in source.blocks():
        squares = block.weights[:, None] * block.vectors**2
        for summed, index in zip(sums, block.indices, strict=True):
            add_by_row(summed, index, squares)
    weights = [np.where(each > 0, each, 1.0)[:, None] for each in source.row_weights]
    sizes = [np.sqrt(summed / each) for summed, each in zip(sums, weights, strict=True)]
    return [np.where(size > 0, size, 1.0) for size in sizes]


def _power_step(source: Source, model: Model, table: int, sizes: list[np.ndarray]) -> None:
    """Rows as means of the full table times the others' rows; of mean square 1 in every column.

    The full table is divided by the sizes of all its rows, so that large ones are no more to it.
    """
    sums, weights = np.zeros_like(model.rows[table]), source.row_weights[table]
    for block in source.blocks():
        rows = model.gather(block.indices)
        size = math.prod(each[index] for each, index in zip(sizes, block.indices, strict=True))
        rhs = model.equations(rows, table, block.vectors / size).rhs
        add_by_row(sums, block.indices[table], block.weights[:, None] * rhs)
    means = sums / np.where(weights > 0, weights, 1.0)[:, None]
    size = np.sqrt((weights @ means**2) / weights.sum())
    # A column of zeros tells nothing: the rows stay as they are.
    model.rows[table] = np.where(size > 0, means / np.where(size > 0, size, 1.0), model.rows[table])


def _start_projected(
    source: Source, model: Model, mean: np.ndarray, rng: np.random.Generator
) -> list[int]:
    config = model.config
    assert config.projection_shape is not None
    centre = mean if config.use_bias else np.zeros_like(mean)
    first, width = longest(config), config.table_shapes[0][1]
    components = _components(source, centre, width, rng)
    for table, rows in enumerate(model.rows):
        if table != first:
            model.rows[table] = rng.standard_normal(rows.shape)
    model.rows[first] = _scores(source, first, centre, components)
    kernel = np.zeros(config.projection_shape)
    kernel[first * width : (first + 1) * width] = components.T
    model.projection = Projection(kernel, centre if config.use_bias else None)
    return _longest_first(config)[::-1]


def _start_path(
    source: Source, model: Model, mean: np.ndarray, rng: np.random.Generator, *, is_drawn: bool
) -> list[int]:
    widths = [width for _, width in model.config.table_shapes]
    first, maps = path_of(widths)
    for each in maps[:-1]:
        lines = rng.standard_normal((len(model.rows[each.table]), widths[each.table]))
        model.rows[each.table] = lines * each.num_inputs**-0.5
    if is_drawn:
        model.rows[first] = rng.standard_normal(model.rows[first].shape)
    else:
        components = _components(source, mean, widths[first], rng)
        model.rows[first] = _scores(source, first, mean, components)
    return [each.table for each in maps[::-1]] + [first]


def _components(
    source: Source, centre: np.ndarray, number: int, rng: np.random.Generator
) -> np.ndarray:
    """Principal components [features, number] around a centre; beyond all, random ones."""
    moment = np.zeros((len(centre), len(centre)))
    for block in source.blocks():
        around = block.vectors - centre
        moment += (block.weights[:, None] * around).T @ around
    _, vectors = np.linalg.eigh(moment)
    found = vectors[:, ::-1][:, :number]
    # Their signs are the solver's: made those of a rule.
    found = found * np.where(found[np.abs(found).argmax(axis=0), range(found.shape[1])] < 0, -1, 1)
    more = rng.standard_normal((len(centre), number - found.shape[1])) * len(centre) ** -0.5
    return np.concatenate([found, more], axis=1)


def _scores(source: Source, table: int, centre: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Of each row of a table, the mean of its ids in those components, [num_rows, number]."""
    sums = np.zeros((source.config.partition.num_rows[table], components.shape[1]))
    for block in source.blocks():
        scores = (block.vectors - centre) @ components
        add_by_row(sums, block.indices[table], block.weights[:, None] * scores)
    weights = source.row_weights[table]
    return sums / np.where(weights > 0, weights, 1.0)[:, None]
