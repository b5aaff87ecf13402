"""The judges are judged: each check of helpers.py and conftest.py turns red on the fault that it is there for."""

from __future__ import annotations

import zlib

import pytest
import torch
from helpers import assert_close_to_truth, guarded

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def matmul_case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's ``x @ w.T`` in dtype, and the float64 truth of the same inputs."""
    x, w = torch.randn(5, 300).to(dtype), torch.randn(7, 300).to(dtype)
    return x @ w.T, x.double() @ w.double().T


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_right_result_passes(dtype: torch.dtype) -> None:
    result, truth = matmul_case(dtype)
    assert_close_to_truth(truth.to(dtype), truth, result)
    assert_close_to_truth(result, truth, result)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_wrong_element_fails(dtype: torch.dtype) -> None:
    result, truth = matmul_case(dtype)
    wrong = result.clone()
    wrong[3, 4] += 5 * torch.finfo(dtype).eps * truth.abs().max() + 5 * (result - truth).abs().max()
    with pytest.raises(AssertionError, match="1 of 35 elements exceed it, worst at flat index 25"):
        assert_close_to_truth(wrong, truth, result)


def test_accumulating_in_low_precision_fails() -> None:
    """The usual fault of a bfloat16 kernel: products right, partial sums rounded to bfloat16."""
    x, w = torch.randn(4096).bfloat16(), torch.randn(64, 4096).bfloat16()
    total = torch.zeros(64, dtype=torch.bfloat16)
    for k in range(0, 4096, 4):
        total += (w[:, k : k + 4].float() @ x[k : k + 4].float()).bfloat16()
    with pytest.raises(AssertionError, match="elements exceed it"):
        assert_close_to_truth(total, w.double() @ x.double(), (w.float() @ x.float()).bfloat16())


def test_an_exact_pytorch_leaves_room_for_one_rounding() -> None:
    truth = torch.tensor([1.0 + 2**-9], dtype=torch.float64)
    assert_close_to_truth(torch.tensor([1.0 + 2**-7]).bfloat16(), truth, torch.tensor([1.0]).bfloat16())
    exact = torch.tensor([1.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="elements exceed it"):
        assert_close_to_truth(torch.tensor([1.0 + 2**-7]).bfloat16(), exact, exact.bfloat16())


def test_nan_and_infinity_must_be_where_pytorch_has_them() -> None:
    truth = torch.tensor([1.0, 1e6, 2.0], dtype=torch.float64)
    overflowed = torch.tensor([1.0, float("inf"), 2.0], dtype=torch.float16)
    assert_close_to_truth(overflowed.clone(), truth, overflowed)
    for bad in ([1.0, 65504.0, 2.0], [1.0, float("nan"), 2.0], [1.0, -float("inf"), 2.0]):
        with pytest.raises(AssertionError, match=r"NaN|infinity"):
            assert_close_to_truth(torch.tensor(bad, dtype=torch.float16), truth, overflowed)
    with pytest.raises(AssertionError, match="1 elements are NaN or infinite"):
        assert_close_to_truth(torch.tensor([float("nan"), float("inf"), 2.0]).half(), truth, overflowed)


def test_shape_and_dtype_must_match() -> None:
    result, truth = matmul_case(torch.float32)
    with pytest.raises(AssertionError, match=r"shape: expected \[5, 7\], got \[7, 5\]"):
        assert_close_to_truth(result.T, truth, result)
    with pytest.raises(AssertionError, match=r"dtype: expected torch.float32, got torch.bfloat16"):
        assert_close_to_truth(result.bfloat16(), truth, result)


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.uint8], ids=str)
def test_guards_see_writes_and_poison_reads(dtype: torch.dtype, shift: int) -> None:
    tensor = torch.arange(10).to(dtype).view(2, 5)
    copy, check = guarded(tensor, shift=shift)
    assert torch.equal(copy, tensor)
    assert copy.is_contiguous()
    assert copy.data_ptr() % 64 == shift * copy.element_size()
    check()

    past = copy.as_strided((12,), (1,), copy.storage_offset() - 1)
    if dtype.is_floating_point:
        assert past[[0, -1]].isnan().all()
    for index, message in ((0, "before the first"), (-1, "past the last")):
        kept = past[index].clone()
        past[index] = 1
        with pytest.raises(AssertionError, match=message):
            check()
        past[index] = kept


@pytest.mark.kernels
def test_kernel_tests_see_unwritten_outputs() -> None:
    for dtype in FLOATS:
        assert torch.empty(3, dtype=dtype).isnan().all()


def test_seeds_come_from_the_name_of_the_test(request: pytest.FixtureRequest) -> None:
    assert torch.initial_seed() == zlib.crc32(request.node.nodeid.encode())


def test_isa_forces_the_instruction_set(isa: str) -> None:
    from fasticl import _C

    assert _C.target() == isa
