"""Full tables and compressed ones, against loops and dense algebra; vocabularies that grow."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qrhash
from qrhash.fitting import Errors, alternating, equations, expand, fit, grow, grow_tables
from qrhash.inspection import frequency_bands
from support.cases import OPERATIONS, assert_close, covering, parameters
from support.meshes import layout_2x4, whole

UNCHECKED_KEYS = True

FAMILIES = {  # one, two and three tables
    "full": qrhash.FullTable(60),
    "hash trick": qrhash.HashTrick(60, 13),
    "quotient-remainder": qrhash.QuotientRemainder(60, 7),
    "chinese remainder": qrhash.ChineseRemainder(60, (8, 9)),
    "mixed radix": qrhash.MixedRadix(300, (3, 4, 30)),
    "codes": qrhash.CodePartition(
        np.random.default_rng(1).integers(0, 5, (60, 2)), tie_breaker=True
    ),
    "hashes": qrhash.MultiHash((9, 10)),
}


def _config(family="quotient-remainder", operation="mult", **options):
    return qrhash.EmbedConfig(FAMILIES[family], 8, operation, **options)


def _keys(config, n=60):
    return np.arange(n) * 7919 - 3 if config.partition.takes_keys else None


def _num_ids(config):
    return 60 if config.partition.takes_keys else config.num_embeddings


def _weights(n, seed=1):
    return np.random.default_rng(seed).permutation(1000 / (1 + np.arange(n)) ** 0.7)


def _noise(config, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((_num_ids(config), config.features)).astype(np.float32)


# --- fits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "operation", "is_weighted"), covering(FAMILIES, OPERATIONS, (False, True))
)
def test_what_a_config_can_represent_comes_back(family, operation, is_weighted):
    config = _config(family, operation)
    tables, projection = parameters(config, np.random.default_rng(2))
    keys = _keys(config)
    full = expand(tables, config, projection, keys=keys)
    weights = _weights(len(full)) if is_weighted else None
    fitted = fit(full, config, keys=keys, weights=weights, num_iterations=300, num_starts=6)
    assert_close(expand(fitted.tables, config, fitted.projection, keys=keys), full)
    assert fitted.error.all < 1e-10


@given(
    n=st.integers(1, 30),
    buckets=st.integers(1, 9),
    seed=st.integers(0, 99),
    is_weighted=st.booleans(),
)
def test_rows_of_a_single_table_are_the_means_of_loops(n, buckets, seed, is_weighted):
    rng = np.random.default_rng(seed)
    full = rng.standard_normal((n, 2))
    weights = rng.integers(0, 3, n) if is_weighted else np.ones(n, int)
    weights[0] = 1
    config = qrhash.EmbedConfig(qrhash.HashTrick(n, buckets), 2)
    (table,), _, error = fit(full, config, weights=weights if is_weighted else None, block_rows=7)
    means = {}
    for bucket in {i % buckets for i in range(n) if weights[i]}:
        of = [i for i in range(n) if i % buckets == bucket]
        means[bucket] = sum(weights[i] * full[i] for i in of) / sum(weights[i] for i in of)
    mean = sum(w * x for w, x in zip(weights, full, strict=True)) / weights.sum()
    for bucket in range(buckets):
        assert_close(table[bucket], means.get(bucket, mean))
    assert_close(error.all, _relative(full, np.asarray(table)[np.arange(n) % buckets], weights))


def _relative(full, vectors, weights, where=slice(None)):
    mean = np.average(full, axis=0, weights=weights)
    of = lambda a, b: (weights[:, None] * (a - b) ** 2)[where].sum()  # noqa: E731
    missed, spread = of(full, vectors), of(full, mean)
    return missed / spread if spread else 0.0


def test_each_part_of_concat_is_fitted_to_its_columns():
    config = _config("chinese remainder", "concat", widths=(3, 5))
    full, weights = _noise(config), _weights(60)
    tables = fit(full, config, weights=weights).tables
    for table, part, modulus in zip(tables, (full[:, :3], full[:, 3:]), (8, 9), strict=True):
        for row in range(modulus):
            ids = np.arange(row, 60, modulus)
            assert_close(table[row], np.average(part[ids], axis=0, weights=weights[ids]))


@pytest.mark.parametrize("family", ["quotient-remainder", "mixed radix", "hashes"])
def test_sums_are_the_least_squares_of_dense_algebra(family):
    config = _config(family, "add")
    full, keys = _noise(config), _keys(config)
    weights = _weights(len(full))
    fitted = fit(full, config, keys=keys, weights=weights)
    ids = np.arange(len(full)) if keys is None else keys
    ones = np.zeros((len(full), sum(config.partition.num_rows)))
    starts = np.cumsum((0, *config.partition.num_rows[:-1]))
    for start, index in zip(starts, config.indices(ids), strict=True):
        ones[np.arange(len(full)), start + index] = 1
    root = np.sqrt(weights)[:, None]
    best = ones @ np.linalg.lstsq(root * ones, root * full)[0]
    assert_close(expand(fitted.tables, config, keys=keys), best)
    assert_close(fitted.error.all, _relative(full, best, weights))


WIDTHS = {("path", 3): (8, 3, 15), ("path", 2): (3, 20), ("concat", 3): (1, 2, 2)}


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_equations_are_those_of_derivatives(operation, k, rng):
    """The vector is affine in each table's rows: A by autodiff, c the vector of zeros."""
    partition = [
        qrhash.FullTable(5),
        qrhash.QuotientRemainder(5, 2),
        qrhash.MixedRadix(5, (2, 2, 2)),
    ]
    config = qrhash.EmbedConfig(partition[k - 1], 5, operation, widths=WIDTHS.get((operation, k)))
    model = equations.Model(config)
    if operation == "project":
        shape = config.projection_shape
        model.projection = qrhash.Projection(rng.standard_normal(shape), rng.standard_normal(5))
    rows = [rng.standard_normal((4, width)) for width in config.widths]
    wanted = rng.standard_normal((4, 5))
    in_jax = jax.tree.map(lambda each: jnp.asarray(each, jnp.float32), model.projection)
    for table in range(k):
        gram, rhs = model.equations(rows, table, wanted)
        for i in range(4):

            def vector(row, table=table, i=i):
                of_id = [jnp.asarray(each[i], jnp.float32) for each in rows]
                return qrhash.combine([*of_id[:table], row, *of_id[table + 1 :]], operation, in_jax)

            start = jnp.zeros(config.widths[table])
            slope, shift = np.asarray(jax.jacfwd(vector)(start), float), np.asarray(vector(start))
            outputs = rhs.shape[2] if rhs.ndim == 3 else 1
            got = gram[i] if gram.ndim == 3 else np.diag(np.broadcast_to(gram[i], len(start)))
            assert_close(np.kron(got, np.eye(outputs)), slope.T @ slope, 1e-4)
            assert_close(rhs[i].reshape(-1), slope.T @ (wanted[i] - shift), 1e-4)


@pytest.mark.parametrize("operation", ["project", "path"])
def test_alternating_sweeps_end_where_nothing_is_to_gain(operation):
    config = _config(operation=operation)
    full, weights, errors = _noise(config), _weights(60), []
    fitted = fit(
        full,
        config,
        weights=weights,
        num_iterations=1000,
        num_starts=1,
        tolerance=1e-7,
        progress=lambda sweep, error: errors.append(error),
    )
    assert all(np.diff(errors) < 0)
    assert errors[-1] == pytest.approx(fitted.error.all, rel=1e-4)

    def loss(tables, projection):
        vectors = qrhash.lookup(tables, jnp.arange(60), config, projection)
        return (jnp.asarray(weights, jnp.float32)[:, None] * (vectors - full) ** 2).sum()

    slopes = jax.grad(loss, argnums=(0, 1))
    further = jax.tree.map(lambda each: 1.1 * each, fitted[:2])
    for slope, of_another in zip(
        jax.tree.leaves(slopes(*fitted[:2])), jax.tree.leaves(slopes(*further)), strict=True
    ):
        assert np.linalg.norm(slope) < 0.01 * np.linalg.norm(of_another)


def test_factors_are_as_large_as_what_they_stand_for():
    config = _config(operation="mult")
    full, weights, errors = _noise(config), _weights(60), []
    fitted = fit(full, config, weights=weights, progress=lambda sweep, error: errors.append(error))
    assert all(np.diff(errors) < 0)
    assert errors[-1] < fitted.error.all < 1.5 * errors[-1]
    large, small = (np.asarray(table, float) for table in fitted.tables)
    large_index, small_index = config.indices(np.arange(60))
    for row in range(9):  # The best, the others given.
        ids = np.flatnonzero(large_index == row)
        others, w = small[small_index[ids]], weights[ids, None]
        assert_close(large[row], (w * others * full[ids]).sum(0) / (w * others**2).sum(0))
    sizes = np.sqrt(np.mean(small**2, axis=1))
    assert sizes.min() > 0.6


def test_factors_of_rare_ids_do_not_vanish():
    """Where one id of each row counts for all, what the others share with it is next to nothing."""
    config = _config(operation="mult")
    weights = np.where(np.arange(60) % 7 == 0, 1000.0, 1.0)
    small = np.asarray(fit(_noise(config), config, weights=weights).tables[1])
    assert np.sqrt(np.mean(small**2, axis=1)).min() > 0.5


def test_errors_are_those_of_loops_over_head_middle_and_tail():
    config = _config("hash trick")
    full, weights = _noise(config), _weights(60)
    fitted = fit(full, config, weights=weights)
    vectors, bands = expand(fitted.tables, config), frequency_bands(weights)
    want = [_relative(full, vectors, weights, bands == band) for band in range(3)]
    assert_close(fitted.error, [_relative(full, vectors, weights), *want])
    assert_close(fit(full, config, weights=weights / 1e9).error, fitted.error)
    assert fit(full, config).error[1:] == (None, None, None)
    assert fit(np.ones((60, 8)), config).error == Errors(0.0)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_of_no_weight_do_not_matter_and_rows_without_ids_are_means(operation):
    config = _config(operation=operation, padding_id=3)
    full, weights = _noise(config).astype(np.float64), _weights(60)
    weights[14:21] = 0  # all ids of a quotient
    want = fit(full, config, weights=weights)
    full[14:21], full[3] = np.nan, np.inf
    got = fit(full, config, weights=weights)
    for a, b in zip(jax.tree.leaves(got[:2]), jax.tree.leaves(want[:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    of_row = np.array([weights[np.arange(7 * q, min(60, 7 * q + 7))].sum() for q in range(9)])
    of_row[0] -= weights[3]
    others = np.average(np.asarray(got.tables[0], float), axis=0, weights=of_row)
    assert_close(got.tables[0][2], others)


@pytest.mark.parametrize("operation", ["add", "mult", "project", "path"])
def test_blocks_files_and_devices_change_nothing(operation, tmp_path, monkeypatch):
    config = _config(
        "quotient-remainder", operation, widths=(8, 8) if operation == "project" else None
    )
    full, weights = _noise(config), _weights(60)
    few = {"weights": weights, "num_iterations": 3, "num_starts": 1}
    want = fit(full, config, **few)
    file = np.lib.format.open_memmap(tmp_path / "full.npy", "w+", np.float32, (60, 8))
    file[:] = full
    monkeypatch.setattr(alternating, "_AT_ONCE", 1)  # several passes where rows have systems
    for array, rows in ((file, 7), (jnp.asarray(full), 16), (full[::-1][::-1], 60)):
        got = fit(array, config, block_rows=rows, **few)
        for a, b in zip(jax.tree.leaves(got[:2]), jax.tree.leaves(want[:2]), strict=True):
            assert_close(a, b, 1e-4)
    narrow = jnp.asarray(full, jnp.bfloat16)
    wide = np.asarray(narrow).astype(np.float32)
    assert fit(narrow, config).error == fit(wide, config).error


def test_sizes_are_those_that_training_starts_with():
    full = 100 * _noise(_config())
    _, small = fit(full, _config(operation="mult")).tables
    np.testing.assert_allclose(np.mean(np.square(small), axis=0), 1, rtol=1e-5)
    config = _config(operation="project")
    fitted, drawn = fit(full, config), qrhash.init_projection(jax.random.key(0), config)
    np.testing.assert_allclose(np.mean(np.square(fitted.tables[1]), axis=0), 1, rtol=1e-5)
    of_rows = np.asarray(fitted.projection.kernel)[[0, 1, 4, 5]]  # of the table, and of the product
    assert np.sum(of_rows**2) / 2 == pytest.approx(np.sum(np.square(drawn.kernel)) / 6, rel=0.3)
    config = _config(operation="path")
    drawn, fitted = qrhash.init(jax.random.key(0), config), fit(full, config).tables
    sizes = [np.mean(np.square(np.asarray(each[1])[:, :16])) for each in (drawn, fitted)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.3)


def test_a_seed_fixes_the_tables():
    config = _config("mixed radix", "mult")
    full = _noise(config)
    a, b, c = (fit(full, config, seed=seed, num_iterations=3).tables for seed in (1, 1, 2))
    assert all(map(np.array_equal, a, b))
    assert not any(map(np.array_equal, a, c))


def test_no_more_than_a_block_is_in_memory(tmp_path):
    config = qrhash.EmbedConfig(qrhash.QuotientRemainder(60_000, 200), 32, "mult")
    shape = (60_000, 32)
    for dtype, name in ((np.float32, "full"), (np.float32, "back")):
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", dtype, shape)
    full = np.lib.format.open_memmap(tmp_path / "full.npy", "r+")
    for start in range(0, 60_000, 6000):
        full[start : start + 6000] = np.random.default_rng(start).standard_normal((6000, 32))
    back = np.lib.format.open_memmap(tmp_path / "back.npy", "r+")
    tracemalloc.start()
    fitted = fit(full, config, block_rows=1000, num_iterations=1)
    expand(fitted.tables, config, out=back, block_rows=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < full.nbytes / 2
    assert_close(back[-3:], qrhash.lookup(fitted.tables, np.arange(59_997, 60_000), config))


FULL = np.ones((60, 8), np.float32)
KEYS = np.arange(60)
REFUSED = [
    ({"config": _config(operation="features")}, "config must be of an operation .* 'features'"),
    ({"config": 3}, "config must be a qrhash.EmbedConfig"),
    ({"full": [1.0]}, "full must be an array .* got list"),
    ({"full": FULL.astype(int)}, "full must hold floats, got int64"),
    ({"full": FULL[:5]}, r"full must have shape \(60, 8\), .* got \(5, 8\)"),
    ({"full": FULL * np.nan}, "full must hold finite numbers"),
    ({"weights": np.ones(3)}, r"weights must be 60 numbers of at least 0, .* got shape \(3,\)"),
    ({"weights": -np.ones(60)}, "weights must be 60 numbers"),
    ({"weights": np.zeros(60)}, "weights must be above 0 for one row at least"),
    ({"keys": KEYS}, "keys must be left out for QuotientRemainder"),
    ({"config": _config("hashes")}, "keys must be given for MultiHash"),
    ({"config": _config("hashes"), "keys": KEYS[:, None]}, r"keys must have shape \[n\]"),
    ({"config": _config("hashes"), "keys": KEYS[:5]}, r"full must have shape \(5, 8\)"),
    ({"num_iterations": 0}, "num_iterations must be a positive integer, got 0"),
    ({"tolerance": 2}, "tolerance must be a number between 0 and 1, got 2"),
    ({"block_rows": -1}, "block_rows must be a positive integer, got -1"),
    ({"num_starts": 0}, "num_starts must be a positive integer, got 0"),
    ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_is_wrong_is_said(given, message):
    given = {"full": FULL, "config": _config()} | given
    with pytest.raises(ValueError, match=message):
        fit(given.pop("full"), given.pop("config"), **given)


def test_ids_without_rows_are_left_out():
    partition = qrhash.deeprec.DeepRecQuotientRemainder(12, 3, 4)  # ids below 9 have rows
    config = qrhash.EmbedConfig(partition, 8, "add", id_policy="nan")
    tables, _ = parameters(config, np.random.default_rng(0))
    full = expand(tables, config)
    assert np.isnan(full[9:]).all()
    assert fit(full, config).error.all < 1e-10
    nobody = qrhash.EmbedConfig(qrhash.FullTable(1), 8, padding_id=0)
    with pytest.raises(ValueError, match="full must have a row of an id that has rows"):
        fit(FULL[:1], nobody)


# --- expanded -------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [*OPERATIONS, "features"])
def test_expanded_are_the_vectors_of_all_ids(operation, rng, tmp_path):
    for family in ("full", "quotient-remainder", "mixed radix"):
        config = _config(family, operation, id_policy="raise", padding_id=2)
        tables, projection = parameters(config, rng)
        want = qrhash.all_vectors(tables, config, projection)
        got = expand(tables, config, projection, block_rows=13)
        assert got.dtype == np.float32
        assert_close(got, want)
        out = np.lib.format.open_memmap(tmp_path / family, "w+", np.float64, got.shape)
        assert expand(tables, config, projection, out=out) is out
        assert_close(out, want)


def test_on_a_mesh_as_on_one_device(rng):
    alone = qrhash.EmbedConfig(qrhash.QuotientRemainder(60, 7), 8, large_table_rows=9)
    config = dataclasses.replace(alone, layout=layout_2x4(row_axes="model", batch_axes="data"))
    tables, _ = parameters(alone, rng)
    np.testing.assert_array_equal(
        expand(qrhash.as_tables(tables, config), config), expand(tables, alone)
    )
    full = _noise(alone)
    got, want = (fit(full, each, num_iterations=2).tables for each in (config, alone))
    for a, b in zip(whole(got), want, strict=True):
        np.testing.assert_array_equal(a, b)
    grown = grow_tables(jax.random.key(1), got, config, 100)
    for a, b in zip(whole(grown), grow_tables(jax.random.key(1), want, alone, 100), strict=True):
        np.testing.assert_array_equal(a, b)
    tx = qrhash.touched_rows(qrhash.adagrad(0.1, initial_accumulator_value=0.5))
    state = jax.tree.map(lambda each: 2 * each, tx.init(got))
    more = qrhash.grow_rows(tx, state, got, grown)
    assert jax.tree.structure(more) == jax.tree.structure(tx.init(grown))
    of_leaves = map(np.asarray, jax.tree.leaves(more))
    (large,) = (each for each in of_leaves if each.shape == (4, 4, 8))  # by shard
    in_order = large.transpose(1, 0, 2).reshape(16, 8)[:15]
    np.testing.assert_array_equal(in_order[:, 0], np.repeat([1.0, 0.5], [9, 6]))


def test_what_vectors_are_written_to_is_checked():
    config = _config()
    tables = qrhash.init(jax.random.key(0), config)
    for out in (np.ones((60, 7)), jnp.ones((60, 8)), [1]):
        with pytest.raises(ValueError, match=r"out must be an array of the host, .* \(60, 8\)"):
            expand(tables, config, out=out)
    with pytest.raises(ValueError, match="tables must be 2"):
        expand(tables[:1], config)


# --- grown ----------------------------------------------------------------------------------------

GROWING = {
    "full": qrhash.FullTable(20),
    "hash trick": qrhash.HashTrick(20, 6),
    "hash trick with room": qrhash.HashTrick(20, 30),
    "quotient-remainder": qrhash.QuotientRemainder(20, 6),
    "mixed radix": qrhash.MixedRadix(20, (2, 3, 4)),
    "mixed radix with room": qrhash.MixedRadix(20, (2, 3, 90)),
    "mixed radix, unused": qrhash.MixedRadix(20, (4, 5, 1)),
    "chinese remainder": qrhash.ChineseRemainder(20, (3, 4, 5)),
    "deeprec": qrhash.deeprec.DeepRecQuotientRemainder(20, 7, 8),
}


GROWN = [(family, "mult") for family in GROWING]
GROWN += [("mixed radix", operation) for operation in ("add", "concat", "project", "path")]
GROWN += [("quotient-remainder", operation) for operation in ("features", "concat")]


@pytest.mark.parametrize(("family", "operation"), GROWN)
def test_every_old_id_keeps_its_vector(family, operation, rng):
    config = qrhash.EmbedConfig(GROWING[family], 9, operation)
    tables, projection = parameters(config, rng)
    larger = grow(config, 45)
    assert larger.num_embeddings == 45
    assert larger.widths == config.widths
    grown = grow_tables(jax.random.key(1), tables, config, 45)
    old, new = expand(tables, config, projection), expand(grown, larger, projection)
    np.testing.assert_array_equal(new[:20], old)
    assert not np.isnan(new).any()
    for table, before in zip(grown, tables, strict=True):
        assert (table is before) == (table.shape == before.shape)


@given(
    n=st.integers(1, 500), more=st.integers(0, 2000), m=st.integers(1, 40), seed=st.integers(0, 99)
)
def test_old_ids_keep_their_rows_in_any_family(n, more, m, seed):
    radices = np.random.default_rng(seed).integers(1, 9, 3).tolist()
    radices[seed % 3] += n
    ids = np.arange(n)
    for partition in (
        qrhash.QuotientRemainder(n, m),
        qrhash.HashTrick(n, m),
        qrhash.MixedRadix(n, tuple(radices)),
    ):
        config = qrhash.EmbedConfig(partition, 4)
        grown = grow(config, n + more).partition
        assert grown.is_complementary or isinstance(partition, qrhash.HashTrick)
        for a, b in zip(partition.indices(ids), grown.indices(ids), strict=True):
            np.testing.assert_array_equal(a, b)


def test_new_rows_start_as_init_draws_them():
    config = _config(operation="mult")
    tables = qrhash.init(jax.random.key(0), config)
    grown = grow_tables(jax.random.key(1), tables, config, 90)
    drawn = qrhash.init(jax.random.key(1), grow(config, 90))
    np.testing.assert_array_equal(grown[0][9:], drawn[0][9:])
    # The last of mixed radix becomes the longest: its new rows are drawn as its old ones, as signs.
    config = qrhash.EmbedConfig(qrhash.MixedRadix(20, (7, 3)), 8)
    *_, last = grow_tables(jax.random.key(1), qrhash.init(jax.random.key(0), config), config, 200)
    assert last.shape == (29, 8)
    assert np.abs(last).min() > 0.5


def test_training_goes_on_from_a_checkpoint_with_more_ids(tmp_path, rng):
    config = qrhash.EmbedConfig(qrhash.QuotientRemainder(20, 4), 8, large_table_rows=5)
    tx = qrhash.touched_rows(qrhash.adagrad(0.1, initial_accumulator_value=0.5))

    def step(tables, state, ids, config):
        loss = lambda tables, ids: (qrhash.lookup(tables, ids, config) ** 2).sum()  # noqa: E731
        _, grads = qrhash.value_and_grad(loss, large=config.large_tables)(tables, ids)
        updates, state = tx.update(grads, state, tables)
        return qrhash.apply_updates(tables, updates), state

    tables = qrhash.init(jax.random.key(0), config)
    tables, state = step(tables, tx.init(tables), jnp.array([1, 17, 19]), config)
    with qrhash.checkpoint.Checkpoints(tmp_path / "old", config) as checkpoints:
        checkpoints.save(1, (tables, state))
        tables, state = checkpoints.restore((tables, state)).state
    larger = grow(config, 50)
    grown = grow_tables(jax.random.key(1), tables, config, 50)
    more = qrhash.grow_rows(tx, state, tables, grown)
    old, new = (jax.tree.leaves(each)[0] for each in (state, more))
    np.testing.assert_array_equal(new[:5], old)
    assert (np.asarray(old) > 0.5).any()
    assert (np.asarray(new[5:]) == 0.5).all()
    trained, more = step(grown, more, jnp.array([17, 48]), larger)
    with qrhash.checkpoint.Checkpoints(tmp_path / "new", larger) as checkpoints:
        checkpoints.save(2, (trained, more))
        again, _ = checkpoints.restore((grown, more)).state
    np.testing.assert_array_equal(expand(again, larger), expand(trained, larger))
    with (
        qrhash.checkpoint.Checkpoints(tmp_path / "old", larger) as checkpoints,
        pytest.raises(qrhash.checkpoint.MismatchError, match="num_embeddings"),
    ):
        checkpoints.restore((grown, more))


NOT_GROWN = [
    (_config(), 59, "num_embeddings must be at least 60, .* got 59"),
    (_config(), 1.5, "num_embeddings must be a positive integer"),
    (_config("chinese remainder"), 73, "num_embeddings must be at most 72 .* got 73"),
    (_config("codes"), 61, "config must be of a family whose rows follow .* got CodePartition"),
    (_config("hashes"), 61, "MultiHash has no vocabulary, and every key has its rows"),
]
layout = layout_2x4(row_axes="model", batch_axes="data")
on_mesh = qrhash.EmbedConfig(FAMILIES["quotient-remainder"], 8, layout=layout, large_table_rows=10)
NOT_GROWN.append((on_mesh, 80, "large_table_rows must have .* 10 with .* that become"))
for sizes, most in (((20, 7, 8), 49), ((6, 7, 6), 6)):
    deeprec = qrhash.EmbedConfig(qrhash.deeprec.DeepRecQuotientRemainder(*sizes), 8)
    NOT_GROWN.append((deeprec, most + 1, f"num_embeddings must be at most {most} "))


@pytest.mark.parametrize(("config", "size", "message"), NOT_GROWN)
def test_what_cannot_grow_is_refused(config, size, message):
    with pytest.raises(ValueError, match=message):
        grow(config, size)


def test_the_same_size_is_no_growth():
    for config in (_config("codes"), qrhash.EmbedConfig(GROWING["deeprec"], 8)):
        assert grow(config, config.num_embeddings) == config
    with pytest.raises(ValueError, match="tables must be 2"):
        grow_tables(jax.random.key(0), [FULL], _config(), 80)
