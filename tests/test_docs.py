"""What the documentation shows runs, as it stands there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from helpers import save_tiny_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "Rain fell on the roof, and nobody in the house was awake to hear it but the cat. " * 20


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with what the pages take for granted: a model and texts."""
    pytest.importorskip("transformers", minversion="5")
    save_tiny_model(tmp_path / "MODEL")
    for name in ("TEXT.txt", "CALIBRATION.txt"):
        (tmp_path / name).write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module("fasticl.convert"), "SECONDS", 1e-3)
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore:Magnitude:UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_a_page_runs(page: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks, f"{page.name}: expected a Python example, got none"
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing, f"{page.name}: links to {', '.join(missing)}"


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text]
    assert not missing, f"not in README.md: {', '.join(missing)}"
