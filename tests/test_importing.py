"""Models of other systems: the vectors, bags and logits are theirs."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import qrhash
from qrhash import Bag, Keys, cli, dynamic, export, importing
from qrhash.carried_families import DLRMQuotientRemainder
from support.cases import assert_close

UNCHECKED_KEYS = True

N, M, D = 103, 4, 6
LISTS = [[5, 102, 5], [], [0], [99, 3]]
FLAT, OFFSETS = np.concatenate([np.asarray(each, int) for each in LISTS]), np.array([0, 3, 3, 4, 6])


def _normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@pytest.fixture
def qr(rng):
    return {"weight_q": _normal(rng, -(-N // M), D), "weight_r": _normal(rng, M, D)}


def _qr_embedding_bag(weights, lists, operation, mode="sum"):
    """DLRM's QREmbeddingBag, bag by bag: pooled first, and combined then."""
    bags = []
    for ids in lists:
        each = []
        for table, number in (
            (weights["weight_q"], lambda i: i // M),
            (weights["weight_r"], lambda i: i % M),
        ):
            rows = [table[number(i)] for i in ids]
            total = np.sum(rows, axis=0) if rows else np.zeros(table.shape[1], np.float32)
            each.append(total / max(1, len(rows)) if mode == "mean" else total)
        q, r = each
        combined = {"add": lambda q=q, r=r: q + r, "mult": lambda q=q, r=r: q * r}
        bags.append(np.concatenate(each) if operation == "concat" else combined[operation]())
    return np.stack(bags)


def _prefixed(name, weights):
    return {f"{name}.{part}": array for part, array in weights.items()}


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("operation", ["add", "mult", "concat"])
def test_dlrms_bags(operation, mode, qr, tmp_path):
    arrays = _prefixed("module.emb_l.3", qr) | {"bot_l.0.weight": np.zeros((2, 2))}
    carried = importing.from_dlrm(arrays, operation=operation, mode=mode, num_embeddings=[N])
    assert list(carried) == ["emb_l.3"]
    each = carried["emb_l.3"]
    wanted = _qr_embedding_bag(qr, LISTS, operation, mode)
    assert_close(qrhash.lookup(each.tables, Bag.from_lists(LISTS), each.config), wanted, 1e-6)
    export.save(tmp_path / "s", each.exported())
    assert_close(export.Snapshot(tmp_path / "s").lookup(FLAT, offsets=OFFSETS), wanted, 1e-6)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operation", ["add", "mult", "concat"])
def test_torch_pools_dlrms_bags_alike(operation, qr):
    import torch

    ids, offsets = torch.tensor(FLAT), torch.tensor(OFFSETS[:-1])

    def bag(index, table):
        return torch.nn.functional.embedding_bag(index, torch.tensor(table), offsets, mode="sum")

    q, r = bag((ids / M).long(), qr["weight_q"]), bag(torch.remainder(ids, M), qr["weight_r"])
    wanted = {"add": q + r, "mult": q * r, "concat": torch.cat((q, r), dim=1)}[operation]
    each = importing.from_dlrm(_prefixed("emb_l.0", qr), operation=operation)["emb_l.0"]
    found = qrhash.lookup(each.tables, Bag.from_lists(LISTS), each.config)
    assert_close(found, wanted.numpy(), 1e-6)


def test_all_kinds_of_dlrms_embeddings(rng, qr):
    full, narrow, wide = _normal(rng, 9, D), _normal(rng, 9, 2), _normal(rng, D, 2)
    arrays = {
        "emb_l.10.weight": full,
        "emb_l.2.embs.weight": narrow,
        "emb_l.2.proj.weight": wide,
    } | _prefixed("emb_l.0", qr)
    carried = importing.from_dlrm(arrays)
    assert list(carried) == ["emb_l.0", "emb_l.2", "emb_l.10"]
    ids = np.arange(9)
    for name, wanted in (("emb_l.10", full), ("emb_l.2", narrow @ wide.T)):
        each = carried[name]
        assert_close(qrhash.lookup(each.tables, ids, each.config, each.projection), wanted)


def test_dlrms_whole_model(rng):
    """Against its forward pass, row by row in loops."""
    sizes = {"bot_l": [(5, 3), (D, 5)], "top_l": [(7, D + 3), (1, 7)]}
    arrays = {
        f"{mlp}.{2 * j}.{part}": _normal(rng, *(shape if part == "weight" else shape[:1]))
        for mlp, shapes in sizes.items()
        for j, shape in enumerate(shapes)
        for part in ("weight", "bias")
    }
    numbers, vectors = _normal(rng, 4, 3), [_normal(rng, 4, D) for _ in range(2)]
    wanted = []
    for row in range(4):
        x = numbers[row]
        for j in range(2):
            x = np.maximum(arrays[f"bot_l.{2 * j}.weight"] @ x + arrays[f"bot_l.{2 * j}.bias"], 0)
        t = [x, *(each[row] for each in vectors)]
        z = [t[i] @ t[j] for i in range(3) for j in range(i)]
        x = np.concatenate([x, z])
        x = np.maximum(arrays["top_l.0.weight"] @ x + arrays["top_l.0.bias"], 0)
        wanted.append((arrays["top_l.2.weight"] @ x + arrays["top_l.2.bias"])[0])
    layers = importing.layers_of_dlrm(arrays)
    found = importing.dlrm_logits(layers, jnp.asarray(numbers), [jnp.asarray(v) for v in vectors])
    assert_close(found, np.array(wanted))


def test_dlrms_division_in_float32():
    n = 2**25 + 7
    ids = np.array([0, 5, 2**24 + 1, 2**25 + 3, n - 1, n, -1])
    partition = DLRMQuotientRemainder(n, 1)
    quotient, remainder = partition.indices(ids)
    wanted = (ids[:5].astype(np.float32) / np.float32(1)).astype(np.int64)
    is_past = wanted >= n
    np.testing.assert_array_equal(quotient[:5], np.where(is_past, n, wanted))
    assert (quotient[:5] != ids[:5]).any()
    np.testing.assert_array_equal(quotient[5:], [n, n])
    np.testing.assert_array_equal(remainder == 1, quotient == n)
    assert not partition.is_complementary
    for m in (1, 3, 4, 7, 1000):
        few = DLRMQuotientRemainder(2**24, m)
        every = np.random.default_rng(m).integers(0, 2**24, 5000)
        for got, want in zip(
            few.indices(every), qrhash.QuotientRemainder(2**24, m).indices(every), strict=True
        ):
            np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(few.ids(*few.indices(every)), every)
    weights = {"emb_l.0.weight_q": np.zeros((3, 2)), "emb_l.0.weight_r": np.zeros((4, 2))}
    carried = importing.from_dlrm(weights, float32_division=True)["emb_l.0"]
    assert carried.config.partition == DLRMQuotientRemainder(12, 4)
    assert qrhash.Partition.from_dict(carried.config.partition.to_dict()) == DLRMQuotientRemainder(
        12, 4
    )


def test_deeprecs_multi_hash_variable(rng):
    """Its arithmetic, id // rows_q and id mod rows_r; also cut into parts, with its slots."""
    q, r, slot = _normal(rng, 12, 3), _normal(rng, 15, 3), _normal(rng, 12, 3)
    arrays = {
        "deep/user/multhash_Q/part_0": q[:5],
        "deep/user/multhash_Q/part_1": q[5:],
        "deep/user/multhash_R": r,
        "deep/user/multhash_Q/Adagrad/part_0": slot[:5],
        "deep/user/multhash_Q/Adagrad/part_1": slot[5:],
        "deep/user/multhash_R/Adagrad": r + 1,
        "global_step": np.int64(7),
    }
    carried = importing.from_deeprec(arrays, num_embeddings={"deep/user": 140})["deep/user"]
    ids = np.arange(140)
    wanted = np.stack([q[i // 12] + r[i % 15] for i in ids])
    np.testing.assert_array_equal(qrhash.lookup(carried.tables, ids, carried.config), wanted)
    np.testing.assert_array_equal(carried.slots["Adagrad"][0], slot)
    assert importing.from_deeprec(arrays)["deep/user"].config.num_embeddings == 144


def test_deeprecs_embedding_variable(rng, tmp_path):
    keys, values = np.array([7, -3, 2**62, 0, 11]), _normal(rng, 5, 4)
    arrays = {
        "item/part_0-keys": keys[:2],
        "item/part_1-keys": keys[2:],
        "item/part_0-values": values[:2],
        "item/part_1-values": values[2:],
        "item/part_0-freqs": np.array([3, 1]),
        "item/part_1-freqs": np.array([9, 2, 4]),
        "item/part_0-versions": np.array([10, 20]),
        "item/part_1-versions": np.array([30, 5, 0]),
        "item/part_0/Adagrad-keys": keys[:2],
        "item/part_0/Adagrad-values": values[:2],
    }
    carried = importing.from_deeprec(arrays)
    assert list(carried) == ["item"]
    item = carried["item"]
    assert item.version == 31
    asked = Keys.of(np.append(keys, 12345))
    found = dynamic.find(item.state, asked, item.config)
    wanted = np.concatenate([values, np.zeros((1, 4))])
    np.testing.assert_array_equal(dynamic.lookup(item.parameters, found, item.config), wanted)
    rows = np.asarray(found.rows.rows)[:5]
    assert np.asarray(item.state.index.counts)[rows].tolist() == [3, 1, 9, 2, 4]
    assert np.asarray(item.state.index.last_steps)[rows].tolist() == [10, 20, 30, 5, 0]
    export.save(tmp_path / "s", {"item": item.exported()})
    np.testing.assert_array_equal(export.Snapshot(tmp_path / "s").lookup(asked, "item"), wanted)


def test_full_tables_are_found_by_their_names(rng):
    tables = {
        "model.sparse.embedding_bags.t_item.weight": "t_item",
        "ebc.embeddings.t_user.weight": "t_user",
        "layers/embedding_1/shop/vars/0": "shop",
        "layers/embedding_2/vars/0": "embedding_2",
        "towers/street/embedding_3/vars/0": "street",
        "functional/city/embeddings": "city",
        "item_embedding.weight": "item_embedding",
    }
    arrays = {name: _normal(rng, 5, 3) for name in tables}
    found = importing.from_full_tables(arrays | {"dense.weight": _normal(rng, 3, 3)})
    assert list(found) == list(tables.values())
    for of, name in tables.items():
        each = found[name]
        np.testing.assert_array_equal(
            qrhash.lookup(each.tables, np.arange(5), each.config), arrays[of]
        )
    named = importing.from_full_tables({"w": arrays["item_embedding.weight"]}, {"item": "w"})
    assert list(named) == ["item"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: importing.from_dlrm({"x": 1}), "must hold emb_l.0.weight or the like, got x"),
        (
            lambda: importing.from_dlrm({"emb_l.0.weight_q": np.zeros((2, 2))}),
            "emb_l.0 must have weight, or weight_q and weight_r",
        ),
        (lambda: importing.from_dlrm({}, operation="project"), "operation must be mult"),
        (
            lambda: importing.from_dlrm({"emb_l.0.weight": np.zeros((2, 2))}, num_embeddings=[3]),
            "num_embeddings of emb_l.0 must be 2, got 3",
        ),
        (
            lambda: importing.from_dlrm({"emb_l.0.weight": np.zeros((2, 2))}, num_embeddings=[]),
            "a size for each of 1 embeddings, got 0",
        ),
        (
            lambda: importing.from_dlrm({"emb_l.0.weight": np.zeros(2)}),
            r"emb_l.0.weight must be floats \[rows, width\]",
        ),
        (lambda: importing.layers_of_dlrm({}), "weight and bias of each layer of bot_l"),
        (lambda: importing.from_deeprec({"x": 1}), "NAME/multhash_Q and NAME/multhash_R"),
        (
            lambda: importing.from_deeprec({"a/multhash_Q": np.zeros((2, 2))}),
            "a/multhash_R is not among",
        ),
        (lambda: importing.from_deeprec({"v-keys": np.arange(2)}), "v-values is not among"),
        (
            lambda: importing.from_deeprec(
                {"v-keys": np.array([1, 1]), "v-values": np.zeros((2, 2))}
            ),
            "v-keys must be 2 keys, each once",
        ),
        (lambda: importing.from_full_tables({"x": np.zeros((2, 2))}), "no table of embeddings is"),
        (lambda: importing.from_full_tables({}, {"a": "b"}), "'b' is not among"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- files, and the command -----------------------------------------------------------------------


def test_files_of_arrays(tmp_path, rng):
    arrays = {"a": _normal(rng, 2, 3), "b.c": np.arange(3)}
    np.savez(tmp_path / "x.npz", **arrays)
    save_file(arrays, tmp_path / "x.safetensors")
    for name in ("x.npz", "x.safetensors"):
        found = importing.read_arrays(tmp_path / name)
        assert sorted(found) == sorted(arrays)
        for key, array in arrays.items():
            np.testing.assert_array_equal(found[key], array)
    with pytest.raises(FileNotFoundError, match="is not there, nor a checkpoint of TensorFlow"):
        importing.read_arrays(tmp_path / "y.npz")
    with pytest.raises(OSError, match=r"must end in \.npz"):
        importing.read_arrays(tmp_path / "x.csv")
    (tmp_path / "z.npz").write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"z.npz cannot be read by numpy"):
        importing.read_arrays(tmp_path / "z.npz")


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_torch(tmp_path, qr):
    import torch

    state = {name: torch.tensor(array) for name, array in _prefixed("emb_l.0", qr).items()}
    torch.save({"epoch": 3, "state_dict": state, "opt_state_dict": {}}, tmp_path / "x.pt")
    found = importing.read_arrays(tmp_path / "x.pt")
    assert sorted(found) == ["emb_l.0.weight_q", "emb_l.0.weight_r"]
    np.testing.assert_array_equal(found["emb_l.0.weight_q"], qr["weight_q"])


@pytest.mark.filterwarnings("ignore")
def test_weights_of_keras(tmp_path):
    keras = pytest.importorskip("keras", reason="what CI has beside the tests")
    names = ("items", "users")
    model = keras.Sequential([keras.layers.Embedding(7, 3, name=name) for name in names])
    model(np.zeros((1,), np.int32))
    model.save_weights(tmp_path / "x.weights.h5")
    model.save(tmp_path / "x.keras")
    for file in ("x.weights.h5", "x.keras"):
        carried = importing.from_full_tables(importing.read_arrays(tmp_path / file))
        assert sorted(carried) == sorted(names)
        for name in names:
            wanted = model.get_layer(name).get_weights()[0]
            np.testing.assert_array_equal(carried[name].tables[0], wanted)


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_tensorflow(tmp_path, rng):
    tf = pytest.importorskip("tensorflow", reason="what CI has beside the tests")
    arrays = {
        "deep/user/multhash_Q": _normal(rng, 12, 3),
        "deep/user/multhash_R": _normal(rng, 15, 3),
        "embedding_bags.ads.weight": _normal(rng, 5, 3),
    }
    names = [*arrays, "words"]
    tensors = [*arrays.values(), np.array(["no", "number"])]
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "x.ckpt"),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=tensors,
    )
    found = importing.read_arrays(tmp_path / "x.ckpt")
    assert sorted(found) == sorted(arrays)
    carried = importing.from_deeprec(found)["deep/user"]
    np.testing.assert_array_equal(carried.tables[1], arrays["deep/user/multhash_R"])
    saved = tf.train.Checkpoint(items=tf.Variable(arrays["embedding_bags.ads.weight"]))
    found = importing.read_arrays(saved.save(str(tmp_path / "y")))
    np.testing.assert_array_equal(found["items"], arrays["embedding_bags.ads.weight"])


def _convert(*arguments):
    return CliRunner().invoke(
        cli.build_app(),
        ["convert", *map(str, arguments)],
        env={"COLUMNS": "200"},
        catch_exceptions=False,
    )


def test_the_command(tmp_path, qr):
    source, output = tmp_path / "dlrm.npz", tmp_path / "out.safetensors"
    np.savez(source, **_prefixed("emb_l.0", qr))
    result = _convert(source, output, "--from=dlrm", "--operation=add")
    assert result.exit_code == 0, result.output
    assert "QuotientRemainder of 26 + 4 rows, add" in result.output
    ids = np.arange(N)
    wanted = qr["weight_q"][ids // M] + qr["weight_r"][ids % M]
    np.testing.assert_array_equal(export.Snapshot(output).lookup(ids, "emb_l.0"), wanted)
    for arguments, words in (
        ((source, output, "--from=dlrm"), "exists; choose another file, or --overwrite it."),
        ((source, tmp_path / "o", "--from=keras"), "--from must be one of dlrm, deeprec, tables"),
        ((source, tmp_path / "o", "--from=tables"), "say which are, by names, or --name NAME="),
        ((source, tmp_path / "o", "--from=tables", "--name=a"), "--name must be NAME=ARRAY, got a"),
        (
            (source, tmp_path / "o", "--from=deeprec", "--name=a=b"),
            "--name goes with --from tables",
        ),
        ((source, tmp_path / "o", "--from=dlrm", "--rows=int2"), "--rows must be one of float32"),
        ((tmp_path / "none.npz", tmp_path / "o", "--from=dlrm"), "is not there"),
        ((source, tmp_path / "none" / "o", "--from=dlrm"), "There is no directory"),
    ):
        result = _convert(*arguments)
        assert result.exit_code == 1, result.output
        assert words in " ".join(result.output.split())
    assert not (tmp_path / "o").exists()
