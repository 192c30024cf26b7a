"""A training of a dynamic table, step by step, and what each of its keys has.

Started as a script, it is a nursery of trainings to be killed, as `training_process` is.
"""

import dataclasses
import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qrhash
from qrhash import EmbedConfig, KeyDigits, dynamic
from qrhash.checkpoint import Checkpoints
from support.meshes import whole

WIDTH, SIZE = 4, 16
REFUSED = EmbedConfig(KeyDigits(6, num_tables=2), WIDTH, "add")


def config_of(capacity=40, **options):
    """One whose table is trained by rows."""
    refused = dataclasses.replace(REFUSED, layout=options.get("layout"))
    options = {"large_table_rows": 1, "refused": refused} | options
    return dynamic.DynamicConfig(capacity, WIDTH, **options)


@functools.cache
def adagrad():
    return qrhash.touched_rows(qrhash.adagrad(0.1, initial_accumulator_value=0.5))


@functools.cache
def adam():
    return qrhash.touched_rows(optax.adam(0.1))


def batch(step, *, universe=60, size=SIZE):
    """Keys of all 64 bits, that of a step always the same; later ones are other keys."""
    rng = np.random.default_rng(step)
    numbers = rng.integers(0, universe, size).astype(np.uint64) + np.uint64(step)
    return qrhash.Keys.of(numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(2**64 - 2))


@functools.cache
def compiled(config, tx):
    """The step, once for all trainings of a config."""

    def run(params, state, opt_state, keys, meant, number):
        state, found = dynamic.assign(state, keys, config, number, where=meant)
        params, new = dynamic.start_rows(params, found, config)
        opt_state = qrhash.reset_rows(tx, opt_state, params, new)

        def loss(params):
            vectors = dynamic.lookup(params, found, config)
            errors = jnp.sum((vectors - 1) ** 2).astype(jnp.float32)
            return errors * (number + 1).astype(jnp.float32)

        _, grads = qrhash.value_and_grad(loss, dynamic.large(config))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return qrhash.apply_updates(params, updates), state, opt_state

    # The numbers matter to the tests, not how fast they come.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(run, donate_argnums=(0, 1, 2), compiler_options=options)


class Training:
    """Parameters, state and optimizer state, and the step that makes new ones of them."""

    def __init__(self, config, tx=None):
        self.config, self.tx = config, adagrad() if tx is None else tx
        self.params, self.state = (
            dynamic.init(jax.random.key(0), config),
            dynamic.init_state(config),
        )
        self.opt_state, self.number = self.tx.init(self.params), 0

    def step(self, keys=None):
        keys = batch(self.number) if keys is None else qrhash.Keys.of(keys)
        # All batches of one size: each other one would be compiled.
        bits = np.zeros(SIZE, np.uint64)
        bits[: keys.size] = keys.to_numpy()
        meant, number = np.arange(SIZE) < keys.size, jnp.int32(self.number)
        step = compiled(self.config, self.tx)
        made = step(self.params, self.state, self.opt_state, qrhash.Keys.of(bits), meant, number)
        (self.params, self.state, self.opt_state), self.number = made, self.number + 1

    def steps(self, count):
        for _ in range(count):
            self.step()

    def evict(self):
        self.state, count = dynamic.evict(self.state, self.params, self.config, self.number)
        return int(count)

    def grow(self, capacity):
        grown, self.state, self.config = dynamic.grow(
            self.params, self.state, self.config, capacity
        )
        self.opt_state = qrhash.grow_rows(self.tx, self.opt_state, self.params, grown)
        self.params = grown

    @property
    def tree(self):
        """What a checkpoint holds."""
        return {"params": self.params, "state": self.state, "opt_state": self.opt_state}

    @tree.setter
    def tree(self, tree):
        self.params, self.state, self.opt_state = tree["params"], tree["state"], tree["opt_state"]

    @property
    def keys(self):
        """Key -> row, of the keys that have one."""
        return rows_of(self.state)

    def of_keys(self):
        """Key -> its row, count and last step, its vector, and all optimizer state of its row."""
        leaves = [self.params.table, *jax.tree.leaves(whole(self.opt_state))]
        arrays = [np.asarray(leaf) for leaf in map(whole, leaves)]
        parts = [array for array in arrays if array.shape[:1] == (self.config.capacity,)]
        return {
            key: (row, *of_index, *(part[row].tobytes() for part in parts))
            for key, (row, *of_index) in known(self.state).items()
        }


def rows_of(state):
    """Key -> row, by the keys of the rows; and the same must be found by the slots."""
    return _places_of(state.index, [])


def known(state):
    """Key -> row of the table, count and last step; of any number of shards, each by itself."""
    if state.home is None:
        shards = [(state.index, np.arange(state.index.capacity))]
    else:
        each = range(len(state.home))
        of_host = jax.tree.map(np.asarray, state.index)
        indexes = [jax.tree.map(lambda x, n=n: jnp.asarray(x[n]), of_host) for n in each]
        shards = list(zip(indexes, np.asarray(state.home), strict=True))
    of_key, free = {}, []
    for index, rows in shards:
        counts, steps = np.asarray(index.counts), np.asarray(index.last_steps)
        for key, place in _places_of(index, np.flatnonzero(rows < 0).tolist()).items():
            assert key not in of_key
            of_key[key] = int(rows[place]), int(counts[place]), int(steps[place])
        free += rows[np.asarray(index.free)[: int(index.num_free)]].tolist()
    num_rows = sum(int((rows >= 0).sum()) for _, rows in shards)
    assert sorted([*free, *(row for row, _, _ in of_key.values())]) == list(range(num_rows))
    return of_key


def _places_of(index, without_row):
    """Key -> its place in an index, of whose places some have no row."""
    # All at once, also those that are not looked for: each other number of keys would be compiled.
    is_live = np.asarray(index.last_steps) >= 0
    live, keys = np.flatnonzero(is_live), index.keys.to_numpy()
    found = dynamic.index.lookup_rows(index, qrhash.Keys.of(keys), where=is_live).rows
    assert np.asarray(found)[live].tolist() == live.tolist()
    keys = keys[live]
    free = np.asarray(index.free)[: int(index.num_free)]
    assert sorted([*free.tolist(), *live.tolist(), *without_row]) == list(range(index.capacity))
    return dict(zip(keys.tolist(), live.tolist(), strict=True))


def vectors_of(params, state, keys, config):
    """Vectors of keys outside of the training."""
    return np.asarray(dynamic.lookup(params, dynamic.find(state, keys, config), config))


# --- trainings that only save ---------------------------------------------------------------------


def killed_config(**options):
    admission, eviction = dynamic.ExactCount(2, 40), dynamic.StepsSinceUse(4)
    return config_of(120, admission=admission, eviction=eviction, **options)


def killed_step(training):
    """A step; after every third rows are taken back, as checkpoints are when they are saved."""
    training.step()
    if training.number % 3 == 0:
        training.evict()


def _save_on(directory):
    """Says from which step on it goes, and each step that is on disk."""
    config = killed_config()
    killed_step(Training(config))
    training = Training(config)
    checkpoints = Checkpoints(directory, config, max_to_keep=2)
    restored = checkpoints.restore(training.tree)
    training.tree, training.number = restored.state, restored.step
    print(os.getpid(), restored.step, flush=True)
    while True:
        killed_step(training)
        checkpoints.save(training.number, training.tree, {"step": training.number})
        checkpoints.wait()
        print(training.number, flush=True)


if __name__ == "__main__":
    from training_process import nurse

    nurse(_save_on, sys.argv[1])
