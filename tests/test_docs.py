"""The notebooks run, and so do the README's examples."""

import pathlib
import re

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.name)
@pytest.mark.filterwarnings("default")  # Jupyter's own warnings are not ours.
def test_notebook_runs(path, monkeypatch):
    # The kernel is one more process: it sees one device, as a user's does.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_readme_example_runs(number, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them leaves checkpoints behind
    code = EXAMPLES[number]
    exec(compile(code, f"README example {number}", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.strip().splitlines()
    promised = re.findall(r"print\(.*\)  +# (.*)", code)
    assert printed[: len(promised)] == promised


def test_readme_commands_are_those_of_ci():
    install_and_test = 'pip install -e ".[test]" && pytest'
    assert install_and_test in README
    assert install_and_test in (ROOT / ".ci" / "run").read_text()
