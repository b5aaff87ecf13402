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
from common import DTYPES, Case, Contender, Truth, copies_of, device, normal, optional
from torch import Tensor

import fasticl
from fasticl import _C, cusparselt, tuned

PackedLinear = Callable[[Tensor, fasticl.PackedWeight], Tensor]
ONNXRUNTIME_FROM_BATCH = 16
BLOCK = 32  # a side of torch_bsr's


@lru_cache(maxsize=64)
def pruned(N: int, K: int, sparsity: float, pattern: str, dtype: str) -> Tensor:
    """Gaussian ``[N, K]`` of variance 1/K without its smallest magnitudes.

    ``pattern`` is "unstructured" (of the whole matrix), "n:m" (of every m in a row, n stay), "block" (of squares, by
    norm), "neuron" (of the rows, by norm; they are removed, not zeroed) or "dense".
    """
    weight = normal(N, K, salt=N + K) / K**0.5
    if pattern == "unstructured":
        zeros = round(sparsity * weight.numel())
        if zeros:
            weight[weight.abs() <= weight.abs().flatten().kthvalue(zeros).values] = 0
    elif pattern == "neuron":
        weight = weight[weight.norm(dim=1).topk(N - round(sparsity * N)).indices.sort().values]
    elif pattern == "block":
        norms = weight.view(N // BLOCK, BLOCK, K // BLOCK, BLOCK).norm(dim=(1, 3))
        kept = torch.zeros_like(norms).flatten()
        kept[norms.flatten().topk(norms.numel() - round(sparsity * norms.numel())).indices] = 1
        weight *= kept.view_as(norms).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    elif pattern != "dense":
        n, m = map(int, pattern.split(":"))
        groups = weight.view(-1, m)
        weight = torch.zeros_like(groups).scatter_(1, (kept := groups.abs().topk(n).indices), groups.gather(1, kept))
        weight = weight.view(N, K)
    return weight.to(DTYPES[dtype]).contiguous()


def inputs(batch: int, K: int, dtype: str) -> Tensor:
    return normal(batch, K, salt=batch).to(DTYPES[dtype])


@lru_cache(maxsize=8)
def packed(N: int, K: int, sparsity: float, pattern: str, dtype: str, format: str) -> fasticl.PackedWeight:
    """What :func:`pruned` returns; kept, because cases of a shape differ in their batch."""
    return fasticl.pack(pruned(N, K, sparsity, pattern, dtype), format, pattern=pattern if ":" in pattern else None)


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


def torch_sparse(
    impl: str, N: int, K: int, sparsity: float, pattern: str, x: Tensor, dtype: str, cache: str
) -> list[Contender]:
    """A pruned weight in torch's own ``impl``: "torch_csr", "torch_bsr", "torch_2_4" or "torch_smaller" (dense)."""
    weight = pruned(N, K, sparsity, pattern, dtype)

    def made() -> Tensor:
        if impl == "torch_csr":
            return weight.to_sparse_csr()
        if impl == "torch_bsr":
            return weight.to_sparse_bsr((BLOCK, BLOCK))
        if impl == "torch_2_4":
            return torch.sparse.to_sparse_semi_structured(weight)
        return weight.clone()

    def call(w: Tensor) -> Tensor:
        return (w @ x.T).T if impl in ("torch_csr", "torch_bsr") else F.linear(x, w)

    def contender() -> Contender:
        stored = int(torch.count_nonzero(weight))
        size = {
            "torch_csr": stored * (x.element_size() + 8) + 8 * (weight.shape[0] + 1),
            "torch_bsr": stored * x.element_size(),
            "torch_2_4": stored * x.element_size() + weight.numel() // 8,  # two bits for each value that stays
            "torch_smaller": bytes_of(weight),
        }[impl]
        truth = Truth.of(F.linear, x, weight)
        return Contender(
            impl, [partial(call, made()) for _ in range(copies_of(size, cache))],
            truth if impl == "torch_smaller" else truth.loose(), size + bytes_of(x) + weight.shape[0] * len(x) *
            x.element_size(), 2 * stored * len(x), sparsity, pattern,
        )  # fmt: skip

    return optional(impl, contender)


def nm_on_cusparselt(N: int, K: int, x: Tensor, dtype: str, cache: str) -> list[Contender]:
    """``nm_linear`` of a 2:4 weight as it runs where the GPU's table names cuSPARSELt, whatever that table says."""
    on = {"implementation": cusparselt.NAME}
    weight = pruned(N, K, 0.5, "2:4", dtype)

    def call(stored: fasticl.PackedWeight) -> Tensor:
        with tuned.forced("nm_linear", on):
            return fasticl.ops.nm_linear(x, stored)

    def contender() -> Contender:
        with tuned.forced("nm_linear", on):
            stored = fasticl.pack(weight, "nm", pattern="2:4")
        if stored.layouts is None or stored.layouts.compressed is None:
            raise RuntimeError(f"cuSPARSELt does not take {list(weight.shape)}, {weight.dtype}, on {weight.device}")
        size, flops = bytes_of(stored.layouts.compressed), 2 * int(torch.count_nonzero(weight)) * len(x)
        return Contender(
            "fasticl_cusparselt", rotated(call, stored, size, cache), Truth.of(F.linear, x, weight),
            size + bytes_of(x) + N * len(x) * x.element_size(), flops, 0.5, "2:4",
        )  # fmt: skip

    return optional("fasticl_cusparselt", contender)


def torch_compiled(N: int, K: int, x: Tensor, dtype: str, cache: str) -> list[Contender]:
    """Dense, by the fastest kernel that torch.compile finds for this shape."""
    weight = pruned(N, K, 0.0, "dense", dtype)

    def contender() -> Contender:
        torch.compiler.reset()
        call = torch.compile(F.linear, dynamic=False, mode="max-autotune-no-cudagraphs")
        size, flops = bytes_of(x, weight) + len(x) * N * x.element_size(), 2 * weight.numel() * len(x)
        calls = rotated(partial(call, x), weight, bytes_of(weight), cache)
        return Contender("torch_compile", calls, Truth.of(F.linear, x, weight).loose(), size, flops, dense=True)

    return optional("torch_compile", contender)


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
    extra_seconds: float = 0.0,
) -> Case:
    """Dense ``[N, K]`` against ``function(x, packed)`` at each (sparsity, pattern) of ``kept``.

    ``others(x)`` makes further contenders; ``targets`` adds one for each lesser instruction set of this machine.
    """

    def build() -> list[Contender]:
        x = inputs(batch, K, dtype)
        contenders = dense_contenders(x, pruned(N, K, 0.0, "dense", dtype), cache)
        for sparsity, pattern in kept:
            weight = pruned(N, K, sparsity, pattern, dtype)
            stored = packed(N, K, sparsity, pattern, dtype, op.removesuffix("_linear"))
            best = Contender(
                "fasticl",
                rotated(partial(function, x), stored, stored.bytes_read, cache),
                Truth.of(F.linear, x, weight),
                stored.bytes_read + bytes_of(x) + batch * N * x.element_size(),
                2 * int(torch.count_nonzero(weight)) * batch,
                sparsity,
                pattern,
            )
            contenders.append(best)
            for target in _C.targets()[:-1] if targets else ():
                calls = [forced(target, call) for call in best.calls]
                contenders.append(replace(best, impl=f"fasticl_{target}", calls=calls))
        return contenders + (others(x) if others else [])

    return Case(op, dtype, f"{N}x{K}", batch, build, cache, tier, 1 + len(kept), extra_seconds)
