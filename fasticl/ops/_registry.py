"""Registration of the ops with PyTorch's dispatcher, and what every op's checks share.

``torch.library.Library`` is used instead of ``@custom_op``: a call costs about 2 us instead of 10 to 15. The reference
is registered for every device (CompositeExplicitAutograd), C++ kernels for CPU, Triton's for CUDA. The ops are for
inference: a call that needs gradients goes through the reference, which autograd differentiates.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fasticl import _C

LIBRARY = torch.library.Library("fasticl", "DEF")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/types.h
VALUE_DTYPES = {**DTYPES, torch.int8: 3}  # of a weight's values
MIN_CAPABILITY = (8, 0)  # of a card that runs the Triton kernels: bfloat16 and asynchronous copies
MIN_TRITON = (3, 6)  # the oldest release with which the kernels are tested
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}  # as in csrc/types.h

REFERENCE = "reference (PyTorch)"

_implementations: dict[str, dict[str, str]] = {}


def define(
    schema: str,
    *,
    reference: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    cpu: Callable[..., Tensor] | None = None,
    cpu_name: str = "C++",
    triton: bool = False,
    cuda: Callable[..., Tensor] | None = None,
    cuda_name: str = "",
) -> None:
    """Defines ``fasticl::<schema>`` with its implementations; all take the arguments of the schema, in its order.

    ``triton``: whether ``fasticl.kernels.<op>.launch`` computes on CUDA tensors; ``cuda`` does instead if given, and
    calls :func:`by_triton` itself for what it does not take.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fasticl::{name}", fake, lib=LIBRARY)
    if cpu is not None:
        LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None or triton:
        LIBRARY.impl(name, cuda or by_triton(name, reference), "CUDA")
    _implementations[name] = {
        "cpu": cpu_name if cpu is not None else REFERENCE,
        "cuda": cuda_name if cuda is not None else "Triton" if triton else REFERENCE,
    }


def implementations() -> dict[str, dict[str, str]]:
    """Which implementation each op runs, by device: ``{"bitmap_linear": {"cpu": "C++ (avx512)", "cuda": ...}}``.

    On CUDA, what a card of :data:`MIN_CAPABILITY` runs; an older one runs the reference.
    """

    def runs(device: str, text: str) -> str:
        if device == "cpu":
            return f"{text} ({_C.target()})" if "C++" in text else text
        return text.replace("Triton", REFERENCE) if triton_error() is not None else text

    return {
        op: {device: runs(device, text) for device, text in by_device.items()}
        for op, by_device in _implementations.items()
    }


def by_triton(op: str, reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op on CUDA tensors: its Triton kernel where one runs and takes the dtypes, else its reference."""

    def compute(x: Tensor, *rest: object) -> Tensor:
        if x.dtype not in DTYPES or any(map(_has_int8, rest)) or not runs_triton(x.device):
            return reference(x, *rest)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            return importlib.import_module(f"fasticl.kernels.{op}").launch(x, *rest)

    return compute


def _has_int8(argument: object) -> bool:
    tensors = argument if isinstance(argument, list) else [argument]
    return any(isinstance(t, Tensor) and t.dtype == torch.int8 for t in tensors)


@cache
def triton_error() -> str | None:
    """Why Triton's kernels cannot be used, or None."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton does not import: {error}"
    if tuple(map(int, triton.__version__.split(".")[:2])) < MIN_TRITON:
        return "Triton is {}, the kernels need {}.{}".format(triton.__version__, *MIN_TRITON)
    return None


@cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on a CUDA device; warns, once for each device, where they do not."""
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        why = "its compute capability is {}.{}, the kernels need {}.{}".format(*capability, *MIN_CAPABILITY)
    elif (error := triton_error()) is not None:
        why = error
    else:
        return True
    warnings.warn(f"FastICL's ops run their references on {device}, which are slow: {why}", stacklevel=3)
    return False


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def apply_activation(y: Tensor, activation: str | None) -> Tensor:
    """The reference's activations, by name."""
    if activation is None:
        return y
    if activation == "relu":
        return torch.relu(y)
    if activation == "silu":
        return torch.nn.functional.silu(y)
    return torch.nn.functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def check_activation(activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"activation: expected one of {names}, got {activation!r}")


def check_dtype(name: str, x: Tensor, expected: torch.dtype | None = None) -> None:
    """``x`` is a dense tensor of a floating-point dtype, or of exactly the expected one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (torch.strided) tensor, got {x.layout}")
    if expected is not None and x.dtype != expected:
        raise TypeError(f"{name}: expected dtype {expected}, got {x.dtype}")
    if expected is None and not x.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")


def check_shape(name: str, x: Tensor, expected: tuple[int | str, ...]) -> None:
    """Sizes given as int must match; given as str they are free and only name the dimension."""
    fits = x.dim() == len(expected) and all(
        isinstance(want, str) or size == want for size, want in zip(x.shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, expected))}], got {list(x.shape)}")


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name}: expected on {device} like the first argument, got {x.device}")


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def contiguous(x: Tensor | None) -> Tensor | None:
    """Hold the result for as long as a kernel uses its address: it may be a copy."""
    return None if x is None else x.contiguous()


def cuda_stream(x: Tensor) -> tuple[int, int]:
    """The device of a CUDA tensor and the stream that torch launches on there."""
    return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream


def rows(x: Tensor) -> tuple[Tensor, int, int]:
    """``x [..., K]`` as a matrix ``[M, K]`` with contiguous rows: the tensor that holds it, M, and the row stride.

    A copy only where strides force one. Hold the tensor for as long as a kernel uses its address.
    """
    K = x.shape[-1]
    if x.is_contiguous():  # the usual case: no view is made
        return x, x.numel() // K if K else math.prod(x.shape[:-1]), K
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), K)  # -1 is ambiguous for empty tensors
    if x.stride(1) != 1 and K > 1:
        x = x.contiguous()
    return x, x.shape[0], x.stride(0)
