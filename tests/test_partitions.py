"""The laws of every family, from a vocabulary of one id to one of 2**63."""

import dataclasses
import itertools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import qrhash
from support import cases, oracle

UNCHECKED_KEYS = True

SIZES = [1, 2, 3, 15, 16, 17, 97, 10**4 - 1, 10**4, 10**4 + 1, 2**24 + 1, 10**8]
EDGES = [2**31 - 1, 2**31, 2**31 + 1, 2**32 + 1, 2**62, 2**63 - 1, 2**63]
SMALL = [1, 2, 3, 5, 7, 8, 9, 10, 24, 25, 26]
BATCH = 16  # ids per example: one shape, so that JAX compiles its primitives once


def _full(draw, n):
    assume(n < 2**63)
    return qrhash.FullTable(n)


def _hash(draw, n):
    return qrhash.HashTrick(n, draw(st.integers(1, min(2 * n, 2**63 - 1))))


def _quotient_remainder(draw, n):
    collisions = draw(st.none() | st.integers(1, min(n, 2**62)) | st.integers(1, min(n, 60)))
    assume(n < 2**63 or collisions != 1)
    return qrhash.QuotientRemainder(n, collisions)


def _mixed_radix(draw, n):
    k = draw(st.integers(2, 4))
    radices = draw(st.lists(st.integers(1, math.isqrt(n) + 1), min_size=k - 1, max_size=k - 1))
    return qrhash.MixedRadix(n, _with_last(draw, radices, -(-n // math.prod(radices))))


def _chinese_remainder(draw, n):
    k = draw(st.integers(2, 4))
    moduli = []
    for _ in range(k - 1):
        moduli.append(_coprime(draw(st.integers(1, math.isqrt(n) + 1)), moduli))
    last = _coprime(-(-n // math.prod(moduli)), moduli)
    return qrhash.ChineseRemainder(n, _with_last(draw, moduli, last))


def _coprime(start, others):
    return next(m for m in itertools.count(start) if all(math.gcd(m, o) == 1 for o in others))


def _with_last(draw, sizes, last):
    """The sizes with the one that makes up the product, in any order, none above 2**63 - 1."""
    assume(last < 2**63)
    return draw(st.permutations([*sizes, last]))


def _deeprec(draw, n):
    root = math.isqrt(n - 1) + 1
    quotients = draw(st.integers(max(1, root - 1), root + 3) | st.integers(1, n))
    remainders = draw(st.integers(quotients, quotients + 3) | st.integers(1, n))
    assume(max(quotients, remainders) < 2**63)
    return qrhash.deeprec.DeepRecQuotientRemainder(n, quotients, remainders)


def _codes(draw, n):
    """Codes of few ids: they are looked up one by one."""
    k, most = draw(st.integers(1, 3)), draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, most, (min(n, 60), k))
    return qrhash.CodePartition(codes, tie_breaker=draw(st.booleans()))


BUILDERS = {
    "full": _full,
    "hash": _hash,
    "quotient-remainder": _quotient_remainder,
    "mixed radix": _mixed_radix,
    "balanced radices": lambda draw, n: qrhash.MixedRadix.balanced(n, draw(st.integers(2, 5))),
    "chinese remainder": _chinese_remainder,
    "balanced moduli": lambda draw, n: qrhash.ChineseRemainder.balanced(n, draw(st.integers(2, 4))),
    "deeprec": _deeprec,
    "codes": _codes,
}
every_family = pytest.mark.parametrize("family", BUILDERS)


def _partition(data, family, sizes):
    n = data.draw(st.sampled_from(sizes) | st.integers(1, max(sizes)), label="n")
    return BUILDERS[family](data.draw, n)


def _ids(data, n):
    """BATCH ids: the first, the last, around the powers where other people's division fails."""
    some = data.draw(st.lists(st.integers(0, n - 1), max_size=BATCH - 6), label="ids")
    fixed = [0, n - 1, n // 2, min(n - 1, 2**24 + 1), min(n - 1, 2**53 + 1), min(n - 1, 2**31)]
    return np.resize(np.array([*fixed, *some], np.int64), BATCH)


def _equal(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(g), np.asarray(w).astype(np.int64))


@every_family
@given(data=st.data())
def test_numpy_ids_follow_the_definition_and_come_back(family, data):
    p = _partition(data, family, SIZES + EDGES)
    ids = _ids(data, p.num_embeddings)
    rows = p.indices(ids)
    assert p.num_rows == oracle.num_rows(p)
    assert p.num_tables == len(rows)
    _equal(rows, oracle.indices(p, ids))
    for row, size in zip(rows, p.num_rows, strict=True):
        assert isinstance(row, np.ndarray)
        assert row.dtype == (np.int32 if size < 2**31 else np.int64)
    if p.is_complementary:
        assert all((row < size).all() for row, size in zip(rows, p.num_rows, strict=True))
        back = p.ids(*rows)
        assert isinstance(back, np.ndarray)
        assert back.dtype == np.int64
        np.testing.assert_array_equal(back, ids)


@every_family
@given(data=st.data())
def test_jax_ids_give_what_numpy_ids_give(family, data):
    p = _partition(data, family, [*SIZES, 2**31 - 1, 2**31])
    assume(p.num_embeddings <= 2**31 and max(p.num_rows) < 2**31)
    ids = _ids(data, p.num_embeddings)
    ids[-3:] = [-1, -(2**31), min(p.num_embeddings, 2**31 - 1)]
    rows = p.indices(jnp.asarray(ids, jnp.int32))
    assert all(isinstance(row, jax.Array) and row.dtype == jnp.int32 for row in rows)
    _equal(rows, p.indices(ids))
    if p.is_complementary:
        back = p.ids(*rows)
        assert isinstance(back, jax.Array)
        assert back.dtype == jnp.int32
        np.testing.assert_array_equal(back, p.ids(*p.indices(ids)))


@pytest.mark.parametrize("n", SMALL)
def test_small_vocabularies_exhaustively(n):
    """All codes distinct, and every tuple of row numbers, in range or not, has its id or -1."""
    root = math.isqrt(n - 1) + 1
    partitions = [
        qrhash.FullTable(n),
        qrhash.HashTrick(n, n + 2),
        *(qrhash.QuotientRemainder(n, m) for m in (None, 1, 3, n, n + 1)),
        qrhash.MixedRadix(n, (1, 2, n)),
        *(qrhash.MixedRadix.balanced(n, k) for k in (2, 3)),
        qrhash.ChineseRemainder(n, (2, 1, n | 1)),
        *(qrhash.ChineseRemainder.balanced(n, k) for k in (2, 3)),
        qrhash.deeprec.DeepRecQuotientRemainder(n, root, root + 1),
    ]
    for p in partitions:
        rows = p.indices(np.arange(n))
        assert len(set(zip(*map(np.ndarray.tolist, rows), strict=True))) == n, p
        assert p.is_complementary, p
        grid = np.meshgrid(*(np.arange(-1, size + 2) for size in p.num_rows))
        found = oracle.inverse(p)
        want = [
            found.get(code, -1) for code in zip(*(g.ravel().tolist() for g in grid), strict=True)
        ]
        np.testing.assert_array_equal(p.ids(*grid).ravel(), want, err_msg=str(p))


@every_family
@given(data=st.data())
def test_an_id_out_of_range_has_no_row_in_any_table(family, data):
    p = _partition(data, family, SIZES + EDGES)
    n = p.num_embeddings
    dtypes = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
    for dtype in dtypes:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        bad = [x for x in (-1, low, -n, n, n + 1, 2 * n, high) if low <= x <= high]
        bad = np.array([x for x in bad if not 0 <= x < n], dtype)
        for row, size in zip(p.indices(bad), p.num_rows, strict=True):
            assert (row == size).all(), (dtype, bad, row)


@every_family
@given(data=st.data())
def test_row_numbers_of_no_id_give_minus_one(family, data):
    """Whatever the row numbers, the inverse names an id that has them or none at all."""
    p = _partition(data, family, SIZES + EDGES)
    assume(p.is_complementary)
    numbers = st.integers(-(2**63), 2**63 - 1)
    per_table = [st.integers(-1, min(size, 2**63 - 1)) | numbers for size in p.num_rows]
    codes = data.draw(st.lists(st.tuples(*per_table), min_size=1, max_size=BATCH))
    ids = p.ids(*np.array(codes, np.int64).T)
    assert all(
        x == -1 or oracle.code(p, int(x)) == code for x, code in zip(ids, codes, strict=True)
    )


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
@pytest.mark.parametrize("n", [5, 300, 70_000])
def test_narrow_and_unsigned_jax_ids(n, dtype):
    p = qrhash.MixedRadix.balanced(n, 3)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    ids = np.array([0, 3, min(high, n - 1), min(high, n), low, high, high - 1], dtype)
    _equal(p.indices(jnp.asarray(ids)), oracle.indices(p, ids))


@pytest.mark.parametrize(
    "ids", [7, [7, -1], [], np.int8(7), np.zeros((0, 2), int), (10**30 > 0) + 6]
)
def test_python_and_numpy_integers_of_any_rank(ids):
    p = qrhash.QuotientRemainder(10, 4)
    rows = p.indices(ids)
    assert all(isinstance(r, (np.ndarray, np.generic)) for r in rows)
    assert all(r.shape == np.shape(ids) for r in rows)
    _equal(rows, oracle.indices(p, np.asarray(ids, np.int64)))


@pytest.mark.parametrize(
    "ids", [1.0, [1.5], np.ones(2), jnp.ones(2), True, np.ones(2, bool), ["a"], None]
)
def test_ids_that_are_not_integers_are_refused(ids):
    with pytest.raises(ValueError, match="integer"):
        qrhash.QuotientRemainder(10, 4).indices(ids)


def test_hash_trick_and_deeprec_know_whether_they_are_complementary():
    sizes = range(1, 8)
    partitions = [qrhash.HashTrick(n, b) for n in range(1, 12) for b in range(1, 14)]
    partitions += [
        qrhash.deeprec.DeepRecQuotientRemainder(n, q, r)
        for n in range(1, 30)
        for q in sizes
        for r in sizes
    ]
    wrong = [p for p in partitions if p.is_complementary != oracle.is_complementary(p)]
    assert not wrong
    for p in partitions:
        if not p.is_complementary:
            with pytest.raises(ValueError, match="complementary"):
                p.ids(*p.indices(np.arange(p.num_embeddings)))


@pytest.mark.parametrize(
    ("partition", "answer"),
    [
        (qrhash.deeprec.DeepRecQuotientRemainder(10**8, 10**4, 10**4), True),
        (qrhash.deeprec.DeepRecQuotientRemainder(10**8 + 1, 10**4, 10**4), False),
        (qrhash.deeprec.DeepRecQuotientRemainder(10**8, 10**4, 10**4 - 1), False),
        (qrhash.deeprec.DeepRecQuotientRemainder(2**62, 2**31, 2**31), True),
        (qrhash.HashTrick(2**62, 2**62 - 1), False),
        (qrhash.HashTrick(2**62, 2**62), True),
        (qrhash.QuotientRemainder(2**62), True),
    ],
)
def test_complementarity_of_large_vocabularies_is_decided_at_once(partition, answer):
    start = time.perf_counter()
    assert partition.is_complementary is answer
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("family", [qrhash.MixedRadix, qrhash.ChineseRemainder])
def test_balanced_sizes_are_the_fewest_rows(family, k):
    for n in [*range(1, 31), 36, 37, 48, 49, 50]:
        p = family.balanced(n, k)
        assert p.num_tables == k
        assert math.prod(p.num_rows) >= n
        want = oracle.smallest_rows(n, k, coprime=family is qrhash.ChineseRemainder)
        assert sum(p.num_rows) == want, (n, p)


@pytest.mark.parametrize("k", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("n", [1, 10**8, 2**31 + 11, 2**63])
def test_balanced_sizes_of_large_vocabularies(n, k):
    start = time.perf_counter()
    radix, chinese = qrhash.MixedRadix.balanced(n, k), qrhash.ChineseRemainder.balanced(n, k)
    assert time.perf_counter() - start < 5
    for p in (radix, chinese):
        assert p.num_tables == k
        assert math.prod(p.num_rows) >= n
    assert all(math.gcd(a, b) == 1 for a, b in itertools.combinations(chinese.moduli, 2))
    assert max(radix.radices) - min(radix.radices) <= 1
    assert sum(radix.num_rows) <= sum(chinese.num_rows) < 1.1 * sum(radix.num_rows) + 4 * k**2


def test_default_collisions_make_equal_tables():
    """ceil(sqrt(n)) exactly, also where a float's square root is off by one."""
    for n in [*range(1, 200), 10**8, (2**31 - 1) ** 2, (2**31 - 1) ** 2 + 1, 2**62, 2**63]:
        m = math.isqrt(n - 1) + 1
        assert qrhash.QuotientRemainder(n).num_rows == (-(-n // m), m)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_jit_vmap_and_tracing_under_grad(family):
    p = cases.FAMILIES[family]
    ids = jnp.arange(-2, p.num_embeddings + 2, dtype=jnp.int32).reshape(-1, 1)
    want = oracle.indices(p, ids)
    _equal(jax.jit(p.indices)(ids), want)
    _equal(jax.vmap(p.indices)(ids), want)
    table = jnp.zeros(p.num_rows[0])
    read = lambda table, ids: table.at[p.indices(ids)[0]].get(mode="fill", fill_value=0.0).sum()  # noqa: E731
    counts = jax.jit(jax.grad(read))(table, ids)
    want = np.bincount(want[0].astype(int).ravel(), minlength=p.num_rows[0] + 1)[:-1]
    np.testing.assert_array_equal(counts, want)


def test_a_float32_quotient_would_be_wrong():
    """DLRM divides ids in float32, which errs from 2**24 on: ours is exact on host and device."""
    p = qrhash.QuotientRemainder(10**8, 4)
    ids = np.concatenate([np.arange(2**24, 2**24 + 500), np.arange(10**8 - 500, 10**8)])
    in_float32 = np.float32(ids) / np.float32(4)
    assert (in_float32.astype(np.int64) != ids // 4).mean() > 0.2
    for rows in (p.indices(ids), p.indices(jnp.asarray(ids, jnp.int32))):
        _equal(rows, (ids // 4, ids % 4))


def test_deeprecs_own_unit_test_collides():
    p = qrhash.deeprec.DeepRecQuotientRemainder(15, 5, 3)
    _equal(p.indices([0, 3]), ([0, 0], [0, 0]))
    assert not p.is_complementary


@pytest.mark.parametrize(
    "p",
    [
        qrhash.QuotientRemainder(2**31 + 1),
        qrhash.MixedRadix.balanced(2**40, 4),
        qrhash.HashTrick(2**31 + 1, 10),
        qrhash.HashTrick(10, 2**31),
        qrhash.FullTable(2**31),
    ],
)
@pytest.mark.parametrize("dtype", ["int32", "uint32", "int8"])
def test_ids_too_narrow_for_the_vocabulary_are_refused(p, dtype):
    ids = jnp.zeros(2, dtype)
    for indices in (p.indices, jax.jit(p.indices)):
        with pytest.raises(ValueError, match=r"(?s)64.*(NumPy|numpy|host).*"):
            indices(ids)


@pytest.mark.parametrize(
    "p",
    [
        qrhash.MixedRadix.balanced(2**40, 4),
        qrhash.QuotientRemainder(2**62),
        qrhash.FullTable(2**40),
    ],
)
def test_64_bit_jax_ids_under_x64(p):
    ids = np.array([0, 2**31, 2**33 + 1, p.num_embeddings - 1, p.num_embeddings, -1])
    with jax.enable_x64(True):
        rows = p.indices(jnp.asarray(ids))
        _equal(rows, p.indices(ids))
        np.testing.assert_array_equal(p.ids(*rows), [*ids[:4], -1, -1])


@pytest.mark.parametrize("size", [0, -3, 2.0, 2.5, True, np.True_, "4", None, np.float32(3), [4]])
@pytest.mark.parametrize(
    ("argument", "build"),
    [
        ("num_embeddings", qrhash.FullTable),
        ("num_embeddings", lambda s: qrhash.HashTrick(s, 3)),
        ("num_buckets", lambda s: qrhash.HashTrick(3, s)),
        ("num_embeddings", qrhash.QuotientRemainder),
        ("num_collisions", lambda s: qrhash.QuotientRemainder(3, 0 if s is None else s)),
        ("num_embeddings", lambda s: qrhash.MixedRadix(s, (2, 3))),
        ("radices", lambda s: qrhash.MixedRadix(3, (5, s))),
        ("num_embeddings", lambda s: qrhash.MixedRadix.balanced(s, 2)),
        ("num_tables", lambda s: qrhash.MixedRadix.balanced(9, s)),
        ("num_embeddings", lambda s: qrhash.ChineseRemainder(s, (2, 3))),
        ("moduli", lambda s: qrhash.ChineseRemainder(3, (5, s))),
        ("num_embeddings", lambda s: qrhash.ChineseRemainder.balanced(s, 2)),
        ("num_tables", lambda s: qrhash.ChineseRemainder.balanced(9, s)),
        ("num_embeddings", lambda s: qrhash.deeprec.DeepRecQuotientRemainder(s, 3, 3)),
        ("num_quotients", lambda s: qrhash.deeprec.DeepRecQuotientRemainder(3, s, 3)),
        ("num_remainders", lambda s: qrhash.deeprec.DeepRecQuotientRemainder(3, 3, s)),
    ],
)
def test_sizes_that_are_not_positive_integers_are_refused(argument, build, size):
    value = 0 if size is None and argument == "num_collisions" else size
    with pytest.raises(ValueError, match=argument) as error:
        build(size)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: qrhash.MixedRadix(25, (4, 6)), ["radices", "product", "25", "24"]),
        (lambda: qrhash.MixedRadix(25, (25,)), ["radices", "2", "25"]),
        (lambda: qrhash.MixedRadix(25, 25), ["radices", "25"]),
        (lambda: qrhash.MixedRadix.balanced(25, 1), ["num_tables", "2", "1"]),
        (lambda: qrhash.ChineseRemainder(36, (5, 7)), ["moduli", "product", "36", "35"]),
        (lambda: qrhash.ChineseRemainder(10, (5, 4, 6)), ["moduli", "coprime", "4", "6", "factor"]),
        (lambda: qrhash.ChineseRemainder(10, ()), ["moduli", "2"]),
        (lambda: qrhash.FullTable(2**63 + 1), ["num_embeddings", "2**63", str(2**63 + 1)]),
        (lambda: qrhash.QuotientRemainder(10, 4).ids(np.zeros(2, int)), ["2", "1"]),
        (lambda: qrhash.HashTrick(10, 4).ids(np.zeros(2, int)), ["HashTrick", "complementary"]),
    ],
)
def test_rules_that_are_broken_are_named(build, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        build()
    assert all(word in str(error.value) for word in words), error.value


def test_partitions_are_frozen_hashable_values():
    p = qrhash.MixedRadix(np.int64(24), [np.int32(4), 6])
    q = qrhash.MixedRadix(24, (4, 6))
    assert p == q
    assert hash(p) == hash(q)
    assert p != qrhash.MixedRadix(24, (6, 4))
    assert qrhash.QuotientRemainder(16) == qrhash.QuotientRemainder(16, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.num_embeddings = 3
