"""Notebooks run, and the examples of the README and of `docs/`; the rooms named are the files."""

import operator
import pathlib
import re

import nbclient
import nbformat
import pytest
from test_architecture import INSIDE, PACKAGE, ROOMS

import qrhash

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
EXAMPLES = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    )
]
REFERENCE = "".join(page.read_text() for page in ROOT.glob("docs/reference/*.md"))


# What they show has tests of its own; each takes half a minute.
# Every CI opens the first one.
SLOW_NOTEBOOKS = [path.stem for path in sorted(ROOT.glob("notebooks/*.ipynb"))[1:]]
NOTEBOOKS = [
    pytest.param(
        path, id=path.name, marks=[pytest.mark.slow] if path.stem in SLOW_NOTEBOOKS else []
    )
    for path in sorted(ROOT.glob("notebooks/*.ipynb"))
]


@pytest.mark.parametrize("path", NOTEBOOKS)
@pytest.mark.filterwarnings("default")  # Jupyter's own warnings are not ours.
def test_notebook_runs(path, monkeypatch, tmp_path_factory):
    # The kernel is one more process: it sees one device, as a user's does.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    # What one notebook compiles, the others take over.
    cache = tmp_path_factory.getbasetemp() / "notebooks"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    notebook = nbformat.read(path, as_version=4)
    shown = _pictures(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    assert _pictures(notebook) == shown > 0


def _pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them leaves checkpoints behind
    exec(compile(code, "example", "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out.strip().splitlines()
    promised = re.findall(r"print\(.*\)  +# (.*)", code)
    assert printed[: len(promised)] == promised


def test_readme_commands_are_those_of_ci():
    install_and_test = 'pip install -e ".[test]" && pytest'
    assert install_and_test in README
    assert install_and_test in (ROOT / ".ci" / "run").read_text()


def _table(heading):
    """Cells of the rows of the tables below a heading of docs/design.md."""
    page = (ROOT / "docs" / "design.md").read_text()
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*) \|$", section, flags=re.MULTILINE)
    return [row.split(" | ") for row in rows]


def test_the_rooms_of_the_design_are_the_files_in_the_order_that_doors_open():
    rooms = [room for cell, *_ in _table("The rooms") for room in re.findall(r"^`(.*)`$", cell)]
    names = [room.removesuffix("/").removesuffix(".py") for room in rooms]
    assert names == list(ROOMS)
    assert all((PACKAGE / room).exists() for room in rooms)


def test_the_design_names_the_rooms_in_its_folders():
    words = {cell: "".join(of) for cell, *of in _table("The rooms")}
    for folder, inside in INSIDE.items():
        named = re.findall(r"`(\w+)/?`", words[f"`{folder}/`"])
        wanted = {room.partition("/")[0] for room in inside}
        assert wanted <= set(named)
        if folder != "ctr":
            assert [name for name in named if name in wanted] == inside


def test_where_is_names_rooms_and_lines_that_are_there():
    for _, where, *begin in _table("Where is...?")[1:]:
        rooms = [PACKAGE / room for room in re.findall(r"`([\w/]+(?:\.py|/))`", where)]
        assert all(room.exists() for room in rooms), where
        text = "".join(room.read_text() for room in rooms if room.is_file())
        for name in re.findall(r"`([\w.]+)`", "".join(begin)):
            assert re.search(rf"\b{name}\b", text), name


def test_the_reference_has_all_public_names():
    documented = set(re.findall(r"^::: qrhash\.(.*)$", REFERENCE, flags=re.MULTILINE))
    modules = {name.split(".")[0] for name in documented}
    missing = {name for name in qrhash.__all__ if name not in documented | modules}
    assert not missing


def test_the_members_that_the_reference_names_are_there():
    listed = r"^::: qrhash\.(.*)\n    options:(?:\n      .*)*?\n      members: \[(.*)\]"
    for name, members in re.findall(listed, REFERENCE, flags=re.MULTILINE):
        owner = operator.attrgetter(name)(qrhash)
        assert [each for each in members.split(", ") if not hasattr(owner, each)] == []
