"""Tables of bfloat16 that learn from updates smaller than their grid.

A number of bfloat16 has 8 bits: 1.0 plus anything below 0.002 is 1.0 again. Late in a training most
updates are that small, and none of them is felt. Rounded up or down by chance, in proportion to
what is nearer, they are felt on the average: the error of every step has the mean 0. Or what was
rounded off is kept, and added to the next update: then there is no error that grows, for two more
bytes. The former is for large tables; the latter for small ones, whose rows are met in every step,
and gather the noise of chance fastest.

Source: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision"; for embedding tables
Zhang et al. 2018, "Training with Low-Precision Embedding Tables". Kahan 1965, "Further remarks on
reducing truncation errors"; for training Zamirai et al. 2020, "Revisiting BFloat16 Training".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qrhash.keys import check_seed
from qrhash.words import mixed

_BELOW = 0xFFFF  # the bits of a float32 that a bfloat16 has not


class RoundingState(NamedTuple):
    """State of stochastic rounding.

    Attributes:
      count: how many steps were rounded, int32 [].
    """

    count: Any


def stochastic_rounding(seed: int = 0) -> optax.GradientTransformation:
    """Rounds what parameters of bfloat16 become, up or down by chance; others it leaves alone.

    It belongs behind all others, and inside of `touched_rows`:

        tx = touched_rows(optax.chain(qrhash.adagrad(0.05), qrhash.stochastic_rounding()))

    The sum of parameter and update is rounded to one of its two neighbours in bfloat16, to each
    with the probability of its nearness, and the update becomes what leads there. By chance means
    by a hash of the sum, its column and the number of the step: no random key is needed, and the
    same step gives the same numbers again, on one device or many. Rows that are equal in all and
    learn the same are rounded alike.

    Args:
      seed: another one, other roundings; an integer in [0, 2**32).

    Returns:
      An optax transformation that needs the parameters. Its updates, added to parameters, give the
      numbers rounded to: exactly wherever the update is at most half of the parameter, and else
      within one place of the last bit.

    Raises:
      ValueError: a seed that is none. By `update`: there are no parameters.

    >>> tx = optax.chain(optax.sgd(1.0), stochastic_rounding())
    >>> table, gradients = jnp.ones(10_000, jnp.bfloat16), jnp.full(10_000, -0.001)
    >>> updates, state = tx.update(gradients, tx.init(table), table)
    >>> new = optax.apply_updates(table, updates)
    >>> sorted(set(new.tolist())), round(float(new.astype(jnp.float32).mean()), 3)
    ([1.0, 1.0078125], 1.001)
    """
    seed = check_seed(seed)

    def init(params: Any) -> RoundingState:
        del params
        return RoundingState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: RoundingState, params: Any = None) -> tuple[Any, RoundingState]:
        if params is None:
            raise ValueError(
                "stochastic_rounding needs the parameters: update(grads, state, params)."
            )
        salt = mixed(state.count.astype(jnp.uint32) + jnp.uint32(seed))
        rounded = jax.tree.map(lambda u, p: _rounded(u, p, salt), updates, params)
        return rounded, RoundingState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


class CompensationState(NamedTuple):
    """State of compensated rounding.

    Attributes:
      lost: what was rounded off each parameter so far, of its shape and dtype; of those that are
        not of bfloat16 nothing, [].
    """

    lost: Any


def compensated_rounding() -> optax.GradientTransformation:
    """Keeps what is rounded off parameters of bfloat16, and adds it to the next update.

    It belongs behind all others, as `stochastic_rounding`, in whose place it is more exact and
    takes as much memory again as the parameters. Both, by the kind of the table:

        of_tables = {
            "large": optax.chain(qrhash.adagrad(0.05), qrhash.stochastic_rounding()),
            "small": optax.chain(qrhash.adagrad(0.05), qrhash.compensated_rounding()),
        }
        tx = touched_rows(optax.partition(of_tables, labels))

    Returns:
      An optax transformation that needs the parameters. Parameters and what is kept of them add up
      to what they would be with 16 bits.

    Raises:
      ValueError: by `update`: there are no parameters.

    >>> tx = optax.chain(optax.sgd(1.0), compensated_rounding())
    >>> table = jnp.ones(2, jnp.bfloat16)
    >>> state = tx.init(table)
    >>> for _ in range(10):
    ...     updates, state = tx.update(jnp.full(2, -0.001), state, table)
    ...     table = optax.apply_updates(table, updates)
    >>> table.tolist()
    [1.0078125, 1.0078125]
    """

    def init(params: Any) -> CompensationState:
        return CompensationState(
            jax.tree.map(
                lambda p: jnp.zeros(p.shape if p.dtype == jnp.bfloat16 else (), p.dtype), params
            )
        )

    def update(
        updates: Any, state: CompensationState, params: Any = None
    ) -> tuple[Any, CompensationState]:
        if params is None:
            raise ValueError(
                "compensated_rounding needs the parameters: update(grads, state, params)."
            )
        leaves, tree = jax.tree.flatten(updates)
        others = map(jax.tree.leaves, (state.lost, params))
        pairs = [_compensated(*each) for each in zip(leaves, *others, strict=True)]
        rounded, lost = (jax.tree.unflatten(tree, each) for each in zip(*pairs, strict=True))
        return rounded, CompensationState(lost)

    return optax.GradientTransformation(init, update)


def _compensated(update: Any, lost: Any, param: Any) -> tuple[Any, Any]:
    """The update that leads to the nearest number, and what that lacks."""
    if jnp.dtype(param.dtype) != jnp.bfloat16:
        return update, lost
    old = param.astype(jnp.float32)
    total = old + (lost.astype(jnp.float32) + update.astype(jnp.float32))
    step = (total.astype(param.dtype).astype(jnp.float32) - old).astype(param.dtype)
    # Not what it was to become: of the two, the step may be rounded as well.
    new = (param + step).astype(jnp.float32)
    left = jnp.where(jnp.isfinite(total), total - new, 0)
    return step, left.astype(param.dtype)


def _rounded(update: Any, param: Any, salt: jax.Array) -> Any:
    """The update that leads to the number rounded to."""
    if jnp.dtype(param.dtype) != jnp.bfloat16:
        return update
    old = param.astype(jnp.float32)
    total = old + update.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(total, jnp.uint32)
    # Of a row each entry has a salt of its own; a number is one entry.
    column = mixed(jnp.arange(total.shape[-1], dtype=jnp.uint32) + salt) if total.ndim else salt
    salts = jnp.broadcast_to(column, total.shape)
    chance = mixed(bits ^ salts) & jnp.uint32(_BELOW)
    # What has no bits below stays as it is; what is beyond all numbers as well.
    up = (bits + chance) & jnp.uint32(_BELOW << 16)
    new = jnp.where(jnp.isfinite(total), jax.lax.bitcast_convert_type(up, jnp.float32), total)
    return (new - old).astype(param.dtype)
