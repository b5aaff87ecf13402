"""What a model has to prune: its linear layers, its MLPs' neurons and its attentions' heads, as views of its weights.

Everywhere ``W [N, K]``, N outputs and K inputs: the ``[K, N]`` weight of GPT-2's Conv1D is viewed transposed.
Masks that other tools left hide a weight until :func:`fold_masks_` makes them plain zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Layer:
    """A linear and its weight, read as ``[N, K]`` whichever way the module stores it."""

    name: str
    module: nn.Module
    weight: Tensor  # [N, K], a view of the parameter

    @property
    def key(self) -> Hashable:
        """Equal for layers that share their weight."""
        return self.weight.device, self.weight.data_ptr(), self.weight.shape, self.weight.stride()

    @property
    def bias(self) -> list[Tensor]:
        bias = self.module._parameters.get("bias")
        return [] if bias is None else [bias.detach()]


def find_layers(model: nn.Module, accept: Filter) -> list[Layer]:
    """The linears that ``accept`` lets pass, in module order."""
    return [_layer(child, name) for name, child in model.named_modules() if is_linear(child) and accept(child, name)]


def is_linear(module: object) -> TypeGuard[nn.Module]:
    """Whether it is an nn.Linear or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: object) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # transformers, without importing it


def is_adapter(module: nn.Module) -> bool:
    """Whether it is a layer of PEFT: one of the model's own (``base_layer``), and weights that are added to it."""
    return any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__)  # without importing peft


def _layer(module: nn.Module, name: str) -> Layer:
    """The linear ``module``, which is called ``name``.

    Raises:
        TypeError: if its weight is not floating-point.
        ValueError: if its weight is computed by a parametrization or a hook, or has no data.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(f"{name}: expected a plain weight parameter, got one computed by a parametrization or a hook")
    if weight.is_meta or nn.parameter.is_lazy(weight):
        raise ValueError(f"{name}: expected a weight with data, got one that is not materialised")
    if not weight.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point weight, got {weight.dtype}")
    data = weight.detach()
    return Layer(name, module, data.t() if _is_conv1d(module) else data)


def distinct_layers(layers: Iterable[Layer]) -> list[Layer]:
    """Shared weights once, under their first name."""
    first: dict[Hashable, Layer] = {}
    for layer in layers:
        first.setdefault(layer.key, layer)
    return list(first.values())


def find_blocks(model: nn.Module, layers: Iterable[Layer]) -> list[nn.Module]:
    """The decoder blocks: the members of the outermost ``nn.ModuleList`` or ``nn.Sequential`` of which several hold
    ``layers``; of lists side by side, that with the most such members. Empty if there is none.
    """
    linears = {layer.module for layer in layers}
    best: list[nn.Module] = []
    most, above = 1, None
    for path, module in model.named_modules():
        if above is not None and path.startswith(above):
            continue
        if isinstance(module, nn.ModuleList | nn.Sequential):
            count = sum(any(child in linears for child in member.modules()) for member in module)
            if count > 1:
                above = join(path, "")
            if count > most:
                best, most = list(module), count
    return best


def split_by_block(blocks: Iterable[nn.Module], layers: Iterable[Layer]) -> tuple[list[list[Layer]], list[Layer]]:
    """The layers of each block; and those in no block, or with a weight that is read from several places."""
    layers = list(layers)
    inside = [set(block.modules()) for block in blocks]
    readers: dict[Hashable, set[int]] = {layer.key: set() for layer in layers}
    for layer in layers:
        readers[layer.key] |= {i for i, modules in enumerate(inside) if layer.module in modules} or {-1}
    own = [[layer for layer in layers if readers[layer.key] == {i}] for i in range(len(inside))]
    return own, [layer for layer in layers if len(readers[layer.key]) > 1 or -1 in readers[layer.key]]


def default_filter(model: nn.Module) -> Filter:
    """Accepts all but output embeddings, the one-row gate of Qwen2-MoE's shared expert, the matrices of adapters, and
    the ``out_proj`` of ``nn.MultiheadAttention``, which is never called.
    """
    output = set()  # parameters that embed tokens or score the vocabulary
    added = set[nn.Module]()
    for module in model.modules():
        if is_adapter(module):
            added.update(
                part for name, child in module.named_children() if name != "base_layer" for part in child.modules()
            )
        if isinstance(module, nn.Embedding):
            output.add(id(module.weight))
        elif callable(get := getattr(module, "get_output_embeddings", None)) and (head := get()) is not None:
            output.update(map(id, head.parameters()))

    def accept(module: nn.Module, name: str) -> bool:
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) or module in added:
            return False
        return (
            name.rpartition(".")[2] not in ("lm_head", "shared_expert_gate")
            and id(module._parameters.get("weight")) not in output
        )

    return accept


@dataclass(frozen=True)
class MLP:
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` with a gate; ``name`` is the path of their parent."""

    name: str
    up: nn.Module
    down: nn.Module
    gate: nn.Module | None = None

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        return (self.up, self.down) if self.gate is None else (self.up, self.down, self.gate)


_MLP_CHILDREN: tuple[tuple[str, ...], ...] = (  # up, down[, gate]
    ("up_proj", "down_proj", "gate_proj"),  # Llama, Mistral, Qwen, Gemma
    ("c_fc", "c_proj"),  # GPT-2
    ("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX
    ("fc1", "fc2"),  # OPT
    ("linear1", "linear2"),  # nn.TransformerEncoderLayer
)
_ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Mish, nn.ReLU6, nn.Softplus)


def find_mlps(model: nn.Module) -> list[MLP]:
    """The MLPs of a model, in module order.

    Found by the names of a module's children (Llama and its kin, GPT-2, GPT-NeoX, OPT, ``nn.TransformerEncoderLayer``),
    where only an elementwise activation is taken to lie between up and down, and as ``Linear, activation, [Dropout,]
    Linear`` in an ``nn.Sequential``. There neighbours may share a linear: the down of one is the up of the next.
    """
    mlps = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        for names in _MLP_CHILDREN:
            linears = [child for name in names if is_linear(child := children.get(name))]
            if len(linears) == len(names) and len({_hidden_size(*pair) for pair in enumerate(linears)}) == 1:
                mlps.append(MLP(path, *linears))
        if type(module).forward is nn.Sequential.forward:
            steps = [step for step in children.values() if not isinstance(step, nn.Dropout)]
            for up, activation, down in zip(steps, steps[1:], steps[2:], strict=False):
                if is_linear(up) and isinstance(activation, _ELEMENTWISE) and is_linear(down):
                    mlps.append(MLP(path, up, down))
    return mlps


def _hidden_size(role: int, linear: nn.Module) -> int:
    """The outputs of up (role 0) and gate (2), the inputs of down (1): unequal where ``up`` makes its gate too."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.shape[(role == 1) != _is_conv1d(linear)]


@dataclass(frozen=True)
class Group:
    """The H neurons of an MLP, or heads of an attention; of ``view [V, ...]``, unit h owns entry ``h * V // H``."""

    size: int
    layers: tuple[Layer, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def zero_(self, units: Tensor) -> None:
        """Zero the units where the mask ``[H]`` is true; an entry of several units (grouped keys) needs all of them."""
        for view in (*self.weights, *self.biases):
            if len(view):
                view[units.to(view.device).view(len(view), -1).all(1)] = 0


def find_neurons(model: nn.Module, accept: Filter) -> list[Group]:
    """The neurons of each MLP of which ``accept`` lets all linears pass; a group's layers are up, down[, gate]."""
    names = {id(module): name for name, module in model.named_modules()}
    groups = []
    for mlp in find_mlps(model):
        if not all(accept(linear, names[id(linear)]) for linear in mlp.linears):
            continue
        layers = tuple(_layer(linear, names[id(linear)]) for linear in mlp.linears)
        up, down, *gate = layers
        biases = tuple(bias for layer in (up, *gate) for bias in layer.bias)
        weights = (up.weight, down.weight.t(), *(layer.weight for layer in gate))  # [H, K] or, of down, [H, N]
        groups.append(Group(len(up.weight), layers, weights, biases))
    return groups


_ATTENTION_CHILDREN = (  # what makes queries, keys and values; output
    (("q_proj", "k_proj", "v_proj"), "o_proj"),  # Llama, Mistral, Qwen, Gemma
    (("q_proj", "k_proj", "v_proj"), "out_proj"),  # OPT
    (("c_attn",), "c_proj"),  # GPT-2: [3, H, D] rows
    (("query_key_value",), "dense"),  # GPT-NeoX: [H, 3, D] rows
)


def find_heads(model: nn.Module, accept: Filter) -> list[Group]:
    """The heads of each attention of which ``accept`` lets all linears pass; a group's last layer is the output.

    Raises:
        ValueError: if the number of heads, or where they lie in the weights, cannot be determined.
    """
    groups = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        for inputs, output in _ATTENTION_CHILDREN:
            linears = {join(path, name): child for name in (*inputs, output) if is_linear(child := children.get(name))}
            if len(linears) == len(inputs) + 1 and all(accept(child, name) for name, child in linears.items()):
                layers = tuple(_layer(child, name) for name, child in linears.items())
                if inputs == ("c_attn",) and not _is_conv1d(layers[0].module):
                    raise ValueError(
                        f"{layers[0].name}: expected Conv1D, got nn.Linear, whose order of q, k, v is unknown"
                    )
                groups.append(_heads(path, layers, _num_heads(path, module, model)))
    return groups


def _num_heads(path: str, module: nn.Module, model: nn.Module) -> int:
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head")
    for owner in (module, getattr(module, "config", None), getattr(model, "config", None)):
        for name in names:
            if isinstance(heads := getattr(owner, name, None), int) and heads > 0:
                return heads
    raise ValueError(f"{path}: expected one of {', '.join(names)} on the module, its config or model.config, got none")


def _heads(path: str, layers: tuple[Layer, ...], heads: int) -> Group:
    """Views by head of the rows of q, k and v and of the columns of the output."""
    *inputs, output = layers
    rows, width = [len(layer.weight) for layer in inputs], output.weight.shape[1]
    size = width // heads  # D
    shape: tuple[int, ...]
    if len(inputs) == 3:
        shared = rows[1] // max(size, 1)  # heads of k and v
        known = rows[0] == width and rows[1] == rows[2] == shared * size and shared > 0 and heads % shared == 0
        shape = (-1, size)
    else:
        known = rows[0] == 3 * width
        shape = (3, heads, size) if _is_conv1d(inputs[0].module) else (heads, 3 * size)
    if width % heads or not known:
        raise ValueError(
            f"{path}: expected rows of q, k and v for {heads} heads and an output of K = {width}, "
            f"got {', '.join(f'{layer.name} with {n} rows' for layer, n in zip(inputs, rows, strict=True))}"
        )

    def split(tensor: Tensor) -> tuple[Tensor, ...]:  # [rows, ...] -> [heads, D, ...]
        view = tensor.unflatten(0, shape)
        return view.unbind(0) if len(shape) == 3 else (view,)

    weights = [view for layer in inputs for view in split(layer.weight)]
    biases = [view for layer in inputs for bias in layer.bias for view in split(bias)]
    return Group(heads, layers, (*weights, output.weight.t().unflatten(0, (heads, size))), tuple(biases))


def distinct_groups(groups: list[Group]) -> list[Group]:
    """Groups that share all their weights once; one that shares some of them cannot be pruned on its own."""
    seen: dict[tuple[int, Hashable], tuple[Hashable, ...]] = {}
    distinct: list[Group] = []
    for group in groups:
        keys = tuple(layer.key for layer in group.layers)
        same = [seen.setdefault((role, key), keys) == keys for role, key in enumerate(keys)]
        if not all(same):
            name = group.layers[same.index(False)].name
            raise ValueError(f"{name}: expected an MLP or attention to share all its weights or none, got some")
        if keys not in (tuple(layer.key for layer in other.layers) for other in distinct):
            distinct.append(group)
    return distinct


def fold_masks_(model: nn.Module) -> list[str]:
    """Make the masks of ``torch.nn.utils.prune`` and ``torch.ao.pruning`` permanent: ``weight = weight_orig * mask``.

    Returns:
        The names of the parameters that had a mask.

    Raises:
        ValueError: if a masked parameter is shared with a module that has no mask, or another one.
    """
    uses: dict[int, list[tuple[str, Tensor | None]]] = {}  # parameter -> who reads it, through which mask
    folds: dict[str, Callable[[], object]] = {}
    for path, module in model.named_modules():
        for child, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            uses.setdefault(id(parameter), []).append((child, _mask_of(module, child.rpartition(".")[2])))
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                folds[join(path, hook._tensor_name)] = partial(prune.remove, module, hook._tensor_name)
        if parametrize.is_parametrized(module):
            for name, steps in module.parametrizations.items():
                if all(map(_is_fake_sparsity, steps)):
                    folds[join(path, name)] = partial(parametrize.remove_parametrizations, module, name)
    for users in uses.values():
        (first, mask), *others = sorted(users, key=lambda user: user[1] is None)
        for other, other_mask in others:
            if mask is not None and (other_mask is None or not torch.equal(mask, other_mask)):
                raise ValueError(
                    f"{first} is masked, but {other} shares the parameter with another mask or none: untie them"
                )
    for fold in folds.values():
        fold()
    return list(folds)


def _mask_of(module: nn.Module, tensor: str) -> Tensor | None:
    """The mask through which ``module`` reads its parameter called ``tensor``."""
    if tensor.endswith("_orig"):
        return module._buffers.get(tensor.removesuffix("_orig") + "_mask")
    if isinstance(module, parametrize.ParametrizationList) and all(map(_is_fake_sparsity, module)):
        mask = torch.ones((), dtype=torch.bool)
        for step in module:
            mask = mask & (step.mask != 0)
        return mask
    return None


def _is_fake_sparsity(step: nn.Module) -> bool:
    return type(step).__name__ == "FakeSparsity"  # torch.ao.pruning, which may be gone from a torch to come


def join(path: str, child: str) -> str:
    """The name of a child of the module called ``path``, which is empty for the model itself."""
    return f"{path}.{child}" if path else child
