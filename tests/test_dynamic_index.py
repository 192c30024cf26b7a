"""The index of keys against a dictionary, and what its compiled form copies."""

import functools
import itertools
import math
import re
import threading

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qrhash.dynamic.index import assign, create, lookup_rows
from qrhash.dynamic.newcomers import Admission, Admitted
from qrhash.dynamic.slots import BUCKET, EMPTY, TOMBSTONE
from qrhash.dynamic.upkeep import evict, grow, lowest, rebuild
from qrhash.keys import Keys
from support.cases import OPTIMIZED

UNCHECKED_KEYS = True

# Words that are alike in one half, the ends of the range, and anything.
_EDGES = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, *(n << 32 for n in range(2, 12))]
_DRAWN = np.random.default_rng(7).integers(0, 2**64, 44, np.uint64).tolist()
UNIVERSE = np.array(_EDGES + _DRAWN, np.uint64)
SIZES = (4, 60)  # newcomers of the latter are few, or many
CAPACITIES = (11, 30)


class NoFifths(Admission):
    """Refuses every fifth key; counts those judged and those that got a row."""

    def init(self):
        return jnp.zeros(2, jnp.int32)

    def judge(self, state, newcomers):
        is_admitted = newcomers.is_first & (newcomers.keys.lo % jnp.uint32(5) != 3)
        state = state.at[0].add(jnp.sum(newcomers.occurrences))
        return state, Admitted(is_admitted, jnp.full(is_admitted.shape, 100, jnp.int32))

    def settle(self, state, newcomers, is_new):
        return state.at[1].add(jnp.sum(is_new, dtype=jnp.int32))


def _earns(key):
    return key % 2**32 % 5 != 3


class Dictionary:
    """What an index is: a dictionary, a stack of rows, and a list of counts and of steps."""

    def __init__(self, capacity, earns=lambda key: True, before=0):
        self.capacity, self.earns, self.before = capacity, earns, before
        self.rows, self.free = {}, list(range(capacity))[::-1]
        self.counts, self.steps = [0] * capacity, [-1] * capacity

    def lookup(self, keys, where):
        met = list(itertools.compress(keys, where))
        rows = [
            self.rows.get(k, self.capacity) if w else self.capacity
            for k, w in zip(keys, where, strict=True)
        ]
        return rows, len(set(met) - set(self.rows))

    def assign(self, keys, where, step):
        is_new, refused, unlucky = [False] * len(keys), set(), set()
        for place, key in enumerate(keys):
            if not where[place] or key in self.rows:
                continue
            if not self.earns(key):
                refused.add(key)
            elif not self.free:
                unlucky.add(key)
            else:
                self.rows[key] = self.free.pop()
                self.counts[self.rows[key]] = self.before
                is_new[place] = True
        rows, _ = self.lookup(keys, where)
        for row in filter(lambda row: row < self.capacity, rows):
            self.counts[row] += 1
            self.steps[row] = step
        return rows, is_new, len(refused), len(unlucky)

    def evict(self, gone):
        names = {row: key for key, row in self.rows.items()}
        for row in range(self.capacity):
            if gone[row] and row in names:
                del self.rows[names[row]]
                self.free.append(row)
                self.counts[row], self.steps[row] = 0, -1

    def grow(self, capacity):
        more = capacity - self.capacity
        self.free = list(range(self.capacity, capacity))[::-1] + self.free
        self.counts += [0] * more
        self.steps += [-1] * more
        self.capacity = capacity


def assert_same(index, dictionary):
    """Every array of an index says what the dictionary says."""
    capacity = dictionary.capacity
    assert index.capacity == capacity
    assert int(index.num_keys) == len(dictionary.rows)
    assert index.counts.tolist() == dictionary.counts
    assert index.last_steps.tolist() == dictionary.steps
    assert index.free.tolist()[: int(index.num_free)] == dictionary.free
    keys = index.keys.to_numpy()
    live = {int(keys[row]): row for row in np.flatnonzero(np.asarray(index.is_live)).tolist()}
    assert live == dictionary.rows
    slots = np.asarray(index.slots).reshape(-1, 4)
    is_unused = slots[:, 2] == EMPTY
    assert int(index.num_unused) == np.sum(is_unused)
    in_buckets = is_unused.reshape(-1, BUCKET)
    assert np.all(in_buckets[:, 1:] >= in_buckets[:, :-1])
    used = slots[slots[:, 2] < TOMBSTONE]
    in_slots = [(hi << 32 | lo, row) for hi, lo, row, _ in used.tolist()]
    assert sorted(in_slots) == sorted(dictionary.rows.items())


def assert_given(given, want):
    rows, is_new, not_admitted, no_room = want
    assert given.rows.ravel().tolist() == rows
    assert given.is_new.ravel().tolist() == is_new
    assert (int(given.not_admitted), int(given.no_room)) == (not_admitted, no_room)


_assign = jax.jit(assign, static_argnames="admission", donate_argnums=0)
_lookup = jax.jit(lookup_rows)
_evict = jax.jit(evict, donate_argnums=0)
_rebuild = jax.jit(rebuild, donate_argnums=0)
_grow = jax.jit(grow, static_argnums=1)
_lowest = jax.jit(lowest)


@st.composite
def _batches(draw):
    """Keys, few or many distinct ones, and which of them are meant."""
    size = draw(st.sampled_from(SIZES))
    first = draw(st.integers(0, len(UNIVERSE) - 1))
    span = draw(st.sampled_from([1, 4, len(UNIVERSE)]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    keys = UNIVERSE[(first + rng.integers(0, span, size)) % len(UNIVERSE)]
    where = rng.random(size) < draw(st.sampled_from([1.0, 1.0, 0.7, 0.0]))
    return keys, where


class IndexMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.admission = NoFifths()
        self.index, self.state = create(CAPACITIES[0]), self.admission.init()
        self.want = Dictionary(CAPACITIES[0], _earns, before=100)
        self.step = 0

    @rule(batch=_batches(), passed=st.integers(0, 3))
    def assign(self, batch, passed):
        keys, where = batch
        self.step += passed
        met = itertools.compress(keys.tolist(), where)
        occurrences = sum(key not in self.want.rows for key in met)
        before = self.state
        self.index, given, self.state = _assign(
            self.index,
            Keys.of(keys),
            self.step,
            where=where,
            admission=self.admission,
            state=self.state,
        )
        want = self.want.assign(keys.tolist(), where.tolist(), self.step)
        assert_given(given, want)
        assert (self.state - before).tolist() == [occurrences, sum(want[1])]

    @rule(batch=_batches())
    def look_up(self, batch):
        keys, where = batch
        given = _lookup(self.index, Keys.of(keys), where=where)
        rows, absent = self.want.lookup(keys.tolist(), where.tolist())
        assert_given(given, (rows, [False] * len(rows), absent, 0))

    @rule(share=st.sampled_from([0.1, 0.5, 1.0]), seed=st.integers(0, 999))
    def evict(self, share, seed):
        gone = np.random.default_rng(seed).random(self.want.capacity) < share
        self.index = _evict(self.index, gone)
        self.want.evict(gone)
        assert 4 * int(self.index.num_unused) >= self.index.num_slots

    @rule()
    def rebuild(self):
        self.index = _rebuild(self.index)
        assert int(self.index.num_unused) == self.index.num_slots - len(self.want.rows)

    @precondition(lambda self: self.want.capacity < CAPACITIES[1])
    @rule()
    def grow(self):
        self.index = _grow(self.index, CAPACITIES[1])
        self.want.grow(CAPACITIES[1])

    @invariant()
    def same(self):
        assert_same(self.index, self.want)
        everywhere = np.ones(UNIVERSE.shape, bool)
        given = _lookup(self.index, Keys.of(UNIVERSE), where=everywhere)
        assert given.rows.tolist() == self.want.lookup(UNIVERSE.tolist(), everywhere)[0]


def test_it_is_a_dictionary():
    hypothesis.stateful.run_state_machine_as_test(
        IndexMachine,
        settings=hypothesis.settings(max_examples=25, stateful_step_count=20, deadline=None),
    )


def _evicting(seed, *, capacity=500, batch=400, steps=24):
    """Batches of many keys, a table too small for them, and the oldest rows taken back."""
    rng = np.random.default_rng(seed)
    index, want, outputs = create(capacity), Dictionary(capacity), []
    for step in range(steps):
        keys = rng.integers(0, 900, batch).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        index, given, _ = _assign(index, Keys.of(keys), step)
        assert_given(given, want.assign(keys.tolist(), [True] * batch, step))
        outputs.append((given, np.array(index.counts)))
        if step % 3 == 2:
            gone = np.asarray(_lowest(index.last_steps, index.is_live, 150))
            index = _evict(index, gone)
            want.evict(gone)
        assert_same(index, want)
        given = _lookup(index, Keys.of(keys))
        assert given.rows.tolist() == want.lookup(keys.tolist(), [True] * batch)[0]
    return outputs, index


def test_full_tables_and_tombstones_and_the_same_again():
    jax.tree.map(np.testing.assert_array_equal, _evicting(0), _evicting(0))


def test_a_full_table_refuses_the_keys_that_come_last_and_keeps_nothing_of_them():
    index, given, _ = _assign(create(3), Keys.of([9, 8, 9, 7, 6, 5, 6]), step=4)
    assert_given(given, ([0, 1, 0, 2, 3, 3, 3], [1, 1, 0, 1, 0, 0, 0], 0, 2))
    alone, _, _ = _assign(create(3), Keys.of([9, 8, 9, 7]), step=4)
    jax.tree.map(np.testing.assert_array_equal, index, alone)


def test_a_key_may_count_several_times_at_a_place():
    def run(keys, where, times):
        options = {"admission": NoFifths(), "state": NoFifths().init()}
        index, given, state = assign(create(30), keys, 3, where=where, times=times, **options)
        again = assign(index, keys[:4], 4, times=None if times is None else times[:4])
        return (index, state, given.not_admitted, given.no_room), given.rows, again[0]

    rng = np.random.default_rng(0)
    keys, times = UNIVERSE[rng.integers(0, 40, 50)], rng.integers(0, 4, 50).astype(np.int32)
    times[:4] = 1
    once, rows, again = run(np.repeat(keys, times), None, None)
    several, of_places, of_places_again = run(keys, times > 0, times)
    assert_equal = lambda *x: jax.tree.map(np.testing.assert_array_equal, *x)  # noqa: E731
    assert_equal(several, once)
    assert_equal(np.repeat(of_places, times), rows)
    assert_equal(of_places_again, again)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (2, 1, 5)])
def test_shapes(shape):
    keys = UNIVERSE[: math.prod(shape)].reshape(shape)
    index, given, state = _assign(create(20), Keys.of(keys), 0)
    assert given.rows.shape == given.is_new.shape == shape
    assert given.rows.dtype == np.int32
    assert state == ()
    assert given.rows.ravel().tolist() == list(range(keys.size))
    assert int(index.num_keys) == keys.size
    found = _lookup(index, Keys.of(keys))
    assert found.rows.shape == found.is_new.shape == shape
    assert found.rows.tolist() == given.rows.tolist()
    masked = _lookup(index, Keys.of(keys), where=np.zeros(shape, bool))
    assert masked.rows.ravel().tolist() == [20] * keys.size


def test_nothing_of_a_batch_changes_nothing():
    index, _, _ = _assign(create(20), Keys.of(UNIVERSE[:9]), 3, where=np.arange(9) < 7)
    for size in (0, 9):
        copy = jax.tree.map(jnp.copy, index)
        after, given, _ = _assign(copy, Keys.of(UNIVERSE[:size]), 5, where=np.zeros(size, bool))
        jax.tree.map(np.testing.assert_array_equal, after, index)
        assert (int(given.not_admitted), int(given.no_room)) == (0, 0)


def test_keys_and_steps_of_the_host_without_jit():
    want, _, _ = _assign(create(20), Keys.of(UNIVERSE[:9]), 3)
    got, _, _ = assign(create(20), UNIVERSE[:9].tolist(), np.int64(3))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 6) | st.integers(0, 2**31 - 1), st.booleans()), min_size=9),
    st.integers(0, 12),
)
def test_lowest_is_the_start_of_what_is_sorted(items, count):
    items = items[:9]
    scores, among = (np.array(each) for each in zip(*items, strict=True))
    places = sorted(np.flatnonzero(among).tolist(), key=lambda place: (scores[place], place))
    got = _lowest(scores.astype(np.int32), among, count)
    assert np.flatnonzero(np.asarray(got)).tolist() == sorted(places[:count])


def test_slots_of_the_largest_index_are_numbered_by_int32():
    largest = jax.eval_shape(lambda: create(2**29))
    assert largest.num_slots == 2**30


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create(0), "capacity must be"),
        (lambda: create(2.5), "capacity must be"),
        (lambda: create(2**29 + 1), "at most 536870912 rows, got 536870913"),
        (lambda: create(1, 2), "power of two, at least 4 for a capacity of 1, got 2"),
        (lambda: create(10, 24), "power of two, at least 32 for a capacity of 10, got 24"),
        (lambda: create(10, 16), "power of two, at least 32 for a capacity of 10, got 16"),
        (lambda: grow(create(10), 9), "at least the 10 rows that there are, got 9"),
        (lambda: lookup_rows(create(10), [1, 2], where=[True]), r"shape of the keys, \(2,\)"),
        (lambda: assign(create(10), [1], 0, where=np.ones((1, 1), bool)), r"got \(1, 1\)"),
        (lambda: assign(create(10), [1, 2], 0, times=[1]), r"shape of the keys, \(2,\), got"),
        (lambda: assign(create(10), [1], 0, times=[1.5]), "times must be integers"),
        (lambda: assign(create(10), [1.5], 0), "keys must be all integers or all text"),
        (lambda: assign(create(10), [2**64], 0), "at most 64 bits"),
    ],
)
def test_refusals_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- what is compiled ---------------------------------------------------------------------------

CAPACITY, NUM_SLOTS = 100_003, 262_144
# What may have a result of a table's size: it names the table, or writes into its place.
IN_PLACE = {
    *("parameter", "get-tuple-element", "tuple", "bitcast", "scatter", "dynamic-update-slice"),
    *("fusion", "while", "call"),  # The computations that they call are read too.
}


def _of_table_size(compiled):
    """Instructions of every computation that make an array as long as the index."""
    for line in compiled.as_text().splitlines():
        match = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(", line)
        if match and match[2] not in IN_PLACE:
            shapes = re.findall(r"\w+\[([\d,]+)\]", match[1])
            if any(math.prod(map(int, shape.split(","))) >= CAPACITY for shape in shapes):
                yield f"{match[2]} {match[1]}"


@functools.cache
def _compiled(donate=0, size=4096, options=OPTIMIZED):
    index = jax.eval_shape(lambda: create(CAPACITY))
    words = jax.ShapeDtypeStruct((size,), jnp.uint32)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    jitted = jax.jit(assign, donate_argnums=donate)
    return jitted.lower(index, Keys(words, words), step).compile(options)


def test_a_donated_index_is_not_copied():
    compiled = _compiled()
    assert list(_of_table_size(compiled)) == []
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * CAPACITY * 4
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4 * CAPACITY


def test_the_check_sees_the_copies_of_an_index_that_is_not_donated():
    found = _of_table_size(_compiled(donate=(), options=None))
    assert any(f"u32[{NUM_SLOTS // BUCKET},{BUCKET},4]" in each for each in found)


def test_one_program_for_one_size_of_batch():
    jitted = jax.jit(lambda *args: assign(*args), donate_argnums=0)
    index = create(200)
    for step in range(8):  # 16 new keys each, all of them at first, then none
        keys = np.arange(min(step, 4) * 16, min(step, 4) * 16 + 16, dtype=np.uint64)
        index, _, _ = jitted(index, Keys.of(keys), step)
    assert int(index.num_keys) == 80
    assert jitted._cache_size() == 1


def test_another_thread_on_the_host():
    host, found = jax.devices("cpu")[0], {}

    def work():
        with jax.default_device(host):
            index = create(50)
            for step in range(3):
                keys = UNIVERSE[step * 10 : step * 10 + 20]
                index, given, _ = jax.jit(assign)(index, Keys.of(keys), np.int32(step))
            found["index"], found["devices"] = index, given.rows.devices()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found["devices"] == {host}
    want = Dictionary(50)
    for step in range(3):
        want.assign(UNIVERSE[step * 10 : step * 10 + 20].tolist(), [True] * 20, step)
    assert_same(found["index"], want)
