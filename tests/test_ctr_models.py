"""DLRM and DCN-v2 against NumPy loops, and the compiled step."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from qrhash import EmbedConfig, FullTable, KeyDigits, Keys, QuotientRemainder
from qrhash.ctr.data.pipeline import Batch
from qrhash.ctr.model.models import DCN, DLRM, build_model
from qrhash.ctr.run.learner import Learner
from qrhash.ctr.settings import Settings
from qrhash.nnx import Table

CONFIGS = {
    "C1": EmbedConfig(FullTable(9), 4),
    "C2": EmbedConfig(QuotientRemainder(20, 4), 4, large_table_rows=5),
}
STANDARD_PROMOTION = True  # optax.adam needs it

SETTINGS = Settings(features=4, bottom_mlp="8", top_mlp="8-6", deep_mlp="8-6", cross_layers=2)


def _batch(rng, rows=16, padding=0):
    return Batch(
        labels=rng.integers(0, 2, rows).astype(np.float32),
        weights=np.array([1] * (rows - padding) + [0] * padding, np.float32),
        numbers=rng.normal(size=(rows, 13)).astype(np.float32),
        ids=rng.integers(0, 9, (rows, 2)).astype(np.int32),
        keys=Keys.of(np.zeros((rows, 0), np.uint64)),
    )


def _model(name, configs, rng, num_numbers=13):
    """A model of random parameters, without the time that compiling its initialisers takes."""
    settings = dataclasses.replace(SETTINGS, model=name)
    graph, state = nnx.split(nnx.eval_shape(lambda: build_model(settings, configs, num_numbers)))
    return nnx.merge(
        graph,
        jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype), state),
    )


def _linear(layer, x):
    return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


def _mlp(mlp, x):
    for layer in mlp.layers:
        x = np.maximum(_linear(layer, x), 0)
    return x


def _vectors(model, ids):
    tables = model.embeddings.columns.tables
    (table,), (quotient, remainder) = tables["C1"], tables["C2"]
    table, quotient, remainder = map(np.asarray, (table, quotient, remainder))
    return [table[ids[0]], quotient[ids[1] // 4] * remainder[ids[1] % 4]]


def _dlrm_row(model, numbers, ids):
    dense = _mlp(model.bottom, numbers)
    vectors = [dense, *_vectors(model, ids)]
    pairs = [vectors[i] @ vectors[j] for i in range(3) for j in range(i + 1, 3)]
    return _linear(model.logit, _mlp(model.top, np.concatenate([dense, pairs])))[0]


def _dlrm_row_of_vectors(model, _, ids):
    vectors = _vectors(model, ids)
    inputs = np.concatenate([*vectors, [vectors[0] @ vectors[1]]])
    return _linear(model.logit, _mlp(model.top, inputs))[0]


def _dcn_row(model, numbers, ids):
    x0 = x = np.concatenate([numbers, *_vectors(model, ids)])
    for layer in model.cross:
        x = x0 * _linear(layer, x) + x
    return _linear(model.logit, np.concatenate([x, _mlp(model.deep, x0)]))[0]


@pytest.mark.parametrize(
    ("name", "kind", "oracle"), [("dlrm", DLRM, _dlrm_row), ("dcn", DCN, _dcn_row)]
)
def test_models_equal_their_definition(name, kind, oracle, rng):
    model = _model(name, CONFIGS, rng)
    assert isinstance(model, kind)
    batch = _batch(rng)
    got = model(batch.numbers, batch.ids)
    wanted = [oracle(model, *row) for row in zip(batch.numbers, batch.ids, strict=True)]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "oracle"), [("dlrm", _dlrm_row_of_vectors), ("dcn", _dcn_row)])
def test_models_without_numbers_take_the_vectors_alone(name, oracle, rng):
    model = _model(name, CONFIGS, rng, num_numbers=0)
    assert not hasattr(model, "bottom")
    batch = _batch(rng)
    none = np.zeros((16, 0), np.float32)
    wanted = [oracle(model, *row) for row in zip(none, batch.ids, strict=True)]
    np.testing.assert_allclose(model(none, batch.ids), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dlrm", "dcn"])
def test_a_column_of_keys_stands_among_those_of_ids(name, rng):
    """In the order of the columns, whichever of them have ids."""
    digits = EmbedConfig(KeyDigits(6, 2), 4)
    model = _model(name, {"C1": CONFIGS["C1"], "K": digits, "C2": CONFIGS["C2"]}, rng)
    batch = _batch(rng)
    keys = Keys.of(rng.integers(-(2**63), 2**63, (16, 1)))
    found = model.embeddings(batch.ids, keys)
    one, other = (np.asarray(table) for table in model.embeddings.columns.tables["K"])
    rows = digits.partition.indices(keys[:, 0])
    np.testing.assert_allclose(found[1], one[rows[0]] * other[rows[1]], rtol=1e-6)
    wanted = [_vectors(model, ids)[1] for ids in batch.ids]
    np.testing.assert_allclose(found[2], wanted, rtol=1e-6)
    with pytest.raises(ValueError, match=r"keys must have shape \[batch, 1\], of the columns K"):
        model(batch.numbers, batch.ids)


@pytest.mark.parametrize("name", ["dlrm", "dcn"])
def test_a_model_without_embeddings(name, rng):
    model = _model(name, {}, rng)
    assert model(np.ones((3, 13), np.float32), np.zeros((3, 0), np.int32)).shape == (3,)


@pytest.mark.parametrize("dense_updates", [False, True])
def test_tables_learn_by_adagrad_and_the_rest_by_adam(dense_updates, rng):
    """A step on a padded batch is a step of each optimizer on its own, on the real rows."""
    settings = dataclasses.replace(SETTINGS, dense_updates=dense_updates)
    learner = Learner(lambda: build_model(settings, CONFIGS, 13), settings, num_steps=60)
    start = jax.tree.map(np.array, learner.params)
    padded = _batch(rng, padding=5)
    batch = jax.tree.map(lambda column: column[:11], padded)
    graph = nnx.split(nnx.eval_shape(lambda: build_model(SETTINGS, CONFIGS, 13)), Table, ...)[0]
    optimizers = {
        "tables": optax.adagrad(
            SETTINGS.table_lr, initial_accumulator_value=SETTINGS.table_accumulator
        ),
        "dense": optax.adam(optax.linear_schedule(SETTINGS.dense_lr, 0, 60)),
    }

    def loss(params):
        logits = nnx.merge(graph, params["tables"], params["dense"])(batch.numbers, batch.ids)
        return optax.sigmoid_binary_cross_entropy(logits, batch.labels).mean()

    @jax.jit
    def one_step(params):
        gradients, moved = jax.grad(loss)(params), {}
        for group, optimizer in optimizers.items():
            state = optimizer.init(params[group])
            updates, _ = optimizer.update(gradients[group], state, params[group])
            moved[group] = optax.apply_updates(params[group], updates)
        return moved

    wanted = one_step(start)
    learner.step(padded)
    for group in optimizers:
        got = jax.tree.leaves(learner.params[group])
        for a, b in zip(got, jax.tree.leaves(wanted[group]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        moved = [
            float(abs(a - b).max()) for a, b in zip(got, jax.tree.leaves(start[group]), strict=True)
        ]
        assert min(moved) > 0
    assert learner.num_params == sum(leaf.size for leaf in jax.tree.leaves(start))


def test_it_learns_and_compiles_once(rng):
    settings = dataclasses.replace(SETTINGS, dense_lr=0.01)
    learner = Learner(lambda: build_model(settings, CONFIGS, 13), settings, num_steps=60)
    batch = _batch(rng)
    before = np.asarray(learner.logits(batch))
    for padding in (0, 3) * 30:
        learner.step(batch._replace(weights=_batch(rng, padding=padding).weights))
    after = np.asarray(learner.logits(batch))
    sign = 2 * batch.labels - 1
    assert (sign * after).mean() > (sign * before).mean() + 0.5
    assert learner._step._cache_size() == 1


@pytest.mark.parametrize("shape", [(8,), (8, 3), (8, 2, 1)])
def test_ids_of_another_shape_are_refused(shape, rng):
    model = _model("dlrm", CONFIGS, rng)
    with pytest.raises(
        ValueError, match=r"ids must have shape \[batch, 2\], of the columns C1, C2"
    ):
        model(np.zeros((8, 13), np.float32), np.zeros(shape, np.int32))
