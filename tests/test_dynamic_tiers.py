"""Rows in a store and a cache of them: the numbers of a table that is all there, bit for bit."""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qrhash
from qrhash import dynamic
from qrhash.dynamic.records import swap_rows
from qrhash.dynamic.residents import Residents
from support.cases import OPTIMIZED
from support.tiers import (
    BATCH,
    CACHE_ROWS,
    CONFIG,
    FEATURES,
    KEY,
    NUM_ROWS,
    OPTIMIZERS,
    Both,
    assert_same,
    batches,
    by_rows,
)

STANDARD_PROMOTION = True  # optax's Adam
UNCHECKED_KEYS = True


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() <= before


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_tiered_table_is_the_resident_one_bit_for_bit(name):
    both = Both(OPTIMIZERS[name])
    given = batches(200)
    assert both.train_tiered(given) == both.train_whole(given)
    both.check()
    assert 0.3 < both.tier.hit_rate < 1
    assert both.tier.traffic.bytes_moved > 100 * both.tier.store.record_width


def test_bfloat16_rows_keep_their_bits():
    config = qrhash.EmbedConfig(
        qrhash.FullTable(NUM_ROWS), FEATURES, param_dtype=jnp.bfloat16, large_table_rows=1
    )
    both = Both(config=config)
    given = batches(50)
    both.train_tiered(given)
    both.train_whole(given)
    both.check()


def test_what_is_swapped_is_not_computed_with():
    tiny = np.array([[1, 0x8000], [0x80, 0x8001], [0x7F80, 0xFF80]], np.uint16)
    arrays = [
        jnp.asarray(tiny.view(jnp.bfloat16)),
        jnp.asarray(np.array([[1, 2**31], [0x7F800000, 3], [5, 0x80000007]], np.uint32).view("f4")),
        jnp.array([-1, 2**31 - 1, 5], jnp.int32),
        jnp.array([True, False, True]),
    ]
    before = [np.array(each) for each in arrays]
    values = tuple(each[::-1] for each in before)
    new, old = swap_rows(arrays, jnp.array([0, 1, 2], jnp.int32), values)
    assert_same(list(map(np.asarray, old)), before)
    assert_same(list(map(np.asarray, new)), [np.ascontiguousarray(each) for each in values])


def test_counts_of_rows_are_integers_and_move_with_them():
    class Counts(optax.GradientTransformation):
        pass

    def update(grads, state, params=None):
        del params
        return jax.tree.map(lambda g: -0.1 * g, grads), jax.tree.map(lambda n: n + 1, state)

    def init(params):
        return jax.tree.map(lambda table: jnp.zeros((table.shape[0], 1), jnp.int32), params)

    both = Both(Counts(init, update))
    given = batches(60)
    both.train_tiered(given)
    both.train_whole(given)
    both.check()
    counted = both.tier.read(np.arange(NUM_ROWS))[1][:, 0]
    times = sum(np.isin(np.arange(NUM_ROWS), ids).astype(int) for ids in given)
    np.testing.assert_array_equal(counted, times)


def test_bags_and_ids_without_a_row():
    config = qrhash.EmbedConfig(
        qrhash.FullTable(NUM_ROWS), FEATURES, id_policy="zero", padding_id=7, large_table_rows=1
    )
    both = Both(config=config)
    rng = np.random.default_rng(1)
    given = []
    for ids in batches(30):
        ids[:3] = 7, NUM_ROWS + 5, -4
        cuts = np.sort(rng.integers(0, BATCH, 5))
        given.append(qrhash.Bag.from_lists([part.tolist() for part in np.split(ids, cuts)]))
    assert both.train_tiered(given) == both.train_whole(given)
    both.check()
    untouched = both.tier.read(np.array([7]))[0]
    assert_same([untouched], [np.asarray(qrhash.init(KEY.copy(), config)[0])[7:8]])


def test_wide_rows_start_as_they_would_where_the_loop_alone_is_told_of_64_bits():
    with jax.enable_x64(True):
        config = dataclasses.replace(CONFIG, param_dtype=jnp.float64)
        both = Both(config=config)
        assert both.whole[0].dtype == jnp.float64
        both.train_tiered(batches(4))
        both.tier.flush(both.params, both.state)
        never_named = np.setdiff1d(np.arange(NUM_ROWS), np.concatenate(batches(4)))
        both.train_tiered([never_named[:BATCH]])
        both.train_whole([*batches(4), never_named[:BATCH]])
        both.check()


def test_rows_come_under_a_guard_of_transfers():
    both = Both()
    with jax.transfer_guard("disallow"), contextlib.closing(both.tier.ahead(batches(9))) as loop:
        for _, fetched in loop:
            both.params, both.state = both.tier.swap(both.params, both.state, fetched)
    assert both.tier.traffic.looked_up


def test_a_batch_of_a_mapping_has_slots_in_the_place_of_its_ids():
    both = Both()
    mapping = [{"item": ids, "label": n} for n, ids in enumerate(batches(3))]
    for n, (batch, fetched) in enumerate(both.tier.ahead(mapping, "item")):
        both.params, both.state = both.tier.swap(both.params, both.state, fetched)
        assert batch["label"] == n
        assert batch["item"].shape == (BATCH,)
    assert mapping[0]["item"].dtype == np.int64


def test_no_step_copies_the_cache():
    table = jnp.zeros((4096, 8))
    rows, values = jnp.zeros(64, jnp.int32), (jnp.zeros((64, 8)),) * 2
    text = swap_rows.lower([table, table], rows, values).compile(OPTIMIZED).as_text()
    assert "scatter" in text
    assert not re.search(r"f32\[4096,8\]\S* (copy|broadcast|convert)\(", text)


def test_a_table_of_keys_is_the_resident_one():
    config = dynamic.DynamicConfig(400, FEATURES, large_table_rows=1)
    small = dynamic.cached(config, CACHE_ROWS)
    tx = qrhash.touched_rows(OPTIMIZERS["adagrad"])
    given = [qrhash.Keys.of(ids + 10**12) for ids in batches(80)]

    def step_for(config):
        def loss(params, found):
            return jnp.sum(dynamic.lookup(params, found, config) ** 2)

        @jax.jit
        def step(params, state, found):
            params, new = dynamic.start_rows(params, found, config)
            state = qrhash.reset_rows(tx, state, params, new)
            value, grads = qrhash.value_and_grad(loss, dynamic.large(config))(params, found)
            updates, state = tx.update(grads, state, params)
            return qrhash.apply_updates(params, updates), state, value

        return step

    whole, index = dynamic.init(KEY.copy(), config), dynamic.init_state(config)
    whole_state, step = tx.init(whole), step_for(config)
    wanted = []
    assign = jax.jit(functools.partial(dynamic.assign, config=config))
    for n, keys in enumerate(given):
        index, found = assign(index, keys, step=n)
        whole, whole_state, value = step(whole, whole_state, found)
        wanted.append(value)

    params = dynamic.init(jax.random.key(1), small)
    state, step = tx.init(params), step_for(small)
    tier = dynamic.Tiered(config, params, tx, dynamic.MemoryStore)
    values = []
    for found, fetched in tier.ahead(given):
        params, state = tier.swap(params, state, fetched)
        params, state, value = step(params, state, found)
        values.append(value)
    assert values == wanted
    tier.flush(params, state)
    # #198: a batch that is fetched ahead counts once.
    np.testing.assert_array_equal(tier.keys.state.index.counts, index.index.counts)
    rows = np.flatnonzero(np.asarray(index.index.is_live))
    assert 100 < len(rows) < 400
    assert_same(tier.read(rows)[:1], [np.asarray(whole.table)[rows]])


# --- what others paid for -------------------------------------------------------------------------


def test_look_ups_are_counted_once_however_far_ahead():
    # recsys-examples #198: a prefetch counted twice.
    both = Both(depth=3)
    given = [np.array([1, 1, 2]), np.array([1, 3, 3]), np.array([3, 3, 3])]
    both.train_tiered(given)
    assert (both.tier.traffic.looked_up, both.tier.traffic.hits) == (9, 4)
    assert both.tier.traffic.bytes_moved == 3 * both.tier.store.record_width


@pytest.mark.parametrize("ids", [np.array([5, 5]), np.zeros(0, np.int64)], ids=["hits", "empty"])
def test_a_batch_of_which_nothing_is_missing(ids):
    # recsys-examples #292: an empty set of misses crashed.
    both = Both()
    given = [np.array([5, 6]), ids, np.array([6, 8])]
    both.train_tiered(given)
    both.train_whole(given)
    both.check()


def test_a_batch_of_more_rows_than_the_cache_is_refused_and_nothing_is_lost():
    # recsys-examples #12 and #284: too many keys lost scores, and a failure left wrong values.
    both = Both(cache_rows=8)
    given = [np.arange(n, n + 8) for n in range(0, 40, 3)]
    bad = np.append(np.arange(100, 109), 100)
    with pytest.raises(ValueError, match=r"at least the 9 rows .*, got 8"):
        both.train_tiered([*given, bad, np.arange(5)])
    both.train_whole(given)
    both.check()
    both.train_tiered(given)
    both.train_whole(given)
    both.check()


def test_tables_in_a_store_and_others_train_together():
    # recsys-examples #295: tables with a cache and without one were mixed up.
    tx = qrhash.touched_rows(OPTIMIZERS["adagrad"])
    other = qrhash.EmbedConfig(qrhash.FullTable(CACHE_ROWS), FEATURES, large_table_rows=1)

    def training(config):
        def loss(params, batch):
            vectors = qrhash.lookup(params["a"], batch["a"], config)
            vectors = vectors * qrhash.lookup(params["b"], batch["b"], other)
            return jnp.sum(vectors**2) + jnp.sum(params["c"] ** 2)

        large = {"a": config.large_tables, "b": other.large_tables, "c": False}
        gradient = qrhash.value_and_grad(loss, large)

        @jax.jit
        def step(params, state, batch):
            _, grads = gradient(params, batch)
            updates, state = tx.update(grads, state, params)
            return qrhash.apply_updates(params, updates), state

        # The others have as many rows as the cache.
        params = {"a": qrhash.init(KEY.copy(), config), "b": qrhash.init(jax.random.key(5), other)}
        params |= {"c": jnp.ones((CACHE_ROWS, FEATURES))}
        return step, params, tx.init(params)

    step, params, state = training(dynamic.cached(CONFIG, CACHE_ROWS))
    whole_step, whole, whole_state = training(CONFIG)
    given = [{"a": ids, "b": jnp.asarray(ids % CACHE_ROWS, jnp.int32)} for ids in batches(30)]
    tier = dynamic.Tiered(
        *(CONFIG, params, tx, dynamic.MemoryStore),
        table=lambda params: params["a"][0],
        key=KEY.copy(),
    )
    for n, (batch, fetched) in enumerate(tier.ahead(given, "a")):
        params, state = tier.swap(params, state, fetched)
        params, state = step(params, state, batch)
        batch = given[n] | {"a": jnp.asarray(given[n]["a"], jnp.int32)}
        whole, whole_state = whole_step(whole, whole_state, batch)
    tier.flush(params, state)
    assert_same(tier.read(np.arange(NUM_ROWS)), [whole["a"][0], *by_rows(whole_state)])
    assert_same([np.asarray(params["b"][0]), np.asarray(params["c"])], [whole["b"][0], whole["c"]])


class SlowStore(dynamic.MemoryStore):
    """Records take their time on the way back; a read of what was not written yet would show."""

    def write(self, rows, records):
        time.sleep(0.01)
        super().write(rows, records)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_row_on_its_way_back_is_not_read_before_it_has_arrived(depth):
    # HKV #239: a lock was released before the value was written.
    both = Both(store=SlowStore, cache_rows=4, depth=depth)
    rng = np.random.default_rng(0)
    given = [rng.choice(9, 4) for _ in range(40)]
    assert both.train_tiered(given) == both.train_whole(given)
    both.check()


def test_rows_used_longest_ago_make_room():
    residents = Residents(100, 4)
    for number in range(8):
        residents.plan(np.array([number % 4]))
    residents.plan(np.array([0]))  # 1 is now the oldest
    _, move, hits = residents.plan(np.array([50, 2]))
    assert (move.rows.tolist(), move.victims.tolist(), hits) == ([50], [1], 1)


# --- a loop that ends early -----------------------------------------------------------------------


def test_an_exception_in_the_batches_reaches_the_loop():
    both = Both()
    given = batches(12)

    def failing():
        yield from given
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        both.train_tiered(failing())
    both.train_whole(given)
    both.check()


def test_an_exception_of_the_store_reaches_the_loop_and_nothing_is_lost():
    class Failing(dynamic.MemoryStore):
        calls = 0

        def read(self, rows):
            Failing.calls += 1
            if Failing.calls == 8:
                raise OSError("a sector is gone")
            return super().read(rows)

    both = Both(store=Failing)
    done = []
    with pytest.raises(OSError, match="a sector is gone"):
        both.train_tiered(done.append(ids) or ids for ids in batches(50))
    given = done[:-1]  # the last one was planned and not fetched
    both.train_whole(given)
    both.check()


@pytest.mark.parametrize("steps", [1, 5])
def test_what_was_planned_and_not_trained_is_undone(steps):
    both = Both(cache_rows=BATCH, depth=3)
    given = batches(40)
    step, count = both.step, itertools.count(1)

    def interrupted(*args):
        if next(count) > steps:
            raise KeyboardInterrupt
        time.sleep(0.1)  # the worker goes ahead
        return step(*args)

    both.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        both.train_tiered(given)
    both.tier.stop()
    both.step = step
    both.train_whole(given[:steps])
    both.check()
    both.train_tiered(given)
    both.train_whole(given)
    both.check()


def test_keys_of_batches_that_were_not_trained_start_anew():
    config = dynamic.DynamicConfig(400, FEATURES, large_table_rows=1)
    params = dynamic.init(KEY.copy(), dynamic.cached(config, CACHE_ROWS))
    tx = qrhash.touched_rows(OPTIMIZERS["adagrad"])
    tier = dynamic.Tiered(config, params, tx, dynamic.MemoryStore)
    state = tx.init(params)
    with contextlib.closing(tier.ahead([[1, 2], [3], [4]])) as loop:
        _, fetched = next(loop)
        params, state = tier.swap(params, state, fetched)
        time.sleep(0.2)
    assert int(tier.keys.state.index.num_keys) == 2
    for found, fetched in tier.ahead([[3, 1]]):
        params, state = tier.swap(params, state, fetched)
        assert found.rows.is_new.tolist() == [True, False]


def test_a_loop_that_does_not_swap_is_told():
    both = Both()
    with pytest.raises(ValueError, match="swap must be called for every batch"):
        list(both.tier.ahead(batches(3)))
    _, fetched = next(both.tier.ahead(batches(3)))
    params, state = both.tier.swap(both.params, both.state, fetched)
    with pytest.raises(ValueError, match="swap must be called once for every batch"):
        both.tier.swap(params, state, fetched)
    for call in (lambda: both.tier.flush(params, state), lambda: both.tier.ahead([])):
        with pytest.raises(ValueError, match="before the loop over ahead has ended"):
            call()
    both.tier.stop()
    both.tier.flush(params, state)


# --- stores ---------------------------------------------------------------------------------------


def stores(tmp_path, num_rows=50, width=3):
    yield dynamic.MemoryStore(num_rows, width)
    yield dynamic.FileStore(tmp_path / "rows", num_rows, width)


def test_stores_keep_what_was_written_last(tmp_path, rng):
    for store in stores(tmp_path):
        kept = np.zeros((50, 3), np.uint8)
        for turn in range(30):
            rows = rng.permutation(50)[: rng.integers(0, 20)]
            kept[rows] = rng.integers(0, 256, (len(rows), 3))
            store.write(rows, kept[rows])
            if turn % 4 == 0:
                store.flush()
            np.testing.assert_array_equal(store.read(np.arange(50)), kept)
        store.close()


def test_a_file_holds_what_was_flushed_and_nothing_later(tmp_path, rng):
    path = tmp_path / "rows"
    flushed = np.zeros((50, 3), np.uint8)
    for turn in range(6):
        store = dynamic.FileStore(path, 50, 3)
        np.testing.assert_array_equal(store.read(np.arange(50)), flushed)
        for number in range(5):
            rows = rng.permutation(50)[:20]
            records = rng.integers(1, 256, (20, 3)).astype(np.uint8)
            store.write(rows, records)
            if number < turn % 4:
                flushed = store.read(np.arange(50))
                store.flush()
        store.close()


CRASH = """
import os, sys
import numpy as np
from qrhash.dynamic import FileStore
store = FileStore(sys.argv[1], 1000, 64)
rows = np.arange(1000)
for number in range(1, 100):
    store.write(rows, np.full((1000, 64), number, np.uint8))
    if number == 7:
        store.flush()
    if number == 8:
        store.write(rows[:500], np.full((500, 64), 99, np.uint8))
        os.kill(os.getpid(), 9)
"""


def test_what_flush_wrote_is_whole_after_a_crash(tmp_path):
    path = os.fspath(tmp_path / "rows")
    done = subprocess.run([sys.executable, "-c", CRASH, path], check=False)
    assert done.returncode == -9
    store = dynamic.FileStore(path, 1000, 64)
    assert (store.read(np.arange(1000)) == 7).all()
    store.close()


def test_a_file_is_sparse_and_grows(tmp_path):
    path = tmp_path / "rows"
    store = dynamic.FileStore(path, 10**7, 100)
    store.write(np.array([5]), np.full((1, 100), 3, np.uint8))
    store.flush()
    store.close()
    assert path.stat().st_size > 10**9
    assert path.stat().st_blocks * 512 < 10**6
    store = dynamic.FileStore(path, 2 * 10**7, 100)
    found = store.read(np.array([5, 2 * 10**7 - 1]))
    assert (found[0] == 3).all()
    assert not found[1].any()
    store.close()


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "rows"
    dynamic.FileStore(path, 50, 3).close()
    with pytest.raises(ValueError, match="record_width must be that of the file, 3 bytes, got 4"):
        dynamic.FileStore(path, 50, 4)
    with pytest.raises(ValueError, match="num_rows must be at least the 50"):
        dynamic.FileStore(path, 49, 3)
    (tmp_path / "text").write_text("not a store")
    with pytest.raises(ValueError, match="that a FileStore wrote"):
        dynamic.FileStore(tmp_path / "text", 50, 3)
    assert (tmp_path / "text").read_text() == "not a store"


def test_a_training_goes_on_from_its_file(tmp_path):
    store = functools.partial(dynamic.FileStore, tmp_path / "rows")
    both, given = Both(store=store), batches(60)
    both.train_tiered(given[:30])
    both.train_whole(given)
    both.tier.flush(both.params, both.state)
    # What was not flushed is forgotten by a crash: here the writes of ten more batches.
    both.train_tiered(given[30:40])
    both.tier.store.close()
    # Another cache of another size, that begins without rows.
    other = Both(store=store, cache_rows=CACHE_ROWS + 9)
    other.train_tiered(itertools.islice(given, 30, None))
    other.whole, other.whole_state = both.whole, both.whole_state
    other.check()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"partition": qrhash.QuotientRemainder(100, 4)}, "must be of a FullTable"),
        ({"embedding_init": jax.nn.initializers.zeros}, "draw every row by itself"),
        ({"id_policy": "nan", "padding_id": 3}, "padding_id must be None"),
        ({"layout": True}, "layout must be None"),
    ],
)
def test_configs_that_are_refused(options, words):
    if options.get("layout"):
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        options = {"layout": qrhash.MeshLayout(mesh=mesh)}
    config = qrhash.EmbedConfig(**{"partition": qrhash.FullTable(100), "features": 4} | options)
    with pytest.raises(ValueError, match=words):
        dynamic.cached(config, 10)


def test_parameters_that_are_refused():
    tx, small = qrhash.touched_rows(optax.adagrad(0.1)), dynamic.cached(CONFIG, 10)
    (table,) = qrhash.init(KEY.copy(), small)
    with pytest.raises(ValueError, match="table must say which of the 2"):
        dynamic.Tiered(CONFIG, (table, table), tx, dynamic.MemoryStore)
    with pytest.raises(ValueError, match="of 4 features, got 3"):
        dynamic.Tiered(CONFIG, (table[:, :3],), tx, dynamic.MemoryStore)
    with pytest.raises(ValueError, match="one row per row"):
        dynamic.Tiered(CONFIG, (table,), optax.adafactor(0.1, 2), dynamic.MemoryStore)
    tier = dynamic.Tiered(CONFIG, (table,), tx, dynamic.MemoryStore)
    with pytest.raises(ValueError, match=re.escape("rows must be in [0, 2000)")):
        tier.read([NUM_ROWS])
    with pytest.raises(ValueError, match="opt_state must be that of tx"):
        tier.flush((table,), ())
