"""Ranks of the places where a mask holds, against counting them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export

from qrhash.rows import ranks


def counted(mask: np.ndarray) -> list[int]:
    """How many places before each hold, one by one."""
    return [int(sum(mask[:place])) for place in range(len(mask))]


@given(st.lists(st.booleans(), max_size=100))
def test_as_counted(mask: list[bool]) -> None:
    found = ranks(jnp.asarray(mask, bool))
    assert found.dtype == jnp.int32
    assert found.tolist() == counted(np.asarray(mask, bool))


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000, 4096])
@pytest.mark.parametrize("chance", [0.0, 0.1, 1.0])
def test_of_many(size: int, chance: float) -> None:
    mask = np.random.default_rng(size).random(size) < chance
    np.testing.assert_array_equal(jax.jit(ranks)(mask), np.cumsum(mask) - mask)


def test_of_any_number() -> None:
    (size,) = export.symbolic_shape("n")
    of_any = export.export(jax.jit(ranks))(jax.ShapeDtypeStruct((size,), bool))
    for n in (1, 40):
        mask = np.arange(n) % 3 == 0
        assert of_any.call(mask).tolist() == counted(mask)
