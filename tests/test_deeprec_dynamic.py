"""DeepRec's embedding variable: its semantics, and every one of its arguments."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import qrhash
from qrhash import EmbedConfig, KeyDigits, Keys, MeshLayout, MultiHash, dynamic
from qrhash.deeprec import (
    CBFFilter,
    CounterFilter,
    EmbeddingVariableOption,
    GlobalStepEvict,
    InitializerOption,
    L2WeightEvict,
    StorageOption,
    StorageType,
    embedding_lookup,
    get_dynamic_dimension_embedding_variable,
    get_embedding_variable,
)

ones = nn.initializers.ones


_assign = nnx.jit(lambda var, keys, step: var.assign(keys, step))
_find = nnx.jit(lambda var, keys: var.find(keys))
_look_up = nnx.jit(embedding_lookup)
_evict = nnx.jit(lambda var, step: var.evict(step))


def _assigned(var, keys, step):
    """Jitted: a step that runs op by op is compiled again each time."""
    return _assign(var, Keys.of(keys), step)


def _vectors(var, keys):
    return np.asarray(_look_up(var, Keys.of(keys)))


def _variable(capacity=8, width=2, initializer=ones, refused=None, **options):
    option = EmbeddingVariableOption(**options)
    given = {"capacity": capacity, "refused": refused, "initializer": initializer}
    return get_embedding_variable("var", width, ev_option=option, **given)


def test_its_training_worked_out_by_hand():
    """Ones, loss sum(2 * embedding), TensorFlow's Adagrad(0.1): steps of 0.2 / sqrt(0.1 + 4 t)."""
    var = _variable()
    tx = optax.adagrad(0.1, initial_accumulator_value=0.1)
    optimizer = qrhash.nnx.Optimizer(var, tx)
    for step, entry in enumerate((0.90123, 0.83095, 0.77346)):
        found = _assigned(var, [0, 1, 2, 5, 6, 7], step)
        optimizer.reset_rows(var, var, found)
        loss = lambda var: (2 * embedding_lookup(var, found)).sum()  # noqa: B023, E731
        optimizer.update(var, qrhash.nnx.grad(loss)(var))
        vectors = _vectors(var, [0, 1, 2, 5, 6, 7])
        np.testing.assert_allclose(vectors, np.full((6, 2), entry), atol=1e-5)


@pytest.mark.parametrize("counting", [CounterFilter(3), CBFFilter(3, 1000, 0.01)])
def test_a_key_is_admitted_in_the_call_that_brings_it_to_the_frequency(counting):
    """Where freq + count >= filter_freq; till then its vector is the default for refused keys."""
    init = InitializerOption(default_value_no_permission=0.25)
    var = _variable(filter_option=counting, init_option=init)

    def is_admitted(keys, step):
        vectors = np.asarray(_look_up(var, _assigned(var, keys, step)))
        assert np.isin(vectors, (0.25, 1.0)).all()
        return (vectors[:, 0] == 1).tolist()

    assert is_admitted([7, 8, 7], 0) == [False] * 3
    assert is_admitted([8, 7, 9], 1) == [False, True, False]
    assert is_admitted([8, 9, 9], 2) == [True] * 3
    # Looked up outside of the training, as in inference, no key is counted.
    for _ in range(4):
        assert (_vectors(var, [1, 1, 1]) == 0.25).all()
    assert is_admitted([1], 3) == [False]


def test_filters_that_let_everything_in():
    for counting in (None, CounterFilter(), CounterFilter(1), CBFFilter()):
        var = _variable(filter_option=counting)
        assert (_look_up(var, _assigned(var, [5], 0)) == 1).all()


def test_what_filters_become():
    def admission(counting, capacity=100):
        return _variable(capacity, filter_option=counting).config.admission

    assert admission(CounterFilter(5)) == dynamic.ExactCount(5, 100)
    assert admission(CounterFilter(5, num_candidates=7)) == dynamic.ExactCount(5, 7)
    sketch = dynamic.SketchCount.for_keys(5, 1000, 0.01)
    assert admission(CBFFilter(5, 1000, 0.01, np.uint8)) == sketch
    assert admission(CBFFilter(5)) == dynamic.ExactCount(5, 100)


def _moved(var, key, vector):
    row = int(_find(var, Keys.of([key])).rows.rows[0])
    var.table.set_value(var.table[...].at[row].set(jnp.array(vector)))


def test_eviction_by_global_step():
    """global_step - version > steps_to_live; and the key comes back with nothing of its past."""
    var = _variable(evict_option=GlobalStepEvict(4), filter_option=CounterFilter(2))
    _assigned(var, [1, 1, 1, 2, 2], 10)
    _moved(var, 1, [5.0, 6.0])
    _assigned(var, [2], 12)
    assert int(_evict(var, 14)) == 0
    assert int(_evict(var, 15)) == 1
    assert _vectors(var, [1, 2]).tolist() == [[0, 0], [1, 1]]
    assert (_look_up(var, _assigned(var, [1], 16)) == 0).all()  # counts from zero
    assert (_look_up(var, _assigned(var, [1], 17)) == 1).all()  # and starts anew


def test_eviction_by_weight_is_half_the_sum_of_squares():
    var = _variable(evict_option=L2WeightEvict(1.0))
    _assigned(var, [1, 2, 3], 0)
    for key, vector in {1: [1.4, 0.0], 2: [1.0, 1.0], 3: [0.0, 1.42]}.items():
        _moved(var, key, vector)
    assert int(_evict(var, 0)) == 1  # 1.4 ** 2 / 2 is 0.98
    found = _find(var, Keys.of([1, 2, 3])).rows.rows
    assert (found == var.config.capacity).tolist() == [True, False, False]


def test_evictions_that_are_off():
    for off in (None, GlobalStepEvict(), GlobalStepEvict(0), L2WeightEvict()):
        var = _variable(evict_option=off)
        with pytest.raises(ValueError, match=r"evict needs config\.eviction"):
            var.evict(0)


def test_adaptive_embeddings_start_as_copies_of_the_compressed_ones():
    """categorical_column_with_adaptive_embedding: EV rows start as the key's row of the hash table.

    There the caller says by a mask which keys are in the variable, here the filter does.
    """
    refused = EmbedConfig(MultiHash((50,)), 2)
    counting = CounterFilter(2)
    var = _variable(initializer=None, refused=refused, filter_option=counting)
    compressed = qrhash.lookup(var.parameters.refused, qrhash.Keys.of([7]), refused)
    for step in (0, 1):
        found = _assigned(var, [7], step)
        assert int(found.rows.rows[0]) == (8, 0)[step]
        np.testing.assert_array_equal(embedding_lookup(var, found), compressed)


def test_rows_are_drawn_by_key_and_name():
    """DeepRec's keys 4096 apart start as twins."""
    first = get_embedding_variable("a", 4, capacity=4)
    second = get_embedding_variable("b", 4, capacity=4)
    keys = [1, 4097]
    vectors = [_look_up(var, _assigned(var, keys, 0)) for var in (first, second)]
    assert len(np.unique(np.concatenate(vectors), axis=0)) == 4
    given = InitializerOption(initializer=nn.initializers.constant(0.5))
    assert _variable(initializer=None, init_option=given).config.embedding_init is given.initializer


def test_the_arguments_are_deeprecs_in_deeprecs_order():
    def by_position(of):
        parameters = inspect.signature(of).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}

    given = by_position(get_embedding_variable)
    assert " ".join(given) == (
        "name embedding_dim key_dtype value_dtype initializer regularizer trainable collections "
        "caching_device partitioner validate_shape custom_getter constraint init_data_source "
        "ev_option"
    )
    defaults = {"key_dtype": np.int64, "trainable": True, "validate_shape": True}
    assert defaults.items() <= given.items()
    assert by_position(EmbeddingVariableOption) == {
        "ht_type": "",
        "ht_partition_num": 1000,
        "evict_option": None,
        "ckpt": None,
        "filter_option": None,
        "storage_option": StorageOption(),
        "init_option": InitializerOption(),
    }
    of_storage = "storage_type storage_path storage_size cache_strategy layout"
    assert " ".join(by_position(StorageOption)) == of_storage
    assert by_position(InitializerOption) == {
        "initializer": None,
        "default_value_dim": 4096,
        "default_value_no_permission": 0.0,
    }
    assert by_position(CBFFilter) == {
        "filter_freq": 0,
        "max_element_size": 0,
        "false_positive_probability": -1.0,
        "counter_type": np.uint64,
    }
    assert by_position(CounterFilter) == {"filter_freq": 0, "num_candidates": None}
    assert by_position(GlobalStepEvict) == {"steps_to_live": None}
    assert by_position(L2WeightEvict) == {"l2_weight_threshold": -1.0}


def test_what_the_other_arguments_become():
    layout = MeshLayout(mesh=jax.make_mesh((2,), ("model",)))
    for key_dtype in (np.int64, np.int32, jnp.int32, str, "string"):
        var = get_embedding_variable("v", 4, key_dtype, jnp.bfloat16, ones, capacity=8)
    assert (var.name, var.config.capacity, var.features) == ("v", 8, 4)
    assert var.table.dtype == jnp.bfloat16
    assert get_embedding_variable("v", 4, value_dtype=float, capacity=8).table.dtype == jnp.float32
    split = get_embedding_variable("v", 4, partitioner=layout, capacity=8)
    assert split.config.layout is layout
    for storage in (StorageType.DRAM, StorageType.HBM):
        _variable(storage_option=StorageOption(storage))


def test_a_variable_that_is_not_trainable_has_no_parameters():
    refused = EmbedConfig(KeyDigits(6, num_tables=2), 4, "project")
    var = get_embedding_variable("v", 4, trainable=False, capacity=8, refused=refused)
    assert not jax.tree.leaves(nnx.state(var, nnx.Param))
    assert _look_up(var, _assigned(var, [1, 2], 0)).shape == (2, 4)


def test_max_norm():
    var = _variable()
    found = _assigned(var, [1], 0)
    np.testing.assert_allclose(embedding_lookup(var, found, max_norm=0.5), [[0.125**0.5] * 2])


def test_dynamic_dimension():
    """Block i is read for keys with a block number of at least i + 1, and the rest is zeros."""
    var = get_dynamic_dimension_embedding_variable("v", 2, 3, initializer=ones, capacity=(9, 5, 2))
    assert [block.config.capacity for block in var.blocks] == [9, 5, 2]
    keys, blocknums = Keys.of([[7, 8], [9, 7]]), np.array([[3, 0], [1, 3]])
    assign = nnx.jit(lambda var, keys, blocknums: var.assign(keys, blocknums, 0))
    vectors = embedding_lookup(var, assign(var, keys, blocknums))
    wanted = np.repeat(np.arange(3) < blocknums[..., None], 2, axis=-1)
    np.testing.assert_array_equal(vectors, wanted)
    assert [int(block.num_keys) for block in var.blocks] == [2, 1, 1]
    look_up = nnx.jit(lambda var, keys, blocknums: embedding_lookup(var, keys, blocknums=blocknums))
    found = look_up(var, keys, np.full((2, 2), 2))
    np.testing.assert_array_equal(found[0], [[1, 1, 1, 1, 0, 0], [0] * 6])  # 8 has no rows
    with pytest.raises(ValueError, match="blocknums must be given for the keys of a variable"):
        embedding_lookup(var, keys)
    with pytest.raises(ValueError, match="blocknums must be given for the keys of a variable"):
        embedding_lookup(_variable(), keys, blocknums=blocknums)
    with pytest.raises(ValueError, match="capacity must be a number, or one for each of 3"):
        get_dynamic_dimension_embedding_variable("v", 2, 3, capacity=(9, 5))


def test_dynamic_dimension_trains_only_the_blocks_that_are_read():
    var = get_dynamic_dimension_embedding_variable("v", 2, 2, initializer=ones, capacity=4)
    optimizer = qrhash.nnx.Optimizer(var, optax.sgd(0.5))

    @nnx.jit
    def step(var, optimizer, keys, blocknums):
        found = var.assign(keys, blocknums, 0)
        for block, of_block in zip(var.blocks, found, strict=True):
            optimizer.reset_rows(var, block, of_block)
        grads = qrhash.nnx.grad(lambda var: embedding_lookup(var, found).sum())(var)
        optimizer.update(var, grads)
        return found

    found = step(var, optimizer, Keys.of([7, 8]), np.array([2, 1]))
    wanted = [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0, 0]]
    np.testing.assert_array_equal(embedding_lookup(var, found), wanted)


_GIVEN = {"name": "v", "embedding_dim": 4, "capacity": 8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"regularizer": ones}, "regularizer=.* has no meaning here: rows are trained as they"),
        ({"constraint": ones}, "constraint=.* has no meaning here"),
        ({"collections": ["a"]}, "collections=.* no graph collections"),
        ({"caching_device": "/cpu:0"}, "caching_device=.* use partitioner"),
        ({"validate_shape": False}, "validate_shape=False has no meaning"),
        ({"custom_getter": ones}, "custom_getter=.* use initializer"),
        ({"init_data_source": "x"}, r"init_data_source=.* qrhash\.checkpoint"),
        ({"name": 5}, "name must be a string"),
        ({"trainable": None}, "trainable must be True or False"),
        ({"partitioner": 4}, r"partitioner must be a qrhash\.MeshLayout"),
        ({"ev_option": 4}, "ev_option must be an EmbeddingVariableOption"),
        ({"key_dtype": np.float32}, "key_dtype must be int64, int32 or str"),
        ({"key_dtype": "words"}, "key_dtype must be int64, int32 or str"),
        ({"capacity": 0}, "capacity must be"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_embedding_variable(**(_GIVEN | arguments))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmbeddingVariableOption(ht_type="dense_hash_map"), "ht_type=.* no meaning"),
        (lambda: EmbeddingVariableOption(ht_partition_num=4), "ht_partition_num=4 has no"),
        (lambda: EmbeddingVariableOption(ckpt="x"), r"ckpt=.* qrhash\.checkpoint restores"),
        (
            lambda: EmbeddingVariableOption(evict_option=(GlobalStepEvict(4), L2WeightEvict(1.0))),
            "evict_option must be one GlobalStepEvict or L2WeightEvict or None",
        ),
        (lambda: EmbeddingVariableOption(filter_option=5), "filter_option must be one Counter"),
        (lambda: EmbeddingVariableOption(storage_option=None), "storage_option must be one Stor"),
        (lambda: EmbeddingVariableOption(init_option=None), "init_option must be one Initializer"),
        (lambda: StorageOption("DRAM"), "storage_type must be a StorageType or None"),
        (lambda: StorageOption(storage_path="/tmp"), "storage_path=.* no rows are kept in files"),
        (lambda: StorageOption(storage_size=[2**30]), "storage_size=.* the capacity, in rows"),
        (lambda: StorageOption(cache_strategy="LRU"), "cache_strategy=.* used longest ago"),
        (lambda: StorageOption(layout="x"), "layout=.* has no meaning"),
        (lambda: InitializerOption(default_value_dim=5), "default_value_dim=5 has no meaning"),
        (lambda: CounterFilter(-1), "filter_freq must be an integer of at least 0"),
        (lambda: CBFFilter(-1), "filter_freq must be an integer of at least 0"),
        (lambda: CBFFilter(2, 100), "must be given together"),
        (lambda: CBFFilter(2, 0, 0.01), "must be given together"),
        (lambda: CBFFilter(300, 100, 0.01, np.uint8), "counter_type must be an unsigned integer"),
        (lambda: CBFFilter(3, 100, 0.01, np.int32), "counter_type must be an unsigned integer"),
        (lambda: _variable(filter_option=CBFFilter(3, 9, 1.5)), "false_rate must be a number"),
        (lambda: _variable(evict_option=L2WeightEvict(-2.0)), "threshold must be a number above"),
        (lambda: _variable(init_option=InitializerOption(ones)), "initializer must be given once"),
        (lambda: embedding_lookup(3, [1]), "params must be what get_multihash_variable or get_em"),
    ],
)
def test_options_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
