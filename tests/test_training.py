"""Whole training loops: the numbers of dense training, in place, from one compilation."""

import collections
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import qrhash
from qrhash import CollectionConfig, EmbedConfig, RowGrads, collection
from support import oracle
from support.cases import (
    FAMILIES,
    FEATURES,
    OPERATIONS,
    OPTIMIZED,
    assert_close,
    merging_by,
    parameters,
)

UNCHECKED_KEYS = True

per_operation = pytest.mark.parametrize("operation", OPERATIONS)


def _step(value_and_grad, tx, apply_updates):
    """(params, state, *batch) -> (params, state, value)."""

    def step(params, state, *batch):
        value, grads = value_and_grad(params, *batch)
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state, value

    return step


def _by_rows(loss, by_rows, tx):
    tx = qrhash.touched_rows(tx)
    return _step(qrhash.value_and_grad(loss, by_rows), tx, qrhash.apply_updates)


def _densely(loss, tx):
    return _step(jax.value_and_grad(loss), tx, optax.apply_updates)


def _train(step, params, state, batches):
    """Parameters, state and the losses; of one compilation, whatever the batches hold."""
    step, values = jax.jit(step), []
    for batch in batches:
        params, state, value = step(params, state, *batch)
        values.append(value)
    assert step._cache_size() == 1
    return params, state, jnp.stack(values)


# --- one feature ----------------------------------------------------------------------------------


def _masked_loss(cfg):
    """Squares, of several look-ups in the same tables; ids beyond the vocabulary are padding."""

    def loss(params, ids, targets):
        total, count = 0.0, 1
        for some, target in zip(ids, targets, strict=True):
            vectors = qrhash.lookup(params[0], some, cfg, params[1])
            good = ((some >= 0) & (some < cfg.num_embeddings))[..., None]
            total += (jnp.where(good, vectors - target, 0) ** 2).sum()
            count += some.size
        return total / count

    return loss


def _batches(cfg, shapes, rng, steps=50):
    """Ids with duplicates and padding, and targets, of one look-up for each shape."""
    low, high = -1, cfg.num_embeddings + 1
    for _ in range(steps):
        ids = [jnp.asarray(rng.integers(low, high, shape), jnp.int32) for shape in shapes]
        draw = (rng.standard_normal((*shape, FEATURES)) for shape in shapes)
        yield ids, [jnp.asarray(target, jnp.float32) for target in draw]


def _assert_trains_as_dense(cfg, shapes, tx, rng):
    params, loss = parameters(cfg, rng), _masked_loss(cfg)
    batches = list(_batches(cfg, shapes, rng))
    want = _train(_densely(loss, tx), params, tx.init(params), batches)
    step = _by_rows(loss, (cfg.large_tables, False), tx)
    got = _train(step, params, tx.init(params), batches)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(assert_close, got, want)
    if any(map(math.prod, shapes)):
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), got[0], params)
        assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    ("family", "policy", "merge_method"),
    [
        ("quotient-remainder", "nan", "hash"),
        ("mixed radix", "zero", "sort"),
    ],
)
@per_operation
def test_adagrad_trains_to_the_parameters_of_dense_adagrad(
    operation, family, policy, merge_method, rng
):
    """The tables are looked up twice in a pass; small ones are dense in both."""
    cfg = EmbedConfig(FAMILIES[family], FEATURES, operation, id_policy=policy, large_table_rows=3)
    shapes = [(6,), (2, 3)]
    with merging_by(merge_method):
        _assert_trains_as_dense(cfg, shapes, optax.adagrad(0.1), rng)


@pytest.mark.parametrize("shapes", [[()], [(1,)], [(0,)], [(0,), (1,)]], ids=str)
@pytest.mark.parametrize("operation", ["mult", "project"])
def test_batches_of_one_row_and_of_none(operation, shapes, rng):
    cfg = EmbedConfig(FAMILIES["mixed radix"], FEATURES, operation, large_table_rows=1)
    _assert_trains_as_dense(cfg, shapes, optax.adagrad(0.1), rng)


CHAIN = optax.chain(
    optax.clip_by_global_norm(0.5), optax.adagrad(lambda count: 0.2 / (1 + 0.1 * count))
)


@pytest.mark.parametrize("tx", [optax.sgd(0.02), qrhash.rowwise_adagrad(0.1), CHAIN])
def test_other_optimizers_train_to_the_parameters_of_dense_ones(tx, rng):
    cfg = EmbedConfig(FAMILIES["mixed radix"], FEATURES, "project", large_table_rows=3)
    with jax.numpy_dtype_promotion("standard"):  # for schedules
        _assert_trains_as_dense(cfg, [(6,), (2, 3)], tx, rng)


def _scaled(grads):
    """By a conditional over all gradients at once."""
    scale = lambda grads: jax.tree.map(lambda g: -0.01 * g, grads)  # noqa: E731
    return jax.lax.cond(jnp.array(True), scale, lambda grads: grads, grads)


ROW_WISE = {
    "adagrad": (optax.adagrad(0.1), True),
    "row-wise adagrad": (qrhash.rowwise_adagrad(0.1), True),
    "adam": (optax.adam(0.01), True),
    "a schedule and decay": (
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(lambda n: 0.1 / (1 + n))),
        True,
    ),
    "clipped rows": (optax.chain(optax.clip(0.1), optax.sgd(0.1)), True),
    "clipped by the norm of all": (CHAIN, False),
    "a conditional of several results": (optax.stateless(lambda grads, _: _scaled(grads)), False),
    "normalised by all rows": (optax.chain(optax.scale_by_trust_ratio(), optax.sgd(0.1)), False),
}


@pytest.mark.parametrize(("tx", "is_row_wise"), ROW_WISE.values(), ids=ROW_WISE)
@pytest.mark.usefixtures("_blocks")
def test_many_rows_are_updated_in_blocks_to_the_same_numbers(tx, is_row_wise, rng, monkeypatch):
    """Of two tables, with a projection beside them; a batch is no multiple of a block."""
    cfg = EmbedConfig(FAMILIES["mixed radix"], FEATURES, "project", large_table_rows=3)
    params, loss = parameters(cfg, rng), _masked_loss(cfg)
    batches = list(_batches(cfg, [(6,), (2, 4)], rng, steps=12))
    turns = mock.Mock(wraps=qrhash.optim.blocks.update_in_blocks)
    monkeypatch.setattr(qrhash.optim.wrapper, "update_in_blocks", turns)
    with jax.numpy_dtype_promotion("standard"):
        step = _by_rows(loss, (cfg.large_tables, False), tx)
        got = _train(step, params, tx.init(params), batches)
        assert turns.called == is_row_wise
        monkeypatch.setattr(qrhash.tuning, "updates_in_blocks", lambda _, rows: False)
        step = _by_rows(loss, (cfg.large_tables, False), tx)
        want = _train(step, params, tx.init(params), batches)
    jax.tree.map(assert_close, got, want)


@pytest.mark.usefixtures("_blocks")
def test_updates_in_blocks_may_be_of_another_dtype(rng):
    """Gradients of bfloat16, whose updates are wider."""
    wider = optax.stateless(lambda grads, _: jax.tree.map(lambda g: -g.astype(jnp.float32), grads))
    values = jnp.asarray(rng.standard_normal((7, 2)), jnp.bfloat16)
    grads = RowGrads(jnp.array([5, 0, 2, 9, 7, 1, 3]), values, num_rows=10)
    table = jnp.zeros((10, 2), jnp.bfloat16)
    updates, _ = qrhash.touched_rows(wider).update(grads, wider.init(table), table)
    assert updates.dtype == jnp.float32
    np.testing.assert_array_equal(updates.to_dense(), -grads.to_dense().astype(jnp.float32))


@pytest.mark.usefixtures("_blocks")
def test_updates_in_blocks_of_what_needs_no_parameters_and_keeps_no_state(rng):
    """Nothing is read, then."""
    values = jnp.asarray(rng.standard_normal((7, 2)), jnp.float32)
    grads = RowGrads(jnp.array([5, 0, 2, 9, 7, 1, 3]), values, num_rows=10)
    tx = qrhash.touched_rows(optax.scale(-0.5))
    updates, _ = tx.update(grads, tx.init(jnp.zeros((10, 2))))
    np.testing.assert_array_equal(updates.to_dense(), -0.5 * grads.to_dense())


@pytest.mark.usefixtures("_blocks")
def test_updates_in_blocks_inside_shard_map(rng):
    """Each of two devices has a table of its own."""
    tx = qrhash.touched_rows(qrhash.rowwise_adagrad(0.1))
    indices = jnp.stack([jnp.asarray(rng.permutation(10)[:7]) for _ in range(2)])
    values = jnp.asarray(rng.standard_normal((2, 7, 2)), jnp.float32)
    tables = jnp.asarray(rng.standard_normal((2, 10, 2)), jnp.float32)

    def step(table, indices, values):
        grads = RowGrads(indices[0], values[0], num_rows=10)
        updates, _ = tx.update(grads, tx.init(table[0]), table[0])
        return qrhash.apply_updates(table[0], updates)[None]

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    each = jax.P("data")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(each,) * 3, out_specs=each)
    wanted = [step(*(x[n : n + 1] for x in (tables, indices, values)))[0] for n in range(2)]
    assert_close(jax.jit(mapped)(tables, indices, values), jnp.stack(wanted))


RATE = 0.05
RULES = {"sgd": optax.sgd, "adagrad": optax.adagrad, "rowwise": qrhash.rowwise_adagrad}


def _by_loops(name, param, grad, sums):
    """One step over the rows of a parameter, in float64."""
    for i in np.ndindex(param.shape[:-1]):
        if name == "sgd":
            param[i] -= RATE * grad[i]
            continue
        sums[i] += np.mean(grad[i] ** 2) if name == "rowwise" else grad[i] ** 2
        param[i] -= RATE * grad[i] / np.sqrt(sums[i] + 1e-7)


@per_operation
def test_training_equals_loops_over_ids_and_rows(operation, rng):
    """A linear loss, whose gradients the oracle collects id by id. No JAX in what is wanted."""
    cfg = EmbedConfig(FAMILIES["mixed radix"], FEATURES, operation, large_table_rows=3)
    params = parameters(cfg, rng)

    def loss(params, ids, weights):
        return (qrhash.lookup(params[0], ids, cfg, params[1]) * weights).sum()

    steps = {
        name: _by_rows(loss, (cfg.large_tables, False), make(RATE)) for name, make in RULES.items()
    }

    @jax.jit
    def all_steps(carry, ids, weights):
        return {name: step(*carry[name], ids, weights)[:2] for name, step in steps.items()}

    carry = {name: (params, make(RATE).init(params)) for name, make in RULES.items()}
    want = {name: [np.float64(p) for p in jax.tree.leaves(params)] for name in RULES}
    sums = {name: [np.full_like(p, 0.1) for p in want[name]] for name in RULES}
    for _ in range(20):
        ids = rng.integers(0, cfg.num_embeddings, 5).astype(np.int32)
        weights = rng.standard_normal((5, FEATURES)).astype(np.float32)
        carry = all_steps(carry, ids, weights)
        for name, leaves in want.items():
            k = cfg.num_tables
            grads, dense = oracle.gradient(leaves[:k], [ids], [weights], cfg, leaves[k:] or None)
            for each in zip(leaves, [*grads, *(dense or ())], sums[name], strict=True):
                _by_loops(name, *each)
    for name, leaves in want.items():
        jax.tree.map(assert_close, jax.tree.leaves(carry[name][0]), leaves)
    assert all_steps._cache_size() == 1


# --- many features --------------------------------------------------------------------------------

_embed = lambda family, *args, **options: EmbedConfig(  # noqa: E731
    FAMILIES[family], FEATURES, *args, large_table_rows=3, **options
)
COLUMNS = {
    "item": _embed("quotient-remainder"),
    "last_item": "item",
    "shop": _embed("chinese remainder", "concat", id_policy="zero"),
    "page": _embed("quotient-remainder", "project"),
    "day": EmbedConfig(qrhash.FullTable(7), FEATURES),
}
CONFIG = CollectionConfig(COLUMNS)


def _column_batches(rng, steps, rows=6):
    """Ids of every column, with padding, of which "last_item" is a bag of three; and targets."""
    for _ in range(steps):
        ids = {
            name: rng.integers(-1, cfg.num_embeddings + 1, (rows, 3)[: 2 if "_" in name else 1])
            for name, cfg in CONFIG.configs.items()
        }
        target = jnp.asarray(rng.standard_normal((rows, FEATURES)), jnp.float32)
        yield {name: jnp.asarray(i, jnp.int32) for name, i in ids.items()}, target


def _pooled(vectors, ids):
    """[rows, FEATURES]: the sum over all columns of what is not padding."""
    total = 0.0
    for name, of_column in vectors.items():
        good = (ids[name] >= 0) & (ids[name] < CONFIG.configs[name].num_embeddings)
        kept = jnp.where(good[..., None], of_column, 0)
        total += kept.sum(1) if kept.ndim == 3 else kept
    return total


@pytest.mark.parametrize("tx", [optax.adagrad(0.1), qrhash.rowwise_adagrad(0.1)])
def test_a_collection_trains_as_its_features_do_alone(tx, rng):
    """Two features share tables. Alone and densely: tables of their own, nothing stacked."""
    drawn = {name: parameters(cfg, rng) for name, cfg in CONFIG.own_configs.items()}
    tables = {name: pair[0] for name, pair in drawn.items()}
    projections = {name: pair[1] for name, pair in drawn.items() if pair[1] is not None}
    batches = list(_column_batches(rng, 50))

    def alone(params, ids, target):
        tables, projections = params
        owners = CONFIG.owner_of
        vectors = {
            name: qrhash.lookup(
                tables[owners[name]], i, CONFIG.configs[name], projections.get(owners[name])
            )
            for name, i in ids.items()
        }
        return ((_pooled(vectors, ids) - target) ** 2).mean()

    def together(params, ids, target):
        vectors = collection.lookup(params[0], ids, CONFIG, params[1])
        return ((_pooled(vectors, ids) - target) ** 2).mean()

    params = (tables, projections)
    want, state, values = _train(_densely(alone, tx), params, tx.init(params), batches)
    params = (collection.stack(tables, CONFIG), projections)
    step = _by_rows(together, (CONFIG.large_tables, False), tx)
    got, stacked_state, got_values = _train(step, params, tx.init(params), batches)
    assert_close(got_values, values)
    jax.tree.map(assert_close, (collection.unstack(got[0], CONFIG), got[1]), want)
    if tx.init is not optax.adagrad(0.1).init:
        of_tables = [s[0] for s in jax.tree.leaves(state, is_leaf=_is_pair) if _is_pair(s)]
        stacked = [s[0] for s in jax.tree.leaves(stacked_state, is_leaf=_is_pair) if _is_pair(s)]
        jax.tree.map(assert_close, [collection.unstack(s, CONFIG) for s in stacked], of_tables)


def _is_pair(node):
    """The (tables, projections) of a state."""
    return type(node) is tuple and len(node) == 2 and all(isinstance(n, dict) for n in node)


# --- Flax -----------------------------------------------------------------------------------------


class Model(nnx.Module):
    """Two look-ups in one embedding, a collection, and layers whose state changes in a pass."""

    def __init__(self, rngs):
        self.words = qrhash.nnx.MultiHashEmbed(COLUMNS["page"], rngs=rngs)
        self.columns = qrhash.nnx.EmbedCollection(CONFIG, rngs=rngs)
        self.norm = nnx.BatchNorm(FEATURES, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.dense = nnx.Linear(FEATURES, FEATURES, rngs=rngs)

    def __call__(self, ids):
        words = self.words(ids["day"]) + self.words(ids["day"] + 1)
        words = jnp.where(jnp.isnan(words), 0, words)
        pooled = self.norm(_pooled(self.columns(ids), ids) + words)
        return self.dense(self.dropout(pooled))


def _nnx_loss(model, ids, target, scale=1.0):
    """And, beside the loss, the outputs."""
    outputs = model(ids)
    return scale * ((outputs - target) ** 2).mean(), outputs


def _nnx_step(value_and_grad):
    def step(model, optimizer, ids, target):
        result, grads = value_and_grad(_nnx_loss, has_aux=True)(model, ids, target, 2.0)
        optimizer.update(model, grads)
        return result

    return step


@pytest.mark.parametrize("tx", [optax.adagrad(0.1), CHAIN], ids=["adagrad", "chain"])
def test_nnx_trains_to_the_parameters_of_dense_nnx(tx, rng):
    """The state of batch norm and dropout goes on as it does there."""
    batches = list(_column_batches(rng, 20))
    ways = [
        (nnx.value_and_grad, nnx.Optimizer, {"wrt": nnx.Param}),
        (qrhash.nnx.value_and_grad, qrhash.nnx.Optimizer, {}),
    ]
    ends = []
    with jax.numpy_dtype_promotion("standard"):  # Flax's and optax's sums
        for value_and_grad, optimizer_class, options in ways:
            model = Model(nnx.Rngs(0))
            optimizer = optimizer_class(model, tx, **options)
            step = nnx.jit(_nnx_step(value_and_grad), donate_argnames=("model", "optimizer"))
            results = [step(model, optimizer, *batch) for batch in batches]
            states = [nnx.state(node) for node in (model, optimizer)]
            ends.append((results, *map(nnx.to_pure_dict, states)))
    want, got = jax.tree.map(_number, ends)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: assert_close(a, b, 2e-5), got, want)


def _number(leaf):
    """Of a random key, its bits."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def test_nnx_gradients_are_row_gradients_at_large_tables(rng):
    """In a state of the structure of `nnx.value_and_grad`; and dense for who asks that one."""
    model, batch = Model(nnx.Rngs(0)), next(_column_batches(rng, 1))
    graph, state = nnx.split(model)
    gradients = []
    for value_and_grad in (qrhash.nnx.value_and_grad, nnx.value_and_grad):
        model = nnx.merge(graph, state, copy=True)
        gradient = nnx.jit(value_and_grad(_nnx_loss, has_aux=True))
        gradients.append(gradient(model, *batch)[1])
    ours, dense = (dict(nnx.to_flat_state(grads)) for grads in gradients)
    assert isinstance(gradients[0], nnx.State)
    assert set(ours) == set(dense)
    large = {("words", "table_0"), ("words", "table_1")}
    large |= {("columns", stack.name) for stack in CONFIG.stacks if stack.is_large}
    for path, grad in ours.items():
        value, want = grad.get_value(), dense[path].get_value()
        assert isinstance(value, RowGrads) == (path in large)
        assert type(grad) is type(dense[path])
        assert_close(value.to_dense() if path in large else value, want)


def test_nnx_takes_keyword_arguments():
    embed = qrhash.nnx.MultiHashEmbed(_embed("quotient-remainder"), rngs=nnx.Rngs(0))
    loss = lambda embed, ids, scale=1.0: (scale * embed(ids)).sum()  # noqa: E731
    for value_and_grad in (nnx.value_and_grad, qrhash.nnx.value_and_grad):
        value, _ = value_and_grad(loss)(embed, jnp.array([1, 2]), scale=2.0)
        assert_close(value, 2 * embed(jnp.array([1, 2])).sum())


@pytest.mark.parametrize("wrt", [qrhash.nnx.Table, nnx.Not(qrhash.nnx.Table)], ids=str)
def test_nnx_wrt_chooses_what_is_differentiated(wrt):
    embed = qrhash.nnx.MultiHashEmbed(COLUMNS["page"], rngs=nnx.Rngs(0))
    start, chosen = nnx.to_pure_dict(nnx.state(embed)), nnx.to_pure_dict(nnx.state(embed, wrt))
    loss = lambda embed: (embed(jnp.array([1, 2])) ** 2).sum()  # noqa: E731
    _, grads = qrhash.nnx.value_and_grad(loss, wrt=wrt)(embed)
    assert set(nnx.to_pure_dict(grads)) == set(chosen)
    qrhash.nnx.Optimizer(embed, optax.sgd(0.1), wrt=wrt).update(embed, grads)
    end = nnx.to_pure_dict(nnx.state(embed))
    assert {name for name in start if (start[name] != end[name]).any()} == set(chosen)


def test_nnx_attends_over_a_large_table_with_a_dense_gradient():
    embed = qrhash.nnx.MultiHashEmbed(_embed("quotient-remainder", "add"), rngs=nnx.Rngs(0))
    loss = lambda embed: embed.attend(embed(jnp.array([1, 2]))).sum()  # noqa: E731
    got, want = qrhash.nnx.value_and_grad(loss)(embed), nnx.value_and_grad(loss)(embed)
    jax.tree.map(assert_close, got, want)
    assert all(isinstance(table, jax.Array) for table in embed.tables)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, ids):
        words = qrhash.linen.MultiHashEmbed(COLUMNS["page"], name="words")
        twice = words(ids["day"]) + words(ids["day"] + 1)
        vectors = qrhash.linen.EmbedCollection(CONFIG, name="columns")(ids)
        pooled = _pooled(vectors, ids) + jnp.where(jnp.isnan(twice), 0, twice)
        pooled = nn.BatchNorm(use_running_average=False)(pooled)
        return nn.Dense(FEATURES)(pooled)


def test_linen_trains_to_the_parameters_of_dense_linen(rng):
    batches, model, tx = list(_column_batches(rng, 20)), LinenModel(), optax.adagrad(0.1)
    with jax.numpy_dtype_promotion("standard"):  # Flax's own sums
        boxed = jax.jit(model.init)(jax.random.key(0), batches[0][0])
        by_rows = qrhash.linen.large_tables(boxed["params"])
        assert by_rows["columns"] == CONFIG.large_tables | {
            "page_kernel": False,
            "page_bias": False,
        }
        assert by_rows["words"]["table_0"]
        assert not by_rows["words"]["kernel"]
        variables = nn.unbox(boxed)

        def loss(params, statistics, ids, target):
            outputs, changed = model.apply(
                {"params": params, "batch_stats": statistics}, ids, mutable="batch_stats"
            )
            return ((outputs - target) ** 2).mean(), changed["batch_stats"]

        ways = [
            (jax.value_and_grad(loss, has_aux=True), tx, optax.apply_updates),
            (
                qrhash.value_and_grad(loss, by_rows, has_aux=True),
                qrhash.touched_rows(tx),
                qrhash.apply_updates,
            ),
        ]
        ends = []
        for value_and_grad, tx, apply_updates in ways:
            step = jax.jit(_step(value_and_grad, tx, apply_updates))
            params, statistics = variables["params"], variables["batch_stats"]
            state = tx.init(params)
            for ids, target in batches:
                params, state, (_, statistics) = step(params, state, statistics, ids, target)
            assert step._cache_size() == 1
            ends.append((params, state, statistics))
    want, got = ends
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: assert_close(a, b, 2e-5), got, want)


# --- nothing of a table's size is copied or filled ------------------------------------------------

ROWS = 100_003
LARGE = qrhash.QuotientRemainder(4 * ROWS, 4)
# What may have a result of a table's size: it names the table, or writes into its place.
IN_PLACE = {
    *("parameter", "get-tuple-element", "tuple", "bitcast", "scatter", "dynamic-update-slice"),
    *("fusion", "while", "conditional", "call"),  # The computations they call are read too.
}


def _of_table_size(compiled):
    """Instructions of every computation in the HLO that make an array as long as a table."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(", line)
        if not match or match[2] in IN_PLACE:
            continue
        shapes = re.findall(r"\w+\[([\d,]+)\]", match[1])
        if any(math.prod(map(int, shape.split(","))) >= ROWS for shape in shapes):
            found.append(f"{match[2]} {match[1]}")
    return found


def _compiled(step, *args):
    """A step that is given its first two arguments for good; nothing is allocated."""
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile(OPTIMIZED)


def _assert_in_place(compiled):
    assert _of_table_size(compiled) == []
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * ROWS
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4 * ROWS


BATCH = jax.ShapeDtypeStruct((64,), jnp.int32)
TRANSFORMATIONS = {
    "adagrad": optax.adagrad(0.1),
    "rowwise": qrhash.rowwise_adagrad(0.1),
    "sgd": optax.sgd(0.1),
    "decay": optax.chain(optax.add_decayed_weights(0.1), optax.adagrad(0.1)),
    "adam": optax.adam(0.1),
    "clip": CHAIN,
}


@pytest.fixture
def _blocks(monkeypatch):
    """However few rows a batch touches, they are updated a few at a time."""
    monkeypatch.setattr(qrhash.tuning, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(qrhash.tuning, "updates_in_blocks", lambda _, rows: rows >= 4)


def _sum(cfg):
    """A loss that is linear in the vectors.

    For most tables its gradient needs no row read, so that nothing but the library's own care puts
    the reads, which the loss needs, before the updates.
    """
    return lambda params, ids: qrhash.lookup(params[0], ids, cfg, params[1]).sum()


def _shapes_of(cfg):
    make = lambda key: (qrhash.init(key, cfg), qrhash.init_projection(key, cfg))  # noqa: E731
    return jax.eval_shape(make, jax.random.key(0))


@pytest.mark.parametrize(
    ("operation", "name"),
    [(operation, "adagrad") for operation in OPERATIONS]
    + [("mult", name) for name in TRANSFORMATIONS if name != "adagrad"],
)
def test_a_step_copies_no_table(operation, name):
    cfg, tx = EmbedConfig(LARGE, FEATURES, operation), TRANSFORMATIONS[name]
    assert cfg.large_tables == (True, False)
    params = _shapes_of(cfg)
    with jax.numpy_dtype_promotion("standard"):  # for Adam and schedules
        step = _by_rows(_sum(cfg), (cfg.large_tables, False), tx)
        _assert_in_place(_compiled(step, params, jax.eval_shape(tx.init, params), BATCH))


@pytest.mark.parametrize("name", [name for name in TRANSFORMATIONS if name != "clip"])
@pytest.mark.usefixtures("_blocks")
def test_a_step_in_blocks_copies_no_table(name):
    cfg, tx = EmbedConfig(LARGE, FEATURES), TRANSFORMATIONS[name]
    params = _shapes_of(cfg)
    with jax.numpy_dtype_promotion("standard"):
        step = _by_rows(_sum(cfg), (cfg.large_tables, False), tx)
        compiled = _compiled(step, params, jax.eval_shape(tx.init, params), BATCH)
    assert "while" in compiled.as_text()
    _assert_in_place(compiled)


PLACES = 40 * 1024 + 7  # in bags: several turns of as many as are summed up at once
BAGS = qrhash.Bag(
    jax.ShapeDtypeStruct((PLACES,), jnp.int32),
    jax.ShapeDtypeStruct((PLACES,), jnp.int32),
    shape=(500,),
)


@pytest.mark.parametrize("operation", ["mult", "concat"])
def test_a_step_of_bags_copies_no_table(operation):
    cfg, tx = EmbedConfig(LARGE, FEATURES, operation, id_policy="clip"), optax.adagrad(0.1)
    params = _shapes_of(cfg)
    step = _by_rows(_sum(cfg), (cfg.large_tables, False), tx)
    compiled = _compiled(step, params, jax.eval_shape(tx.init, params), BAGS)
    copies = [each for each in _of_table_size(compiled) if f"[{ROWS}," in each]
    assert copies == []


def test_a_look_up_of_bags_writes_no_vectors_of_all_ids():
    cfg = EmbedConfig(LARGE, FEATURES)
    params = _shapes_of(cfg)
    text = jax.jit(_sum(cfg)).lower(params, BAGS).compile(OPTIMIZED).as_text()
    assert f"s32[{PLACES}]" in text
    assert not re.search(rf"f32\[{PLACES},\d+", text)


@pytest.mark.parametrize("merge_method", ["hash", "sort"])
def test_a_step_with_several_look_ups_copies_no_table(merge_method):
    """Two large tables, each looked up twice; both ways to merge."""
    cfg = EmbedConfig(qrhash.QuotientRemainder(ROWS * (ROWS + 9), ROWS + 9), FEATURES)
    params, tx = _shapes_of(cfg), optax.adagrad(0.1)

    def loss(params, indices, others):
        rows = [qrhash.gather(params[0], i) for i in (indices, others)]
        return sum((a + b).sum() for a, b in rows)

    step = _by_rows(loss, (cfg.large_tables, False), tx)
    state = jax.eval_shape(tx.init, params)
    with merging_by(merge_method):
        _assert_in_place(_compiled(step, params, state, (BATCH, BATCH), (BATCH, BATCH)))


def _large_collection():
    columns = {
        name: EmbedConfig(LARGE, FEATURES, name, id_policy="zero") for name in ("mult", "project")
    }
    return CollectionConfig(columns | {"again": "mult", "day": EmbedConfig(qrhash.FullTable(7), 8)})


def test_a_step_of_a_collection_copies_no_stack():
    config, tx = _large_collection(), optax.adagrad(0.1)
    make = lambda key: (  # noqa: E731
        collection.init(key, config),
        collection.init_projections(key, config),
    )
    params = jax.eval_shape(make, jax.random.key(0))

    def loss(params, ids):
        vectors = collection.lookup(params[0], ids, config, params[1])
        return sum(v.sum() for v in vectors.values())

    step = _by_rows(loss, (config.large_tables, False), tx)
    ids = dict.fromkeys(config.configs, BATCH)
    _assert_in_place(_compiled(step, params, jax.eval_shape(tx.init, params), ids))


def test_a_step_of_nnx_copies_no_table():
    class Both(nnx.Module):
        def __init__(self, rngs):
            self.embed = qrhash.nnx.MultiHashEmbed(EmbedConfig(LARGE, FEATURES), rngs=rngs)
            self.columns = qrhash.nnx.EmbedCollection(_large_collection(), rngs=rngs)

    def step(model, optimizer, ids):
        def loss(model):
            vectors = model.columns(dict.fromkeys(("mult", "again"), ids))
            twice = model.embed(ids) + model.embed(ids + 1)
            return sum(v.sum() for v in (*vectors.values(), twice))

        value, grads = qrhash.nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    model = Both(nnx.Rngs(0))
    optimizer = qrhash.nnx.Optimizer(model, optax.adagrad(0.1))
    jitted = nnx.jit(step, donate_argnames=("model", "optimizer"))
    lowered = jitted.lower(model, optimizer, jnp.arange(64))
    compiled = getattr(lowered, "lowered", lowered).compile(OPTIMIZED)
    _assert_in_place(compiled)


def test_a_step_of_linen_copies_no_table():
    model, tx = qrhash.linen.MultiHashEmbed(EmbedConfig(LARGE, FEATURES)), optax.adagrad(0.1)
    variables = jax.eval_shape(model.init, jax.random.key(0), BATCH)
    step = _by_rows(
        lambda variables, ids: model.apply(variables, ids).sum(),
        qrhash.linen.large_tables(variables),
        tx,
    )
    params = nn.unbox(variables)
    _assert_in_place(_compiled(step, params, jax.eval_shape(tx.init, params), BATCH))


def _pure_step(cfg, tx, take_rows):
    """A step in the pure form, as the README has it."""

    def step(tables, state, ids):
        rows, indices = take_rows(tables, cfg.indices(ids))
        loss = lambda rows: qrhash.combine_rows(rows, indices, cfg).sum()  # noqa: E731
        value, grads = jax.value_and_grad(loss)(rows)
        grads = tuple(
            RowGrads(index, grad, table.shape[0])
            for index, grad, table in zip(indices, grads, tables, strict=True)
        )
        updates, state = tx.update(grads, state, tables)
        return qrhash.apply_updates(tables, updates), state, value

    return step


COPY = f"copy f32[{ROWS},{FEATURES}]"


def test_the_pure_form_copies_no_table():
    cfg, tx = EmbedConfig(LARGE, FEATURES), optax.adagrad(0.1)
    tables, _ = _shapes_of(cfg)
    step = _pure_step(cfg, qrhash.touched_rows(tx), qrhash.take_rows)
    _assert_in_place(_compiled(step, tables, jax.eval_shape(tx.init, tables), BATCH))


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_the_check_sees_the_copy_of_reads_in_no_order(name, monkeypatch):
    """Plain gathers in place of `take_rows`, and of what `touched_rows` reads by."""

    def plain(arrays, index):
        index = jnp.where((index >= 0) & (index < len(arrays[0])), index, len(arrays[0]))
        return tuple(a.at[index].get(mode="fill", fill_value=0) for a in arrays), index

    monkeypatch.setattr(qrhash.local, "read_rows", plain)
    monkeypatch.setattr(qrhash.storage, "read_rows", plain)
    cfg, tx = EmbedConfig(LARGE, FEATURES), TRANSFORMATIONS[name]
    params = tables, _ = _shapes_of(cfg)
    gather = lambda tables, indices: (qrhash.gather(tables, indices), indices)  # noqa: E731
    for step, args in [
        (_pure_step(cfg, qrhash.touched_rows(tx), gather), tables),
        (_by_rows(_sum(cfg), (cfg.large_tables, False), tx), params),
    ]:
        compiled = _compiled(step, args, jax.eval_shape(tx.init, args), BATCH)
        assert any(each.startswith(COPY) for each in _of_table_size(compiled))
        with pytest.raises(AssertionError):
            _assert_in_place(compiled)


def test_the_check_sees_dense_training():
    """Which fills, adds and multiplies arrays of the table's size."""
    cfg, tx = EmbedConfig(LARGE, FEATURES), optax.adagrad(0.1)
    params = _shapes_of(cfg)
    step = _densely(_sum(cfg), tx)
    compiled = _compiled(step, params, jax.eval_shape(tx.init, params), BATCH)
    operations = collections.Counter(each.split()[0] for each in _of_table_size(compiled))
    assert {"broadcast", "add", "multiply"} <= set(operations)


def test_the_pure_form_gives_the_numbers_of_value_and_grad(rng):
    cfg = EmbedConfig(FAMILIES["mixed radix"], FEATURES, large_table_rows=1)
    (tables, _), tx = parameters(cfg, rng), qrhash.touched_rows(optax.adagrad(0.1))
    batches = [(jnp.asarray(rng.integers(0, 29, 6), jnp.int32),) for _ in range(5)]
    pure = _train(_pure_step(cfg, tx, qrhash.take_rows), tables, tx.init(tables), batches)
    loss = lambda tables, ids: _sum(cfg)((tables, None), ids)  # noqa: E731
    step = _by_rows(loss, cfg.large_tables, optax.adagrad(0.1))
    jax.tree.map(assert_close, pure, _train(step, tables, tx.init(tables), batches))
