"""Checkpoints of pruned models: Hugging Face folders in which packed weights stay packed.

A packed weight ``[N, K]`` called ``p.weight`` is stored as the tensors of compressed-tensors' ``sparse-bitmask``, which
are the portable form of :mod:`fasticl.formats`:

    p.shape        int64 [2]: N, K
    p.compressed   [nnz] in the weight's dtype, row by row
    p.bitmask      uint8 [N, ceil(K / 8)]; bit k % 8 of bitmask[n, k // 8] says that W[n, k] is stored; tail bits are 0
    p.row_offsets  int64 [N]; where row n begins in compressed

compressed-tensors' ``sparse-24-bitmask`` has ``shape`` [2, 1], ``compressed`` [N, K / 2] with two values of every four
columns, zeros among them, the same bitmask, and no offsets. FastICL alone stores int8 values: in ``int8-bitmask`` with
one tensor more, in ``int8-dense``, whose ``compressed`` is [N, K], in place of bitmask and row_offsets:

    p.scales       [N] in the weight's dtype; row n of W is scales[n] times its values

bfloat16 tensors may be compressed without loss, as :mod:`fasticl.coding` says.

Names are those of the model's own class: an MLP that runs as one
:class:`fasticl.nn.SparseMLP` is stored as the linears that it replaced.

``quantization_config`` in config.json says what each layer was: the format to compute in, the widths that neuron
pruning left, the MLPs that run as one op. :mod:`fasticl.huggingface` reads it inside transformers' ``from_pretrained``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr
from importlib.abc import MetaPathFinder
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasticl import formats
from fasticl.formats import PackedWeight
from fasticl.layers import find_mlps, is_linear, join
from fasticl.nn import SparseLinear, SparseMLP, dense_weight

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

QUANT_METHOD = "fasticl"
LAYOUTS = {  # of compressed-tensors -> what replaces a weight
    "sparse-bitmask": ("shape", "compressed", "bitmask", "row_offsets"),
    "sparse-24-bitmask": ("shape", "compressed", "bitmask"),
}
INT8_LAYOUTS = ("int8-bitmask", "int8-dense")  # of FastICL alone
SAVE_FORMATS = (QUANT_METHOD, *LAYOUTS)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}  # of safetensors

Header = dict[str, tuple[str, list[int]]]  # tensor -> its safetensors dtype and its shape


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    format: str = QUANT_METHOD,
    compress: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a Hugging Face model, packed layers packed, into a new folder that appears only when it is complete.

    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it where FastICL was imported. It is called as in
    transformers, and ``model.save_pretrained(folder)`` of a converted model writes the same files: what this one adds
    is that a failure leaves nothing behind, and compressed-tensors' formats. A model without packed layers or changed
    widths is saved as transformers would.

    Args:
        model: a ``transformers.PreTrainedModel``.
        folder: must be new, or empty.
        tokenizer: saved beside the model if given; anything with ``save_pretrained``.
        format: ``"fasticl"``, or ``"sparse-bitmask"`` or ``"sparse-24-bitmask"`` for programs that read
            compressed-tensors; there Conv1D layers are stored dense.
        compress: codes bfloat16 weights without loss (:mod:`fasticl.coding`), dense ones and embeddings too: smaller
            files, which take longer to load; for format ``"fasticl"``.
        max_shard_size: of a safetensors file, in bytes, or as ``"5GB"``.

    Raises:
        TypeError: ``model`` is no PreTrainedModel.
        ValueError: the format is unknown, or cannot hold this model (removed neurons, int8 values, nothing packed, not
            2:4), or is to be compressed and is not ``"fasticl"``.
        FileExistsError: ``folder`` has something in it.
    """
    plugin = _plugin()
    plugin.check_model(model)
    if format not in SAVE_FORMATS:
        raise ValueError(f"format: expected one of {', '.join(SAVE_FORMATS)}, got {format!r}")
    if compress and format != QUANT_METHOD:
        raise ValueError(f"compress: expected format {QUANT_METHOD!r}, got {format!r}")
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"folder: expected a new or empty folder, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with plugin.saving(model, format, compress):
            model.save_pretrained(temporary, max_shard_size=max_shard_size)  # type: ignore[operator]
        _count_tensors(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp's folders are their owner's alone
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def from_pretrained(folder: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """The causal language model in ``folder``, in evaluation mode, packed layers packed.

    ``AutoModelForCausalLM.from_pretrained``, and the one way to load a checkpoint that compressed-tensors wrote as
    ``sparse-bitmask`` or ``sparse-24-bitmask``, which transformers hands to a package that no longer reads them. Such
    weights become :class:`fasticl.nn.SparseLinear`, of the format that :func:`fasticl.pack` chooses.

    Args:
        folder: a local folder, or whatever else ``AutoModelForCausalLM.from_pretrained`` takes.
        kwargs: passed on to it.

    Raises:
        ValueError: a tensor is missing, or of a shape, dtype or content that it cannot have; the format is unknown.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(os.fspath(folder), **kwargs)
    found = _read_json(folder / "config.json")
    layout = foreign_layout(found)
    if layout is not None:
        _plugin()
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(folder)
        for name in ("sparsity_config", "compression_config"):
            if hasattr(config, name):
                delattr(config, name)
        header = read_header(weight_files(folder))
        layers = {
            name: {"format": "auto", "layout": layout, "key": key} for name, key in _foreign_layers(header).items()
        }
        if not layers:
            raise ValueError(f"{folder}: expected weights in {layout}, got none")
        config.quantization_config = {"quant_method": QUANT_METHOD, "layers": layers}
        kwargs["config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def load(
    folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: str = "cpu", **kwargs: Any
) -> tuple[Any, Any]:
    """:func:`from_pretrained` for programs: from local files and quietly. Returns the model, and its tokenizer or None.

    Args:
        dtype: None is that of the checkpoint.
        kwargs: for both, such as ``gguf_file``.

    Raises:
        ValueError: the folder does not load, with what is wrong.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from safetensors import SafetensorError
    from transformers import AutoTokenizer
    from transformers.utils import logging

    if not Path(folder).is_dir():
        raise ValueError(f"expected a Hugging Face model folder, got {folder}")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(StringIO()):  # the GGUF reader's own progress bar cannot be turned off
            tokenizer = None
            if kwargs or (Path(folder) / "tokenizer_config.json").is_file():
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **kwargs)
            model = from_pretrained(folder, dtype=dtype or "auto", local_files_only=True, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} does not load as a causal language model: {error}") from error
    return model.eval().to(device), tokenizer


def _count_tensors(folder: Path) -> None:
    """Writes into a packed checkpoint's config how many tensors it has, so that a lost one is noticed."""
    config = _read_json(folder / "config.json")
    if config.get("quantization_config", {}).get("quant_method") == QUANT_METHOD:
        config["quantization_config"]["tensors"] = len(read_header(weight_files(folder)))
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _plugin() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("checkpoints need transformers: pip install 'fasticl[hf]'") from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"checkpoints need transformers 5 or newer, got {transformers.__version__}")
    from fasticl import huggingface

    return huggingface


# --- one weight ------------------------------------------------------------------------------------------------------


def to_bitmask(packed: PackedWeight) -> dict[str, Tensor]:
    """The four tensors of ``sparse-bitmask``, or those of an int8 layout, by the last part of their names."""
    if packed.format == "compact":
        packed = formats.pack(packed.unpack(), "bitmap")
    tensors = {"shape": torch.tensor(packed.shape), "compressed": packed.values}
    if packed.format != "dense":
        tensors |= {"bitmask": packed.bitmask, "row_offsets": packed.row_offsets[:-1].clone()}
    if packed.scales is not None:
        tensors["scales"] = packed.scales
    return tensors


def to_24_bitmask(weight: Tensor) -> dict[str, Tensor]:
    """The three tensors of ``sparse-24-bitmask`` of a dense ``weight [N, K]``, as compressed-tensors makes them.

    Raises:
        ValueError: K is no multiple of 4, or more than 2 of 4 consecutive columns are not zero.
    """
    N, K = weight.shape
    if K % 4:
        raise ValueError(f"expected columns divisible by 4 for 2:4, got {K}")
    groups = weight.detach().cpu().contiguous().view(-1, 4)
    # Which zeros fill a group is up to topk there, and so it is here.
    keep = torch.zeros(groups.shape, dtype=torch.bool).scatter_(1, groups.abs().topk(2, dim=1).indices, True)
    if bool((groups.masked_fill(keep, 0) != 0).any()):
        raise ValueError("expected at most 2 of every 4 columns for 2:4, got more")
    bitmask = formats.pack(keep.view(N, K).float(), "bitmap").bitmask
    compressed = groups[keep].view(N, K // 2)
    return {"shape": torch.tensor([[N], [K]]), "compressed": compressed, "bitmask": bitmask}


def from_bitmask(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], layout: str, format: str, pattern: str | None
) -> PackedWeight:
    """The weight ``[N, K]`` of tensors read from a file; every value in them is checked first.

    Args:
        tensors: by the last part of their names; of the sizes that :func:`expected_tensors` gives.
        shape: N, K.
        layout: one of ``LAYOUTS`` or ``INT8_LAYOUTS``.
        format: of :func:`fasticl.pack`, ``"auto"`` included; of int8 values bitmap, sliced or nm, or else dense.
        pattern: of the portable form, for format ``"nm"``.

    Raises:
        ValueError: the tensors do not fit together, or do not hold a weight of that shape and format.
    """
    stored = tensors["shape"].flatten().tolist()
    if stored != list(shape):
        raise ValueError(f"shape: expected {list(shape)}, got {stored}")
    N, K = shape
    if layout == "int8-dense":
        return formats.from_dense(tensors["compressed"], tensors["scales"])
    values, scales = tensors["compressed"].flatten(), tensors.get("scales")
    if layout == "sparse-24-bitmask":
        row_offsets = torch.arange(N + 1, device=values.device) * (K // 2)
        packed = formats.from_portable("nm", shape, values, tensors["bitmask"], row_offsets, "2:4")
        return packed if format in ("auto", "nm") else formats.pack(packed.unpack(), format)
    row_offsets = torch.cat((tensors["row_offsets"], tensors["row_offsets"].new_tensor([values.numel()])))
    if format in ("bitmap", "sliced", "nm") or scales is not None:
        return formats.from_portable(format, shape, values, tensors["bitmask"], row_offsets, pattern, scales)
    return formats.pack(
        formats.from_portable("bitmap", shape, values, tensors["bitmask"], row_offsets).unpack(), format
    )


def expected_tensors(header: Header, key: str, shape: tuple[int, int], layout: str) -> dict[str, list[int]]:
    """Sizes of the tensors called ``key.*``, by the last part of their names, after the file's header was checked.

    Raises:
        ValueError: one is missing, or has a dtype or shape that a weight of that shape cannot have.
    """
    N, K = shape
    stored = header.get(f"{key}.compressed", ("", [0]))[1]
    if layout == "sparse-24-bitmask":
        sizes = {"shape": [2, 1], "compressed": [N, K // 2], "bitmask": [N, -(-K // 8)]}
        if K % 4:
            raise ValueError(f"{key}: expected columns divisible by 4 for {layout}, got {K}")
    elif layout == "int8-dense":
        sizes = {"shape": [2], "compressed": [N, K], "scales": [N]}
    else:
        # The number of values is the file's to say, and each has a bit of the bitmask.
        count = stored[0] if len(stored) == 1 and stored[0] <= N * K else N * K
        sizes = {"shape": [2], "compressed": [count], "bitmask": [N, -(-K // 8)], "row_offsets": [N]}
        sizes |= {"scales": [N]} if layout == "int8-bitmask" else {}
    floating = tuple(DTYPES)
    stored_as = ("I8",) if layout in INT8_LAYOUTS else floating
    dtypes = {
        "shape": ("I64",),
        "compressed": stored_as,
        "bitmask": ("U8",),
        "row_offsets": ("I64",),
        "scales": floating,
    }
    for part, size in sizes.items():
        check_tensor(header, f"{key}.{part}", dtypes[part], size)
    return sizes


def check_tensor(header: Header, name: str, dtypes: tuple[str, ...], shape: list[int]) -> None:
    if name not in header:
        raise ValueError(f"{name}: expected {'/'.join(dtypes)} {shape}, got no such tensor")
    dtype, found = header[name]
    if dtype not in dtypes or found != shape:
        raise ValueError(f"{name}: expected {'/'.join(dtypes)} {shape}, got {dtype} {found}")


# --- a model ---------------------------------------------------------------------------------------------------------


def describe(model: nn.Module, plain: nn.Module) -> tuple[dict[str, nn.Module], dict[str, dict[str, str]]]:
    """What a checkpoint of ``model`` must say beyond the config that ``plain`` was made from.

    Args:
        model: with packed layers, MLPs that run as one op, or linears of other sizes than ``plain`` has.
        plain: a model of the same class and config, untouched; on the meta device.

    Returns:
        Linears that are packed, or differ from those in ``plain``, by the names that they have there; and of each MLP
        that runs as one op how it was made.

    Raises:
        ValueError: such a layer stands where ``plain`` has no linear, or no MLP.
    """
    layers: dict[str, nn.Module] = {}
    fused: dict[str, dict[str, str]] = {}
    known = {mlp.name: mlp for mlp in find_mlps(plain)}
    originals = dict(plain.named_modules(remove_duplicate=False))
    inside: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseMLP):
            if name not in known:
                raise ValueError(f"{name}: expected an MLP of {type(plain).__name__}, which has none of that name")
            mlp = known[name]
            roles = {mlp.up: module.up, mlp.down: module.down, mlp.gate: module.gate}
            children = [(child, part) for child, part in originals[name].named_children() if part in roles]
            layers |= {join(name, child): roles[part] for child, part in children}
            inside |= {join(name, role) for role in ("up", "down", "gate")}
            fused[name] = {"activation": module.activation or ""}
        elif name not in inside and (isinstance(module, SparseLinear) or is_linear(module)):
            original = originals.get(name)
            if not is_linear(original):
                raise ValueError(f"{name}: expected a linear of {type(plain).__name__}, which has none of that name")
            if isinstance(module, SparseLinear) or _changed(module, original):
                layers[name] = module
    return layers, fused


def _changed(linear: nn.Module, original: nn.Module) -> bool:
    assert isinstance(linear.weight, Tensor)
    assert isinstance(original.weight, Tensor)
    return isinstance(linear, nn.Linear) != isinstance(original, nn.Linear) or (
        linear.weight.shape,
        linear.bias is None,
    ) != (original.weight.shape, original.bias is None)


def layer_specs(layers: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """What config.json says of each layer that :func:`describe` found."""
    specs: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        if isinstance(layer, SparseLinear):
            specs[name] = {"format": layer.format, "shape": [layer.out_features, layer.in_features]}
            if layer.pattern:
                specs[name]["pattern"] = layer.pattern
            if layer.scales is not None:
                specs[name]["layout"] = "int8-dense" if layer.format == "dense" else "int8-bitmask"
        elif isinstance(layer, nn.Linear):
            specs[name] = {"format": "dense", "shape": list(layer.weight.shape)}
        else:
            raise ValueError(f"{name}: expected an nn.Linear or SparseLinear where sizes changed, got {layer}")
    return specs


def state_dict_of(
    model: nn.Module, plain: nn.Module, layers: Mapping[str, nn.Module], fused: Iterable[str], format: str
) -> dict[str, Tensor]:
    """The tensors of a checkpoint: the model's state, with what :func:`describe` found under the names given there.

    Raises:
        ValueError: ``format`` cannot hold a layer.
    """
    owned = [f"{name}." for name, module in model.named_modules(remove_duplicate=False) if module in layers.values()]
    owned += [f"{name}." for name in fused]
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(tuple(owned))}
    seen: set[nn.Module] = set()
    for name, layer in layers.items():
        try:
            tensors = _layer_tensors(layer, plain.get_submodule(name), format)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if layer in seen:  # a layer in several places is stored in each of them; safetensors has no aliases
            tensors = {part: tensor.clone() for part, tensor in tensors.items()}
        seen.add(layer)
        state |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    return state


def _layer_tensors(layer: Any, original: Any, format: str) -> dict[str, Tensor]:
    bias = {} if layer.bias is None else {"bias": layer.bias.detach()}
    if format == QUANT_METHOD:
        return {**(to_bitmask(layer.packed) if isinstance(layer, SparseLinear) else {"weight": layer.weight}), **bias}
    if isinstance(layer, SparseLinear) and layer.scales is not None:
        raise ValueError(
            f"expected values of dtype {layer.packed.dtype} with {format}, got int8; save as {QUANT_METHOD}"
        )
    weight = dense_weight(layer).detach() + 0.0  # -0.0 counts as a zero there
    expected = weight.shape if isinstance(original, nn.Linear) else weight.T.shape
    if original.weight.shape != expected:
        raise ValueError(
            f"expected {list(original.weight.shape)} as in config.json with {format}, got {list(expected)}"
        )
    if not isinstance(original, nn.Linear):
        return {"weight": weight.T.contiguous(), **bias}
    if not isinstance(layer, SparseLinear):
        return {"weight": layer.weight, **bias}
    if format == "sparse-24-bitmask":
        return {**to_24_bitmask(weight), **bias}
    return {**to_bitmask(formats.pack(weight, "bitmap")), **bias}  # an n:m layer may have stored zeros


def sparsity_config(model: nn.Module, plain: nn.Module, layers: Mapping[str, nn.Module], layout: str) -> dict[str, Any]:
    """``sparsity_config`` of compressed-tensors.

    Raises:
        ValueError: nothing would be stored packed.
    """
    linears = {name: module for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    packed = {
        name: layer.packed for name, layer in layers.items() if name in linears and isinstance(layer, SparseLinear)
    }
    if not packed:
        raise ValueError(f"model: expected a packed nn.Linear for {layout}, got none; fasticl.convert packs them")
    total = sum(parameter.numel() for parameter in plain.parameters())
    zeros = sum(p.shape[0] * p.shape[1] - int(p.values.count_nonzero()) for p in packed.values())
    return {
        "format": layout,
        "global_sparsity": zeros / total,
        "ignore": [name for name in linears if name not in packed],
        "registry_requires_subclass": False,
        "sparsity_structure": "2:4" if layout == "sparse-24-bitmask" else "unstructured",
        "targets": ["Linear"],
    }


# --- files -----------------------------------------------------------------------------------------------------------


def read_header(files: Iterable[str | os.PathLike[str]]) -> Header:
    """Dtypes and shapes of all tensors in safetensors files; no data is read.

    Raises:
        ValueError: a file is not safetensors, is truncated or overlaps itself, two have a tensor of the same name, or
            they are not in one folder.
    """
    from safetensors import SafetensorError, safe_open

    header: Header = {}
    paths = [Path(file) for file in files]
    if stray := [path for path in paths if path.parent != paths[0].parent]:
        raise ValueError(f"expected files in {paths[0].parent}, got {stray[0]}")
    for path in paths:
        if path.suffix != ".safetensors":
            raise ValueError(f"{path.name}: expected a safetensors file, which cannot run code when it is loaded")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    if name in header:
                        raise ValueError(f"{path.name}: {name} is in another file too")
                    tensor = file.get_slice(name)
                    header[name] = (tensor.get_dtype(), list(tensor.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name}: expected a whole safetensors file, got {error}") from error
    return header


def read_tensors(files: Iterable[str | os.PathLike[str]], names: Iterable[str]) -> dict[str, Tensor]:
    """Those tensors of safetensors files; no others are read."""
    from safetensors import safe_open

    wanted = set(names)
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in wanted.intersection(file.keys())}
    return found


def foreign_layout(config: Mapping[str, Any]) -> str | None:
    """Which of ``LAYOUTS`` the ``config.json`` of a compressed-tensors checkpoint names; None if it is no such one.

    Read in the places where its versions wrote it: ``quantization_config.sparsity_config``, ``sparsity_config``,
    ``compression_config.sparsity_config``.

    Raises:
        ValueError: the format is none of ``LAYOUTS``, or the weights are quantized too.
    """
    method: object = None
    for owner in (config.get("quantization_config"), config.get("compression_config"), config):
        if not isinstance(owner, Mapping):
            continue
        method = method or owner.get("quant_method")
        sparsity = owner.get("sparsity_config")
        if not isinstance(sparsity, Mapping) or method not in (None, "compressed-tensors"):
            continue
        format = sparsity.get("format")
        if format == "dense":
            continue
        if not isinstance(format, str) or format not in LAYOUTS:
            raise ValueError(f"sparsity_config.format: expected one of {', '.join(LAYOUTS)}, got {format!r}")
        if owner.get("config_groups"):
            raise ValueError("config_groups: expected sparse weights that are not quantized, got quantized ones")
        return format
    return None


def _foreign_layers(header: Header) -> dict[str, str]:
    """Modules with a stored bitmask, and what their tensors' names begin with: older files keep ``.weight``."""
    keys = [name.removesuffix(".bitmask") for name in header if name.endswith(".bitmask")]
    return {key.removesuffix(".weight"): key for key in keys}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    names = set(_read_json(index).get("weight_map", {}).values())
    if wrong := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{index.name}: expected names of files in the folder, got {wrong[0]!r}")
    return [folder / name for name in sorted(names)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: expected JSON, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name}: expected a JSON object, got {type(found).__name__}")
    return found


# --- transformers ----------------------------------------------------------------------------------------------------


class _AfterImport(MetaPathFinder):
    """Registers ours as soon as transformers' registry has been imported: FastICL itself does not import it."""

    def __init__(self, registry: str) -> None:
        self._registry = registry

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != self._registry or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                sys.modules.setdefault(fullname, module)
                _register(self._registry)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


# What transformers lacks without each registration, and who makes it.
_REGISTRIES = {
    "transformers.quantizers.auto": ("FastICL's checkpoints", "fasticl.huggingface"),
    "transformers.modeling_utils": ("the attention named fasticl", "fasticl.attention"),
}


def _register(registry: str) -> None:
    lacking, ours = _REGISTRIES[registry]
    try:
        importlib.import_module(ours).register()
    except (AttributeError, ImportError) as error:  # a transformers without these names must still be imported
        warnings.warn(f"transformers cannot load {lacking}: {error}", UserWarning, stacklevel=2)


def register_when_imported() -> None:
    """Makes transformers know FastICL's checkpoints and attention, whichever of the two is imported first."""
    for registry in _REGISTRIES:
        if registry in sys.modules:
            _register(registry)
        else:
            sys.meta_path.insert(0, _AfterImport(registry))


def make_serializable(model: nn.Module) -> None:
    """Lets ``model.save_pretrained`` of a Hugging Face model write packed layers; other models are left alone."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and isinstance(model, modeling.PreTrainedModel):
        from fasticl import huggingface

        huggingface.attach(model)
