"""What nvcc makes of the CUDA kernels: registers, no spills, tensor cores, instructions a position. Needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
# The wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or a CUDA toolkit.
TOOLS = os.pathsep.join([*(str(Path(folder, "nvidia/cu13/bin")) for folder in sys.path), os.environ["PATH"]])
CUOBJDUMP = shutil.which("cuobjdump", path=TOOLS)
ARCHITECTURES = ["80", "90a"]
REGISTERS = 168  # three blocks of 128 threads a multiprocessor, 65536 registers, 8 at a time

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
needs_cuobjdump = pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The machine code of bitmap_linear, and what ptxas says of it."""
    return compile_kernels("bitmap_linear", request.param, tmp_path_factory.mktemp("cubin"))


def compile_kernels(op: str, architecture: str, folder: Path) -> tuple[Path, str]:
    """The machine code of csrc/<op>_cuda.cu, and what ptxas says of it: a spill is an error."""
    cubin = folder / f"{architecture}.cubin"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [NVCC, "-O3", "-std=c++17", "-cubin", target, "-Icsrc", f"csrc/{op}_cuda.cu", "-o", str(cubin)]
    command += ["-Xptxas=-v,-warn-spills,-warn-lmem-usage,-Werror"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cubin, done.stderr


def kernels_of(cubin: Path) -> dict[str, list[tuple[int, str]]]:
    """Address and text of each instruction, by kernel."""
    command = [CUOBJDUMP, "-sass", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PATH": TOOLS}).stdout
    found: dict[str, list[tuple[int, str]]] = {}
    for line in text.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            instructions = found.setdefault(match[1], [])
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            instructions.append((int(match[1], 16), match[2]))
    return found


@needs_nvcc
def test_registers_and_no_spills(compiled: tuple[Path, str]) -> None:
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", compiled[1])]
    assert len(registers) == 8  # two dtypes, four widths of tokens
    assert max(registers) <= REGISTERS
    assert (
        re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled[1])
        == [("0", "0", "0")] * 8
    )


@needs_nvcc
@needs_cuobjdump
def test_machine_code(compiled: tuple[Path, str]) -> None:
    kernels = kernels_of(compiled[0])
    assert len(kernels) == 8
    for name, instructions in kernels.items():
        tiles = int(re.search(r"Li(\d)E", name)[1])
        kind = "BF16" if "4bf16" in name else "F32"
        products = [at for at, text in instructions if re.search(rf"HMMA\.16816\.F32(\.{kind})?", text)]
        assert len(products) == 4 * tiles, name
        local = [text for _, text in instructions if re.search(r"\b(LDL|STL)\b", text)]
        assert not local, f"{name}: local memory: {local[:3]}"
        assert sum("LDGSTS" in text for _, text in instructions) >= 3, name
        # Blocks that share a strip: barrier, fence, count, fence, barrier.
        meeting = [text for _, text in instructions if re.search(r"\b(BAR\.(SYNC|RED)|MEMBAR|ATOMG?)\.", text)]
        kinds = "".join(re.search(r"\b(BAR|MEM|ATOM)", text)[0][0] for text in meeting)
        assert re.search("BMA+MB", kinds), f"{name}: {meeting}"
        assert all("GPU" in text for text in meeting if "MEMBAR" in text), f"{name}: {meeting}"
        if tiles == 1:
            # From the fetch (the commit of its copies, within the loop) to the loop's end: 32 positions a lane.
            begin = max(at for at, text in instructions if "LDGDEPBAR" in text and at < products[0])
            end = next(at for at, text in instructions if at > products[-1] and "BRA" in text)
            count = sum(begin < at <= end for at, _ in instructions)
            assert count <= 5 * 32, f"{name}: {count / 32:.2f} instructions a position, with the products"


@needs_nvcc
@needs_cuobjdump
def test_machine_code_of_bitmap_linear_wgmma(tmp_path: Path) -> None:
    """No registers spilled, products that need not wait for each other, rows by bulk copies, few instructions."""
    cubin, said = compile_kernels("bitmap_linear_wgmma", "90a", tmp_path)
    assert "serialized" not in said, said
    assert len(re.findall(r"Used (\d+) registers", said)) == 6  # two dtypes, three widths of tokens
    kernels = kernels_of(cubin)
    assert len(kernels) == 6
    for name, instructions in kernels.items():
        tiles = int(re.search(r"Li(\d)E", name)[1])
        kind = r"\.BF16" if "4bf16" in name else ""
        texts = [text for _, text in instructions]
        products = [at for at, text in enumerate(texts) if re.search(rf"HGMMA\.64x64x16\.F32{kind} R", text)]
        assert len(products) == 2 * 4 * tiles, name  # of an even and an odd chunk
        local = [text for text in texts if re.search(r"\b(LDL|STL)\b", text)]
        assert not local, f"{name}: local memory: {local[:3]}"
        assert sum("UBLKCP" in text for text in texts) == 2, name  # rows, and those that lie in the ring twice
        assert not [text for text in texts if "LDGSTS" in text], name
        assert sum("SYNCS.PHASECHK" in text for text in texts) >= 1, name
        assert sum("LDG.E.128" in text for text in texts) == 3 * 4 * max(1, tiles // 2), name
        starts = [at for at, text in enumerate(texts) if "WARPGROUP.ARRIVE" in text]
        waits = [at for at, text in enumerate(texts) if "WARPGROUP.DEPBAR" in text]
        assert len(starts) == 2, name
        assert len(waits) == 3, name  # before the products of a chunk, and after the last ones
        for start in starts:
            # Before the products: the last ones have read their operands, what was stored is seen, and all have come.
            before = [text for text in texts[:start] if re.search("WARPGROUP.DEPBAR|FENCE.VIEW.ASYNC|BAR.SYNC", text)]
            assert [text.split(".")[0] for text in before[-3:]] == ["WARPGROUP", "FENCE", "BAR"], name
            # From the first nibble to the last value: 32 positions a lane.
            nibbles = [at for at, text in enumerate(texts[:start]) if re.search(r"\bLDS\.64\b", text)][-8:]
            last = max(at for at, text in enumerate(texts[:start]) if re.search("PRMT R.*RZ", text))
            count = (last - nibbles[0] + 1) / 32
            assert count <= 5, f"{name}: {count:.2f} instructions a position"
    elsewhere, _ = compile_kernels("bitmap_linear_wgmma", "80", tmp_path)
    assert all(len(instructions) < 40 for instructions in kernels_of(elsewhere).values())  # no body


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_of_nm_linear(architecture: str, tmp_path: Path) -> None:
    """No registers spilled, all products sparse, and weight and tokens move by 16 bytes a lane."""
    cubin, said = compile_kernels("nm_linear", architecture, tmp_path)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    kernels = kernels_of(cubin)
    assert len(registers) == len(kernels) == 24  # two dtypes, four widths of tokens, three of outputs
    assert max(registers) <= 255  # of 8 warps, which are all that a multiprocessor has room for
    for name, instructions in kernels.items():
        tiles, strips = map(int, re.search(r"Li(\d)ELi(\d)E", name).groups())
        kind = r"\.BF16" if "4bf16" in name else ""
        texts = [text for _, text in instructions]
        products = [text for text in texts if "HMMA" in text]
        for selector in (0, 1):
            exact = rf"HMMA\.SP\.16832\.F32{kind} .*, 0x{selector}"
            assert sum(re.search(exact, text) is not None for text in products) == tiles * strips, name
        assert len(products) == 2 * tiles * strips, name
        assert not [text for text in texts if re.search(r"\b(LDL|STL)\b", text)], f"{name}: local memory"
        # Of a chunk the values of two steps; operands B of its steps and tiles.
        assert sum("LDS.128" in text for text in texts) == 2 * strips, name
        assert sum("LDSM.16.M88.4" in text for text in texts) == 2 * tiles, name
        copies = [text for text in texts if "LDGSTS" in text]
        wide = [text for text in copies if ".BYPASS.128" in text]
        assert len(wide) >= 2 * strips + 1 + 2 * tiles, name
        begin = min(at for at, text in instructions if "HMMA" in text)
        end = max(at for at, text in instructions if "HMMA" in text)
        assert not [text for at, text in instructions if begin < at < end and re.search(r"\bLDG\.", text)], name


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_of_sliced_linear(architecture: str, tmp_path: Path) -> None:
    """No registers spilled, one read of x an entry, and about as many instructions as its header says."""
    cubin, said = compile_kernels("sliced_linear", architecture, tmp_path)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    kernels = kernels_of(cubin)
    assert len(registers) == len(kernels) == 8  # two dtypes, four widths of tokens
    assert max(registers) <= 128  # of 16 warps, which a block has
    for name, instructions in kernels.items():
        tokens = int(re.search(r"Li(\d)E", name)[1])
        ahead, width = (4 if tokens == 8 else 8), {1: "", 2: ".64", 4: ".64", 8: ".128"}[tokens]
        texts = [text for _, text in instructions]
        assert not [text for text in texts if re.search(r"\b(LDL|STL)\b", text)], f"{name}: local memory"
        reads = [at for at, text in enumerate(texts) if re.search(r"\bLDS\b", text)]
        assert len(reads) == 6 * ahead, name
        assert all(re.search(rf"LDS{re.escape(width)} ", texts[at]) for at in reads), name
        # From the first read of a record to that of the last one.
        count = (reads[-6] - reads[0]) / (6 * (ahead - 1))
        assert count <= {1: 8, 2: 9, 4: 15, 8: 24}[tokens], f"{name}: {count:.2f} instructions an entry"
        # Records come by 16 bytes a lane: those under way at the start, and one after each that was multiplied, which
        # nothing waits for until the registers are needed.
        loads = [at for at, text in enumerate(texts) if "LDG.E.128" in text]
        assert len(loads) == 2 * ahead, name
        for at in loads[ahead:]:
            register = int(re.search(r"LDG\.E\.128\S* R(\d+)", texts[at])[1])
            following = texts[at + 1 : min([read for read in reads if read > at + 12], default=at + 12)]
            held = "|".join(f"R{register + i}" for i in range(4))
            assert not [text for text in following if re.search(rf", ({held})\b", text)], (
                f"{name}: waits for {texts[at]}"
            )


def test_the_module_needs_no_driver() -> None:
    """It imports and, without a GPU, says at a launch what is missing."""
    cuda = pytest.importorskip("fasticl._C_cuda")
    assert cuda.lane_stream["RING"] > 0
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"bitmap_linear: .*needs an NVIDIA GPU and a driver for CUDA \d+\.\d"):
            cuda.bitmap_linear(0, 1, 64, 0, 0, 0, 0, 1, 64, 1, 1, 4, 0, 0, 0, 0, 64, 1, 0, 0)
        with pytest.raises(RuntimeError, match=r"bitmap_linear: .*needs an NVIDIA GPU and a driver for CUDA \d+\.\d"):
            cuda.has_bitmap_linear_wgmma(0)
        with pytest.raises(RuntimeError, match=r"nm_linear: .*needs an NVIDIA GPU and a driver for CUDA \d+\.\d"):
            cuda.nm_linear(0, 1, 64, 0, 1, 64, 0, 0, 0, 64, 1, 0, 0)
        with pytest.raises(RuntimeError, match=r"sliced_linear: .*needs an NVIDIA GPU and a driver for CUDA \d+\.\d"):
            cuda.sliced_linear(0, 1, 64, 0, 0, 0, 1, 64, 1, 1, 1, 0, 0, 0, 0, 64, 1, 0, 0)


@needs_cuobjdump
def test_the_module_has_code_for_all_targets() -> None:
    cuda = pytest.importorskip("fasticl._C_cuda")
    for option, expected in (("--list-elf", {"sm_80", "sm_90a"}), ("--list-ptx", {"sm_80"})):
        command = [CUOBJDUMP, option, cuda.__file__]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert set(re.findall(r"\.(sm_\w+)\.", listed)) == expected


# ---- setup.py, with an nvcc that fails ------------------------------------------------------------------------------

BUILD = """
import importlib.util, sys
from setuptools.dist import Distribution
from setuptools.errors import CompileError

spec = importlib.util.spec_from_file_location("setup", "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)
cuda = [extension for extension in setup.extensions if extension.name == "fasticl._C_cuda"]
print("extensions:", len(cuda))
if cuda:
    command = setup.BuildExtension(Distribution({"name": "fasticl", "ext_modules": cuda}))
    command.build_lib = command.build_temp = sys.argv[1]
    command.ensure_finalized()
    try:
        command.run()
        print("went on")
    except CompileError as error:
        print("stopped:", error)
"""


@pytest.mark.parametrize(
    ("mode", "nvcc", "expected"),
    [
        ("auto", "false", ["extensions: 1", "went on"]),
        ("1", "false", ["extensions: 1", "stopped: nvcc:"]),
        ("auto", "absent", ["extensions: 0"]),
        ("1", "absent", ["FASTICL_CUDA=1: expected nvcc at one of absent, got none"]),
        ("0", "false", ["extensions: 0"]),
        ("yes", "false", ["FASTICL_CUDA: expected auto, 0 or 1, got 'yes'"]),
    ],
)
def test_building_without_a_working_nvcc(mode: str, nvcc: str, expected: list[str], tmp_path: Path) -> None:
    """auto goes on, 1 stops, 0 does not look; ``false`` is a program that fails whatever it is told."""
    environment = {**os.environ, "FASTICL_CUDA": mode, "FASTICL_NVCC": nvcc}
    environment.pop("FASTICL_SANITIZE", None)
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    for text in expected:
        assert text in done.stdout + done.stderr, done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))
