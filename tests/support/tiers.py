"""A table in a store with a cache of its rows, and the same one all there, trained side by side."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qrhash
from qrhash import dynamic

NUM_ROWS, CACHE_ROWS, BATCH, FEATURES = 2000, 70, 24, 4
KEY = jax.random.key(3)
OPTIMIZERS = {"adagrad": optax.adagrad(0.1), "lazy adam": optax.adam(0.01)}
CONFIG = qrhash.EmbedConfig(qrhash.FullTable(NUM_ROWS), FEATURES, large_table_rows=1)


def batches(count, seed=0, num_rows=NUM_ROWS):
    rng = np.random.default_rng(seed)
    return [np.minimum(rng.zipf(1.3, BATCH), num_rows) * 7919 % num_rows for _ in range(count)]


wrapped = functools.cache(qrhash.touched_rows)


@functools.cache
def step_of(config, tx):
    cotangent = jnp.arange(1.0, 1 + FEATURES)

    def loss(params, ids):
        vectors = qrhash.lookup(params, ids, config).astype(jnp.float32)
        return jnp.sum(vectors**2 * cotangent[None])

    gradient = qrhash.value_and_grad(loss, config.large_tables)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, ids):
        value, grads = gradient(params, ids)
        updates, state = tx.update(grads, state, params)
        return qrhash.apply_updates(params, updates), state, value

    return step


class Both:
    """The same table resident and tiered."""

    def __init__(self, tx=OPTIMIZERS["adagrad"], config=CONFIG, cache_rows=CACHE_ROWS, **options):
        self.tx, self.small = wrapped(tx), dynamic.cached(config, cache_rows)
        self.whole = qrhash.init(KEY.copy(), config)
        self.whole_state, self.whole_step = self.tx.init(self.whole), step_of(config, self.tx)
        self.params = qrhash.init(jax.random.key(1), self.small)
        self.state, self.step = self.tx.init(self.params), step_of(self.small, self.tx)
        options = {"store": dynamic.MemoryStore, "key": KEY.copy()} | options
        self.tier = dynamic.Tiered(config, self.params, self.tx, **options)

    def train_tiered(self, given):
        values = []
        with contextlib.closing(self.tier.ahead(given)) as loop:
            for slots, fetched in loop:
                self.params, self.state = self.tier.swap(self.params, self.state, fetched)
                self.params, self.state, value = self.step(self.params, self.state, slots)
                values.append(value)
        return values

    def train_whole(self, given):
        values = []
        for ids in given:
            carry = self.whole_step(self.whole, self.whole_state, jax.tree.map(jnp.asarray, ids))
            self.whole, self.whole_state, value = carry
            values.append(value)
        return values

    def check(self):
        self.tier.flush(self.params, self.state)
        wanted = [self.whole[0], *by_rows(self.whole_state)]
        assert_same(self.tier.read(np.arange(len(wanted[0]))), wanted)


def by_rows(state):
    return [leaf for leaf in jax.tree.leaves(state) if leaf.shape[:1] == (NUM_ROWS,)]


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        assert one.dtype == other.dtype
        assert one.tobytes() == np.asarray(other).tobytes()
