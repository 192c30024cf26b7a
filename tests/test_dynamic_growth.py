"""Tables that get more rows: every key keeps its row, its vector and its optimizer state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qrhash
from qrhash import dynamic
from qrhash.dynamic import ExactCount, StepsSinceUse
from support.dynamic_training import Training, adagrad, adam, config_of, vectors_of
from support.meshes import make_layout

STANDARD_PROMOTION = True  # optax's Adam multiplies by a power of an integer
UNCHECKED_KEYS = True


@pytest.mark.parametrize("make", [adagrad, adam])
@pytest.mark.usefixtures("keys_used_once")
def test_every_key_keeps_row_vector_and_state(make):
    training = Training(config_of(20, admission=ExactCount(2, 30)), make())
    training.steps(8)
    keys, before, candidates = training.keys, training.of_keys(), training.state.admission
    assert len(keys) == 20
    training.grow(50)
    assert training.keys == keys
    assert training.of_keys() == before
    assert training.params.table.shape == (50, 4)
    same = jax.tree.map(np.array_equal, training.state.admission, candidates)
    assert all(jax.tree.leaves(same))


def test_growth_changes_nothing_but_the_room():
    """A table that grows in time is trained as one that was as long from the start."""
    growing, long = (
        Training(config_of(n, admission=ExactCount(2, 500)), adam()) for n in (30, 200)
    )
    for _ in range(3):
        growing.step()
        long.step()
    growing.grow(200)
    for _ in range(10):
        growing.step()
        long.step()
    assert len(long.keys) > 30
    assert growing.of_keys() == long.of_keys()
    assert growing.keys == long.keys
    for a, b in zip(growing.params.refused, long.params.refused, strict=True):
        np.testing.assert_array_equal(a, b)


def test_new_rows_have_the_state_of_the_start():
    training = Training(config_of(5))
    training.steps(3)
    training.grow(12)
    (accumulators,) = (x for x in jax.tree.leaves(training.opt_state) if x.shape == (12, 4))
    assert (np.asarray(accumulators)[5:] == 0.5).all()
    assert (np.asarray(accumulators)[:5] > 0.5).all()


def test_rows_that_were_free_are_given_before_the_new_ones():
    training = Training(config_of(4, eviction=StepsSinceUse(1)))
    training.step([1, 2, 3])
    training.step([2])
    training.step([2])
    assert training.evict() == 2
    training.grow(6)
    training.step([7, 8, 9, 10, 11])
    assert sorted(training.keys.values()) == list(range(6))
    rows = training.keys
    assert {rows[key] for key in (7, 8, 9)} == {0, 2, 3}


def test_keys_without_room_get_rows_once_there_are_more():
    training = Training(config_of(2))
    training.step([1, 2, 3])
    compressed = vectors_of(training.params, training.state, [3], training.config)
    training.grow(4)
    assert 3 not in training.keys
    np.testing.assert_array_equal(
        vectors_of(training.params, training.state, [3], training.config), compressed
    )
    training.step([3])
    assert training.keys[3] == 2


def test_growth_by_nothing_changes_nothing():
    training = Training(config_of(8))
    training.steps(2)
    before = training.of_keys()
    training.grow(8)
    assert training.of_keys() == before


def test_half_precision_and_counts_of_steps_are_kept():
    config = config_of(6, param_dtype=jnp.bfloat16, refused=None)
    training = Training(config, qrhash.touched_rows(optax.adam(0.1, mu_dtype=jnp.float32)))
    training.steps(2)
    before = training.of_keys()
    dtypes = [x.dtype for x in jax.tree.leaves(training.opt_state)]
    training.grow(9)
    assert training.of_keys() == before
    assert [x.dtype for x in jax.tree.leaves(training.opt_state)] == dtypes
    count = next(x for x in jax.tree.leaves(training.opt_state) if x.shape == ())
    assert int(count) == 2


# --- refusals -------------------------------------------------------------------------------------


def test_fewer_rows_are_refused():
    training = Training(config_of(8))
    with pytest.raises(ValueError, match="capacity must be at least the 8 rows that there are"):
        training.grow(7)


def test_a_mesh_is_refused():
    layout = make_layout((8,), ("model",))
    config = dynamic.DynamicConfig(16, 4, layout=layout)
    single = dynamic.DynamicConfig(16, 4)
    params, state = dynamic.init(jax.random.key(0), single), dynamic.init_state(single)
    with pytest.raises(ValueError, match="grow needs a config without a layout"):
        dynamic.grow(params, state, config, 32)


@pytest.mark.parametrize("shape", [(3, 2), (5, 3), (5,)])
def test_state_grows_for_longer_tables_alone(shape):
    tx, table = adagrad(), jnp.ones((4, 2))
    with pytest.raises(ValueError, match="tables of params with more rows"):
        qrhash.grow_rows(tx, tx.init(table), table, jnp.ones(shape))


def test_state_grows_for_trees_of_one_form():
    tx, params = adagrad(), {"a": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="grown must be a tree as params are"):
        qrhash.grow_rows(tx, tx.init(params), params, {"b": jnp.ones((5, 2))})
