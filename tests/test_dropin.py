"""In code that was written for `nn.Embed` and `nnx.Embed`, and knows nothing of qrhash."""

import copy
import dataclasses
import itertools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qrhash
from qrhash import CollectionConfig, EmbedConfig, QuotientRemainder
from support.cases import FAMILIES, FEATURES, OF_EACH_KIND, assert_close, parameters
from support.cases import config as make_config

STANDARD_PROMOTION = True  # Flax's own sums

# A table trained by rows and a small one.
CONFIG = EmbedConfig(QuotientRemainder(1000, 4), 8, large_table_rows=100)
IDS = jnp.array([[1, 5], [999, 0]])


def _mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


# --- linen's and nnx's transformations, without options -------------------------------------------
class _Layer(nn.Module):
    """A layer that looks vectors up, for transformations that lift modules."""

    @nn.compact
    def __call__(self, carry, ids=None):
        vectors = qrhash.linen.MultiHashEmbed(CONFIG)(jnp.zeros((2,), jnp.int32))
        return carry + vectors.sum(), None


class _Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + qrhash.linen.MultiHashEmbed(CONFIG)(jnp.zeros((2,), jnp.int32)).sum()


LIFTED = {
    "scan": lambda: nn.scan(
        _Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )(),
    "vmap": lambda: nn.vmap(
        _Plain, in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True}
    )(),
    "remat_scan": lambda: nn.remat_scan(_Plain, lengths=(2, 2))(),
    "remat": lambda: nn.remat(_Plain)(),
    "jit": lambda: nn.jit(_Plain)(),
}


@pytest.mark.parametrize("name", LIFTED)
def test_linen_transformations_that_add_axes(name):
    model = LIFTED[name]()
    x = jnp.zeros(3) if name == "vmap" else jnp.zeros(())
    args = (x, None) if name == "scan" else (x,)
    variables = model.init(jax.random.key(0), *args)
    assert all(map(np.all, map(np.isfinite, jax.tree.leaves(model.apply(variables, *args)))))
    specs = jax.tree.leaves(nn.get_partition_spec(variables))
    assert all(not any(spec) for spec in specs)
    tables = jax.tree.leaves(nn.unbox(variables))
    assert {table.ndim for table in tables} == {
        2 + {"scan": 1, "vmap": 1, "remat_scan": 2}.get(name, 0)
    }


def test_tables_are_found_also_behind_added_axes():
    variables = LIFTED["vmap"]().init(jax.random.key(0), jnp.zeros(3))
    marks = jax.tree.leaves(qrhash.linen.large_tables(variables["params"]))
    assert marks == [True, False]


@pytest.mark.parametrize("operation", OF_EACH_KIND)
def test_under_a_mesh_without_rules(operation):
    """Where names of axes that no mesh has would be an error."""
    cfg = dataclasses.replace(CONFIG, operation=operation, widths=None)
    mesh = _mesh()
    with jax.set_mesh(mesh):
        linen = qrhash.linen.MultiHashEmbed(cfg)
        variables = jax.jit(linen.init)(jax.random.key(0), IDS)
        nn.get_sharding(variables, mesh)
        linen.apply(variables, IDS)
        model = qrhash.nnx.MultiHashEmbed(cfg, rngs=nnx.Rngs(0))
        state = nnx.state(model)
        nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
        assert nnx.get_named_sharding(state, mesh)
        assert nnx.jit(lambda model: model(IDS))(model).shape == (2, 2, 8)


def test_linen_modules_through_the_bridge():
    model = bridge.ToNNX(qrhash.linen.MultiHashEmbed(CONFIG), rngs=nnx.Rngs(0)).lazy_init(IDS)
    assert model(IDS).shape == (2, 2, 8)
    back = bridge.ToLinen(qrhash.nnx.MultiHashEmbed, args=(CONFIG,))
    variables = back.init(jax.random.key(0), IDS)
    assert back.apply(variables, IDS).shape == (2, 2, 8)


RULES = (("rows", "model"), ("features", None), ("vocab", ("data", "model")), ("embed", None))


@pytest.mark.parametrize(
    ("axes", "large", "small"),
    [
        (("rows", "features"), ("model", None), (None, None)),
        (("vocab", "embed"), (("data", "model"), None), (None, None)),
        (None, (), ()),
    ],
)
def test_logical_axis_rules_put_tables_where_they_say(axes, large, small):
    cfg = dataclasses.replace(CONFIG, logical_axes=axes)
    mesh, model = _mesh(), qrhash.linen.MultiHashEmbed(cfg)
    abstract = jax.eval_shape(model.init, jax.random.key(0), IDS)
    to = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, RULES)["params"]
    for name, spec in (("table_0", large), ("table_1", small)):
        assert to[name].is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), 2)


def test_a_layout_survives_logical_axis_rules():
    """Its axes are the mesh's: to rules they would be unknown logical names."""
    mesh = _mesh()
    cfg = dataclasses.replace(CONFIG, layout=qrhash.MeshLayout(mesh=mesh))
    model = qrhash.linen.MultiHashEmbed(cfg)
    specs = nn.get_partition_spec(jax.eval_shape(model.init, jax.random.key(0), IDS))
    for rules in (RULES, ()):
        to = nn.logical_to_mesh_sharding(specs, mesh, rules)["params"]["table_0"]
        to = jax.tree.leaves(to)[0]
        assert to.is_equivalent_to(NamedSharding(mesh, PartitionSpec("model", None, None)), 3)
    make = lambda: qrhash.nnx.MultiHashEmbed(cfg, rngs=nnx.Rngs(0))  # noqa: E731
    with nnx.logical_axis_rules(RULES):
        state = nnx.get_named_sharding(nnx.state(nnx.eval_shape(make)), mesh)
    (to,) = jax.tree.leaves(state["table_0"])
    assert to.is_equivalent_to(NamedSharding(mesh, PartitionSpec("model", None, None)), 3)


def test_a_table_that_is_not_where_its_layout_says_is_noticed():
    mesh = _mesh()
    cfg = dataclasses.replace(CONFIG, layout=qrhash.MeshLayout(mesh=mesh))
    tables = qrhash.init(jax.random.key(0), cfg)
    vectors = qrhash.lookup(tables, IDS, cfg)  # no warning: warnings are errors here
    lost = jax.device_put(tables, NamedSharding(mesh, PartitionSpec()))
    with pytest.warns(UserWarning, match=r"not where its layout says.*4 times the memory"):
        assert_close(qrhash.lookup(lost, IDS, cfg), vectors)


# --- what nn.Embed has ----------------------------------------------------------------------------
@pytest.mark.parametrize("operation", OF_EACH_KIND)
@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_holds_the_vectors_of_all_ids(family, operation):
    cfg = make_config(family, operation, id_policy="raise")
    model = qrhash.nnx.MultiHashEmbed(cfg, rngs=nnx.Rngs(0))
    every = np.arange(cfg.num_embeddings)
    assert_close(model.embedding, model(every))
    linen = qrhash.linen.MultiHashEmbed(cfg)
    variables = jax.jit(linen.init)(jax.random.key(0), jnp.arange(3))
    assert_close(linen.bind(variables).embedding, linen.apply(variables, every))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_out_sharding(kind):
    mesh = _mesh(kind)
    model = qrhash.nnx.MultiHashEmbed(CONFIG, rngs=nnx.Rngs(0))
    ids, query = jnp.arange(16), jnp.ones((16, 8))
    want, logits = model(ids), model.attend(query)
    with jax.set_mesh(mesh):
        spec = PartitionSpec("data", None)
        got = nnx.jit(lambda model: model(ids, out_sharding=spec))(model)
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
        assert_close(got, want)
        got = nnx.jit(lambda model: model.attend(query, out_sharding=spec))(model)
        assert_close(got, logits)
    with pytest.raises(ValueError, match="out_sharding must be"):
        model(ids, out_sharding="data")


@pytest.mark.parametrize("operation", ["add", "project"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_out_sharding_of_tables_with_a_layout(kind, operation):
    """One table is split over the mesh, one is not; the ids are on one device."""
    mesh = _mesh(kind)
    cfg = dataclasses.replace(CONFIG, operation=operation, widths=None, large_table_rows=5)
    cfg = dataclasses.replace(cfg, layout=qrhash.MeshLayout(mesh=mesh))
    model = qrhash.nnx.MultiHashEmbed(cfg, rngs=nnx.Rngs(0))
    alone = [np.asarray(qrhash.kinds.whole_table(table)) for table in model.tables]
    one = dataclasses.replace(cfg, layout=None)
    ids, query = np.arange(16), jnp.ones((16, 8))
    projection = None
    if model.projection is not None:
        projection = qrhash.Projection(*map(np.asarray, model.projection))
    want = qrhash.lookup(alone, ids, one, projection)
    logits = qrhash.attend(alone, query, one, projection)
    to = NamedSharding(mesh, PartitionSpec("data", None))
    got = model(jnp.asarray(ids), out_sharding=to)
    assert got.sharding.is_equivalent_to(to, 2)
    assert_close(got, want)
    with jax.set_mesh(mesh):
        assert_close(model(ids), want)
        embed = qrhash.nnx.EmbedCollection({"a": cfg, "b": "a"}, rngs=nnx.Rngs(1))
        vectors = embed({"a": jnp.asarray(ids), "b": jnp.asarray(ids[:3])})
        np.testing.assert_array_equal(np.asarray(vectors["a"])[:3], vectors["b"])
        got = nnx.jit(lambda model, query: model.attend(query, out_sharding=to))(model, query)
        assert got.sharding.is_equivalent_to(to, 2)
        assert_close(got, logits)


def test_embedding_of_an_unbound_module_is_refused_in_words():
    with pytest.raises(ValueError, match=r"bind\(variables\)"):
        _ = qrhash.linen.MultiHashEmbed(CONFIG).embedding


# Every id with every policy, and every operation with every policy.
@pytest.mark.parametrize("policy", ["nan", "zero", "clip", "wrap", "raise"])
@pytest.mark.parametrize(
    ("operation", "padding_id"),
    [("mult", 0), ("mult", 10), *((operation, 3) for operation in OF_EACH_KIND)],
)
def test_a_padding_id_is_zeros_without_gradient(operation, padding_id, policy, rng):
    """Any id, without shifting ids; all others as before, bad ones by their policy."""
    plain = make_config("quotient-remainder", operation, id_policy=policy)
    cfg = dataclasses.replace(plain, padding_id=padding_id)
    tables, projection = parameters(cfg, rng)
    ids = np.array([padding_id, 1, padding_id, 5, 4])
    if policy != "raise":
        ids = np.append(ids, [11, -1])
    want = np.array(qrhash.lookup(tables, ids, plain, projection))
    moved = {"clip": ids.clip(0, 10), "wrap": ids % 11}.get(policy, ids)
    want[moved == padding_id] = 0
    for given in (ids, jnp.asarray(ids)):
        np.testing.assert_array_equal(qrhash.lookup(tables, given, cfg, projection), want)
    logits = qrhash.attend(tables, jnp.ones(FEATURES), cfg, projection)
    assert logits[padding_id] == 0
    config = CollectionConfig({"a": cfg, "b": dataclasses.replace(cfg, padding_id=None)})
    stacks = qrhash.collection.stack({"a": tables, "b": tables}, config)
    both = qrhash.collection.lookup(
        stacks, {"a": ids, "b": ids}, config, {"a": projection, "b": projection}
    )
    np.testing.assert_array_equal(both["a"], want)

    def loss(tables):
        return jnp.nansum(
            qrhash.lookup(tables, np.array([padding_id, padding_id]), cfg, projection)
        )

    def both_ways(tables):
        _, by_rows = qrhash.value_and_grad(loss, True)(tables)
        return jax.grad(loss)(tables), [grads.to_dense() for grads in by_rows]

    for gradient in itertools.chain(*jax.jit(both_ways)(tables)):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("padding_id", [-1, 11, 1.5, True, "0"])
def test_a_padding_id_outside_the_vocabulary_is_refused(padding_id):
    with pytest.raises(ValueError, match="padding_id"):
        make_config("quotient-remainder", "mult", padding_id=padding_id)


# --- out of the process and back ------------------------------------------------------------------
WITH_MESH = dataclasses.replace(CONFIG, layout=qrhash.MeshLayout(mesh=_mesh(), exchange="reduce"))
THINGS = {
    **{f"partition, {name}": partition for name, partition in FAMILIES.items()},
    "config": dataclasses.replace(CONFIG, dtype="bfloat16", padding_id=3, widths=(8, 8)),
    "config with a mesh": WITH_MESH,
    "collection": CollectionConfig({"a": CONFIG, "b": "a"}),
    "collection with a mesh": CollectionConfig({"a": WITH_MESH, "b": "a"}),
    "layout": WITH_MESH.layout,
}


@pytest.mark.parametrize("name", THINGS)
def test_configs_are_json_and_pickle(name):
    thing = THINGS[name]
    kind = qrhash.Partition if isinstance(thing, qrhash.Partition) else type(thing)
    assert kind.from_dict(json.loads(json.dumps(thing.to_dict()))) == thing
    for again in (pickle.loads(pickle.dumps(thing)), copy.deepcopy(thing)):
        assert again == thing
        assert hash(again) == hash(thing)


def test_a_mesh_comes_back_over_other_devices():
    values = WITH_MESH.to_dict()
    devices = jax.devices()[::-1]
    back = EmbedConfig.from_dict(values, devices=devices)
    assert list(back.layout.mesh.devices.flat) == devices
    with pytest.raises(ValueError, match=r"devices must be at least 8.*got 3"):
        EmbedConfig.from_dict(values, devices=devices[:3])


@pytest.mark.parametrize("values", [3, {}, {"partition": {"type": "X"}}, {"partition": {}, "x": 1}])
def test_what_is_no_config_is_refused(values):
    with pytest.raises(ValueError, match=r"config|type|partition|features|EmbedConfig"):
        EmbedConfig.from_dict(values)


def test_an_initializer_does_not_turn_into_json_silently():
    cfg = dataclasses.replace(CONFIG, embedding_init=nn.initializers.ones)
    with pytest.raises(ValueError, match="embedding_init"):
        cfg.to_dict()


def test_modules_and_tables_pickle_with_their_places():
    model = qrhash.nnx.MultiHashEmbed(WITH_MESH, rngs=nnx.Rngs(0))
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_close(again(IDS), model(IDS))
        array = again.table_0.get_value()
        assert array.sharding.is_equivalent_to(model.table_0.get_value().sharding, 3)
    table = qrhash.init(jax.random.key(0), WITH_MESH)[0]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(table)).to_array(), table.to_array())
    linen = qrhash.linen.EmbedCollection({"a": CONFIG})
    assert hash(pickle.loads(pickle.dumps(linen))) == hash(linen)


# --- pre-trained tables ---------------------------------------------------------------------------
@pytest.mark.parametrize("on_mesh", [False, True])
def test_pretrained_tables(on_mesh, rng):
    layout = qrhash.MeshLayout(mesh=_mesh()) if on_mesh else None
    cfg = EmbedConfig(
        qrhash.FullTable(500), 8, large_table_rows=100, layout=layout, id_policy="raise"
    )
    matrix = rng.standard_normal((500, 8)).astype(np.float32)
    ids = np.array([3, 499])
    tables = qrhash.as_tables([matrix], cfg)
    np.testing.assert_array_equal(qrhash.lookup(tables, ids, cfg), matrix[ids])
    model = qrhash.nnx.MultiHashEmbed(cfg, rngs=nnx.Rngs(0))
    model.set_tables([matrix])
    np.testing.assert_array_equal(model(ids), matrix[ids])
    np.testing.assert_array_equal(model.embedding, matrix)
    params = qrhash.linen.params_from_tables([matrix], cfg)
    linen = qrhash.linen.MultiHashEmbed(cfg)
    np.testing.assert_array_equal(linen.apply({"params": params}, ids), matrix[ids])
    config = CollectionConfig({"a": cfg, "b": "a"})
    stacks = qrhash.collection.as_stacks({"a": (matrix,)}, config)
    got = qrhash.collection.lookup(stacks, {"b": ids}, config)["b"]
    np.testing.assert_array_equal(got, matrix[ids])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ([np.ones((500, 7), np.float32)], r"\(500, 8\).*\(500, 7\)"),
        ([np.ones((499, 8), np.float32)], r"\(500, 8\).*\(499, 8\)"),
        ([np.ones((500, 8), np.float16)], "float32.*float16"),
        ([np.ones((500, 8), np.int32)], "float32.*int32"),
        (np.ones((500, 8), np.float32), "one array"),
        ([], r"\(500, 8\)"),
        (None, "tuple of 1 arrays"),
    ],
)
def test_tables_that_do_not_fit_are_refused(arrays, words):
    cfg = EmbedConfig(qrhash.FullTable(500), 8)
    with pytest.raises(ValueError, match=words):
        qrhash.as_tables(arrays, cfg)
    with pytest.raises(ValueError, match=words):
        qrhash.nnx.MultiHashEmbed(cfg, rngs=nnx.Rngs(0)).set_tables(arrays)


def test_tables_of_a_collection_that_do_not_fit_are_refused():
    model = qrhash.nnx.EmbedCollection({"a": CONFIG, "b": CONFIG}, rngs=nnx.Rngs(0))
    tables = model.tables
    tables["b"] = (jnp.ones((250, 7)), tables["b"][1])
    with pytest.raises(ValueError, match=r"tables\['b'\]\[0\].*width"):
        model.set_tables(tables)
    for wrong in (3, tables["a"][0], [[1.0]], None):
        with pytest.raises(ValueError, match=r"tables\['b'\] must be a tuple of 2 arrays"):
            model.set_tables(tables | {"b": wrong})


# --- ids that would lose bits ---------------------------------------------------------------------
BIG = 2**32 + 5  # 5, in 32 bits


@pytest.mark.parametrize("batch", [(2, 4), (1, 8)], ids=str)
def test_put_batch_does_not_cut_integers(batch):
    mesh = jax.make_mesh(batch, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    layout = qrhash.MeshLayout(mesh=mesh)
    with pytest.raises(ValueError, match=rf"batch\['ids'\].*{BIG}.*turn into 5.*partition.indices"):
        qrhash.batches.put_batch({"ids": np.array([1, BIG])}, 2, layout)
    for wrong in (
        np.array([2**31, 0]),
        np.array([0, -(2**31) - 1]),
        np.array([2**63, 1], np.uint64),
    ):
        with pytest.raises(ValueError, match="integers that fit"):
            qrhash.batches.put_batch(wrong, 2, layout)
    with pytest.raises(ValueError, match="numbers"):
        qrhash.batches.put_batch(np.array(["a", "b"]), 2, layout)
    good = {"ids": np.array([2**31 - 1, -(2**31)]), "x": np.array([1.0, 2.0]), "b": [True, False]}
    put = qrhash.batches.put_batch({**good, "b": np.array(good["b"])}, 2, layout)
    assert put["ids"].tolist() == good["ids"].tolist()
    assert put["x"].dtype == jnp.float32


DOORS = {
    "lookup": lambda tables, ids, cfg: qrhash.lookup(tables, ids, cfg),
    "gather": lambda tables, ids, cfg: qrhash.gather(tables, (ids, ids))[0],
    "take_rows": lambda tables, ids, cfg: qrhash.take_rows(tables, (ids, ids))[0][0],
    "collection": lambda tables, ids, cfg: qrhash.collection.lookup(
        qrhash.collection.stack({"a": tables}, CollectionConfig({"a": cfg})),
        {"a": ids},
        CollectionConfig({"a": cfg}),
    )["a"],
    "nnx": lambda tables, ids, cfg: qrhash.nnx.MultiHashEmbed(cfg, rngs=nnx.Rngs(0))(ids),
}


@pytest.mark.parametrize("ids", [np.array([BIG]), np.array([BIG], np.uint64), [BIG], [2**63 + 5]])
@pytest.mark.parametrize("door", DOORS)
def test_wide_ids_of_the_host_name_no_row(door, ids):
    cfg = EmbedConfig(QuotientRemainder(100, 4), 8)
    tables = qrhash.init(jax.random.key(0), cfg)
    ids = ids if door in ("lookup", "nnx", "collection") else np.asarray(ids)
    assert np.isnan(DOORS[door](tables, ids, cfg)).all()
    if door == "lookup":
        for policy, same in (("clip", 99), ("wrap", BIG % 100)):
            moved = dataclasses.replace(cfg, id_policy=policy)
            if policy == "clip" or int(np.asarray(ids).flat[0]) == BIG:
                want = qrhash.lookup(tables, np.array([same]), cfg)
                np.testing.assert_array_equal(qrhash.lookup(tables, ids, moved), want)
        with pytest.raises(ValueError, match="have no row"):
            qrhash.lookup(tables, ids, dataclasses.replace(cfg, id_policy="raise"))


# --- words ----------------------------------------------------------------------------------------
MISTAKES = {
    "a partition for a config": (
        lambda: qrhash.nnx.MultiHashEmbed(QuotientRemainder(10, 4), rngs=nnx.Rngs(0)),
        ValueError,
        r"config must be a qrhash.EmbedConfig.*QuotientRemainder",
    ),
    "the same in linen": (
        lambda: qrhash.linen.MultiHashEmbed(QuotientRemainder(10, 4)),
        ValueError,
        "config must be a qrhash.EmbedConfig",
    ),
    "project without its projection": (
        lambda: qrhash.lookup(qrhash.init(jax.random.key(0), _PROJECT), IDS[:1, :1] * 0, _PROJECT),
        ValueError,
        r"projection is missing.*init_projection",
    ),
    "a projection of another shape": (
        lambda: qrhash.lookup(
            qrhash.init(jax.random.key(0), _PROJECT), IDS[:1], _PROJECT, jnp.ones((3, 8))
        ),
        ValueError,
        r"kernel of shape \[6, 8\].*\(3, 8\)",
    ),
    "tables of another config": (
        lambda: qrhash.lookup((jnp.ones((3, 8)),), IDS, CONFIG),
        ValueError,
        r"tables must be 2, of shapes \(\(250, 8\), \(4, 8\)\).*\(\(3, 8\),\)",
    ),
    "a query of another width": (
        lambda: qrhash.attend(qrhash.init(jax.random.key(0), CONFIG), jnp.ones(7), CONFIG),
        ValueError,
        r"query must have shape \[\*shape, features\].*\(7,\)",
    ),
    "rows that do not go together": (
        lambda: qrhash.combine((jnp.ones(3), jnp.ones(4)), "mult"),
        ValueError,
        r"rows must have one shape.*\(3,\), \(4,\)",
    ),
    "an id of 10**20": (
        lambda: CONFIG.partition.indices(10**20),
        ValueError,
        r"ids must fit .*100000000000000000000",
    ),
    "a list of ids, one too large": (
        lambda: CONFIG.partition.indices([1, 2**70]),
        ValueError,
        "ids must fit",
    ),
    "text for ids": (lambda: CONFIG.partition.indices(["a"]), ValueError, "ids must be integers"),
    "floats for ids": (lambda: CONFIG.partition.indices([1.5]), ValueError, "ids must be integers"),
    "bools for ids": (lambda: CONFIG.partition.indices([True]), ValueError, "ids must be integers"),
    "lists of other lengths": (
        lambda: CONFIG.partition.indices([[1], [1, 2]]),
        ValueError,
        "lists of equal lengths",
    ),
    "a stack of another shape": (
        lambda: qrhash.collection.lookup(
            {"large_8_float32": jnp.ones((3, 8)), "small_8_float32": jnp.ones((4, 8))},
            {"a": IDS},
            CollectionConfig({"a": CONFIG}),
        ),
        ValueError,
        r"stacks\['large_8_float32'\] must be of shape \(250, 8\).*\(3, 8\)",
    ),
    "a mesh of mixed axes": (
        lambda: qrhash.MeshLayout(
            mesh=jax.make_mesh(
                (2, 4), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Explicit)
            )
        ),
        ValueError,
        "axes of one type",
    ),
}
_PROJECT = EmbedConfig(QuotientRemainder(1000, 4), 8, "project")


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_a_sentence(name):
    call, kind, words = MISTAKES[name]
    with pytest.raises(kind, match=words):
        call()


def test_ids_that_are_lists_of_large_integers_are_exact():
    partition = QuotientRemainder(2**62, 2**31)
    ids = [2**53 + 1, 2**62 - 1]
    for given in (ids, np.array(ids), np.array(ids, object)):
        quotients, remainders = partition.indices(given)
        assert (quotients * 2**31 + remainders).tolist() == ids


def test_tables_are_created_under_vmap_without_a_word():
    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.vmap(lambda key: qrhash.init(key, CONFIG))(keys)  # warnings are errors here
    for number, key in enumerate(keys):
        one = qrhash.init(key, CONFIG)
        jax.tree.map(assert_close, [table[number] for table in many], [*one])


def test_modules_are_copied_inside_a_function_that_is_differentiated():
    model = qrhash.nnx.MultiHashEmbed(CONFIG, rngs=nnx.Rngs(0))
    loss = lambda model: copy.deepcopy(model.config).features * model(IDS).sum()  # noqa: E731
    _, grads = qrhash.nnx.value_and_grad(loss)(model)
    assert isinstance(grads["table_0"].get_value(), qrhash.RowGrads)
