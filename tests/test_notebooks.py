"""The notebooks run as they stand, on small settings; none is committed with outputs, which would be one machine's."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import fasticl

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"
NAMES = ["formats-and-kernels.ipynb", "icl-and-pruning.ipynb", "prune-and-convert.ipynb"]
FULL, QUICK = "QUICK = False", "QUICK = True"  # the first code cell's switch


def read(name: str) -> Any:
    return nbformat.read(FOLDER / name, as_version=4)


def test_every_notebook_is_tested() -> None:
    assert sorted(path.name for path in FOLDER.iterdir() if path.suffix == ".ipynb") == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_without_outputs(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    ran = [cell.id for cell in code if cell.outputs or cell.execution_count is not None]
    assert not ran, f"{name}: clear the outputs of {', '.join(ran)}"
    assert code[0].source.startswith(f"{FULL}  #"), f"{name}: expected the first code cell to begin with {FULL}"


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+?)\)", text)
    missing = [link for link in links if "://" not in link and not (FOLDER / link).exists()]
    assert not missing, f"{name}: links to {', '.join(missing)}"
    assert f"(docs/notebooks/{name})" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fresh kernel of this interpreter, from an empty folder, without the network."""
    for package in ("ipykernel", "matplotlib", "transformers"):
        pytest.importorskip(package)
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(fasticl.__file__).parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    for folder in ("DATA", "RUNTIME", "CONFIG"):  # no kernel, nor setting, of the user's own
        monkeypatch.setenv(f"JUPYTER_{folder}_DIR", str(tmp_path / folder.lower()))
    notebook = read(name)
    settings = next(cell for cell in notebook.cells if cell.cell_type == "code")
    settings.source = settings.source.replace(FULL, QUICK)
    notebook.cells.append(
        nbformat.v4.new_code_cell("import sys\n\nimport fasticl\n\nprint(QUICK, sys.executable, fasticl.__file__)")
    )
    (work := tmp_path / "empty").mkdir()
    client = nbclient.NotebookClient(
        notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(work)}}
    )
    client.execute()
    assert notebook.cells[-1].outputs[0].text.split() == ["True", sys.executable, fasticl.__file__]
    assert not list(work.iterdir()), f"{name} leaves {', '.join(path.name for path in work.iterdir())} behind"
