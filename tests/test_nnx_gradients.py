"""`qrhash.nnx.value_and_grad` and `grad` against flax's own, in every form that flax's take."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import qrhash
from qrhash import RowGrads
from support.cases import assert_close

STANDARD_PROMOTION = True  # Flax's own sums
UNCHECKED_KEYS = True

CONFIG = qrhash.EmbedConfig(qrhash.QuotientRemainder(1000, 4), 8, large_table_rows=10)
IDS = jnp.array([1, 5, 999, 1])


class Model(nnx.Module):
    """With a table trained by rows, a small one, dense layers, and state that it changes."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.embed = qrhash.nnx.MultiHashEmbed(CONFIG, rngs=rngs)
        self.linear = nnx.Linear(8, 1, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, ids, scale=1.0):
        self.calls[...] += 1
        return self.linear(self.embed(ids)) * scale


def _loss(model, ids):
    return (model(ids) ** 2).sum()


def _is_variable(node):
    return isinstance(node, nnx.Variable)


def _dense(grads):
    def dense(variable):
        if not _is_variable(variable) or not isinstance(variable.get_value(), RowGrads):
            return variable
        return variable.replace(variable.get_value().to_dense())

    return jax.tree.map(dense, grads, is_leaf=_is_variable)


def _num_by_rows(grads):
    is_rows = lambda node: isinstance(node, RowGrads)  # noqa: E731
    return sum(map(is_rows, jax.tree.leaves(grads, is_leaf=is_rows)))


def _assert_as_flax(loss, make_args, *, by_rows=1, wrap=lambda f: f, **options):
    """Values, gradients, their structure, and what the call leaves in the modules."""
    args, flax_args = make_args(), make_args()
    value, grads = wrap(qrhash.nnx.value_and_grad(loss, **options))(*args)
    want_value, want = wrap(nnx.value_and_grad(loss, **options))(*flax_args)
    assert _num_by_rows(grads) == by_rows
    jax.tree.map(assert_close, value, want_value)
    dense = _dense(grads)
    assert jax.tree.structure(dense) == jax.tree.structure(want)
    jax.tree.map(assert_close, dense, want)
    state = lambda args: [  # noqa: E731
        nnx.state(arg, nnx.BatchStat) for arg in args if isinstance(arg, (nnx.Module, list))
    ]
    jax.tree.map(assert_close, state(args), state(flax_args))


def _an_ensemble():
    keys = jax.random.split(jax.random.key(0), 3)
    make = nnx.vmap(lambda key: qrhash.nnx.MultiHashEmbed(CONFIG, rngs=nnx.Rngs(key)))
    return make(keys)


CASES = {
    "a model": (_loss, lambda: (Model(), IDS), {}),
    "ids of the host": (_loss, lambda: (Model(), np.asarray(IDS)), {}),
    "under nnx.jit": (_loss, lambda: (Model(), IDS), {"wrap": nnx.jit}),
    "aux": (
        lambda model, ids: (_loss(model, ids), {"vectors": model(ids)}),
        lambda: (Model(), IDS),
        {"has_aux": True},
    ),
    "argnums of a model and an array": (
        lambda model, ids, scale: (model(ids, scale) ** 2).sum(),
        lambda: (Model(), IDS, jnp.float32(2)),
        {"argnums": (0, 2)},
    ),
    "argnums of the second": (lambda ids, m: _loss(m, ids), lambda: (IDS, Model()), {"argnums": 1}),
    "DiffState of the embedding": (
        _loss,
        lambda: (Model(), IDS),
        {"argnums": nnx.DiffState(0, nnx.PathContains("embed"))},
    ),
    "DiffState without the embedding": (
        _loss,
        lambda: (Model(), IDS),
        {"argnums": nnx.DiffState(0, nnx.PathContains("linear")), "by_rows": 0},
    ),
    "two models": (
        lambda a, ids, b: (a(ids) * b(ids)).sum(),
        lambda: (Model(), IDS, Model(1)),
        {"argnums": (0, 2), "by_rows": 2},
    ),
    "a list of models": (
        lambda models, ids: (models[0](ids) * models[1](ids)).sum(),
        lambda: ([Model(), Model(1)], IDS),
        {"by_rows": 2},
    ),
    "a tuple with a dict of models": (
        lambda models, ids: (models[0]["a"](ids) * models[1](ids)).sum(),
        lambda: (({"a": Model()}, Model(1)), IDS),
        {"by_rows": 2},
    ),
    "nnx.jit inside": (
        lambda model, ids: (nnx.jit(lambda model, ids: model(ids))(model, ids) ** 2).sum(),
        lambda: (Model(), IDS),
        {},
    ),
    "nnx.remat inside": (
        lambda model, ids: (nnx.remat(lambda model, ids: model(ids))(model, ids) ** 2).sum(),
        lambda: (Model(), IDS),
        {},
    ),
    "nnx.vmap over the batch": (
        lambda model, ids: (
            nnx.vmap(lambda m, i: m.linear(m.embed(i)), in_axes=(None, 0))(model, ids) ** 2
        ).sum(),
        lambda: (Model(), IDS),
        {},
    ),
    "an ensemble": (
        lambda models, ids: (
            nnx.vmap(lambda model, ids: model(ids), in_axes=(0, None))(models, ids) ** 2
        ).sum(),
        lambda: (_an_ensemble(), IDS),
        {"by_rows": 0},
    ),
    "attend": (
        lambda model, ids: jnp.sin(model.embed.attend(model.embed(ids))).sum(),
        lambda: (Model(), IDS),
        {"by_rows": 0},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_as_flax(case):
    loss, make_args, options = CASES[case]
    _assert_as_flax(loss, make_args, **options)


TREES = [{"graph": False}, {"graph_updates": False}]


@pytest.mark.parametrize("mode", TREES, ids=str)
@pytest.mark.parametrize("case", ["a model", "under nnx.jit", "aux", "a list of models"])
def test_as_flax_where_modules_are_trees(case, mode):
    loss, make_args, options = CASES[case]
    _assert_as_flax(loss, make_args, **options, **mode)


def test_a_whole_step_in_tree_mode():
    with nnx.set_graph_mode(False):
        model, optimizer = Model(), None
        optimizer = qrhash.nnx.Optimizer(model, optax.sgd(0.1))
        value, grads = qrhash.nnx.value_and_grad(_loss)(model, IDS)
        assert _num_by_rows(grads) == 1
        optimizer.update(model, grads)
        assert qrhash.nnx.value_and_grad(_loss)(model, IDS)[0] < value


def test_decorators_and_grad():
    @qrhash.nnx.value_and_grad(has_aux=True)
    def with_aux(model, ids):
        return _loss(model, ids), "aux"

    @qrhash.nnx.grad(argnums=1)
    def of_second(ids, model):
        return _loss(model, ids)

    (value, aux), grads = with_aux(Model(), IDS)
    assert aux == "aux"
    want = nnx.grad(_loss)(Model(), IDS)
    for got in (grads, of_second(IDS, Model()), qrhash.nnx.grad(_loss)(Model(), ids=IDS)):
        assert _num_by_rows(got) == 1
        jax.tree.map(assert_close, _dense(got), want)
    got, aux = qrhash.nnx.grad(lambda *args: (_loss(*args), value), has_aux=True)(Model(), IDS)
    assert aux == value
    jax.tree.map(assert_close, _dense(got), want)


def test_a_table_shared_by_two_models_is_differentiated_once():
    def make():
        first, second = Model(), Model(1)
        second.embed = first.embed
        return [first, second], IDS

    loss = lambda models, ids: (models[0](ids) * models[1](ids)).sum()  # noqa: E731
    _assert_as_flax(loss, make, by_rows=1)


def test_argnums_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"argnums.*2 positional.*got 2"):
        qrhash.nnx.value_and_grad(_loss, argnums=2)(Model(), IDS)


def test_nothing_is_left_in_the_model_after_an_error():
    def loss(model, ids):
        model(ids)
        raise RuntimeError("on purpose")

    model = Model()
    with pytest.raises(RuntimeError, match="on purpose"):
        qrhash.nnx.value_and_grad(loss)(model, IDS)
    assert model.calls[...] == 0
    _, grads = qrhash.nnx.value_and_grad(_loss)(model, IDS)
    assert _num_by_rows(grads) == 1


class Layers(nn.Module):
    """Look-ups inside the transformations of linen."""

    inside: str

    @nn.compact
    def __call__(self, ids):
        lift = {
            "jit": nn.jit,
            "remat": nn.remat,
            "vmap": lambda module: nn.vmap(
                module, variable_axes={"params": None}, split_rngs={"params": False}
            ),
        }[self.inside]
        return nn.Dense(1)(lift(qrhash.linen.MultiHashEmbed)(CONFIG, name="embed")(ids))


@pytest.mark.parametrize("inside", ["jit", "remat", "vmap"])
def test_linen_look_ups_inside_transformations(inside):
    model = Layers(inside)
    variables = model.init(jax.random.key(0), IDS)
    by_rows = qrhash.linen.large_tables(variables["params"])
    params = nn.unbox(variables)["params"]
    loss = lambda params: (model.apply({"params": params}, IDS) ** 2).sum()  # noqa: E731
    value, grads = qrhash.value_and_grad(loss, by_rows)(params)
    want_value, want = jax.value_and_grad(loss)(params)
    assert_close(value, want_value)
    assert isinstance(grads["embed"]["table_0"], RowGrads)
    grads["embed"]["table_0"] = grads["embed"]["table_0"].to_dense()
    jax.tree.map(assert_close, grads, want)
