"""`fit`: a trained full table -> the tables of a config, whose vectors are nearest to it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qrhash.arithmetic import as_size
from qrhash.config import EmbedConfig, check_config
from qrhash.fields import require_probability
from qrhash.fitting.additive import fit_sums
from qrhash.fitting.alternating import Progress, alternate, keep_sizes
from qrhash.fitting.blocks import Source
from qrhash.fitting.equations import Model, num_values
from qrhash.fitting.errors import Errors, errors_of
from qrhash.fitting.expanding import vectors_of
from qrhash.fitting.scales import finish
from qrhash.fitting.starts import start
from qrhash.operations import Projection
from qrhash.tables import as_tables

_FIRST = 8  # sweeps of each start, at most


class Fitted(NamedTuple):
    """Tables whose vectors are near to a full table's.

    Attributes:
      tables: k arrays [rows_j, width_j] of `config.param_dtype`, as from `qrhash.init`.
      projection: for operation "project" its `Projection`, else None.
      error: `Errors`, relative and squared, of the vectors as they are looked up.
    """

    tables: tuple[Any, ...]
    projection: Projection | None
    error: Errors


def fit(
    full: Any,
    config: EmbedConfig,
    *,
    keys: Any = None,
    weights: Any = None,
    num_iterations: int = 50,
    tolerance: float = 1e-3,
    block_rows: int | None = None,
    num_starts: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Fitted:
    """The tables of a config whose vectors are nearest to the rows of a full table.

    sum_i w_i |full_i - vector_i|^2 is least: for "concat", and for any single table but under a
    projection, by weighted means; for "add" by conjugate gradients; for "mult", "project" and
    "path" by alternating least squares, which end in one valley of several. For "mult" it is not
    quite the least at the end: rows of all tables but the longest are as large as what they stand
    for, where least squares would make so little of them that they could not be trained any more.

    The full table is read block by block, several times, and never copied whole. The tables, some
    times over in float64, and what is made of a block are all that is in memory.

    Args:
      full: [num_embeddings, features] floats, of whatever can be sliced by rows: NumPy's, a memory
        map, JAX's. Row i is the vector of id i.
      config: an `EmbedConfig` of any operation but "features".
      keys: for a family on keys, the key of each row of `full`, [n].
      weights: how much each row matters, [num_embeddings], 0 or more: how often each id is met,
        say. Rows of weight 0 are not looked at. None: all alike.
      num_iterations: how many sweeps over the tables at most, after those of the starts.
      tolerance: the sweeps end with one that takes less than this share off the error.
      block_rows: how many rows to read at once; None: by their width.
      num_starts: of "project" and "path" with several tables: how many starts are tried, with some
        sweeps each. The best one is taken further.
      seed: the same seed gives the same tables.
      progress: called with the sweep's number and the relative error before it.

    Returns:
      `Fitted`. A table's row that no id of any weight leads to is the weighted mean of the others.

    Raises:
      ValueError: an argument breaks its rule.

    >>> import numpy as np
    >>> from qrhash.families import QuotientRemainder
    >>> full = np.arange(20.0).reshape(10, 2)
    >>> config = EmbedConfig(QuotientRemainder(10, 4), 2, operation="add")
    >>> tables, _, error = fit(full, config)
    >>> [table.shape for table in tables], round(error.all, 6)
    ([(3, 2), (4, 2)], 0.0)
    """
    check_config(config)
    if config.operation == "features":
        raise ValueError(
            "config must be of an operation that gives an id one vector, got 'features', with "
            "which it has one of each table, and no full table says which."
        )
    num_iterations = as_size("num_iterations", num_iterations)
    seed = as_size("seed", seed, minimum=0)
    require_probability("tolerance", tolerance)
    num_starts = as_size("num_starts", num_starts)
    source = Source(full, config, keys, weights, block_rows, num_values(config))
    mean, spread = source.moments()
    if config.operation == "add":
        model = fit_sums(source, mean)
    else:
        sweeps = functools.partial(alternate, scale=spread, tolerance=tolerance)
        # One table after the other is all at once, where rows are not multiplied with each other.
        is_single = config.num_tables == 1
        if config.operation == "concat" or (is_single and config.operation != "project"):
            model, order = Model(config), list(range(config.num_tables))
            sweeps(source, model, order, num_iterations=1, progress=progress)
        else:
            num_starts = 1 if is_single or config.operation == "mult" else num_starts
            model, order = _started(source, mean, seed, num_starts, sweeps)
            sweeps(source, model, order, num_iterations=num_iterations, progress=progress)
            if config.operation == "mult":
                keep_sizes(source, model, order)
    finish(model, source.row_weights)
    tables = as_tables([rows.astype(config.param_dtype) for rows in model.rows], config)
    projection = model.projection
    if projection is not None:
        kernel, bias = (
            None if p is None else jnp.asarray(p, config.param_dtype) for p in projection
        )
        projection = Projection(kernel, bias)
    error = errors_of(source, vectors_of(tables, config, projection), mean)
    return Fitted(tables, projection, error)


def _started(
    source: Source, mean: np.ndarray, seed: int, num_starts: int, sweeps: Callable[..., float]
) -> tuple[Model, list[int]]:
    """The best of several starts after some sweeps, and the order in which tables are fitted."""
    flat = source.flattened()
    least, best = np.inf, None
    for number in range(num_starts):
        model = Model(source.config)
        order = start(flat, model, mean, np.random.default_rng((seed, number)), number)
        if num_starts == 1 and source.weights is None:
            return model, order
        error = sweeps(flat, model, order, num_iterations=_FIRST)
        if error < least:
            least, best = error, (model, order)
    assert best is not None
    return best
