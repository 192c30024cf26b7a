"""Checkpoints: exact on any mesh, strict about the model, safe from damage and from kills."""

import enum
import functools
import gc
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import qrhash
from qrhash import EmbedConfig, ShardedTable, checkpoint
from qrhash.checkpoint import Checkpoints, MismatchError
from qrhash.nnx import EmbedCollection, Optimizer, Table, as_table
from qrhash.protocol import is_table
from support import training_process
from support.meshes import BOTH, make_layout

UNCHECKED_KEYS = True

IN, OF = "in the checkpoint", "in the model"


LAYOUTS = {
    "one device": None,
    "8 model": make_layout((8,), ("model",)),
    "2x4": make_layout((2, 4), BOTH),
    "8 data, all rows": make_layout((8,), ("data",), row_axes=()),
    "both": make_layout((2, 4), BOTH, row_axes=BOTH, batch_axes=BOTH),
    "columns": make_layout((2, 2, 2), (*BOTH, "c"), column_axis="c"),
    "explicit": make_layout((2, 4), BOTH, AxisType.Explicit),
}

NUM_IDS = 1003
# Row counts that no mesh divides; of 5 rows, not every shard has one; 3 rows are not split.
PARTITION = qrhash.MixedRadix(NUM_IDS, (67, 5, 3))
ONE = EmbedConfig(PARTITION, 8, large_table_rows=5)


@functools.cache
def _config(name):
    return EmbedConfig(PARTITION, 8, large_table_rows=5, layout=LAYOUTS[name])


def _like(name):
    """Tables, state of both kinds, and a counter, where they belong."""
    cfg = _config(name)
    tables = tuple(
        jnp.zeros(shape) if layout is None else ShardedTable.from_array(jnp.zeros(shape), layout)
        for shape, layout in zip(cfg.table_shapes, map(cfg.table_layout, range(3)), strict=True)
    )
    full, row_wise = optax.adagrad(0.1), qrhash.rowwise_adagrad(0.1)
    return {
        "params": tables,
        "full": qrhash.touched_rows(full).init(tables),
        "row-wise": qrhash.touched_rows(row_wise).init(tables),
        "steps": jnp.int32(0),
    }


def _filled(tree):
    """With random numbers in place of all others."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: (100 * rng.standard_normal(x.shape)).astype(x.dtype), tree)


def _laid_out(rows, like):
    """Rows [num_rows, ...] in the place of a leaf."""
    if not is_table(like):
        return jax.device_put(rows, like.sharding)
    shards, per_shard, *rest = like.array.shape
    array = np.full((shards, per_shard, *rest), np.nan, rows.dtype)  # where no row is
    for r, row in enumerate(rows):
        array[r % shards, r // shards] = row
    return like.with_array(jax.device_put(array, like.array.sharding))


def _rows(leaf):
    """The rows of a leaf as NumPy has them."""
    if not is_table(leaf):
        return np.asarray(leaf)
    array, shards = np.asarray(leaf.array), leaf.array.shape[0]
    return np.stack([array[r % shards, r // shards] for r in range(leaf.num_rows)])


def _assert_same(got, want, like):
    """The numbers to the last bit; and that they are where they belong."""
    assert jax.tree.structure(got) == jax.tree.structure(like)

    def check(leaf, numbers, model):
        assert (leaf.shape, leaf.dtype) == (numbers.shape, numbers.dtype)
        assert _rows(leaf).tobytes() == numbers.tobytes()
        for array, place in zip(jax.tree.leaves(leaf), jax.tree.leaves(model), strict=True):
            assert array.sharding.is_equivalent_to(place.sharding, array.ndim)

    jax.tree.map(check, got, want, like, is_leaf=is_table)


# --- from any mesh to any other -------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole():
    return _filled(_like("one device"))


@pytest.fixture(scope="module")
def likes():
    return {name: _like(name) for name in LAYOUTS}


@pytest.mark.parametrize("source", LAYOUTS)
def test_what_one_mesh_wrote_every_other_reads(source, whole, likes, tmp_path):
    state = jax.tree.map(_laid_out, whole, likes[source], is_leaf=is_table)
    with Checkpoints(tmp_path, _config(source)) as checkpoints:
        checkpoints.save(7, state, {"from": source})
    for target in LAYOUTS:
        with Checkpoints(tmp_path, _config(target)) as checkpoints:
            restored = checkpoints.restore(likes[target])
        assert restored[0] == 7
        assert restored[2:] == ({"from": source}, ())
        _assert_same(restored.state, whole, likes[target])


def test_what_is_to_be_may_stand_in_place_of_arrays(whole, likes, tmp_path):
    abstract = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding),
        likes["columns"],
    )
    with Checkpoints(tmp_path, ONE) as checkpoints:
        checkpoints.save(1, whole)
        _assert_same(checkpoints.restore(abstract).state, whole, likes["columns"])


def _collection(name, seed):
    """A collection with a table of bfloat16 and a projection, and its optimizer."""
    layout = LAYOUTS[name]
    options = {"large_table_rows": 5, "layout": layout}
    partition = qrhash.QuotientRemainder(41, 5)
    half = EmbedConfig(partition, 4, "project", param_dtype=jnp.bfloat16, **options)
    config = {"user": EmbedConfig(PARTITION, 8, **options), "author": "user", "item": half}
    model = EmbedCollection(config, rngs=nnx.Rngs(seed))
    return model, Optimizer(model, qrhash.rowwise_adagrad(0.1))


def _in_rows(state):
    """Path -> numbers, row by row, of a state."""
    return {path: _rows(as_table(leaf)) for path, leaf in nnx.to_flat_state(state)}


def test_states_of_nnx_go_from_mesh_to_mesh(tmp_path):
    model, optimizer = _collection("one device", 1)
    state = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    state = _filled(state)
    nnx.update(model, state["model"])
    want = {part: _in_rows(each) for part, each in state.items()}
    ids = {"author": jnp.arange(8), "item": jnp.arange(8)}
    vectors = model(ids)
    for number, name in enumerate(["2x4", "one device"]):
        with Checkpoints(tmp_path / str(number), model.config) as checkpoints:
            checkpoints.save(number, state)
        model, optimizer = _collection(name, 2)
        like = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
        with Checkpoints(tmp_path / str(number), model.config) as checkpoints:
            state = checkpoints.restore(like).state
        assert jax.tree.structure(state) == jax.tree.structure(like)
        for part, each in state.items():
            jax.tree.map(np.testing.assert_array_equal, _in_rows(each), want[part])
        for got, place in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
            assert got.sharding.is_equivalent_to(place.sharding, got.ndim)
        tables = nnx.to_flat_state(state["model"].filter(Table))
        assert sorted(as_table(table).ndim for _, table in tables) == [2] * len(tables)
    nnx.update(model, state["model"])
    nnx.update(optimizer, state["optimizer"])
    jax.tree.map(np.testing.assert_array_equal, model(ids), vectors)
    assert optimizer.step[...] == want["optimizer"][("step",)]


@pytest.mark.parametrize("name", ["one device", "8 model", "2x4"])
def test_what_could_be_computed_before_can_be_after(name, tmp_path):
    """Also with parameters that stand on no device in particular, as new ones do."""
    cfg, ids = _config(name), jnp.arange(8)
    params = {"tables": qrhash.init(jax.random.key(0), cfg), "dense": jnp.arange(8.0)}
    compute = jax.jit(lambda params: qrhash.lookup(params["tables"], ids, cfg) @ params["dense"])
    want = compute(params)
    with Checkpoints(tmp_path, cfg) as checkpoints:
        checkpoints.save(1, params)
        restored = checkpoints.restore(params).state
    np.testing.assert_array_equal(compute(restored), want)


# --- what is kept ---------------------------------------------------------------------------------


NOISE = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)


def _numbers(step):
    return {"a.b": jnp.array(NOISE * step), "c/d": (jnp.ones(3) * step,), "steps": np.int32(step)}


def _assert_is_step(state, step):
    jax.tree.map(np.testing.assert_array_equal, state, _numbers(step))


@pytest.mark.parametrize(
    ("max_to_keep", "left"), [(1, [40]), (2, [30, 40]), (3, [4, 30, 40]), (None, [0, 4, 30, 40])]
)
def test_the_last_ones_are_kept(max_to_keep, left, tmp_path):
    with Checkpoints(tmp_path, ONE, max_to_keep=max_to_keep) as checkpoints:
        for step in (0, 4, 30, 40):
            checkpoints.save(step, _numbers(step), step)
        checkpoints.wait()
        assert checkpoints.steps == left
    with Checkpoints(tmp_path, ONE) as checkpoints:
        assert checkpoints.steps == left
        for step in left:
            restored = checkpoints.restore(_numbers(1), step)
            assert restored[0] == restored.extra == step
            _assert_is_step(restored.state, step)
        assert checkpoints.restore(_numbers(1)).step == 40


@pytest.mark.parametrize("waits", [False, True])
def test_the_same_step_twice_is_the_first(waits, tmp_path):
    with Checkpoints(tmp_path, ONE) as checkpoints:
        for number in (5, 6, 7):
            checkpoints.save(5, _numbers(number), number)
            if waits:
                checkpoints.wait()
        restored = checkpoints.restore(_numbers(0))
        assert (checkpoints.steps, restored.step, restored.extra) == ([5], 5, 5)
        _assert_is_step(restored.state, 5)
    with Checkpoints(tmp_path, ONE) as checkpoints:
        checkpoints.save(5, _numbers(8))
        _assert_is_step(checkpoints.restore(_numbers(0)).state, 5)


def test_training_on_from_an_earlier_step_needs_a_directory_of_its_own(tmp_path):
    with Checkpoints(tmp_path, ONE) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, _numbers(step))
        assert checkpoints.restore(_numbers(0), 20).step == 20
        for step in (20, 25):
            sentence = rf"above the last one saved in {tmp_path}, 30, got {step}: use another"
            with pytest.raises(ValueError, match=sentence):
                checkpoints.save(step, _numbers(step))
        assert checkpoints.steps == [10, 20, 30]


@pytest.mark.parametrize("max_to_keep", [0, -1, 1.5, True])
def test_so_many_cannot_be_kept(max_to_keep, tmp_path):
    with pytest.raises(ValueError, match=f"max_to_keep must be .*, got {max_to_keep}"):
        Checkpoints(tmp_path / "new", ONE, max_to_keep=max_to_keep)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("step", [-1, 2.5])
def test_a_step_is_a_number_from_0_on(step, tmp_path):
    with (
        Checkpoints(tmp_path, ONE) as checkpoints,
        pytest.raises(ValueError, match=f"step must be an integer of at least 0, got {step}"),
    ):
        checkpoints.save(step, _numbers(1))


EXTRAS = [
    None,
    0.1,
    "é",
    [],
    {"epoch": 1, "position": {"blocks": [3, None, True, "x", 1e-300]}, "clicks": 1 / 3},
    [2**53 + 1, -(2**70), 10**30, 5e-324, float("inf")],
]


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_is_saved_beside_it_comes_back(extra, tmp_path):
    with Checkpoints(tmp_path, ONE) as checkpoints:
        checkpoints.save(1, _numbers(1), extra)
        assert checkpoints.restore(_numbers(1)).extra == extra


CIRCULAR = []
CIRCULAR.append(CIRCULAR)


NOT_JSON = [
    {1, 2},
    {"a": np.int64(1)},
    {("a", "b"): 1},
    CIRCULAR,
    {1: "a", "1": "b"},
    [{"a": {2: 3}}],
]


@pytest.mark.parametrize("extra", NOT_JSON)
def test_what_json_cannot_hold_is_refused(extra, tmp_path):
    with Checkpoints(tmp_path, ONE) as checkpoints:
        with pytest.raises(ValueError, match="extra must be what JSON can hold"):
            checkpoints.save(1, _numbers(1), extra)
        checkpoints.wait()
        assert (checkpoints.steps, list(tmp_path.iterdir())) == ([], [])


def test_what_is_saved_may_be_changed_at_once(tmp_path):
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    host, device = np.zeros((512, 1024), np.float32), jnp.zeros((512, 1024))
    with Checkpoints(tmp_path, ONE, max_to_keep=None) as checkpoints:
        for step in range(5):
            checkpoints.save(step, {"host": host, "device": device})
            device = add_one(device)
            host += 1
        for step in range(5):
            restored = checkpoints.restore({"host": host, "device": device}, step)
            assert all((array == step).all() for array in restored.state.values())


def test_it_is_complete_when_an_error_ends_the_block(tmp_path):
    def interrupted():
        with Checkpoints(tmp_path, ONE) as checkpoints:
            checkpoints.save(3, _numbers(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with Checkpoints(tmp_path, ONE) as checkpoints:
        _assert_is_step(checkpoints.restore(_numbers(0)).state, 3)


def test_leaves_of_one_name_are_refused(tmp_path):
    state = {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}
    with Checkpoints(tmp_path, ONE) as checkpoints, pytest.raises(ValueError, match="names"):
        checkpoints.save(1, state)


# --- numbers that JAX has no room for -------------------------------------------------------------


class Level(enum.IntEnum):
    HIGH = 2**40 + 1


HOST_NUMBERS = [
    3_000_000_000,
    -(2**63),
    2**64 - 1,
    True,
    1 / 3,
    1j / 3,
    Level.HIGH,
    np.int64(2**53 + 1),
    np.uint64(2**63 + 5),
    np.float64(1e300),
    np.complex128(1 / 3 + 1e-300j),
    np.bool_(True),
    np.float32(0.1),
    np.array(-(2**62) - 1),
    np.array([[2**63 - 1, -(2**63)]]),
    np.array([2**64 - 1, 2**63], np.uint64),
    np.array([1 / 3, -0.0, 5e-324, -np.inf]),
    np.full(3, -0.0),
    np.array([1j / 3]),
    np.array([True, False]),
    np.arange(20)[::-3],
    np.asfortranarray(np.arange(2**40, 2**40 + 6).reshape(2, 3)),
    np.array([3, -3]).astype(jnp.int4),
    np.array([0.3, -3]).astype(jnp.bfloat16),
    np.array([0.3, -3]).astype(jnp.float8_e4m3fn),
    np.zeros((0, 3)),
    np.zeros(0, np.uint64),
]


def _assert_same_number(got, want):
    assert type(got) is type(want)
    assert np.asarray(got).dtype == np.asarray(want).dtype
    assert np.shape(got) == np.shape(want)
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_numbers_of_numpy_and_python_come_back_as_they_were(tmp_path):
    state = {"all": HOST_NUMBERS, "none": None, "jax": jnp.arange(3)}
    state["variables"] = [nnx.Variable(number) for number in HOST_NUMBERS]
    with Checkpoints(tmp_path, ONE) as checkpoints:
        checkpoints.save(1, state)
        restored = checkpoints.restore(state | {"all": _ones_like(HOST_NUMBERS)}).state
    for got, variable, want in zip(
        restored["all"], restored["variables"], HOST_NUMBERS, strict=True
    ):
        _assert_same_number(got, want)
        _assert_same_number(variable.get_value(), want)
    assert restored["none"] is None
    assert isinstance(restored["jax"], jax.Array)


def _ones_like(numbers):
    """Other numbers of the same types and shapes."""
    return [
        np.ones_like(number)
        if isinstance(number, np.ndarray)
        else number
        if isinstance(number, Level)
        else type(number)(1)
        for number in numbers
    ]


@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64", "complex128"])
def test_what_is_wider_than_jax_has_comes_back_in_numpy(dtype, tmp_path):
    wide = np.array([2**40 + 1, 3]).astype(dtype)
    with Checkpoints(tmp_path, ONE) as checkpoints:
        checkpoints.save(1, wide)
        got = checkpoints.restore(jax.ShapeDtypeStruct(wide.shape, dtype)).state
    _assert_same_number(got, wide)


def test_what_jax_has_in_64_bits_is_kept(tmp_path):
    """Saved with jax_enable_x64, restored with it as JAX has it, without it in NumPy."""
    with jax.enable_x64(True):
        wide = {"ints": jnp.array([2**40 + 1]), "floats": jnp.array(1 / 3), "count": 2**40}
        with Checkpoints(tmp_path, ONE) as checkpoints:
            checkpoints.save(1, wide)
            got = checkpoints.restore(jax.tree.map(lambda leaf: leaf * 0, wide)).state
        for name, leaf in wide.items():
            _assert_same_number(got[name], leaf)
    like = {name: np.zeros_like(leaf) for name, leaf in wide.items()}
    with Checkpoints(tmp_path, ONE) as checkpoints:
        got = checkpoints.restore(like).state
    for name, leaf in wide.items():
        _assert_same_number(got[name], np.asarray(leaf))


def test_keys_and_narrow_numbers_stay_on_devices(tmp_path):
    state = {
        "keys": jax.random.split(jax.random.key(3), 2),
        "int4": jnp.array([3, -3], jnp.int4),
        "bfloat16": jnp.array([0.3], jnp.bfloat16),
        "empty": jnp.zeros((0, 2)),
    }
    with Checkpoints(tmp_path, ONE) as checkpoints:
        checkpoints.save(1, state)
        got = checkpoints.restore(state).state
    keys, wanted = got.pop("keys"), state.pop("keys")
    assert (jax.random.key_data(keys) == jax.random.key_data(wanted)).all()
    jax.tree.map(_assert_same_number, got, state)


def test_arrays_without_elements_alone(tmp_path):
    state = {"a": np.zeros((2, 0)), "b": jnp.zeros(0)}
    with Checkpoints(tmp_path, ONE) as checkpoints:
        checkpoints.save(1, state)
        jax.tree.map(_assert_same_number, checkpoints.restore(state).state, state)
        with pytest.raises(MismatchError, match=rf"'a' is \[2, 0\] {IN}, \[3, 0\] {OF}"):
            checkpoints.restore(state | {"a": np.zeros((3, 0))})


def _deleted():
    array = jnp.ones(3)
    array.delete()
    return array


NO_NUMBERS = {
    "text": ("adagrad", "leaf 'a' must be an array or a number .* got str .* goes into extra"),
    "bytes": (b"x", "leaf 'a' must be an array or a number"),
    "texts": (np.array(["x"]), "leaf 'a' must be an array or a number"),
    "dates": (np.array(["2020-01-01"], "datetime64[D]"), "got ndarray of dtype datetime64"),
    "function": (len, "leaf 'a' must be an array or a number"),
    "objects": (np.array([1, None]), "got ndarray of dtype object"),
    "masked": (np.ma.masked_array([1, 2], [True, False]), "got MaskedArray"),
    "too wide": (np.zeros(1, np.longdouble), "got ndarray of dtype float128"),
    "uint4": (jnp.zeros(1, jnp.uint4), "of dtype uint4"),
    "65 bits": (2**64, "number 'a' must have at most 64 bits, got 18446744073709551616"),
    "-65 bits": (-(2**63) - 1, "number 'a' must have at most 64 bits, got -9223372036854775809"),
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_number_is_refused_before_and_not_called_damage(name, tmp_path):
    if name == "too wide" and np.dtype(np.longdouble).itemsize == 8:
        pytest.skip("no wider floats here")
    leaf, message = NO_NUMBERS[name]
    with Checkpoints(tmp_path, ONE) as checkpoints:
        for leaf_of in (lambda leaf: leaf, nnx.Variable):
            with pytest.raises(ValueError, match=message):
                checkpoints.save(1, {"a": leaf_of(leaf), "b": 1})
        assert list(tmp_path.iterdir()) == []
        checkpoints.save(1, {"a": 1, "b": 1})
        with pytest.raises(ValueError, match=message):
            checkpoints.restore({"a": leaf, "b": 1})
        assert checkpoints.restore({"a": 0, "b": 0}).damaged == ()


WITHOUT_NUMBERS = {
    "donated": (_deleted, "array 'a' was donated or deleted"),
    "a shape": (lambda: jax.ShapeDtypeStruct((2,), "float32"), "array 'a' is the shape of one"),
}


@pytest.mark.parametrize("name", WITHOUT_NUMBERS)
def test_an_array_without_numbers_is_not_saved(name, tmp_path):
    make, message = WITHOUT_NUMBERS[name]
    with Checkpoints(tmp_path, ONE) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.save(1, {"a": make()})


def test_nothing_is_saved_under_jit(tmp_path):
    with Checkpoints(tmp_path, ONE) as checkpoints:
        traced = jax.jit(lambda x: checkpoints.save(1, {"a": x}))
        with pytest.raises(ValueError, match=r"array 'a' is being traced: .* outside jax.jit"):
            traced(jnp.ones(1))


# --- saves that fail, and programs that end -------------------------------------------------------


def _wait_for_threads(number):
    """Threads that were told to end take a moment."""
    deadline = time.monotonic() + 20
    while threading.active_count() > number and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= number


@pytest.mark.parametrize("state", [{}, [], None, {"a": None}, ({}, [])])
def test_a_tree_of_nothing_is_refused(state, tmp_path):
    threads = threading.active_count()
    with Checkpoints(tmp_path, ONE) as checkpoints:
        with pytest.raises(ValueError, match="state must hold arrays or numbers, got"):
            checkpoints.save(1, state)
        assert checkpoints.steps == []
        checkpoints.save(1, _numbers(1))
    _wait_for_threads(threads)


def test_a_directory_that_cannot_be_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=f"{path} cannot be written: (File exists|Not a dir)"):
            Checkpoints(path, ONE)
    assert (tmp_path / "file").read_text() == "x"


def test_a_save_that_fails_says_so_and_the_next_one_can_do(tmp_path):
    threads = threading.active_count()
    with Checkpoints(tmp_path / "run", ONE) as checkpoints:
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").write_text("in the way")
        with pytest.raises(OSError, match=f"{tmp_path / 'run'} cannot be written: "):
            checkpoints.save(1, _numbers(1))
        (tmp_path / "run").unlink()
        (tmp_path / "run").mkdir()
        checkpoints.save(1, _numbers(1))
        assert checkpoints.restore(_numbers(0)).step == 1
    _wait_for_threads(threads)


def test_what_is_closed_stays_closed(tmp_path):
    checkpoints = Checkpoints(tmp_path, ONE)
    checkpoints.save(1, _numbers(1))
    checkpoints.close()
    checkpoints.close()
    for call in (
        lambda: checkpoints.save(2, _numbers(2)),
        lambda: checkpoints.restore(_numbers(0)),
    ):
        with pytest.raises(ValueError, match=f"Checkpoints of {tmp_path} are closed"):
            call()


PROGRAM = """
import sys
import numpy as np
import qrhash
from qrhash.checkpoint import Checkpoints

state = {"a": np.random.default_rng(0).random((300, 300))}
config = qrhash.EmbedConfig(qrhash.FullTable(64), 16)
checkpoints = Checkpoints(sys.argv[1], config)
"""
ENDINGS = {
    "no close": ("checkpoints.save(1, state)", 0),
    "garbage": ("checkpoints.save(1, state); del checkpoints; import gc; gc.collect()", 0),
    "an error": ("checkpoints.save(1, state); 1 / 0", 1),
    "sys.exit": ("checkpoints.save(1, state); sys.exit(3)", 3),
    "two directories": (
        "Checkpoints(sys.argv[1] + '/other', config).save(1, state); checkpoints.save(1, state)",
        0,
    ),
    "a failed save first": (
        "try: checkpoints.save(1, {})\nexcept ValueError: checkpoints.save(1, state)",
        0,
    ),
}


def _run_program(ending, directory):
    command = [sys.executable, "-c", PROGRAM + ending, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ENDINGS)
def test_a_program_ends_when_its_checkpoints_are_written(name, tmp_path):
    ending, code = ENDINGS[name]
    done = _run_program(ending, tmp_path)
    assert done.returncode == code, done.stderr
    wanted = np.random.default_rng(0).random((300, 300))
    for directory in [tmp_path, *tmp_path.glob("other")]:
        assert not _half_written(directory)
        with Checkpoints(directory, EmbedConfig(qrhash.FullTable(64), 16)) as checkpoints:
            restored = checkpoints.restore({"a": wanted * 0})
        assert (restored.step, restored.damaged) == (1, ())
        np.testing.assert_array_equal(restored.state["a"], wanted)


FAILING = {
    "a file in the way": """
import pathlib, shutil
shutil.rmtree(sys.argv[1])
pathlib.Path(sys.argv[1]).write_text("in the way")
checkpoints.save(1, state)
""",
    "no space": """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, -1))
checkpoints.save(1, state)
""",
    "an empty tree": "checkpoints.save(1, {})",
}


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes")
@pytest.mark.parametrize("name", FAILING)
def test_a_program_whose_checkpoints_are_not_written_fails_soon(name, tmp_path):
    done = _run_program(FAILING[name], tmp_path / "run")
    assert done.returncode == 1
    words = (
        "state must hold" if name == "an empty tree" else f"{tmp_path / 'run'} cannot be written"
    )
    assert words in done.stderr


# --- another model --------------------------------------------------------------------------------


def _feature(collisions=3, features=8, operation="mult", **options):
    partition = qrhash.QuotientRemainder(NUM_IDS, collisions)
    return EmbedConfig(partition, features, operation, **options)


SAVED = {"a": _feature(), "b": "a"}
OTHERS = {
    "partition": ({"a": _feature(4), "b": "a"}, rf"'a' is .*1003.*3.* {IN}, .*1003.*4.* {OF}"),
    "operation": (
        {"a": _feature(operation="add"), "b": "a"},
        rf"operation of feature 'a' is mult {IN}, add {OF}",
    ),
    "features": (
        {"a": _feature(features=4), "b": "a"},
        rf"features of feature 'a' is 8 {IN}, 4 {OF}",
    ),
    "dtype": (
        {"a": _feature(param_dtype=jnp.bfloat16), "b": "a"},
        rf"param_dtype of feature 'a' is float32 {IN}, bfloat16 {OF}",
    ),
    "one feature more": (SAVED | {"c": _feature()}, "feature 'c' is in the model alone"),
    "one feature less": ({"a": _feature()}, "feature 'b' is in the checkpoint alone"),
    "another name": ({"x": _feature(), "b": "x"}, "feature 'a' is in the checkpoint alone"),
    "not shared": (SAVED | {"b": _feature()}, rf"feature 'b' is a {IN}, .*1003.* {OF}"),
    "not a collection": (_feature(), "feature 'a' is in the checkpoint alone"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory, SAVED) as checkpoints:
        checkpoints.save(1, _numbers(1))
        checkpoints.save(2, _numbers(2))
    return directory


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_other_features_is_refused(name, saved):
    config, message = OTHERS[name]
    with (
        Checkpoints(saved, config) as checkpoints,
        pytest.raises(MismatchError, match=message) as error,
    ):
        checkpoints.restore(_numbers(0))
    assert str(saved / "2") in str(error.value)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("config", [None, "a", (("a", ONE),)])
def test_what_describes_no_model_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match=r"config must be an EmbedConfig, .*, got "):
        Checkpoints(tmp_path / "new", config)
    assert not (tmp_path / "new").exists()


FIELDS = ("partition", "operation", "features", "widths", "use_bias", "param_dtype")


@pytest.mark.parametrize(
    ("in_file", "in_model", "sides"),
    [
        (FIELDS, FIELDS[:-1], f"float32 {IN}, None {OF}"),
        (FIELDS[:-1], FIELDS, f"None {IN}, float32 {OF}"),
    ],
)
def test_a_checkpoint_of_other_fields_is_refused(in_file, in_model, sides, tmp_path, monkeypatch):
    """As another version of this library may write it."""
    monkeypatch.setattr(checkpoint.metadata, "_FIELDS", in_file)
    with Checkpoints(tmp_path, SAVED) as checkpoints:
        checkpoints.save(1, _numbers(1))
    monkeypatch.setattr(checkpoint.metadata, "_FIELDS", in_model)
    with (
        Checkpoints(tmp_path, SAVED) as checkpoints,
        pytest.raises(MismatchError, match=rf"param_dtype of feature 'a' is {sides}"),
    ):
        checkpoints.restore(_numbers(0))


OTHER_TREES = {
    "shape": ({"a.b": jnp.ones((64, 17))}, rf"'a\.b' is \[64, 16\] {IN}, \[64, 17\] {OF}"),
    "dtype": ({"steps": np.int8(0)}, rf"'steps' is int32 {IN}, int8 {OF}"),
    "one array more": ({"e": jnp.ones(1)}, "array 'e' is in the model alone"),
    "one array less": ({"c/d": ()}, r"array 'c/d\.0' is in the checkpoint alone"),
}


@pytest.mark.parametrize("name", OTHER_TREES)
def test_a_checkpoint_of_other_arrays_is_refused(name, saved):
    change, message = OTHER_TREES[name]
    with (
        Checkpoints(saved, SAVED) as checkpoints,
        pytest.raises(MismatchError, match=message),
    ):
        checkpoints.restore(_numbers(0) | change)


def test_rows_are_compared_not_what_pads_them(tmp_path):
    """67 rows and 68 are nine on every of eight devices."""
    layout = LAYOUTS["8 model"]
    tables = [{"t": ShardedTable.from_array(jnp.ones((rows, 8)), layout)} for rows in (67, 68)]
    with Checkpoints(tmp_path, ONE) as checkpoints:
        checkpoints.save(1, tables[0])
        with pytest.raises(MismatchError, match=rf"\[67, 8\] {IN}, \[68, 8\] {OF}"):
            checkpoints.restore(tables[1])


def test_what_changes_no_number_may_differ(saved):
    other = _feature(
        dtype=jnp.bfloat16, id_policy="zero", large_table_rows=7, layout=LAYOUTS["2x4"]
    )
    with Checkpoints(saved, {"b": "a", "a": other}) as checkpoints:
        _assert_is_step(checkpoints.restore(_numbers(0)).state, 2)


def test_no_checkpoint_is_said_in_a_sentence(saved, tmp_path):
    with Checkpoints(tmp_path / "new", ONE) as checkpoints:
        assert checkpoints.steps == []
        with pytest.raises(MismatchError, match="new holds no complete checkpoint"):
            checkpoints.restore(_numbers(0))
    with (
        Checkpoints(saved, SAVED) as checkpoints,
        pytest.raises(MismatchError, match=r"no checkpoint of step 7; .* steps \[1, 2\]"),
    ):
        checkpoints.restore(_numbers(0), 7)


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture
def broken_off():
    """Orbax leaves behind the coroutines of what failed: they are to end here."""
    yield
    gc.collect()


def damaging(test):
    test = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")(test)
    return pytest.mark.usefixtures("broken_off")(test)


def _files(directory):
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# The array or the file, and no dump of what TensorStore knows of it.
REASON = r"(array '[\w.]+' cannot be read: [^{<]*|File [^{<]* not found|\S* is no whole JSON)\."

DAMAGES = {"delete": os.unlink, "truncate": _truncate, "empty": lambda path: path.write_bytes(b"")}


@damaging
@pytest.mark.parametrize("how", DAMAGES)
def test_whatever_file_is_damaged_the_numbers_are_right(how, saved, tmp_path):
    """Those of the damaged checkpoint, if it can do without the file, or of the one before."""
    fallen_back = set()
    for number, path in enumerate(_files(saved / "2")):
        directory = tmp_path / str(number)
        shutil.copytree(saved, directory)
        DAMAGES[how](directory / path.relative_to(saved))
        with Checkpoints(directory, SAVED) as checkpoints:
            restored = checkpoints.restore(_numbers(0))
        _assert_is_step(restored.state, restored.step)
        if restored.step == 2:
            assert restored.damaged == ()
        else:
            fallen_back.add(path)
            (sentence,) = restored.damaged
            assert re.fullmatch(f"Checkpoint {directory / '2'} is damaged: {REASON}", sentence)
    state = saved / "2" / "state"
    data = max(state.rglob("d/*"), key=lambda path: path.stat().st_size)
    assert data.stat().st_size > NOISE.nbytes / 2
    needed = {data, *state.glob("d/*"), state / "manifest.ocdbt", saved / "2/metadata/metadata"}
    assert needed <= fallen_back


@damaging
def test_where_all_are_damaged_all_are_named(saved, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    shutil.rmtree(directory / "1" / "state")
    (directory / "2" / "metadata" / "metadata").write_text("{")
    with Checkpoints(directory, SAVED) as checkpoints:
        with pytest.raises(OSError, match="damaged") as error:
            checkpoints.restore(_numbers(0))
        assert all(f"{directory / step} is damaged: " in str(error.value) for step in "12")
        with pytest.raises(OSError, match="damaged") as error:
            checkpoints.restore(_numbers(0), 2)
        assert str(directory / "1") not in str(error.value)


@damaging
def test_after_damage_training_is_saved_again(saved, tmp_path):
    """From step 1 on, the damaged step 2 comes once more, and so does a step below it."""
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    with Checkpoints(directory, SAVED) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, _numbers(step))
        checkpoints.wait()
        for step in (10, 20):
            shutil.rmtree(directory / str(step) / "state")
        assert checkpoints.restore(_numbers(0)).step == 2
        for step in (5, 10):
            checkpoints.save(step, _numbers(step))
            checkpoints.wait()
            restored = checkpoints.restore(_numbers(0))
            assert restored.step == step
            _assert_is_step(restored.state, step)


def _fails(error):
    def fail(*_, **__):
        raise error

    return fail


NO_DAMAGE = [
    MemoryError(),
    PermissionError(13, "Permission denied"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
]


@pytest.mark.parametrize("error", NO_DAMAGE, ids=lambda error: type(error).__name__)
def test_not_every_error_is_damage(error, saved, monkeypatch):
    with Checkpoints(saved, SAVED) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", _fails(error))
        with pytest.raises(type(error)):
            checkpoints.restore(_numbers(0))


def test_errors_of_the_caller_are_not_damage(saved, monkeypatch):
    with Checkpoints(saved, SAVED) as checkpoints:
        with pytest.raises(ValueError, match="names of their own"):
            checkpoints.restore({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})
        monkeypatch.setattr(checkpoint.checkpoints, "from_file", _fails(TypeError("of its own")))
        with pytest.raises(TypeError, match="of its own"):
            checkpoints.restore(_numbers(0))


@damaging
def test_several_processes_do_not_fall_back(saved, tmp_path, monkeypatch):
    """The others may be able to read what one cannot."""
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    # Orbax is not to see it: it would wait for a process that is not there.
    several = types.SimpleNamespace(**vars(jax) | {"process_count": lambda: 2})
    monkeypatch.setattr(checkpoint.checkpoints, "jax", several)
    with Checkpoints(directory, SAVED) as checkpoints:
        assert checkpoints.restore(_numbers(0)).step == 2
        shutil.rmtree(directory / "2" / "state")
        sentence = f"{directory / '2'} is damaged: .*; move it away, then the one before it is read"
        with pytest.raises(OSError, match=sentence):
            checkpoints.restore(_numbers(0))
    (directory / "2").rename(tmp_path / "2")
    with Checkpoints(directory, SAVED) as checkpoints:
        assert checkpoints.restore(_numbers(0)).step == 1


FULL_DISK = """
import resource, sys
import numpy as np
import qrhash
from qrhash.checkpoint import Checkpoints

state = {"a": np.random.default_rng(0).random((64, 16))}
config = qrhash.EmbedConfig(qrhash.FullTable(64), 16)
for how in ("wait", "close", "save"):
    checkpoints = Checkpoints(f"{sys.argv[1]}/{how}", config)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, -1))
    checkpoints.save(1, state)
    try:
        getattr(checkpoints, how)(*((2, state) if how == "save" else ()))
    except OSError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    print(checkpoints.steps)
    checkpoints.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes")
def test_what_cannot_be_written_is_an_error_of_the_system(tmp_path):
    """In a process of its own, in which no file can be larger than 3000 bytes."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    errors, steps = printed.splitlines()[::2], printed.splitlines()[1::2]
    assert steps == ["[]"] * 3
    for how, error in zip(("wait", "close", "save"), errors, strict=True):
        assert error.startswith(f"{tmp_path / how} cannot be written: ")


def test_what_was_left_half_written_is_no_checkpoint(saved, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    for name in ("3.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-1700000000"):
        shutil.copytree(saved / "2" / "state", directory / name / "state")
    with Checkpoints(directory, SAVED) as checkpoints:
        restored = checkpoints.restore(_numbers(0))
        assert (checkpoints.steps, restored.step, restored.damaged) == ([1, 2], 2, ())
        for step in (3, 4):
            checkpoints.save(step, _numbers(step))
    with Checkpoints(directory, SAVED) as checkpoints:
        restored = checkpoints.restore(_numbers(0))
        assert (restored.step, restored.damaged) == (4, ())
        _assert_is_step(restored.state, 4)


# --- kills ----------------------------------------------------------------------------------------


def _half_written(directory):
    """What Orbax has not finished: names, each with a time, for a name may come again."""
    paths = directory.glob("*.orbax-checkpoint-tmp*")
    return {(path.name, path.stat().st_mtime_ns) for path in paths}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the children are forks")
def test_twenty_kills_leave_complete_checkpoints(tmp_path):
    rng = random.Random(0)
    like, config = training_process.state_of(0), training_process.CONFIG
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(0, like, {"step": 0})
    known, interrupted, left = 0, 0, set()
    nursery = [sys.executable, training_process.__file__, str(tmp_path)]
    with subprocess.Popen(
        nursery, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        for _ in range(20):
            print(file=process.stdin, flush=True)
            child, start = map(int, process.stdout.readline().split())
            assert start == known
            time.sleep(rng.uniform(0, 0.4))
            os.kill(child, signal.SIGKILL)
            said = list(iter(process.stdout.readline, "ended\n"))
            complete = int(said[-1]) if said else start
            before, left = left, _half_written(tmp_path)
            interrupted += not left <= before
            with Checkpoints(tmp_path, config) as checkpoints:
                restored = checkpoints.restore(like)
            known = restored.step
            assert complete <= known <= complete + 1
            assert (restored.extra, restored.damaged) == ({"step": known}, ())
            assert all((array == known).all() for array in restored.state.values())
        process.stdin.close()
        assert process.wait(timeout=30) == 0
    print(f"{interrupted} of 20 kills left a save unfinished; {known} steps were saved")
    assert interrupted
    assert known > 0


def test_features_in_another_order_are_refused(tmp_path):
    one = qrhash.EmbedConfig(qrhash.QuotientRemainder(100, 4), 8)
    with Checkpoints(tmp_path, {"a": one, "b": one}) as checkpoints:
        checkpoints.save(1, {"x": np.ones(3)})
    with (
        Checkpoints(tmp_path, {"b": one, "a": one}) as checkpoints,
        pytest.raises(qrhash.checkpoint.MismatchError, match="order of its features"),
    ):
        checkpoints.restore({"x": np.ones(3)})
