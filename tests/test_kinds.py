"""A kind of table that qrhash does not know: one class that keeps the protocol, and it trains.

`Halves` keeps its even rows in one array and its odd rows in another. Nothing in the package has
heard of it; look-ups, gradients, optimizers, collections and checkpoints' files take it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qrhash
from qrhash import CollectionConfig, EmbedConfig, RowGrads, collection
from qrhash.local import LocalTable
from qrhash.protocol import LookUps, Table
from support.cases import OPERATIONS, OPTIMIZED, assert_close
from support.meshes import whole


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("even", "odd"), meta_fields=("num_rows",)
)
@dataclasses.dataclass(frozen=True, eq=False)
class Halves(Table):
    even: Any
    odd: Any
    num_rows: int

    @classmethod
    def of(cls, table):
        return cls(table[::2], table[1::2], len(table))

    @property
    def shape(self):
        return (self.num_rows, *self.even.shape[1:])

    @property
    def dtype(self):
        return self.even.dtype

    def _split(self, indices):
        """For each half the places of its rows, its end for those of the other half."""
        in_table = [(index >= 0) & (index < self.num_rows) for index in indices]
        return [
            [
                jnp.where(ok & (index % 2 == half), index // 2, (self.num_rows + 1) // 2)
                for index, ok in zip(indices, in_table, strict=True)
            ]
            for half in (0, 1)
        ]

    def _halves(self, method, indices, *args, look_ups, **options):
        """What a method of each half gives."""
        num_rows = [(self.num_rows + 1) // 2, self.num_rows // 2]
        return [
            getattr(LocalTable(array), method)(places, *args, look_ups.within(places, n), **options)
            for array, places, n in zip(self.arrays, self._split(indices), num_rows, strict=True)
        ]

    @property
    def arrays(self):
        return self.even, self.odd

    def take(self, indices, look_ups):
        halves = self._halves("take", indices, look_ups=look_ups)
        return [even + odd for even, odd in zip(*halves, strict=True)]

    def read(self, indices, look_ups):
        (of_even, even), (of_odd, odd) = self._halves("read", indices, look_ups=look_ups)
        rows = [a + b for a, b in zip(of_even, of_odd, strict=True)]
        ends = len(self.even), len(self.odd)
        # The row numbers come out of both reads.
        numbers = [
            jnp.where(a < ends[0], 2 * a, jnp.where(b < ends[1], 2 * b + 1, self.num_rows))
            for a, b in zip(even, odd, strict=True)
        ]
        return rows, numbers

    def take_from_many(self, indices, look_ups):
        halves = self._halves("take_from_many", indices, look_ups=look_ups)
        return [even + odd for even, odd in zip(*halves, strict=True)]

    def gradient(self, indices, cotangents, look_ups):
        halves = self._halves("gradient", indices, cotangents, look_ups=look_ups)
        return Halves(*(half.array for half in halves), self.num_rows)

    def row_grads(self, indices, values, look_ups, *, num_loops=0):
        options = {"look_ups": look_ups, "num_loops": num_loops}
        halves = self._halves("row_grads", indices, values, **options)
        return Halves(*(half.array for half in halves), self.num_rows)

    def products(self, query):
        products = (LocalTable(array).products(query).array for array in self.arrays)
        return Halves(*products, self.num_rows)

    def to_array(self):
        rows = jnp.zeros(self.shape, self.dtype)
        return rows.at[::2].set(self.even).at[1::2].set(self.odd)


def _halved(tables):
    """Of which the large ones, the first here, are of the new kind."""
    return (Halves.of(tables[0]), *tables[1:])


def _config(operation="mult", num_embeddings=29, **options):
    partition = qrhash.QuotientRemainder(num_embeddings, 3)
    return EmbedConfig(partition, 8, operation, large_table_rows=5, id_policy="zero", **options)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_look_ups_and_attend(operation, rng):
    cfg = _config(operation)
    tables = qrhash.init(jax.random.key(0), cfg)
    projection = qrhash.init_projection(jax.random.key(0), cfg)
    ids = jnp.array([[0, 28, 5], [-1, 29, 5]])
    query = jnp.asarray(rng.standard_normal((2, 8)), jnp.float32)
    for wrap in (lambda f: f, jax.jit):
        got = wrap(lambda tables: qrhash.lookup(tables, ids, cfg, projection))(_halved(tables))
        assert_close(got, qrhash.lookup(tables, ids, cfg, projection))
        got = wrap(lambda tables: qrhash.attend(tables, query, cfg, projection))(_halved(tables))
        assert_close(got, qrhash.attend(tables, query, cfg, projection))


def test_ordinary_gradients_and_vmap(rng):
    cfg = _config()
    tables = qrhash.init(jax.random.key(0), cfg)
    ids = jnp.asarray(rng.integers(-1, 30, (4, 3)), jnp.int32)
    loss = lambda tables, ids: (qrhash.lookup(tables, ids, cfg) ** 2).sum()  # noqa: E731
    mapped = lambda tables, ids: jax.vmap(loss, (None, 0))(tables, ids).sum()  # noqa: E731
    for fun in (loss, mapped):
        got, want = (jax.jit(jax.grad(fun))(each, ids) for each in (_halved(tables), tables))
        jax.tree.map(assert_close, whole(got), want)
    many = jax.tree.map(lambda *each: jnp.stack(each), *[_halved(tables)] * 4)
    got = jax.vmap(lambda tables, ids: qrhash.lookup(tables, ids, cfg))(many, ids)
    assert_close(got, qrhash.lookup(tables, ids, cfg))


def _train(step, params, state, batches):
    step = jax.jit(step, donate_argnums=(0, 1))
    for batch in batches:
        params, state = step(params, state, batch)
    return params, state


@pytest.mark.parametrize("tx", [optax.adagrad(0.1), qrhash.rowwise_adagrad(0.1), optax.sgd(0.1)])
def test_it_trains_by_rows_to_the_numbers_of_a_plain_array(tx, rng):
    cfg = _config()
    batches = [jnp.asarray(rng.integers(-1, 30, 8), jnp.int32) for _ in range(20)]
    touched = qrhash.touched_rows(optax.chain(optax.clip_by_global_norm(1.0), tx))

    def step(tables, state, ids):
        loss = lambda tables: (qrhash.lookup(tables, ids, cfg) - 1).sum() ** 2  # noqa: E731
        _, grads = qrhash.value_and_grad(loss, large=cfg.large_tables)(tables)
        assert isinstance(jax.tree.leaves(grads, is_leaf=_is_row_grads)[0], RowGrads)
        updates, state = touched.update(grads, state, tables)
        return qrhash.apply_updates(tables, updates), state

    got, want = (
        _train(step, tables, touched.init(tables), batches)
        for tables in (
            _halved(qrhash.init(jax.random.key(0), cfg)),
            qrhash.init(jax.random.key(0), cfg),
        )
    )
    jax.tree.map(assert_close, whole(got[0]), want[0])


def _is_row_grads(node):
    return isinstance(node, RowGrads)


def test_a_step_touches_the_rows_of_its_batch_alone():
    cfg = _config(num_embeddings=3 * 30_000)
    tx = qrhash.touched_rows(optax.adagrad(0.1))
    tables = jax.eval_shape(lambda: _halved(qrhash.init(jax.random.key(0), cfg)))

    def step(tables, state, ids):
        loss = lambda tables: qrhash.lookup(tables, ids, cfg).sum()  # noqa: E731
        _, grads = qrhash.value_and_grad(loss, large=cfg.large_tables)(tables)
        updates, state = tx.update(grads, state, tables)
        return qrhash.apply_updates(tables, updates), state

    ids = jax.ShapeDtypeStruct((16,), jnp.int32)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        tables, jax.eval_shape(tx.init, tables), ids
    )
    memory = lowered.compile(OPTIMIZED).memory_analysis()
    table_bytes = 30_000 * 8 * 4
    assert memory.temp_size_in_bytes < table_bytes / 4
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < table_bytes / 4


def test_a_collection_takes_it(rng):
    config = CollectionConfig({"a": _config(), "b": _config("mult"), "c": "a"})
    stacks = collection.init(jax.random.key(0), config)
    ids = {name: jnp.asarray(rng.integers(0, 29, 4), jnp.int32) for name in "abc"}
    (large,) = [name for name, is_large in config.large_tables.items() if is_large]

    def loss(stacks):
        return sum((each**2).sum() for each in collection.lookup(stacks, ids, config).values())

    halved = {**stacks, large: Halves.of(stacks[large])}
    value_and_grad = jax.jit(qrhash.value_and_grad(loss, large=config.large_tables))
    (value, grads), (want, of_plain) = value_and_grad(halved), value_and_grad(stacks)
    assert_close(value, want)
    dense = Halves(*(half.to_dense() for half in (grads[large].even, grads[large].odd)), 20)
    assert_close(dense.to_array(), of_plain[large].to_dense())
    unstacked = collection.unstack(halved, config)
    jax.tree.map(np.testing.assert_array_equal, unstacked, collection.unstack(stacks, config))


def test_its_whole_table_is_what_a_file_gets():
    table = Halves.of(jnp.arange(10.0).reshape(5, 2))
    np.testing.assert_array_equal(table.to_file(), jnp.arange(10.0).reshape(5, 2))
    with pytest.raises(ValueError, match="Halves"):
        table.from_file(table.to_file())


def test_what_is_not_looked_up_has_no_gradient():
    table = Halves.of(jnp.ones((5, 2)))
    grads = table.no_grads()
    assert isinstance(grads, Halves)
    assert grads.even.to_dense().shape == (3, 2)
    assert LookUps(segments=()).times(3) == LookUps(segments=())


def test_row_gradients_by_hand_fit_their_rows(rng):
    table = Halves.of(jnp.ones((5, 2)))
    (rows,), indices = qrhash.take_rows((table,), (jnp.array([4, 1, 9]),))
    (grads,) = qrhash.row_grads((table,), indices, (2 * rows,))
    assert isinstance(grads, Halves)
    with pytest.raises(ValueError, match=r"values must be of shape \(3, 2\).*got \(3, 5\)"):
        qrhash.row_grads((table,), indices, (jnp.ones((3, 5)),))
    with pytest.raises(ValueError, match="values must hold one array per table, 1, got 2"):
        qrhash.row_grads((table,), indices, (rows, rows))


def test_a_checkpoint_keeps_its_rows_in_their_order(tmp_path):
    cfg = _config()
    tables = _halved(qrhash.init(jax.random.key(0), cfg))
    with qrhash.checkpoint.Checkpoints(tmp_path, cfg) as checkpoints:
        checkpoints.save(1, tables)
        plain = jax.tree.map(jnp.zeros_like, whole(tables))
        restored = checkpoints.restore(plain).state
        jax.tree.map(np.testing.assert_array_equal, restored, whole(tables))
        with pytest.raises((ValueError, OSError), match="Halves"):
            checkpoints.restore(tables)
