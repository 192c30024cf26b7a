"""Vectors side by side: the look-up of each feature, concatenated, to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

import qrhash
from qrhash import Bag, CollectionConfig, EmbedConfig, FullTable, Keys, collection, dynamic
from support.cases import FAMILIES, OPERATIONS, assert_close, parameters
from support.meshes import BOTH, dense, layout_2x4, make_layout

UNCHECKED_KEYS = True

_embed = functools.partial(EmbedConfig, large_table_rows=3, combiner="sum", id_policy="zero")
# Runs of one, two and more neighbours that are alike, and several widths next to each other.
FEATURES = {
    "first": _embed(FAMILIES["quotient-remainder"], 8),
    **{f"alike {n}": _embed(qrhash.QuotientRemainder(16 + n), 8) for n in range(6)},
    **{name: _embed(FAMILIES["mixed radix"], 8, name) for name in OPERATIONS},
    "last": "first",
    "several": _embed(FAMILIES["mixed radix"], 4, "features"),
    "and again": _embed(FAMILIES["mixed radix"], 4, "features"),
    "day": EmbedConfig(FullTable(7), 3),
    "hour": EmbedConfig(FullTable(24), 3),
    "clipped": EmbedConfig(FullTable(24), 3, id_policy="clip"),
    "shop": _embed(FAMILIES["chinese remainder"], 8),
}
CONFIG = CollectionConfig(FEATURES)
WIDTH = sum(np.prod(each.vector_shape) for each in CONFIG.configs.values())


def _parameters(rng, config=CONFIG):
    made = {name: parameters(cfg, rng) for name, cfg in config.own_configs.items()}
    tables = {name: of for name, (of, _) in made.items()}
    projections = {name: of for name, (_, of) in made.items() if of is not None}
    return collection.as_stacks(tables, config), projections


def _ids(rng, shape, config=CONFIG, bad=1):
    """With duplicates, and ids beyond the vocabulary."""
    return {
        name: rng.integers(0, each.num_embeddings + bad, shape, np.int32)
        for name, each in config.configs.items()
    }


def _bags(rng, shape, names):
    """Of each feature, of another length."""
    return {
        name: Bag.from_padded(
            rng.integers(0, 7, (*shape, 1 + number), np.int32),
            mask=rng.integers(0, 2, (*shape, 1 + number)) > 0,
        )
        for number, name in enumerate(names)
    }


def _concatenated(vectors, ids, config=CONFIG):
    """Those of `lookup`, in the order of the config."""
    configs, flat = config.configs, []
    for name in (name for name in configs if name in ids):
        vector = vectors[name].astype(jnp.float32)
        if len(configs[name].vector_shape) > 1:
            vector = vector.reshape(*vector.shape[:-2], -1)
        flat.append(vector)
    return jnp.concatenate(flat, axis=-1)


def _by_feature(stacks, ids, config=CONFIG, projections=None):
    return _concatenated(collection.lookup(stacks, ids, config, projections), ids, config)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3)])
def test_it_equals_the_vectors_by_feature(shape, rng):
    stacks, projections = _parameters(rng)
    ids = _ids(rng, shape)
    got = collection.lookup_joined(stacks, ids, CONFIG, projections)
    assert got.shape == (*shape, WIDTH)
    want = _by_feature(stacks, ids, projections=projections)
    np.testing.assert_array_equal(got, want)


def test_their_order_is_that_of_the_config_whatever_that_of_the_ids_is(rng):
    """Which `jax.jit` does not keep."""
    stacks, projections = _parameters(rng)
    ids = _ids(rng, (5,))
    want = _by_feature(stacks, ids, projections=projections)
    shuffled = {name: ids[name] for name in rng.permutation(list(ids)).tolist()}
    look_up = lambda ids: collection.lookup_joined(stacks, ids, CONFIG, projections)  # noqa: E731
    np.testing.assert_array_equal(look_up(shuffled), want)
    assert list(ids) != sorted(ids)
    assert_close(jax.jit(look_up)(shuffled), want)


@pytest.mark.parametrize("names", [["day"], ["last", "first"], ["several"], ["hour", "add", "day"]])
def test_any_of_the_features(names, rng):
    stacks, projections = _parameters(rng)
    ids = {name: each for name, each in _ids(rng, (4,)).items() if name in names}
    got = collection.lookup_joined(stacks, ids, CONFIG, projections)
    np.testing.assert_array_equal(got, _by_feature(stacks, ids, projections=projections))


def test_no_rows_are_none(rng):
    stacks, projections = _parameters(rng)
    got = collection.lookup_joined(stacks, _ids(rng, (2, 0)), CONFIG, projections)
    assert got.shape == (2, 0, WIDTH)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_ids_as_one_array(kind, shape, rng):
    stacks, projections = _parameters(rng)
    ids = _ids(rng, shape)
    columns = kind(np.stack(list(ids.values()), axis=-1))
    got = collection.lookup_joined(stacks, columns, CONFIG, projections)
    np.testing.assert_array_equal(got, _by_feature(stacks, ids, projections=projections))


def test_an_array_of_the_host_has_ids_beyond_int32(rng):
    big = EmbedConfig(qrhash.MixedRadix.balanced(2**40, 4), 4)
    config = CollectionConfig({"a": big, "b": big, "c": "b"})
    stacks, _ = _parameters(rng, config)
    ids = np.array([[0, 2**32 + 1, 2**40 - 1], [2**40 - 1, 5, 2**33]])
    got = collection.lookup_joined(stacks, ids, config)
    want = _by_feature(stacks, dict(zip("abc", ids.T, strict=True)), config)
    np.testing.assert_array_equal(got, want)


def test_bags_beside_single_ids(rng):
    stacks, projections = _parameters(rng)
    ids = _ids(rng, (5,)) | _bags(rng, (5,), ["first", "alike 2", "alike 3", "several", "project"])
    got = collection.lookup_joined(stacks, ids, CONFIG, projections)
    np.testing.assert_array_equal(got, _by_feature(stacks, ids, projections=projections))


def test_dtypes_are_promoted(rng):
    wide, narrow = _embed(FullTable(5), 4), _embed(FullTable(5), 4, dtype=jnp.bfloat16)
    config = CollectionConfig({"a": narrow, "b": wide, "c": narrow, "d": narrow})
    stacks, _ = _parameters(rng, config)
    ids = _ids(rng, (6,), config)
    got = collection.lookup_joined(stacks, ids, config)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, _by_feature(stacks, ids, config))
    of_narrow = {name: ids[name] for name in "acd"}
    assert collection.lookup_joined(stacks, of_narrow, config).dtype == jnp.bfloat16


@pytest.mark.parametrize("by_rows", [False, True])
def test_gradients_equal_those_by_feature(by_rows, rng):
    """And a step compiles once."""
    params = _parameters(rng)
    weights = rng.standard_normal((5, WIDTH)).astype(np.float32)

    def loss(look_up, params, ids):
        return (jnp.sin(look_up(params[0], ids, CONFIG, projections=params[1])) * weights).sum()

    def step(look_up):
        of_params = functools.partial(loss, look_up)
        if by_rows:
            return jax.jit(qrhash.value_and_grad(of_params, (CONFIG.large_tables, False)))
        return jax.jit(jax.value_and_grad(of_params))

    joined, apart = step(collection.lookup_joined), step(_by_feature)
    for _ in range(2):
        ids = _ids(rng, (5,)) | _bags(rng, (5,), ["first", "alike 2"])
        (_, got), (_, want) = joined(params, ids), apart(params, ids)
        jax.tree.map(assert_close, dense(got), dense(want))
    assert joined._cache_size() == 1


def test_derivatives_go_forward_and_over_batches_too(rng):
    stacks, projections = _parameters(rng)
    ids = jnp.stack([each.T for each in _ids(rng, (2, 3)).values()], axis=-1)
    look_up = lambda stacks, ids: collection.lookup_joined(stacks, ids, CONFIG, projections)  # noqa: E731
    whole = look_up(stacks, ids)
    of_each = jax.vmap(look_up, in_axes=(None, 0))(stacks, ids)
    np.testing.assert_array_equal(of_each, whole)
    of_stacks = lambda stacks: look_up(stacks, ids)  # noqa: E731
    _, tangent = jax.jvp(of_stacks, (stacks,), (stacks,))
    _, transpose = jax.vjp(of_stacks, stacks)
    (cotangents,) = transpose(jnp.ones_like(whole))
    inner = jax.tree.map(lambda a, b: jnp.vdot(a, b), stacks, cotangents)
    assert_close(sum(inner.values()), tangent.sum())


def test_neighbours_that_are_alike_are_not_cut_apart(rng):
    """Not every feature is a piece; and vectors that all are alike are several pieces."""
    names = [f"c{n}" for n in range(10)]
    config = CollectionConfig({name: _embed(FAMILIES["full"], 8) for name in names})
    stacks, _ = _parameters(rng, config)

    def sizes(names):
        ids = {name: jnp.zeros(3, jnp.int32) for name in names}
        look_up = lambda stacks: collection.lookup_joined(stacks, ids, config)  # noqa: E731
        equations = jax.make_jaxpr(look_up)(stacks).eqns
        return [each.params["sizes"] for each in equations if each.primitive.name == "split"]

    assert sizes(names) == [(4, 4, 2)]
    assert sizes(names[:3]) == [(2, 1)]


# --- tables elsewhere -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_it_is_as_on_one_device(kind, rng):
    layout = layout_2x4(kind=kind)
    _same_on_a_mesh(layout, rng)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_that_splits_the_columns_it_is_as_on_one_device(kind, rng):
    layout = make_layout((2, 2, 2), (*BOTH, "c"), kind, column_axis="c", exchange="all_to_all")
    _same_on_a_mesh(layout, rng)


def _same_on_a_mesh(layout, rng):
    def of(layout):
        options = {"layout": layout, "large_table_rows": 10, "id_policy": "zero"}
        big = [EmbedConfig(qrhash.QuotientRemainder(41 + n, 3), 8, **options) for n in range(3)]
        day = EmbedConfig(FullTable(7), 8, **options)
        return CollectionConfig({"a": big[0], "b": big[1], "day": day, "c": big[2], "d": "a"})

    weights = rng.standard_normal((16, 40)).astype(np.float32)
    ids = np.stack(list(_ids(rng, 16, of(None)).values()), axis=-1)
    batch = qrhash.batches.put_batch((ids, weights), 16, layout)
    found = []
    for config, given in ((of(layout), batch), (of(None), (ids, weights))):

        def loss(stacks, ids, weights, config=config):
            vectors = collection.lookup_joined(stacks, ids, config)
            return (jnp.sin(vectors) * weights).sum(), vectors

        run = jax.jit(qrhash.value_and_grad(loss, config.large_tables, has_aux=True))
        found.append(run(collection.init(jax.random.key(0), config), *given))
    jax.tree.map(assert_close, *map(dense, found))


def test_dynamic_features_are_put_together_before(rng):
    """Beside ordinary ones whose vectors are combined together with those of their parts."""
    refused = EmbedConfig(qrhash.KeyDigits(6, num_tables=2), 8, large_table_rows=1)
    user = dynamic.DynamicConfig(5, 8, refused=refused, large_table_rows=1)
    item = dynamic.DynamicConfig(9, 8, seed=3, large_table_rows=1)
    config = CollectionConfig(
        {"day": EmbedConfig(FullTable(7), 8), "user": user, "items": item, "a": refused, "b": "a"}
    )
    stacks, _ = _parameters(rng, config)
    keys = Keys.of(rng.integers(0, 2**62, 6))
    ids = {"day": np.arange(6, dtype=np.int32)} | dict.fromkeys(["user", "a", "b"], keys)
    ids["items"] = Bag.from_lists([[n, n + 1] for n in range(6)])
    _, found = dynamic.assign_all(dynamic.init_states(config), ids, config, 0)
    got = collection.lookup_joined(stacks, found, config)
    vectors = collection.lookup(stacks, found, config)
    want = jnp.concatenate([vectors[name] for name, _ in config.embeddings], axis=-1)
    np.testing.assert_array_equal(got, want)


# --- Flax -----------------------------------------------------------------------------------------


def test_both_flax_modules_have_it(rng):
    stacks, projections = _parameters(rng)
    ids = _ids(rng, (5,))
    columns = np.stack(list(ids.values()), axis=-1)
    params = dict(stacks)
    for name, projection in projections.items():
        params |= {f"{name}_{field}": each for field, each in projection._asdict().items()}
    want = _by_feature(stacks, ids, projections=projections)
    linen = qrhash.linen.EmbedCollection(CONFIG)
    made = nn.unbox(linen.init(jax.random.key(0), columns, method="joined"))["params"]
    assert set(made) == set(params)
    embed = qrhash.nnx.EmbedCollection(CONFIG, rngs=nnx.Rngs(0))
    nnx.update(embed, params)
    for given in (ids, columns):
        assert_close(
            jax.jit(functools.partial(linen.apply, method="joined"))({"params": params}, given),
            want,
        )
        assert_close(nnx.jit(lambda embed, ids: embed.joined(ids))(embed, given), want)


# --- what is refused ------------------------------------------------------------------------------


def _with(**embeddings):
    config = CollectionConfig({"day": FEATURES["day"], "hour": FEATURES["hour"], **embeddings})
    return collection.init(jax.random.key(0), config), config


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.zeros((4, 3), np.int32), r"one array must have shape \[\*shape, 2\].*got \(4, 3\)"),
        (np.zeros((), np.int32), r"one array must have shape \[\*shape, 2\].*got \(\)"),
        (np.zeros((4, 2), np.float32), "integers.*float32"),
        ([[1, 2]], "must be a mapping of feature names.*list"),
        (Bag.from_lists([[1, 2]]), "must be a mapping of feature names.*Bag"),
        ({}, "at least one feature"),
        ({"day": np.zeros(3, np.int32), "week": np.zeros(3, np.int32)}, "day, hour, got 'week'"),
        (
            {"day": np.zeros(3, np.int32), "hour": np.zeros((3, 1), np.int32)},
            r"one shape for all features.*got \(3,\) for 'day' and \(3, 1\) for 'hour'",
        ),
        (
            {"day": np.zeros(3, np.int32), "hour": Bag.from_lists([[1], [2]])},
            r"\(3,\) for 'day' and \(2,\) for 'hour'",
        ),
    ],
)
def test_ids_that_cannot_be_joined_are_refused_in_words(ids, words):
    stacks, config = _with()
    with pytest.raises(ValueError, match=words):
        collection.lookup_joined(stacks, ids, config)


@pytest.mark.parametrize(
    "of_keys",
    [EmbedConfig(qrhash.KeyDigits(6, num_tables=2), 4), dynamic.DynamicConfig(5, 4)],
    ids=["keys", "dynamic"],
)
def test_an_array_is_no_keys(of_keys):
    stacks, config = _with(user=of_keys)
    with pytest.raises(ValueError, match=r"where a feature has keys, as 'user'.*\(4, 3\)"):
        collection.lookup_joined(stacks, np.zeros((4, 3), np.int32), config)
