"""Which implementation computes on CUDA tensors: Triton's where it runs, else the reference. No GPU needed."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fasticl
from fasticl import doctor
from fasticl.ops import _registry as registry


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    registry.runs_triton.cache_clear()
    registry.triton_error.cache_clear()
    yield
    registry.runs_triton.cache_clear()
    registry.triton_error.cache_clear()


@pytest.fixture
def compute(monkeypatch: pytest.MonkeyPatch):
    """An op whose kernel returns 1 and whose reference returns 0."""
    kernel = types.SimpleNamespace(launch=lambda x, *rest: torch.ones_like(x))
    monkeypatch.setitem(sys.modules, "fasticl.kernels.stub", kernel)
    return registry.by_triton("stub", lambda x, *rest: torch.zeros_like(x))


def with_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with_triton(monkeypatch, "3.6.0")


def with_triton(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    triton = types.ModuleType("triton")
    triton.__version__ = version
    monkeypatch.setitem(sys.modules, "triton", triton)


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ImportError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_kernel_takes_its_dtypes(compute, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, (8, 0))
    assert compute(torch.zeros(1, dtype=dtype), None).item() == (dtype != torch.float64)


def test_int8_values_run_the_reference(compute, monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, (9, 0))
    x, values = torch.zeros(1), torch.zeros(1, dtype=torch.int8)
    assert compute(x, torch.zeros(1), [torch.zeros(1)], None).item() == 1
    assert compute(x, values, None, None).item() == 0
    assert compute(x, [torch.zeros(1)], [values, torch.zeros(1)], None).item() == 0


@pytest.mark.parametrize("reason", ["old card", "no triton", "old triton"])
def test_elsewhere_the_reference_computes_with_one_warning(compute, reason: str, monkeypatch) -> None:
    with_card(monkeypatch, (7, 5) if reason == "old card" else (9, 0))
    message = "its compute capability is 7.5, the kernels need 8.0"
    if reason == "no triton":
        without_triton(monkeypatch)
        message = "Triton does not import"
    if reason == "old triton":
        with_triton(monkeypatch, "3.5.1")
        message = r"Triton is 3\.5\.1, the kernels need 3\.6"
    with pytest.warns(UserWarning, match=f"run their references on cpu, which are slow: {message}"):
        assert compute(torch.zeros(1)).item() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute(torch.zeros(1)).item() == 0


@pytest.mark.parametrize("op", sorted(fasticl.implementations()))
def test_what_is_said_is_what_is_registered(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, (9, 0))
    says = fasticl.implementations()[op]["cuda"]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"fasticl::{op}", "CUDA")
    assert (says != registry.REFERENCE) == has_kernel


def test_without_triton_nothing_else_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    without_triton(monkeypatch)
    for op, found in doctor.diagnose()["implementations"].items():
        assert found["cuda"]["runs"].endswith(registry.REFERENCE), op
        assert "Triton" not in found["cuda"]["runs"], op
        assert found["cuda"]["why"].startswith("Triton does not import"), op


def test_doctor_names_cards_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, (7, 5))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a card")
    found = doctor.diagnose()["implementations"]["attention_mlp"]["cuda"]
    assert found == {"runs": "Triton", "why": "the reference on cuda:0: too old for the kernels"}


def test_the_kernel_is_imported_by_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ops register is a function that finds launch by the op's name."""
    pytest.importorskip("triton", minversion="3.6")
    called: list[Tensor] = []
    kernel = types.SimpleNamespace(launch=lambda *arguments: called.extend(arguments) or arguments[0])
    monkeypatch.setitem(sys.modules, "fasticl.kernels.attention_mlp", kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    x = torch.zeros(1)
    assert registry.by_triton("attention_mlp", lambda *arguments: None)(x, None) is x
    assert called == [x, None]
