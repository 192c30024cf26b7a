"""Tiered tables outside of the training: looked at, saved and restored, keys evicted."""

import functools

import jax
import numpy as np
import optax
import pytest

import qrhash
from qrhash import dynamic
from qrhash.checkpoint import Checkpoints, MismatchError
from support.tiers import (
    CACHE_ROWS,
    CONFIG,
    FEATURES,
    KEY,
    NUM_ROWS,
    Both,
    batches,
)

STANDARD_PROMOTION = True  # optax's Adam
UNCHECKED_KEYS = True


def test_a_look_gives_the_vectors_and_changes_no_number():
    both, given = Both(), batches(40)
    both.train_tiered(given[:20])
    counts = both.tier.traffic.looked_up, both.tier.traffic.hits
    for ids in [np.arange(0, NUM_ROWS, 40), *batches(3, seed=1)]:
        slots, fetched = both.tier.look(ids)
        both.params, both.state = both.tier.swap(both.params, both.state, fetched)
        found = np.asarray(qrhash.lookup(both.params, slots, both.small))
        both.tier.flush(both.params, both.state)
        np.testing.assert_array_equal(found, both.tier.read(ids)[0])
    assert (both.tier.traffic.looked_up, both.tier.traffic.hits) == counts
    both.train_tiered(given[20:])
    both.train_whole(given)
    both.check()


def test_a_saved_table_is_gone_on_with(tmp_path):
    both, given = Both(), batches(40)
    both.train_tiered(given[:20])
    both.tier.save(tmp_path / "rows", both.params, both.state)
    both.train_tiered(given[20:30])  # of which the file knows nothing
    other = Both(cache_rows=CACHE_ROWS + 9)
    other.tier.restore(tmp_path / "rows")
    other.train_tiered(given[20:])
    other.train_whole(given)
    other.check()
    with pytest.raises(ValueError, match="restore must come before the first loop"):
        other.tier.restore(tmp_path / "rows")


def test_files_that_are_not_of_the_table(tmp_path):
    both, path = Both(), tmp_path / "rows"
    both.train_tiered(batches(5))
    both.tier.save(path, both.params, both.state)
    whole = path.read_bytes()
    for place in (len(whole) // 3, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="cannot be read as rows of this table"):
            Both().tier.restore(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cannot be read as rows of this table"):
        Both().tier.restore(path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"it is of a table of .*'record_width': 33"):
        Both(optax.adam(0.1)).tier.restore(path)
    _, _, tier = _table_of_keys(dynamic.DynamicConfig(NUM_ROWS, FEATURES, large_table_rows=1))
    tier_file = tmp_path / "keys"
    tier.save(tier_file, *_table_of_keys(tier.config)[:2])
    with pytest.raises(ValueError, match="it is of a table of keys, not of ids"):
        Both().tier.restore(tier_file)


def _table_of_keys(config):
    params = dynamic.init(KEY.copy(), dynamic.cached(config, CACHE_ROWS))
    tx = qrhash.touched_rows(optax.adagrad(0.1))
    return params, tx.init(params), dynamic.Tiered(config, params, tx, dynamic.MemoryStore)


def test_keys_are_evicted_saved_and_masked_as_those_of_a_resident_table(tmp_path):
    config = dynamic.DynamicConfig(
        *(150, FEATURES),
        admission=dynamic.ExactCount(2, 100),
        eviction=dynamic.LeastUsed(25),
        large_table_rows=1,
    )
    params, state, tier = _table_of_keys(config)
    whole = dynamic.init_state(config)
    assign = jax.jit(functools.partial(dynamic.assign, config=config))
    own = dynamic.init(KEY.copy(), config)
    given = [(qrhash.Keys.of(ids + 7), ids % 5 > 0) for ids in batches(40)]
    evicted = []
    for start in (0, 20):
        for found, fetched in tier.ahead(given[start : start + 20]):
            params, state = tier.swap(params, state, fetched)
            assert not np.any(found.rows.is_new & ~found.meant)
        for step in range(start, start + 20):
            keys, where = given[step]
            whole, _ = assign(whole, keys, step=step, where=where)
        before = tier.keys.num_keys
        whole, count = dynamic.evict(whole, own, config, start + 20)
        evicted.append(tier.evict())
        assert evicted[-1] == int(count) == before - 25
        assert tier.keys.num_keys == 25
        jax.tree.map(np.testing.assert_array_equal, tier.keys.state, whole)
        # The rest by a table that was restored.
        tier.save(tmp_path / "rows", params, state)
        params, state, tier = _table_of_keys(config)
        tier.restore(tmp_path / "rows")
        assert (tier.keys.num_keys, tier.keys.step) == (25, start + 20)
    assert min(evicted) > 0
    keys = given[0][0]
    found, fetched = tier.look(keys)
    wanted = dynamic.find(whole, keys, config)
    np.testing.assert_array_equal(found.rows.rows < CACHE_ROWS, wanted.rows.rows < 150)
    tier.swap(params, state, fetched)
    jax.tree.map(np.testing.assert_array_equal, tier.keys.state, whole)


@pytest.mark.parametrize("eviction", [None, dynamic.SmallNorm(1.0)])
def test_evictions_that_the_host_cannot_do(eviction):
    config = dynamic.DynamicConfig(150, FEATURES, eviction=eviction, large_table_rows=1)
    with pytest.raises(ValueError, match=r"needs a config\.eviction that goes by steps"):
        _table_of_keys(config)[-1].evict()
    with pytest.raises(ValueError, match="keys are those of a DynamicConfig"):
        Both().tier.evict()


def _save(tier, directory, **trained):
    tier.save(directory / "rows", **trained)


def test_a_checkpoint_has_the_rows_of_its_step(tmp_path):
    """They are read where the arrays are, and a damaged one is passed over with them."""
    both, given = Both(), batches(30)
    with Checkpoints(tmp_path / "c", CONFIG) as checkpoints:
        for step, start in enumerate((0, 10, 20)):
            both.train_tiered(given[start : start + 10])
            trained = {"params": both.params, "opt_state": both.state}
            files = functools.partial(_save, both.tier, **trained)
            checkpoints.save(step, (both.params, both.state), files=files)
        saved = tmp_path / "c" / "2" / "files" / "rows"
        checkpoints.wait()
        saved.write_bytes(saved.read_bytes()[:-9])
        tried = []

        def read(directory):
            tried.append(Both())
            tried[-1].tier.restore(directory / "rows")

        restored = checkpoints.restore((both.params, both.state), files=read)
        assert restored.step == 1
        assert f"{saved} cannot be read as rows" in restored.damaged[0]
        other = tried[-1]
        other.params, other.state = restored.state
        other.train_tiered(given[20:])
        other.train_whole(given)
        other.check()
        checkpoints.save(9, (both.params, both.state))
        with pytest.raises(MismatchError, match="c/9 holds no files"):
            checkpoints.restore((both.params, both.state), 9, files=read)
