"""What every test shares: seeds, the instruction sets to run on, and settings put back after each test."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

OPS = Path(__file__).parents[1] / "fasticl" / "ops"
# On a GPU deterministic mode, which poisons outputs, warns at each matmul without it, and warnings are failures.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class TorchGenerator:
    """torch's global generator with the methods by which hypothesis seeds each example and restores it afterwards."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_GENERATOR = TorchGenerator()  # hypothesis keeps a weak reference only
hypothesis.register_random(TORCH_GENERATOR)
hypothesis.settings.register_profile(
    "fasticl",
    deadline=None,  # the first example pays for imports and thread pools
    derandomize=True,  # the same examples on every machine
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],  # isa may stay for all examples of a test
)
hypothesis.settings.load_profile("fasticl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests in an op's own file."""
    for item in items:
        op = item.path.stem.removeprefix("test_").removesuffix("_triton")
        if (OPS / f"{op}.py").exists():
            item.add_marker(pytest.mark.kernels)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``isa`` runs once on every instruction set of this machine, not only on the best."""
    if "isa" in metafunc.fixturenames:
        from fasticl import _C

        metafunc.parametrize("isa", _C.targets(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the instruction set that the kernels run on during the test."""
    from fasticl import _C

    best = _C.target()
    _C.set_target(request.param)
    yield request.param
    _C.set_target(best)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seeds by the test's own name: alone, in any order, and after other tests are added, it sees the same numbers."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - for code under test that draws from the global generator
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[None]:
    """Puts back the thread count and the default dtype."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True)
def poisoned_outputs(request: pytest.FixtureRequest) -> Iterator[None]:
    """In kernel tests every ``torch.empty`` holds NaN: an output element that no kernel wrote is seen."""
    if request.node.get_closest_marker("kernels") is None:
        yield
        return
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode(mode)
