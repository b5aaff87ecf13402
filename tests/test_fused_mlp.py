"""fused_mlp: every kind of weight, plain and gated, against the float64 truth."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import assert_close_to_truth, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import ACTIVATIONS, DTYPES, Op, activate, double, exact_in_int8
from torch import Tensor
from torch.nn import functional as F

import fasticl
from fasticl import PackedWeight
from fasticl.ops import _linear, fused_mlp

Weight = Tensor | PackedWeight

PACKED = {
    "bitmap": Op("bitmap_linear", "bitmap"),
    "sliced": Op("sliced_linear", "sliced"),
    "nm": Op("nm_linear", "nm", "2:4"),
    "bitmap_int8": Op("bitmap_linear", "bitmap", values="int8"),
    "sliced_int8": Op("sliced_linear", "sliced", values="int8"),
    "nm_int8": Op("nm_linear", "nm", "2:4", "int8"),
    "dense_int8": Op("nm_linear", "dense", values="int8"),
}
KINDS = ["dense", *PACKED]
# Kinds of up, gate and down, and why.
MIXES = {
    "all_dense": ("dense", "dense", "dense"),  # neurons removed
    "all_bitmap": ("bitmap", "bitmap", "bitmap"),
    "all_nm": ("nm", "nm", "nm"),
    "all_sliced": ("sliced", "sliced", "sliced"),
    "each_another": ("nm", "sliced", "bitmap"),
    "gate_and_down_dense": ("sliced", "dense", "dense"),
    "up_dense": ("dense", "bitmap", "nm"),
    "all_dense_int8": ("dense_int8", "dense_int8", "dense_int8"),
    "each_another_int8": ("nm_int8", "sliced_int8", "bitmap_int8"),
    "int8_beside_others": ("dense", "bitmap_int8", "bitmap"),
}
# 3 to 8 tokens run the row kernels in every kind (sliced its own); else dense is torch's matmul, float32 at least.
TOKENS = (1, 2, 3, 4, 7, 8, 9, 20, 33, 65)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make(kind: str, N: int, K: int, dtype: torch.dtype = torch.float32) -> tuple[Weight, Tensor]:
    """A weight of that kind, and as a dense tensor. Scaled so that hidden activations are about 1."""
    if kind == "dense":
        weight = (torch.randn(N, K) / K**0.5).to(dtype)
        return weight, weight
    op = PACKED[kind]
    weight = op.weight(N, K, dtype=dtype) / max(K, 1) ** 0.5
    if op.values == "int8":
        weight = exact_in_int8(weight)
    return op.pack(weight), weight


def mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    activation: str | None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """PyTorch's own result, and, of float64 arguments, the truth."""
    h = F.linear(x, up, up_bias)
    h = activate(h, activation) if gate is None else activate(F.linear(x, gate, gate_bias), activation) * h
    return F.linear(h, down, down_bias)


def assert_as_unfused(
    x: Tensor,
    kinds: tuple[str, str, str],
    H: int,
    N: int,
    activation: str | None,
    *,
    gated: bool = True,
    biased: bool = True,
    tokens: tuple[int | None, ...] = (None,),
) -> None:
    dtype, K = x.dtype, x.shape[1]
    (up, dense_up), (gate, dense_gate) = make(kinds[0], H, K, dtype), make(kinds[1], H, K, dtype)
    down, dense_down = make(kinds[2], N, H, dtype)
    biases = [torch.randn(size).to(dtype) if biased else None for size in (H, N, H)]
    if not gated:
        gate = dense_gate = biases[2] = None
    dense = (dense_up, dense_down, dense_gate)
    truth = mlp(x.double(), *map(double, dense), activation, *map(double, biases))
    pytorch_result = mlp(x, *dense, activation, *biases)
    names = ("up_bias", "down_bias", "gate_bias")
    int8 = any("int8" in kind for kind in kinds) and dtype == torch.bfloat16 and _linear.multiplies_bfloat16()
    for M in tokens:
        result = fused_mlp(x[:M], up, down, gate, activation=activation, **dict(zip(names, biases, strict=True)))
        # Sums of many tokens and int8 values are rounded once more there, before their scale and bias.
        factor = 4.0 if int8 and len(result) >= _linear.UNPACKED_TOKENS else 2.0
        assert_close_to_truth(result, truth[:M], pytorch_result[:M], factor)


# ---- parity with the float64 truth -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("mix", MIXES)
def test_kinds_of_weights(isa: str, mix: str, gated: bool, dtype: torch.dtype) -> None:
    x = torch.randn(65, 72).to(dtype)
    assert_as_unfused(x, MIXES[mix], 100, 45, "silu" if gated else "gelu", gated=gated, tokens=TOKENS)


@pytest.mark.parametrize("biased", [False, True], ids=["no_biases", "biases"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(isa: str, activation: str | None, biased: bool) -> None:
    for dtype in DTYPES:
        for gated in (False, True):
            for kind in ("dense", "bitmap"):
                x = torch.randn(20, 40).to(dtype)
                kinds = (kind, kind, kind)
                assert_as_unfused(x, kinds, 60, 24, activation, gated=gated, biased=biased, tokens=(1, 5, 20))


@pytest.mark.parametrize(
    ("K", "H", "N"),
    [
        pytest.param(1, 1, 1, id="all_one"),
        pytest.param(5, 7, 3, id="within_a_vector"),
        pytest.param(67, 129, 31, id="of_no_multiple"),
        pytest.param(64, 256, 64, id="whole_words"),
        pytest.param(192, 1030, 20, id="several_tiles_of_hidden"),
    ],
)
def test_shapes(isa: str, K: int, H: int, N: int) -> None:
    for kind in ("dense", "bitmap", "sliced"):
        assert_as_unfused(torch.randn(33, K), (kind, kind, kind), H, N, "relu", tokens=(1, 2, 8, 9, 33))


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape(isa: str, data: st.DataObject) -> None:
    M, K, H, N = (data.draw(st.integers(0, 40), name) for name in "MKHN")
    some = ["dense", "bitmap", "sliced", "bitmap_int8", "sliced_int8", "dense_int8"]
    kinds = data.draw(st.tuples(*[st.sampled_from(some)] * 3), "kinds")
    dtype, gated, biased = data.draw(st.tuples(st.sampled_from(DTYPES), st.booleans(), st.booleans()))
    activation = data.draw(st.sampled_from(ACTIVATIONS), "activation")
    assert_as_unfused(torch.randn(M, K).to(dtype), kinds, H, N, activation, gated=gated, biased=biased)


# ---- sizes of zero, batch dimensions, strides, threads ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_empty_sizes(isa: str, kind: str) -> None:
    """No hidden neuron, as after pruning all of them, leaves the bias; no input leaves down(act(bias))."""
    for M in (1, 20):
        down_bias, up_bias = torch.randn(3), torch.randn(8)
        (up, _), (down, _) = make(kind, 0, 8), make(kind, 3, 0)
        result = fused_mlp(torch.randn(M, 8), up, down, up, activation="silu", down_bias=down_bias)
        assert torch.equal(result, down_bias.expand(M, 3))
        (up, _), (down, dense_down) = make(kind, 8, 0), make(kind, 3, 8)
        result = fused_mlp(torch.randn(M, 0), up, down, activation="relu", up_bias=up_bias)
        torch.testing.assert_close(result, F.linear(up_bias.relu(), dense_down).expand(M, 3))
    for batch in ((0,), (2, 0), (0, 3)):
        (up, _), (down, _) = make(kind, 8, 16), make(kind, 3, 8)
        assert fused_mlp(torch.randn(*batch, 16), up, down, activation="relu").shape == (*batch, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_dimensions_and_strides(isa: str, kind: str) -> None:
    (up, _), (down, _) = make(kind, 36, 24), make(kind, 12, 36)
    bias = torch.randn(36)

    def function(x: Tensor, up_bias: Tensor = bias) -> Tensor:
        return fused_mlp(x, up, down, up, activation="silu", up_bias=up_bias)

    buffer = torch.randn(2 * 3 * 50 + 1)
    x = buffer[1:].view(2, 3, 50)[..., :24]
    expected = function(x.clone().contiguous())
    assert expected.shape == (2, 3, 12)
    assert torch.equal(function(x), expected)
    swapped = x.transpose(0, 1)  # its tokens in another order, and so in other groups: compared with their own copy
    assert torch.equal(function(swapped), function(swapped.clone(memory_format=torch.contiguous_format)))
    assert torch.equal(function(x, torch.stack((bias, bias + 1), 1)[:, 0]), expected)
    torch.testing.assert_close(function(x[1, 2]), expected[1, 2])


def test_a_dense_weight_with_strides(isa: str) -> None:
    up, down = torch.randn(24, 36).T, torch.randn(12, 72)[:, ::2]
    for M in (1, 20):
        x = torch.randn(M, 24)
        torch.testing.assert_close(
            fused_mlp(x, up, down, activation="relu"),
            fused_mlp(x, up.contiguous(), down.contiguous(), activation="relu"),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_result_does_not_depend_on_threads(isa: str, kind: str) -> None:
    """Bit for bit where the project's kernels run: dense float32 weights for 3 to 8 tokens, packed ones always."""
    (up, _), (gate, _), (down, _) = make(kind, 700, 520), make(kind, 700, 520), make(kind, 520, 700)
    for M in (3, 8) if kind == "dense" else (1, 8, 20, 70):
        x = torch.randn(M, 520)
        torch.set_num_threads(1)
        expected = fused_mlp(x, up, down, gate, activation="silu")
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(fused_mlp(x, up, down, gate, activation="silu"), expected), f"{M} tokens, {threads}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_dense_weights_between_guards(isa: str, shift: int, dtype: torch.dtype) -> None:
    """Reads past a dense weight would bring NaN: the row kernel takes its last columns and rows apart."""
    tensors, checks = [], []
    for size in ((8, 70), (39, 70), (39, 70), (21, 39), (39,), (21,)):
        tensor, check = guarded((torch.randn(*size) / 8).to(dtype), shift=shift)
        tensors.append(tensor)
        checks.append(check)
    x, up, gate, down, bias, down_bias = tensors
    for M in (1, 2, 3, 4, 8):
        result = fused_mlp(x[:M], up, down, gate, activation="silu", up_bias=bias, gate_bias=bias, down_bias=down_bias)
        arguments = (x[:M], up, down, gate, "silu", bias, down_bias, bias)
        wide = [double(t) if isinstance(t, Tensor) else t for t in arguments]
        assert_close_to_truth(result, mlp(*wide), mlp(*arguments))
    for check in checks:
        check()


# ---- float64, autograd, compilers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "bitmap", "sliced", "nm"])
def test_float64_and_gradients(kind: str) -> None:
    (up, dense_up), (gate, dense_gate), (down, dense_down) = (
        make(kind, N, K, torch.float64) for N, K in ((8, 4), (8, 4), (4, 8))
    )
    x = torch.randn(3, 4).double().requires_grad_()
    biases = [torch.randn(size).double().requires_grad_() for size in (8, 4, 8)]

    def stored(weight: Weight) -> Tensor:
        return weight if isinstance(weight, Tensor) else weight.values

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        weights = [
            t if isinstance(w, Tensor) else dataclasses.replace(w, values=t)
            for w, t in zip((up, down, gate), tensors[:3], strict=True)
        ]
        names = ("up_bias", "down_bias", "gate_bias")
        return fused_mlp(x, *weights, activation="gelu", **dict(zip(names, tensors[3:], strict=True)))

    values = [stored(w).clone().requires_grad_() for w in (up, down, gate)]
    expected = mlp(x, dense_up, dense_down, dense_gate, "gelu", *biases)
    with torch.no_grad():
        torch.testing.assert_close(function(x, *values, *biases), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(function, (x, *values, *biases))


def test_gradients_with_int8_values() -> None:
    (up, dense_up), (down, dense_down) = (make(kind, 6, 6, torch.float64) for kind in ("bitmap_int8", "dense_int8"))
    x = torch.randn(3, 6).double().requires_grad_()
    torch.testing.assert_close(fused_mlp(x, up, down, activation="silu"), mlp(x, dense_up, dense_down, None, "silu"))
    assert torch.autograd.gradcheck(lambda x: fused_mlp(x, up, down, up, activation="silu"), x)


def test_without_gradients_the_kernels_run() -> None:
    (up, _), (down, _) = make("bitmap", 36, 24), make("sliced", 12, 36)
    x = torch.randn(3, 24, requires_grad=True)
    assert fused_mlp(x, up, down, activation="relu").requires_grad
    with torch.no_grad():
        result = fused_mlp(x, up, down, activation="relu")
    assert not result.requires_grad
    assert torch.equal(result, fused_mlp(x.detach(), up, down, activation="relu"))


def flattened(weight: Weight) -> list[Tensor]:
    """As the registered operator takes it."""
    if isinstance(weight, Tensor):
        return [weight]
    portable = [weight.values, weight.bitmask, weight.row_offsets]
    layout = [] if weight.sliced is None else list(vars(weight.sliced).values())
    scales = [] if weight.scales is None else [weight.scales]
    return [*portable[: {"dense": 1, "nm": 2}.get(weight.format, 3)], *layout, *scales]


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    (up, _), (down, _) = make(kind, 24, 16, torch.bfloat16), make(kind, 8, 24, torch.bfloat16)
    x, bias = torch.randn(2, 3, 16).bfloat16(), torch.randn(24).bfloat16()
    gate = flattened(up) if kind in ("dense", "nm") else None
    gate_bias = None if gate is None else bias
    arguments = (x, flattened(up), flattened(down), gate, bias, None, gate_bias, "silu")
    torch.library.opcheck(torch.ops.fasticl.fused_mlp.default, arguments)


@pytest.mark.parametrize("mix", ["all_dense", "each_another", "each_another_int8"])
def test_compiles_to_one_graph(mix: str) -> None:
    (up, _), (gate, _), (down, _) = (
        make(kind, N, K) for kind, N, K in zip(MIXES[mix], (36, 36, 12), (24, 24, 36), strict=True)
    )
    torch.compiler.reset()

    def function(x: Tensor) -> Tensor:
        return fused_mlp(2 * x, up, down, gate, activation="silu") + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for M in (3, 5, 20):  # the second size makes the number of tokens a symbol
        x = torch.randn(M, 24)
        assert torch.equal(compiled(x), function(x))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_errors_name_expected_and_got(kind: str) -> None:
    (up, _), (down, _), (other, _) = make(kind, 8, 16), make(kind, 4, 8), make(kind, 12, 16)
    x, bias, half = torch.randn(2, 16), torch.randn(8), make(kind, 8, 16, torch.bfloat16)[0]
    compact = fasticl.pack(torch.zeros(8, 16), "compact")
    cases = [
        (TypeError, "up: expected a torch.Tensor or a PackedWeight, got list", (x, [1.0], down), {}),
        (ValueError, "up: expected format bitmap, nm or sliced .*, got compact", (x, compact, down), {}),
        (TypeError, "x: expected a torch.Tensor, got int", (1, up, down), {}),
        (TypeError, "x: expected a floating-point dtype, got torch.int64", (x.long(), up, down), {}),
        (ValueError, r"x: expected shape \[..., K\], got \[\]", (torch.tensor(1.0), up, down), {}),
        (TypeError, "up: expected dtype torch.float32, got torch.bfloat16", (x, half, down), {}),
        (TypeError, "gate: expected dtype torch.float32, got torch.bfloat16", (x, up, down, half), {}),
        (ValueError, r"up: expected shape \[H, 15\], got \[8, 16\]", (x[:, :15], up, down), {}),
        (ValueError, r"gate: expected shape \[8, 16\], got \[12, 16\]", (x, up, down, other), {}),
        (ValueError, r"down: expected shape \[N, 12\], got \[4, 8\]", (x, other, down), {}),
        (ValueError, r"up_bias: expected shape \[8\], got \[9\]", (x, up, down), {"up_bias": torch.randn(9)}),
        (ValueError, r"down_bias: expected shape \[4\], got \[8\]", (x, up, down), {"down_bias": bias}),
        (ValueError, r"gate_bias: expected shape \[8\], got \[1\]", (x, up, down, up), {"gate_bias": bias[:1]}),
        (ValueError, "gate_bias: expected None without a gate, got a tensor", (x, up, down), {"gate_bias": bias}),
        (
            TypeError,
            "up_bias: expected dtype torch.float32, got torch.float16",
            (x, up, down),
            {"up_bias": bias.half()},
        ),
        (ValueError, "up_bias: expected on cpu .*, got meta", (x, up, down), {"up_bias": bias.to("meta")}),
        (ValueError, "down: expected on cpu .*, got meta", (x, up, down.to("meta")), {}),
        (ValueError, "activation: expected one of None, .*got 'swiglu'", (x, up, down), {"activation": "swiglu"}),
    ]
    for error, message, arguments, options in cases:
        with pytest.raises(error, match=message):
            fused_mlp(*arguments, **{"activation": "relu", **options})
