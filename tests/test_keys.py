"""64-bit keys and the families on them: against loops over integers, by laws, and trained."""

import collections
import itertools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import qrhash
from qrhash import CollectionConfig, EmbedConfig, KeyDigits, Keys, MultiHash, collection, cross
from qrhash.keys import scramble, unscramble
from support.cases import assert_close
from support.meshes import layout_2x4, whole

UNCHECKED_KEYS = True

INT32 = 2**32
ROUNDS = (0x9E3779B9, 0x7F4A7C15, 0xF39CC060, 0x5CEDC834)
keys64 = st.integers(0, 2**64 - 1)
seeds = st.integers(0, INT32 - 1)


def _fmix(x):
    x = (x ^ x >> 16) * 0x85EBCA6B % INT32
    x = (x ^ x >> 13) * 0xC2B2AE35 % INT32
    return x ^ x >> 16


def _scrambled(key, seed=0):
    """Four Feistel rounds, each with a word mixed of the seed."""
    hi, lo = divmod(key, INT32)
    for number, word in enumerate(ROUNDS):
        round_key = _fmix((word + 0x9E3779B9 * (_fmix((seed + number) % INT32) + number)) % INT32)
        hi, lo = lo, hi ^ _fmix((lo + round_key) % INT32)
    return hi * INT32 + lo


def _digits(key, p):
    """Digits of the scrambled key, low first, as even as they go."""
    left, digits = _scrambled(key, p.seed), []
    for j in range(p.num_tables):
        width = p.bits // p.num_tables + (j < p.bits % p.num_tables)
        digits.append(left % 2**width)
        left >>= width
    return digits


def _hashes(key, p):
    mixed = (_scrambled(key, (p.seed + j) % INT32) for j in range(p.num_tables))
    words = ((each >> 32) ^ (each % INT32) for each in mixed)
    return [word * rows >> 32 for word, rows in zip(words, p.num_rows, strict=True)]


def _on_device(keys):
    return jax.tree.map(jnp.asarray, keys)


# --- keys -----------------------------------------------------------------------------------------

# These numbers never change: models trained with them would forget everything.
GOLDEN = {
    (0, 0): 12631321989986513636,
    (1, 0): 6606002205257027019,
    (2, 0): 13919194442636417706,
    (0, 1): 15714876940162866489,
    (1, 1): 680802067292506335,
}


@pytest.mark.parametrize(("key", "seed"), GOLDEN)
def test_golden_numbers_of_the_bijection(key, seed):
    assert _scrambled(key, seed) == GOLDEN[key, seed]
    assert scramble(Keys.of([key]), seed).to_numpy().tolist() == [GOLDEN[key, seed]]


@given(st.lists(keys64, max_size=8), seeds)
def test_the_bijection_is_that_of_integers_and_has_an_inverse(values, seed):
    keys = Keys.of(np.array(values, np.uint64))
    mixed = scramble(keys, seed)
    assert mixed.to_numpy().tolist() == [_scrambled(value, seed) for value in values]
    assert unscramble(mixed, seed).to_numpy().tolist() == values


def test_the_bijection_is_the_same_on_the_device():
    keys = Keys.of(np.random.default_rng(0).integers(0, 2**63, 1000))
    for seed in (0, 1, 2**32 - 1):
        mixed = scramble(_on_device(keys), seed)
        np.testing.assert_array_equal(mixed.to_numpy(), scramble(keys, seed).to_numpy())
        np.testing.assert_array_equal(unscramble(mixed, seed).to_numpy(), keys.to_numpy())


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True, "a"])
def test_a_seed_is_an_integer_of_32_bits(seed):
    with pytest.raises(ValueError, match="seed must be an integer"):
        scramble(Keys.of([1]), seed)
    with pytest.raises(ValueError, match="seed must be an integer"):
        KeyDigits(seed=seed)


INTEGERS = {
    "int64": np.array([-(2**63), -1, 0, 2**40]),
    "uint64": np.array([2**63, 2**64 - 1, 0, 2**40], np.uint64),
    "Python": [2**63, -1, 0, 2**40],
    "objects": np.array([2**63, -1, 0, 2**40], object),
}


@pytest.mark.parametrize("values", INTEGERS.values(), ids=INTEGERS)
def test_integers_are_the_same_64_bits_with_and_without_a_sign(values):
    assert Keys.of(values).to_numpy().tolist() == [2**63, 2**64 - 1, 0, 2**40]


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "uint32"])
def test_integers_of_the_device_are_those_of_the_host(dtype):
    values = np.array([5, 0, np.iinfo(dtype).max, np.iinfo(dtype).min], dtype)
    np.testing.assert_array_equal(
        Keys.of(jnp.asarray(values)).to_numpy(), Keys.of(values).to_numpy()
    )
    with jax.enable_x64(True):
        wide = jnp.asarray(INTEGERS["int64"])
        np.testing.assert_array_equal(
            Keys.of(wide).to_numpy(), Keys.of(INTEGERS["int64"]).to_numpy()
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.5], r"all integers or all text, got 1.5"),
        (np.ones(2), r"integers or text, got an array of float64"),
        (jnp.ones(2), r"integers, got a JAX array of float32"),
        ([True], r"integers or text, got an array of bool"),
        ([2**64], r"at most 64 bits.*got 18446744073709551616"),
        ([-(2**63) - 1], r"at most 64 bits.*got -9223372036854775809"),
        ([3, "a"], "all integers or all text"),
        ([None, 1], r"missing, got None at position 0"),
    ],
    ids=str,
)
def test_what_is_no_key_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Keys.of(values)
    with pytest.raises(ValueError, match=message):
        KeyDigits().indices(values)


def test_keys_are_shaped_and_compared_as_arrays():
    keys = Keys.of(np.arange(6).reshape(2, 3))
    assert (keys.shape, keys.ndim, keys.size, len(keys)) == ((2, 3), 2, 6, 2)
    assert keys[1, 2].to_numpy() == 5
    assert keys.reshape(-1).shape == (6,)
    assert (keys == 4).tolist() == [[False] * 3, [False, True, False]]
    assert (keys == keys).all()
    back = pickle.loads(pickle.dumps(keys))
    assert (back == keys).all()


def test_text_becomes_its_hash():
    assert Keys.of("a").to_numpy() == 0xD24EC4F1A98C6E5B
    assert (Keys.of(["a", "b"]) == Keys.of(np.array(["a", "b"]))).all()


def test_crosses_are_keys_of_keys():
    users, hours = np.arange(1000, 1100)[:, None], np.arange(24)
    crossed = cross(users, hours)
    assert crossed.shape == (100, 24)
    assert len(np.unique(crossed.to_numpy())) == 2400
    assert not (crossed == cross(hours, users)).any()
    assert not (crossed == cross(users, hours, seed=1)).any()
    on_device = cross(_on_device(Keys.of(users)), jnp.arange(24)[None])
    np.testing.assert_array_equal(on_device.to_numpy(), crossed.to_numpy())
    with pytest.raises(ValueError, match="at least 2, got 1"):
        cross(users)


# --- families -------------------------------------------------------------------------------------

PARTITIONS = {
    **{f"digits, {k} tables": KeyDigits(num_tables=k, seed=k) for k in (3, 4, 5, 7, 64)},
    **{f"{b} bits in {k}": KeyDigits(b, k) for b, k in ((1, 1), (31, 1), (48, 3), (63, 5))},
    "hashes": MultiHash((7, 65_537, 2**31 - 1, 1), seed=2**32 - 2),
}
per_partition = pytest.mark.parametrize("p", PARTITIONS.values(), ids=PARTITIONS)


@per_partition
@given(values=st.lists(keys64, max_size=6))
def test_row_numbers_are_those_of_loops_over_integers(p, values):
    rows = _hashes if isinstance(p, MultiHash) else _digits
    want = np.array([rows(value, p) for value in values]).reshape(-1, p.num_tables).T
    got = p.indices(np.array(values, np.uint64))
    assert all(index.dtype == np.int32 for index in got)
    np.testing.assert_array_equal(np.array(got), want)


@per_partition
def test_row_numbers_are_the_same_on_the_device(p):
    keys = Keys.of(np.random.default_rng(0).integers(0, 2**63, 1000))
    got = jax.jit(p.indices)(keys)
    assert all(index.dtype == np.int32 for index in got)
    np.testing.assert_array_equal(np.array(got), np.array(p.indices(keys)))


@pytest.mark.parametrize("k", [3, 4, 5, 7, 8, 64])
@given(values=st.lists(keys64, min_size=1, max_size=6))
def test_digits_of_all_64_bits_have_an_inverse(k, values):
    p = KeyDigits(num_tables=k)
    assert p.is_complementary
    keys = Keys.of(np.array(values, np.uint64))
    assert p.ids(*p.indices(keys)).to_numpy().tolist() == values


def test_the_inverse_is_the_same_on_the_device():
    keys, p = Keys.of(np.random.default_rng(0).integers(0, 2**63, 1000)), KeyDigits(num_tables=5)
    back = jax.jit(lambda keys: p.ids(*p.indices(keys)))(keys)
    np.testing.assert_array_equal(back.to_numpy(), keys.to_numpy())


PATTERNS = {
    "sequential": np.arange(2**16),
    "multiples of 4096": np.arange(2**16) << 12,
    "multiples of 2**32": np.arange(2**16) << 32,
    "multiples of a prime": np.arange(2**16) * 1_000_003,
    "slots above, counters below": (np.arange(2**16) % 16 << 48) | np.arange(2**16) // 16,
    "random": np.random.default_rng(0).integers(0, 2**63, 2**16),
}


@pytest.mark.parametrize("values", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("p", [KeyDigits(num_tables=4), KeyDigits(40, 5), MultiHash((1000, 3))])
def test_rows_are_evenly_used_whatever_the_pattern_of_the_keys(p, values):
    """Chi-square of each digit, and of neighbouring ones together: |z| of 5 is one in a million."""
    digits = [np.asarray(index) for index in p.indices(values)]
    sizes = list(p.num_rows)
    pairs = [(a % 16 * 16 + b % 16, 256) for a, b in itertools.pairwise(digits)]
    if isinstance(p, MultiHash):
        pairs = [(digits[0] * 3 + digits[1], 3000)]
    for digit, size in [*zip(digits, sizes, strict=True), *pairs]:
        digit, size = (digit >> 6, size >> 6) if size > 4096 else (digit, size)
        counts, mean = np.bincount(digit, minlength=size), len(values) / size
        assert len(counts) == size
        z = (((counts - mean) ** 2).sum() / mean - (size - 1)) / math.sqrt(2 * (size - 1))
        assert abs(z) < 5


@pytest.mark.parametrize("p", [KeyDigits(20, 2), MultiHash((1024, 1024)), MultiHash((500, 2000))])
def test_the_share_of_twins_is_the_expected_one(p):
    keys = Keys.of(np.random.default_rng(1).integers(0, 2**63, 100_000))
    rows = np.stack([np.asarray(index, np.int64) for index in p.indices(keys)], axis=1)
    codes = rows[:, 0] * p.num_rows[1] + rows[:, 1]
    counts = collections.Counter(codes.tolist())
    twins = sum(count for count in counts.values() if count > 1) / len(codes)
    expected = p.twin_rate(100_000)
    # Twins come in pairs: the deviation is that of twice a Poisson number of half as many.
    assert abs(twins - expected) < 5 * math.sqrt(2 * expected / 100_000)
    assert KeyDigits().twin_rate(10**12) == 0
    assert p.twin_rate(1) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KeyDigits(65), "bits must be at most 64, got 65"),
        (lambda: KeyDigits(0), "bits must be"),
        (lambda: KeyDigits(64, 2), "num_tables must be from 3 to 64 for 64 bits, got 2"),
        (lambda: KeyDigits(4, 5), "num_tables must be from 1 to 4 for 4 bits, got 5"),
        (lambda: MultiHash(), "num_rows must hold"),
        (lambda: MultiHash((0,)), r"num_rows\[0\] must be"),
        (lambda: MultiHash((2**31,)), "num_rows must hold sizes below"),
        (lambda: MultiHash(100), "num_rows must be a sequence"),
        (lambda: MultiHash((5,)).ids(np.zeros(1, np.int32)), "not complementary"),
        (lambda: KeyDigits(48).ids(*[np.zeros(1, np.int32)] * 4), "not complementary"),
        (lambda: KeyDigits().ids(np.zeros(1, np.int32)), "one array of row numbers per table, 4"),
        (lambda: qrhash.FullTable(10).indices(Keys.of([1])), "ids must be integers"),
        (lambda: EmbedConfig(qrhash.FullTable(10), 4).indices(Keys.of([1])), "family on keys"),
    ],
)
def test_what_a_family_cannot_be_or_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@per_partition
def test_families_go_through_json_and_pickle_and_are_hashed(p):
    assert qrhash.Partition.from_dict(p.to_dict()) == p == pickle.loads(pickle.dumps(p))
    assert len({p, pickle.loads(pickle.dumps(p))}) == 1
    config = EmbedConfig(p, 128)
    assert EmbedConfig.from_dict(config.to_dict()) == config


# --- look-ups and training ------------------------------------------------------------------------

KEYS = Keys.of(np.array([7, -1, 2**40, 7, 123456789]))


def _config(**options):
    options = {"operation": "add", "large_table_rows": 100} | options
    return EmbedConfig(MultiHash((300, 50)), 8, **options)


def test_a_look_up_is_the_combination_of_the_rows():
    cfg = _config()
    tables = qrhash.init(jax.random.key(0), cfg)
    want = sum(
        np.asarray(table)[index] for table, index in zip(tables, cfg.indices(KEYS), strict=True)
    )
    for keys in (KEYS, _on_device(KEYS), KEYS.to_numpy()):
        assert_close(qrhash.lookup(tables, keys, cfg), want)
    jitted = jax.jit(lambda tables, keys: qrhash.lookup(tables, keys, cfg))
    assert_close(jitted(tables, KEYS), want)
    mapped = jax.vmap(lambda key: qrhash.lookup(tables, key, cfg))(_on_device(KEYS))
    assert_close(mapped, want)


def test_the_padding_key_is_zeros_and_has_no_gradient():
    cfg = _config(padding_id=2**64 - 1)
    tables = qrhash.init(jax.random.key(0), cfg)
    vectors = qrhash.lookup(tables, KEYS, cfg)
    assert not np.asarray(vectors[1]).any()
    assert np.asarray(vectors)[[0, 2, 3, 4]].all()
    gradient = jax.grad(lambda tables: qrhash.lookup(tables, KEYS[1:2], cfg).sum())(tables)
    assert not any(np.asarray(each).any() for each in gradient)


def _train(cfg, steps=10):
    tables = qrhash.init(jax.random.key(0), cfg)
    tx = qrhash.touched_rows(optax.adagrad(0.1))
    state = tx.init(tables)

    @jax.jit
    def step(tables, state, keys, targets):
        loss = lambda t: ((qrhash.lookup(t, keys, cfg) - targets) ** 2).mean()  # noqa: E731
        value, grads = qrhash.value_and_grad(loss, large=cfg.large_tables)(tables)
        updates, state = tx.update(grads, state, tables)
        return qrhash.apply_updates(tables, updates), state, value

    rng, losses = np.random.default_rng(0), []
    for _ in range(steps):
        batch = (
            Keys.of(rng.integers(0, 2**63, 16)[rng.integers(0, 16, 16)]),
            np.ones((16, 8), "f4"),
        )
        if cfg.layout is not None:
            batch = qrhash.batches.put_batch(batch, 16, cfg.layout)
        tables, state, value = step(tables, state, *batch)
        losses.append(value)
    return whole(tables), jnp.stack(losses)


def test_training_by_rows_is_dense_training_and_that_of_a_mesh():
    got = _train(_config())
    assert got[1][-1] < got[1][0]
    for other in (_config(large_table_rows=1000), _config(layout=layout_2x4())):
        jax.tree.map(assert_close, _train(other), got)


def test_keys_and_ids_mixed_in_a_collection():
    config = CollectionConfig(
        {"user": _config(), "again": "user", "day": EmbedConfig(qrhash.FullTable(7), 8, "add")}
    )
    stacks = collection.init(jax.random.key(0), config)
    ids = {"user": KEYS, "again": KEYS[:2], "day": jnp.array([0, 6])}
    vectors = jax.jit(lambda stacks, ids: collection.lookup(stacks, ids, config))(stacks, ids)
    tables = collection.unstack(stacks, config)
    assert_close(vectors["user"], qrhash.lookup(tables["user"], KEYS, _config()))
    assert_close(vectors["again"], vectors["user"][:2])
    assert_close(vectors["day"], tables["day"][0][jnp.array([0, 6])])


def test_a_program_of_keys_is_exported():
    cfg = _config()
    tables = qrhash.init(jax.random.key(0), cfg)
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n"), jnp.uint32)
    look_up = lambda tables, hi, lo: qrhash.lookup(tables, Keys(hi, lo), cfg)  # noqa: E731
    exported = jax.export.export(jax.jit(look_up))(tables, shape, shape)
    assert_close(exported.call(tables, KEYS.hi, KEYS.lo), qrhash.lookup(tables, KEYS, cfg))


def test_both_flax_modules_take_keys():
    cfg = _config()
    model = qrhash.nnx.MultiHashEmbed(cfg, rngs=nnx.Rngs(0))
    optimizer = qrhash.nnx.Optimizer(model, optax.sgd(0.1))
    loss = lambda model, keys: (model(keys) ** 2).sum()  # noqa: E731
    before, grads = qrhash.nnx.value_and_grad(loss)(model, KEYS)
    optimizer.update(model, grads)
    assert loss(model, KEYS) < before
    linen = qrhash.linen.MultiHashEmbed(cfg)
    params = {f"table_{j}": table for j, table in enumerate(model.tables)}
    assert_close(linen.apply({"params": params}, KEYS), model(KEYS))
