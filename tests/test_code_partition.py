"""Codes given by the user: exact, told apart on request, and small in programs and in JSON."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import qrhash
from qrhash.checkpoint import Checkpoints, MismatchError
from support import oracle
from support.cases import assert_close, parameters
from support.meshes import dense, layout_2x4

CARS = np.array([[0, 3], [1, 0], [0, 3], [2, 0], [1, 0], [0, 3]])
SETS = [[0, 2, 5], [1, 4]]  # of equal codes


@st.composite
def _tables_of_codes(draw):
    n, k = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(0, draw(st.sampled_from([1, 3, 300])), (n, k))


@given(codes=_tables_of_codes())
def test_complementarity_and_twins_are_those_of_a_dictionary(codes):
    p, whole = qrhash.CodePartition(codes), qrhash.CodePartition(codes, tie_breaker=True)
    ids_of = {}
    for i, code in enumerate(map(tuple, codes.tolist())):
        ids_of.setdefault(code, []).append(i)
    want = [ids for ids in ids_of.values() if len(ids) > 1]
    assert [ids.tolist() for ids in p.twins()] == [ids.tolist() for ids in whole.twins()] == want
    assert p.is_complementary == oracle.is_complementary(p) == (not want)
    assert whole.is_complementary
    assert oracle.is_complementary(whole)
    assert whole.num_rows == (*p.num_rows, max(map(len, ids_of.values())))


@given(codes=_tables_of_codes(), data=st.data())
def test_every_tuple_of_row_numbers_has_its_id_or_none(codes, data):
    p = qrhash.CodePartition(codes, tie_breaker=True)
    per_table = [st.integers(-1, rows) for rows in p.num_rows]
    drawn = data.draw(st.lists(st.tuples(*per_table), min_size=1, max_size=20))
    found = oracle.inverse(p)
    want = [found.get(rows, -1) for rows in drawn]
    np.testing.assert_array_equal(p.ids(*np.array(drawn).T), want)


def test_the_inverse_is_the_same_on_the_device(rng):
    p = qrhash.CodePartition(rng.integers(0, 3, (50, 2)), tie_breaker=True)
    grid = [g.ravel() for g in np.meshgrid(*(np.arange(-1, rows + 1) for rows in p.num_rows))]
    back = jax.jit(p.ids)(*map(jnp.asarray, grid))
    assert set(back.tolist()) == {-1, *range(50)}
    np.testing.assert_array_equal(back, p.ids(*grid))


def test_ids_of_equal_codes_are_named_where_they_are_refused():
    p = qrhash.CodePartition(CARS)
    assert [ids.tolist() for ids in p.twins()] == SETS
    with pytest.raises(ValueError, match=r"2 sets .*equal codes.*0, 2, 5; 1, 4.*tie_brea"):
        p.ids(np.array([0]), np.array([3]))


def test_equal_codes_make_equal_partitions_whatever_holds_them():
    p = qrhash.CodePartition(CARS, (3, 4))
    others = [
        qrhash.CodePartition(jnp.asarray(CARS)),
        qrhash.CodePartition(CARS.astype(np.uint8), [3, 4]),
        qrhash.CodePartition(CARS.tolist()),
        pickle.loads(pickle.dumps(p)),
        qrhash.Partition.from_dict(json.loads(json.dumps(p.to_dict()))),
    ]
    for other in others:
        assert p == other
        assert hash(p) == hash(other)
        np.testing.assert_array_equal(other.codes, CARS)
    moved = CARS[::-1]
    different = [
        qrhash.CodePartition(moved),
        qrhash.CodePartition(CARS, (3, 5)),
        qrhash.CodePartition(CARS, tie_breaker=True),
        qrhash.CodePartition(CARS.reshape(-1, 1)),
    ]
    assert p not in different


def test_codes_are_the_partitions_own():
    given = CARS.copy()
    p = qrhash.CodePartition(given)
    given[:] = 0
    np.testing.assert_array_equal(p.codes, CARS)
    with pytest.raises(ValueError, match="read-only"):
        p.codes[0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.tie_breaker = True


@pytest.mark.parametrize(("greatest", "dtype"), [(255, "uint8"), (256, "uint16"), (65536, "int32")])
def test_codes_are_kept_narrow_and_come_out_whole(greatest, dtype):
    p = qrhash.CodePartition([[0], [greatest]])
    assert p.codes.dtype == dtype
    assert p.num_rows == (greatest + 1,)
    for ids in (np.arange(2), jnp.arange(2)):
        (index,) = p.indices(ids)
        assert index.dtype == np.int32
        assert index.tolist() == [0, greatest]
    assert qrhash.Partition.from_dict(p.to_dict()) == p


def test_ranks_above_all_codes_are_whole_too():
    p = qrhash.CodePartition(np.zeros((70_000, 1), int), tie_breaker=True)
    assert p.num_rows == (1, 70_000)
    np.testing.assert_array_equal(p.indices(np.arange(70_000))[1], np.arange(70_000))


def test_programs_hold_one_byte_for_a_small_code_and_none_where_the_host_looks_up():
    codes = np.random.default_rng(0).integers(0, 256, (5000, 2))
    cfg = qrhash.EmbedConfig(qrhash.CodePartition(codes), 4)
    tables = qrhash.init(jax.random.key(0), cfg)
    on_device = jax.jit(lambda tables, ids: qrhash.lookup(tables, ids, cfg))
    text = on_device.lower(tables, jnp.arange(3)).as_text()
    assert "tensor<5000x2xui8>" in text
    assert "tensor<5000x2xi32>" not in text
    by_rows = jax.jit(lambda tables, at: qrhash.combine_rows(qrhash.gather(tables, at), at, cfg))
    at = cfg.indices(np.arange(3))
    assert "5000" not in by_rows.lower(tables, at).as_text()
    np.testing.assert_array_equal(by_rows(tables, at), on_device(tables, jnp.arange(3)))


@pytest.mark.parametrize("tie_breaker", [False, True])
@pytest.mark.parametrize("operation", ["add", "concat", "project"])
def test_vectors_logits_and_modules_equal_the_oracle(operation, tie_breaker, rng):
    p = qrhash.CodePartition(CARS, tie_breaker=tie_breaker)
    cfg = qrhash.EmbedConfig(p, 6, operation, id_policy="zero", large_table_rows=4)
    tables, projection = parameters(cfg, rng)
    ids = np.array([[0, 5, 1], [6, -1, 3]], np.int32)
    want = oracle.lookup(tables, ids, cfg, projection)
    assert_close(qrhash.lookup(tables, ids, cfg, projection), want)
    every = oracle.lookup(tables, np.arange(6), cfg, projection)
    query = rng.standard_normal((2, 6)).astype(np.float32)
    assert_close(qrhash.attend(tables, query, cfg, projection), query @ every.T)
    embed = qrhash.nnx.MultiHashEmbed(cfg, rngs=nnx.Rngs(0))
    embed.set_tables(tables, projection)
    assert_close(nnx.jit(lambda embed, ids: embed(ids))(embed, jnp.asarray(ids)), want)
    params = qrhash.linen.params_from_tables(tables, cfg, projection)
    module = qrhash.linen.MultiHashEmbed(cfg)
    assert_close(module.apply({"params": params}, jnp.asarray(ids)), want)


@pytest.mark.slow
def test_a_collection_on_a_mesh_trains_by_codes(rng):
    """The codes of two features, one of them in the other's tables, and a table split by rows."""
    layout = layout_2x4()
    codes = rng.integers(0, 40, (100, 2))
    p = qrhash.CodePartition(codes, (40, 40), tie_breaker=True)
    other = qrhash.CodePartition(codes[::-1], (40, 40), tie_breaker=True)
    of = {
        where: qrhash.CollectionConfig(
            {
                "item": qrhash.EmbedConfig(p, 4, large_table_rows=40, layout=where),
                "last": qrhash.stacks.Shared("item", other),
            }
        )
        for where in (None, layout)
    }
    ids = {"item": jnp.arange(16), "last": jnp.arange(84, 100)}
    results = []
    for cfg in of.values():
        stacks = qrhash.collection.init(jax.random.key(0), cfg)

        def loss(stacks, cfg=cfg):
            vectors = qrhash.collection.lookup(stacks, ids, cfg)
            return jnp.sum(vectors["item"] * vectors["last"])

        value_and_grad = jax.jit(qrhash.value_and_grad(loss, large=cfg.large_tables))
        value, grads = value_and_grad(stacks)
        results.append((value, dense(grads)))
    (want, want_grads), (got, got_grads) = results
    assert_close(got, want)
    for name, grad in want_grads.items():
        assert np.abs(grad).max() > 0
        assert_close(got_grads[name], grad)


def test_a_checkpoint_of_other_codes_is_refused(tmp_path):
    cfg = qrhash.EmbedConfig(qrhash.CodePartition(CARS), 4)
    tables = qrhash.init(jax.random.key(0), cfg)
    with Checkpoints(tmp_path, cfg) as checkpoints:
        checkpoints.save(1, tables)
    with Checkpoints(tmp_path, cfg) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(tables).state[0], tables[0])
    moved = dataclasses.replace(cfg, partition=qrhash.CodePartition(CARS[::-1]))
    digests = f"partition.*{cfg.partition.digest}.*{moved.partition.digest}"
    with Checkpoints(tmp_path, moved) as other, pytest.raises(MismatchError, match=digests):
        other.restore(tables)


def test_a_config_comes_back_from_json_with_its_codes():
    cfg = qrhash.EmbedConfig(qrhash.CodePartition(CARS, tie_breaker=True), 4)
    back = qrhash.EmbedConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert back == cfg
    np.testing.assert_array_equal(back.partition.codes, CARS)


def _packed(**changes):
    return qrhash.CodePartition(CARS).to_dict()["codes"] | changes


@pytest.mark.parametrize(
    ("args", "options", "words"),
    [
        ([np.zeros(3, int)], {}, ["codes", "[num_embeddings, k]", "(3,)"]),
        ([np.zeros((0, 2), int)], {}, ["codes", "(0, 2)"]),
        ([np.zeros((2, 0), int)], {}, ["codes", "(2, 0)"]),
        ([np.ones((2, 2))], {}, ["codes", "integers", "float64"]),
        ([[[0], [-1]]], {}, ["codes", "-1"]),
        ([[[0], [2**31 - 1]]], {}, ["codes", "2**31", str(2**31 - 1)]),
        ([CARS, (3,)], {}, ["num_codes", "2", "(3,)"]),
        ([CARS, 3], {}, ["num_codes", "3"]),
        ([CARS, (3, 0)], {}, ["num_codes[1]", "positive", "0"]),
        ([CARS, (3, 3)], {}, ["codes[:, 1]", "num_codes[1]=3", "3"]),
        ([CARS], {"tie_breaker": 2}, ["tie_breaker", "2"]),
        ([_packed(dtype="no")], {}, ["codes", "to_dict"]),
        ([_packed(shape=[7, 2])], {}, ["codes", "to_dict"]),
        ([_packed(deflated="AAAA")], {}, ["codes", "to_dict"]),
        ([{}], {}, ["codes", "to_dict"]),
    ],
)
def test_rules_that_are_broken_are_named(args, options, words):
    with pytest.raises(ValueError, match=words[0].split("[")[0]) as error:
        qrhash.CodePartition(*args, **options)
    assert all(word in str(error.value) for word in words), error.value
