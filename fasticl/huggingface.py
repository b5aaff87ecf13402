"""The plug-in that lets transformers save and load packed models: a quantizer, in transformers' words.

:mod:`fasticl.checkpoint` registers it when transformers is imported. Loading needs transformers 5.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fasticl import checkpoint, coding, formats, parallel
from fasticl.checkpoint import INT8_LAYOUTS, LAYOUTS, QUANT_METHOD, Header
from fasticl.layers import find_mlps, is_linear, join
from fasticl.nn import SparseLinear, SparseMLP, frozen_linear
from fasticl.ops._registry import ACTIVATIONS

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_UNREADABLE, _CONVERSIONS = "_fasticl_unreadable", "_fasticl_conversions"
_SPEC_KEYS = {"format", "shape", "pattern", "layout", "key"}


def register() -> None:
    """Adds the plug-in to transformers' registry, once."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(FastICLConfig)
        auto.register_quantizer(QUANT_METHOD)(FastICLQuantizer)


class FastICLConfig(QuantizationConfigMixin):
    """``quantization_config`` of a FastICL checkpoint; what a file says is checked here, before anything is loaded.

    Args:
        layers: linear -> ``format`` (of :func:`fasticl.pack`, or ``"dense"`` for one that only changed its size),
            ``shape`` [N, K], ``pattern`` of an n:m weight, and ``layout`` where that is not ``sparse-bitmask``.
        mlps: MLP that runs as one op -> ``activation``.
        tensors: how many the checkpoint has, in all its files; None if unknown.

    Raises:
        ValueError: naming what was expected and what was found.
    """

    def __init__(
        self,
        layers: Mapping[str, Any] | None = None,
        mlps: Mapping[str, Any] | None = None,
        tensors: int | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(f"quantization_config: expected no key {', '.join(map(repr, unknown))}")
        self.quant_method: Any = quant_method
        self.layers = dict(_mapping("layers", layers))
        self.mlps = dict(_mapping("mlps", mlps))
        self.tensors = tensors
        if tensors is not None and (isinstance(tensors, bool) or not isinstance(tensors, int)):
            raise ValueError(f"tensors: expected a number, got {tensors!r}")
        for name, spec in self.layers.items():
            _check_spec(name, spec)
        for name, mlp in self.mlps.items():
            activation = _mapping(name, mlp).get("activation")
            if set(mlp) != {"activation"} or (activation or None) not in ACTIVATIONS:
                raise ValueError(f"{name}: expected an activation of {', '.join(map(str, ACTIVATIONS))}, got {mlp!r}")


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected a mapping, got {type(value).__name__}")
    return value


def _check_spec(name: str, spec: Any) -> None:
    if unknown := set(_mapping(name, spec)) - _SPEC_KEYS:
        raise ValueError(f"{name}: expected keys {', '.join(sorted(_SPEC_KEYS))}, got {', '.join(map(str, unknown))}")
    shape = spec.get("shape")
    for key, known, value in (
        ("format", formats.FORMATS, spec.get("format")),
        ("layout", (*LAYOUTS, *INT8_LAYOUTS), spec.get("layout", "sparse-bitmask")),
        ("pattern", (None, *formats.PATTERNS), spec.get("pattern")),
    ):
        if not any(value is one or (isinstance(value, str) and value == one) for one in known):
            raise ValueError(f"{name}: {key}: expected one of {', '.join(map(str, known))}, got {value!r}")
    if "layout" in spec and (spec["format"] == "dense") != (spec["layout"] == "int8-dense"):
        raise ValueError(
            f"{name}: expected format dense with layout int8-dense, got {spec['format']}, {spec['layout']}"
        )
    if (key := spec.get("key", name)) not in (name, f"{name}.weight"):
        raise ValueError(f"{name}: key: expected the layer's or its weight's name, got {key!r}")
    if shape is not None and not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape)
    ):
        raise ValueError(f"{name}: shape: expected [N, K], got {shape!r}")


class _Stored(nn.Module):
    """Receives the tensors of one packed weight, by the last part of their names, from transformers' loader."""

    weight = torch.empty(0)  # GPT-2 and Siglip initialise linears' weights by name, and are told not to
    _is_hf_initialized = weight._is_hf_initialized = True  # type: ignore[attr-defined]

    def __init__(self, sizes: Mapping[str, list[int]], dtype: torch.dtype) -> None:
        super().__init__()
        compressed = torch.int8 if "scales" in sizes else dtype
        dtypes = {"compressed": compressed, "scales": dtype, "bitmask": torch.uint8}
        for part, size in sizes.items():
            self.register_buffer(part, torch.empty(size, dtype=dtypes.get(part, torch.int64), device="meta"))


@dataclass(frozen=True)
class _Packed:
    """A packed layer of the checkpoint that is being loaded.

    ``stored`` is where its tensors are loaded to, or, in a model that is split over processes, only says what they are;
    ``transposed`` says that the matrix is a Conv1D's, [inputs, outputs].
    """

    name: str
    path: str  # in this model: without the prefix of a causal language model where only its base is loaded
    spec: Mapping[str, Any]
    shape: tuple[int, int]
    transposed: bool
    stored: _Stored


class FastICLQuantizer(HfQuantizer):
    """Puts layers of the sizes in the files' headers in place before transformers loads them, and packed ones after."""

    quantization_config: FastICLConfig
    format = QUANT_METHOD  # what save_pretrained writes
    compress = False

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        if not self.pre_quantized:
            raise ValueError("quantization_config: expected a checkpoint that FastICL saved; fasticl.convert packs one")
        _check_one_device(device_map)

    def get_state_dict_and_metadata(self, model: Any, *_: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The checkpoint's tensors; what it takes to read them goes into ``model.config``."""
        plain = _untouched(model)
        layers, fused = checkpoint.describe(model, plain)
        if layers or not getattr(model, "_is_distributed_loading_by_transformers", False):  # which gathers dense ones
            parallel.check_whole(model, "to be saved")
        config: Any
        if self.format != QUANT_METHOD:
            sparsity = checkpoint.sparsity_config(model, plain, layers, self.format)
            config = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
        elif layers or self.compress:
            config = FastICLConfig(checkpoint.layer_specs(layers), fused)
        else:
            _keep_names(model, False)
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            return None, {}
        _keep_names(model, self.format == QUANT_METHOD)
        model.config.quantization_config = config
        if isinstance(model.get_output_embeddings(), SparseLinear):
            model.config.tie_word_embeddings = False
        state = checkpoint.state_dict_of(model, plain, layers, fused, self.format)
        return coding.encode_state(state, model.all_tied_weights_keys) if self.compress else state, {}

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What transformers' loader makes of tensors that are stored in parts, in any layer."""
        return [WeightConverter([rf"\.{part}$" for part in coding.PARTS], "", [_Decode()])]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """To read a tensor as: the parts of a coded one as they are stored."""
        return None if _is_decoding(converter) else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        config, dtype = self.quantization_config, kwargs.get("dtype") or torch.get_default_dtype()
        if checkpoint_files is None:
            raise ImportError("packed checkpoints need transformers 5 or newer")
        header = checkpoint.read_header(checkpoint_files)
        if config.tensors is not None and len(header) != config.tensors:
            raise ValueError(f"expected {config.tensors} tensors in the checkpoint's files, got {len(header)}")
        plain = coding.decoded_header(header)
        self._files = _files_to_split(model, checkpoint_files)
        if self._files and plain != header:
            raise ValueError(
                "tp_size: expected files without compress=True, got compressed ones; split the loaded model"
            )
        header = plain
        known = {mlp.name: mlp for mlp in find_mlps(model)}
        self._packed: list[_Packed] = []
        self._mlps: list[tuple[str, dict[str, str], str | None]] = []
        for name, spec in config.mlps.items():
            path = _path_in(model, name)
            if path not in known:
                raise ValueError(f"{name}: expected an MLP of {type(model).__name__}, which has none of that name")
            mlp = known[path]
            roles = {mlp.up: "up", mlp.down: "down", mlp.gate: "gate"}
            children = model.get_submodule(path).named_children()
            self._mlps.append((path, {roles[m]: child for child, m in children if m in roles}, spec["activation"]))
        for name, spec in config.layers.items():
            self._place(model, name, spec, header, dtype)

    def _place(self, model: Any, name: str, spec: Mapping[str, Any], header: Header, dtype: torch.dtype) -> None:
        """A layer of the header's sizes, on the meta device, in the place of the model's own."""
        path, floating = _path_in(model, name), tuple(checkpoint.DTYPES)
        linear = model.get_submodule(path)
        if not is_linear(linear):
            raise ValueError(f"{name}: expected a linear of {type(model).__name__}, got {type(linear).__name__}")
        transposed = "shape" not in spec and not isinstance(linear, nn.Linear)
        N, K = spec.get("shape") or model.get_parameter(f"{path}.weight").shape
        bias = None
        if f"{name}.bias" in header:
            checkpoint.check_tensor(header, f"{name}.bias", floating, [K if transposed else N])
            bias = torch.empty(K if transposed else N, dtype=dtype, device="meta")
        if spec["format"] == "dense" and "layout" not in spec:
            checkpoint.check_tensor(header, f"{name}.weight", floating, [N, K])
            replacement: nn.Module = frozen_linear(torch.empty(N, K, dtype=dtype, device="meta"), bias)
        else:
            key = spec.get("key", name)
            sizes = checkpoint.expected_tensors(header, key, (N, K), spec.get("layout", "sparse-bitmask"))
            stored = _Stored(sizes, dtype)
            replacement = _Stored({}, dtype) if self._files else stored
            if key != name and not self._files:  # name.weight.bitmask, not name.bitmask
                replacement = nn.Module()
                replacement.weight = stored
            replacement.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
            replacement.out_features, replacement.in_features = N, K  # transformers' styles ask
            self._packed.append(_Packed(name, path, spec, (N, K), transposed, stored))
        model.set_submodule(path, replacement)
        for target, source in list(getattr(model, "all_tied_weights_keys", {}).items()):
            if f"{path}.weight" in (target, source):
                del model.all_tied_weights_keys[target]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        _check_one_device(getattr(model, "hf_device_map", None))  # "auto" may have become several
        if errors := model.__dict__.pop(_UNREADABLE, []):
            raise ValueError("; ".join(errors))
        used = getattr(model, "_weight_conversions", None) or []  # to be reversed on saving, but these are not
        model._weight_conversions = [conversion for conversion in used if not _is_decoding(conversion)]
        mesh = model._mesh_manager.get_mesh("tp") if self._files else None
        for layer in self._packed:
            linear, sizes = self._linear(layer, model.get_submodule(layer.path).bias), layer.shape
            style = None if mesh is None else parallel.style_of(model.tp_plan, layer.path)
            if mesh is not None and style is not None:
                linear = parallel.split(linear, style, mesh)
                # Where an MLP runs as one op, which calls no linear, this exchange never happens.
                parallel.connect(linear, style, sizes[::-1] if layer.transposed else sizes, mesh)
            model.set_submodule(layer.path, linear if mesh is None else linear.to(mesh.device_type))
        for path, children, activation in self._mlps:
            linears = {role: model.get_submodule(join(path, child)) for role, child in children.items()}
            style = None
            if mesh is not None:
                styles = [parallel.style_of(model.tp_plan, join(path, child)) for child in children.values()]
                style = parallel.fused_style(path, styles, len(styles))
                linears = {role: _local(linear, mesh, role == "down") for role, linear in linears.items()}
            mlp = SparseMLP(**linears, activation=activation).eval()
            if mesh is not None and style is not None:
                parallel.connect(mlp, style, (0, 0), mesh)
            model.set_submodule(path, mlp)
        if mesh is not None:
            model.requires_grad_(False)
        self._files = []
        self._packed, self._mlps = [], []
        model.is_quantized = False  # nothing is: model.half() and .float() work
        return model

    def _linear(self, layer: _Packed, bias: Any) -> SparseLinear:
        """A whole packed layer, from tensors that were loaded, or else are read now."""
        spec, key = layer.spec, layer.spec.get("key", layer.name)
        parts = dict(layer.stored.named_buffers())
        if self._files:
            read = checkpoint.read_tensors(self._files, [f"{key}.{part}" for part in parts])
            parts = {part: read[f"{key}.{part}"].to(meta.dtype) for part, meta in parts.items()}
            bias = None if bias is None else _whole(bias).cpu()
        parts = {part: tensor.contiguous() for part, tensor in parts.items()}
        layout = spec.get("layout", "sparse-bitmask")
        try:
            packed = checkpoint.from_bitmask(parts, layer.shape, layout, spec["format"], spec.get("pattern"))
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}") from error
        if layer.transposed:
            packed = formats.pack(packed.unpack().T)
        return SparseLinear(packed, bias).eval()


class _Decode(ConversionOps):
    """A weight from its coded parts. What cannot be read is told after loading: transformers would only log it."""

    def __deepcopy__(self, memo: object) -> _Decode:
        return self

    @torch.no_grad()
    def convert(self, input_dict: Any, *_: Any, **context: Any) -> Any:
        full_layer_name, model = context["full_layer_name"], context["model"]
        mantissas, exponents = (input_dict[rf"\.{part}$"][0] for part in coding.PARTS)
        meta = model.get_parameter_or_buffer(full_layer_name)
        try:
            weight = coding.decode(mantissas.cpu().to(torch.uint8), exponents.cpu().to(torch.uint8))
        except ValueError as error:
            model.__dict__.setdefault(_UNREADABLE, []).append(f"{full_layer_name}.{error}")
            weight = torch.zeros(mantissas.shape, dtype=meta.dtype)
        return {full_layer_name: weight.to(mantissas.device, meta.dtype)}


def _is_decoding(converter: Any) -> bool:
    return any(isinstance(operation, _Decode) for operation in getattr(converter, "operations", ()))


def _files_to_split(model: Any, files: Iterable[Any]) -> list[Any]:
    """The checkpoint's files, if each process is to read its part of the packed layers in them; else none.

    Raises:
        ValueError: the model is to be distributed in another way, or its heads cannot be.
    """
    config: Any = getattr(model.config, "distributed_config", None)
    for name in ("pp_size", "dp_replicate_size", "fsdp_size", "ep_size"):
        if (size := getattr(config, name, None) or 1) > 1:
            raise ValueError(f"{name}: expected 1 for a packed model, which is split by tp_size only, got {size}")
    size = getattr(config, "tp_size", None) or 1
    if size == 1:
        return []
    parallel.check_heads(model, {**model.tp_plan, **(config.tp_plan if isinstance(config.tp_plan, dict) else {})}, size)
    # They are read once the rest is loaded: without its packed layers, the model has no place for these.
    model._keys_to_ignore_on_load_unexpected = {
        *(model._keys_to_ignore_on_load_unexpected or ()), r"\.(compressed|scales|bitmask|row_offsets|shape)$",
    }  # fmt: skip
    return list(files)


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _local(linear: Any, mesh: DeviceMesh, down: bool) -> nn.Module:
    """A process's part of a linear that transformers has split, for an MLP in one op, which sums its outputs itself."""
    if isinstance(linear, SparseLinear) or not hasattr(linear.weight, "to_local"):
        return linear
    bias = None if linear.bias is None or (down and mesh.get_local_rank()) else linear.bias.to_local()
    return frozen_linear(linear.weight.to_local(), bias)


def _check_one_device(device_map: Any) -> None:
    devices = {str(device) for device in device_map.values()} if isinstance(device_map, Mapping) else set()
    if len(devices) > 1 or "disk" in devices:
        raise ValueError(f"device_map: expected one device for a packed model, got {', '.join(sorted(devices))}")


def attach(model: Any) -> None:
    """Makes ``model.save_pretrained`` write packed layers as a checkpoint; a model of another quantizer keeps it."""
    if _is_plain(model):
        model.hf_quantizer = FastICLQuantizer(FastICLConfig())


def check_model(model: object) -> None:
    """Raises TypeError or ValueError unless a model can be saved by FastICL."""
    from transformers import PreTrainedModel  # which imports the registry: not while that one is being imported

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}")
    if not _is_plain(model) and not isinstance(model.hf_quantizer, FastICLQuantizer):
        raise ValueError(f"model: expected one that is not quantized, got one of {type(model.hf_quantizer).__name__}")


def _is_plain(model: Any) -> bool:
    """Whether all weights are what they seem: no quantizer looks after them, or one that unpacked them on loading."""
    held = getattr(model, "hf_quantizer", None)
    config = getattr(held, "quantization_config", None)
    unpacked_gguf = getattr(config, "quant_method", None) == "gguf" and not getattr(held, "packed_modules", None)
    return held is None or unpacked_gguf or getattr(config, "dequantize", False)


@contextmanager
def saving(model: Any, format: str, compress: bool = False) -> Iterator[None]:
    """Meanwhile ``model.save_pretrained`` writes ``format``; afterwards the model is as it was."""
    held, config = getattr(model, "hf_quantizer", None), model.config
    model.hf_quantizer = FastICLQuantizer(FastICLConfig())
    model.hf_quantizer.format, model.hf_quantizer.compress = format, compress
    model.config = copy.deepcopy(config)
    try:
        yield
    finally:
        model.config = config
        if held is None:
            del model.hf_quantizer
        else:
            model.hf_quantizer = held


def _keep_names(model: Any, keep: bool) -> None:
    """transformers saves some classes under names of older versions; those in our config.json are the modules'."""
    if keep:
        model.__dict__.setdefault(_CONVERSIONS, getattr(model, "_weight_conversions", None))
        model._weight_conversions = []
    elif _CONVERSIONS in model.__dict__:
        model._weight_conversions = model.__dict__.pop(_CONVERSIONS)


def _untouched(model: Any) -> nn.Module:
    """A model of the same class and config, on the meta device."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def _path_in(model: Any, name: str) -> str:
    """Where a layer of a checkpoint stands in ``model``, which may be the base of the model that was saved."""
    for path in (name, name.removeprefix(f"{model.base_model_prefix}."), f"{model.base_model_prefix}.{name}"):
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return path
    raise ValueError(f"{name}: expected a layer of {type(model).__name__}, which has none of that name")
