"""Faults that other systems of this kind have had, each by the number of its report."""

import jax
import numpy as np
import pytest

from qrhash import dynamic
from qrhash.checkpoint import Checkpoints, MismatchError
from qrhash.dynamic import ExactCount, LeastUsed, StepsSinceUse, upkeep
from qrhash.dynamic import index as key_index
from support.dynamic_training import Training, adam, batch, config_of, rows_of, vectors_of

STANDARD_PROMOTION = True  # optax's Adam multiplies by a power of an integer
UNCHECKED_KEYS = True


def _count_of(state, key):
    row = rows_of(state)[key]
    return int(np.asarray(state.index.counts)[row])


# --- checkpoints ----------------------------------------------------------------------------------


def test_rows_and_all_their_state_are_saved_of_the_same_keys(tmp_path):
    # DeepRec-AI/DeepRec#1023: while keys came in, rows and optimizer state were saved of different
    # sets of keys, and what was missing was uninitialised memory after the restore.
    training = Training(config_of(40), adam())
    with Checkpoints(tmp_path, training.config) as checkpoints:
        for _ in range(3):
            training.steps(2)
            before = training.of_keys()
            checkpoints.save(training.number, training.tree)
            training.step()  # new keys come in while it is written
            restored = Training(training.config, adam())
            restored.tree = checkpoints.restore(restored.tree).state
            assert restored.of_keys() == before


def test_rows_new_after_a_restore_have_state_of_the_start(tmp_path):
    # DeepRec-AI/DeepRec#1023, its symptom: moments of 1e38.
    config = config_of(6)
    training = Training(config)
    training.step([1, 2, 3])
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(1, training.tree)
        restored = Training(config)
        dirty = jax.tree.map(lambda x: (x + 99).astype(x.dtype), restored.tree)
        restored.tree, restored.number = checkpoints.restore(dirty).state, 1
    (sums,) = (x for x in jax.tree.leaves(restored.opt_state) if x.shape == (6, 4))
    free = [row for row in range(6) if row not in restored.keys.values()]
    assert (np.asarray(sums)[free] == 0.5).all()
    fresh = Training(config)
    fresh.params = fresh.params._replace(refused=restored.params.refused)
    fresh.number = 1
    fresh.params, fresh.opt_state = jax.tree.map(np.array, (fresh.params, fresh.opt_state))
    for each in (restored, fresh):
        each.step([7])
    (a,), (b,) = (
        [x for x in jax.tree.leaves(each.opt_state) if x.shape == (6, 4)]
        for each in (restored, fresh)
    )
    assert np.asarray(a)[restored.keys[7]].tobytes() == np.asarray(b)[fresh.keys[7]].tobytes()


def test_increments_over_a_checkpoint_equal_the_whole(tmp_path):
    # DeepRec-AI/DeepRec#999: increments were restored wrongly.
    config = config_of(20, eviction=StepsSinceUse(2))
    training = Training(config)
    training.steps(3)
    published = dynamic.nothing_published(config)

    def delta():
        nonlocal published
        given = training.params, training.state, config, training.number
        made, published = dynamic.delta_since(published, *given)
        return made

    delta()
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(3, training.tree)
        of_file = Training(config)
        of_file.tree = checkpoints.restore(of_file.tree).state
    served = dynamic.Served(of_file.params, of_file.state, 3)
    for _ in range(3):
        training.steps(2)
        training.evict()
        training.step()
        served = dynamic.apply_delta(served, delta(), config)
    keys = [*training.keys, *range(20)]
    got = vectors_of(served.parameters, served.state, keys, config)
    want = vectors_of(training.params, training.state, keys, config)
    assert got.tobytes() == want.tobytes()
    assert rows_of(served.state).keys() == training.keys.keys()


def test_tables_of_one_form_are_not_taken_for_each_other(tmp_path):
    # alibaba/TorchEasyRec#607: two tables of the same name were merged in the delta.
    config = config_of(10)
    deltas = {}
    for name, keys in {"users": [1, 2], "items": [2, 3]}.items():
        training = Training(config)
        training.step(keys)
        given = training.params, training.state, config, 1
        published = dynamic.nothing_published(config)
        deltas[name], _ = dynamic.delta_since(published, *given, name=name)
        dynamic.save_delta(tmp_path / name, deltas[name])
    params = dynamic.init(jax.random.key(0), config)
    users = dynamic.nothing_served(params, config, name="users")
    with pytest.raises(ValueError, match="of the table 'users', as the copy is, got 'items'"):
        dynamic.apply_delta(users, dynamic.load_delta(tmp_path / "items"), config)
    users = dynamic.apply_delta(users, dynamic.load_delta(tmp_path / "users"), config)
    assert sorted(rows_of(users.state)) == [1, 2]
    # In a checkpoint two of one name cannot be: a mapping has each name once.
    with Checkpoints(tmp_path / "c", {"users": config, "items": config}) as checkpoints:
        checkpoints.save(1, {"users": users.state, "items": users.state})
    with (
        Checkpoints(tmp_path / "c", {"users": config}) as checkpoints,
        pytest.raises(MismatchError, match="feature 'items' is in the checkpoint alone"),
    ):
        checkpoints.restore({"users": users.state})


# --- deltas ---------------------------------------------------------------------------------------


def test_evicted_keys_are_served_no_more():
    # alibaba/TorchEasyRec#638: a delta had no removals, and evicted keys were served for ever.
    config = config_of(10, eviction=StepsSinceUse(1))
    training = Training(config)
    training.step([1, 2])
    published = dynamic.nothing_published(config)
    served = dynamic.nothing_served(dynamic.init(jax.random.key(0), config), config)
    for keys in ([2, 3], [3, 4], [3, 4]):
        given = training.params, training.state, config, training.number
        delta, published = dynamic.delta_since(published, *given)
        served = dynamic.apply_delta(served, delta, config)
        assert rows_of(served.state).keys() == training.keys.keys()
        training.step(keys)
        training.evict()
    given = training.params, training.state, config, training.number
    delta, published = dynamic.delta_since(published, *given)
    served = dynamic.apply_delta(served, delta, config)
    found = dynamic.find(served.state, [1, 2, 3, 4], config)
    assert (np.asarray(found.rows.rows) == 10).tolist() == [True, True, False, False]
    got = vectors_of(served.parameters, served.state, [1, 2, 3, 4], config)
    want = vectors_of(training.params, training.state, [1, 2, 3, 4], config)
    assert got.tobytes() == want.tobytes()


# --- the index ------------------------------------------------------------------------------------


def test_a_row_given_anew_has_no_count_of_its_last_key():
    # NVIDIA/recsys-examples#467: a slot taken back kept its frequency, which the next key had.
    training = Training(config_of(2, eviction=StepsSinceUse(1)))
    training.step([1, 1, 1, 1, 1, 2])
    training.step([2])
    training.step([2])
    assert training.evict() == 1
    training.step([7, 2])
    assert training.keys[7] == 0  # the row that key 1 had
    assert _count_of(training.state, 7) == 1
    counts = np.asarray(training.state.index.counts)
    assert counts.tolist() == [1, 4]


def test_a_key_that_comes_back_counts_from_zero():
    # NVIDIA/recsys-examples#467, the other way: the candidates' counts.
    training = Training(config_of(4, admission=ExactCount(2, 10), eviction=StepsSinceUse(1)))
    training.step([1, 1])
    training.step([2])
    training.step([3])
    assert training.evict() == 1
    training.step([1])
    assert training.keys == {}
    training.step([1])
    assert _count_of(training.state, 1) == 2


def test_vectors_go_by_rows_and_not_by_slots_after_growth():
    # NVIDIA/recsys-examples#468: after growth a vector was addressed by the slot of its key.
    training = Training(config_of(16))
    training.steps(3)
    before = training.of_keys()
    vectors = vectors_of(training.params, training.state, [*before], training.config)
    slots = np.asarray(training.state.index.slots)
    for capacity in (17, 40, 200):
        training.grow(capacity)
        assert training.of_keys() == before
        got = vectors_of(training.params, training.state, [*before], training.config)
        assert got.tobytes() == vectors.tobytes()
    assert len(np.asarray(training.state.index.slots)) > len(slots)


def test_looking_does_not_count():
    # NVIDIA/recsys-examples#198: a look ahead counted keys a second time.
    config = config_of(10, admission=ExactCount(3, 10))
    training = Training(config)
    training.step([1, 1, 1, 2])
    before = jax.tree.map(np.array, training.state)
    for _ in range(3):
        dynamic.find(training.state, [1, 1, 2, 2, 2, 3], config)
        vectors_of(training.params, training.state, [1, 2, 3], config)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(training.state), strict=True):
        np.testing.assert_array_equal(a, b)
    training.step([2])
    assert list(training.keys) == [1]  # 2 was met twice


@pytest.mark.parametrize("count", [0, 1, 5])
def test_batches_in_which_nothing_is_missing(count):
    # NVIDIA/recsys-examples#292: an empty set of missing keys crashed; here none, one and all.
    training = Training(config_of(5))
    training.step([1, 2, 3, 4, 5])
    rows, before = training.keys, training.of_keys()
    training.step([5, 4, 3, 2, 1][:count])
    assert training.keys == rows
    untouched = [key for key in rows if key not in [5, 4, 3, 2, 1][:count]]
    after = training.of_keys()
    assert all(after[key] == before[key] for key in untouched)
    state, found = dynamic.assign(training.state, np.zeros(0, np.uint64), training.config, 9)
    assert found.rows.rows.shape == (0,)
    assert rows_of(state) == rows


def test_a_batch_of_more_keys_than_rows_counts_every_key():
    # NVIDIA/recsys-examples#12: with more keys in a batch than rows, scores were lost.
    config = config_of(3, eviction=LeastUsed(1))
    training = Training(config)
    keys = [5, 1, 2, 3, 4, 1, 5, 1]
    training.step(keys)
    assert list(training.keys) == [5, 1, 2]
    assert [_count_of(training.state, key) for key in (5, 1, 2)] == [2, 3, 1]
    _, found = dynamic.assign(training.state, keys, config, 1)
    assert int(found.rows.no_room) == 2
    assert np.asarray(found.rows.rows).tolist() == [0, 1, 2, 3, 3, 1, 0, 1]
    assert training.evict() == 2
    assert list(training.keys) == [1]


def test_what_finds_no_room_takes_nothing_from_others():
    # NVIDIA/recsys-examples#284: a failed insert reported wrong values as evicted.
    training = Training(config_of(4))
    training.step([1, 2, 3, 4])
    before, rows = training.of_keys(), training.keys
    training.step([10, 11, 12, 13, 14])
    assert training.keys == rows
    assert training.of_keys() == before


def test_a_key_is_never_found_before_its_vector_is_written():
    # NVIDIA-Merlin/HierarchicalKV#239: the lock was released before the value was written. Here a
    # key is found in a new state alone, and the row that comes with it is written in that step.
    config = config_of(8)
    training = Training(config)
    training.step([1])
    old, params = training.state, training.params
    state, found = dynamic.assign(old, [1, 2, 3], config, 1)
    compressed = vectors_of(params, old, [2, 3], config)
    params, _ = dynamic.start_rows(params, found, config)
    assert vectors_of(params, state, [2, 3], config).tobytes() == compressed.tobytes()
    assert np.asarray(dynamic.find(old, [2, 3], config).rows.rows).tolist() == [8, 8]


def test_a_key_that_is_found_is_refreshed():
    # NVIDIA-Merlin/HierarchicalKV#211: find_or_insert did not refresh the scores of found keys.
    training = Training(config_of(4, eviction=LeastUsed(1, by="step")))
    training.step([1])
    training.step([2])
    training.step([1])
    steps = np.asarray(training.state.index.last_steps)
    assert {key: int(steps[row]) for key, row in training.keys.items()} == {1: 2, 2: 1}
    assert _count_of(training.state, 1) == 2
    training.evict()
    assert list(training.keys) == [1]


def test_many_evictions_and_returns_lose_nothing():
    # All of the above at once, against a dictionary: no key is lost, none is there twice.
    capacity = 32
    index, known = key_index.create(capacity), {}
    assign = jax.jit(key_index.assign)
    evict = jax.jit(upkeep.evict)
    for step in range(40):
        keys = batch(step, universe=40, size=24)
        index, given, _ = assign(index, keys, step)
        for key, row in zip(keys.to_numpy().tolist(), np.asarray(given.rows).tolist(), strict=True):
            assert known.setdefault(key, row) == row or row == capacity
            if row == capacity:
                del known[key]
        if step % 3 == 2:
            gone = np.asarray(index.last_steps) < step - 1
            index = evict(index, gone)
            known = {key: row for key, row in known.items() if not gone[row]}
        state = dynamic.State(index, ())
        assert rows_of(state) == known
