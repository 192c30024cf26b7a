"""Doors open upward only, and `import qrhash` stays light."""

import ast
import pathlib
import subprocess
import sys

import pytest

import qrhash

PACKAGE = pathlib.Path(qrhash.__file__).parent

# The rooms in reading order (DESIGN.md), each with the outside packages that it may import.
ROOMS = {
    "arithmetic": {"numpy"},
    "partitions": {"numpy"},
    "combine": {"jax", "chex"},
    "rows": {"jax", "chex", "numpy"},
    "take": {"jax", "chex"},
    "sharding": {"jax", "chex", "numpy"},
    "config": {"jax", "numpy"},
    "tables": {"jax", "chex", "numpy"},
    "collection": {"jax", "chex", "numpy"},
    "rowgrads": {"jax", "chex"},
    "autodiff": {"jax"},
    "transformations": {"jax", "numpy", "optax"},
    "optim": {"jax", "chex", "optax"},
    "linen": {"jax", "chex", "flax"},
    "nnx": {"jax", "chex", "flax", "optax"},
    "deeprec": {"jax", "chex", "flax", "numpy"},
    "checkpoint": {"jax", "numpy", "flax", "orbax"},
    "ctr": {
        *("jax", "chex", "flax", "optax", "numpy"),
        *("grain", "pyarrow", "rich", "matplotlib"),
    },
    "cli": {"jax", "numpy", "rich", "typer"},
}
HEAVY = {
    *("torch", "orbax", "pyarrow", "matplotlib", "grain", "typer", "rich"),
    *("IPython", "nbformat", "notebook", "nbclient", "jupyter_core"),
}


def _room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _modules():
    paths = sorted(PACKAGE.rglob("*.py"))
    return [path for path in paths if path != PACKAGE / "__init__.py"]


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
        elif there not in rooms:
            # The package's own names stand for its core: open to what stands around it.
            if here not in ("ctr", "cli"):
                yield f"{here} imports {name} from the package, not from its room"
        elif rooms.index(there) > rooms.index(here):
            yield f"{here} imports {name}, a room below it"


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_rooms_above_it(path):
    assert _room(path) in ROOMS
    assert not list(_broken_doors(path))


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
    names += " DeepRecQuotientRemainder init gather lookup deeprec"
    names += " RowGrads touched_rows apply_updates Sharding ShardedTable checkpoint"
    assert set(names.split()) <= set(qrhash.__all__)
    assert all(hasattr(qrhash, name) for name in (*qrhash.__all__, "linen", "nnx"))


def test_a_star_import_leaves_the_modules_of_flax_alone():
    code = "from flax import linen, nnx; from qrhash import *"
    code += "; assert linen.__name__ == 'flax.linen' and nnx.__name__ == 'flax.nnx'; EmbedConfig"
    subprocess.run([sys.executable, "-c", code], check=True)
