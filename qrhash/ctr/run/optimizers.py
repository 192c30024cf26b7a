"""How the parameters of a model learn.

Tables learn by Adagrad. With a mean loss the squared gradients of a row are near 1e-8, hence the
tiny initial accumulator: the usual 0.1 would freeze the tables. All other parameters learn by Adam,
at a rate that falls linearly to zero: the noise of the last batches then averages out.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qrhash import adagrad, compensated_rounding, stochastic_rounding, touched_rows
from qrhash.ctr.settings import Settings


def make_optimizer(
    tables: Any, settings: Settings, num_steps: int
) -> optax.GradientTransformationExtraArgs:
    """Of {"tables": tables, "dense": all other parameters}.

    Args:
      tables: the state of a model's tables.
      settings: learning rates, the initial accumulator, and how tables are rounded.
      num_steps: over which Adam's learning rate falls to zero.
    """
    of_dense = optax.adam(optax.linear_schedule(settings.dense_lr, 0.0, num_steps))
    of_tables, kinds = _of_tables(tables, settings)
    return touched_rows(
        optax.partition({**of_tables, "dense": of_dense}, {"tables": kinds, "dense": "dense"})
    )


def _of_tables(
    tables: Any, settings: Settings
) -> tuple[dict[str, optax.GradientTransformation], Any]:
    """How tables are trained: by kind, and which kind each is."""
    tx = adagrad(settings.table_lr, initial_accumulator_value=settings.table_accumulator)
    are_narrow = any(each.dtype == jnp.bfloat16 for each in jax.tree.leaves(tables))
    if not are_narrow or settings.rounding == "nearest":
        return {"tables": tx}, "tables"
    large = optax.chain(tx, stochastic_rounding(settings.seed))
    # Rows of small tables are met in every step, where the noise of chance would add up.
    small = optax.chain(tx, compensated_rounding())
    kind = lambda _, table: table.replace("large" if table.is_large else "small")  # noqa: E731
    return {"large": large, "small": small}, nnx.map_state(kind, tables)
