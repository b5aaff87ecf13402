"""One op, one story: what is registered has its files; what is written fits every machine; importing stays light."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fasticl

ROOT = Path(__file__).parents[1]
OPS = sorted(fasticl.implementations())
# Packages that the package uses where they are, and must do without where they are not.
OPTIONAL = ["accelerate", "gguf", "lm_eval", "matplotlib", "nvtx", "onnxruntime", "transformers", "triton"]
# Imported by nobody who only multiplies: each costs 0.1 to 5 s.
HEAVY = [*OPTIONAL, "rich", "typer", "torch._dynamo", "torch._inductor"]


def written_files() -> list[Path]:
    folders = [ROOT / name for name in (".ci", "benchmarks", "csrc", "docs", "fasticl", "kernels", "tests")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix not in {".pyc", ".so", ".png"}]
    return sorted(path for path in [*files, *ROOT.iterdir()] if path.is_file())


def test_ops_are_registered() -> None:
    assert sorted(path.stem for path in (ROOT / "fasticl" / "ops").glob("[!_]*.py")) == OPS
    assert OPS, "no op is registered"


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_files(op: str) -> None:
    runs = fasticl.implementations()[op]
    expected = [f"fasticl/ops/{op}.py", f"tests/test_{op}.py", f"benchmarks/bench_{op}.py"]
    if runs["cpu"].startswith("C++"):
        expected.append(f"csrc/{op}_cpu.cpp")
    if runs["cuda"].startswith("Triton"):
        expected.append(f"kernels/{op}.py")
    if runs["cuda"].startswith("CUDA"):
        expected.append(f"csrc/{op}_cuda.cu")
    missing = [name for name in expected if not (ROOT / name).is_file()]
    assert not missing, f"{op} ({runs}) lacks {', '.join(missing)}"


def test_kernels_have_their_op() -> None:
    kernels = {re.sub(r"(_wgmma)?_(cpu|cuda)$", "", path.stem) for path in (ROOT / "csrc").glob("*_c[pu]*.c[pu]*")}
    kernels -= {"bindings"}
    kernels |= {path.stem for path in (ROOT / "kernels").glob("[!_]*.py")}
    assert kernels <= set(OPS), f"kernels of no registered op: {sorted(kernels - set(OPS))}"


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(?<![\w.~-])/(root|work|home/\w+|Users/\w+)/", "a path of one machine"),
        (r"-m(arch|tune)=nativ[e]", "a build that runs on one machine only"),
        (r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b", "unfinished"),
    ],
)
def test_no_file_says(pattern: str, why: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in written_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, "\n".join([why, *found])


def test_one_version() -> None:
    assert importlib.metadata.version("fasticl") == fasticl.__version__


def test_public_names_exist() -> None:
    missing = [name for name in fasticl.__all__ if not hasattr(fasticl, name)]
    assert not missing, f"named in fasticl.__all__ but absent: {', '.join(missing)}"


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_works_without_optional_packages() -> None:
    code = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {OPTIONAL} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without

import torch
import fasticl

weight = torch.randn(32, 64) * (torch.rand(32, 64) < 0.5)
x = torch.randn(3, 64)
torch.testing.assert_close(fasticl.ops.bitmap_linear(x, fasticl.pack(weight, "bitmap")), x @ weight.T)
print(*(name for name in {OPTIONAL} if name in sys.modules))
"""
    assert python(code) == ""


def test_import_is_light() -> None:
    """Beyond torch itself, ``import fasticl`` takes under half a second of CPU time and pulls in nothing heavy."""
    code = f"""
import sys, time
import torch
before, start = set(sys.modules), time.process_time()
import fasticl
seconds = time.process_time() - start
print(f"{{seconds:.3f}}", *sorted({set(HEAVY)} & (set(sys.modules) - before)))
"""
    seconds, *heavy = python(code).split()
    assert not heavy, f"import fasticl imports {', '.join(heavy)}"
    assert float(seconds) < 0.5, f"import fasticl takes {seconds} s beyond torch"
