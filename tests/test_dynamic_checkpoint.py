"""Checkpoints of tables that grow: index, rows and optimizer state are one consistent set."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import qrhash
from qrhash import EmbedConfig, KeyDigits, dynamic
from qrhash.checkpoint import Checkpoints, MismatchError
from qrhash.dynamic import AdmitAll, AdmitByChance, ExactCount, SketchCount, StepsSinceUse
from support import dynamic_training
from support.dynamic_training import Training, adam, config_of
from support.meshes import layout_2x4, make_layout

STANDARD_PROMOTION = True  # optax's Adam multiplies by a power of an integer
UNCHECKED_KEYS = True


def _assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _saved(training, directory):
    with Checkpoints(directory, training.config) as checkpoints:
        checkpoints.save(training.number, training.tree)


def _restored(config, directory, tx=None):
    training = Training(config, tx)
    with Checkpoints(directory, config) as checkpoints:
        restored = checkpoints.restore(training.tree)
    training.tree, training.number = restored.state, restored.step
    return training


ADMISSIONS = {
    "all": AdmitAll(),
    "exact": ExactCount(2, 30),
    "sketch": SketchCount(2, 400),
    "chance": AdmitByChance(0.5),
}


@pytest.mark.parametrize("admission", ADMISSIONS)
def test_training_goes_on_as_if_it_had_never_stopped(admission, tmp_path):
    config = config_of(30, admission=ADMISSIONS[admission], eviction=StepsSinceUse(2))
    training = Training(config, adam())
    training.steps(5)
    training.evict()
    _saved(training, tmp_path)
    restored = _restored(config, tmp_path, adam())
    _assert_same(restored.tree, training.tree)
    assert restored.of_keys() == training.of_keys()
    for each in (training, restored):
        each.steps(3)
        each.evict()
        each.step()
    _assert_same(restored.tree, training.tree)


def test_what_is_saved_is_of_one_moment(tmp_path):
    """The training goes on, in place, while it is written."""
    training = Training(config_of(30))
    training.steps(2)
    before = training.of_keys()
    with Checkpoints(tmp_path, training.config) as checkpoints:
        checkpoints.save(2, training.tree)
        training.steps(20)
    assert _restored(training.config, tmp_path).of_keys() == before


# --- other configs --------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_threshold_judges_candidates_and_no_key_that_has_a_row(tmp_path):
    keys = [1, 1, 1, 2, 2, 3]
    training = Training(config_of(10, admission=ExactCount(3, 20)))
    training.step(keys)
    assert list(training.keys) == [1]
    _saved(training, tmp_path)

    higher = _restored(config_of(10, admission=ExactCount(5, 20)), tmp_path)
    higher.step([1, 2, 2, 3])
    assert list(higher.keys) == [1]  # 2 was met four times
    higher.step([2])
    assert sorted(higher.keys) == [1, 2]

    lower = _restored(config_of(10, admission=ExactCount(2, 20)), tmp_path)
    assert list(lower.keys) == [1]
    lower.step([3])
    assert sorted(lower.keys) == [1, 3]


def test_another_threshold_of_a_sketch(tmp_path):
    training = Training(config_of(10, admission=SketchCount(3, 2000)))
    training.step([1, 1, 1, 2, 2, 3])
    _saved(training, tmp_path)
    higher = _restored(config_of(10, admission=SketchCount(5, 2000)), tmp_path)
    assert list(higher.keys) == [1]
    higher.step([2, 2, 3])
    assert list(higher.keys) == [1]
    higher.step([2])
    assert sorted(higher.keys) == [1, 2]


def test_what_gives_numbers_no_meaning_may_change(tmp_path):
    training = Training(config_of(10, eviction=StepsSinceUse(3)))
    training.steps(2)
    _saved(training, tmp_path)
    config = config_of(10, combiner="max", seed=3, large_table_rows=5)
    _assert_same(_restored(config, tmp_path).tree, training.tree)


OTHERS = {
    "capacity": (
        {"capacity": 20},
        "20 in the model: restore it with the capacity of the checkpoint, then call qrhash.dyn",
    ),
    "candidates": (
        {"admission": ExactCount(2, 9)},
        r"is ExactCount\(num_candidates=8\) in the checkpoint, ExactCount\(num_candidates=9\)",
    ),
    "kind": (
        {"admission": SketchCount(2, 9)},
        r"SketchCount\(num_counters=9, num_hashes=4\) in the model: restore it with that of the",
    ),
    "refused": (
        {"refused": EmbedConfig(KeyDigits(6, num_tables=2), 4, "mult")},
        "refused.operation of feature '' is add in the checkpoint, mult in the model",
    ),
    "seed": (
        {"refused": EmbedConfig(KeyDigits(6, num_tables=2, seed=1), 4, "add")},
        "refused.partition of feature",
    ),
    "no refused": ({"refused": None}, "is of another model: refused"),
    "dtype": ({"param_dtype": "bfloat16"}, "param_dtype of feature '' is float32 in the check"),
}


@pytest.fixture(scope="module")
def of_ten(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ten")
    config = config_of(10, admission=ExactCount(2, 8))
    tree = {"params": dynamic.init(jax.random.key(0), config), "state": dynamic.init_state(config)}
    with Checkpoints(directory, config) as checkpoints:
        checkpoints.save(1, tree)
    return directory, config


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_config_is_refused(other, of_ten):
    directory, config = of_ten
    change, message = OTHERS[other]
    if change.get("param_dtype"):
        change = change | {"refused": dataclasses.replace(config.refused, param_dtype="bfloat16")}
    config = dataclasses.replace(config, **change)
    tree = {"params": dynamic.init(jax.random.key(0), config), "state": dynamic.init_state(config)}
    with Checkpoints(directory, config) as checkpoints, pytest.raises(MismatchError, match=message):
        checkpoints.restore(tree)


def test_what_the_refusal_advises_works(tmp_path):
    training = Training(config_of(10, admission=ExactCount(2, 8)))
    training.step([1, 1, 2])
    _saved(training, tmp_path)
    restored = _restored(training.config, tmp_path)
    restored.grow(20)
    assert restored.of_keys() == training.of_keys()
    admission = SketchCount(3, 100)
    restored.state = dynamic.State(restored.state.index, admission.init())
    restored.config = dataclasses.replace(restored.config, admission=admission)
    restored.step([2, 2])
    assert list(restored.keys) == [1]
    restored.step([2])
    assert sorted(restored.keys) == [1, 2]


def test_several_tables_and_ordinary_ones_in_one_checkpoint(tmp_path):
    ordinary = EmbedConfig(qrhash.QuotientRemainder(100, 4), 8)
    a, b = Training(config_of(10)), Training(config_of(12))
    a.steps(2)
    b.steps(3)
    tree = {"a": a.tree, "b": b.tree, "c": qrhash.init(jax.random.key(1), ordinary)}
    configs = {"a": a.config, "b": b.config, "c": ordinary}
    with Checkpoints(tmp_path, configs) as checkpoints:
        checkpoints.save(3, tree)
    with Checkpoints(tmp_path, dict(reversed(configs.items()))) as checkpoints:
        _assert_same(checkpoints.restore(tree).state, tree)
    swapped = configs | {"a": b.config, "b": a.config}
    with (
        Checkpoints(tmp_path, swapped) as checkpoints,
        pytest.raises(MismatchError, match="capacity of feature 'a' is 10 in the checkpoint, 12"),
    ):
        checkpoints.restore(tree)


# --- kills ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the children are forks")
def test_keys_rows_and_state_agree_after_kills(tmp_path):
    rng, config = random.Random(0), dynamic_training.killed_config()
    reference, like = Training(config), Training(config).tree
    layouts = (layout_2x4(), make_layout((8,), ("data",), row_axes="data"))
    on_meshes = [Training(dynamic_training.killed_config(layout=each)) for each in layouts]
    directory, cache = tmp_path / "checkpoints", tmp_path / "cache"
    with Checkpoints(directory, config) as checkpoints:
        checkpoints.save(0, like, {"step": 0})
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "PYTHONPATH": str(Path(__file__).parent),  # where `support` is
    }
    nursery = [sys.executable, dynamic_training.__file__, str(directory)]
    with subprocess.Popen(
        nursery, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        for _ in range(6):
            print(file=process.stdin, flush=True)
            child, start = map(int, process.stdout.readline().split())
            assert start == reference.number
            said = [process.stdout.readline() for _ in range(rng.randrange(3))]
            time.sleep(rng.uniform(0, 0.3))
            os.kill(child, signal.SIGKILL)
            said += iter(process.stdout.readline, "ended\n")
            complete = int(said[-1]) if said else start
            with Checkpoints(directory, config) as checkpoints:
                restored = checkpoints.restore(like)
            assert complete <= restored.step <= complete + 1
            while reference.number < restored.step:
                dynamic_training.killed_step(reference)
            _assert_same(restored.state, reference.tree)
            wanted = reference.of_keys()
            for training in on_meshes:
                with Checkpoints(directory, config) as checkpoints:
                    training.tree = checkpoints.restore(training.tree).state
                assert training.of_keys() == wanted
        process.stdin.close()
        assert process.wait(timeout=30) == 0
    assert reference.number > 0
    assert len(reference.keys) > 0
