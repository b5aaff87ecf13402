"""What the kernels share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x)  # keeps NaN, as torch does; a maximum drops it
