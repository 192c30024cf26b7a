"""Rounding of bfloat16: on its grid, without a bias, alike for rows and whole tables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qrhash
from qrhash import (
    RowGrads,
    apply_updates,
    compensated_rounding,
    stochastic_rounding,
    touched_rows,
)
from support.cases import assert_close

UNCHECKED_KEYS = True


def _neighbours(x):
    """The numbers of bfloat16 below and above, by NumPy's own bits; equal where x is one."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    below = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    above = (
        np.where(bits & np.uint32(0xFFFF), bits + np.uint32(0x10000), bits) & np.uint32(0xFFFF0000)
    ).view(np.float32)
    return below, above


def _rounded(table, update, seed=0, steps=1):
    tx = stochastic_rounding(seed)
    state = tx.init(table)
    for _ in range(steps):
        updates, state = tx.update(update, state, table)
    return np.asarray(optax.apply_updates(table, updates), np.float32)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e20])
def test_a_sum_becomes_one_of_its_neighbours_by_nearness(scale, rng):
    table = jnp.asarray(rng.normal(size=(4000, 16)) * scale, jnp.bfloat16)
    update = rng.normal(size=table.shape).astype(np.float32) * np.float32(scale * 1e-3)
    total = np.asarray(table, np.float32) + update
    new = _rounded(table, jnp.asarray(update))
    below, above = _neighbours(total)
    is_near = (new == below) | (new == above)
    assert is_near[2 * np.abs(update) <= np.abs(table.astype(jnp.float32))].all()
    assert is_near.mean() > 0.999
    # Of those between two, the share that goes up is how near the upper one is, on the average.
    between = below != above
    nearness = ((total - below) / np.where(between, above - below, 1))[between]
    up = (new == above)[between]
    spread = 4 * np.sqrt((nearness * (1 - nearness)).sum()) / up.size
    assert abs(up.mean() - nearness.mean()) < spread
    # And in each tenth of the nearness.
    for tenth in range(10):
        some = (nearness * 10).astype(int) == tenth
        if some.sum() > 500:
            assert abs(up[some].mean() - nearness[some].mean()) < 4 * 0.5 / np.sqrt(some.sum())


def test_many_small_updates_are_felt_that_rounding_to_the_nearest_loses():
    table, update = jnp.ones(1024, jnp.bfloat16), jnp.full(1024, -1e-4, jnp.bfloat16)
    plain, tx = table, stochastic_rounding()
    state = tx.init(table)

    @jax.jit
    def step(table, state):
        updates, state = tx.update(update, state, table)
        return optax.apply_updates(table, updates), state

    for _ in range(200):
        plain = optax.apply_updates(plain, update)
        table, state = step(table, state)
    assert (plain == 1).all()
    assert_close(np.asarray(table, np.float32).mean(), 0.98, 2e-3)


def test_steps_columns_and_seeds_differ_and_a_step_repeats():
    table, update = jnp.ones((1, 4000), jnp.bfloat16), jnp.full((1, 4000), 0.004, jnp.float32)
    first = _rounded(table, update)
    np.testing.assert_array_equal(first, _rounded(table, update))
    for other in (_rounded(table, update, seed=1), _rounded(table, update, steps=2)):
        assert 0.4 < (other != first).mean() < 0.6
    assert 0.4 < (first == 1).mean() < 0.6


def test_other_dtypes_and_what_is_no_number_are_left_alone():
    tx = stochastic_rounding()
    params = {"a": jnp.ones(3), "b": jnp.asarray([1.0, jnp.inf, jnp.nan], jnp.bfloat16)}
    params["c"] = jnp.asarray(1.0, jnp.bfloat16)
    updates = {"a": jnp.full(3, 0.1), "b": jnp.zeros(3), "c": jnp.asarray(0.5)}
    new, _ = tx.update(updates, tx.init(params), params)
    assert new["a"] is updates["a"]
    found = optax.apply_updates(params, new)
    np.testing.assert_array_equal(np.asarray(found["b"], np.float32), [1, np.nan, np.nan])
    assert float(found["c"]) == 1.5
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(updates, tx.init(params))
    with pytest.raises(ValueError, match="seed must be"):
        stochastic_rounding(-1)


@pytest.mark.parametrize("touched", [7, 5000], ids=["at once", "in blocks"])
def test_rows_are_rounded_as_whole_tables_are(touched, rng):
    """Inside of touched_rows, on the grid, and other rows to the last bit as they were."""
    tx = touched_rows(optax.chain(qrhash.adagrad(0.01), stochastic_rounding(3)))
    table = jnp.asarray(rng.normal(size=(6000, 4)), jnp.bfloat16)
    indices = rng.permutation(6000)[:touched]
    values = jnp.asarray(rng.normal(size=(touched, 4)), jnp.bfloat16)
    grads = RowGrads(jnp.asarray(indices, jnp.int32), values, num_rows=6000)

    @jax.jit
    def step(grads, table):
        updates, _ = tx.update(grads, tx.init(table), table)
        return apply_updates(table, updates)

    new = np.asarray(step(grads, table), np.float32)
    dense = jnp.zeros_like(table).at[indices].set(values)
    wanted = np.asarray(step(dense, table), np.float32)
    others = np.setdiff1d(np.arange(6000), indices)
    np.testing.assert_array_equal(new[others], np.asarray(table, np.float32)[others])
    # But where the sum of squares was rounded another way.
    assert (new == wanted).mean() > 0.999


# --- compensated ----------------------------------------------------------------------------------


def test_what_is_rounded_off_is_felt_later(rng):
    """Beside sums of float64: off by the grid, however many updates there were."""
    tx = compensated_rounding()
    table = jnp.asarray(rng.normal(size=(40, 4)), jnp.bfloat16)
    state, exact, plain = tx.init(table), np.asarray(table, np.float64), table
    step = jax.jit(tx.update)
    for _ in range(300):
        update = np.abs(rng.normal(size=table.shape)).astype(np.float32) * 1e-3
        updates, state = step(jnp.asarray(update), state, table)
        table = optax.apply_updates(table, updates)
        plain = optax.apply_updates(plain, jnp.asarray(update, jnp.bfloat16))
        exact += update
    assert table.dtype == state.lost.dtype == jnp.bfloat16
    # Half a place of the last of 8 bits, and of 16 bits for each of the steps.
    grid = 2.0**-8 * np.maximum(np.abs(exact), 2.0**-8)
    assert (np.abs(np.asarray(table, np.float64) - exact) <= grid).all()
    both = np.asarray(table, np.float64) + np.asarray(state.lost, np.float64)
    assert (np.abs(both - exact) <= 300 * grid * 2.0**-8).all()
    assert np.abs(np.asarray(plain, np.float64) - exact).max() > 10 * grid.max()


def test_large_steps_and_small_numbers_lose_nothing():
    tx = compensated_rounding()
    for start, steps in ((1e-3, [1.0, -1.0]), (257.0, [-256.999, 0.001]), (0.0, [1e-30, 1.0])):
        table = jnp.full((1, 1), start, jnp.bfloat16)
        state, exact = tx.init(table), float(table[0, 0])
        for each in steps:
            updates, state = tx.update(jnp.full((1, 1), each), state, table)
            table = optax.apply_updates(table, updates)
            exact += float(np.float32(each))
        both = float(table[0, 0]) + float(state.lost[0, 0])
        assert both == pytest.approx(exact, abs=2.0**-15 * max(map(abs, (start, *steps))))


def test_others_are_left_alone_and_parameters_needed():
    tx = compensated_rounding()
    table, update = jnp.ones((3, 2)), jnp.full((3, 2), 1e-9)
    updates, state = tx.update({"a": update}, tx.init({"a": table}), {"a": table})
    assert updates["a"] is update
    assert state.lost["a"].shape == ()
    with pytest.raises(ValueError, match="compensated_rounding needs the parameters"):
        tx.update(update, tx.init(table))
    table = jnp.array([[jnp.inf, 1.0]], jnp.bfloat16)
    updates, state = tx.update(jnp.zeros((1, 2)), tx.init(table), table)
    assert np.isfinite(np.asarray(state.lost, np.float32)).all()


def test_compensated_by_rows_is_as_whole_tables(rng):
    tx = touched_rows(optax.chain(qrhash.adagrad(0.01), compensated_rounding()))
    start = jnp.asarray(rng.normal(size=(600, 4)), jnp.bfloat16)
    ends = []
    for by_rows in (True, False):
        table, state = start, tx.init(start)
        draws = np.random.default_rng(1)
        for _ in range(5):
            indices = draws.permutation(600)[:50]
            values = jnp.asarray(draws.normal(size=(50, 4)), jnp.bfloat16)
            grads = RowGrads(jnp.asarray(indices, jnp.int32), values, num_rows=600)
            if not by_rows:
                grads = jnp.zeros_like(start).at[indices].set(values)
            updates, state = jax.jit(tx.update)(grads, state, table)
            table = jax.jit(apply_updates)(table, updates)
        ends.append(np.asarray(table, np.float32))
    np.testing.assert_allclose(*ends, rtol=2.0**-7)
    assert (ends[0] == ends[1]).mean() > 0.99
