"""``y = x Wᵀ``: pruned weights, the dense baselines, and the case that puts them against one packed op."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import prod

import torch
import torch.nn.functional as F
from common import DTYPES, Case, Contender, Truth, copies_of, device, generator
from torch import Tensor

import fasticl
from fasticl import _C

PackedLinear = Callable[[Tensor, fasticl.PackedWeight], Tensor]
ONNXRUNTIME_FROM_BATCH = 16


@lru_cache(maxsize=64)
def pruned(N: int, K: int, sparsity: float, pattern: str, dtype: str) -> Tensor:
    """Gaussian ``[N, K]`` of variance 1/K without its smallest magnitudes.

    ``pattern`` is "unstructured" (of the whole matrix), "n:m" (of every m in a row, n stay), "neuron" (of the rows, by
    norm; they are removed, not zeroed) or "dense".
    """
    weight = torch.randn(N, K, generator=generator(N + K)) / K**0.5
    if pattern == "unstructured":
        zeros = round(sparsity * weight.numel())
        if zeros:
            weight[weight.abs() <= weight.abs().flatten().kthvalue(zeros).values] = 0
    elif pattern == "neuron":
        weight = weight[weight.norm(dim=1).topk(N - round(sparsity * N)).indices.sort().values]
    elif pattern != "dense":
        n, m = map(int, pattern.split(":"))
        groups = weight.view(-1, m)
        weight = torch.zeros_like(groups).scatter_(1, (kept := groups.abs().topk(n).indices), groups.gather(1, kept))
        weight = weight.view(N, K)
    return weight.to(DTYPES[dtype]).contiguous()


def inputs(batch: int, K: int, dtype: str) -> Tensor:
    return torch.randn(batch, K, generator=generator(batch)).to(device(), DTYPES[dtype])


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def rotated(call: Callable[..., Tensor], weight: object, weight_bytes: int, cache: str) -> list[Callable[[], Tensor]]:
    """``call(weight)`` on as many copies of ``weight`` as ``cache`` asks for."""
    return [partial(call, copy.deepcopy(weight)) for _ in range(copies_of(weight_bytes, cache))]


def forced(target: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``call`` on the kernels of another instruction set."""
    best = _C.target()

    def run() -> Tensor:
        _C.set_target(target)
        try:
            return call()
        finally:
            _C.set_target(best)

    return run


def dense_contenders(x: Tensor, weight: Tensor, cache: str) -> list[Contender]:
    """torch and, on the CPU, NumPy (float32) and onnxruntime (float32, from batch 16): every weight stored."""
    truth = Truth.of(F.linear, x, weight)
    size = bytes_of(x, weight) + bytes_of(x) // x.shape[-1] * weight.shape[0]
    flops = 2 * weight.numel() * prod(x.shape[:-1])
    calls = {"torch": rotated(partial(F.linear, x), weight, bytes_of(weight), cache)}
    if weight.dtype == torch.float32 and device() == "cpu":
        x_numpy = x.numpy()
        calls["numpy"] = rotated(lambda w: torch.from_numpy(x_numpy @ w.T), weight.numpy(), bytes_of(weight), cache)
        if x.shape[0] >= ONNXRUNTIME_FROM_BATCH and (matmul := onnxruntime_matmul(weight)) is not None:
            calls["onnxruntime"] = [lambda: torch.from_numpy(matmul(x_numpy))]
    return [
        Contender(
            impl, turns, truth if impl == "torch" else truth.loose(), size, flops,
            dense=impl != "onnxruntime", own_pool=impl != "torch",
        )
        for impl, turns in calls.items()
    ]  # fmt: skip


def onnxruntime_matmul(weight: Tensor) -> Callable | None:
    """``x -> x @ weight.T`` as an onnxruntime session with torch's number of threads; None without the packages."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        warnings.warn(f"onnxruntime is not measured: {error}; pip install onnx onnxruntime", stacklevel=2)
        return None
    N, K = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", N])],
        [numpy_helper.from_array(weight.T.contiguous().numpy(), "w")],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def linear_case(
    op: str,
    function: PackedLinear,
    N: int,
    K: int,
    batch: int,
    dtype: str,
    kept: Sequence[tuple[float, str]],
    *,
    cache: str = "hot",
    tier: str = "sweep",
    others: Callable[[Tensor], list[Contender]] | None = None,
    targets: bool = False,
) -> Case:
    """Dense ``[N, K]`` against ``function(x, packed)`` at each (sparsity, pattern) of ``kept``.

    ``others(x)`` makes further contenders; ``targets`` adds one for each lesser instruction set of this machine.
    """

    def build() -> list[Contender]:
        x = inputs(batch, K, dtype)
        contenders = dense_contenders(x, pruned(N, K, 0.0, "dense", dtype).to(device()), cache)
        for sparsity, pattern in kept:
            weight = pruned(N, K, sparsity, pattern, dtype)
            packed = fasticl.pack(weight, op.removesuffix("_linear"), pattern=pattern if ":" in pattern else None)
            packed, weight = packed.to(device()), weight.to(device())
            best = Contender(
                "fasticl",
                rotated(partial(function, x), packed, packed.bytes_read, cache),
                Truth.of(F.linear, x, weight),
                packed.bytes_read + bytes_of(x) + batch * N * x.element_size(),
                2 * int(torch.count_nonzero(weight)) * batch,
                sparsity,
                pattern,
            )
            contenders.append(best)
            for target in _C.targets()[:-1] if targets else ():
                calls = [forced(target, call) for call in best.calls]
                contenders.append(replace(best, impl=f"fasticl_{target}", calls=calls))
        return contenders + (others(x) if others else [])

    return Case(op, dtype, f"{N}x{K}", batch, build, cache, tier)
