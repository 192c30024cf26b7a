"""The Flax modules of tables that grow: the pure functions, with parameters where Flax has them."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import qrhash
from qrhash import Bag, EmbedConfig, KeyDigits, Keys, MultiHash, dynamic
from qrhash.dynamic import DynamicConfig, ExactCount, LeastUsed
from support.cases import linen_step, nnx_step
from support.meshes import layout_2x4

STANDARD_PROMOTION = True  # optax's Adam
UNCHECKED_KEYS = True

WIDTH = 4
ADAM = optax.adam(0.1)
BATCHES = [[1, 2, 1, 7], [2, 3, 8, 7], [1, 9, 9, 3], [4, 4, 1, 2]]


def _config(operation="mult", **changes):
    refused = None
    if operation is not None:
        refused = EmbedConfig(KeyDigits(6, num_tables=2), WIDTH, operation)
    given = {"admission": ExactCount(2, 50), "eviction": LeastUsed(1), "large_table_rows": 1}
    return DynamicConfig(3, WIDTH, refused=refused, **(given | changes))


class LinenModel(nn.Module):
    config: DynamicConfig

    @nn.compact
    def __call__(self, found):
        vectors = qrhash.linen.DynamicEmbed(self.config, name="embed")(found)
        return nn.Dense(1, name="dense")(vectors)[..., 0]


class NnxModel(nnx.Module):
    def __init__(self, config, rngs):
        self.embed = qrhash.nnx.DynamicEmbed(config, rngs=rngs)
        self.dense = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, found):
        return self.dense(self.embed(found))[..., 0]


_assign = nnx.jit(lambda embed, keys, step: embed.assign(keys, step))
_find = nnx.jit(lambda embed, keys: embed.find(keys))
_look_up = nnx.jit(lambda embed, found: embed(found))


@functools.partial(jax.jit, static_argnums=0)
def _found_by(config, keys):
    return dynamic.find(dynamic.init_state(config), keys, config)


def _found(config, keys):
    return _found_by(config, Keys.of(keys))


# --- vectors --------------------------------------------------------------------------------------

BAG = Bag.from_lists([[1, 2, 7], [], [7, 8]], capacity=8)


@pytest.mark.parametrize("keys", [Keys.of([[1, 2], [7, 1]]), BAG], ids=["keys", "bags"])
@pytest.mark.parametrize("operation", [None, "mult", "concat", "project"])
def test_both_are_the_pure_functions_and_fit_each_other(operation, keys):
    config = _config(operation)
    embed = qrhash.nnx.DynamicEmbed(config, rngs=nnx.Rngs(0))
    _assign(embed, Keys.of([1, 2, 1, 2, 8]), 0)
    found = _find(embed, keys)
    assert len(np.unique(found.rows.rows)) == 3  # both of those with rows, and some without
    pure = jax.jit(dynamic.lookup, static_argnums=2)(embed.parameters, found, config)
    np.testing.assert_array_equal(_look_up(embed, found), pure)

    linen = qrhash.linen.DynamicEmbed(config)
    params = nnx.to_pure_dict(nnx.state(embed, nnx.Param))
    apply = jax.jit(linen.apply)
    np.testing.assert_array_equal(apply({"params": params}, found), pure)
    parameters = qrhash.linen.parameters_of(params, config)
    jax.tree.map(np.testing.assert_array_equal, parameters, embed.parameters)

    made = nn.unbox(jax.jit(linen.init)(jax.random.key(1), found))["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    nnx.update(embed, made)
    np.testing.assert_array_equal(_look_up(embed, found), apply({"params": made}, found))


def test_the_names_of_the_parameters():
    names = {
        None: ["table"],
        "mult": ["refused_0", "refused_1", "table"],
        "project": ["refused_0", "refused_1", "refused_bias", "refused_kernel", "table"],
    }
    for operation, wanted in names.items():
        config = _config(operation)
        init = qrhash.linen.DynamicEmbed(config).init
        variables = jax.eval_shape(init, jax.random.key(0), _found(config, [1]))
        assert sorted(variables["params"]) == wanted


def test_keys_that_are_not_meant_are_neither_counted_nor_have_vectors():
    embed = qrhash.nnx.DynamicEmbed(_config(), rngs=nnx.Rngs(0))
    meant = np.array([True, False, True])
    found = embed.assign(["a", "b", "a"], 0, where=meant)
    assert int(embed.num_keys) == 1
    assert (embed(found)[1] == 0).all()
    assert (embed(embed.find(["a", "a", "b"], where=meant))[1] == 0).all()


def test_large_tables_are_found_by_their_boxes():
    config = _config("project")
    model, found = LinenModel(config), _found(config, [1])
    variables = jax.eval_shape(model.init, jax.random.key(0), found)
    large = qrhash.linen.large_tables(variables["params"])
    assert large["embed"].pop("table") is True
    assert not any(jax.tree.leaves(large))
    small = LinenModel(_config("project", large_table_rows=100))
    assert not any(jax.tree.leaves(qrhash.linen.large_tables(small.init(jax.random.key(0), found))))
    default = LinenModel(DynamicConfig(100_000, WIDTH))
    unboxed = nn.unbox(jax.eval_shape(default.init, jax.random.key(0), found))
    with pytest.raises(ValueError, match="variables hold no table of qrhash"):
        qrhash.linen.large_tables(unboxed)


# --- a step of the training -----------------------------------------------------------------------


def _loss(vectors, targets):
    return jnp.mean((vectors - targets) ** 2)


def _train_purely(config, tx, params, batches):
    """The step of `qrhash.dynamic`, with the parameters of a dense layer beside."""
    state = dynamic.init_state(config)
    tx = qrhash.touched_rows(tx)
    opt_state = tx.init(params)
    large = {"embed": dynamic.large(config), "dense": False}

    @jax.jit
    def step(params, state, opt_state, keys, targets, number):
        state, found = dynamic.assign(state, keys, config, number)
        started, new = dynamic.start_rows(params["embed"], found, config)
        params = params | {"embed": started}
        rows = {"embed": new, "dense": None}
        opt_state = qrhash.reset_rows(tx, opt_state, params, rows)

        def loss_fn(params):
            vectors = dynamic.lookup(params["embed"], found, config)
            dense = params["dense"]
            return _loss((vectors @ dense["kernel"])[:, 0] + dense["bias"], targets)

        loss, grads = qrhash.value_and_grad(loss_fn, large)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return qrhash.apply_updates(params, updates), state, opt_state, loss

    evict = jax.jit(dynamic.evict, static_argnums=2)
    for number, (keys, targets) in enumerate(batches):
        params, state, opt_state, loss = step(params, state, opt_state, keys, targets, number)
        state, _ = evict(state, params["embed"], config, number)
        yield float(loss)


def _train_linen(config, tx, params, batches):
    model = LinenModel(config)
    state = dynamic.init_state(config)
    tx = qrhash.touched_rows(tx)
    opt_state = tx.init(params)
    step = linen_step(model, dynamic.assign, tx, _loss, _found(config, [1]))
    step = jax.jit(step, donate_argnums=(0, 1, 2))
    evict = jax.jit(dynamic.evict, static_argnums=2)
    for number, (keys, targets) in enumerate(batches):
        params, state, opt_state, loss = step(params, state, opt_state, keys, targets, number)
        parameters = qrhash.linen.parameters_of(params["embed"], config)
        state, _ = evict(state, parameters, config, number)
        yield float(loss)
    assert step._cache_size() == 1


def _train_nnx(config, tx, params, batches):
    model = NnxModel(config, nnx.Rngs(5))
    nnx.update(model, params)
    optimizer = qrhash.nnx.Optimizer(model, tx)
    traces = []

    def check(grads):
        assert isinstance(grads.embed.table.get_value(), qrhash.RowGrads)

    step = nnx_step(_loss, traces, check)
    evict = nnx.jit(lambda embed, number: embed.evict(number))
    for number, (keys, targets) in enumerate(batches):
        yield float(step(model, optimizer, keys, targets, number))
        if config.eviction is not None:
            evict(model.embed, number)
    # On a mesh what the first step is given is not yet where the steps leave it.
    assert len(traces) == (1 if config.layout is None else 2)
    assert int(optimizer.step[...]) == len(batches)


@pytest.mark.parametrize(("operation", "tx"), [(None, optax.adagrad(0.1)), ("project", ADAM)])
def test_a_whole_model_trains_as_the_pure_functions_do(operation, tx, rng):
    """With rows that change hands in between: their state must be that of the start."""
    config = _config(operation)
    batches = [(Keys.of(keys), rng.normal(size=4).astype(np.float32)) for keys in BATCHES * 3]
    params = nn.unbox(jax.jit(LinenModel(config).init)(jax.random.key(3), _found(config, [1])))[
        "params"
    ]
    pure = params | {"embed": qrhash.linen.parameters_of(params["embed"], config)}
    wanted = list(_train_purely(config, tx, pure, batches))
    assert len(set(wanted)) == len(batches)
    got = list(_train_nnx(config, tx, jax.tree.map(jnp.copy, params), batches))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    got = list(_train_linen(config, tx, jax.tree.map(jnp.copy, params), batches))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def _used(config, embeds):
    """A model with moments everywhere, of which every key has lost its row again."""

    class Model(nnx.Module):
        def __init__(self):
            for name in embeds:
                setattr(self, name, qrhash.nnx.DynamicEmbed(config, rngs=nnx.Rngs(0)))

    model = Model()
    optimizer = qrhash.nnx.Optimizer(model, ADAM)
    found = {name: _assign(getattr(model, name), Keys.of([1, 2, 3]), 0) for name in embeds}
    loss_fn = lambda model: sum((getattr(model, n)(found[n]) ** 2).sum() for n in embeds)  # noqa: E731
    optimizer.update(model, qrhash.nnx.grad(loss_fn)(model))
    for name in embeds:
        getattr(model, name).evict(1)
    return model, optimizer


def test_of_several_only_the_one_named_is_reset_and_only_its_new_rows():
    config = _config(None, admission=dynamic.AdmitAll(), eviction=LeastUsed(0))
    model, optimizer = _used(config, ("a", "b"))
    moments = optimizer.opt_state[0].mu
    found = _assign(model.a, Keys.of([5]), 1)
    (row,) = found.rows.rows.tolist()
    before = {name: np.asarray(moments[name].table[...]) for name in ("a", "b")}
    optimizer.reset_rows(model, model.a, found)
    moments = optimizer.opt_state[0].mu
    after = {name: np.asarray(moments[name].table[...]) for name in ("a", "b")}
    np.testing.assert_array_equal(before["b"], after["b"])
    assert all(each.all() for each in before.values())
    assert not after["a"][row].any()
    np.testing.assert_array_equal(np.delete(after["a"], row, 0), np.delete(before["a"], row, 0))
    assert int(optimizer.opt_state[0].count[...]) == 1


def test_start_rows_of_a_tree_of_modules():
    """Each by its own config, wherever it stands; what is not named is as it was."""
    first, second = _config(None), dataclasses.replace(_config(None), seed=1)
    params = {
        "towers": {"item": {"table": jnp.zeros((3, WIDTH))}, "bias": jnp.ones(2)},
        "user": {"table": jnp.zeros((3, WIDTH))},
        "other": {"table": jnp.zeros((3, WIDTH))},
    }
    _, found = dynamic.assign(dynamic.init_state(first), [4, 4], first, 0)
    started, new = qrhash.linen.start_rows(
        params,
        {"towers": {"item": found}, "user": found},
        {"towers": {"item": first}, "user": second},
    )
    for config, got in ((first, started["towers"]["item"]), (second, started["user"])):
        pure, rows = dynamic.start_rows(dynamic.Parameters(jnp.zeros((3, WIDTH))), found, config)
        np.testing.assert_array_equal(got["table"], pure.table)
        np.testing.assert_array_equal(new["user"]["table"], rows.table)
        assert pure.table.any()
    assert not started["other"]["table"].any()
    assert (new["towers"]["bias"], new["other"]) == (None, None)
    tx = qrhash.touched_rows(ADAM)
    qrhash.reset_rows(tx, tx.init(started), started, new)
    alone, _ = qrhash.linen.start_rows(params["user"], found, second)
    np.testing.assert_array_equal(alone["table"], started["user"]["table"])


@pytest.mark.slow
def test_on_a_mesh(rng):
    """Table and index split over eight devices, and trained to the same numbers."""
    batches = [(Keys.of(keys * 2), rng.normal(size=8).astype(np.float32)) for keys in BATCHES]
    losses = []
    for where in (None, layout_2x4()):
        refused = EmbedConfig(MultiHash((7, 5)), WIDTH, "mult", layout=where)
        given = {"capacity": 64, "refused": refused, "layout": where}
        config = dataclasses.replace(_config(None, eviction=None), **given)
        params = nnx.to_pure_dict(nnx.state(NnxModel(config, nnx.Rngs(7)), nnx.Param))
        losses.append(list(_train_nnx(config, ADAM, params, batches)))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


# --- the rest -------------------------------------------------------------------------------------


def test_a_module_is_split_cloned_and_pickled_with_its_keys():
    model = NnxModel(_config(), nnx.Rngs(0))
    found = _assign(model.embed, Keys.of([1, 2, 1, 2, 3]), 0)
    graph, params, state = nnx.split(model, nnx.Param, ...)
    assert not any(leaf.dtype.kind in "iu" for leaf in jax.tree.leaves(params))
    assert all(leaf.dtype.kind in "iu" for leaf in jax.tree.leaves(state))
    copies = (nnx.merge(graph, params, state), nnx.clone(model), pickle.loads(pickle.dumps(model)))
    for copy in copies:
        assert _find(copy.embed, Keys.of([1, 2, 3])).rows.rows.tolist() == [0, 1, 3]
        np.testing.assert_array_equal(copy(found), model(found))


def test_refusals():
    config = _config()
    embed = qrhash.nnx.DynamicEmbed(config, rngs=nnx.Rngs(0))
    model = NnxModel(config, nnx.Rngs(0))
    found = _assign(embed, Keys.of([1, 1]), 0)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with pytest.raises(ValueError, match="embed must be a DynamicEmbed of the model"):
        qrhash.nnx.Optimizer(model, ADAM).reset_rows(model, embed, found)
    of_nnx = functools.partial(qrhash.nnx.DynamicEmbed, rngs=nnx.Rngs(0))
    for module in (qrhash.linen.DynamicEmbed, of_nnx):
        with pytest.raises(ValueError, match=r"config must be a qrhash\.dynamic\.DynamicConfig"):
            module(EmbedConfig(KeyDigits(6, num_tables=2), WIDTH))
    start_rows = qrhash.linen.start_rows
    with pytest.raises(ValueError, match="params must have 'item', which found names"):
        start_rows(params, {"item": found}, config)
    with pytest.raises(ValueError, match="config must have 'embed', which found names"):
        start_rows(params, {"embed": found}, {"item": config})
    with pytest.raises(ValueError, match="with table, refused_0, refused_1, got"):
        start_rows(params, {"dense": found}, config)
    with pytest.raises(ValueError, match="found must be what assign gives"):
        start_rows(params, Keys.of([1]), config)
    with pytest.raises(ValueError, match="config must be a qrhash"):
        start_rows(params["embed"], found, None)
    with pytest.raises(ValueError, match=r"evict needs config\.eviction"):
        qrhash.nnx.DynamicEmbed(_config(eviction=None), rngs=nnx.Rngs(0)).evict(0)
