"""The normal equations of one table's rows, all others given.

In the rows of any one table the vector is affine, whatever the operation: e = A z + c, where A and
c are made of the id's other rows. So the best row z of a table solves a small linear system, summed
up over the ids that share it:

    (sum_i w_i A_i^T A_i) z = sum_i w_i A_i^T (full_i - c_i)

For "add" and "concat" it is a weighted mean; for "mult" a number by itself in every column; for
"project" a system of a row's width; for "path" as well, or for a map one of its lines' number with
as many right-hand sides as it has outputs.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from qrhash.config import EmbedConfig
from qrhash.operations import Projection, combine, path_of

_RIDGE = 1e-9  # of what is on a system's diagonal: what a solution is kept where it was by
_TINY = float(np.finfo(np.float64).tiny)


class Equations(NamedTuple):
    """What an id adds to the equations of its row.

    Attributes:
      gram: [m, d] where entries go by themselves, one number [m, 1] for all of them; or [m, p, p].
      rhs: [m, d], or [m, p, outputs] where a row is that many lines.
    """

    gram: np.ndarray
    rhs: np.ndarray


class Model:
    """Tables while they are fitted, in float64.

    Attributes:
      config: the `EmbedConfig`.
      rows: k arrays [rows_j, width_j].
      projection: for "project", a `Projection`; its bias is None as the config has none.
    """

    def __init__(self, config: EmbedConfig) -> None:
        self.config = config
        self.rows = [np.zeros(shape) for shape in config.table_shapes]
        self.projection: Projection | None = None

    def gather(self, indices: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The ids' rows, k arrays [m, width_j]."""
        return [rows[index] for rows, index in zip(self.rows, indices, strict=True)]

    def vectors(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """The ids' vectors [m, features], of their rows."""
        found: np.ndarray = combine(rows, self.config.operation, self.projection)
        return found

    def equations(self, rows: list[np.ndarray], table: int, wanted: np.ndarray) -> Equations:
        """What ids of these rows add to the equations of a table, for the vectors wanted [m, F]."""
        return _OPERATIONS[self.config.operation](self, rows, table, wanted)

    def shapes(self, table: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of what `equations` gives for one id."""
        rows = [np.zeros((1, width)) for _, width in self.config.table_shapes]
        found = self.equations(rows, table, np.zeros((1, self.config.features)))
        return found.gram.shape[1:], found.rhs.shape[1:]


def num_values(config: EmbedConfig) -> int:
    """The most numbers that the equations of one id hold."""
    model = Model(config)
    if config.projection_shape is not None:
        model.projection = Projection(np.zeros(config.projection_shape), np.zeros(config.features))
    shapes = (shape for table in range(config.num_tables) for shape in model.shapes(table))
    return max(math.prod(shape) for shape in shapes)


def solve(sums: Equations, old: np.ndarray) -> np.ndarray:
    """Rows [m, width] of summed equations; those that nothing says anything of stay as they were.

    Args:
      sums: of m rows.
      old: the rows so far, [m, width].
    """
    gram, rhs = sums
    if gram.ndim == 2:
        is_told = gram > _RIDGE**2 * gram.max(initial=0.0)
        return np.where(is_told, rhs / np.where(is_told, gram, 1.0), old)
    size = gram.shape[1]
    lines = old.reshape(*rhs.shape[:2], -1)
    strength = np.trace(gram, axis1=1, axis2=2) / size
    kept = _RIDGE * (strength + _RIDGE * strength.max(initial=0.0)) + _TINY
    # Kept near where it was, and not near zero: at the end of many sweeps nothing is lost by it.
    system = gram + kept[:, None, None] * np.eye(size)
    right = rhs.reshape(lines.shape) + kept[:, None, None] * lines
    return np.linalg.solve(system, right).reshape(old.shape)


def _means(model: Model, rows: list[np.ndarray], table: int, wanted: np.ndarray) -> Equations:
    if model.config.operation == "concat":
        ends = np.cumsum([row.shape[1] for row in rows])
        return Equations(_ones(wanted), np.split(wanted, ends[:-1], axis=1)[table])
    others = rows[:table] + rows[table + 1 :]
    return Equations(_ones(wanted), functools.reduce(operator.sub, others, wanted))


def _factors(model: Model, rows: list[np.ndarray], table: int, wanted: np.ndarray) -> Equations:
    others = _product(rows[:table] + rows[table + 1 :], rows[table])
    return Equations(others * others, others * wanted)


def _projected(model: Model, rows: list[np.ndarray], table: int, wanted: np.ndarray) -> Equations:
    assert model.projection is not None
    kernel, bias = model.projection
    width, k = rows[0].shape[1], len(rows)
    parts = kernel.reshape(-1, width, kernel.shape[1])
    left = wanted if bias is None else wanted - bias
    for j, row in enumerate(rows):
        if j != table:
            left = left - row @ parts[j]
    # A^T is the table's own part of the kernel, and that of the product, scaled by the other rows.
    own = parts[table]
    if k == 1:
        gram = np.broadcast_to(own @ own.T, (len(left), width, width))
        return Equations(gram, left @ own.T)
    others, of_product = _product(rows[:table] + rows[table + 1 :], rows[table]), parts[k]
    across = others[:, :, None] * (of_product @ own.T)
    gram = own @ own.T + across + across.transpose(0, 2, 1)
    gram += others[:, :, None] * others[:, None, :] * (of_product @ of_product.T)
    return Equations(gram, left @ own.T + others * (left @ of_product.T))


def _along_path(model: Model, rows: list[np.ndarray], table: int, wanted: np.ndarray) -> Equations:
    first, maps = path_of([row.shape[1] for row in rows])
    lines = [rows[m.table].reshape(-1, m.num_inputs + 1, m.num_outputs) for m in maps]
    vector, before = rows[first], None if table == first else [m.table for m in maps].index(table)
    for each in lines[: before or 0]:
        vector = np.einsum("mi,mio->mo", vector, each[:, :-1]) + each[:, -1]
    after = lines if before is None else lines[before + 1 :]
    inputs = np.concatenate([vector, _ones(vector)], axis=1)
    if not after:
        if before is None:
            return Equations(_ones(wanted), wanted)
        gram = inputs[:, :, None] * inputs[:, None, :]
        return Equations(gram, inputs[:, :, None] * wanted[:, None, :])
    # What the maps behind it make of it: one affine map.
    slope, shift = after[0][:, :-1], after[0][:, -1]
    for each in after[1:]:
        slope = np.einsum("mio,mop->mip", slope, each[:, :-1])
        shift = np.einsum("mi,mio->mo", shift, each[:, :-1]) + each[:, -1]
    if before is not None:
        slope = inputs[:, :, None, None] * slope[:, None]
        slope = slope.reshape(len(wanted), -1, wanted.shape[1])
    gram = slope @ slope.transpose(0, 2, 1)
    return Equations(gram, np.einsum("mif,mf->mi", slope, wanted - shift))


def _ones(like: np.ndarray) -> np.ndarray:
    return np.ones((len(like), 1))


def _product(others: Sequence[np.ndarray], like: np.ndarray) -> np.ndarray:
    """The product of rows; ones, where there are none."""
    return functools.reduce(operator.mul, others) if others else np.ones_like(like)


_OPERATIONS: dict[str, Callable[[Model, list[np.ndarray], int, np.ndarray], Equations]] = {
    "add": _means,
    "concat": _means,
    "mult": _factors,
    "project": _projected,
    "path": _along_path,
}
