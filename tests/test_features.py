"""Operation "features": the k rows of an id as k vectors, wherever vectors are looked up."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qrhash
from qrhash.dynamic import DynamicConfig
from support import oracle
from support.cases import FAMILIES, FEATURES, assert_close, config, parameters
from support.meshes import dense, layout_2x4

THREE = FAMILIES["mixed radix"]
IDS = np.array([[0, 28, 5], [29, -1, 7]], np.int32)


def _as_one_vector(cfg):
    """The config whose vectors are these, side by side: what the oracle knows."""
    width = cfg.num_tables * cfg.features
    return dataclasses.replace(cfg, operation="concat", features=width, widths=cfg.widths)


def _want(tables, ids, cfg):
    flat = oracle.lookup(tables, ids, _as_one_vector(cfg))
    return flat.reshape(*np.shape(ids), cfg.num_tables, cfg.features)


@pytest.mark.parametrize("policy", ["nan", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_a_vector(family, policy, rng):
    cfg = config(family, "features", id_policy=policy)
    tables, projection = parameters(cfg, rng)
    assert projection is None
    assert cfg.vector_shape == (cfg.num_tables, FEATURES)
    for ids in (IDS, IDS[0, 0], IDS[:0]):
        want = _want(tables, ids, cfg)
        assert_close(qrhash.lookup(tables, ids, cfg), want)
        assert_close(jax.jit(qrhash.lookup, static_argnums=2)(tables, ids, cfg), want)
        indices = cfg.indices(ids)
        assert_close(qrhash.combine_rows(qrhash.gather(tables, indices), indices, cfg), want)


def test_combine_stacks_the_rows(rng):
    rows = [jnp.asarray(rng.standard_normal((2, 4)), jnp.float32) for _ in range(3)]
    np.testing.assert_array_equal(qrhash.combine(rows, "features"), np.stack(rows, axis=1))
    with pytest.raises(ValueError, match=r"one shape .*'features'.*\(2, 3\)"):
        qrhash.combine([rows[0], rows[1][:, :3]], "features")


def test_the_padding_id_is_zeros_in_every_vector(rng):
    cfg = config("mixed radix", "features", padding_id=5)
    tables, _ = parameters(cfg, rng)
    vectors = np.asarray(qrhash.lookup(tables, jnp.array([5, 6, 29]), cfg))
    assert (vectors[0] == 0).all()
    assert_close(vectors[1], _want(tables, [6], cfg)[0])
    assert np.isnan(vectors[2]).all()
    query = rng.standard_normal((2, 3, FEATURES)).astype(np.float32)
    assert (np.asarray(qrhash.attend(tables, query, cfg))[:, 5] == 0).all()


def test_gradients_dense_and_by_rows_equal_those_of_loops(rng):
    cfg = config("mixed radix", "features", id_policy="zero", large_table_rows=4)
    tables, _ = parameters(cfg, rng)
    weights = rng.standard_normal((*IDS.shape, *cfg.vector_shape)).astype(np.float32)
    flat = weights.reshape(*IDS.shape, -1)
    want, _ = oracle.gradient(tables, [IDS], [flat], _as_one_vector(cfg))
    loss = lambda tables: jnp.sum(weights * qrhash.lookup(tables, IDS, cfg))  # noqa: E731
    for grad in (jax.grad(loss), qrhash.value_and_grad(loss, large=cfg.large_tables)):
        got = jax.jit(grad)(tables)
        for g, w in zip(dense(got[1] if len(got) == 2 else got), want, strict=True):
            assert_close(g, w)


@pytest.mark.parametrize("pool_rows", [False, True])
@pytest.mark.parametrize("combiner", ["mean", "max"])
def test_bags_are_pooled_vector_by_vector(combiner, pool_rows, rng):
    cfg = config("mixed radix", "features", combiner=combiner, pool_rows=pool_rows)
    tables, _ = parameters(cfg, rng)
    lists = [[1, 2, 2], [], [28]]
    want = oracle.lookup_bags(tables, lists, _as_one_vector(cfg)).reshape(3, *cfg.vector_shape)
    assert_close(qrhash.lookup(tables, qrhash.Bag.from_lists(lists), cfg), want)


def test_bags_are_summed_up_at_once_vector_by_vector(rng, monkeypatch):
    cfg = config("mixed radix", "features", combiner="mean")
    tables, _ = parameters(cfg, rng)
    lists = [[1, 2, 2], [], [28]]
    want = oracle.lookup_bags(tables, lists, _as_one_vector(cfg)).reshape(3, *cfg.vector_shape)
    monkeypatch.setattr(qrhash.tuning, "sums_at_once", lambda *_: True)
    assert_close(qrhash.lookup(tables, qrhash.Bag.from_lists(lists), cfg), want)


def test_logits_are_sums_of_the_inner_products_and_all_vectors_are_there(rng):
    cfg = config("mixed radix", "features")
    tables, _ = parameters(cfg, rng)
    every = _want(tables, np.arange(29), cfg)
    assert_close(qrhash.all_vectors(tables, cfg), every)
    query = rng.standard_normal((2, 1, 3, FEATURES)).astype(np.float32)
    logits = jax.jit(qrhash.attend, static_argnums=2)(tables, query, cfg)
    assert_close(logits, np.einsum("abkf,nkf->abn", query, every))
    with pytest.raises(ValueError, match=r"\[\*shape, k, features\], \(3, 8\).*got \(2, 8\)"):
        qrhash.attend(tables, query[:, 0, 0], cfg)


def test_modules_and_collections_on_a_mesh_give_the_same(rng):
    layout = layout_2x4()
    cfg = config("mixed radix", "features", large_table_rows=5)
    sharded = dataclasses.replace(cfg, layout=layout)
    tables, _ = parameters(cfg, rng)
    ids = np.arange(8, dtype=np.int32)
    want = _want(tables, ids, cfg)
    embed = qrhash.nnx.MultiHashEmbed(sharded, rngs=nnx.Rngs(0))
    embed.set_tables(tables)
    assert_close(nnx.jit(lambda embed, ids: embed(ids))(embed, ids), want)
    params = {"params": qrhash.linen.params_from_tables(tables, sharded)}
    assert_close(qrhash.linen.MultiHashEmbed(sharded).apply(params, ids), want)
    one = dataclasses.replace(sharded, operation="add")
    many = qrhash.CollectionConfig({"a": sharded, "b": "a", "c": one})
    stacks = qrhash.collection.as_stacks({"a": tables, "c": tables}, many)
    batch = {"a": ids, "b": ids[::-1].copy(), "c": ids}
    vectors = jax.jit(qrhash.collection.lookup, static_argnums=2)(stacks, batch, many)
    assert_close(vectors["a"], want)
    assert_close(vectors["b"], want[::-1])
    assert_close(vectors["c"], want.sum(axis=1))


def test_vectors_start_as_those_of_full_tables():
    cfg = qrhash.EmbedConfig(qrhash.QuotientRemainder(10**6), 32, "features")
    vectors = qrhash.lookup(qrhash.init(jax.random.key(0), cfg), np.arange(0, 10**6, 999), cfg)
    np.testing.assert_allclose(np.std(vectors, axis=(0, 2)), 0.03, rtol=0.05)


def test_the_config_checks_widths_and_comes_back_from_json():
    cfg = qrhash.EmbedConfig(THREE, 4, "features")
    assert cfg.widths == (4, 4, 4)
    assert qrhash.EmbedConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    with pytest.raises(ValueError, match=r"widths must all be features=4 for 'features'"):
        qrhash.EmbedConfig(THREE, 4, "features", widths=(4, 4, 2))


def test_a_row_of_its_own_cannot_start_as_several_vectors():
    refused = qrhash.EmbedConfig(qrhash.KeyDigits(num_tables=4), 8, "features")
    with pytest.raises(ValueError, match="refused must have an operation that makes one vector"):
        DynamicConfig(10, 8, refused=refused)
