"""DeepRec's storage of several tiers: the numbers of a variable that is all on the device."""

import contextlib
import functools
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qrhash
from qrhash import Bag, EmbedConfig, Keys, MeshLayout, MultiHash, dynamic
from qrhash.deeprec import (
    CounterFilter,
    EmbeddingVariableOption,
    GlobalStepEvict,
    L2WeightEvict,
    StorageOption,
    StorageType,
    TieredEmbeddingVariable,
    embedding_lookup,
    get_dynamic_dimension_embedding_variable,
    get_embedding_variable,
)

UNCHECKED_KEYS = True

WIDTH, CAPACITY, CACHE_ROWS, BATCH = 4, 300, 40, 24
SIZE = [CACHE_ROWS * WIDTH * 4]
IN_MEMORY = StorageOption(StorageType.HBM_DRAM, storage_size=SIZE)
RESIDENT = StorageOption()


def _variable(storage=IN_MEMORY, capacity=CAPACITY, width=WIDTH, name="v", **given):
    options = {key: given.pop(key) for key in ("evict_option", "filter_option") if key in given}
    option = EmbeddingVariableOption(storage_option=storage, **options)
    return get_embedding_variable(name, width, ev_option=option, capacity=capacity, **given)


class Model(nnx.Module):
    """A variable somewhere in a model, with parameters beside it."""

    def __init__(self, var):
        self.parts = nnx.List([nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(1)), var])

    @property
    def var(self):
        return self.parts[1]

    def __call__(self, found):
        return self.parts[0](embedding_lookup(self.var, found))


def _model(storage=IN_MEMORY, **given):
    model = Model(_variable(storage, **given))
    return model, qrhash.nnx.Optimizer(model, optax.adagrad(0.1))


@functools.partial(nnx.jit, donate_argnames=("model", "optimizer"))
def _step(model, optimizer, found):
    loss, grads = qrhash.nnx.value_and_grad(lambda model: ((model(found) - 1) ** 2).sum())(model)
    optimizer.update(model, grads)
    return loss


@functools.partial(nnx.jit, donate_argnames=("model", "optimizer"))
def _resident_step(model, optimizer, keys, number):
    found = model.var.assign(keys, number)
    optimizer.reset_rows(model, model.var, found)
    return _step.__wrapped__(model, optimizer, found)


_evict = nnx.jit(lambda model, number: model.var.evict(number))


def _batches(count=30, seed=0):
    """Keys come and go: those of a window that moves on, and some that stay."""
    rng = np.random.default_rng(seed)
    return [
        Keys.of(np.append(rng.integers(4 * n, 4 * n + 60, BATCH - 4), rng.integers(0, 9, 4)))
        for n in range(count)
    ]


def _train(model, optimizer, batches, **given):
    with contextlib.closing(model.var.ahead(batches, model, optimizer, **given)) as loop:
        return [_step(model, optimizer, found) for found in loop]


def _rows(model, optimizer, keys):
    """Rows of keys in tiers and the accumulators of them, from the store."""
    tier = model.var.tier
    model.var.flush(model, optimizer)
    found = dynamic.find(tier.keys.state, keys, model.var.whole)
    return tier.read(np.asarray(found.rows.rows))


def _resident_rows(model, optimizer, keys):
    rows = model.var.find(keys).rows.rows
    params, state = optimizer.as_arrays(model)
    table, sums = (tree["parts"][1]["table"] for tree in (params, state[0].sum_of_squares))
    return [np.asarray(array)[rows] for array in (table, sums)]


@pytest.mark.parametrize("where", ["memory", "file"])
def test_it_trains_as_one_that_is_all_on_the_device(where, tmp_path):
    folder = tmp_path / "some" / "rows"
    storage = StorageOption(StorageType.DRAM_SSDHASH, folder, storage_size=[*SIZE, 2**34])
    model, optimizer = _model(IN_MEMORY if where == "memory" else storage, name="same")
    whole, of_whole = _model(RESIDENT, name="same")
    given = _batches()
    losses = _train(model, optimizer, given)
    wanted = [_resident_step(whole, of_whole, keys, n) for n, keys in enumerate(given)]
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)

    var = model.var
    assert isinstance(var, TieredEmbeddingVariable)
    assert (var.table.shape, var.config.capacity) == ((CACHE_ROWS, WIDTH), CACHE_ROWS)
    kinds = {"memory": dynamic.MemoryStore, "file": dynamic.FileStore}
    assert type(var.tier.store) is kinds[where]
    assert 0.3 < var.tier.hit_rate < 0.9
    known = sorted({int(key) for keys in given for key in keys.lo})
    assert 3 * CACHE_ROWS < len(known) == var.num_keys == whole.var.num_keys
    keys = Keys.of(known)
    both = _rows(model, optimizer, keys), _resident_rows(whole, of_whole, keys)
    for rows, of_resident in zip(*both, strict=True):
        np.testing.assert_allclose(rows, of_resident, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        model.parts[0].kernel[...], whole.parts[0].kernel[...], rtol=1e-5, atol=1e-7
    )
    # Outside of the training; a key that is not known has no row, and gets none.
    keys = Keys.of([3, 10**12, known[-1]])
    vectors = embedding_lookup(var, var.look(keys, model, optimizer))
    np.testing.assert_allclose(vectors, embedding_lookup(whole.var, keys), rtol=1e-5, atol=1e-7)
    assert not vectors[1].any()
    assert var.num_keys == len(known)
    # The file is this process's alone, and goes with it.
    assert not list(tmp_path.rglob("*.rows"))
    assert folder.exists() == (where == "file")


def test_keys_that_are_evicted_and_come_back_start_anew():
    """Neither rows nor accumulators of their past, nor of the key whose row they get."""
    options = {"evict_option": GlobalStepEvict(6), "filter_option": CounterFilter(2)}
    model, optimizer = _model(**options)
    whole, of_whole = _model(RESIDENT, **options)
    given = _batches(20)
    given += given[:6]
    losses, wanted = [], []
    for start in range(0, len(given), 5):
        some = given[start : start + 5]
        losses += _train(model, optimizer, some)
        wanted += [_resident_step(whole, of_whole, keys, start + n) for n, keys in enumerate(some)]
        gone = model.var.tier.evict()
        assert gone == _evict(whole, start + len(some))
        assert gone > 0 or start < 10
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    keys = Keys.of([int(key) for key in np.unique(given[-1].lo)])
    assert model.var.num_keys == whole.var.num_keys < 200
    vectors = embedding_lookup(model.var, model.var.look(keys, model, optimizer))
    np.testing.assert_allclose(vectors, embedding_lookup(whole.var, keys), rtol=1e-5, atol=1e-7)


def test_rows_start_as_copies_of_compressed_vectors():
    refused = EmbedConfig(MultiHash((50,)), WIDTH)
    var = _variable(refused=refused, filter_option=CounterFilter(2))
    optimizer = qrhash.nnx.Optimizer(var, optax.sgd(0.5))
    compressed = qrhash.lookup(var.parameters.refused, Keys.of([7]), refused)
    vectors = [embedding_lookup(var, found) for found in var.ahead([[7], [7]], var, optimizer)]
    np.testing.assert_array_equal(np.concatenate(vectors), np.repeat(compressed, 2, axis=0))
    assert var.num_keys == 1


def test_bags_pairs_and_entries_of_mappings():
    model, optimizer = _model()
    bag = Bag.from_lists([[1, 2], [], [3]])
    (found,) = model.var.ahead([bag], model, optimizer)
    assert model(found).shape == (3, 2)
    pair = (Keys.of([1, 4]), np.array([True, False]))
    (batch,) = model.var.ahead([{"user": pair, "label": 5}], model, optimizer, "user")
    assert batch["label"] == 5
    assert not embedding_lookup(model.var, batch["user"])[1].any()
    assert model.var.num_keys == 3


def test_two_variables_of_a_model():
    class Two(nnx.Module):
        def __init__(self):
            self.a, self.b = _variable(name="a"), _variable(name="b", capacity=80)

    model = Two()
    optimizer = qrhash.nnx.Optimizer(model, optax.adagrad(0.1))
    given = _batches(5)
    loops = [var.ahead(given, model, optimizer) for var in (model.a, model.b)]
    for a, b in zip(*loops, strict=True):
        loss = lambda model: (model.a(a) * model.b(b)).sum()  # noqa: B023, E731
        optimizer.update(model, qrhash.nnx.grad(loss)(model))
    assert model.a.num_keys == model.b.num_keys > CACHE_ROWS


def test_it_goes_on_where_it_was_saved(tmp_path):
    given = _batches(12)
    model, optimizer = _model()
    _train(model, optimizer, given[:8])
    model.var.save(tmp_path / "user", model, optimizer)
    again, of_again = _model(
        StorageOption(StorageType.SSDHASH, tmp_path, storage_size=[2 * SIZE[0]])
    )
    again.var.restore(tmp_path / "user", again, of_again)
    assert again.var.table.shape == (2 * CACHE_ROWS, WIDTH)
    # What is not of the table is in a checkpoint beside it.
    kept, new = model.parts[0], again.parts[0]
    nnx.update(new, jax.tree.map(jnp.copy, nnx.state(kept)))
    sums, of_new = (each.opt_state[0].sum_of_squares.parts[0] for each in (optimizer, of_again))
    nnx.update(of_new, jax.tree.map(jnp.copy, nnx.state(sums)))
    losses = [_train(*each, given[8:]) for each in ((model, optimizer), (again, of_again))]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    with pytest.raises(ValueError, match="restore must come before the first loop"):
        again.var.restore(tmp_path / "user", again, of_again)


def test_a_loop_that_is_left():
    """What was planned and not trained is undone: its keys are new when they come again."""
    model, optimizer = _model()
    whole, of_whole = _model(RESIDENT)
    given = _batches(8)
    for found in model.var.ahead(given, model, optimizer):
        losses = [_step(model, optimizer, found)]
        break
    losses += _train(model, optimizer, given)
    wanted = [_resident_step(whole, of_whole, keys, n) for n, keys in enumerate(given[:1] + given)]
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert model.var.num_keys == whole.var.num_keys
    next(loop := model.var.ahead(given, model, optimizer))
    for call in (
        lambda: model.var.flush(model, optimizer),
        lambda: model.var.ahead(given, model, optimizer),
        lambda: model.var.look([1], model, optimizer),
    ):
        with pytest.raises(ValueError, match="before the loop over ahead has ended"):
            call()
    model.var.tier.stop()
    model.var.flush(model, optimizer)
    loop.close()


def test_pickles_clones_and_the_end_of_a_store():
    model, optimizer = _model()
    _train(model, optimizer, _batches(2))
    for copy in (pickle.loads(pickle.dumps(model)), nnx.clone(model)):
        with pytest.raises(ValueError, match="tier is there once ahead, look"):
            _ = copy.var.tier
    store = weakref.ref(model.var.tier.store)
    del model, optimizer, copy
    gc.collect()
    assert store() is None


@pytest.mark.parametrize("kind", list(StorageType)[2:])
def test_where_the_types_keep_rows(kind, tmp_path):
    is_file = kind is not StorageType.HBM_DRAM
    storage = StorageOption(kind, tmp_path if is_file else None)
    store = storage.store(10, 3)
    assert type(store) is (dynamic.FileStore if is_file else dynamic.MemoryStore)
    store.close()


def test_how_many_rows_are_on_the_device():
    def rows(size, capacity=100, width=8, value_dtype=None):
        storage = StorageOption(StorageType.HBM_DRAM, storage_size=size)
        return _variable(storage, capacity, width, value_dtype=value_dtype).config.capacity

    assert rows([320]) == 10
    assert rows((351, 2**40)) == 10
    assert rows([320], value_dtype=jnp.bfloat16) == 20
    assert rows([1]) == 1
    assert rows([2**30]) == rows(None) == 100
    large = dynamic.DynamicConfig(10**9, 16)
    assert StorageOption(StorageType.HBM_DRAM).cache_rows(large) == 2**24


# --- what is refused ------------------------------------------------------------------------------

_KIND = r"StorageType\.HBM_DRAM"
_LAYOUT = MeshLayout(mesh=jax.make_mesh((2,), ("model",)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: StorageOption(StorageType.DRAM_PMEM),
            r"storage_path must be given for StorageType\.DRAM_PMEM: the folder",
        ),
        (
            lambda: StorageOption(StorageType.HBM_DRAM, "rows"),
            "storage_path='rows' has no meaning here: no rows are kept in files",
        ),
        (
            lambda: StorageOption(StorageType.HBM_DRAM, storage_size=2**30),
            "storage_size must be a list of 1 to 4 sizes in bytes",
        ),
        (lambda: StorageOption(StorageType.HBM_DRAM, storage_size=[]), "must be a list of 1 to 4"),
        (lambda: StorageOption(StorageType.HBM_DRAM, storage_size=[0]), r"storage_size\[0\] must"),
        (
            lambda: StorageOption(StorageType.HBM_DRAM, cache_strategy="LFU"),
            "cache_strategy='LFU' has no meaning here: .* those used longest ago make room",
        ),
        (lambda: StorageOption(StorageType.HBM_DRAM, layout="x"), "layout='x' has no meaning"),
        (lambda: _variable(trainable=False), f"trainable must be True with {_KIND}"),
        (lambda: _variable(partitioner=_LAYOUT), f"partitioner must be None with {_KIND}"),
        (
            lambda: _variable(evict_option=L2WeightEvict(1.0)),
            f"evict_option must be a GlobalStepEvict or None with {_KIND}",
        ),
        (
            lambda: get_dynamic_dimension_embedding_variable(
                "v", 2, 3, capacity=9, ev_option=EmbeddingVariableOption(storage_option=IN_MEMORY)
            ),
            f"for a variable of dynamic dimension, got {_KIND}",
        ),
    ],
)
def test_options_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_calls_that_are_refused(tmp_path):
    model, optimizer = _model()
    var = model.var
    only_ahead = r"have their rows from var\.ahead\(batches, model, optimizer\)"
    for call in (
        lambda: embedding_lookup(var, [7]),
        lambda: var.find([7]),
        lambda: var.assign([7], 0),
        lambda: var.evict(0),
    ):
        with pytest.raises(ValueError, match=only_ahead):
            call()
    with pytest.raises(ValueError, match="tier is there once ahead, look, flush, save or restore"):
        _ = var.tier
    with pytest.raises(ValueError, match=r"optimizer must be a qrhash\.nnx\.Optimizer"):
        var.ahead([], model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param))
    with pytest.raises(ValueError, match="model must be the variable or hold it"):
        var.ahead([], model.parts[0], optimizer)
    others = qrhash.nnx.Optimizer(
        model, optax.sgd(0.1), wrt=nnx.All(nnx.Param, nnx.Not(qrhash.nnx.Table))
    )
    with pytest.raises(ValueError, match="optimizer must train the table of the variable"):
        var.ahead([], model, others)
    list(var.ahead([[1]], model, optimizer))
    with pytest.raises(ValueError, match="model must be of the structure of the one"):
        var.ahead([], var, qrhash.nnx.Optimizer(var, optax.adagrad(0.1)))
    with pytest.raises(ValueError, match="at least the 50 rows"):
        list(var.ahead([np.arange(50)], model, optimizer))
    (tmp_path / "taken").write_text("")
    var = _variable(StorageOption(StorageType.SSDHASH, tmp_path / "taken"))
    with pytest.raises(ValueError, match="storage_path must be a folder in which a file"):
        var.ahead([], var, qrhash.nnx.Optimizer(var, optax.sgd(0.1)))
