"""What the compiled steps of the benchmarks consist of: numbers that no busy machine changes.

Times are for `benchmarks/`. Here it is noticed that there is something to be measured: each of the
scenarios of `benchmarks/training_step.py` has as many kernels, and bytes beside the tables, as when
they were counted last, up to a tenth. Whoever changes them, down as well as up, runs the benchmark
against what was there before, and counts anew: half as many kernels have been slower.
"""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import qrhash
from qrhash import CollectionConfig, EmbedConfig, FullTable, QuotientRemainder, collection
from support.cases import OPTIMIZED

pytestmark = pytest.mark.skipif(
    not jax.__version__.startswith("0.10."), reason="counted in the programs of jax 0.10"
)

# Vocabularies as of Criteo's 26 columns, and of as many as anyone has.
SIZES = (*(10_131_227, 8_351_593, 7_046_547, 5_461_306, 2_202_608, 286_181, 142_572, 93_145),)
SIZES += (14_992, 12_517, 5683, 5652, 3194, 2173, 1460, 633, 583, 305, 105, 27, 24, 18, 15, 10, 4)
SIZES += (3,)
BATCH = 2048
# None of these computes anything.
NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


class Counts(NamedTuple):
    """Of a compiled program."""

    kernels: int
    temporary: int  # bytes


@functools.cache
def _counts(name):
    compiled = SCENARIOS[name][0]()
    entry = compiled.as_text().split("ENTRY", 1)[1]
    operations = re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = .*? ([a-z][\w-]*)\(", entry, re.MULTILINE)
    kernels = sum(operation not in NOTHING for operation in operations)
    return Counts(kernels, compiled.memory_analysis().temp_size_in_bytes)


def _step(look_up, large, tx):
    """A training step of tables whose vectors get the cotangent they are given."""

    def loss(tables, ids, cotangent):
        vectors = look_up(tables, ids)
        return jnp.sum(vectors * cotangent), vectors

    def step(tables, state, ids, cotangent):
        (_, vectors), grads = qrhash.value_and_grad(loss, large, has_aux=True)(
            tables, ids, cotangent
        )
        updates, state = tx.update(grads, state, tables)
        return qrhash.apply_updates(tables, updates), state, vectors

    return step


def _compiled(look_up, large, init, tx, ids, vectors):
    tables = jax.eval_shape(init)
    if tx is None:
        return jax.jit(look_up).lower(tables, ids).compile(OPTIMIZED)
    tx = qrhash.touched_rows(tx)
    state = jax.eval_shape(tx.init, tables)
    cotangent = jax.ShapeDtypeStruct(vectors, jnp.float32)
    step = jax.jit(_step(look_up, large, tx), donate_argnums=(0, 1))
    return step.lower(tables, state, ids, cotangent).compile(OPTIMIZED)


def _one(tx, num_embeddings=10_000_000, num_collisions=4):
    config = EmbedConfig(QuotientRemainder(num_embeddings, num_collisions), 64)

    def look_up(tables, ids):
        return qrhash.lookup(tables, ids, config)

    init = lambda: qrhash.init(jax.random.key(0), config)  # noqa: E731
    ids = jax.ShapeDtypeStruct((16384,), jnp.int32)
    return _compiled(look_up, config.large_tables, init, tx, ids, (16384, 64))


def _columns(tx, sizes=SIZES, *, joined=False):
    config = CollectionConfig(
        {
            f"c{n}": EmbedConfig(QuotientRemainder(size, 4) if size > 200 else FullTable(size), 16)
            for n, size in enumerate(sizes)
        }
    )

    def look_up(stacks, ids):
        if joined:
            return collection.lookup_joined(stacks, ids, config)
        of_features = {name: ids[:, number] for number, name in enumerate(config.configs)}
        vectors = collection.lookup(stacks, of_features, config)
        return jnp.concatenate([vectors[name] for name in of_features], axis=1)

    init = lambda: collection.init(jax.random.key(0), config)  # noqa: E731
    ids = jax.ShapeDtypeStruct((BATCH, len(sizes)), jnp.int32)
    return _compiled(look_up, config.large_tables, init, tx, ids, (BATCH, 16 * len(sizes)))


def _bags(tx, columns=4, places=22 * 1024):
    config = CollectionConfig(
        {
            f"c{n}": EmbedConfig(QuotientRemainder(1_000_000, 4), 16, combiner="sum")
            for n in range(columns)
        }
    )

    def look_up(stacks, bags):
        vectors = collection.lookup(stacks, bags, config)
        return jnp.concatenate(list(vectors.values()), axis=1)

    init = lambda: collection.init(jax.random.key(0), config)  # noqa: E731
    ids = jax.ShapeDtypeStruct((places,), jnp.int32)
    bags = {name: qrhash.Bag(ids, ids, shape=(BATCH,)) for name in config.configs}
    return _compiled(look_up, config.large_tables, init, tx, bags, (BATCH, 16 * columns))


ADAGRAD, ROW_WISE = optax.adagrad(0.05), qrhash.rowwise_adagrad(0.05)
SCENARIOS = {
    "one": (lambda: _one(ADAGRAD), Counts(42, 16_908_592)),
    "one, row-wise": (lambda: _one(ROW_WISE), Counts(46, 13_239_664)),
    "one, looked up": (lambda: _one(None), Counts(1, 0)),
    "square": (lambda: _one(ADAGRAD, 10**8, 10**4), Counts(19, 16_281_600)),
    "criteo": (lambda: _columns(ADAGRAD), Counts(105, 16_960_880)),
    "criteo, row-wise": (lambda: _columns(ROW_WISE), Counts(107, 16_960_880)),
    "criteo, looked up": (lambda: _columns(None), Counts(54, 8_486_912)),
    "criteo, joined": (lambda: _columns(ADAGRAD, joined=True), Counts(69, 14_880_112)),
    "criteo, joined, looked up": (lambda: _columns(None, joined=True), Counts(26, 507_904)),
    "104 columns": (
        lambda: _columns(ADAGRAD, sorted(4 * SIZES, reverse=True)),
        Counts(435, 72_102_256),
    ),
    # The rows and their gradients, which are of 64 bytes for each of the ids, have the same memory.
    "bags": (lambda: _bags(ADAGRAD), Counts(74, 11_405_304)),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_step_is_the_program_that_was_measured(name):
    counted, found = SCENARIOS[name][1], _counts(name)
    assert found == pytest.approx(counted, rel=0.1), f"{name}: {found}, measure it"


def test_the_program_grows_with_the_columns_and_no_faster():
    few, many = map(_counts, ("criteo", "104 columns"))
    assert many.kernels <= 4.2 * few.kernels
    assert many.temporary <= 4.4 * few.temporary
