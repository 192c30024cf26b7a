"""The generator in one pass against JAX's own: every bit is the same."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qrhash
from qrhash.threefry import fold_in, unrolled


def _of_rbg(seed: int) -> Any:
    return jax.random.key(seed, impl="rbg")


DRAWS = {
    "bits": jax.random.bits,
    "uniform": jax.random.uniform,
    "normal": jax.random.normal,
    "truncated": lambda key, shape: jax.random.truncated_normal(key, -2, 2, shape),
    "randint": lambda key, shape: jax.random.randint(key, shape, -128, 129),
    "bernoulli": lambda key, shape: jax.random.bernoulli(key, 0.3, shape),
    "bytes": lambda key, shape: jax.random.bits(key, shape, jnp.uint8),
    "half": lambda key, shape: jax.random.uniform(key, shape, jnp.bfloat16),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5, 7), (3, 1, 129)])
def test_draws(name: str, shape: tuple[int, ...]) -> None:
    for seed in (0, 1, 2**31 - 1):
        key = jax.random.key(seed)
        wanted, found = DRAWS[name](key, shape), DRAWS[name](unrolled(key), shape)
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


@given(
    seed=st.integers(0, 2**32 - 1),
    folded=st.lists(st.integers(0, 2**32 - 1), max_size=3),
    parts=st.integers(1, 4),
)
def test_derived_keys(seed: int, folded: list[int], parts: int) -> None:
    key = jax.random.key(jnp.uint32(seed))
    other = unrolled(key)
    for number in folded:
        key = jax.random.fold_in(key, jnp.uint32(number))
        other = jax.random.fold_in(other, jnp.uint32(number))
    keys, others = jax.random.split(key, parts), jax.random.split(other, parts)
    np.testing.assert_array_equal(jax.random.key_data(others), jax.random.key_data(keys))


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey, _of_rbg])
def test_folded_keys_are_of_the_kind_given(make: Callable[[int], Any]) -> None:
    wanted, found = jax.random.fold_in(make(3), 17), fold_in(make(3), 17)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(jax.random.key_data(found), jax.random.key_data(wanted))


def _poisson(key: Any, shape: Any, dtype: Any) -> jax.Array:
    return jax.random.poisson(key, 4, shape).astype(dtype)


def _of_words(key: Any, shape: Any, dtype: Any) -> jax.Array:
    return jnp.full(shape, key[0] % 100 + key[1] % 100).astype(dtype)


@pytest.mark.parametrize("is_per_row", [False, True])
def test_initializers_of_others_get_their_own_kind_of_key(is_per_row: bool) -> None:
    for initializer, key in ((_poisson, jax.random.key(0)), (_of_words, jax.random.PRNGKey(0))):
        given_one = qrhash.initializers.per_row(initializer) if is_per_row else initializer
        config = qrhash.EmbedConfig(qrhash.FullTable(50), 4, embedding_init=given_one)
        (table,) = qrhash.init(key, config)
        assert table.shape == (50, 4)
        assert table.any()


def test_a_draw_for_each_number() -> None:
    def draw(key: Any, number: jax.Array) -> jax.Array:
        first, second = jax.random.split(jax.random.fold_in(key, number))
        of_first: jax.Array = jax.random.uniform(first, (6,))
        return jnp.concatenate([of_first, jax.random.normal(second, (3,))])

    of_all = jax.jit(jax.vmap(draw, in_axes=(None, 0)))
    key, numbers = jax.random.key(3), jnp.arange(1000)
    np.testing.assert_array_equal(of_all(unrolled(key), numbers), of_all(key, numbers))


def test_wide_bits() -> None:
    with jax.enable_x64(True):
        for shape in ((), (4, 5)):
            key = jax.random.key(2**40 + 5)
            wanted = jax.random.uniform(key, shape, jnp.float64)
            np.testing.assert_array_equal(
                jax.random.uniform(unrolled(key), shape, jnp.float64), wanted
            )


def test_raw_keys() -> None:
    key = jax.random.PRNGKey(7)
    np.testing.assert_array_equal(
        jax.random.uniform(unrolled(key), (8,)), jax.random.uniform(key, (8,))
    )


def test_other_generators_are_kept() -> None:
    key = jax.random.key(0, impl="rbg")
    assert unrolled(key) is key
    assert unrolled(unrolled(jax.random.key(0))).dtype == unrolled(jax.random.key(0)).dtype
    with jax.threefry_partitionable(False):
        key = jax.random.key(0)
        assert unrolled(key) is key


def test_no_loop_is_left() -> None:
    def rows(key: Any) -> Any:
        return jax.random.uniform(unrolled(key), (1000,))

    assert " while" not in jax.jit(rows).lower(jax.random.key(0)).compile().as_text()
