"""Adagrad as several libraries define it, with an accumulator for each entry or for each row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qrhash.rowgrads import is_row_grads
from qrhash.types import Array, wide_dtype

# (initial accumulator, eps, whether eps stands inside the root)
_CONVENTIONS = {
    "optax": (0.1, 1e-7, True),
    "torch": (0.0, 1e-10, False),
    "tensorflow": (0.1, 0.0, True),
    "fbgemm": (0.0, 1e-8, False),
}


def adagrad(
    learning_rate: optax.ScalarOrSchedule,
    *,
    convention: str = "optax",
    initial_accumulator_value: float | None = None,
    eps: float | None = None,
) -> optax.GradientTransformation:
    """Adagrad, with one accumulator per entry, as several libraries define it.

        a <- a + g**2,    w <- w - learning_rate * g / sqrt(a + eps)       or  / (sqrt(a) + eps)

    Args:
      learning_rate: a number or a schedule.
      convention: whose defaults, and where eps stands:
        "optax": a starts at 0.1, eps 1e-7 inside the root;
        "torch": at 0, eps 1e-10 outside (`torch.optim.Adagrad`);
        "tensorflow": at 0.1, no eps (`tf.compat.v1.train.AdagradOptimizer`, DeepRec);
        "fbgemm": at 0, eps 1e-8 outside (EXACT_ADAGRAD).
      initial_accumulator_value: where a starts, instead. With a mean loss the squared gradients of
        a row are near 1e-8, and 0.1 all but freezes the tables.
      eps: instead of the convention's.

    Returns:
      An optax transformation, for dense gradients, or inside `touched_rows`. Its accumulators are
      of the parameters' dtype, but float32 at least.

    Raises:
      ValueError: an unknown convention.

    Source: Duchi et al. 2011, "Adaptive Subgradient Methods".
    """
    scale = _scale_by_accumulated(convention, initial_accumulator_value, eps, per_row=False)
    return optax.chain(scale, optax.scale_by_learning_rate(learning_rate))


def rowwise_adagrad(
    learning_rate: optax.ScalarOrSchedule,
    *,
    convention: str = "optax",
    initial_accumulator_value: float | None = None,
    eps: float | None = None,
) -> optax.GradientTransformation:
    """Adagrad with one accumulator per row, of the mean of the row's squared gradients.

    The state is as many times smaller as a row is wide. An array of parameters [..., width] has
    accumulators [...].

    Args:
      learning_rate: a number or a schedule.
      convention: as for `adagrad`; "fbgemm" is EXACT_ROWWISE_ADAGRAD.
      initial_accumulator_value: where an accumulator starts, instead of at the convention's value.
      eps: instead of the convention's.

    Returns:
      An optax transformation, for dense gradients, or inside `touched_rows`.

    Raises:
      ValueError: an unknown convention.

    Source: FBGEMM's and TorchRec's row-wise Adagrad (Mudigere et al. 2022, arXiv 2104.05158).
    """
    scale = _scale_by_accumulated(convention, initial_accumulator_value, eps, per_row=True)
    return optax.chain(scale, optax.scale_by_learning_rate(learning_rate))


class AccumulatorState(NamedTuple):
    """State of Adagrad.

    Attributes:
      accumulators: for each parameter, sums of squared gradients.
    """

    accumulators: Any


def _scale_by_accumulated(
    convention: str, initial_accumulator_value: float | None, eps: float | None, per_row: bool
) -> optax.GradientTransformation:
    if convention not in _CONVENTIONS:
        raise ValueError(
            f"convention must be one of {', '.join(_CONVENTIONS)}, got {convention!r}."
        )
    start, usual_eps, inside = _CONVENTIONS[convention]
    start = start if initial_accumulator_value is None else initial_accumulator_value
    eps = usual_eps if eps is None else eps

    def init(params: Any) -> AccumulatorState:
        def accumulator(param: Array) -> jax.Array:
            shape = param.shape[:-1] if per_row else param.shape
            return jnp.full(shape, start, wide_dtype(param.dtype))

        return AccumulatorState(jax.tree.map(accumulator, params))

    def accumulate(grad: jax.Array, sums: jax.Array) -> jax.Array:
        squares = jnp.square(grad.astype(sums.dtype))
        return sums + (_mean_over_row(squares) if per_row else squares)

    def scale(grad: jax.Array, sums: jax.Array) -> jax.Array:
        roots = jax.lax.rsqrt(sums + eps) if inside else 1 / (jnp.sqrt(sums) + eps)
        factors = jnp.where(sums > 0, roots, 0)
        factors = factors[..., None] if per_row and grad.ndim else factors
        return (grad.astype(sums.dtype) * factors).astype(grad.dtype)

    def update(grads: Any, state: AccumulatorState, params: Any = None) -> tuple[Any, Any]:
        del params
        if any(map(is_row_grads, jax.tree.leaves(grads, is_leaf=is_row_grads))):
            raise ValueError("RowGrads need the optimizer wrapped: qrhash.touched_rows(tx).")
        sums = jax.tree.map(accumulate, grads, state.accumulators)
        return jax.tree.map(scale, grads, sums), AccumulatorState(sums)

    return optax.GradientTransformation(init, update)


def _mean_over_row(squares: jax.Array) -> jax.Array:
    return jnp.mean(squares, axis=-1) if squares.ndim else squares
