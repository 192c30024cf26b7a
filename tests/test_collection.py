"""Collections: many features at once must equal each feature on its own."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qrhash
from qrhash import CollectionConfig, EmbedConfig, RowGrads, collection, initializers
from support import oracle
from support.cases import FAMILIES, assert_close, parameters

_embed = functools.partial(EmbedConfig, large_table_rows=3)
BFLOAT16 = {"param_dtype": jnp.bfloat16, "dtype": jnp.float32}
FEATURES = {
    "item": _embed(FAMILIES["quotient-remainder"], 8),
    "last_item": "item",
    "user": _embed(FAMILIES["mixed radix"], 8, "add", id_policy="zero"),
    "shop": _embed(FAMILIES["chinese remainder"], 11, "concat", widths=(8, 2, 1)),
    "page": _embed(FAMILIES["quotient-remainder"], 6, "project", widths=(8, 8)),
    "last_page": "page",
    "word": _embed(FAMILIES["full"], 5, "project", id_policy="zero", use_bias=False, widths=(2,)),
    "day": EmbedConfig(qrhash.FullTable(7), 8, id_policy="clip"),
    "hour": EmbedConfig(qrhash.FullTable(24), 8, "add", id_policy="wrap"),
    "query": _embed(FAMILIES["deeprec"], 8, **BFLOAT16),
    "site": _embed(FAMILIES["hash"], 8, dtype=jnp.bfloat16, id_policy="zero"),
    "checked": _embed(FAMILIES["quotient-remainder"], 8, id_policy="raise"),
}
# Tables in the stacks of "item", in one thing unlike it: none may be combined as if it were "item".
FEATURES |= {
    "twin": _embed(qrhash.QuotientRemainder(16), 8),
    "zero twin": _embed(qrhash.QuotientRemainder(16), 8, id_policy="zero"),
    "add twin": _embed(qrhash.QuotientRemainder(16), 8, "add"),
    "concat twin": _embed(qrhash.QuotientRemainder(16), 16, "concat"),
    "bfloat16 twin": _embed(qrhash.QuotientRemainder(16), 8, dtype=jnp.bfloat16),
    "project twin": _embed(qrhash.QuotientRemainder(16), 6, "project", widths=(8, 8)),
}
CONFIG = CollectionConfig(FEATURES)
SHAPES = {"item": (6,), "last_item": (2, 3), "user": (), "shop": (0,), "page": (2, 1, 2)}


def _parameters(rng, config=CONFIG):
    """Random tables and projections of each feature, and as the collection takes them."""
    tables, projections = {}, {}
    for name, cfg in config.own_configs.items():
        tables[name], projection = parameters(cfg, rng)
        if projection is not None:
            projections[name] = projection if cfg.use_bias else projection._replace(bias=None)
    return tables, collection.stack(tables, config), projections


def _ids(rng, names=FEATURES):
    """With duplicates; and bad ids, but where these are an error."""
    ids = {}
    for name in names:
        cfg = CONFIG.configs[name]
        bad = 0 if cfg.id_policy == "raise" else 2
        drawn = rng.integers(-bad, cfg.num_embeddings + bad, SHAPES.get(name, (5,)))
        ids[name] = np.asarray(drawn, np.int32)
    return ids


def _own(values, name):
    """Of a feature's own tables or projection, or of those that it shares."""
    return values.get(CONFIG.owner_of[name])


def _tolerance(name):
    return 1e-5 if CONFIG.configs[name].vector_dtype == jnp.float32 else 2**-5


# --- look-up --------------------------------------------------------------------------------------


def test_it_equals_the_look_up_of_each_feature(rng):
    tables, stacks, projections = _parameters(rng)
    ids = _ids(rng)
    got = collection.lookup(stacks, ids, CONFIG, projections)
    assert list(got) == list(ids)
    for name, vectors in got.items():
        cfg, own = CONFIG.configs[name], _own(tables, name)
        alone = qrhash.lookup(own, ids[name], cfg, _own(projections, name))
        assert (vectors.shape, vectors.dtype) == (alone.shape, alone.dtype)
        assert_close(vectors, np.float64(alone), _tolerance(name))
        want = oracle.lookup(own, ids[name], cfg, _own(projections, name))
        assert_close(vectors, want, _tolerance(name))


@pytest.mark.parametrize("names", [["item"], ["last_item"], ["word", "hour"], ["site", "user"], []])
def test_any_of_the_features_in_any_order(names, rng):
    tables, stacks, projections = _parameters(rng)
    ids = _ids(rng, names)
    got = collection.lookup(stacks, ids, CONFIG, projections)
    assert list(got) == names
    for name in names:
        cfg = CONFIG.configs[name]
        want = oracle.lookup(_own(tables, name), ids[name], cfg, _own(projections, name))
        assert_close(got[name], want, _tolerance(name))


TRACED = [name for name in FEATURES if CONFIG.configs[name].id_policy != "raise"]


def _loss(params, ids, weights):
    stacks, projections = params
    total = 0.0
    for name, vectors in collection.lookup(stacks, ids, CONFIG, projections).items():
        good = (ids[name] >= 0) & (ids[name] < CONFIG.configs[name].num_embeddings)
        vectors = jnp.where(good[..., None], vectors.astype(jnp.float32), 0)
        total += (vectors * weights[name]).sum()
    return total


def _masked(cfg, ids, weights):
    """Weights of ids beyond the vocabulary are zero, whatever id the policy makes of them."""
    return np.where(((ids >= 0) & (ids < cfg.num_embeddings))[..., None], weights, 0)


@pytest.mark.parametrize(
    ("by_rows", "one_hot_rows"), [(False, 0), (False, 8), (True, 0), (True, 8)]
)
def test_gradients_equal_those_of_each_feature(by_rows, one_hot_rows, rng, monkeypatch):
    """Dense, and by rows: shared tables collect from all that share them."""
    monkeypatch.setattr(qrhash.tuning, "one_hot_rows", lambda _: one_hot_rows)
    tables, stacks, projections = _parameters(rng)
    gradient = (
        qrhash.value_and_grad(_loss, (CONFIG.large_tables, False))
        if by_rows
        else jax.value_and_grad(_loss)
    )
    step = jax.jit(gradient)
    for _ in range(2):
        ids = _ids(rng, TRACED)
        weights = {
            name: rng.standard_normal((*i.shape, CONFIG.configs[name].features)).astype(np.float32)
            for name, i in ids.items()
        }
        _, (grads, projection_grads) = step((stacks, projections), ids, weights)
        for name, is_large in CONFIG.large_tables.items():
            assert isinstance(grads[name], RowGrads) == (by_rows and is_large)
        dense = {k: g.to_dense() if isinstance(g, RowGrads) else g for k, g in grads.items()}
        by_feature = collection.unstack(dense, CONFIG)
        for name, cfg in CONFIG.own_configs.items():
            users = [user for user in TRACED if CONFIG.owner_of[user] == name]
            want, want_projection = oracle.gradient(
                tables[name],
                [ids[user] for user in users],
                [_masked(cfg, ids[user], weights[user]) for user in users],
                cfg,
                projections.get(name),
            )
            is_wide = {cfg.param_dtype, cfg.vector_dtype} == {jnp.dtype("float32")}
            for got, expected in zip(by_feature[name], want, strict=True):
                assert_close(got, expected, 1e-5 if is_wide else 2**-5)
            if want_projection is not None:
                for got, expected in zip(projection_grads[name], want_projection, strict=True):
                    if got is not None:
                        assert_close(got, expected)
    assert step._cache_size() == 1


def test_one_gather_for_each_stack(rng):
    _, stacks, projections = _parameters(rng)
    ids = _ids(rng, TRACED)
    jaxpr = jax.make_jaxpr(lambda *args: collection.lookup(*args, CONFIG, projections))(stacks, ids)
    assert str(jaxpr).count("= gather[") <= len(CONFIG.stacks)


def test_ids_from_the_host_of_a_vocabulary_beyond_int32(rng):
    p = qrhash.MixedRadix.balanced(2**40, 4)
    config = CollectionConfig({"a": EmbedConfig(p, 4), "b": EmbedConfig(p, 4), "c": "b"})
    tables, stacks, _ = _parameters(rng, config)
    ids = np.array([0, 2**32 + 1, 2**40 - 1, 2**40, -1])
    got = collection.lookup(stacks, {"a": ids, "b": ids[::-1], "c": ids}, config)
    assert_close(got["a"], oracle.lookup(tables["a"], ids, config.configs["a"]))
    assert_close(got["b"], oracle.lookup(tables["b"], ids[::-1], config.configs["b"]))
    assert_close(got["c"], oracle.lookup(tables["b"], ids, config.configs["b"]))


def test_policy_raise_names_the_id(rng):
    _, stacks, projections = _parameters(rng)
    with pytest.raises(ValueError, match=r"\b11\b"):
        collection.lookup(stacks, {"checked": np.array([3, 11])}, CONFIG, projections)


# --- one pool -------------------------------------------------------------------------------------


def _pool(names=("user", "item", "shop")):
    one = EmbedConfig(qrhash.MultiHash((13, 7), seed=5), 8, "concat", large_table_rows=10)
    return CollectionConfig.one_pool(names, one)


def test_features_in_one_pool_have_rows_of_one_set_of_tables_by_hashes_of_their_own(rng):
    config = _pool()
    tables, stacks, _ = _parameters(rng, config)
    keys = qrhash.Keys.of(rng.integers(0, 2**62, 40))
    got = collection.lookup(stacks, {"user": keys, "item": keys, "shop": keys[:3]}, config)
    partitions = {each.partition for each in config.configs.values()}
    assert len(partitions) == 3
    assert list(tables) == ["user"]
    for name, vectors in got.items():
        alone = qrhash.lookup(tables["user"], keys[: len(vectors)], config.configs[name])
        assert_close(vectors, np.float64(alone))
    assert not np.allclose(got["user"], got["item"])


def test_rows_in_a_pool_go_by_the_feature_s_name_and_not_by_its_place():
    alone, more = _pool(["item"]), _pool(["user", "shop", "item"])
    assert alone.configs["item"].partition == more.configs["item"].partition


def test_a_pool_is_trained_by_rows_of_all_its_features(rng):
    config = _pool()
    tables, stacks, _ = _parameters(rng, config)
    keys = qrhash.Keys.of(rng.integers(0, 2**62, 9))

    def loss(tables, by_collection):
        if by_collection:
            vectors = collection.lookup(tables, dict.fromkeys(config.configs, keys), config)
        else:
            vectors = {n: qrhash.lookup(tables, keys, c) for n, c in config.configs.items()}
        return sum((vector**3).sum() for vector in vectors.values())

    by_rows = qrhash.value_and_grad(lambda s: loss(s, True), config.large_tables)
    _, grads = by_rows(stacks)
    want = jax.grad(loss)(tables["user"], False)
    got = {name: g.to_dense() if isinstance(g, RowGrads) else g for name, g in grads.items()}
    jax.tree.map(assert_close, collection.unstack(got, config)["user"], want)


def test_a_pool_as_json_and_what_is_none():
    config = _pool()
    assert CollectionConfig.from_dict(config.to_dict()) == config
    own = qrhash.MultiHash((5, 7))
    shared = {
        "a": qrhash.EmbedConfig(own, 4),
        "b": qrhash.stacks.Shared("a", combiner="sum"),
        "c": qrhash.stacks.Shared("a", dataclasses.replace(own, seed=3), "max"),
    }
    of_lists = CollectionConfig(shared)
    assert CollectionConfig.from_dict(json.loads(json.dumps(of_lists.to_dict()))) == of_lists
    with pytest.raises(ValueError, match="partition with a seed"):
        CollectionConfig.one_pool(["a"], EmbedConfig(qrhash.FullTable(3), 2))
    with pytest.raises(ValueError, match="features must be names, each once"):
        CollectionConfig.one_pool(["a", "a"], config.configs["user"])
    other = qrhash.stacks.Shared("user", qrhash.MultiHash((3, 7)))
    with pytest.raises(ValueError, match="tables of the same shapes"):
        CollectionConfig({"user": config.configs["user"], "b": other})


# --- stacks ---------------------------------------------------------------------------------------


def test_stacks_are_few_and_say_what_they_hold():
    """One for each kind, width and dtype that there is."""
    kinds = {
        (is_large, width, cfg.param_dtype)
        for cfg in CONFIG.own_configs.values()
        for is_large, (_, width) in zip(cfg.large_tables, cfg.table_shapes, strict=True)
    }
    assert len(CONFIG.stacks) == len(kinds) == 5
    assert {(s.is_large, s.width, s.dtype) for s in CONFIG.stacks} == kinds
    assert CONFIG.large_tables == {s.name: s.is_large for s in CONFIG.stacks}
    assert len({s.name for s in CONFIG.stacks}) == len(CONFIG.stacks)
    columns = {f"c{j}": EmbedConfig(qrhash.QuotientRemainder(4000 + j), 16) for j in range(26)}
    columns |= {"rare": EmbedConfig(qrhash.QuotientRemainder(10**6, 4), 16), "too": "rare"}
    config = CollectionConfig(columns)
    assert [s.is_large for s in config.stacks] == [True, False]
    assert [s.shape[1] for s in config.stacks] == [16, 16]
    rows = sum(sum(cfg.partition.num_rows) for cfg in config.own_configs.values())
    assert sum(s.shape[0] for s in config.stacks) == rows


def test_every_table_has_a_place_of_its_own():
    for stack in CONFIG.stacks:
        spans = (range(span.offset, span.offset + span.num_rows) for span in stack.spans)
        assert list(itertools.chain(*spans)) == list(range(stack.shape[0]))
    places = [(p.feature, p.table) for stack in CONFIG.stacks for p in stack.spans]
    assert len(places) == len(set(places)) == sum(c.num_tables for c in CONFIG.own_configs.values())


def test_stack_and_unstack_are_inverse(rng):
    tables, stacks, _ = _parameters(rng)
    assert {s.name: (s.shape, s.dtype) for s in CONFIG.stacks} == {
        name: (table.shape, table.dtype) for name, table in stacks.items()
    }
    there = collection.unstack(stacks, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, there, tables)
    jax.tree.map(np.testing.assert_array_equal, collection.stack(there, CONFIG), stacks)
    per_row = {name: table[:, 0] for name, table in stacks.items()}  # as row-wise state
    back = collection.stack(collection.unstack(per_row, CONFIG), CONFIG)
    jax.tree.map(np.testing.assert_array_equal, back, per_row)


def test_tables_that_do_not_fit_are_refused(rng):
    tables, _, _ = _parameters(rng)
    fewer = {name: table for name, table in tables.items() if name != "day"}
    with pytest.raises(ValueError, match=r"'day'.*\(7,\).*\(\)"):
        collection.stack(fewer, CONFIG)
    with pytest.raises(ValueError, match=r"'item'.*\(3, 4\).*\(4, 3\)"):
        collection.stack(tables | {"item": tables["item"][::-1]}, CONFIG)


def test_tables_start_as_their_features_would():
    """Each with its own initializer, where it belongs; and no two alike."""
    constants = {
        f"f{j}": _embed(qrhash.FullTable(j + 2), 4, embedding_init=nn.initializers.constant(j))
        for j in range(3)
    }
    config = CollectionConfig(constants)
    tables = collection.unstack(collection.init(jax.random.key(0), config), config)
    for j in range(3):
        assert tables[f"f{j}"][0].tolist() == [[j] * 4] * (j + 2)
    stacks = collection.init(jax.random.key(0), CONFIG)
    tables = collection.unstack(stacks, CONFIG)
    flat = [np.float64(t).ravel() for t in itertools.chain(*tables.values())]
    assert all(len(np.unique(t)) > 1 for t in flat)
    assert len({t[0] for t in flat}) == len(flat)
    for name, cfg in CONFIG.own_configs.items():
        alone = qrhash.init(jax.random.key(1), cfg)
        for ours, theirs in zip(tables[name], alone, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            if ours.size > 30:
                assert 0.3 < np.std(np.float64(ours)) / np.std(np.float64(theirs)) < 3
    again = collection.init(jax.random.key(0), CONFIG)
    jax.tree.map(np.testing.assert_array_equal, again, stacks)
    projections = collection.init_projections(jax.random.key(0), CONFIG)
    assert {k: (p.kernel.shape, p.bias is None) for k, p in projections.items()} == {
        name: (CONFIG.configs[name].projection_shape, name == "word")
        for name in ("page", "word", "project twin")
    }


def test_what_outgrows_32_bits_starts_another_stack():
    embed = lambda n: _embed(qrhash.FullTable(n), 1)  # noqa: E731
    sizes = {"a": 2**31 - 2, "b": 3000, "c": 2**29, "d": 2**30}
    config = CollectionConfig({name: embed(n) for name, n in sizes.items()})
    assert all(stack.shape[0] < 2**31 for stack in config.stacks)
    assert len(config.stacks) == 2
    shapes = {s.name: jax.ShapeDtypeStruct(s.shape, s.dtype) for s in config.stacks}
    ids = {name: np.array([n - 1, n]) for name, n in sizes.items()}
    vectors = jax.eval_shape(lambda stacks: collection.lookup(stacks, ids, config), shapes)
    assert {v.shape for v in vectors.values()} == {(2, 1)}


# --- configs --------------------------------------------------------------------------------------


def test_a_config_is_frozen_hashable_and_says_who_shares():
    same = CollectionConfig(dict(FEATURES))
    assert same == CONFIG
    assert hash(same) == hash(CONFIG)
    assert CollectionConfig({"item": FEATURES["item"]}) != CONFIG
    with pytest.raises(AttributeError):
        CONFIG.embeddings = {}
    assert CONFIG.configs["last_item"] is CONFIG.configs["item"] is FEATURES["item"]
    assert list(CONFIG.configs) == list(FEATURES)
    assert {k: v for k, v in CONFIG.owner_of.items() if k != v} == {
        "last_item": "item",
        "last_page": "page",
    }
    assert "last_item" not in CONFIG.own_configs
    lookup = jax.jit(collection.lookup, static_argnums=2)
    stacks = collection.init(jax.random.key(0), CONFIG)
    for config in (CONFIG, same):
        lookup(stacks, {"item": jnp.array([1])}, config)
    assert lookup._cache_size() == 1


ITEM = FEATURES["item"]


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"item": ITEM, "last": "itme"}, r"'last'.*'itme'"),
        ({"item": ITEM, "last": "item", "first": "last"}, r"'first'.*'last'"),
        ({"a": "b", "b": "a"}, r"'a'.*'b'"),
        ({"a": "a"}, r"'a'.*'a'"),
        ({"item": ITEM.partition}, r"'item'.*EmbedConfig"),
        ({"item": None}, r"'item'.*None"),
        ({3: ITEM}, "name.*3"),
        (
            {"a": ITEM, "b": _embed(ITEM.partition, 8, logical_axes=("x", None))},
            r"logical_axes.*'x'.*None",
        ),
    ],
)
def test_bad_configs_are_refused_in_words(features, words):
    with pytest.raises(ValueError, match=words):
        CollectionConfig(features)


def test_ids_of_an_unknown_feature_are_refused_in_words(rng):
    _, stacks, _ = _parameters(rng)
    with pytest.raises(ValueError, match=r"item.*'itme'"):
        collection.lookup(stacks, {"itme": np.array([1])}, CONFIG)


@pytest.mark.parametrize("operation", ["add", "mult"])
def test_stacks_of_another_shape_are_refused(operation, rng):
    """As `qrhash.lookup` refuses tables of another shape: else rows would be another feature's."""
    config = CollectionConfig({"item": _embed(ITEM.partition, 8, operation)})
    _, stacks, _ = _parameters(rng, config)
    shorter = {name: table[:-1] for name, table in stacks.items()}
    with pytest.raises((AssertionError, ValueError)):
        collection.lookup(shorter, {"item": np.array([10])}, config)


# --- Flax -----------------------------------------------------------------------------------------


def _linen(stacks, projections):
    """The documented parameters of a linen or NNX module."""
    params = dict(stacks)
    for name, projection in projections.items():
        params |= {
            f"{name}_{field}": value
            for field, value in projection._asdict().items()
            if value is not None
        }
    return params


def test_both_flax_modules_agree_with_the_pure_functions(rng):
    _, stacks, projections = _parameters(rng)
    params = _linen(stacks, projections)
    ids = _ids(rng, TRACED)
    want = collection.lookup(stacks, ids, CONFIG, projections)
    linen = qrhash.linen.EmbedCollection(CONFIG)
    made = nn.unbox(linen.init(jax.random.key(0), ids))["params"]
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {
        k: (v.shape, v.dtype) for k, v in params.items()
    }
    embed = qrhash.nnx.EmbedCollection(CONFIG, rngs=nnx.Rngs(0))
    nnx.update(embed, params)
    assert set(nnx.to_pure_dict(nnx.state(embed))) == set(params)
    for got in (
        jax.jit(linen.apply)({"params": params}, ids),
        nnx.jit(lambda embed, ids: embed(ids))(embed, ids),
    ):
        assert set(got) == set(want)
        for name in want:
            assert_close(got[name], np.float64(want[name]), _tolerance(name))


def test_linen_marks_large_tables():
    ids = {"item": np.array([1])}
    linen = qrhash.linen.EmbedCollection(CONFIG)
    variables = jax.eval_shape(linen.init, jax.random.key(0), ids)
    marks = qrhash.linen.large_tables(variables)["params"]
    names = ["page_kernel", "page_bias", "word_kernel", "project twin_kernel", "project twin_bias"]
    assert marks == CONFIG.large_tables | dict.fromkeys(names, False)
    with pytest.raises(ValueError, match=r"no table of qrhash.*unbox"):
        qrhash.linen.large_tables(nn.unbox(variables))


def test_nnx_gives_and_takes_tables_by_feature(rng):
    tables, _, _ = _parameters(rng)
    embed = qrhash.nnx.EmbedCollection(FEATURES, rngs=nnx.Rngs(0))
    assert embed.config == CONFIG
    embed.set_tables(tables)
    jax.tree.map(np.testing.assert_array_equal, embed.tables, tables)
    ids = np.array([3, 3, 10])
    assert_close(embed({"item": ids})["item"], oracle.lookup(tables["item"], ids, ITEM))
    with pytest.raises(ValueError, match="'item'"):
        embed.set_tables(tables | {"item": tables["item"][:1]})
    with pytest.raises(ValueError, match="'unheard of'"):
        embed.set_tables(tables | {"unheard of": tables["item"]})
    narrow = jax.tree.map(lambda table: table[:, :1], tables)
    with pytest.raises(ValueError, match=r"must stack up to .* got"):
        embed.set_tables(narrow)


@pytest.mark.parametrize("axes", [None, ("rows", "features")])
def test_partition_metadata_of_both(axes):
    """None unless asked for; large stacks are split by rows, small ones are not."""
    config = CollectionConfig(
        {
            name: dataclasses.replace(of, logical_axes=axes) if isinstance(of, EmbedConfig) else of
            for name, of in CONFIG.embeddings
        }
    )
    ids = {"item": np.array([1])}
    linen = qrhash.linen.EmbedCollection(config)
    variables = jax.eval_shape(linen.init, jax.random.key(0), ids)
    by_linen = nn.get_partition_spec(variables)["params"]
    make = lambda: qrhash.nnx.EmbedCollection(config, rngs=nnx.Rngs(0))  # noqa: E731
    by_nnx = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(nnx.eval_shape(make))))
    for name, is_large in config.large_tables.items():
        want = jax.P() if axes is None else jax.P("rows" if is_large else None, "features")
        assert (by_linen[name] or jax.P()) == want
        assert (by_nnx[name] or jax.P()) == want


def test_what_is_missing_is_named(rng):
    _, stacks, projections = _parameters(rng)
    first = next(iter(stacks))
    with pytest.raises(ValueError, match=f"{first} is missing"):
        collection.lookup({k: stacks[k] for k in stacks if k != first}, {}, CONFIG, projections)
    with pytest.raises(ValueError, match="projection of 'page' is missing"):
        collection.lookup(stacks, {"page": np.array([1])}, CONFIG)
    with pytest.raises(ValueError, match="mapping of names"):
        CollectionConfig(ITEM)
    with pytest.raises(ValueError, match="mapping of feature names"):
        collection.lookup(stacks, np.array([1]), CONFIG, projections)


def test_linen_takes_a_mapping_too():
    ids = {"item": np.array([1])}
    by_mapping = qrhash.linen.EmbedCollection({"item": ITEM})
    by_config = qrhash.linen.EmbedCollection(CollectionConfig({"item": ITEM}))
    key = jax.random.key(0)
    vectors = [embed.init_with_output(key, ids)[0]["item"] for embed in (by_mapping, by_config)]
    np.testing.assert_array_equal(*vectors)


def test_a_mapping_will_do_for_a_config_and_nothing_else(rng):
    one = {"a": EmbedConfig(qrhash.FullTable(5), 4)}
    stacks = collection.init(jax.random.key(0), one)
    ids = {"a": jnp.array([1, 2])}
    want = collection.lookup(stacks, ids, CollectionConfig(one))["a"]
    assert_close(collection.lookup(stacks, ids, one)["a"], want)
    jax.tree.map(assert_close, collection.stack(collection.unstack(stacks, one), one), stacks)
    for use in (
        lambda: collection.init(jax.random.key(0), one["a"]),
        lambda: collection.lookup(stacks, ids, one["a"]),
        lambda: collection.lookup(None, ids, one),
        lambda: collection.lookup(stacks, ids, one, jnp.ones(3)),
        lambda: collection.unstack({}, one),
    ):
        with pytest.raises(ValueError, match=r"must be"):
            use()


@pytest.mark.parametrize("least", [16, 64, 4096])
def test_how_many_rows_are_drawn_at_once_changes_no_number(least, monkeypatch):
    sizes = {"a": 3, "b": 100, "c": 1030, "d": 33, "e": 4096}
    tables = {name: qrhash.FullTable(size) for name, size in sizes.items()}
    config = CollectionConfig({name: _embed(table, 4) for name, table in tables.items()})
    want = collection.init(jax.random.key(3), config)
    monkeypatch.setattr(initializers, "FEWEST_DRAWN", least)
    monkeypatch.setattr(initializers, "DRAWN_AT_ONCE", 4096)
    got = collection.init(jax.random.key(3), config)
    jax.tree.map(np.testing.assert_array_equal, got, want)
