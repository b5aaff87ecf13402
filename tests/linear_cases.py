"""What bitmap_linear, nm_linear and sliced_linear must all do: one suite, run by the test file of each op.

A test file subclasses :class:`LinearCases`, says by its fixture ``op`` what is tested, and how the kernel is called.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from unittest.mock import Mock

import pytest
import torch
from helpers import assert_close_to_truth, guarded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import fasticl
from fasticl import PackedWeight
from fasticl.ops import _linear
from fasticl.ops import _registry as registry

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]
# (N, K) and why. For nm_linear K is rounded up to whole groups. In the kernels a vector has 16 lanes, a mask word 64
# columns, a tile of x^T 256 columns (128 from 33 tokens on), a block 256 rows, a slice 16.
SHAPES = {
    "one_row": (1, 100),
    "one_column": (70, 1),
    "k_within_a_byte": (16, 5),
    "k_and_n_of_no_multiple": (33, 75),
    "k_of_8_not_16": (48, 72),
    "k_of_16_not_64": (17, 80),
    "whole_words": (64, 128),  # float32 x is read in place
    "several_row_blocks": (530, 192),
    "several_tiles": (21, 1100),
    "long_rows": (40, 4096),  # rounding errors must not grow with K
}
# Tokens and why: 1 to 8 have loops of 1, 2, 4 and 8; then panels of 16, 32 and 64, full or not, and full ones with a
# smaller panel (80, 96) or a few tokens (65) behind them.
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 65, 80, 96, 100)


@dataclass(frozen=True)
class Op:
    """An op with the format, for nm the pattern, and the values (None or "int8") of its weight."""

    name: str
    format: str
    pattern: str | None = None
    values: str | None = None

    def columns(self, K: int) -> int:
        """K, rounded up to whole groups."""
        m = int(self.pattern.split(":")[1]) if self.pattern else 1
        return -(-K // m) * m

    def prune(self, weight: Tensor, keep: Tensor) -> Tensor:
        """The weight where ``keep`` and the pattern allow it, else 0.0 (a product with the mask would leave -0.0)."""
        if self.pattern:
            n, m = map(int, self.pattern.split(":"))
            N, K = weight.shape
            rank = torch.rand(N, K // m, m).argsort(-1).argsort(-1)
            keep = keep & (rank < n).view(N, K)
        return weight.masked_fill(~keep, 0.0)

    def weight(self, N: int, K: int, density: float = 0.4, dtype: torch.dtype = torch.float32) -> Tensor:
        K = self.columns(K)
        return self.prune(torch.randn(N, K).to(dtype), torch.rand(N, K) < density)

    def pack(self, weight: Tensor) -> PackedWeight:
        return fasticl.pack(weight, self.format, pattern=self.pattern, values=self.values)

    def __call__(
        self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        return getattr(fasticl.ops, self.name)(x, packed, bias, activation)

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.fasticl, self.name).default


def activate(y: Tensor, activation: str | None) -> Tensor:
    functions = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "gelu" and y.dtype == torch.float64:  # F.gelu's 1 + erf(y / sqrt(2)) cancels for negative y
        return y * torch.special.erfc(-y / 2**0.5) / 2
    return functions[activation](y) if activation else y


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """PyTorch's own result, and, of float64 arguments, the truth."""
    return activate(F.linear(x, weight, bias), activation)


def double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def assert_as_dense(
    op: Op, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, tokens=(None,)
) -> None:
    """The op on the first M rows of x, for each M of tokens, against the truth.

    Of int8 values that is of the weight that they stand for, and PyTorch's result is its best: float32, rounded once.
    """
    packed = op.pack(weight)
    if packed.scales is None:
        truth = dense(x.double(), weight.double(), double(bias), activation)
        pytorch_result = dense(x, weight, bias, activation)
    else:
        exact = packed.unpack_values().double() * packed.scales.double()[:, None]
        truth = dense(x.double(), exact, double(bias), activation)
        wide = None if bias is None else bias.float()
        pytorch_result = dense(x.float(), exact.float(), wide, activation).to(x.dtype)
    results = [(op(x[:M], packed, bias, activation), truth[:M], pytorch_result[:M]) for M in tokens]
    # Together: of a few elements PyTorch may have all right by chance.
    assert_close_to_truth(*map(torch.cat, zip(*results, strict=True)))


class LinearCases:
    @pytest.fixture(autouse=True)
    def one_thread(self) -> None:
        torch.set_num_threads(1)

    @pytest.fixture
    def op(self) -> Op:
        raise NotImplementedError

    def call_kernel(
        self, x: Tensor, packed: PackedWeight, bias: Tensor | None, activation: str | None, y: Tensor
    ) -> None:
        """The C++ kernel itself on matrices x and y that may have row strides."""
        raise NotImplementedError

    def operator_arguments(self, packed: PackedWeight) -> tuple[Tensor, ...]:
        """What the registered operator takes between x and bias."""
        raise NotImplementedError

    # ---- parity with the float64 truth ------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_shapes_and_tokens(self, op: Op, isa: str, shape: str, dtype: torch.dtype) -> None:
        N, K = SHAPES[shape]
        weight = op.weight(N, K, dtype=dtype)
        assert_as_dense(op, torch.randn(max(TOKENS), weight.shape[1]).to(dtype), weight, tokens=TOKENS)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_int8_values(self, op: Op, isa: str, shape: str, dtype: torch.dtype) -> None:
        op = dataclasses.replace(op, values="int8")
        weight = op.weight(*SHAPES[shape], dtype=dtype)
        weight *= 2.0 ** torch.randint(-4, 5, (len(weight), 1))  # rows have scales of their own
        assert_as_dense(op, torch.randn(max(TOKENS), weight.shape[1]).to(dtype), weight, tokens=TOKENS)

    @pytest.mark.parametrize("density", [0.0, 0.005, 0.5, 1.0])
    def test_int8_densities_with_bias(self, op: Op, isa: str, density: float) -> None:
        op = dataclasses.replace(op, values="int8")
        for dtype in DTYPES:
            weight, bias = op.weight(67, 200, density, dtype), torch.randn(67).to(dtype)
            x = torch.randn(577, weight.shape[1]).to(dtype)
            assert_as_dense(op, x, weight, bias, "silu", tokens=(1, 3, 8, 9, 20, 65, 577))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_more_tokens_than_one_pass_packs(self, op: Op, isa: str, dtype: torch.dtype) -> None:
        weight = op.weight(20, 70, dtype=dtype)
        assert_as_dense(op, torch.randn(577, weight.shape[1]).to(dtype), weight, tokens=(512, 513, 530, 577))

    @pytest.mark.parametrize("values", [None, "int8"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_many_tokens_by_the_unpacked_weight(
        self, op: Op, isa: str, shape: str, values: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the processor multiplies bfloat16 itself."""
        monkeypatch.setattr(_linear, "multiplies_bfloat16", lambda: True)
        monkeypatch.setattr(_linear, "UNPACKED_BYTES", 20000)  # several blocks of most
        unpacked = Mock(wraps=_linear.unpacked_linear)
        monkeypatch.setattr(_linear, "unpacked_linear", unpacked)
        op = dataclasses.replace(op, values=values)
        N, K = SHAPES[shape]
        weight, bias = op.weight(N, K, 0.8, torch.bfloat16), torch.randn(N).bfloat16()
        x = torch.randn(40, 2, weight.shape[1]).bfloat16()[:, 0]
        for activation in (None, "silu"):
            assert_as_dense(op, x, weight, bias if activation else None, activation, tokens=(16, 17, 40))
        assert unpacked.call_count == 4
        assert_as_dense(op, x, op.weight(N, K, 0.8, torch.bfloat16), tokens=(4,))
        assert unpacked.call_count == 4
        op(x.float(), op.pack(weight.float()))
        assert unpacked.call_count == 4

    @pytest.mark.parametrize("density", [0.0, 0.005, 0.5, 1.0])
    def test_densities(self, op: Op, isa: str, density: float) -> None:
        for dtype in DTYPES:
            weight = op.weight(67, 200, density, dtype)
            assert_as_dense(op, torch.randn(65, weight.shape[1]).to(dtype), weight, tokens=(1, 3, 8, 9, 20, 65))

    def test_rows_of_very_different_length(self, op: Op, isa: str) -> None:
        """Dense and empty rows side by side: shares of threads and slices of 16 rows have to find their borders."""
        N, K = 150, op.columns(140)
        keep = (torch.rand(N, 1) < 0.3).expand(N, K).clone()
        keep[:32] = False
        keep[-40:] = True
        for dtype in DTYPES:
            weight = op.prune(torch.randn(N, K).to(dtype), keep)
            assert_as_dense(op, torch.randn(65, K).to(dtype), weight, tokens=(1, 3, 8, 9, 20, 65))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    def test_bias_and_activation(self, op: Op, isa: str, activation: str | None, dtype: torch.dtype) -> None:
        weight, bias = op.weight(45, 90, dtype=dtype), torch.randn(45).to(dtype)
        x = torch.randn(65, weight.shape[1]).to(dtype)
        assert_as_dense(op, x, weight, bias, activation, tokens=(1, 3, 8, 9, 20, 65))
        assert_as_dense(op, x, weight, None, activation, tokens=(1, 3, 8, 9, 20, 65))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    def test_activations_over_their_whole_range(
        self, op: Op, isa: str, activation: str | None, dtype: torch.dtype
    ) -> None:
        """``act(v)`` alone, for v in ranges that each have their own scale: a tail is judged by its own size."""
        one = torch.zeros(20, 16, dtype=dtype)
        one[:, 0] = 1

        def activated(v: Tensor, M: int) -> Tensor:
            weight = torch.zeros(v.numel(), 16, dtype=dtype)
            weight[:, 0] = v
            return op(one[:M], op.pack(weight), None, activation)

        smallest = max(1e-36, torch.finfo(dtype).smallest_normal)  # below, results may be flushed to zero
        edges = [0.0, 1e-3, 0.1, 1.0, 2.0, 4.0, 6.0, 10.0, 15.0, 50.0, 100.0]
        ranges = [torch.linspace(a, b, 61) for a, b in itertools.pairwise(edges)]
        # torch's vectorised float32 GELU overflows above 1e38 and makes NaN of infinity: these are held to the truth.
        special = torch.tensor(
            [0.0, -0.0, 100.0, -100.0, 3e38, -3e38, 1e-40, -1e-40, *map(float, ("inf", "-inf", "nan"))]
        )
        for M in (1, 16 if isa == "avx512_bf16" else 20):  # torch may multiply more, and has a GELU of its own
            for v in (*ranges, *(-r for r in ranges)):
                v = v.to(dtype)
                truth, pytorch_result = activate(v.double(), activation), activate(v, activation)
                assert_close_to_truth(activated(v, M), truth.expand(M, -1), pytorch_result.expand(M, -1))
                if activation != "gelu_tanh":  # 1 + tanh(y) cancels; the others keep their relative precision
                    rtol = torch.finfo(dtype).eps + 2e-5  # e^(-y^2 / 2) multiplies the rounding of its argument
                    torch.testing.assert_close(activated(v, M)[0].double(), truth, rtol=rtol, atol=smallest)
            truth = activate(special.to(dtype).double(), activation).to(dtype).expand(M, -1)
            rtol = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(activated(special.to(dtype), M), truth, rtol=rtol, atol=smallest, equal_nan=True)

    @settings(
        max_examples=40,  # of each class that runs it
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def test_any_shape_and_mask(self, op: Op, isa: str, data: st.DataObject) -> None:
        N, M = data.draw(st.integers(0, 70), "N"), data.draw(st.integers(0, 70), "M")
        K = op.columns(data.draw(st.integers(0, 200), "K"))
        dtype = data.draw(st.sampled_from(DTYPES), "dtype")
        op = dataclasses.replace(op, values=data.draw(st.sampled_from([None, "int8"]), "values"))
        kinds = st.sampled_from(["none", "all", "first", "last", "half", "few"])
        rows = data.draw(st.lists(kinds, min_size=N, max_size=N), "rows")
        keep = torch.zeros(N, K, dtype=torch.bool)
        for row, kind in zip(keep, rows, strict=True):
            row |= torch.rand(K) < {"all": 1.0, "half": 0.5, "few": 0.03}.get(kind, 0.0)
            row[: kind == "first"] = True
            row[K - (kind == "last") :] = True
        weight = op.prune(torch.randn(N, K).to(dtype), keep)
        bias = torch.randn(N).to(dtype) if data.draw(st.booleans(), "bias") else None
        activation = data.draw(st.sampled_from(ACTIVATIONS), "activation")
        assert_as_dense(op, torch.randn(M, K).to(dtype), weight, bias, activation)

    # ---- sizes of zero, batch dimensions, strides, threads ----------------------------------------------------------

    def test_empty_sizes(self, op: Op, isa: str) -> None:
        K = op.columns(24)
        bias = torch.randn(5)
        for M in (1, 9, 20, 64):
            no_columns = op.pack(torch.zeros(5, 0))
            result = op(torch.zeros(M, 0), no_columns, bias, "silu")
            torch.testing.assert_close(result, F.silu(bias).expand(M, 5))
            assert op(torch.zeros(M, 0), no_columns).count_nonzero() == 0
            assert op(torch.randn(M, K), op.pack(torch.zeros(0, K)), torch.zeros(0)).shape == (M, 0)
        packed = op.pack(op.weight(5, K))
        for batch in ((0,), (2, 0), (0, 3)):
            assert op(torch.randn(*batch, K), packed, bias, "relu").shape == (*batch, 5)

    def test_batch_dimensions(self, op: Op, isa: str) -> None:
        weight = op.weight(19, 50)
        packed, K = op.pack(weight), weight.shape[1]
        x = torch.randn(2, 3, K)
        result = op(x, packed)
        assert result.shape == (2, 3, 19)
        assert result.is_contiguous()
        assert torch.equal(result.view(6, 19), op(x.view(6, K), packed))
        assert torch.equal(op(x[0, 0], packed), op(x[:1, 0], packed)[0])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_any_strides_and_alignment(self, op: Op, isa: str, dtype: torch.dtype) -> None:
        weight, bias = op.weight(37, 130, dtype=dtype), torch.randn(37).to(dtype)
        packed, K = op.pack(weight), weight.shape[1]
        for M in (1, 3, 20):
            buffer = torch.randn(M * 3 * K + 1).to(dtype)
            rows = buffer[: M * 3 * K].view(M, 3 * K)
            layouts = {
                "row stride": rows[:, :K],
                "row stride, first column 1": rows[:, 1 : K + 1],
                "off by one element": buffer[1 : M * K + 1].view(M, K),
                "transposed": buffer[: M * K].view(K, M).T,
                "every third column": rows[:, ::3],
                "one row for all": rows[:1, :K].expand(M, K),
            }
            for name, x in layouts.items():
                assert torch.equal(op(x, packed, bias), op(x.clone().contiguous(), packed, bias)), name
        x = torch.randn(3, 2, K).to(dtype).transpose(0, 1)
        assert torch.equal(op(x, packed), op(x.contiguous(), packed))
        strided_bias = torch.stack((bias, bias + 1), 1)[:, 0]
        assert not strided_bias.is_contiguous()
        assert torch.equal(op(x, packed, strided_bias), op(x, packed, bias))

    def test_result_does_not_depend_on_threads(self, op: Op, isa: str) -> None:
        """Bit for bit, and from call to call: one thread sums a row, in an order that its neighbours do not change."""
        weight, bias = op.weight(600, 520, 0.5), torch.randn(600)
        packed = op.pack(weight)
        for M in (1, 8, 20, 70):
            x = torch.randn(M, weight.shape[1])
            torch.set_num_threads(1)
            expected = op(x, packed, bias, "gelu")
            assert_close_to_truth(
                expected,
                dense(x.double(), weight.double(), bias.double(), "gelu"),
                dense(x, weight, bias, "gelu"),
            )
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(op(x, packed, bias, "gelu"), expected), f"{M} tokens, {threads} threads"

    def test_more_threads_than_rows(self, op: Op, isa: str) -> None:
        """Long rows are enough work for several threads; some then have no row. Small integers: sums are exact."""
        K = op.columns(60000)
        weight = op.prune(torch.randint(1, 4, (3, K)).float(), torch.ones(3, K, dtype=torch.bool))
        x = torch.randint(-2, 3, (16, K)).float()
        torch.set_num_threads(5)
        for M in (2, 16):
            assert torch.equal(op(x[:M], op.pack(weight)), F.linear(x[:M], weight))

    @pytest.mark.parametrize("values", [None, "int8"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shift", [0, 1])
    def test_nothing_outside_is_read_or_written(
        self, op: Op, isa: str, shift: int, dtype: torch.dtype, values: str | None
    ) -> None:
        """Between guard bytes, with gaps of NaN between the rows of x and y, aligned and off by one element."""
        N, gap, op = 83, 3, dataclasses.replace(op, values=values)
        weight, bias = op.weight(N, 165, 0.5, dtype), torch.randn(N).to(dtype)
        weight = weight if values is None else exact_in_int8(weight)
        K = weight.shape[1]
        checks = []

        def guard(tensor: Tensor) -> Tensor:
            copy, check = guarded(tensor, shift=shift)
            checks.append(check)
            return copy

        packed, guarded_bias = self.guard_weight(op.pack(weight), guard), guard(bias)
        for M in (1, 2, 4, 8, 9, 17, 33, 65):
            nan = torch.full((M, max(K, N) + gap), float("nan"), dtype=dtype)
            x, y = guard(nan[:, : K + gap]), guard(nan[:, : N + gap])
            x[:, :K] = torch.randn(M, K)
            self.call_kernel(x[:, :K], packed, guarded_bias, "relu", y[:, :N])
            truth = dense(x[:, :K].double(), weight.double(), bias.double(), "relu")
            assert_close_to_truth(y[:, :N], truth, dense(x[:, :K], weight, bias, "relu"))
            assert y[:, N:].isnan().all(), "a write between the rows of y"
        for check in checks:
            check()

    @staticmethod
    def guard_weight(packed: PackedWeight, guard) -> PackedWeight:
        fields = {name: guard(getattr(packed, name)) for name in ("values", "bitmask", "row_offsets")}
        fields["scales"] = None if packed.scales is None else guard(packed.scales)
        if packed.sliced is not None:
            fields["sliced"] = type(packed.sliced)(**{name: guard(t) for name, t in vars(packed.sliced).items()})
        return dataclasses.replace(packed, **fields)

    def test_a_nan_stays_in_its_token_and_is_not_lost(self, op: Op, isa: str) -> None:
        weight = op.weight(40, 64)
        column = int(weight.count_nonzero(0).argmax())
        packed = op.pack(weight)
        for M in (1, 4, 8, 9, 33, 65):
            x = torch.randn(M, 64)
            clean = op(x, packed)
            x[M // 2, column] = float("nan")
            result = op(x, packed)
            others = torch.arange(M) != M // 2
            assert torch.equal(result[others], clean[others])
            stored = weight[:, column] != 0
            assert result[M // 2, stored].isnan().all()

    # ---- float64, autograd, compilers -------------------------------------------------------------------------------

    def test_float64_stays_float64(self, op: Op) -> None:
        weight, bias = op.weight(11, 40).double(), torch.randn(11).double()
        x = torch.randn(3, weight.shape[1]).double()
        for activation in ACTIVATIONS:
            result = op(x, op.pack(weight), bias, activation)
            torch.testing.assert_close(result, dense(x, weight, bias, activation), rtol=1e-12, atol=1e-12)

    def test_gradients(self, op: Op) -> None:
        weight = op.weight(6, 16, 0.5).double()
        packed = op.pack(weight)
        x, bias = torch.randn(3, 16).double().requires_grad_(), torch.randn(6).double().requires_grad_()
        values = packed.values.clone().requires_grad_()

        def function(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
            return op(x, dataclasses.replace(packed, values=values), bias, "silu")

        assert torch.autograd.gradcheck(function, (x, values, bias))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_gradients_are_those_of_the_dense_layer(self, op: Op, dtype: torch.dtype) -> None:
        weight, bias = op.weight(12, 32, 0.5, dtype), torch.randn(12).to(dtype)
        packed = op.pack(weight)
        x, seed = torch.randn(2, 3, 32).to(dtype), torch.randn(2, 3, 12).to(dtype)

        def gradients(function, x: Tensor, bias: Tensor, *rest) -> tuple[Tensor, ...]:
            x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
            return torch.autograd.grad(function(x, *rest, bias, "gelu"), (x, bias), seed.to(x.dtype))

        def ours(x: Tensor, bias: Tensor, activation: str) -> Tensor:
            return op(x, packed, bias, activation)

        truth = gradients(dense, x.double(), bias.double(), weight.double())
        for gradient in zip(gradients(ours, x, bias), truth, gradients(dense, x, bias, weight), strict=True):
            assert_close_to_truth(*gradient)

    def test_gradients_with_int8_values(self, op: Op) -> None:
        weight = exact_in_int8(op.weight(6, 16, 0.5)).double()
        packed = dataclasses.replace(op, values="int8").pack(weight)
        x, bias = torch.randn(3, 16).double().requires_grad_(), torch.randn(6).double().requires_grad_()
        torch.testing.assert_close(op(x, packed, bias, "silu"), dense(x, weight, bias, "silu"))
        assert torch.autograd.gradcheck(lambda x, bias: op(x, packed, bias, "silu"), (x, bias))

    def test_without_gradients_the_kernel_runs(self, op: Op) -> None:
        weight, bias = op.weight(12, 32), torch.randn(12)
        packed, x = op.pack(weight), torch.randn(3, 32)
        expected = op(x, packed, bias)
        x.requires_grad_()
        bias.requires_grad_()
        assert op(x, packed, bias).requires_grad
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                result = op(x, packed, bias)
            assert not result.requires_grad
            assert torch.equal(result, expected)

    @pytest.mark.parametrize(
        ("tokens", "dtype", "with_bias"), [(3, torch.float32, False), (20, torch.bfloat16, True)], ids=str
    )
    def test_opcheck(self, op: Op, tokens: int, dtype: torch.dtype, with_bias: bool) -> None:
        weight = op.weight(24, 40, dtype=dtype)
        x, bias = torch.randn(2, tokens, weight.shape[1]).to(dtype), torch.randn(24).to(dtype) if with_bias else None
        torch.library.opcheck(op.overload, (x, *self.operator_arguments(op.pack(weight)), bias, "silu"))
        packed = dataclasses.replace(op, values="int8").pack(weight)
        arguments = (x, *self.operator_arguments(packed), bias, "silu")
        torch.library.opcheck(op.overload, arguments, {"scales": packed.scales})

    @pytest.mark.parametrize("values", [None, "int8"])
    def test_compiles_to_one_graph(self, op: Op, values: str | None) -> None:
        weight, bias = op.weight(24, 40), torch.randn(24)
        packed = dataclasses.replace(op, values=values).pack(weight)
        torch.compiler.reset()

        def function(x: Tensor) -> Tensor:
            return op(2 * x, packed, bias, "gelu") + 1

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for M in (3, 5, 20):  # the second size makes the number of tokens a symbol
            x = torch.randn(M, weight.shape[1])
            assert torch.equal(compiled(x), function(x))

    # ---- errors -----------------------------------------------------------------------------------------------------

    def test_errors_name_expected_and_got(self, op: Op) -> None:
        packed, x, bias = op.pack(op.weight(6, 16)), torch.randn(2, 16), torch.randn(6)
        compact, name = fasticl.pack(torch.zeros(6, 16), "compact"), op.name
        cases = [
            (TypeError, f"{name}: weight: expected a PackedWeight .*got Tensor", (x, torch.randn(6, 16))),
            (ValueError, f"{name}: weight: expected format .*, got compact", (x, compact)),
            (TypeError, f"{name}: x: expected a torch.Tensor, got list", ([1.0], packed)),
            (TypeError, f"{name}: x: expected dtype torch.float32, got torch.bfloat16", (x.bfloat16(), packed)),
            (TypeError, f"{name}: x: expected a dense .*got torch.sparse_coo", (x.to_sparse(), packed)),
            (ValueError, rf"{name}: x: expected shape \[..., 16\], got \[2, 15\]", (x[:, :15], packed)),
            (ValueError, rf"{name}: x: expected shape \[..., 16\], got \[\]", (torch.tensor(1.0), packed)),
            (ValueError, f"{name}: weight: expected on meta .*, got cpu", (x.to("meta"), packed)),
            (TypeError, f"{name}: bias: expected a torch.Tensor, got float", (x, packed, 1.0)),
            (TypeError, f"{name}: bias: expected dtype torch.float32, got torch.float64", (x, packed, bias.double())),
            (ValueError, rf"{name}: bias: expected shape \[6\], got \[7\]", (x, packed, torch.randn(7))),
            (ValueError, rf"{name}: bias: expected shape \[6\], got \[1, 6\]", (x, packed, bias[None])),
            (ValueError, f"{name}: bias: expected on cpu .*, got meta", (x, packed, bias.to("meta"))),
            (ValueError, "activation: expected one of None, 'relu', .*got 'tanh'", (x, packed, bias, "tanh")),
        ]
        for error, message, arguments in cases:
            with pytest.raises(error, match=message):
                op(*arguments)


def exact_in_int8(weight: Tensor) -> Tensor:
    """A weight like this one that int8 values hold exactly, in any dtype: its scales are powers of two."""
    largest = F.pad(weight, (0, 1), value=torch.finfo(weight.dtype).tiny).abs().amax(1, keepdim=True)
    return (
        (weight.double() / largest * 127).round().mul(2.0 ** torch.randint(-10, -6, (len(weight), 1))).to(weight.dtype)
    )


def kernel_values(values: Tensor, packed: PackedWeight) -> tuple[int, int, int]:
    """What all kernels take of a weight's values, in the layout of the kernel, and its scales."""
    return values.data_ptr(), registry.VALUE_DTYPES[values.dtype], registry.address(packed.scales)


def kernel_edge(x: Tensor, y: Tensor, bias: Tensor | None, activation: str | None) -> tuple[tuple, tuple]:
    """The arguments before and after the weight's that all kernels take."""
    before = (x.data_ptr(), x.shape[0], x.stride(0))
    code = registry.ACTIVATIONS[activation]
    return before, (registry.address(bias), code, y.data_ptr(), y.stride(0), registry.DTYPES[x.dtype], 1)
