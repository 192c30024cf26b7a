"""Deltas: a copy that gets them equals the training, whatever happens on the way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qrhash import EmbedConfig, KeyDigits, MultiHash, dynamic
from qrhash.checkpoint import Checkpoints
from qrhash.dynamic import ExactCount, StepsSinceUse
from support.dynamic_training import Training, config_of, rows_of, vectors_of
from support.meshes import make_layout

UNCHECKED_KEYS = True

ADMISSION, EVICTION = ExactCount(2, 40), StepsSinceUse(2)


class Publisher:
    """A training that publishes deltas."""

    def __init__(self, config, name=""):
        self.training, self.name = Training(config), name
        self.published = dynamic.nothing_published(config)

    def train(self, steps=3):
        """Some steps, an eviction, and a step after it."""
        self.training.steps(steps)
        if self.training.config.eviction is not None:
            self.training.evict()
        self.training.step()
        return self

    def delta(self):
        training = self.training
        given = self.published, training.params, training.state, training.config, training.number
        delta, self.published = dynamic.delta_since(*given, name=self.name)
        return delta


def _empty(config, name=""):
    """A copy whose parameters have nothing of the training's."""
    params = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan), dynamic.init(jax.random.key(9), config)
    )
    return dynamic.nothing_served(params, config, name=name)


def _assert_equals(served, training, config):
    """Keys, counts, steps and every vector to the last bit, of keys without a row as well."""
    assert served.version == training.number
    of = {}
    for name, state, params in (
        ("served", served.state, served.parameters),
        ("training", training.state, training.params),
    ):
        index, table = state.index, np.asarray(params.table)
        counts, steps = np.asarray(index.counts), np.asarray(index.last_steps)
        of[name] = {
            key: (table[row].tobytes(), counts[row], steps[row])
            for key, row in rows_of(state).items()
        }
    assert of["served"] == of["training"]
    keys = [*of["training"], *range(50)]
    got = vectors_of(served.parameters, served.state, keys, config)
    want = vectors_of(training.params, training.state, keys, training.config)
    assert got.tobytes() == want.tobytes()


CONFIGS = {
    "by rows": config_of(24, admission=ADMISSION, eviction=EVICTION),
    "dense": config_of(24, eviction=EVICTION, large_table_rows=1000),
    "no refused": config_of(24, eviction=EVICTION, refused=None, refused_value=0.5),
    "half": config_of(24, eviction=EVICTION, refused=None, param_dtype=jnp.bfloat16),
    "project": config_of(
        24, admission=ADMISSION, refused=EmbedConfig(MultiHash((8, 9)), 4, "project")
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_copy_after_deltas_equals_the_training(config, tmp_path):
    publisher, served = Publisher(config), _empty(config)
    removed = 0
    for _ in range(4):
        delta = publisher.train().delta()
        dynamic.save_delta(tmp_path / "delta.npz", delta)
        removed += delta.removed.size
        served = dynamic.apply_delta(served, dynamic.load_delta(tmp_path / "delta.npz"), config)
        _assert_equals(served, publisher.training, config)
    assert removed or config.eviction is None
    assert [path.name for path in tmp_path.iterdir()] == ["delta.npz"]


def test_a_copy_may_have_more_rows(tmp_path):
    config = CONFIGS["by rows"]
    longer = dataclasses.replace(config, capacity=100)
    publisher, served = Publisher(config), _empty(longer)
    for _ in range(2):
        served = dynamic.apply_delta(served, publisher.train().delta(), longer)
    _assert_equals(served, publisher.training, longer)


def test_the_training_may_grow_between_deltas():
    config = config_of(10, eviction=EVICTION)
    longer = dataclasses.replace(config, capacity=60)
    publisher, served = Publisher(config), _empty(longer)
    served = dynamic.apply_delta(served, publisher.train().delta(), longer)
    publisher.training.grow(40)
    delta = publisher.train().delta()
    assert delta.keys.size > 10
    served = dynamic.apply_delta(served, delta, longer)
    _assert_equals(served, publisher.training, longer)


def test_a_delta_holds_what_was_met_and_no_more():
    publisher = Publisher(config_of(10, eviction=StepsSinceUse(2)))
    training = publisher.training
    training.step([1, 2, 3])
    assert sorted(publisher.delta().keys.tolist()) == [1, 2, 3]
    training.step([2, 4])
    delta = publisher.delta()
    assert sorted(delta.keys.tolist()) == [2, 4]
    assert delta.counts.tolist() == [2 if key == 2 else 1 for key in delta.keys.tolist()]
    assert delta.last_steps.tolist() == [1, 1]
    assert (int(delta.from_version), int(delta.to_version)) == (1, 2)
    training.step([5])
    assert training.evict() == 2  # 1 and 3, met in step 0
    training.step([3])  # comes back, and is no removal
    delta = publisher.delta()
    assert sorted(delta.keys.tolist()) == [3, 5]
    assert delta.removed.tolist() == [1]


def test_an_empty_batch_of_changes():
    publisher, config = Publisher(config_of(10, refused=None)), config_of(10, refused=None)
    publisher.training.step([1])
    served = dynamic.apply_delta(_empty(config), publisher.delta(), config)
    publisher.training.number += 1  # a step without keys
    delta = publisher.delta()
    assert (delta.keys.size, delta.removed.size) == (0, 0)
    served = dynamic.apply_delta(served, delta, config)
    _assert_equals(served, publisher.training, config)


def test_what_was_published_is_kept_in_a_checkpoint(tmp_path):
    config = CONFIGS["by rows"]
    publisher = Publisher(config).train()
    publisher.delta()
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(1, publisher.published)
        published = checkpoints.restore(dynamic.nothing_published(config)).state
    publisher.train()
    want = publisher.delta()
    publisher.published = published
    got = publisher.delta()
    assert want.removed.size
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.tobytes() == b.tobytes()


# --- order ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain():
    """Three deltas, and the copies after none to all of them."""
    config = CONFIGS["by rows"]
    publisher, copies = Publisher(config), [_empty(config)]
    deltas = []
    for _ in range(3):
        deltas.append(publisher.train().delta())
        copies.append(dynamic.apply_delta(copies[-1], deltas[-1], config))
    return config, deltas, copies


def test_a_delta_applied_twice_does_no_harm(chain):
    config, deltas, copies = chain
    assert dynamic.apply_delta(copies[1], deltas[0], config) is copies[1]
    assert dynamic.apply_delta(copies[3], deltas[1], config) is copies[3]


def test_a_delta_that_comes_too_early_is_refused(chain):
    config, deltas, copies = chain
    message = "delta must be from version 4, that of the copy, got one from 8 to 12: apply those"
    with pytest.raises(ValueError, match=message):
        dynamic.apply_delta(copies[1], deltas[2], config)
    with pytest.raises(ValueError, match="from version -1"):
        dynamic.apply_delta(copies[0], deltas[1], config)


def test_one_of_everything_heals_a_gap(chain):
    config, _, copies = chain
    publisher = Publisher(config)
    for _ in range(3):
        publisher.train()
    healed = dynamic.apply_delta(copies[1], publisher.delta(), config)
    _assert_equals(healed, publisher.training, config)


def test_the_copy_before_still_serves(chain):
    """Readers of the old one are not disturbed: nothing is written in place."""
    config, deltas, copies = chain
    again = dynamic.apply_delta(_empty(config), deltas[0], config)
    keys = [*deltas[0].keys.tolist(), *deltas[2].keys.tolist()]
    old, new = (vectors_of(c.parameters, c.state, keys, config) for c in (copies[1], again))
    assert old.tobytes() == new.tobytes()


# --- refusals -------------------------------------------------------------------------------------


def test_versions_go_up():
    publisher = Publisher(config_of(10))
    publisher.training.step([1])
    publisher.delta()
    with pytest.raises(ValueError, match=r"above that of the last delta, 1, .*got 1"):
        publisher.delta()
    publisher.training.steps(2)
    publisher.training.number = 2
    with pytest.raises(ValueError, match="above the last step trained, 2, got 2"):
        publisher.delta()


def test_more_keys_than_rows_are_refused_and_change_nothing(chain):
    config, deltas, _ = chain
    short = dataclasses.replace(config, capacity=5)
    with pytest.raises(ValueError, match=f"must be at least {deltas[0].keys.size}, .* got 5"):
        dynamic.apply_delta(_empty(short), deltas[0], short)


@pytest.mark.parametrize(
    "change",
    [
        {"refused": EmbedConfig(KeyDigits(8, num_tables=2), 4, "add")},
        {"refused": None},
    ],
)
def test_another_config_is_refused(change, chain):
    config, deltas, _ = chain
    other = dataclasses.replace(config, **change)
    with pytest.raises(ValueError, match="delta must be of the copy's config"):
        dynamic.apply_delta(_empty(other), deltas[0], other)


def test_a_copy_on_a_mesh_is_refused():
    config = dynamic.DynamicConfig(16, 4, layout=make_layout((8,), ("model",)))
    with pytest.raises(ValueError, match="a copy that serves is on one device"):
        dynamic.nothing_served(dynamic.Parameters(jnp.zeros((16, 4))), config)


# --- files ----------------------------------------------------------------------------------------


def test_a_file_is_numpys_own(chain, tmp_path):
    _, deltas, _ = chain
    dynamic.save_delta(tmp_path / "a.npz", deltas[1])
    with np.load(tmp_path / "a.npz") as file:
        assert file["keys"].tolist() == deltas[1].keys.tolist()
        assert file["vectors"].tobytes() == deltas[1].vectors.tobytes()


def test_every_damaged_byte_is_noticed_or_means_nothing(chain, tmp_path, rng):
    """Cut off anywhere, or with any byte changed, a file is refused; or it says the same."""
    _, deltas, _ = chain
    path = tmp_path / "a.npz"
    dynamic.save_delta(path, deltas[1])
    good = path.read_bytes()
    refused = 0
    for place in rng.integers(0, len(good), 300):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        try:
            got = dynamic.load_delta(path)
        except OSError:
            refused += 1
        else:
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(deltas[1]), strict=True):
                assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert refused > 150
    for place in rng.integers(0, len(good), 20):
        path.write_bytes(good[:place])
        with pytest.raises(OSError, match="is damaged"):
            dynamic.load_delta(path)


def test_a_checksum_tells_other_numbers(chain, tmp_path):
    """What is a good file, and not what was written."""
    _, deltas, _ = chain
    path = tmp_path / "a.npz"
    dynamic.save_delta(path, deltas[1])
    with np.load(path) as file:
        arrays = dict(file)
    arrays["vectors"][0, 0] += 1
    np.savez(path, **arrays)
    with pytest.raises(OSError, match="its checksum is another"):
        dynamic.load_delta(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(chain, tmp_path, monkeypatch):
    _, deltas, _ = chain
    path = tmp_path / "a.npz"
    dynamic.save_delta(path, deltas[0])
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space left"):
        dynamic.save_delta(path, deltas[1])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_no_file_is_no_damage(tmp_path):
    with pytest.raises(FileNotFoundError):
        dynamic.load_delta(tmp_path / "none.npz")
