"""Builds fasticl._C, the CPU kernels: pybind11 and OpenMP, without torch. Metadata is in pyproject.toml.

Environment: FASTICL_SANITIZE=1 builds with the address and undefined-behaviour sanitizers, for the tests.
"""

import os
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
SANITIZE = os.environ.get("FASTICL_SANITIZE") == "1"

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
    sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp")),
    include_dirs=["csrc"],
    depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.h")),
    cxx_std=17,
    extra_compile_args=compile_args,
    extra_link_args=link_args,
)

if __name__ == "__main__":
    with ParallelCompile("FASTICL_BUILD_JOBS", default=2):
        setup(
            packages=[*find_packages(include=["fasticl", "fasticl.*"]), "fasticl.kernels"],
            package_dir={"fasticl.kernels": "kernels"},
            package_data={"fasticl": ["py.typed", "data/*.tsv"]},
            ext_modules=[cpu],
            cmdclass={"build_ext": build_ext},
        )
