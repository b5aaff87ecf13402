"""What the kernels share."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.language.target_info import is_hip
except ImportError:  # an older Triton, whose kernels are then NVIDIA's only
    is_hip = None

# Of every launch. Whether products and sums fuse is said here: Triton's default depends on its release and environment.
OPTIONS = {"enable_fp_fusion": True}


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of tl.dot: float32 is multiplied as float32 unless torch was told that TF32 will do."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def block(size: int, least: int, most: int) -> int:
    """The power of two that covers ``size``, within bounds."""
    return min(most, max(least, triton.next_power_of_2(size)))


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def matrix(x: Tensor) -> Tensor:
    """``x [..., K]`` as ``[M, K]`` with contiguous rows; a copy only where strides force one."""
    return last_contiguous(x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x)  # keeps NaN, as torch does; a maximum drops it


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """float32; names as in fasticl.ops."""
    if ACTIVATION == "relu":
        x = relu(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 1 + tanh(u) = 2 sigmoid(2 u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def halves(x, dtype: tl.constexpr):
    """x as dtype, and what rounding cut off: products of both are as precise as x."""
    rounded = x.to(dtype)
    return rounded, (x - rounded.to(tl.float32)).to(dtype)


@triton.jit
def _popc(x):
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _prmt(low, high, selector):
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
    )


if is_hip is None:
    count_bits, permute_bytes = _popc, _prmt
else:

    @triton.jit
    def count_bits(x):
        """Set bits of int32."""
        if is_hip():
            x -= (x >> 1) & 0x55555555
            x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
            count = ((x + (x >> 4) & 0x0F0F0F0F) * 0x01010101) >> 24
        else:
            count = _popc(x)
        return count

    @triton.jit
    def permute_bytes(low, high, selector):
        """Four bytes of the eight of int32 ``low`` and ``high``, each chosen by a nibble of ``selector``, 0 to 7."""
        if is_hip():
            both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
            chosen = (both >> (8 * (selector & 7)).to(tl.int64)) & 0xFF
            for i in tl.static_range(1, 4):
                byte = (both >> (8 * ((selector >> (4 * i)) & 7)).to(tl.int64)) & 0xFF
                chosen |= byte << (8 * i)
            chosen = chosen.to(tl.int32)
        else:
            chosen = _prmt(low, high, selector)
        return chosen
