"""Tensor parallelism: one model over several processes of torch.distributed, each with its part of every weight.

A linear ``y = x W^T + b`` is split by the rows of W or by its columns:

    rows ("colwise" in a plan)     process r computes its outputs, ``y_r = x W[rows_r]^T + b[rows_r]``; they stay where
                                   they are, or are gathered
    columns ("rowwise" in a plan)  from its part of x it computes a share of all outputs, and shares are summed:
                                   ``y = sum_r x_r W[:, columns_r]^T + b``; the first process alone adds b

Rows of q, k, v, up and gate are followed by columns of o and down, so that a block sums twice and exchanges nothing
else. What is split, and how, is a plan's to say: transformers' models bring theirs. Parts are those of torch.chunk.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from fasticl.checkpoint import make_serializable
from fasticl.layers import is_linear, join
from fasticl.nn import SparseLinear, SparseMLP, dense_bias, dense_weight, frozen_linear
from fasticl.replaceable import has_hooks, obstacle

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Plan = Mapping[str, str]


@dataclass(frozen=True)
class Style:
    """How a layer's weight ``W [N, K]`` is split, and what is exchanged."""

    dim: int  # of W: 0 rows, 1 columns
    gather: bool = False  # every process gets all outputs
    take: bool = False  # x comes whole, and each process takes its part
    groups: int = 1  # matrices that lie one after the other in the rows; each is split
    embedding: bool = False  # W is one: each process looks up the tokens that it has, and shares are summed


COLWISE, ROWWISE = Style(0), Style(1)
STYLES = {  # in transformers' words
    "colwise": COLWISE,
    "colwise_gather_output": Style(0, gather=True),
    "colwise_rep": Style(0, gather=True),
    "packed_colwise": Style(0, groups=2),
    "rowwise": ROWWISE,
    "rowwise_split_input": Style(1, take=True),
    "rowwise_rep": Style(1, take=True),
    "embedding_rowwise": Style(0, embedding=True),
    "replicate": None,
    "replicated_with_grad_allreduce": None,
}


def parallelize(model: nn.Module, mesh: DeviceMesh | None = None, plan: Plan | None = None) -> nn.Module:
    """Leaves each process its part of a model, in place, for inference; every process must hold the same whole one.

    Outputs equal the whole model's to rounding, packed, dense and fused layers alike. A layer's part is copied and the
    whole one let go before the next: on the CPU, where the device has no room for the whole model, which moves there
    afterwards. Then no parameter needs a gradient, and the model is neither saved nor decoded by
    :class:`fasticl.Decoder`. In a program that is one process alone nothing happens.

        model = fasticl.parallelize(AutoModelForCausalLM.from_pretrained(folder)).to(device)

    Args:
        model: as :func:`fasticl.convert` leaves it, or a dense one.
        mesh: of one dimension. None is all processes, on the accelerator if there is one and torch.distributed was not
            started with gloo, else on the CPU.
        plan: layer -> style; layers as in ``model.named_modules()``, with ``*`` for numbers, and styles in the words of
            transformers: colwise, colwise_gather_output, packed_colwise, rowwise, rowwise_split_input,
            embedding_rowwise, replicate. None is ``model.tp_plan``. What no rule names stays whole.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module, or a rule splits what is no linear or embedding.
        ValueError: the mesh has more dimensions; there is no plan, or it names a layer or style that there is not, or
            splits a fused MLP in another way than up and gate by rows and down by columns; the number of heads is not
            divisible by that of processes; the model is split already, or of other sizes in another process.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_whole(model, "to be split")
    if mesh is None:
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return model
        mesh = _all_processes()
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected 1 dimension, got {mesh.ndim}")
    rules: Plan | None = getattr(model, "tp_plan", None) if plan is None else plan
    if not rules:
        raise ValueError(f"plan: expected layers and their styles, as {type(model).__name__} has no tp_plan; got none")
    styles = _match(model, rules, strict=plan is not None)
    check_heads(model, rules, mesh.size())
    _check_same({path: _sizes(model.get_submodule(path)) for path in styles}, mesh)

    parameters = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    tied: dict[int, tuple[Tensor, Tensor]] = {}  # an embedding's weight, and its rows here for the head that shares it
    for path, style in sorted(styles.items(), key=lambda item: not item[1].embedding):
        layer: Any = model.get_submodule(path)
        sizes = _sizes(layer)
        if style.embedding:
            whole = layer.weight
            rows = _split_embedding(layer, mesh)
            if parameters.count(id(whole)) > 1:
                tied[id(whole)] = whole, rows
        else:
            _, here = tied.get(id(getattr(layer, "weight", None)), (None, None))
            layer = split(layer, style, mesh, here if style == STYLES["colwise_gather_output"] else None)
            model.set_submodule(path, layer)
        connect(layer, style, sizes, mesh)
    model.requires_grad_(False)
    model._tp_size, model._tp_plan = mesh.size(), dict(rules)  # type: ignore[assignment] # where transformers looks
    make_serializable(model)  # whose plug-in knows that this is not the whole model
    return model


def check_whole(model: nn.Module, purpose: str) -> None:
    """Raises ValueError where ``model`` is a process's part of one."""
    size: Any = getattr(model, "_tp_size", None) or 1
    if size > 1:
        raise ValueError(f"model: expected a whole model {purpose}, got one process's part of {size}")


def style_of(plan: Plan, path: str) -> Style | None:
    """How the layer called ``path`` is split; None is not at all.

    Raises:
        ValueError: there is no such style.
    """
    name = _rule(plan, path)
    if name is not None and name not in STYLES:
        raise ValueError(f"{path}: expected a style of {', '.join(STYLES)}, got {name!r}")
    return None if name is None else STYLES[name]


def fused_style(path: str, styles: Sequence[Style | None], linears: int) -> Style | None:
    """How an MLP of 2 or 3 linears that runs as one op is split, from the styles that a plan gives some of them.

    Raises:
        ValueError: not all are split, or in another way than as rows, rows and columns.
    """
    split = [style for style in styles if style is not None]
    if split and (len(split), split.count(COLWISE), split.count(ROWWISE)) != (linears, linears - 1, 1):
        raise ValueError(f"{path}: expected the plan to split up and gate colwise and down rowwise, or none of them")
    return ROWWISE if split else None


def check_heads(model: nn.Module, plan: Plan, size: int) -> None:
    """Raises ValueError where an attention whose q, k or v the plan splits has heads that ``size`` does not divide."""
    for path, module in model.named_modules():
        if not (hasattr(module, "head_dim") or hasattr(module, "head_size")):
            continue
        if not any(_rule(plan, join(path, name)) == "colwise" for name, _ in module.named_children()):
            continue
        config: Any = getattr(module, "config", None) or getattr(model, "config", None)
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, name, None)
            if isinstance(heads, int) and heads % size:
                raise ValueError(f"{path}: expected {name} divisible by {size} processes, got {heads}")


def split(layer: Any, style: Style, mesh: DeviceMesh, rows: Tensor | None = None) -> Any:
    """This process's part of an ``nn.Linear``, Conv1D, SparseLinear or SparseMLP, as tensors of its own.

    ``rows`` are those of a dense weight, where they are here already.
    """
    if isinstance(layer, SparseMLP):
        gate = None if layer.gate is None else split(layer.gate, COLWISE, mesh)
        parts = (split(layer.up, COLWISE, mesh), split(layer.down, ROWWISE, mesh), gate)
        return SparseMLP(*parts, activation=layer.activation).train(layer.training)
    bias = dense_bias(layer)
    N, K = _sizes(layer)
    device = layer.values.device if isinstance(layer, SparseLinear) else layer.weight.device
    index = part((N, K)[style.dim], mesh, style.groups).to(device)
    if bias is not None:
        bias = bias[index] if style.dim == 0 else bias.clone() if mesh.get_local_rank() == 0 else None
    if isinstance(layer, SparseLinear):
        return SparseLinear(layer.packed.index_select(style.dim, index), bias).train(layer.training)
    weight = dense_weight(layer).detach().index_select(style.dim, index) if rows is None else rows
    return frozen_linear(weight, bias).train(layer.training)


def part(count: int, mesh: DeviceMesh, groups: int = 1) -> Tensor:
    """Which of ``count`` rows or columns are this process's: int64, ascending."""
    size, rank = mesh.size(), mesh.get_local_rank()
    chunk = -(-(count // groups) // size)
    return torch.arange(count).view(groups, -1)[:, rank * chunk : (rank + 1) * chunk].flatten()


def connect(layer: nn.Module, style: Style, sizes: tuple[int, int], mesh: DeviceMesh) -> None:
    """Adds the exchange to a process's part of a layer that was ``sizes`` [N, K] as a whole."""
    N, K = sizes
    if style.take:
        own = part(K, mesh)
        start = int(own[0]) if len(own) else 0
        layer.register_forward_pre_hook(partial(_take, start=start, length=len(own)))
    if style.gather:
        layer.register_forward_hook(partial(_gather, mesh=mesh, N=N))
    elif style.dim == 1 or style.embedding:
        layer.register_forward_hook(partial(_sum, mesh=mesh))


def _all_processes() -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or (dist.is_initialized() and dist.get_backend() == "gloo"):
        accelerator = torch.device("cpu")
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    return init_device_mesh(accelerator.type, (size,))


def _match(model: nn.Module, plan: Plan, strict: bool) -> dict[str, Style]:
    """Layers that the plan splits, each checked; ``strict`` wants something for every rule."""
    styles: dict[str, Style] = {}
    used: set[str] = set()
    fused: list[str] = []
    for path, layer in model.named_modules(remove_duplicate=False):
        if path.startswith(tuple(fused)) and fused:
            continue
        used |= {path, _pattern(path)}
        if isinstance(layer, SparseMLP):
            fused.append(f"{path}.")
            inside = [rule for rule in plan if rule.rpartition(".")[0] in (path, _pattern(path))]
            used |= set(inside)
            style = fused_style(path, [style_of(plan, rule) for rule in inside], 2 if layer.gate is None else 3)
        else:
            style = style_of(plan, path)
        if style is None:
            continue
        kinds = nn.Embedding if style.embedding else (SparseLinear, SparseMLP)
        if not (isinstance(layer, kinds) or (is_linear(layer) and not style.embedding)):
            kind = "an embedding" if style.embedding else "a linear"
            raise TypeError(f"{path}: expected {kind} to split, got {type(layer).__name__}")
        why = obstacle(path, layer, {}, ()) if is_linear(layer) else None
        if why is None and any(map(has_hooks, layer.modules())):
            why = "has hooks, or a forward of its own"
        if why is not None:
            raise TypeError(f"{path}: expected a layer that computes nothing else, got one that {why}")
        styles[path] = style
    for name, _ in model.named_parameters():
        if {name, _pattern(name)} & set(plan) and style_of(plan, name) is not None:
            raise TypeError(f"{name}: expected a linear or embedding to split, got a parameter")
    if (unused := [rule for rule in plan if rule not in used]) and (strict or not styles):
        raise ValueError(f"plan: expected layers of {type(model).__name__}, which has no {unused[0]}")
    return styles


def _check_same(sizes: dict[str, tuple[int, int]], mesh: DeviceMesh) -> None:
    """Raises ValueError, in every process, where one has other layers: as timing may choose in fasticl.convert."""
    everyone: list[Any] = [None] * mesh.size()
    dist.all_gather_object(everyone, list(sizes.items()), group=mesh.get_group())
    for other in everyone:
        if different := set(other) ^ set(everyone[0]):
            path = min(path for path, _ in different)
            found = [list(dict(each).get(path, ())) for each in everyone]
            raise ValueError(f"{path}: expected the same sizes in each process, got {', '.join(map(str, found))}")


def _split_embedding(embedding: nn.Embedding, mesh: DeviceMesh) -> Tensor:
    """Leaves an embedding this process's rows, which it returns, and one of zeros for the tokens of the others."""
    whole = embedding.weight.detach()
    index = part(len(whole), mesh).to(whole.device)
    weight = torch.cat((whole[index], whole.new_zeros(1, whole.shape[1])))
    rest = len(weight) - 1
    embedding.weight = nn.Parameter(weight, requires_grad=False)
    embedding.num_embeddings, embedding.padding_idx = rest + 1, None
    embedding.register_forward_pre_hook(partial(_localize, start=int(index[0]) if rest else 0, rest=rest))
    return weight[:rest]


def _localize(_: nn.Module, args: tuple[Any, ...], *, start: int, rest: int) -> tuple[Any, ...]:
    tokens = args[0] - start
    return tokens.where((tokens >= 0) & (tokens < rest), rest), *args[1:]


def _take(_: nn.Module, args: tuple[Any, ...], *, start: int, length: int) -> tuple[Any, ...]:
    return args[0].narrow(-1, start, length), *args[1:]


def _sum(layer: nn.Module, args: object, y: Tensor, *, mesh: DeviceMesh) -> Tensor:
    _check_no_grad(layer, y)
    y = y.contiguous()
    dist.all_reduce(y, group=mesh.get_group())
    return y


def _gather(layer: nn.Module, args: object, y: Tensor, *, mesh: DeviceMesh, N: int) -> Tensor:
    _check_no_grad(layer, y)
    own = pad(y, (0, -(-N // mesh.size()) - y.shape[-1])).contiguous()
    parts = [torch.empty_like(own) for _ in range(mesh.size())]
    dist.all_gather(parts, own, group=mesh.get_group())
    return torch.cat(parts, -1)[..., :N]


def _check_no_grad(layer: nn.Module, y: Tensor) -> None:
    if y.requires_grad:
        raise ValueError(f"{layer}: expected no gradients in a model that is split; call it in torch.inference_mode()")


def _rule(plan: Plan, path: str) -> str | None:
    return plan.get(path, plan.get(_pattern(path)))


def _pattern(path: str) -> str:
    return ".".join("*" if each.isdigit() else each for each in path.split("."))


def _sizes(layer: Any) -> tuple[int, int]:
    """N and K of a linear, vocabulary and features of an embedding, H and K of a fused MLP."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, SparseMLP):
        return _sizes(layer.up)
    if isinstance(layer, SparseLinear):
        return layer.out_features, layer.in_features
    N, K = dense_weight(layer).shape
    return N, K
