"""Look-ups of bags: against loops, with their gradients, in every door, and trained by rows."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import qrhash
from qrhash import Bag, CollectionConfig, EmbedConfig, KeyDigits, Keys, collection
from qrhash.pooling import COMBINERS, pool
from support import oracle
from support.cases import FAMILIES, FEATURES, OPERATIONS, assert_close, covering, parameters
from support.meshes import dense, layout_2x4, make_layout, whole

UNCHECKED_KEYS = True

# The first, the last, and two next to each other are empty; ids twice in a bag, and in two.
LISTS = [[], [3, 5, 3], [0], [], [], [10, 5], [7], []]
FEW = 13  # places of bags whose rows are gathered before they are pooled
PADDING = 5  # an id that some cases take as padding
DTYPES = [{}, {"param_dtype": jnp.bfloat16, "dtype": jnp.float32}]
per_combiner = pytest.mark.parametrize("combiner", COMBINERS)


def _config(operation="mult", combiner="sum", family="quotient-remainder", **options):
    return EmbedConfig(
        FAMILIES[family], FEATURES, operation, combiner=combiner, large_table_rows=3, **options
    )


def _weights(rng, lists=LISTS):
    return [rng.uniform(0.5, 2, len(each)).astype(np.float32).tolist() for each in lists]


def _ragged(lists, weights=None, capacity=12):
    return Bag.from_lists(lists, weights=weights, capacity=capacity)


def _gathered(lists, weights=None):
    return _ragged(lists, weights, FEW)


def _padded(lists, weights=None, length=4):
    def fill(rows, x):
        padded = [[*row, *[x] * (length - len(row))] for row in rows]
        return np.array(padded, type(x)).reshape(len(rows), length)

    return Bag.from_padded(
        fill(lists, 0),
        lengths=np.array([len(each) for each in lists]),
        weights=None if weights is None else fill(weights, np.nan).astype(np.float32),
    )


WAYS = {"ragged": _ragged, "few": _gathered, "padded": _padded}


@pytest.fixture(autouse=True)
def _few_places_at_once(monkeypatch):
    """So that sums over bags need several turns, and a rest; or are not taken at all."""
    monkeypatch.setattr(qrhash.tuning, "PLACES_AT_ONCE", 5)
    monkeypatch.setattr(qrhash.tuning, "sums_at_once", lambda _, places: places not in (0, FEW))


# --- look-up --------------------------------------------------------------------------------------

FEW_BAGS = [[], [[]], [[], []], [[1]], [[1, 2, 3]]]


@pytest.mark.parametrize(
    ("way", "operation", "combiner", "pool_rows", "weighted"),
    covering(
        *(WAYS, OPERATIONS, COMBINERS, [False, True], [False, True]),
        strength=3,
        where=lambda *case: case[2] != "max" or not case[4],  # which takes no weights
    ),
)
def test_it_equals_loops(way, operation, combiner, pool_rows, weighted, rng):
    make, weights = WAYS[way], _weights(rng) if weighted else None
    for padding_id in (None, PADDING):
        cfg = _config(operation, combiner, pool_rows=pool_rows, padding_id=padding_id)
        tables, projection = parameters(cfg, rng)
        want = oracle.lookup_bags(tables, LISTS, cfg, projection, weights)
        look_up = lambda *x, cfg=cfg: qrhash.lookup(*x[:2], cfg, x[2])  # noqa: E731
        run = jax.jit(look_up) if weighted or combiner == "max" else look_up
        assert_close(run(tables, make(LISTS, weights), projection), want)


@pytest.mark.parametrize(
    ("number", "combiner", "way"), covering(range(len(FEW_BAGS)), COMBINERS, WAYS)
)
def test_batches_of_few_bags_and_of_none(number, combiner, way, rng):
    lists, make = FEW_BAGS[number], WAYS[way]
    cfg = _config("mult", combiner)
    tables, _ = parameters(cfg, rng)
    got = qrhash.lookup(tables, make(lists), cfg)
    assert_close(got, oracle.lookup_bags(tables, lists, cfg))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, rng):
    cfg = _config("add", "mean", family)
    tables, _ = parameters(cfg, rng)
    lists = [[int(x) for x in rng.integers(0, cfg.num_embeddings, size)] for size in (3, 0, 1, 9)]
    got = qrhash.lookup(tables, _ragged(lists, capacity=20), cfg)
    assert_close(got, oracle.lookup_bags(tables, lists, cfg))


@pytest.mark.parametrize(
    ("policy", "combiner", "way"), covering(("nan", "zero", "clip", "wrap"), COMBINERS, WAYS)
)
def test_ids_outside_of_the_vocabulary_follow_their_policy(policy, combiner, way, rng):
    lists, make = [[1, 2], [], [1, 11], [2]], WAYS[way]
    for padding_id in (None, 2):
        cfg = _config("add", combiner, id_policy=policy, padding_id=padding_id)
        tables, _ = parameters(cfg, rng)
        want = oracle.lookup_bags(tables, lists, cfg)
        assert np.isnan(want[2]).all() == (policy == "nan")
        assert not np.isnan(want[[0, 1, 3]]).any()
        assert_close(qrhash.lookup(tables, make(lists), cfg), want)


def test_policy_raise_looks_at_ids_in_bags_alone(rng):
    cfg = _config(id_policy="raise")
    tables, _ = parameters(cfg, rng)
    padded = np.array([[1, 99], [2, 3]])
    got = qrhash.lookup(tables, Bag.from_padded(padded, mask=padded < 50), cfg)
    assert_close(got, oracle.lookup_bags(tables, [[1], [2, 3]], cfg))
    with pytest.raises(ValueError, match=r"\b99\b"):
        qrhash.lookup(tables, Bag.from_padded(padded), cfg)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (0,), (2, 1, 2)], ids=str)
def test_bags_of_any_shape(shape, rng):
    cfg = _config("project", "mean")
    tables, projection = parameters(cfg, rng)
    ids = rng.integers(0, cfg.num_embeddings, (*shape, 3))
    got = qrhash.lookup(tables, Bag.from_padded(ids), cfg, projection)
    assert got.shape == (*shape, FEATURES)
    want = oracle.lookup_bags(tables, ids.reshape(-1, 3).tolist(), cfg, projection)
    assert_close(got.reshape(-1, FEATURES), want)


@per_combiner
@pytest.mark.parametrize("dtypes", [{"param_dtype": jnp.bfloat16}, DTYPES[1]], ids=str)
def test_narrow_dtypes_are_summed_in_float32(combiner, dtypes, rng):
    cfg = _config("add", combiner, **dtypes)
    tables, _ = parameters(cfg, rng)
    lists = [[int(x) for x in rng.integers(0, cfg.num_embeddings, 600)]]
    got = qrhash.lookup(tables, _ragged(lists, capacity=600), cfg)
    assert got.dtype == cfg.vector_dtype
    # One rounding of each vector and one of the sum; in bfloat16 a sum of 600 would be far off.
    assert_close(got, oracle.lookup_bags(tables, lists, cfg), 2**-5)


def test_keys_in_bags(rng):
    text = [["a", "b"], [], ["b"]]
    cfg = EmbedConfig(KeyDigits(bits=8, num_tables=2), FEATURES, "concat", combiner="mean")
    tables, _ = parameters(cfg, rng)
    a, b = np.float64(qrhash.lookup(tables, Keys.of(["a", "b"]), cfg))
    want = [(a + b) / 2, 0 * a, b]
    assert_close(qrhash.lookup(tables, Bag.from_lists(text, capacity=5), cfg), want)
    padded = Keys.of(np.array([["a", "b"], ["x", "x"], ["b", "x"]]))
    bag = Bag.from_padded(padded, lengths=[2, 0, 1])
    assert_close(jax.jit(lambda t, bag: qrhash.lookup(t, bag, cfg))(tables, bag), want)


def test_ids_of_the_host_beyond_32_bits(rng):
    cfg = EmbedConfig(qrhash.MixedRadix.balanced(2**40, 4), FEATURES, "add", combiner="sum")
    tables, _ = parameters(cfg, rng)
    lists = [[2**40 - 1, 2**33 + 5], [], [7]]
    got = qrhash.lookup(tables, Bag.from_lists(lists), cfg)
    assert_close(got, oracle.lookup_bags(tables, lists, cfg))


def test_the_combiners_of_vectors_alone(rng):
    vectors = rng.standard_normal((12, 5)).astype(np.float32)
    n, weights = sum(map(len, LISTS)), _weights(rng)
    for combiner, of in itertools.product(COMBINERS, (None, weights)):
        if combiner == "max" and of:
            continue
        got = pool(jnp.asarray(vectors), _ragged(LISTS, of), combiner)
        ends = np.cumsum([0, *map(len, LISTS)])
        for i, each in enumerate(LISTS):
            members = list(np.float64(vectors[ends[i] : ends[i + 1]]))
            want = oracle.pooled(members, of and of[i], combiner) if each else np.zeros(5)
            assert_close(got[i], want)
    assert n < 12  # Some places are of no bag.


def test_a_divisor_of_zero_gives_zeros_and_no_nan():
    bag = _ragged([[1, 2], [3]], [[1.0, -1.0], [0.0]])
    vectors = jnp.ones((12, 2))
    for combiner in ("mean", "sqrtn"):
        grad = jax.grad(lambda w, c=combiner: pool(vectors, bag.with_weights(w), c).sum())
        assert np.isfinite(grad(jnp.asarray(bag.weights))).all()
    assert pool(vectors, bag, "mean").tolist() == [[0, 0], [0, 0]]


def test_torchs_embedding_bag_agrees(rng):
    """For sum with add, and with concat, pooling the rows of each table is the same."""
    torch = pytest.importorskip("torch")
    ids = np.array([x for each in LISTS for x in each])
    offsets = np.cumsum([0, *map(len, LISTS)])[:-1]
    for operation, mode in itertools.product(("add", "concat"), ("sum", "mean", "max")):
        if mode == "max" and operation == "add":
            continue  # The greatest sum is not the sum of the greatest.
        cfg = _config(operation, mode)
        tables, _ = parameters(cfg, rng)
        of_table = [
            torch.nn.functional.embedding_bag(
                torch.tensor(np.asarray(index)),
                torch.tensor(np.asarray(table)),
                torch.tensor(offsets),
                mode=mode,
            ).numpy()
            for table, index in zip(tables, cfg.indices(ids), strict=True)
        ]
        want = sum(of_table) if operation == "add" else np.concatenate(of_table, 1)
        for pool_rows in (False, True):
            cfg = dataclasses.replace(cfg, pool_rows=pool_rows)
            assert_close(qrhash.lookup(tables, _ragged(LISTS), cfg), want)


# --- refused --------------------------------------------------------------------------------------


def test_what_is_refused(rng):
    with pytest.raises(ValueError, match="combiner must be one of sum, mean, sqrtn, max"):
        _config(combiner="average")
    with pytest.raises(ValueError, match="pool_rows must be true or false"):
        _config(pool_rows="yes")
    with pytest.raises(ValueError, match="combiner must be one of"):
        pool(jnp.ones((3, 2)), _ragged([[1], [2, 3]], capacity=3), "average")
    cfg = _config(combiner="max")
    tables, _ = parameters(cfg, rng)
    with pytest.raises(ValueError, match="weights go with sum, mean and sqrtn"):
        qrhash.lookup(tables, _ragged(LISTS, _weights(rng)), cfg)
    with pytest.raises(ValueError, match="vectors must have shape"):
        pool(jnp.ones((4, 2)), _ragged([[1], [2, 3]], capacity=3), "sum")


def test_the_config_keeps_them_in_json():
    cfg = _config(combiner="sqrtn", pool_rows=True)
    assert cfg.to_dict()["combiner"] == "sqrtn"
    assert EmbedConfig.from_dict(cfg.to_dict()) == cfg
    older = {k: v for k, v in cfg.to_dict().items() if k not in ("combiner", "pool_rows")}
    assert EmbedConfig.from_dict(older).combiner == "mean"


# --- gradients ------------------------------------------------------------------------------------


def _naive(params, lists, cfg, weights=None):
    """The vectors of bags by loops over them, of which JAX has the derivatives."""
    tables, projection = params

    def combined(rows):
        return qrhash.combine(rows, cfg.operation, projection)

    def pooled(vectors, of_bag):
        total = sum(w * v for w, v in zip(of_bag, vectors, strict=True))
        match cfg.combiner:
            case "mean":
                return total / sum(of_bag)
            case "sqrtn":
                return total / jnp.sqrt(sum(w**2 for w in of_bag))
            case "max":
                return jnp.stack(vectors).max(axis=0)
        return total

    out, place = [], 0
    for ids in lists:
        if not ids:
            out.append(jnp.zeros(cfg.features))
            continue
        given = [jnp.float32(1)] * len(ids) if weights is None else weights[place:]
        of_bag, place = list(given[: len(ids)]), place + len(ids)
        rows = [
            [t[r] for t, r in zip(tables, oracle.code(cfg.partition, x), strict=True)] for x in ids
        ]
        if cfg.pool_rows:
            tables_rows = zip(*rows, strict=True)
            out.append(combined([pooled(list(of), of_bag) for of in tables_rows]))
        else:
            out.append(pooled([combined(each) for each in rows], of_bag))
    return jnp.stack(out)


@pytest.mark.parametrize(
    ("operation", "combiner", "pool_rows", "way"),
    covering(OPERATIONS, COMBINERS, [False, True], WAYS),
)
def test_gradients_equal_those_of_loops(operation, combiner, pool_rows, way, rng):
    """Dense and by rows, of weights too."""
    lists = [[], [3, 5, 3], [0], [], [10, 5], []] if combiner != "max" else [[], [3, 5], [0], [7]]
    cfg = _config(operation, combiner, pool_rows=pool_rows)
    params, n = parameters(cfg, rng), sum(map(len, lists))
    weights = None
    if combiner != "max":
        weights = jnp.asarray(rng.uniform(0.5, 2, n), jnp.float32)
    slopes = jnp.asarray(rng.standard_normal((len(lists), FEATURES)), jnp.float32)
    bag = WAYS[way](lists)

    def loss(params, weights, bag=bag):
        if weights is not None:
            places = np.flatnonzero(bag.in_bag)
            bag = bag.with_weights(jnp.full(bag.capacity, jnp.nan).at[places].set(weights))
        return (qrhash.lookup(params[0], bag, cfg, params[1]) * slopes).sum()

    def naive(params, weights):
        return (_naive(params, lists, cfg, weights) * slopes).sum()

    def by_rows(both):
        return loss(both["params"], both["weights"])

    marked = {"params": (cfg.large_tables, False), "weights": False}
    want = jax.jit(jax.value_and_grad(naive, (0, 1)))(params, weights)
    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, weights)
    jax.tree.map(assert_close, got, want)
    both = {"params": params, "weights": weights}
    value, grads = jax.jit(qrhash.value_and_grad(by_rows, marked))(both)
    assert isinstance(grads["params"][0][0], qrhash.RowGrads)
    grads = dense(grads)
    jax.tree.map(assert_close, (value, (grads["params"], grads["weights"])), want)


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_gradients_of_weights_equal_finite_differences(combiner, rng):
    cfg = _config("mult", combiner)
    tables, _ = parameters(cfg, rng)
    bag = _ragged(LISTS, _weights(rng))

    def value(weights):
        return (qrhash.lookup(tables, bag.with_weights(weights), cfg) ** 2).sum()

    weights = np.float64(bag.weights)
    got = jax.grad(value)(jnp.asarray(bag.weights))
    oracle_value = lambda w: (  # noqa: E731
        oracle.lookup_bags(tables, LISTS, cfg, weights=_split(w)) ** 2
    ).sum()
    for i in range(sum(map(len, LISTS))):
        step = np.eye(len(weights))[i] * 1e-4
        slope = (oracle_value(weights + step) - oracle_value(weights - step)) / 2e-4
        np.testing.assert_allclose(got[i], slope, rtol=1e-3, atol=1e-3)
    assert not got[sum(map(len, LISTS)) :].any()


MISSES = [[1, 2, 500], [3], [], [4, 5]]  # 500 has no row


@pytest.mark.parametrize("operation", ["mult", "project"])
def test_the_weight_of_an_id_without_a_row_has_no_derivative(operation, rng):
    cfg = _config(operation, "sum", id_policy="nan")
    tables, projection = parameters(cfg, rng)
    bag = _ragged(MISSES, capacity=9)
    weights = jnp.asarray(rng.uniform(0.5, 2, bag.capacity), jnp.float32)

    def vectors(weights):
        return qrhash.lookup(tables, bag.with_weights(weights), cfg, projection)

    assert np.isnan(vectors(weights)).all(axis=1).tolist() == [True, False, False, False]
    forward, reverse = jax.jacfwd(vectors)(weights), jax.jacrev(vectors)(weights)
    assert_close(forward[1:], reverse[1:])
    assert not np.asarray(reverse[..., 2]).any()
    if operation == "mult":
        assert not np.asarray(forward[..., 2]).any()
        assert_close(forward, reverse)


@pytest.mark.parametrize("operation", ["mult", "concat", "project"])
def test_the_derivative_of_a_derivative_of_bags(operation, rng):
    cfg = _config(operation, "mean")
    params = parameters(cfg, rng)
    bag = _ragged(LISTS, _weights(rng))
    along = jax.tree.map(lambda each: rng.standard_normal(each.shape).astype(np.float32), params)

    def loss(params):
        return (qrhash.lookup(params[0], bag, cfg, params[1]) ** 3).sum()

    def by_rows(params):
        return dense(qrhash.value_and_grad(loss, (cfg.large_tables, False))(params)[1])

    _, want = jax.jvp(jax.grad(loss), (params,), (along,))
    _, got = jax.jvp(by_rows, (params,), (along,))
    jax.tree.map(assert_close, got, want)


@pytest.mark.parametrize("trained", [0, 1])
def test_a_table_of_bags_that_is_not_trained_has_no_gradient(trained, rng):
    cfg = dataclasses.replace(_config("mult", "sum"), large_table_rows=1)
    tables, _ = parameters(cfg, rng)
    frozen, bag = tables[1 - trained], _ragged(LISTS)

    def loss(table):
        both = (table, frozen) if trained == 0 else (frozen, table)
        return (qrhash.lookup(both, bag, cfg) ** 2).sum()

    def grads(table):
        return qrhash.value_and_grad(loss, True)(table)[1]

    assert_close(dense(grads(tables[trained])), jax.grad(loss)(tables[trained]))
    program = str(jax.make_jaxpr(grads)(tables[trained]))
    made = re.findall(r"f32\[(\d+,\d+)\] = scatter-add", program)
    assert made
    assert ",".join(map(str, frozen.shape)) not in made


def _split(flat):
    ends = np.cumsum([0, *map(len, LISTS)])
    return [flat[start:stop] for start, stop in itertools.pairwise(ends)]


def test_of_equal_ones_the_greatest_has_one_gradient():
    grad = jax.grad(lambda v: pool(v, _ragged([[1, 2, 3]], capacity=4), "max").sum())
    assert grad(jnp.ones((4, 1))).tolist() == [[1], [0], [0], [0]]


def test_exported_for_any_number_of_ids(rng):
    cfg = _config("mult", "mean")
    tables, _ = parameters(cfg, rng)
    (n,) = jax.export.symbolic_shape("n")
    like = jax.ShapeDtypeStruct((n,), jnp.int32)

    def look_up(tables, ids, segments):
        return qrhash.lookup(tables, Bag(ids, segments, shape=(len(LISTS),)), cfg)

    exported = jax.export.export(jax.jit(look_up))(tables, like, like)
    for capacity in (7, 30):
        bag = _ragged(LISTS, capacity=capacity)
        got = exported.call(tables, np.int32(bag.ids), bag.segments)
        assert_close(got, oracle.lookup_bags(tables, LISTS, cfg))


def test_under_vmap_and_scan(rng):
    cfg = _config("mult", "mean")
    tables, _ = parameters(cfg, rng)
    ids = rng.integers(0, cfg.num_embeddings, (3, 4, 5)).astype(np.int32)
    want = [qrhash.lookup(tables, Bag.from_padded(each), cfg) for each in ids]
    one = lambda each: qrhash.lookup(tables, Bag.from_padded(each, padding_id=-1), cfg)  # noqa: E731
    assert_close(jax.vmap(one)(jnp.asarray(ids)), np.stack(want))
    _, got = jax.lax.scan(lambda carry, each: (carry, one(each)), 0, jnp.asarray(ids))
    assert_close(got, np.stack(want))
    stacked = jax.tree.map(lambda *x: np.stack(x), *(_ragged(LISTS), _ragged(LISTS[::-1])))
    got = jax.vmap(lambda bag: qrhash.lookup(tables, bag, cfg))(stacked)
    want = [oracle.lookup_bags(tables, each, cfg) for each in (LISTS, LISTS[::-1])]
    assert_close(got, np.stack(want))


# --- training -------------------------------------------------------------------------------------


def _batches(cfg, rng, steps):
    for _ in range(steps):
        sizes = rng.integers(0, 4, 6)
        lists = [rng.integers(0, cfg.num_embeddings, size).tolist() for size in sizes]
        target = jnp.asarray(rng.standard_normal((6, FEATURES)), jnp.float32)
        yield lists, target


@per_combiner
@pytest.mark.parametrize("operation", ["mult", "project"])
def test_training_by_rows_equals_loops_densely(operation, combiner, rng):
    cfg = _config(operation, combiner, "mixed radix")
    params = parameters(cfg, rng)
    tx = optax.adagrad(0.1)
    by_rows = qrhash.touched_rows(tx)

    def loss(params, bag, target):
        return ((qrhash.lookup(params[0], bag, cfg, params[1]) - target) ** 2).mean()

    gradient = qrhash.value_and_grad(loss, (cfg.large_tables, False))

    @jax.jit
    def step(params, state, bag, target):
        _, grads = gradient(params, bag, target)
        updates, state = by_rows.update(grads, state, params)
        return qrhash.apply_updates(params, updates), state

    got, state = params, by_rows.init(params)
    want, dense_state = params, tx.init(params)
    for lists, target in _batches(cfg, rng, 5):
        got, state = step(got, state, _ragged(lists, capacity=18), target)
        # By loops in float32, whose derivatives JAX has.
        grads = jax.grad(lambda p, x=lists, t=target: ((_naive(p, x, cfg) - t) ** 2).mean())(want)
        updates, dense_state = tx.update(grads, dense_state, want)
        want = optax.apply_updates(want, updates)
    jax.tree.map(assert_close, got, want)
    assert step._cache_size() == 1


# --- many features, and modules -------------------------------------------------------------------

COLUMNS = {
    "tags": _config("mult", "mean"),
    "shops": _config("mult", "mean"),
    "clicks": _config("mult", "sum"),
    "last": "tags",
    "words": _config("project", "sqrtn", padding_id=PADDING),
    "best": _config("concat", "max", id_policy="zero"),
    "rows": _config("mult", "mean", pool_rows=True),
    "day": EmbedConfig(qrhash.FullTable(7), FEATURES),
    "user": _config("mult", "mean"),
}
CONFIG = CollectionConfig(COLUMNS)


def _inputs(rng, size=8):
    """{feature: lists of ids} and {feature: bag or ids}, of both ways, some weighted."""
    lists, inputs = {}, {}
    for number, name in enumerate(COLUMNS):
        n = CONFIG.configs[name].num_embeddings
        if name in ("day", "user"):
            inputs[name] = rng.integers(0, n, size).astype(np.int32)
            continue
        lists[name] = [rng.integers(0, n, k).tolist() for k in rng.integers(0, 4, size)]
        make = _padded if number % 2 else lambda lists: _ragged(lists, capacity=3 * size)
        inputs[name] = make(lists[name])
    return lists, inputs


def _drawn(rng):
    tables, projections = {}, {}
    for name, cfg in CONFIG.own_configs.items():
        tables[name], projection = parameters(cfg, rng)
        if projection is not None:
            projections[name] = projection
    return tables, projections


def test_a_collection_of_bags_and_ids(rng):
    tables, projections = _drawn(rng)
    stacks = collection.stack(tables, CONFIG)
    lists, inputs = _inputs(rng)
    got = jax.jit(lambda *x: collection.lookup(*x[:2], CONFIG, x[2]))(stacks, inputs, projections)
    assert set(got) == set(COLUMNS)
    for name, vectors in got.items():
        owner, cfg = CONFIG.owner_of[name], CONFIG.configs[name]
        if name in lists:
            want = oracle.lookup_bags(tables[owner], lists[name], cfg, projections.get(owner))
        else:
            want = oracle.lookup(tables[owner], inputs[name], cfg)
        assert_close(vectors, want)


def test_a_collection_has_one_gather_for_each_stack_also_of_bags(rng):
    tables, projections = _drawn(rng)
    stacks, (_, inputs) = collection.stack(tables, CONFIG), _inputs(rng)
    lookup = lambda *x: collection.lookup(*x, CONFIG, projections)  # noqa: E731
    jaxpr = str(jax.make_jaxpr(lookup)(stacks, inputs))
    assert jaxpr.count("look_ups=") <= len(CONFIG.stacks)


def test_a_collection_trains_bags_by_rows_as_densely(rng):
    tables, projections = _drawn(rng)
    params = (collection.stack(tables, CONFIG), projections)

    def loss(params, inputs):
        vectors = collection.lookup(params[0], inputs, CONFIG, params[1])
        return sum((vector**2).sum() for vector in vectors.values())

    want = jax.jit(jax.grad(loss))(params, _inputs(rng)[1])
    rng = np.random.default_rng(0)
    _drawn(rng)
    _, got = jax.jit(qrhash.value_and_grad(loss, (CONFIG.large_tables, False)))(
        params, _inputs(rng)[1]
    )
    jax.tree.map(assert_close, dense(got), want)


def test_modules_take_bags(rng):
    cfg = _config("project", "mean")
    tables, projection = parameters(cfg, rng)
    want = oracle.lookup_bags(tables, LISTS, cfg, projection)
    embed = qrhash.nnx.MultiHashEmbed(cfg, rngs=nnx.Rngs(0))
    embed.set_tables(tables, projection)
    assert_close(nnx.jit(lambda m, bag: m(bag))(embed, _ragged(LISTS)), want)
    params = qrhash.linen.params_from_tables(tables, cfg, projection)
    module = qrhash.linen.MultiHashEmbed(cfg)
    assert_close(module.apply({"params": params}, _padded(LISTS)), want)
    variables = module.init(jax.random.key(0), _ragged(LISTS))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.shape, b.shape),
        nn.unbox(variables)["params"],
        params,
    )


def test_modules_of_many_features_take_bags(rng):
    lists, inputs = _inputs(rng)
    embed = qrhash.nnx.EmbedCollection(CONFIG, rngs=nnx.Rngs(0))
    got = nnx.jit(lambda m, x: m(x))(embed, inputs)
    want = oracle.lookup_bags(embed.tables["tags"], lists["tags"], CONFIG.configs["tags"])
    assert_close(got["tags"], want)
    module = qrhash.linen.EmbedCollection(CONFIG)
    variables = jax.eval_shape(module.init, jax.random.key(0), inputs)
    vectors = jax.eval_shape(module.apply, variables, inputs)
    assert {k: v.shape for k, v in vectors.items()} == dict.fromkeys(COLUMNS, (8, FEATURES))


# --- meshes ---------------------------------------------------------------------------------------

LAYOUTS = {
    "2": lambda: make_layout((2,), ("data",)),
    "2 x 4": layout_2x4,
    "2 x 4 all_to_all": lambda: layout_2x4(exchange="all_to_all"),
    "2 x 4 explicit": lambda: layout_2x4(jax.sharding.AxisType.Explicit),
}

# Bags in every way on one mesh; the other exchange and other meshes with one of either kind each.
ON_A_MESH = [*itertools.product(("2 x 4",), WAYS), ("2 x 4 all_to_all", "ragged")]
ON_A_MESH += [("2 x 4 explicit", "ragged"), ("2", "padded")]


@pytest.mark.parametrize(("name", "way"), ON_A_MESH)
def test_on_a_mesh_the_numbers_are_those_of_one_device(name, way, rng):
    layout, make = LAYOUTS[name](), WAYS[way]
    cfg = _config("project", "mean", padding_id=PADDING)
    on_mesh = dataclasses.replace(cfg, layout=layout)
    tables, projection = parameters(cfg, rng)
    placed = (qrhash.as_tables(tables, on_mesh), projection)
    weights = _weights(rng)
    bag = make(LISTS, weights)
    if make is _padded:
        bag = jax.tree.map(lambda x: qrhash.batches.put_batch(x, len(x), layout), bag)

    def loss(params, bag, cfg):
        return (qrhash.lookup(params[0], bag, cfg, params[1]) ** 2).sum()

    alone = (tables, projection), make(LISTS, weights), cfg
    want = jax.jit(jax.value_and_grad(loss), static_argnums=2)(*alone)
    with jax.set_mesh(layout.mesh):
        gradient = qrhash.value_and_grad(
            lambda p, bag: loss(p, bag, on_mesh), (on_mesh.large_tables, False)
        )
        got = jax.jit(lambda *args: dense(gradient(*args)))(placed, bag)
    jax.tree.map(assert_close, jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, want))
    look_up = jax.jit(lambda t, bag: whole(qrhash.lookup(t, bag, on_mesh, projection)))
    assert_close(
        look_up(placed[0], make(LISTS, weights)),
        oracle.lookup_bags(tables, LISTS, cfg, projection, weights),
    )
