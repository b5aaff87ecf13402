"""fasticl.testing.interpreter: its arithmetic is PyTorch's, and planted bugs are caught."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton_device import INTERPRETED

from fasticl.testing import interpreter
from fasticl.testing.interpreter import OutOfBoundsError, RaceError, checked

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


def same_bits(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@triton.jit
def elementwise_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    if OP == "add":
        z = x + y
    elif OP == "mul":
        z = x * y
    elif OP == "div":
        z = x / y
    elif OP == "where":
        z = tl.where(x < y, x, y)
    elif OP == "neg":
        z = -x
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "cumsum":
        z = tl.cumsum(x, 0)
    elif OP == "sum":
        z = x * 0 + tl.sum(x, 0)
    elif OP == "max":
        z = x * 0 + tl.max(x, 0)
    else:
        z = tl.exp(x.to(tl.float32)).to(x.dtype)
    tl.store(out_ptr + at, z)


# What PyTorch computes; sums in float32, rounded once.
OPS = {
    "add": torch.add,
    "mul": torch.mul,
    "div": torch.div,
    "where": lambda x, y: torch.where(x < y, x, y),
    "neg": lambda x, y: -x,
    "maximum": torch.maximum,
    "cumsum": lambda x, y: x.float().cumsum(0).to(x.dtype),
    "sum": lambda x, y: x.float().sum().to(x.dtype).expand_as(x),
    "max": lambda x, y: x.max().expand_as(x),
    "exp": lambda x, y: x.float().exp().to(x.dtype),
}


@pytest.mark.parametrize("op", OPS)
def test_bfloat16_is_rounded_as_by_pytorch(op: str) -> None:
    x, y = torch.randn(256).bfloat16(), torch.randn(256).bfloat16()
    out = torch.empty_like(x)
    elementwise_kernel[(1,)](x, y, out, OP=op, SIZE=256)
    same_bits(out, OPS[op](x, y))


@triton.jit
def cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32, torch.int32], ids=str)
def test_casts(source: torch.dtype, target: torch.dtype) -> None:
    halfway = 1 + torch.arange(16) * 2.0**-9  # ties, which round to even in bfloat16
    x = torch.cat([halfway, -halfway, torch.randn(1024 - 35) * 100, torch.tensor([0.0, torch.inf, torch.nan])])
    x = x.nan_to_num().to(source) if source == torch.int32 else x.to(source)
    out = torch.empty(1024, dtype=target)
    cast_kernel[(1,)](x, out, SIZE=1024)
    same_bits(out, x.to(target))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION))


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dot(dtype: torch.dtype, precision: str) -> None:
    a, b = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype)
    out = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, PRECISION=precision, SIZE=32)
    error = (out.double() - a.double() @ b.double()).abs().max()
    if dtype == torch.float32 and precision == "tf32":
        assert 1e-4 < error < 3e-2
    else:
        assert error < 1e-5


ADD_HALVES = "add.rn.f16x2 $0, $1, $2;"


@triton.jit
def assembly_kernel(x_ptr, y_ptr, out_ptr, ASSEMBLY: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    z = tl.inline_asm_elementwise(ASSEMBLY, "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(out_ptr + at, z)


def test_inline_assembly_runs_its_twin() -> None:
    @interpreter.twin(ADD_HALVES)
    def add_halves(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x.view(np.float16) + y.view(np.float16)).view(np.int32)

    x, y = torch.randn(64).half(), torch.randn(64).half()
    out = torch.empty_like(x)
    assembly_kernel[(1,)](*(t.view(torch.int32) for t in (x, y, out)), ASSEMBLY=ADD_HALVES, SIZE=32)
    same_bits(out, x + y)


def test_inline_assembly_without_a_twin_is_refused() -> None:
    x = torch.zeros(32, dtype=torch.int32)
    with pytest.raises(Exception, match="inline assembly has no twin"):
        assembly_kernel[(1,)](x, x, x, ASSEMBLY="mov.b32 $0, $1;", SIZE=32)


@triton.autotune([triton.Config({"STEP": step}) for step in (1, 2, 3)], key=[])
@triton.jit
def tuned_kernel(out_ptr, STEP: tl.constexpr):
    tl.store(out_ptr, STEP)


def test_autotuned_kernels_run_each_configuration() -> None:
    out = torch.zeros(1)
    tuned_kernel[(1,)](out)
    assert out.item() == 1
    for index, step in enumerate((1, 2, 3, 1)):
        with interpreter.configuration(index):
            tuned_kernel[(1,)](out)
        assert out.item() == step


# ---- memory ----------------------------------------------------------------------------------------------------------


@triton.jit
def copy_kernel(x_ptr, out_ptr, size, SHIFT: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size if MASKED else at < size + 1
    tl.store(out_ptr + at, tl.load(x_ptr + at + SHIFT, mask=at < size, other=0.0), mask=mask)


def copy(size: int, shift: int = 0, masked: bool = True) -> torch.Tensor:
    x, out = torch.arange(float(size)), torch.full((size + 1,), -1.0)[:size]
    with checked():
        copy_kernel[(triton.cdiv(size, 8),)](x, out, size, SHIFT=shift, MASKED=masked, BLOCK=8)
    return out


def test_right_accesses_pass() -> None:
    assert torch.equal(copy(21), torch.arange(21.0))


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_read_out_of_bounds_is_caught(shift: int) -> None:
    where = "4 bytes before a tensor" if shift < 0 else "0 bytes past the end of a tensor"
    with pytest.raises(OutOfBoundsError, match=rf"load of 4 bytes at .*{where}; 1 of"):
        copy(21, shift)


def test_a_write_out_of_bounds_is_caught_and_not_done() -> None:
    x, storage = torch.zeros(21), torch.full((22,), -1.0)
    with checked(), pytest.raises(OutOfBoundsError, match=r"program \(2, 0, 0\): store"):
        copy_kernel[(3,)](x, storage[:21], 21, SHIFT=0, MASKED=False, BLOCK=8)
    assert storage[21] == -1


def test_bounds_are_those_of_a_view() -> None:
    storage = torch.zeros(64)
    with checked(), pytest.raises(OutOfBoundsError):
        copy_kernel[(3,)](storage[:20], torch.empty(21), 21, SHIFT=0, MASKED=True, BLOCK=8)


@triton.jit
def racy_kernel(x_ptr, out_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    if KIND == "write":  # neighbours overlap by one element
        tl.store(out_ptr + program * (BLOCK - 1) + at, program)
    elif KIND == "half":  # two bytes of one element each
        tl.store(out_ptr.to(tl.pointer_type(tl.int16)) + program + at, program)
    elif KIND == "read":  # the next program reads what this one wrote
        tl.store(out_ptr + (program + 1) * BLOCK + at, tl.load(out_ptr + program * BLOCK + at))
    elif KIND == "atomic":
        tl.atomic_add(out_ptr + at, program)
    else:
        tl.store(out_ptr + program * BLOCK + at, tl.load(x_ptr + at))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("write", "both write"), ("half", "both write"), ("read", "write and read"), ("atomic", None), ("none", None)],
)
def test_programs_that_race_are_caught(kind: str, message: str | None) -> None:
    x, out = torch.zeros(8, dtype=torch.int32), torch.zeros(24, dtype=torch.int32)
    with checked():
        if message is None:
            racy_kernel[(2,)](x, out, KIND=kind, BLOCK=8)
        else:
            with pytest.raises(RaceError, match=rf"programs \(0, 0, 0\) and \(1, 0, 0\) {message}"):
                racy_kernel[(2,)](x, out, KIND=kind, BLOCK=8)


@triton.jit
def last_program_kernel(parts_ptr, count_ptr, out_ptr, KIND: tl.constexpr, PROGRAMS: tl.constexpr):
    """The last of the programs adds up what all have stored."""
    program, every = tl.program_id(0), tl.arange(0, PROGRAMS)
    if KIND != "stored late":
        tl.store(parts_ptr + program, program + 1)
    if KIND == "read early":
        total = tl.sum(tl.load(parts_ptr + every), 0)
    counter_ptr = count_ptr + program if KIND == "counters of their own" else count_ptr
    if KIND == "relaxed":
        before = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    else:
        before = tl.atomic_add(counter_ptr, 1)
    if KIND == "stored late":
        tl.store(parts_ptr + program, program + 1)
    if before == PROGRAMS - 1 or (KIND == "counters of their own" and program == PROGRAMS - 1):
        if KIND != "read early":
            total = tl.sum(tl.load(parts_ptr + every), 0)
        tl.store(out_ptr, total)


@pytest.mark.parametrize("kind", ["right", "relaxed", "stored late", "read early", "counters of their own"])
def test_atomics_order_what_is_stored_before_and_read_after_them(kind: str) -> None:
    parts, counts, out = (torch.zeros(n, dtype=torch.int32) for n in (4, 4, 1))
    with checked():
        if kind == "right":
            last_program_kernel[(4,)](parts, counts, out, KIND=kind, PROGRAMS=4)
            assert out.item() == 10
        else:
            with pytest.raises(RaceError, match="write and read"):
                last_program_kernel[(4,)](parts, counts, out, KIND=kind, PROGRAMS=4)


def test_unchecked_launches_are_not_watched() -> None:
    out = torch.zeros(24, dtype=torch.int32)
    racy_kernel[(2,)](out, out, KIND="write", BLOCK=8)
    assert out[7] == 1
