"""Doors open upward only, files are chapters, and `import qrhash` stays light."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import qrhash
import qrhash.ctr

PACKAGE = pathlib.Path(qrhash.__file__).parent

# The rooms in reading order (docs/design.md), each with the outside packages that it may import.
ROOMS = {
    "arithmetic": {"numpy"},
    "types": {"jax", "numpy"},
    "tuning": {"jax"},
    "partitions": {"numpy"},
    "families": {"numpy"},
    "carried_families": {"numpy"},
    "strings": {"numpy"},
    "lengths": {"numpy"},
    "words": {"numpy"},
    "key_families": {"numpy"},
    "code_partition": {"numpy"},
    "operations": {"numpy"},
    "policies": {"jax", "numpy"},
    "delta_files": {"ml_dtypes", "numpy"},
    "keys": {"jax"},
    "rows": {"jax", "numpy"},
    "merge": {"jax"},
    "ragged": {"jax", "numpy"},
    "bags": {"jax", "numpy"},
    "pooling": {"jax"},
    "protocol": {"jax"},
    "storage": {"jax"},
    "opaque": {"jax"},
    "rowgrads": {"jax"},
    "grads": {"jax"},
    "take": {"jax"},
    "pooled": {"jax"},
    "local": {"jax"},
    "layout": {"jax", "numpy"},
    "exchange": {"jax"},
    "exchange_grads": {"jax"},
    "sharded": {"jax", "numpy"},
    "replicated": {"jax"},
    "batches": {"jax", "numpy"},
    "kinds": {"jax", "numpy"},
    "fields": {"jax", "numpy"},
    "budget": {"jax", "numpy"},
    "config": {"jax", "numpy"},
    "threefry": {"jax"},
    "initializers": {"jax"},
    "tables": {"jax", "numpy"},
    "bag_sums": {"jax"},
    "vectors": {"jax", "numpy"},
    "row_training": {"jax"},
    "logits": {"jax", "numpy"},
    "parts": {"jax"},
    "spans": {"numpy"},
    "stacks": {"jax", "numpy"},
    "plans": {"jax"},
    "joining": {"jax"},
    "collection": {"jax"},
    "inspection": {"numpy"},
    "jaxprs": {"jax"},
    "program": {"jax"},
    "plain": {"jax"},
    "autodiff": {"jax", "numpy"},
    "optim": {"jax", "numpy", "optax"},
    "dynamic": {"jax", "numpy", "optax"},
    "planning": {"numpy"},
    "linen": {"jax", "flax"},
    "nnx": {"jax", "flax", "optax"},
    "deeprec": {"jax", "flax", "numpy"},
    "checkpoint": {"jax", "numpy", "flax", "orbax"},
    "export": {"ml_dtypes", "numpy", "safetensors"},
    "importing": {"jax", "numpy", "h5py", "safetensors", "tensorflow", "torch"},
    "codes": {"numpy", "scipy", "sklearn", "rich"},
    "fitting": {"jax", "numpy"},
    "ctr": {
        "jax",
        "flax",
        "optax",
        "numpy",
        "grain",
        "pyarrow",
        "rich",
        "matplotlib",
        "safetensors",
        *("jax2onnx", "onnxruntime", "orbax", "tensorflow"),
    },
    "serving": {"flatbuffers", "jax", "numpy", "pyarrow", "rich", "starlette", "uvicorn"},
    "commands": {"rich", "typer"},
    "cli": {"typer"},
}

# The rooms inside of a room that is a folder, in reading order.
INSIDE = {
    "inspection": ["blocks", "frequency", "twins", "traffic", "similarity"],
    "optim": [
        "refusals",
        "state",
        "checks",
        "blocks",
        "accumulators",
        "rounding",
        "resets",
        "wrapper",
    ],
    "dynamic": [
        *("slots", "newcomers", "index", "upkeep", "admission", "eviction"),
        *("key_exchange", "sharded", "config", "found", "embedding"),
        *("collections", "growth", "resharding", "deltas"),
        *("cached", "store", "residents", "records", "numbering", "traffic", "tier_files", "tiers"),
    ],
    "planning": [
        *("traffic", "memory", "columns", "candidates", "growing", "knapsack", "planner"),
    ],
    "linen": ["variables", "modules", "dynamic"],
    "nnx": ["variables", "modules", "dynamic", "gradients", "optimizer"],
    "deeprec": ["options", "variable", "tiered", "interface", "embedding_variable"],
    "checkpoint": ["writing", "damage", "files", "metadata", "leaves", "shards", "checkpoints"],
    "export": ["row_formats", "tensors", "header", "pooling", "embeddings", "snapshot", "saving"],
    "importing": ["arrays", "carried", "dlrm", "deeprec", "full"],
    "fitting": [
        *("blocks", "expanding", "errors", "equations", "additive", "alternating", "starts"),
        *("scales", "fits", "growing"),
    ],
    "serving": [
        *(
            "limits",
            "replaced",
            "arrow_streams",
            "bodies",
            "model",
            "reading",
            "metrics",
            "batcher",
        ),
        *("vectors", "reloading", "transfer", "app", "protocol", "server", "load"),
    ],
    "commands": [
        *("interrupts", "parameters", "running"),
        *("training", "inspecting", "exporting", "converting", "choosing", "serving"),
    ],
    "ctr": re.findall(r"^  ([\w/]+)  ", qrhash.ctr.__doc__, flags=re.MULTILINE),
}

HEAVY = {
    *(
        "torch",
        "tensorflow",
        "jax2onnx",
        "onnxruntime",
        "orbax",
        "pyarrow",
        "matplotlib",
        "grain",
        "typer",
        "rich",
        "sklearn",
    ),
    *("starlette", "uvicorn"),
    *("IPython", "nbformat", "notebook", "nbclient", "jupyter_core"),
}
MOST_LINES = 365

# Where it may be asked which kind a table is: the kinds themselves, and the doors.
KINDS = {"sharded.py", "replicated.py", "local.py", "kinds.py", "initializers.py"}
KINDS |= {"nnx/variables.py", "__init__.py"}


def _name(path):
    return str(path.relative_to(PACKAGE)).removesuffix(".py")


def _room(path):
    return _name(path).split("/")[0]


def _modules():
    paths = sorted(PACKAGE.rglob("*.py"))
    return [path for path in paths if path != PACKAGE / "__init__.py"]


per_module = pytest.mark.parametrize("path", _modules(), ids=_name)


def _imports(path):
    """Dotted names that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: import by full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _broken_doors(path):
    rooms = list(ROOMS)
    here = _room(path)
    for name in _imports(path):
        top, _, rest = name.partition(".")
        there = rest.split(".")[0]
        if top != "qrhash":
            if top not in ROOMS[here] | set(sys.stdlib_module_names):
                yield f"{here} imports {top}"
        elif rest == "__version__":
            continue
        elif there not in rooms:
            # The package's own names stand for its core: open to what stands around it.
            if here not in ("ctr", "serving", "commands", "cli"):
                yield f"{here} imports {name} from the package, not from its room"
        elif rooms.index(there) > rooms.index(here):
            yield f"{here} imports {name}, a room below it"
        elif there == here and path != PACKAGE / here / "__init__.py":
            yield from _broken_doors_inside(here, path, rest)


def _broken_doors_inside(room, path, dotted):
    inside = INSIDE[room]
    parts = dotted.split(".")[1:]
    there = next((n for n in ("/".join(parts[:2]), parts[0]) if n in inside), None)
    here = _name(path).partition("/")[2]
    if here not in inside:
        yield f"{here} imports {dotted}, and is no room that could"
    elif there is None:
        yield f"{here} imports {dotted}, which is no room of {room}"
    elif inside.index(there) >= inside.index(here):
        yield f"{here} imports {there}, a room of {room} that is not above it"


@per_module
def test_a_module_imports_only_rooms_above_it(path):
    assert _room(path) in ROOMS
    assert not list(_broken_doors(path))


def test_the_rooms_are_the_files():
    assert {_room(path) for path in _modules()} == set(ROOMS)
    for room, inside in INSIDE.items():
        files = {_name(path).partition("/")[2] for path in (PACKAGE / room).rglob("*.py")}
        assert {name for name in files if not name.endswith("__init__")} == set(inside)
        assert len(inside) == len(set(inside))


@per_module
def test_a_file_is_a_chapter(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


@per_module
def test_nobody_asks_which_kind_a_table_is(path):
    if str(path.relative_to(PACKAGE)) in KINDS:
        return
    text = path.read_text()
    for kind in ("ShardedTable", "ReplicatedTable", "LocalTable"):
        assert not re.search(rf"^(from|import) .*\b{kind}\b", text, flags=re.MULTILINE)
        assert not re.search(rf"isinstance\([^)]*\b{kind}\b", text)


@per_module
def test_choices_by_platform_are_in_one_room(path):
    if path.name != "tuning.py":
        assert not re.search(r"default_backend|platform_dependent", path.read_text())


def _loaded_by(code):
    code += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_qrhash_stays_light():
    loaded = _loaded_by("import qrhash; qrhash.EmbedConfig, qrhash.lookup")
    assert "jax" in loaded
    assert not loaded & HEAVY


def test_the_flax_modules_are_attributes_loaded_on_first_use():
    code = "import qrhash; qrhash.linen.MultiHashEmbed, qrhash.nnx.MultiHashEmbed"
    code += ", qrhash.deeprec.get_multihash_variable, qrhash.deeprec.embedding_lookup"
    assert not _loaded_by(code) & {"torch", "pyarrow", "matplotlib", "grain", "typer"}
    with pytest.raises(AttributeError, match="no_such_room"):
        _ = qrhash.no_such_room


def test_public_names_hold():
    names = "FullTable HashTrick QuotientRemainder MixedRadix ChineseRemainder EmbedConfig combine"
    names += " init gather lookup deeprec"
    names += " RowGrads touched_rows apply_updates MeshLayout ShardedTable checkpoint"
    assert set(names.split()) <= set(qrhash.__all__)
    assert "DeepRecQuotientRemainder" not in qrhash.__all__
    assert all(hasattr(qrhash, name) for name in (*qrhash.__all__, "linen", "nnx"))


def test_a_star_import_leaves_the_modules_of_flax_alone():
    code = "from flax import linen, nnx; from qrhash import *"
    code += "; assert linen.__name__ == 'flax.linen' and nnx.__name__ == 'flax.nnx'; EmbedConfig"
    subprocess.run([sys.executable, "-c", code], check=True)
