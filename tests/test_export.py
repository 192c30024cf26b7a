"""Snapshots: their look-ups are the model's, in memory mapped from a file, without JAX."""

import dataclasses
import itertools
import json
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import qrhash
from qrhash import (
    Bag,
    CodePartition,
    CollectionConfig,
    EmbedConfig,
    FullTable,
    HashTrick,
    KeyDigits,
    Keys,
    MixedRadix,
    MultiHash,
    QuotientRemainder,
    collection,
    dynamic,
    export,
)
from qrhash.carried_families import DeepRecQuotientRemainder
from qrhash.dynamic import ExactCount, StepsSinceUse
from qrhash.export import row_formats
from support.cases import assert_close, covering
from support.dynamic_training import Training, config_of, vectors_of
from support.meshes import make_layout

UNCHECKED_KEYS = True

N = 1000
FAMILIES = {
    "full": FullTable(N),
    "hash": HashTrick(N, 70),
    "quotient": QuotientRemainder(N, 4),
    "mixed": MixedRadix(N, (10, 10, 10)),
    "deeprec": DeepRecQuotientRemainder(N, 25, 40),
    "codes": CodePartition(np.arange(N)[:, None] // np.array([1, 7]) % np.array([40, 30])),
    "digits": KeyDigits(24, num_tables=3),
    "hashes": MultiHash((50, 60)),
}
OPERATIONS = ("add", "mult", "concat", "project", "path", "features")
WIDTH = 4


def _config(family, operation, **options):
    partition = FAMILIES[family]
    widths = None
    if operation == "path" and partition.num_tables > 1:
        widths = (2, *(3 * 2,) * (partition.num_tables - 2), 3 * WIDTH)
    if operation == "concat" and partition.num_tables == 3:
        widths = (1, 1, 2)
    return EmbedConfig(partition, WIDTH, operation, widths=widths, **options)


def _trained(config, seed=0):
    """Tables that are nowhere symmetric or zero, and a projection."""
    tables = qrhash.init(jax.random.key(seed), config)
    draw = np.random.default_rng(seed).normal
    projection = qrhash.init_projection(jax.random.key(seed), config)
    filled = [jnp.asarray(draw(size=t.shape), t.dtype) for t in tables]
    return tuple(filled), jax.tree.map(
        lambda x: jnp.asarray(draw(size=x.shape), x.dtype), projection
    )


def _ids(config, rng, shape=(3, 5)):
    if config.partition.takes_keys:
        return rng.integers(0, 2**64, shape, np.uint64)
    ids = rng.integers(0, config.partition.num_ids_with_rows, shape)
    if config.id_policy != "raise":
        ids.flat[:3] = -1, N, N + 7
    return ids


def _model(tables, ids, config, projection):
    ids = Keys.of(ids) if config.partition.takes_keys else ids
    return np.asarray(qrhash.lookup(tables, ids, config, projection))


def _cases():
    """Every pair of operation, policy and padding, with one family after the other."""
    families = itertools.cycle(FAMILIES)
    for case in covering(OPERATIONS, ("nan", "zero", "clip", "wrap", "raise"), (None, 3)):
        several = case[0] in ("concat", "path")
        family = next(each for each in families if FAMILIES[each].num_tables > several)
        yield (family, *case)


@pytest.mark.parametrize(("family", "operation", "policy", "padding"), list(_cases()), ids=str)
def test_a_snapshot_looks_up_what_the_model_does(family, operation, policy, padding, tmp_path, rng):
    config = _config(family, operation, id_policy=policy, padding_id=padding)
    tables, projection = _trained(config)
    export.save(tmp_path / "s", export.of_feature(config, tables, projection))
    snapshot = export.Snapshot(tmp_path / "s", verify=True)
    ids = _ids(config, rng)
    ids[-1] = 3
    found, wanted = snapshot.lookup(ids), _model(tables, ids, config, projection)
    assert (found.dtype, found.shape) == (np.float32, wanted.shape)
    if operation in ("project", "path"):
        assert_close(found, wanted)
    else:
        np.testing.assert_array_equal(found, wanted)
    assert snapshot.lookup(ids[0, 0]).shape == wanted.shape[2:]
    assert snapshot.lookup(ids[:0]).shape == (0, *wanted.shape[1:])


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn", "max"])
@pytest.mark.parametrize("pool_rows", [False, True])
@pytest.mark.parametrize("operation", ["mult", "project"])
def test_bags_are_pooled_as_the_model_pools_them(combiner, pool_rows, operation, tmp_path, rng):
    options = {"padding_id": 3, "combiner": combiner, "pool_rows": pool_rows, "id_policy": "zero"}
    config = _config("mixed", operation, **options)
    tables, projection = _trained(config)
    export.save(tmp_path / "s", export.of_feature(config, tables, projection))
    lists = [[], [1, 2, N + 5], [3], [3, 9, 9], [], [*range(20)], []]
    ids = np.concatenate([np.asarray(each, np.int64) for each in lists])
    offsets = np.cumsum([0, *map(len, lists)])
    weights = None if combiner == "max" else rng.normal(size=ids.size).astype(np.float32)
    snapshot = export.Snapshot(tmp_path / "s")
    for given in (None, weights):
        bag = Bag.from_lists(lists)
        if given is not None:
            bag = Bag.from_ragged(ids, offsets=offsets, weights=given)
        wanted = qrhash.lookup(tables, bag, config, projection)
        assert_close(snapshot.lookup(ids, offsets=offsets, weights=given), wanted, 1e-4)


def test_a_collection_keeps_shared_tables_once(tmp_path, rng):
    item = EmbedConfig(QuotientRemainder(N, 4), 8, "project")
    config = CollectionConfig(
        {"item": item, "last": "item", "day": EmbedConfig(FullTable(7), 8, combiner="sum")}
    )
    pool = CollectionConfig.one_pool(["a", "b"], EmbedConfig(MultiHash((50, 60)), 4, "concat"))
    stacks = collection.init(jax.random.key(0), config)
    projections = collection.init_projections(jax.random.key(1), config)
    pooled = collection.init(jax.random.key(2), pool)
    path = tmp_path / "s"
    export.save(
        path,
        export.of_collection(config, stacks, projections) | export.of_collection(pool, pooled),
    )
    assert sum(name.startswith(("last/", "b/")) for name in load_file(path)) == 0
    snapshot = export.Snapshot(path)
    assert snapshot.names == ("item", "last", "day", "a", "b")
    assert (snapshot.features("day"), snapshot.version("day")) == (8, None)
    ids = {name: rng.integers(0, 7, 20) for name in snapshot.names}
    wanted = collection.lookup(
        stacks, {name: ids[name] for name in ("item", "last", "day")}, config, projections
    )
    wanted |= collection.lookup(pooled, {name: Keys.of(ids[name]) for name in ("a", "b")}, pool)
    for name, found in snapshot.lookup_all(ids).items():
        assert_close(found, wanted[name], 1e-6)
    day = snapshot.lookup_all({"day": (ids["day"], np.array([0, 5, 20]))})["day"]
    assert_close(day[0], wanted["day"][:5].sum(axis=0))


def test_tables_on_a_mesh_are_kept_whole(tmp_path):
    config = EmbedConfig(
        QuotientRemainder(N, 4), 8, large_table_rows=100, layout=make_layout((8,), ("data",))
    )
    tables = qrhash.init(jax.random.key(0), config)
    export.save(tmp_path / "s", export.of_feature(config, tables))
    wanted = np.asarray(qrhash.lookup(tables, np.arange(N), config))
    np.testing.assert_array_equal(export.Snapshot(tmp_path / "s").lookup(np.arange(N)), wanted)


# --- tables that grow -----------------------------------------------------------------------------


REFUSED = EmbedConfig(MultiHash((20, 30)), WIDTH, "project", widths=(3, 3))
# Those of `support.dynamic_training.batch`, met and not met.
KEYS = np.arange(80, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(2**64 - 2)


@pytest.mark.parametrize(
    "options",
    [{"refused": None, "refused_value": 0.5}, {"refused": REFUSED}],
    ids=["constant", "compressed"],
)
def test_keys_with_and_without_rows_have_the_models_vectors(options, tmp_path):
    config = config_of(30, admission=ExactCount(2, 40), eviction=StepsSinceUse(3), **options)
    training = Training(config)
    training.steps(4)
    exported = export.of_dynamic(config, training.params, training.state, training.number)
    export.save(tmp_path / "s", {"item": exported})
    snapshot = export.Snapshot(tmp_path / "s")
    _assert_is(snapshot, training)
    assert snapshot.version("item") == training.number
    assert snapshot.lookup(KEYS[:0], "item").shape == (0, config.features)
    lists = [KEYS[:0], KEYS[[1, 2, 70]], KEYS[[3]], KEYS[:0]]
    flat, offsets = np.concatenate(lists), [0, 0, 3, 4, 4]
    given = training.params, training.state
    means = [vectors_of(*given, Keys.of(each), config).mean(axis=0) for each in lists[1:3]]
    pooled = snapshot.lookup(flat, "item", offsets=offsets)
    assert_close(pooled[1:3], np.stack(means))
    assert not pooled[[0, 3]].any()


def _assert_is(snapshot, training, name="item"):
    given = training.params, training.state, Keys.of(KEYS), training.config
    wanted = vectors_of(*given)
    found, has_row = snapshot.lookup(KEYS, name), snapshot.has_row(KEYS, name)
    np.testing.assert_array_equal(found[has_row], wanted[has_row])
    assert_close(found, wanted, 1e-6)
    assert set(training.keys) == set(KEYS[has_row].tolist())


def _deltas(config, name, rounds):
    """A training, the snapshot's first version, and (delta, copy of the state) of later rounds."""
    training = Training(config)
    training.steps(2)
    first = export.of_dynamic(config, training.params, training.state, training.number)
    _, published = dynamic.delta_since(
        dynamic.nothing_published(config),
        *(training.params, training.state, config, training.number),
        name=name,
    )
    made = []
    for _ in range(rounds):
        training.steps(2)
        training.evict()
        training.step()
        given = published, training.params, training.state, config, training.number
        delta, published = dynamic.delta_since(*given, name=name)
        made.append(delta)
    return training, first, made


def test_deltas_bring_a_snapshot_to_the_trainings_version(tmp_path):
    config = config_of(30, admission=ExactCount(2, 40), eviction=StepsSinceUse(2), refused=REFUSED)
    training, first, deltas = _deltas(config, "item", 4)
    export.save(tmp_path / "s", {"item": first}, rows="int8")
    snapshot = export.Snapshot(tmp_path / "s")
    with pytest.raises(ValueError, match=r"from version 2, that of the snapshot, got one from 5"):
        snapshot.apply(deltas[1])
    assert snapshot.version("item") == 2
    assert any(delta.removed.size for delta in deltas)
    for number, delta in enumerate(deltas):
        dynamic.save_delta(tmp_path / str(number), delta)
        assert snapshot.apply(tmp_path / str(number)) == int(delta.to_version)
        before = snapshot.lookup(KEYS, "item")
        assert snapshot.apply(delta) == int(delta.to_version)  # twice: nothing
        np.testing.assert_array_equal(snapshot.lookup(KEYS, "item"), before)
    # What the file alone knows is as it was kept; what has changed since is exact.
    wanted = vectors_of(training.params, training.state, Keys.of(KEYS), config)
    assert_close(snapshot.lookup(KEYS, "item"), wanted, 0.01)
    everything, _ = dynamic.delta_since(
        dynamic.nothing_published(config),
        *(training.params, training.state, config, training.number + 1),
        name="item",
    )
    snapshot.apply(everything)
    _assert_is(snapshot, training)


def test_a_delta_of_another_table_is_refused(tmp_path):
    config = config_of(30, refused=None, eviction=StepsSinceUse(2))
    training, first, (delta,) = _deltas(config, "", 1)
    export.save(tmp_path / "s", {"": first, "fixed": export.of_feature(*_fixed())})
    snapshot = export.Snapshot(tmp_path / "s")
    with pytest.raises(ValueError, match=r"name must be one of '', 'fixed', .* got 'item'"):
        snapshot.apply(
            jax.tree.map(lambda x: x, delta).__class__(**{**vars(delta), "name": "item"})
        )
    with pytest.raises(ValueError, match=r"'fixed' of .* does not grow"):
        snapshot.has_row([1], "fixed")
    wide = dataclasses.replace(delta, vectors=np.zeros((delta.keys.size, 3)))
    with pytest.raises(ValueError, match="vectors of width 4"):
        snapshot.apply(wide)
    more = dataclasses.replace(delta, refused=(np.zeros((2, 2)),))
    with pytest.raises(ValueError, match=r"compressed tables of the snapshot, \(\), got"):
        snapshot.apply(more)
    assert snapshot.version() == training.number - 3


def _fixed():
    config = EmbedConfig(FullTable(5), 8)
    return config, qrhash.init(jax.random.key(0), config)


def test_nobody_sees_half_of_a_delta(tmp_path):
    """Eight readers, and a writer whose every version has one number in all of its vectors."""
    features, keys = 4, np.arange(200, dtype=np.uint64)
    config = dynamic.DynamicConfig(300, features)
    empty = dynamic.init(jax.random.key(0), config)
    exported = export.of_dynamic(config, empty, dynamic.init_state(config), 1)
    export.save(tmp_path / "s", exported)
    snapshot = export.Snapshot(tmp_path / "s")

    def delta(version):
        # Every other version lacks a key that the one before had.
        held = keys[version % 2 :]
        vectors = np.full((held.size, features), version, np.float32)
        removed, none = keys[: version % 2], np.zeros(held.size, np.int32)
        return dynamic.Delta(
            from_version=np.int64(version - 1),
            to_version=np.int64(version),
            keys=held,
            vectors=vectors,
            counts=none,
            last_steps=none,
            removed=removed,
        )

    torn, is_over = [], threading.Event()

    def read():
        latest = 0
        while not is_over.is_set():
            found = snapshot.lookup(keys)
            version = found[1, 0]
            is_whole = (found[1:] == version).all() and version >= latest
            first = 0 if version % 2 else version
            if not is_whole or not (found[0] == first).all():
                torn.append(found)
            latest = version

    snapshot.apply(delta(2))
    readers = [threading.Thread(target=read) for _ in range(8)]
    for each in readers:
        each.start()
    until, version = time.monotonic() + 1, 2
    while time.monotonic() < until:
        version += 1
        assert snapshot.apply(delta(version)) == version
    is_over.set()
    for each in readers:
        each.join()
    assert version > 20
    assert not torn


# --- formats of rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 8])
@pytest.mark.parametrize("rows", export.ROW_FORMATS)
def test_rows_are_within_the_bound_of_their_format(rows, width, rng):
    table = rng.normal(size=(300, width)).astype(np.float32) * rng.lognormal(0, 3, (300, 1))
    table[7] = 0
    table = table.astype(np.float32)
    arrays = row_formats.encode(table, rows)
    found = row_formats.Rows(arrays, width).take(np.arange(300).reshape(3, 100))
    assert (found.shape, found.dtype) == ((3, 100, width), np.float32)
    error = np.abs(found.reshape(300, width) - table)
    most = np.abs(table).max(axis=1, keepdims=True)
    bound = {"float32": 0, "bfloat16": 2**-8, "int8": 1 / 254, "int4": 1 / 14}[rows]
    assert (error <= bound * most * (1 + 1e-5)).all()
    assert not found.reshape(300, width)[7].any()
    num_bytes = sum(array.nbytes for array in arrays.values()) / 300
    sizes = {"float32": 4 * width, "bfloat16": 2 * width, "int8": width + 4}
    assert num_bytes == sizes.get(rows, -(-width // 2) + 4)


def test_whole_numbers_of_four_bits_are_kept_exactly():
    table = np.arange(-7, 8, dtype=np.float32)[None, :]
    arrays = row_formats.encode(table, "int4")
    np.testing.assert_array_equal(row_formats.Rows(arrays, 15).take(np.array([0])), table)


@pytest.mark.parametrize("rows", ["int8", "int4"])
def test_rows_that_are_not_finite_are_named(rows, tmp_path):
    config = EmbedConfig(FullTable(5), 2)
    tables = (np.array([[0, 1]] * 3 + [[0, np.nan], [0, 0]], np.float32),)
    with pytest.raises(ValueError, match=rf"/table_0: rows must be finite .* {rows}.* row 3 "):
        export.save(tmp_path / "s", export.of_feature(config, tables), rows=rows)
    assert not list(tmp_path.iterdir())


# --- the file -------------------------------------------------------------------------------------


def _saved(path):
    export.save(path, export.of_feature(*_fixed()))
    return path


def test_another_reader_of_safetensors_reads_it(tmp_path):
    config, tables = _fixed()
    arrays = load_file(_saved(tmp_path / "s"))
    np.testing.assert_array_equal(arrays["/table_0/rows"], tables[0])
    from safetensors import safe_open

    with safe_open(tmp_path / "s", "np") as file:
        said = json.loads(file.metadata()["qrhash"])
    assert said["embeddings"][""]["partition"] == config.partition.to_dict()


def test_nothing_is_loaded_but_numpy(tmp_path):
    code = f"""
import sys
from qrhash.export import Snapshot
assert Snapshot({str(_saved(tmp_path / "s"))!r}).lookup([1, 4]).shape == (2, 8)
print(*sorted({{name.partition(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names)))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) & {"jax", "flax", "optax", "safetensors", "scipy"} == set()


def test_a_snapshot_takes_the_place_of_another_one_that_is_read(tmp_path):
    path = _saved(tmp_path / "s")
    old = export.Snapshot(path)
    before = old.lookup(np.arange(5))
    config, (table,) = _fixed()
    export.save(path, export.of_feature(config, (table + 1,)))
    np.testing.assert_array_equal(old.lookup(np.arange(5)), before)
    assert_close(export.Snapshot(path).lookup(np.arange(5)), before + 1)
    assert [each.name for each in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("kept", [0, 5, 60, 0.5, 0.99])
def test_a_file_cut_off_is_refused(kept, tmp_path):
    path = _saved(tmp_path / "s")
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(OSError, match="damaged"):
        export.Snapshot(path)


def test_a_flipped_bit_is_found_by_its_checksum(tmp_path):
    path = _saved(tmp_path / "s")
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(OSError, match="checksum of /table_0/rows is another"):
        export.Snapshot(path, verify=True)


def test_other_files_and_versions_are_refused_in_words(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(OSError, match="no snapshot"):
        export.Snapshot(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        export.Snapshot(tmp_path / "nowhere")
    for old, new, pattern in (
        (b'\\"format\\": 1', b'\\"format\\": 2', "format 2"),
        (b"[12631321989986513636", b"[12631321989986513637", "other hashes"),
    ):
        path = _saved(tmp_path / "s")
        data = path.read_bytes()
        if old not in data:
            old = old.replace(b"[", b"")
            new = new.replace(b"[", b"")
        assert old in data
        path.write_bytes(data.replace(old, new))
        with pytest.raises(ValueError, match=pattern):
            export.Snapshot(path)


def test_mistakes_are_named(tmp_path):
    config, tables = _fixed()
    snapshot = export.Snapshot(_saved(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"name must be one of '', .*got 'item'"):
        snapshot.lookup([1], "item")
    with pytest.raises(ValueError, match="ids must be integers"):
        snapshot.lookup([1.5])
    for offsets in ([1, 4], [0, 9], [0, 3, 2, 4], [[0, 4]], []):
        with pytest.raises(ValueError, match="offsets must"):
            snapshot.lookup([1, 2, 3, 4], offsets=offsets)
    with pytest.raises(ValueError, match="weights must be one for each of 2"):
        snapshot.lookup([1, 2], offsets=[0, 2], weights=[1.0])
    with pytest.raises(ValueError, match="rows must be one of float32"):
        export.save(tmp_path / "s", export.of_feature(config, tables), rows="int3")
    with pytest.raises(ValueError, match="got none"):
        export.save(tmp_path / "s", {})
    with pytest.raises(ValueError, match="tables must be"):
        export.of_feature(config, (np.zeros((2, 2)),))
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        _ = export.load
