"""Experts of mixture-of-experts language models: how far fine-tuning moved each one's router vector, and removing them.

Everywhere: E experts of H neurons, D the model's width; ``router.weight [E, D]``, ``experts.gate_up_proj [E, 2 H, D]``
and ``experts.down_proj [E, D, H]``, as transformers 5 has them. Row s of the router's weight is w_s.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasticl.checkpoint import read_header, read_tensors, weight_files

ARCHITECTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")  # config.model_type
_STACKED = ("gate_up_proj", "down_proj")
_MODULE = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp$")
_ROUTER = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe)\.gate\.weight$")  # the latter in Mixtral's files


@dataclass(frozen=True)
class MoELayer:
    """The routed experts of one decoder block; ``name`` is the experts' module's, ``block`` the number of the block."""

    name: str
    block: int
    router: nn.Module
    experts: nn.Module

    @property
    def weight(self) -> Tensor:
        """The router's, ``[E, D]``."""
        return self.router.get_parameter("weight").detach()

    @property
    def stacked(self) -> list[Tensor]:
        """The experts' weights, ``[E, ...]`` each."""
        return [self.experts.get_parameter(name).detach() for name in _STACKED]


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model of one of ``ARCHITECTURES``, by block.

    Raises:
        ValueError: the model is of another architecture or has no such layer, or a layer's parameters are not the
            three that are expected, with data.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"expected a model with experts of type {', '.join(ARCHITECTURES)}, got {type(model).__name__}"
            + (f" of type {kind}" if kind else "")
        )
    E, D = config.num_experts, config.hidden_size
    layers = []
    for path, module in model.named_modules():
        if (match := _MODULE.search(path)) is None or not hasattr(module, "experts"):
            continue
        layer = MoELayer(
            f"{path}.experts", int(match[1]), module.get_submodule("gate"), module.get_submodule("experts")
        )
        parameters = [*layer.router.named_parameters(), *layer.experts.named_parameters()]
        shapes = {name: list(parameter.shape) for name, parameter in parameters}
        H = shapes.get("down_proj", [0])[-1]
        expected = {"weight": [E, D], "gate_up_proj": [E, 2 * H, D], "down_proj": [E, D, H]}
        if shapes != expected:
            raise ValueError(f"{layer.name}, with its router: expected parameters {expected}, got {shapes}")
        for name, parameter in parameters:
            if parameter.is_meta or not parameter.is_floating_point():
                got = "none" if parameter.is_meta else str(parameter.dtype)
                raise ValueError(f"{layer.name}, with its router: expected floating-point data in {name}, got {got}")
        layers.append(layer)
    if not layers:
        raise ValueError(
            f"expected at least one MoE layer in {type(model).__name__}, as transformers 5 has them, got none"
        )
    return layers


def pretrained_routers(pretrained: nn.Module | str | os.PathLike[str]) -> dict[int, Tensor]:
    """The routers' weights ``[E, D]`` of a model, or of a folder's safetensors files, by the number of their block.

    Of a folder nothing else is read.

    Raises:
        ValueError: the model has no MoE layers, or the folder no safetensors files.
    """
    if isinstance(pretrained, nn.Module):
        return {layer.block: layer.weight for layer in find_moe_layers(pretrained)}
    if not Path(pretrained).is_dir():
        raise ValueError(f"pretrained: expected a model or the folder of one, got {os.fspath(pretrained)}")
    files = weight_files(Path(pretrained))
    found = read_tensors(files, filter(_ROUTER.search, read_header(files)))
    return {int(match[1]): weight for name, weight in found.items() if (match := _ROUTER.search(name))}


def router_norm_changes(layers: Sequence[MoELayer], pretrained: Mapping[int, Tensor]) -> list[Tensor]:
    """``||w_s||_2 - ||w_s before fine-tuning||_2`` of each expert s of each layer, float64 ``[E]`` on the CPU.

    Args:
        layers: of the fine-tuned model.
        pretrained: of :func:`pretrained_routers`.

    Raises:
        ValueError: ``pretrained`` lacks a layer's router or has one of another shape; a weight is not finite; or
            fine-tuning left a router as it was, so that nothing ranks its experts.
    """
    changes = []
    for layer in layers:
        weight, before = layer.weight, pretrained.get(layer.block)
        if before is None or before.shape != weight.shape:
            got = "none" if before is None else str(list(before.shape))
            raise ValueError(f"{layer.name}: expected a pretrained router {list(weight.shape)}, got {got}")
        if not bool(weight.isfinite().all()) or not bool(before.isfinite().all()):
            raise ValueError(f"{layer.name}: expected routers of finite weights, got NaN or inf")
        if torch.equal(weight, before.to(weight)):
            raise ValueError(
                f"{layer.name}: expected a router that fine-tuning changed, got the pretrained one: "
                "nothing ranks its experts"
            )
        norms = [torch.linalg.vector_norm(w.double(), dim=1).cpu() for w in (weight, before)]
        changes.append(norms[0] - norms[1])
    return changes


def remove_experts_(model: nn.Module, layers: Sequence[MoELayer], gone: Sequence[Tensor]) -> None:
    """Remove the experts where the masks ``[E]`` of each layer are true, their router vectors with them, in place.

    The parameters are new ones, and ``model.config`` says how many experts are left, which are equally many everywhere.

    Raises:
        ValueError: fewer would be left than the router picks for a token. Nothing is changed then.
    """
    config: Any = model.config
    E, left = len(gone[0]), int((~gone[0]).sum())
    picked = config.num_experts_per_tok
    if left < picked:
        raise ValueError(
            f"expected at least {picked} experts to stay, as many as the router picks for a token "
            f"(num_experts_per_tok), got {left} of {E}"
        )
    for layer, mask in zip(layers, gone, strict=True):
        for module, name in ((layer.router, "weight"), *((layer.experts, name) for name in _STACKED)):
            old = module.get_parameter(name)
            setattr(module, name, nn.Parameter(old.detach()[~mask.to(old.device)], old.requires_grad))
    for module in model.modules():
        if "num_experts" in vars(module):
            vars(module)["num_experts"] = left
    config.num_experts = left


def stacked_weights(model: nn.Module) -> int:
    """How many weights of experts a model of any type holds in parameters ``[E, ...]``, which are no linear's."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in _STACKED and not nn.parameter.is_lazy(parameter) and parameter.dim() == 3
    )
