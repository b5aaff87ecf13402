"""Builds fasticl._C, the CPU kernels: pybind11 and OpenMP, without torch; and, where nvcc is, fasticl._C_cuda.

Metadata is in pyproject.toml. Environment:
    FASTICL_CUDA=auto      build the CUDA kernels if nvcc is found, and go on without them if it fails (the default);
                           1: they must be built, 0: they are not. No GPU and no driver is needed to build them.
    FASTICL_NVCC=PATH      which nvcc; else that of CUDA_HOME or CUDA_PATH, of PATH, or /usr/local/cuda/bin/nvcc
    FASTICL_BUILD_JOBS=2   files that are compiled at a time; 0: as many as there are processors
    FASTICL_SANITIZE=1     build with the address and undefined-behaviour sanitizers, for the tests
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
SANITIZE = os.environ.get("FASTICL_SANITIZE") == "1"
CUDA = os.environ.get("FASTICL_CUDA", "auto")
JOBS = int(os.environ.get("FASTICL_BUILD_JOBS", "2"))
# sm_80's code runs on all of 8.x, sm_90a's on Hopper alone; later GPUs compile the PTX when they first load it.
CUDA_TARGETS = ("arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a")

# -Wno-maybe-uninitialized: the AVX-512 headers of GCC read undefined registers on purpose.
compile_args = ["-O3", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
link_args = []
if sys.platform == "linux":  # elsewhere the compiler may lack OpenMP: one thread then
    compile_args.append("-fopenmp")
    link_args.append("-fopenmp")
if SANITIZE:  # without the checks that slow the compiler down tenfold and find nothing in kernels of raw pointers
    flags = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size,pointer-overflow,vptr"]
    compile_args += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", *flags]
    compile_args += ["--param=asan-instrumentation-with-call-threshold=0"]
    link_args += flags

cpu = Pybind11Extension(
    "fasticl._C",
    sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp") if not p.stem.endswith("_cuda")),
    include_dirs=["csrc"],
    depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.h")),
    cxx_std=17,
    extra_compile_args=compile_args,
    extra_link_args=link_args,
)


def find_nvcc() -> str | None:
    """The path of nvcc, or None where there is none or it is not wanted."""
    if CUDA not in ("auto", "0", "1"):
        raise SystemExit(f"FASTICL_CUDA: expected auto, 0 or 1, got {CUDA!r}")
    if CUDA == "0" or (SANITIZE and CUDA == "auto"):
        return None
    named = os.environ.get("FASTICL_NVCC")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [named] if named else [*(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next((path for place in places if (path := shutil.which(place))), None)
    if found is None and CUDA == "1":
        raise SystemExit(f"FASTICL_CUDA=1: expected nvcc at one of {', '.join(places)}, got none")
    return found


def is_older(made: str, source: str) -> bool:
    """Whether an object file must be made again: of its source, a header or this file, one is newer."""
    newest = max(path.stat().st_mtime for path in (Path(source), ROOT / "setup.py", *(ROOT / "csrc").rglob("*.h")))
    return Path(made).stat().st_mtime < newest


class BuildExtension(build_ext):
    """Compiles an extension that has .cu files by nvcc, and links it to a CUDA runtime of its own."""

    def run(self) -> None:
        if not SANITIZE:  # one place for editable installs and wheels, so that what one has compiled the other takes
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if not any(source.endswith(".cu") for source in ext.sources):
            super().build_extension(ext)
            return
        output = Path(self.get_ext_fullpath(ext.name))
        newest = max(Path(path).stat().st_mtime for path in [*ext.sources, *ext.depends])
        if not self.force and output.exists() and output.stat().st_mtime > newest:
            return
        objects = [Path(self.build_temp) / f"{source}.o" for source in ext.sources]
        host = [f"-I{folder}" for folder in [*ext.include_dirs, *self.include_dirs, *self.compiler.include_dirs]]
        host += ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        targets = [f"-gencode={target}" for target in CUDA_TARGETS]

        def compile_source(source: str, made: Path) -> None:
            made.parent.mkdir(parents=True, exist_ok=True)
            device = ["--threads=2", *targets] if source.endswith(".cu") else []
            self.nvcc(*host, *device, "-c", source, "-o", str(made))

        with ThreadPoolExecutor(JOBS or None) as pool:
            list(pool.map(compile_source, ext.sources, objects))  # raises what one of them did
        output.parent.mkdir(parents=True, exist_ok=True)
        self.nvcc("-shared", "-cudart=static", *targets, *map(str, objects), "-o", str(output))

    def nvcc(self, *arguments: str) -> None:
        print(NVCC, *arguments, flush=True)
        try:
            subprocess.run([NVCC, *arguments], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"nvcc: {error}") from None


NVCC = find_nvcc()
extensions = [cpu]
if NVCC is not None:
    cuda = Extension(
        "fasticl._C_cuda",
        sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*_cuda.c*")),
        include_dirs=["csrc", pybind11.get_include()],
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.h")),
        optional=CUDA == "auto",  # a failure is then a warning
    )
    extensions.append(cuda)

if __name__ == "__main__":
    with ParallelCompile(needs_recompile=is_older, default=JOBS):
        setup(
            packages=[*find_packages(include=["fasticl", "fasticl.*"]), "fasticl.kernels"],
            package_dir={"fasticl.kernels": "kernels"},
            package_data={"fasticl": ["py.typed", "data/*.tsv", "data/*.json"]},
            ext_modules=extensions,
            cmdclass={"build_ext": BuildExtension},
        )
