"""A program in JAX's own operations: the same results, and no operation of qrhash in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.extend.core import jaxpr_as_fun

import qrhash
from qrhash.plain import in_plain_operations
from support.cases import assert_close

CONFIG = qrhash.EmbedConfig(qrhash.QuotientRemainder(100), 8, combiner="mean")
TABLES = qrhash.init(jax.random.key(0), CONFIG)


def _vectors(ids):
    return [qrhash.lookup(TABLES, ids, CONFIG)]


def _twice(ids):
    inner = jax.jit(lambda ids: qrhash.lookup(TABLES, ids, CONFIG))
    return [jnp.tanh(inner(ids)), inner(ids + 1)]


def _bags(ids):
    bag = qrhash.Bag.from_padded(ids, padding_id=0)
    return [qrhash.lookup(TABLES, bag, CONFIG)]


@pytest.mark.parametrize("fun", [_vectors, _twice, _bags])
def test_the_same_without_the_operations_of_qrhash(fun, rng):
    ids = rng.integers(0, 90, (6, 4), dtype=np.int32)
    program = in_plain_operations(fun, jax.typeof(jnp.asarray(ids)))
    assert "qrhash" in str(jax.make_jaxpr(fun)(ids))
    assert "qrhash" not in str(program)
    for found, wanted in zip(jaxpr_as_fun(program)(ids), fun(ids), strict=True):
        assert_close(found, wanted)


def test_for_any_number_of_rows(rng):
    (rows,) = export.symbolic_shape("rows")
    program = in_plain_operations(_twice, jax.ShapeDtypeStruct((rows,), jnp.int32))
    assert "qrhash" not in str(program)
    assert [aval.shape for aval in program.out_avals] == [(rows, 8)] * 2
