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
    txs, kinds = _of_tables(tables, settings)
    txs["dense"] = optax.adam(optax.linear_schedule(settings.dense_lr, 0.0, num_steps))

    def labels(params: Any) -> Any:
        # By leaves: tables may be arrays, or variables that hold them.
        of_tables = jax.tree.unflatten(jax.tree.structure(params["tables"]), kinds)
        return {"tables": of_tables, "dense": "dense"}

    return touched_rows(optax.partition(txs, labels))


def _of_tables(
    tables: Any, settings: Settings
) -> tuple[dict[str, optax.GradientTransformation], list[str]]:
    """How tables are trained: by kind, and which kind each leaf is."""
    tx = adagrad(settings.table_lr, initial_accumulator_value=settings.table_accumulator)
    leaves = jax.tree.leaves(tables)
    are_narrow = any(each.dtype == jnp.bfloat16 for each in leaves)
    if not are_narrow or settings.rounding == "nearest":
        return {"tables": tx}, ["tables"] * len(leaves)
    # Rows of small tables are met in every step, where the noise of chance would add up.
    rounded = {"large": stochastic_rounding(settings.seed), "small": compensated_rounding()}
    kind = lambda _, table: table.replace("large" if table.is_large else "small")  # noqa: E731
    kinds = jax.tree.leaves(nnx.map_state(kind, tables))
    return {each: optax.chain(tx, rounded[each]) for each in dict.fromkeys(kinds)}, kinds
