"""SparseLinear and SparseMLP: what users of nn.Module expect of them, and answers equal to the dense layers'."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from pathlib import Path

import pytest
import torch
from helpers import BaseTunerLayer, assert_close_to_truth
from linear_cases import exact_in_int8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

import fasticl
from fasticl.device_layouts import DeviceLayouts
from fasticl.lane_stream import to_lanes
from fasticl.nn import SparseLinear, SparseMLP, dense_weight

FORMATS = ["bitmap", "sliced", "nm", "compact"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "silu"]
FUNCTIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU()}
N, K = 35, 48  # no multiple of a slice of 16 rows


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Conv1D(nn.Module):
    """GPT-2's linear: ``weight`` is [K, N]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


def zero_(weight: Tensor, format: str, density: float = 0.4) -> None:
    """Zeros that the format can hold, in place."""
    with torch.no_grad():
        if format == "nm":
            weight.view(len(weight), -1, 4)[::2, :, 1:3] = 0
            weight.view(len(weight), -1, 4)[1::2, :, :2] = 0
        elif format == "compact":
            weight[1::3] = 0
            weight[:, ::5] = 0
        else:
            weight[torch.rand_like(weight, dtype=torch.float32) >= density] = 0


def make_linear(
    format: str, bias: bool = True, dtype: torch.dtype = torch.float32, *, n: int = N, k: int = K, density: float = 0.4
) -> nn.Linear:
    linear = nn.Linear(k, n, bias).to(dtype)
    zero_(linear.weight.detach(), format, density)
    return linear.eval()


def assert_computes(module: nn.Module, linear: nn.Linear, x: Tensor) -> None:
    with torch.inference_mode():
        truth = nn.functional.linear(
            x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double()
        )
        assert_close_to_truth(module(x), truth, linear(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_linear_computes_what_the_dense_one_does(format: str, dtype: torch.dtype, bias: bool) -> None:
    linear = make_linear(format, bias, dtype)
    sparse = SparseLinear.from_linear(linear, format)
    assert sparse.format == format
    assert sparse.packed.validate().dtype == dtype
    for shape in [(K,), (1, K), (2, 13, K), (0, K)]:
        assert_computes(sparse, linear, torch.randn(shape).to(dtype))
    dense = sparse.to_dense()
    assert torch.equal(dense.weight, linear.weight)
    assert (dense.bias is None) == (linear.bias is None)
    assert bias is False or torch.equal(dense.bias, linear.bias)
    assert dense.weight.requires_grad


@pytest.mark.parametrize("format", ["bitmap", "sliced"])
def test_float64_runs_the_reference(format: str) -> None:
    linear = make_linear(format, dtype=torch.float64)
    x = torch.randn(3, K, dtype=torch.float64)
    torch.testing.assert_close(SparseLinear.from_linear(linear, format)(x), linear(x).detach())


def test_auto_takes_what_suits_the_zeros() -> None:
    assert SparseLinear.from_linear(make_linear("bitmap")).format == "bitmap"
    assert SparseLinear.from_linear(make_linear("nm")).format == "nm"
    assert SparseLinear.from_linear(make_linear("compact")).format == "compact"
    assert SparseLinear.from_linear(make_linear("sliced", density=0.05, n=64, k=64)).format == "sliced"


@pytest.mark.parametrize("format", FORMATS)
def test_from_conv1d(format: str) -> None:
    conv = Conv1D(N, K).eval()
    zero_(conv.weight.detach().T if format != "nm" else (weight := conv.weight.detach().T.contiguous()), format)
    if format == "nm":
        with torch.no_grad():
            conv.weight.copy_(weight.T)
    sparse = SparseLinear.from_linear(conv, format)
    assert torch.equal(sparse.to_dense().weight, conv.weight.T)
    x = torch.randn(2, 3, K)
    torch.testing.assert_close(sparse(x), conv(x).detach())


@pytest.mark.parametrize(("before", "after"), [("bitmap", "sliced"), ("sliced", "bitmap"), ("nm", "bitmap")])
def test_from_another_sparse_linear(before: str, after: str) -> None:
    linear = make_linear(before)
    sparse = SparseLinear.from_linear(SparseLinear.from_linear(linear, before), after)
    assert sparse.format == after
    assert torch.equal(sparse.packed.unpack(), linear.weight)


def test_negative_zeros_of_a_mask_are_zeros() -> None:
    linear = make_linear("bitmap", density=1)
    mask = torch.arange(K) % 2 == 0
    with torch.no_grad():
        linear.weight.mul_(mask)  # -0.0 where the weight was negative
    sparse = SparseLinear.from_linear(linear, "bitmap")
    assert sparse.values.numel() == N * K // 2
    assert torch.equal(sparse.to_dense().weight, linear.weight)


def test_masks_are_applied_though_their_weight_is_old() -> None:
    linear = make_linear("bitmap", density=1)
    prune.random_unstructured(linear, "weight", 0.5)
    prune.random_unstructured(linear, "bias", 0.5)
    state = {name: torch.randn_like(t) if "orig" in name else t for name, t in linear.state_dict().items()}
    linear.load_state_dict(state)  # linear.weight is still that of the old parameters
    sparse = SparseLinear.from_linear(linear, "bitmap")
    assert torch.equal(sparse.packed.unpack(), state["weight_orig"] * state["weight_mask"])
    assert torch.equal(sparse.bias, state["bias_orig"] * state["bias_mask"])
    x = torch.randn(2, K)
    torch.testing.assert_close(sparse(x), linear(x).detach())


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("format", ["bitmap", "sliced", "compact"])
def test_all_zeros_and_none(format: str, density: float) -> None:
    linear = make_linear("bitmap", density=density)
    sparse = SparseLinear.from_linear(linear, format)
    x = torch.randn(3, K)
    torch.testing.assert_close(sparse(x), linear(x).detach())
    assert sparse.packed.density == density


def test_no_rows() -> None:
    sparse = SparseLinear(fasticl.pack(torch.zeros(0, K), "bitmap"))
    assert sparse(torch.randn(2, K)).shape == (2, 0)


# State


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_state_loads_into_a_module_of_another_density(format: str, bias: bool) -> None:
    linear = make_linear(format, bias)
    state = SparseLinear.from_linear(linear, format).state_dict()
    portable = {"values", "bitmask", "row_offsets"} | ({"bias"} if bias else set())
    assert set(state) == portable | ({"rows", "columns"} if format == "compact" else set())

    other = nn.Linear(K, N, bias)
    if format == "nm":
        with torch.no_grad():
            other.weight.view(N, -1, 4)[:, :, :2] = 0
    elif format == "compact":
        with torch.no_grad():
            other.weight[::2] = 0
    else:
        zero_(other.weight.detach(), format, density=0.1)
    loaded = SparseLinear.from_linear(other, format)
    held = loaded.values
    loaded.load_state_dict(state)
    loaded.packed.validate()  # for sliced: the derived layout is that of the new values
    assert torch.equal(loaded.packed.unpack(), linear.weight)
    assert_computes(loaded, linear, torch.randn(3, K))
    assert held is not loaded.values


def test_one_state_serves_the_formats_with_a_portable_form() -> None:
    linear = make_linear("nm")
    state = SparseLinear.from_linear(linear, "nm").state_dict()
    for format in ["bitmap", "sliced"]:
        module = SparseLinear.from_linear(make_linear(format), format)
        module.load_state_dict(state)
        assert module.format == format
        assert torch.equal(module.packed.validate().unpack(), linear.weight)


@pytest.mark.parametrize("assign", [False, True])
def test_state_of_another_dtype(assign: bool) -> None:
    state = SparseLinear.from_linear(make_linear("sliced", dtype=torch.bfloat16), "sliced").state_dict()
    module = SparseLinear.from_linear(make_linear("sliced"), "sliced")
    module.load_state_dict(state, assign=assign)
    dtype = torch.bfloat16 if assign else torch.float32  # as nn.Linear does
    assert module.values.dtype == module.sliced_values.dtype == module.bias.dtype == dtype
    assert torch.equal(module.packed.validate().values, state["values"].to(dtype))
    assert module(torch.randn(2, K, dtype=dtype)).dtype == dtype


CORRUPTIONS = {
    "offset out of range": lambda s: s["row_offsets"][3].add_(1),
    "bits without values": lambda s: s["bitmask"].fill_(255),
    "fewer values": lambda s: s.update(values=s["values"][:-1]),
    "another number of rows": lambda s: s.update(bitmask=s["bitmask"][:-1]),
    "bits as int64": lambda s: s.update(bitmask=s["bitmask"].long() + 256),
    "offsets as float": lambda s: s.update(row_offsets=s["row_offsets"].float()),
    "values of two dimensions": lambda s: s.update(values=s["values"][:, None]),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("format", ["bitmap", "sliced", "nm"])
def test_corrupted_state_is_refused(format: str, corruption: str) -> None:
    linear = make_linear(format)
    model = nn.Sequential(SparseLinear.from_linear(linear, format))
    state = copy.deepcopy(model.state_dict())
    layer = {name.removeprefix("0."): t for name, t in state.items()}
    CORRUPTIONS[corruption](layer)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"0: PackedWeight: .*expected .*got"):
            model.load_state_dict({f"0.{name}": t for name, t in layer.items()}, strict=strict)
        assert torch.equal(model[0].packed.validate().unpack(), linear.weight)  # what it held, it holds


@pytest.mark.parametrize("corruption", ["rows out of range", "columns descending", "values too narrow"])
def test_corrupted_compact_state_is_refused(corruption: str) -> None:
    linear = make_linear("compact")
    sparse = SparseLinear.from_linear(linear, "compact")
    state = copy.deepcopy(sparse.state_dict())
    if corruption == "rows out of range":
        state["rows"][-1] = N
    elif corruption == "columns descending":
        state["columns"] = state["columns"].flip(0)
    else:
        state["values"] = state["values"][:, :-1]
    with pytest.raises(RuntimeError, match=r"SparseLinear: PackedWeight: .*expected .*got"):
        sparse.load_state_dict(state)
    assert torch.equal(sparse.packed.validate().unpack(), linear.weight)


def test_missing_and_unexpected_keys_name_the_layer() -> None:
    linear = make_linear("bitmap")
    model = nn.Sequential(nn.ReLU(), SparseLinear.from_linear(linear, "bitmap"))
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*1\.weight"):
        model.load_state_dict({**state, "1.weight": torch.zeros(N, K)})
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.bitmask"):
        model.load_state_dict({name: t for name, t in state.items() if name != "1.bitmask"})
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.values"):
        model.load_state_dict({"1.weight": linear.weight, "1.bias": linear.bias})
    changed = {"1.values": state["1.values"] + 1}  # the same mask: a state of values alone is one
    model.load_state_dict(changed, strict=False)
    assert torch.equal(model[1].values, changed["1.values"])
    model[1].packed.validate()


def test_assigned_state_does_not_reach_the_module_when_refused() -> None:
    linear = make_linear("bitmap")
    sparse = SparseLinear.from_linear(linear, "bitmap")
    state = {name: t.clone() for name, t in sparse.state_dict().items()}
    state["bitmask"].zero_()
    with pytest.raises(RuntimeError, match="row_offsets"):
        sparse.load_state_dict(state, assign=True)
    assert torch.equal(sparse.packed.unpack(), linear.weight)


@pytest.mark.parametrize("format", FORMATS)
def test_copies_are_equal_and_apart(format: str, tmp_path: Path) -> None:
    linear = make_linear(format)
    sparse = SparseLinear.from_linear(linear, format)
    fresh = SparseLinear.from_linear(make_linear(format), format)
    buffer = io.BytesIO()
    torch.save(sparse.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    from_file = SparseLinear.from_linear(make_linear(format), format)
    save_file(sparse.state_dict(), tmp_path / "layer.safetensors")
    from_file.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    whole = io.BytesIO()
    torch.save(sparse, whole)
    whole.seek(0)
    copies = [copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), fresh, from_file,
              torch.load(whole, weights_only=False)]  # fmt: skip
    x = torch.randn(2, K)
    expected = sparse(x)
    for other in copies:
        other.packed.validate()
        assert torch.equal(other.packed.unpack(), linear.weight)
        assert torch.equal(other(x), expected)
        assert other.values.data_ptr() != sparse.values.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("format", FORMATS)
def test_a_cast_reaches_what_is_derived(format: str, dtype: torch.dtype) -> None:
    linear = make_linear(format)
    sparse = SparseLinear.from_linear(linear, format).to(dtype)
    assert sparse.packed.validate().dtype == sparse.bias.dtype == dtype
    assert sparse.bitmask.dtype == torch.uint8
    assert torch.equal(sparse.packed.unpack(), linear.weight.to(dtype))
    assert_computes(sparse, linear.to(dtype), torch.randn(3, K).to(dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_all_tensors_move_together(format: str) -> None:
    sparse = SparseLinear.from_linear(make_linear(format), format).to("meta")
    tensors = [t for t in (*vars(sparse.packed).values(), sparse.bias) if isinstance(t, Tensor)]
    if format == "sliced":
        tensors += vars(sparse.packed.sliced).values()
    assert {t.device.type for t in tensors} == {"meta"}


# Calls


@pytest.mark.parametrize("format", FORMATS)
def test_refuses_other_inputs(format: str) -> None:
    sparse = SparseLinear.from_linear(make_linear(format), format)
    with pytest.raises(ValueError, match=rf"x: expected shape \[\.\.\., {K}\], got \[2, {K + 1}\]"):
        sparse(torch.randn(2, K + 1))
    with pytest.raises(ValueError, match=r"x: expected shape .*got \[\]"):
        sparse(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"x: expected .*torch\.float32, got torch\.bfloat16"):
        sparse(torch.randn(2, K).bfloat16())
    with pytest.raises(TypeError, match=r"x: expected .*got torch\.int64"):
        sparse(torch.ones(2, K, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x: expected .*got list"):
        sparse([1.0])


@pytest.mark.parametrize("format", ["bitmap", "sliced", "nm"])
def test_a_bias_of_another_dtype_never_reaches_a_kernel(format: str) -> None:
    sparse = SparseLinear.from_linear(make_linear(format), format)
    sparse.bias.data = sparse.bias.data.half()
    with pytest.raises(TypeError, match=r"bias: expected dtype torch\.float32, got torch\.float16"):
        sparse(torch.randn(2, K))


def test_refuses_other_parts() -> None:
    packed = fasticl.pack(torch.randn(N, K), "bitmap")
    with pytest.raises(ValueError, match=rf"bias: expected shape \[{N}\], got \[{K}\]"):
        SparseLinear(packed, torch.zeros(K))
    with pytest.raises(TypeError, match=r"bias: expected dtype torch\.float32 like the weight, got torch\.float16"):
        SparseLinear(packed, torch.zeros(N).half())
    with pytest.raises(ValueError, match="bias: expected on cpu like the weight, got meta"):
        SparseLinear(packed, torch.zeros(N, device="meta"))
    with pytest.raises(TypeError, match=r"packed: expected a PackedWeight .*got Tensor"):
        SparseLinear(torch.randn(N, K))
    with pytest.raises(TypeError, match=r"expected nn.Linear, Conv1D or SparseLinear, got Embedding"):
        SparseLinear.from_linear(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match=r"format: expected one of .*got 'csr'"):
        SparseLinear.from_linear(nn.Linear(K, N), "csr")
    with pytest.raises(ValueError, match="patterns 2:4"):
        SparseLinear.from_linear(nn.Linear(K, N), "nm")
    quantized = nn.Linear(K, N)
    quantized.weight = nn.Parameter(torch.ones(N, K, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"expected a floating-point dtype, got torch\.int8"):
        SparseLinear.from_linear(quantized)


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_of_input_and_bias(format: str) -> None:
    linear = make_linear(format)
    sparse = SparseLinear.from_linear(linear, format)
    sparse.bias.requires_grad_()
    x, x_dense = (torch.randn(3, K).requires_grad_() for _ in range(2))
    with torch.no_grad():
        x_dense.copy_(x)
    sparse(x).square().sum().backward()
    linear(x_dense).square().sum().backward()
    torch.testing.assert_close(x.grad, x_dense.grad)
    torch.testing.assert_close(sparse.bias.grad, linear.bias.grad)
    assert sparse.values.grad is None


@pytest.mark.parametrize("format", FORMATS)
def test_no_gradients_where_none_are_wanted(format: str) -> None:
    sparse = SparseLinear.from_linear(make_linear(format), format)
    assert not any(p.requires_grad for p in sparse.parameters())
    assert not sparse(torch.randn(2, K)).requires_grad
    x = torch.randn(2, K, requires_grad=True)
    expected = sparse(x.detach())
    with torch.no_grad():
        assert torch.equal(sparse(x), expected)
    with torch.inference_mode():
        assert torch.equal(sparse(x), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_autocast_returns_what_dense_layers_return(format: str) -> None:
    linear = make_linear(format)
    sparse = SparseLinear.from_linear(linear, format)
    x = torch.randn(3, K)
    expected = sparse(x)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert sparse(x).dtype == linear(x).dtype == torch.bfloat16
        assert torch.equal(sparse(x), expected.bfloat16())  # computed in the weight's dtype
        assert torch.equal(sparse(x.bfloat16()), sparse(x.bfloat16().float()))  # what an earlier layer returned
        with pytest.raises(TypeError, match="int64"):
            sparse(torch.ones(2, K, dtype=torch.int64))
        double = copy.deepcopy(sparse).double()
        assert double(x.double()).dtype == copy.deepcopy(linear).double()(x.double()).dtype == torch.float64


def test_mode_and_repr() -> None:
    linear = make_linear("nm").train()
    sparse = SparseLinear.from_linear(linear, "nm")
    assert sparse.training
    x = torch.randn(2, K)
    assert torch.equal(sparse(x), sparse.eval()(x))
    assert not sparse.to_dense().training
    text = repr(sparse)
    for part in (f"in_features={K}", f"out_features={N}", "bias=True", "format=nm", "pattern=2:4", "density=0.500"):
        assert part in text
    assert "pattern" not in repr(SparseLinear.from_linear(make_linear("bitmap"), "bitmap"))


# Int8 values: of weights that they hold exactly, so that the dense layer says what is right


INT8_FORMATS = ["bitmap", "sliced", "nm", "dense"]


def make_int8(
    format: str, bias: bool = True, dtype: torch.dtype = torch.float32, density: float = 0.4
) -> tuple[SparseLinear, nn.Linear]:
    linear = make_linear(format, bias, dtype, density=1.0 if format == "dense" else density)
    linear.weight.data = exact_in_int8(linear.weight.data)
    return SparseLinear.from_linear(linear, format, "int8"), linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", INT8_FORMATS)
def test_int8_computes_what_the_dense_one_does(format: str, dtype: torch.dtype, bias: bool) -> None:
    sparse, linear = make_int8(format, bias, dtype)
    assert sparse.values.dtype == torch.int8
    assert sparse.packed.validate().dtype == sparse.scales.dtype == dtype
    for shape in [(K,), (1, K), (2, 13, K), (0, K), (70, K)]:
        assert_computes(sparse, linear, torch.randn(shape).to(dtype))
    assert torch.equal(sparse.to_dense().weight, linear.weight)
    assert f"format={format}" in repr(sparse)
    assert "values=int8" in repr(sparse)
    for wrong in (torch.randn(2, K + 1).to(dtype), torch.randn(2, K).double(), torch.ones(2, K, dtype=torch.int8)):
        with pytest.raises((TypeError, ValueError), match=r"x: expected .* got "):
            sparse(wrong)


@pytest.mark.parametrize("format", INT8_FORMATS)
def test_int8_state_loads(format: str) -> None:
    sparse, linear = make_int8(format)
    state = sparse.state_dict()
    assert set(state) == {"values", "scales", "bitmask", "row_offsets", "bias"}
    other, _ = make_int8(format, density=0.1)
    other.load_state_dict(state)
    other.packed.validate()
    assert torch.equal(other.packed.unpack(), linear.weight)
    assert_computes(other, linear, torch.randn(3, K))
    float_format = "bitmap" if format == "dense" else format
    floating = SparseLinear.from_linear(make_linear(float_format), float_format)
    for module, found in ((floating, state), (other, floating.state_dict())):
        held = module.packed.unpack()
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=r"PackedWeight: values: expected .* got"):
                module.load_state_dict(found, strict=strict)
        assert torch.equal(module.packed.validate().unpack(), held)
    corrupted = {**state, "scales": state["scales"][:-1]}
    with pytest.raises(RuntimeError, match=rf"PackedWeight: scales: expected .*\[{N}\], got .*\[{N - 1}\]"):
        other.load_state_dict(corrupted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("format", INT8_FORMATS)
def test_a_cast_reaches_scales_and_not_int8_values(format: str, dtype: torch.dtype) -> None:
    sparse, linear = make_int8(format)
    values, bytes_before = sparse.values.clone(), sparse.packed.bytes
    cast = copy.deepcopy(sparse).to(dtype)
    assert torch.equal(cast.values, values)
    assert cast.packed.validate().dtype == cast.scales.dtype == cast.bias.dtype == dtype
    assert cast.packed.bytes == bytes_before + N * (dtype.itemsize - 4)
    assert_computes(cast, copy.deepcopy(linear).to(dtype), torch.randn(3, K).to(dtype))
    assert {t.device.type for t in copy.deepcopy(sparse).to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("format", INT8_FORMATS)
def test_int8_under_autocast_gradients_and_copies(format: str) -> None:
    sparse, linear = make_int8(format)
    x = torch.randn(3, K)
    expected = sparse(x)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sparse(x), expected.bfloat16())  # computed in the weight's dtype
    gradients = [torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x)[0] for layer in (sparse, linear)]
    torch.testing.assert_close(*gradients)
    copied = pickle.loads(pickle.dumps(sparse))
    assert torch.equal(copied(x.detach()), sparse(x.detach()))
    again = SparseLinear.from_linear(sparse, "bitmap")
    assert again.scales is None
    assert torch.equal(again.packed.unpack(), linear.weight)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("format", INT8_FORMATS)
def test_int8_mlp(format: str, gated: bool) -> None:
    dense = make_mlp("silu", gated, format="bitmap" if format == "dense" else format)
    for part in dense.parts():
        if part is not None:
            part.weight.data = exact_in_int8(part.weight.data)
    sparse = SparseMLP.from_linears(*dense.parts(), activation="silu", format=format, values="int8")
    assert all(part.values.dtype == torch.int8 for part in sparse.children())
    for shape in [(32,), (1, 32), (2, 13, 32)]:
        assert_same_mlp(sparse, dense, torch.randn(shape))
    with pytest.raises(ValueError, match="expected 'dense' for int8 values only, 'compact' for others, got 'compact'"):
        SparseMLP.from_linears(*dense.parts(), activation="silu", values="int8")


# SparseMLP


class DenseMLP(nn.Module):
    def __init__(self, activation: str, gated: bool, bias: bool = True, linear: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        sizes = [(32, 40), (40, 24)] if linear is nn.Linear else [(40, 32), (24, 40)]
        arguments = {"bias": bias} if linear is nn.Linear else {}
        self.up = linear(*sizes[0], **arguments)
        self.down = linear(*sizes[1], **arguments)
        self.gate = linear(*sizes[0], **arguments) if gated else None
        self.function = FUNCTIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.function(self.up(x)))
        return self.down(self.function(self.gate(x)) * self.up(x))

    def parts(self) -> tuple[nn.Module, nn.Module, nn.Module | None]:
        return self.up, self.down, self.gate


def make_mlp(activation: str, gated: bool, bias: bool = True, format: str = "bitmap") -> DenseMLP:
    mlp = DenseMLP(activation, gated, bias).eval()
    for part in mlp.parts():
        if part is not None:
            zero_(part.weight.detach(), format)
    return mlp


def assert_same_mlp(sparse: nn.Module, dense: DenseMLP, x: Tensor) -> None:
    with torch.inference_mode():
        truth = copy.deepcopy(dense).double()(x.double())
        assert_close_to_truth(sparse(x), truth, dense(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_computes_what_the_dense_one_does(activation: str, gated: bool, dtype: torch.dtype) -> None:
    dense = make_mlp(activation, gated).to(dtype)
    sparse = SparseMLP.from_linears(*dense.parts(), activation=activation, format="bitmap")
    for shape in [(32,), (1, 32), (2, 9, 32), (0, 32)]:
        assert_same_mlp(sparse, dense, torch.randn(shape).to(dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", ["sliced", "nm", "auto"])
def test_mlp_formats(format: str, bias: bool) -> None:
    dense = make_mlp("silu", gated=True, bias=bias, format="nm" if format == "nm" else "bitmap")
    sparse = SparseMLP.from_linears(*dense.parts(), activation="silu", format=format)
    assert_same_mlp(sparse, dense, torch.randn(3, 32))


@pytest.mark.parametrize("kinds", list(itertools.product(["dense", "bitmap", "sliced"], repeat=3)))
def test_mlp_of_mixed_parts(kinds: tuple[str, ...]) -> None:
    dense = make_mlp("gelu", gated=True)
    parts = [
        part if kind == "dense" else SparseLinear.from_linear(part, kind)
        for part, kind in zip(dense.parts(), kinds, strict=True)
    ]
    sparse = SparseMLP(*parts, activation="gelu")
    assert_same_mlp(sparse, dense, torch.randn(3, 32))
    assert_same_mlp(sparse, dense, torch.randn(17, 32))  # more tokens than the row kernels take


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compact_removes_exactly_the_dead_neurons(activation: str, gated: bool) -> None:
    dense = DenseMLP(activation, gated).eval()
    with torch.no_grad():
        for part in (dense.up, dense.gate) if gated else (dense.up,):
            part.weight[:8] = 0  # dead only where the bias is zero too
            part.bias[:4] = 0
        dense.down.weight[:, 10:13] = 0  # nobody listens to them
        dense.up.weight[20] = 0  # has a bias: alive
        dense.up.weight[21, 1:] = 0  # one weight left: alive
    sparse = SparseMLP.from_linears(*dense.parts(), activation=activation)
    dead = {0, 1, 2, 3, 10, 11, 12}
    kept = torch.tensor([i for i in range(40) if i not in dead])
    assert torch.equal(sparse.up.weight, dense.up.weight[kept])
    assert torch.equal(sparse.up.bias, dense.up.bias[kept])
    assert torch.equal(sparse.down.weight, dense.down.weight[:, kept])
    assert torch.equal(sparse.down.bias, dense.down.bias)
    assert not gated or torch.equal(sparse.gate.weight, dense.gate.weight[kept])
    assert_same_mlp(sparse, dense, torch.randn(5, 32))
    assert not any(p.requires_grad for p in sparse.parameters())
    with torch.no_grad():
        dense.down.bias.add_(1)
    assert not torch.equal(sparse.down.bias, dense.down.bias), "shares memory with the layer it was made from"


@pytest.mark.parametrize("dead_part", ["gate", "up"])
def test_compact_removes_what_one_factor_makes_zero(dead_part: str) -> None:
    dense = DenseMLP("silu", gated=True, bias=False).eval()
    with torch.no_grad():
        getattr(dense, dead_part).weight[::2] = 0
    sparse = SparseMLP.from_linears(*dense.parts(), activation="silu")
    assert sparse.up.out_features == sparse.gate.out_features == sparse.down.in_features == 20
    assert_same_mlp(sparse, dense, torch.randn(5, 32))


def test_compact_of_an_mlp_that_is_dead_altogether() -> None:
    dense = DenseMLP("relu", gated=False, bias=True).eval()
    with torch.no_grad():
        dense.down.weight.zero_()
    sparse = SparseMLP.from_linears(*dense.parts(), activation="relu")
    assert sparse.up.out_features == 0
    x = torch.randn(2, 3, 32)
    assert torch.equal(sparse(x), dense(x).detach())


@pytest.mark.parametrize("format", ["compact", "bitmap"])
def test_mlp_from_conv1d(format: str) -> None:
    dense = DenseMLP("gelu_tanh", gated=False, linear=Conv1D).eval()
    with torch.no_grad():
        dense.down.weight[::3] = 0  # rows of [K, N] are hidden neurons
    sparse = SparseMLP.from_linears(*dense.parts(), activation="gelu_tanh", format=format)
    assert sparse.up.out_features == (26 if format == "compact" else 40)
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(sparse(x), dense(x).detach())


@pytest.mark.parametrize("format", ["compact", "bitmap", "sliced"])
def test_mlp_copies_and_states(format: str) -> None:
    dense = make_mlp("silu", gated=True)
    sparse = SparseMLP.from_linears(*dense.parts(), activation="silu", format=format)
    other = SparseMLP.from_linears(*make_mlp("silu", gated=True).parts(), activation="silu", format=format)
    other.load_state_dict(sparse.state_dict())
    x = torch.randn(2, 32)
    for copied in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), other):
        assert torch.equal(copied(x), sparse(x))
    half = copy.deepcopy(sparse).bfloat16()
    assert_same_mlp(half, copy.deepcopy(dense).bfloat16(), x.bfloat16())
    assert "activation=silu" in repr(sparse)


def test_mlp_gradients_and_autocast() -> None:
    dense = make_mlp("gelu", gated=True)
    sparse = SparseMLP.from_linears(*dense.parts(), activation="gelu", format="bitmap")
    x = torch.randn(3, 32, requires_grad=True)
    (expected,) = torch.autograd.grad(dense(x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(sparse(x).sum(), x)[0], expected)
    mixed = SparseMLP(dense.up, sparse.down, sparse.gate, activation="gelu")  # a dense part that can be trained
    mixed(x).sum().backward()
    assert dense.up.weight.grad.abs().sum() > 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert sparse(x).dtype == dense(x).dtype == torch.bfloat16
        assert sparse(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("change", ["adapter", "forward"])
def test_what_is_put_into_an_mlp_is_called(change: str, gated: bool) -> None:
    mlp = SparseMLP.from_linears(
        nn.Linear(K, 20), nn.Linear(20, N), nn.Linear(K, 20) if gated else None, activation="gelu"
    )
    up, x = mlp.up, torch.randn(3, K)
    if change == "adapter":
        mlp.up = changed = BaseTunerLayer(up)
    else:  # as accelerate does it to layers whose weights are elsewhere
        forward = up.forward
        up.forward = changed = lambda x: 2 * forward(x)
    with torch.no_grad():
        hidden = nn.functional.gelu(mlp.gate(x)) * changed(x) if gated else nn.functional.gelu(changed(x))
        torch.testing.assert_close(mlp(x), mlp.down(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_parts_with_a_kernels_layout_run_it(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: fused_mlp would pass the layout over."""
    dense = make_mlp("silu", gated).bfloat16()
    sparse = SparseMLP.from_linears(*dense.parts(), activation="silu", format="bitmap")
    called: list[nn.Module] = []
    forward = SparseLinear.forward
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: called.append(self) or forward(self, x))
    x = torch.randn(3, 32).bfloat16()
    assert_same_mlp(sparse, dense, x)
    assert not called
    sparse.down._layouts = DeviceLayouts(to_lanes(sparse.down.packed))
    assert_same_mlp(sparse, dense, x)
    assert len(called) == 2 + gated


def test_mlp_refuses_other_parts_and_inputs() -> None:
    up, down = nn.Linear(32, 40), nn.Linear(40, 24)
    with pytest.raises(ValueError, match=r"activation: expected one of .*got 'tanh'"):
        SparseMLP(up, down, activation="tanh")
    with pytest.raises(TypeError, match=r"down: expected nn.Linear or SparseLinear, got Conv1D"):
        SparseMLP(up, Conv1D(24, 40), activation="relu")
    with pytest.raises(ValueError, match="down: expected 40 in_features like up's outputs, got 41"):
        SparseMLP(up, nn.Linear(41, 24), activation="relu")
    with pytest.raises(ValueError, match=r"gate: expected shape \[40, 32\] like up, got \[41, 32\]"):
        SparseMLP(up, down, nn.Linear(32, 41), activation="relu")
    with pytest.raises(ValueError, match="up: expected format bitmap, nm or sliced, got compact"):
        SparseMLP(SparseLinear.from_linear(make_linear("compact", n=40, k=32), "compact"), down, activation="relu")

    mlp = SparseMLP(up, down, activation="relu").requires_grad_(False)
    with pytest.raises(ValueError, match=r"expected shape .*31\], got \[40, 32\]"):
        mlp(torch.randn(2, 31))
    with pytest.raises(TypeError, match=r"torch\.float32"):
        mlp(torch.randn(2, 32).half())
    with pytest.raises(TypeError, match="got list"):
        mlp([1.0])
    mlp.down = nn.Linear(7, 24).requires_grad_(False)  # set later: still checked before a kernel reads it
    with pytest.raises(ValueError, match="down: expected shape"):
        mlp(torch.randn(2, 32))
    mlp.down = nn.Linear(40, 24).half().requires_grad_(False)
    with pytest.raises(TypeError, match="down: expected dtype"):
        mlp(torch.randn(2, 32))


# Compiled


@pytest.fixture(scope="module")
def small_model() -> nn.Module:
    torch.manual_seed(0)
    mlp = make_mlp("silu", gated=True)
    return nn.Sequential(
        SparseLinear.from_linear(make_linear("bitmap"), "bitmap"),
        SparseLinear.from_linear(make_linear("compact", n=48, k=N), "compact"),
        SparseLinear.from_linear(make_linear("nm", n=48, k=48), "nm"),
        SparseLinear.from_linear(make_linear("sliced", n=32, k=48), "sliced"),
        SparseMLP.from_linears(*mlp.parts(), activation="silu", format="bitmap"),
        SparseMLP(nn.Linear(24, 40), SparseLinear.from_linear(make_linear("bitmap", n=24, k=40)), activation="relu"),
    ).requires_grad_(False)


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_without_graph_breaks(small_model: nn.Module, grad: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(small_model, fullgraph=True, backend="aot_eager")
    for m in (3, 11):  # the second: dynamic shapes
        x = torch.randn(m, K, requires_grad=grad)
        y = compiled(x)
        torch.testing.assert_close(y, small_model(x))
        assert y.requires_grad == grad


def test_exports(small_model: nn.Module) -> None:
    x = torch.randn(3, K)
    program = torch.export.export(small_model, (x,))
    targets = {str(node.target) for node in program.graph.nodes}
    for op in ("bitmap_linear", "nm_linear", "sliced_linear", "fused_mlp"):
        assert f"fasticl.{op}.default" in targets, f"{op} was decomposed or replaced"
    torch.testing.assert_close(program.module()(x), small_model(x))


def test_dense_weight_refuses_others() -> None:
    with pytest.raises(TypeError, match="got ReLU"):
        dense_weight(nn.ReLU())
