"""Which modules of a model may be replaced: linears that only are linears, and modules that only are MLPs."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fasticl import formats
from fasticl.blocks import FusedHead
from fasticl.layers import MLP, find_mlps, is_adapter, is_linear, join
from fasticl.nn import SparseLinear, SparseMLP, dense_bias, dense_weight, frozen_linear
from fasticl.ops._registry import ACTIVATIONS


@dataclass(frozen=True)
class MLPModule:
    """A module that is an MLP and nothing else."""

    name: str
    module: nn.Module
    mlp: MLP
    activation: str


def linears_of(model: nn.Module, smaller: Mapping[nn.Module, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Linears with their names, each once, in the model in which ``smaller`` modules have taken their places."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> None:
        module = smaller.get(module, module)
        if module in seen:
            return
        seen.add(module)
        if is_linear(module) or isinstance(module, SparseLinear):
            stored = module.values if isinstance(module, SparseLinear) else module.weight
            plain = type(stored) in (Tensor, nn.Parameter)  # neither quantized, distributed nor lazy
            if plain and not stored.is_meta:
                found.append((name, module))
            return
        for child_name, child in module._modules.items():
            if child is not None:
                visit(join(name, child_name), child)

    visit("", model)
    return found


def plain_linear(linear: nn.Module) -> nn.Module:
    """The dense layer to time: a packed one unpacked, and masks that are still to be folded applied."""
    if isinstance(linear, SparseLinear) or linear._forward_pre_hooks:
        return frozen_linear(dense_weight(linear), dense_bias(linear))
    return linear


def part_linear(linear: nn.Module) -> nn.Linear:
    """The same as an nn.Linear, for a SparseMLP."""
    plain = plain_linear(linear)
    return plain if isinstance(plain, nn.Linear) else frozen_linear(dense_weight(plain), dense_bias(plain))


def obstacle(name: str, linear: nn.Module, readers: Mapping[str, str], skip: Sequence[str]) -> str | None:
    """Why a linear must stay what it is, or None; ``readers`` are those of :func:`weight_readers`."""
    if _is_skipped(name, skip):
        return "skipped by name"
    if name in readers:
        return f"{readers[name]} reads its weight without calling it"
    if has_hooks(linear):
        return "has hooks, or a forward of its own"
    if isinstance(linear, nn.Linear) and type(linear).forward not in (nn.Linear.forward, FusedHead.forward):
        return f"{type(linear).__name__} may compute more than a linear"
    dtype = linear.values.dtype if isinstance(linear, SparseLinear) else linear.weight.dtype
    return None if dtype in formats.DTYPES else f"dtype {dtype} has no kernel"


def _is_skipped(name: str, skip: Sequence[str]) -> bool:
    parts = name.split(".")
    return any(part in skip for part in parts) or any(".".join(parts[:i]) in skip for i in range(1, len(parts) + 1))


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward; masks of torch.nn.utils.prune do not count."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values(),
             *module._backward_pre_hooks.values()]  # fmt: skip
    return "forward" in vars(module) or not all(isinstance(hook, prune.BasePruningMethod) for hook in hooks)


def weight_readers(model: nn.Module) -> dict[str, str]:
    """Names of layers whose weight a module's ``forward`` reads, with that module's class.

    Such a layer is bypassed (as in nn.MultiheadAttention) or asked for what a packed one lacks (as in T5). Adapters of
    PEFT read their matrices, and all but plain LoRA also the model's linear beneath.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if is_adapter(module):
            plain = type(module).__module__.startswith("peft.tuners.lora.") and not getattr(
                module, "lora_variant", None
            )
            inside = [path for path, child in module.named_modules() if is_linear(child)]
            found |= {join(name, path): "an adapter" for path in inside if not (plain and path == "base_layer")}
        forwards = [vars(base)["forward"] for base in type(module).__mro__ if "forward" in vars(base)]
        for path in set[str]().union(*map(_weights_read, forwards)):
            found[join(name, path)] = type(module).__name__
    return found


@cache
def _weights_read(forward: Callable[..., object]) -> list[str]:
    """``["fc", "attention.out"]`` if the source has ``self.fc.weight`` and ``self.attention.out.weight``."""
    try:
        return re.findall(r"\bself\.([\w.]+)\.weight\b", inspect.getsource(forward))
    except (OSError, TypeError):  # no source on this machine, or not a Python function
        return []


def mlp_modules(model: nn.Module, skip: Sequence[str]) -> list[MLPModule]:
    """Modules that one op can replace: MLPs alone, dense, with an activation that the kernels have."""
    found = []
    readers = weight_readers(model)
    plain = {linear for _, linear in linears_of(model, {})}
    for mlp in find_mlps(model):
        module = model.get_submodule(mlp.name)
        names = {child: join(mlp.name, name) for name, child in module.named_children()}
        inside = {part for linear in mlp.linears for part in linear.modules()}
        others = [part for part in module.modules() if part not in inside]
        if (
            all(part in plain and obstacle(names[part], part, readers, skip) is None for part in mlp.linears)
            and len({(w.dtype, w.device) for w in map(dense_weight, mlp.linears)}) == 1
            and not any(has_hooks(part) for part in others)
            and not any(True for part in others for _ in (*part.parameters(False), *part.buffers(False)))
            and (activation := _mlp_activation(module, mlp)) is not None
        ):
            found.append(MLPModule(mlp.name, module, mlp, activation))
    return found


def _mlp_activation(module: nn.Module, mlp: MLP) -> str | None:
    """The activation with which ``module`` is an MLP and nothing else; None if it is something else.

    Shown on a copy of the module with small float64 layers in place of its own: right to rounding on small and large
    random tokens, so that neighbours such as GELU and its tanh form, or a clamp, cannot be taken for each other.
    """
    generator = torch.Generator().manual_seed(0)
    same = dense_weight(mlp.up).shape[1] == dense_weight(mlp.down).shape[0]
    H, K, N = 16, 8, 8 if same else 12

    def small(linear: nn.Module) -> nn.Linear:
        rows, columns = (N, H) if linear is mlp.down else (H, K)
        bias = None if dense_bias(linear) is None else torch.randn(rows, generator=generator, dtype=torch.float64)
        return frozen_linear(torch.randn(rows, columns, generator=generator, dtype=torch.float64), bias)

    linears = [small(linear) for linear in mlp.linears]
    x = torch.randn(2, 3, K, generator=generator, dtype=torch.float64)
    inputs = (0.3 * x, 30 * x)
    try:
        if len(inspect.signature(module.forward).parameters) != 1:
            return None
        with torch.no_grad():
            variant = variant_of(module, mlp, linears)
            results = [variant(x) for x in inputs]
    except Exception:  # whatever a module raises that is no MLP
        return None
    for activation in ACTIVATIONS:
        if activation is not None:
            candidate = SparseMLP(*linears, activation=activation)
            if all(_equal(result, candidate(x)) for result, x in zip(results, inputs, strict=True)):
                return activation
    return None


def _equal(result: object, expected: Tensor) -> bool:
    if not isinstance(result, Tensor) or result.shape != expected.shape:
        return False
    return bool(((result - expected).abs() <= 1e-6 * expected.abs().max()).all())


def variant_of(module: nn.Module, mlp: MLP, linears: Iterable[nn.Module]) -> nn.Module:
    """A copy of an MLP's module, in eval mode, with other linears (up, down[, gate]); the module stays as it is."""
    new = dict(zip(mlp.linears, linears, strict=True))
    variant = copy.copy(module)
    variant._modules = {
        name: new[child] if child in new else copy.deepcopy(child).eval()
        for name, child in module._modules.items()
        if child is not None
    }
    variant.training = False
    return variant
