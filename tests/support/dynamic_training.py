"""A training of a dynamic table, step by step, and what each of its keys has.

Started as a script, it is a nursery of trainings to be killed, as `training_process` is.
"""

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

WIDTH, SIZE = 4, 16
REFUSED = EmbedConfig(KeyDigits(6, num_tables=2), WIDTH, "add")


def config_of(capacity=40, **options):
    """One whose table is trained by rows."""
    options = {"large_table_rows": 1, "refused": REFUSED} | options
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
        """Key -> its vector, count and last step, and each leaf of optimizer state of its row."""
        index, capacity = self.state.index, self.config.capacity
        parts = [self.params.table, index.counts, index.last_steps]
        parts += [x for x in jax.tree.leaves(self.opt_state) if x.shape[:1] == (capacity,)]
        parts = [np.asarray(part) for part in parts]
        return {key: tuple(part[row].tobytes() for part in parts) for key, row in self.keys.items()}


def rows_of(index, without_row=()):
    """Key -> row, by the keys of the rows; and the same must be found by the slots."""
    index = getattr(index, "index", index)
    live = np.flatnonzero(np.asarray(index.last_steps) >= 0)
    keys = index.keys.to_numpy()[live]
    found = dynamic.index.lookup_rows(index, qrhash.Keys.of(keys)).rows
    assert np.asarray(found).tolist() == live.tolist()
    free = np.asarray(index.free)[: int(index.num_free)]
    assert sorted([*free.tolist(), *live.tolist(), *without_row]) == list(range(index.capacity))
    return dict(zip(keys.tolist(), live.tolist(), strict=True))


def known(state):
    """Key -> row of the table, count and last step, of any number of shards, each by itself."""
    places = np.asarray(state.index.counts)
    home = np.arange(places.size) if state.home is None else np.asarray(state.home)
    shards = home.reshape(-1, places.shape[-1])
    of_key, free = {}, []
    for number, rows in enumerate(shards):
        one = state.index if state.home is None else jax.tree.map(lambda x: x[number], state.index)  # noqa: B023
        of_shard = rows_of(one, np.flatnonzero(rows < 0).tolist())
        counts, steps = np.asarray(one.counts), np.asarray(one.last_steps)
        for key, place in of_shard.items():
            assert key not in of_key
            of_key[key] = int(rows[place]), int(counts[place]), int(steps[place])
        free += rows[np.asarray(one.free)[: int(one.num_free)]].tolist()
    given = sorted([*free, *(row for row, _, _ in of_key.values())])
    assert given == list(range(np.count_nonzero(home >= 0)))
    return of_key


def vectors_of(params, state, keys, config):
    """Vectors of keys outside of the training."""
    return np.asarray(dynamic.lookup(params, dynamic.find(state, keys, config), config))


# --- trainings that only save ---------------------------------------------------------------------


def killed_config():
    return config_of(60, admission=dynamic.ExactCount(2, 40), eviction=dynamic.StepsSinceUse(4))


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
