"""CUDA on the CPU is itself tested: by planted bugs, which it must find, and against the instructions' definitions."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from test_formats import BITS

from fasticl.testing import cuda_on_cpu

SOURCE = r"""
#include "device.h"
using namespace fasticl;

static char message[1000];
static int threads = 64;
template <class... P, class... A>
const char* run_blocks(unsigned seed, int blocks, int shared_bytes, void (*kernel)(P...), A... arguments) {
  cuda_on_cpu::seed = seed;
  try {
    launch("kernel", kernel, blocks, threads, shared_bytes, 0, 0, arguments...);
  } catch (const std::exception& error) {
    return std::strncpy(message, error.what(), sizeof message - 1);
  }
  return nullptr;
}

template <class... P, class... A>
const char* run(unsigned seed, int shared_bytes, void (*kernel)(P...), A... arguments) {
  return run_blocks(seed, 1, shared_bytes, kernel, arguments...);
}

// Each thread leaves a number, and the last block to come reads what the threads of all blocks left.
void gathered(int* left, unsigned long long* count, int* out, bool barrier) {
  left[blockIdx.x * 64 + threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  bool is_last = false;
  if (threadIdx.x == 0) {
    unsigned long long seen = 0, found;
    while ((found = atomicCAS(count, seen, seen + 1)) != seen) seen = found;
    is_last = seen == 4;
    out[64 + blockIdx.x] = static_cast<int>(seen);
  }
  if (!__syncthreads_or(is_last)) return;
  bool all = true;
  for (int block = 0; block < 5; ++block) all &= left[block * 64 + threadIdx.x] == static_cast<int>(threadIdx.x);
  out[threadIdx.x] = all ? static_cast<int>((threadIdx.x + 1) % 64) : -1;
}

// Counts without an atomic instruction: reads and writes, between which others go on.
void torn(unsigned long long* count) {
  if (threadIdx.x) return;
  const unsigned long long seen = atomicCAS(count, 0, 0);
  *count = seen + 1;
}

// Each thread reads what its neighbour wrote.
void neighbours(int* out, bool barrier) {
  FASTICL_SHARED(shared);
  int* words = reinterpret_cast<int*>(shared);
  words[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  out[threadIdx.x] = words[(threadIdx.x + 1) % 64];
}

// Each thread reads what it had copied.
void copied(const int* in, int* out, bool wait) {
  FASTICL_SHARED(shared);
  copy_async_4(shared + 4 * threadIdx.x, in + threadIdx.x);
  copy_async_commit();
  copy_async_commit();  // an empty group
  if (wait) copy_async_wait<1>();
  out[threadIdx.x] = reinterpret_cast<int*>(shared)[threadIdx.x];
}

// Each thread reads what its neighbour wrote, who then has it overwritten.
void overwritten(const int* in, int* out, bool barrier) {
  FASTICL_SHARED(shared);
  int* words = reinterpret_cast<int*>(shared);
  words[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = words[(threadIdx.x + 1) % 64];
  if (barrier) __syncthreads();
  copy_async_4(shared + 4 * threadIdx.x, in + threadIdx.x);
  copy_async_commit();
  copy_async_wait<0>();
}

void left_alone() { if (threadIdx.x < 40) __syncthreads(); }

void apart() {
  float d[4] = {};
  const uint32_t a[4] = {};
  if (threadIdx.x % 2) mma(d, a, 0, 0, bf16{});
  else __syncwarp();
}

void misaligned(const int* in) {
  FASTICL_SHARED(shared);
  copy_async_16(shared + 8, in);
}

template <class T>
void product(const uint32_t* a, const uint32_t* b, float* d) {
  if (threadIdx.x >= 32) return;
  mma(reinterpret_cast<float(&)[4]>(d[4 * threadIdx.x]), reinterpret_cast<const uint32_t(&)[4]>(a[4 * threadIdx.x]),
      b[2 * threadIdx.x], b[2 * threadIdx.x + 1], T{});
}

template <class T, int kSelector>
void sparse_product(const uint32_t* a, const uint32_t* b, const uint32_t* metadata, float* d) {
  if (threadIdx.x >= 32) return;
  mma_sp<kSelector>(reinterpret_cast<float(&)[4]>(d[4 * threadIdx.x]),
                    reinterpret_cast<const uint32_t(&)[4]>(a[4 * threadIdx.x]),
                    reinterpret_cast<const uint32_t(&)[4]>(b[4 * threadIdx.x]), metadata[threadIdx.x], T{});
}

// The four matrices have their rows in the order in which the lanes give them, `offset` bytes from 16.
void matrices(const uint32_t* in, uint32_t* out, int offset) {
  FASTICL_SHARED(shared);
  if (threadIdx.x < 32) std::memcpy(shared + 16 * threadIdx.x, in + 4 * threadIdx.x, 16);
  __syncthreads();
  if (threadIdx.x < 32) {
    load_matrices(reinterpret_cast<uint32_t(&)[4]>(out[4 * threadIdx.x]), shared + 16 * threadIdx.x + offset);
  }
}

enum Bug {
  none, no_wait_for_copy, wrong_parity, too_many_bytes, barrier_not_fenced, copied_over, no_fence_for_proxy, no_barrier,
  no_fence_for_registers, no_commit, no_wait_for_products, b_overwritten, a_overwritten, strides_swapped,
  misaligned_copy, apart_in_a_warp
};

// A warpgroup multiplies, round after round: operand B comes by a bulk copy, and each thread moves 16 bytes of it to
// the place where wgmma reads them.
template <class T>
void warpgroup(const uint32_t* a, const unsigned char* b, float* out, int rounds, int n_stride, int k_stride, Bug bug) {
  FASTICL_SHARED(shared);
  unsigned char* const copied = shared + 2048;
  auto* const barrier = reinterpret_cast<Barrier*>(shared + 4096);
  const int thread = threadIdx.x;
  if (thread == 0) {
    barrier_init(barrier, 1);
    if (bug != barrier_not_fenced) fence_proxy_async();
  }
  float d[8][4] = {};
  uint32_t held[4];
  if (bug == strides_swapped) std::swap(n_stride, k_stride);
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    if (thread == 0) {
      barrier_expect(barrier, bug == too_many_bytes ? 2064 : 2048);
      copy_bulk(copied + (bug == misaligned_copy ? 8 : 0), b + 2048 * round, 2048, barrier, evict_first());
    }
    if (bug != no_wait_for_copy) barrier_wait(barrier, (round + (bug == wrong_parity)) % 2);
    uint4 words;
    std::memcpy(&words, copied + 16 * thread, 16);
    store_shared(shared + 16 * thread, words);
    for (int i = 0; i < 4; ++i) held[i] = a[(128 * round + thread) * 4 + i];
    if (bug != no_fence_for_proxy) fence_proxy_async();
    if (bug != no_barrier) __syncthreads();
    if (bug != no_fence_for_registers) wgmma_fence();
    if (bug == apart_in_a_warp && thread % 2) __syncwarp();
    wgmma(d, held, descriptor(shared_address(shared), n_stride, k_stride), T{});
    if (bug != no_commit) wgmma_commit();
    if (bug == a_overwritten) held[0] = 0;
    if (bug != no_wait_for_products && (bug != b_overwritten || round + 1 == rounds)) wgmma_wait();
    if (bug != copied_over) __syncthreads();
  }
  std::memcpy(out + 32 * thread, d, sizeof d);
}

#define API extern "C" __attribute__((visibility("default")))
API const char* run_neighbours(unsigned s, int* out, bool b) { return run(s, 256, neighbours, out, b); }
API const char* run_copied(unsigned s, const int* in, int* out, bool w) { return run(s, 256, copied, in, out, w); }
API const char* run_overwritten(unsigned s, const int* in, int* out, bool b) {
  return run(s, 256, overwritten, in, out, b);
}
API const char* run_gathered(unsigned s, int* left, unsigned long long* count, int* out, bool b) {
  return run_blocks(s, 5, 0, gathered, left, count, out, b);
}
API const char* run_torn(unsigned s, unsigned long long* count) { return run_blocks(s, 5, 0, torn, count); }
API const char* run_left_alone() { return run(0, 0, left_alone); }
API const char* run_apart() { return run(0, 0, apart); }
API const char* run_misaligned(const int* in) { return run(0, 256, misaligned, in); }
API const char* run_product(const uint32_t* a, const uint32_t* b, float* d, bool half) {
  return half ? run(0, 0, product<f16>, a, b, d) : run(0, 0, product<bf16>, a, b, d);
}
API const char* run_sparse_product(const uint32_t* a, const uint32_t* b, const uint32_t* m, float* d, bool half,
                                   bool s) {
  if (s) return half ? run(0, 0, sparse_product<f16, 1>, a, b, m, d) : run(0, 0, sparse_product<bf16, 1>, a, b, m, d);
  return half ? run(0, 0, sparse_product<f16, 0>, a, b, m, d) : run(0, 0, sparse_product<bf16, 0>, a, b, m, d);
}
API const char* run_matrices(const uint32_t* in, uint32_t* out, int o) { return run(0, 640, matrices, in, out, o); }
API const char* run_warpgroup(unsigned s, const uint32_t* a, const unsigned char* b, float* out, int rounds,
                              int n_stride, int k_stride, Bug bug, bool half) {
  threads = 128;
  const auto kernel = half ? warpgroup<f16> : warpgroup<bf16>;
  const char* const failed = run(s, 4112, kernel, a, b, out, rounds, n_stride, k_stride, bug);
  threads = 64;
  return failed;
}
API uint32_t call_permute(uint32_t a, uint32_t b, uint32_t s) { return permute(a, b, s); }
API uint32_t call_wrap(uint32_t l, uint32_t h, uint32_t s) { return shift_right_wrap(l, h, s); }
API uint32_t call_clamp(uint32_t l, uint32_t h, uint32_t s) { return shift_right_clamp(l, h, s); }
API uint16_t call_bf16(float v) { bf16 r; from_float(v, r); return r.bits; }
API uint16_t call_f16(float v) { f16 r; from_float(v, r); return r.bits; }
API float call_float(uint16_t bits, bool half) { return half ? to_float(f16{bits}) : to_float(bf16{bits}); }
"""
SEEDS = range(12)
CSRC = Path(__file__).parents[1] / "csrc"


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    (folder / "kernels.cpp").write_text(SOURCE)
    sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{CSRC}"]
    command += [*(cuda_on_cpu.SANITIZERS if sanitized else ()), "kernels.cpp", "-o", "kernels.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(Path(folder, "kernels.so")))
    runs = (
        "neighbours",
        "copied",
        "overwritten",
        "gathered",
        "torn",
        "left_alone",
        "apart",
        "misaligned",
        "product",
        "sparse_product",
        "warpgroup",
    )
    for name in (*runs, "matrices"):
        getattr(library, f"run_{name}").restype = ctypes.c_char_p
    for name in ("permute", "wrap", "clamp"):
        getattr(library, f"call_{name}").restype = ctypes.c_uint32
    for name in ("bf16", "f16"):
        getattr(library, f"call_{name}").restype = ctypes.c_uint16
        getattr(library, f"call_{name}").argtypes = [ctypes.c_float]
    library.call_float.restype = ctypes.c_float
    return library


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("name", ["neighbours", "copied", "overwritten"])
@pytest.mark.parametrize("right", [True, False])
def test_a_missing_barrier_or_wait_shows(kernels: ctypes.CDLL, name: str, right: bool) -> None:
    """In every order what is right is right, and in some order what lacks its barrier is wrong."""
    data = np.arange(1000, 1064, dtype=np.int32)
    expected = data if name == "copied" else np.roll(np.arange(64), -1)
    correct = []
    for seed in SEEDS:
        out = np.full(64, -7, np.int32)
        arguments = (
            [pointer(out), ctypes.c_bool(right)]
            if name == "neighbours"
            else [pointer(data), pointer(out), ctypes.c_bool(right)]
        )
        assert getattr(kernels, f"run_{name}")(seed, *arguments) is None
        correct.append(np.array_equal(out, expected))
    assert all(correct) == right


@pytest.mark.parametrize("right", [True, False])
def test_what_blocks_owe_each_other_shows(kernels: ctypes.CDLL, right: bool) -> None:
    """A block that is counted before all its threads have written; blocks come in various orders."""
    correct, orders = [], set()
    for seed in SEEDS:
        left, count, out = np.full(5 * 64, -7, np.int32), np.zeros(1, np.uint64), np.full(64 + 5, -7, np.int32)
        assert kernels.run_gathered(seed, pointer(left), pointer(count), pointer(out), ctypes.c_bool(right)) is None
        assert count[0] == 5
        correct.append(np.array_equal(out[:64], np.roll(np.arange(64), -1)))
        orders.add(tuple(out[64:]))
    assert all(correct) == right
    assert len(orders) > len(SEEDS) // 2
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)


def test_a_count_that_is_not_atomic_is_lost(kernels: ctypes.CDLL) -> None:
    counts = []
    for seed in SEEDS:
        count = np.zeros(1, np.uint64)
        assert kernels.run_torn(seed, pointer(count)) is None
        counts.append(int(count[0]))
    assert min(counts) < 5


def test_threads_that_never_meet_are_named(kernels: ctypes.CDLL) -> None:
    assert b"wait at a barrier that others of their warp or block never reach" in kernels.run_left_alone()
    message = kernels.run_apart()
    assert b"__syncwarp" in message
    assert b"mma" in message
    assert b"cp.async of 16 bytes: a misaligned address" in kernels.run_misaligned(pointer(np.zeros(8, np.int32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma_is_the_product_of_its_fragments(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Elements a0 to a7, b0 to b3 and c0 to c3 of the fragments by the tables of the PTX manual for mma.m16n8k16."""
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    lanes = [(lane >> 2, lane % 4) for lane in range(32)]
    a_elements = [[a[g + 8 * (i in (2, 3, 6, 7)), 2 * t + (i & 1) + 8 * (i >= 4)] for i in range(8)] for g, t in lanes]
    b_elements = [[b[2 * t + (i & 1) + 8 * (i >= 2), g] for i in range(4)] for g, t in lanes]
    c_index = [[(g + 8 * (i >= 2), 2 * t + (i & 1)) for i in range(4)] for g, t in lanes]
    held = np.array([[float(c[index]) for index in of_lane] for of_lane in c_index], np.float32)
    words = [torch.tensor(elements, dtype=dtype).view(torch.int32).numpy() for elements in (a_elements, b_elements)]
    assert kernels.run_product(*map(pointer, words), pointer(held), ctypes.c_bool(dtype == torch.float16)) is None
    result = torch.zeros(16, 8)
    for of_lane, values in zip(c_index, held, strict=True):
        for index, value in zip(of_lane, values, strict=True):
            result[index] = float(value)
    torch.testing.assert_close(result.double(), a.double() @ b.double() + c.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sparse_mma_is_the_product_of_its_fragments(kernels: ctypes.CDLL, dtype: torch.dtype, selector: int) -> None:
    """By the tables of the PTX manual for sparse mma.m16n8k32: elements a0 to a7 and their columns, b0 to b7, c0 to c3,
    metadata ``T4g+2s: [15..0]`` of row g and ``[31..16]`` of row g + 8, ``T4g+2s+1`` of columns 16 to 31.
    """
    places = torch.rand(16, 8, 4).argsort(-1)[..., :2].sort(-1).values  # [row, four columns, two values]
    values = torch.randn(16, 8, 2).to(dtype)
    a = torch.zeros(16, 8, 4, dtype=dtype).scatter_(2, places, values).view(16, 32)
    b, c = torch.randn(32, 8).to(dtype), torch.randn(16, 8)
    b_outside = b.clone()
    b_outside[4] = float("nan")  # is multiplied only where a value is stored
    lanes = [(lane >> 2, lane % 4) for lane in range(32)]
    a_elements = [
        [values[g + 8 * (i in (2, 3, 6, 7)), (4 * t + 16 * (i >= 4)) // 4, i % 2] for i in range(8)] for g, t in lanes
    ]
    metadata = np.random.default_rng(0).integers(0, 2**32, 32, np.uint32)  # of lanes that are not asked: anything
    for g in range(8):
        for half in range(2):
            bits = 0
            for upper in range(2):
                for chunk in range(4):
                    first, second = places[g + 8 * upper, 4 * half + chunk].tolist()
                    bits |= (first | second << 2) << 16 * upper + 4 * chunk
            metadata[4 * g + 2 * selector + half] = bits
    c_index = [[(g + 8 * (i >= 2), 2 * t + (i & 1)) for i in range(4)] for g, t in lanes]
    for given in (b, b_outside):
        b_elements = [[given[2 * t + (i & 1) + 8 * (i // 2), g] for i in range(8)] for g, t in lanes]
        held = np.array([[float(c[index]) for index in of_lane] for of_lane in c_index], np.float32)
        words = [torch.tensor(elements, dtype=dtype).view(torch.int32).numpy() for elements in (a_elements, b_elements)]
        half = ctypes.c_bool(dtype == torch.float16)
        arguments = (*map(pointer, (*words, metadata, held)), half, ctypes.c_bool(selector))
        assert kernels.run_sparse_product(*arguments) is None
        result = torch.zeros(16, 8)
        for of_lane, numbers in zip(c_index, held, strict=True):
            for index, number in zip(of_lane, numbers, strict=True):
                result[index] = float(number)
        stored = torch.zeros(16, 8, 4, dtype=torch.bool).scatter_(2, places, True).view(16, 32)
        products = torch.where(stored[..., None], a.double()[..., None] * given.double(), 0.0)
        torch.testing.assert_close(result.double(), products.sum(1) + c.double(), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert 0 < result.isnan().sum() < result.numel()
    metadata[2 * selector] ^= 0b1111  # places p become 3 - p and descend
    message = kernels.run_sparse_product(*arguments)
    assert b"metadata that do not ascend" in message


def test_matrices_are_operand_b(kernels: ctypes.CDLL) -> None:
    """Row n of x [8 tokens, 32 columns] is column n of B, whose elements lie as mma takes them."""
    x = np.arange(8 * 32, dtype=np.uint16).reshape(8, 32)
    rows = np.ascontiguousarray(x.reshape(8, 4, 8).transpose(1, 0, 2))  # lane 8 i + j: row j of matrix i
    out = np.zeros((32, 4), np.uint32)
    assert kernels.run_matrices(pointer(rows), pointer(out), ctypes.c_int(0)) is None
    for lane, words in enumerate(out.view(np.uint16).reshape(32, 4, 2)):
        g, t = lane // 4, lane % 4
        for i in range(4):
            assert list(words[i]) == [x[g, 2 * t + 8 * i], x[g, 2 * t + 8 * i + 1]]
    assert b"ldmatrix: a misaligned address" in kernels.run_matrices(pointer(rows), pointer(out), ctypes.c_int(4))


# Planted bugs in the order of the enumeration, and what is said of them; None: that the result is wrong.
BUGS = {
    "none": "",
    "no_wait_for_copy": None,
    "wrong_parity": None,
    "too_many_bytes": "that others of their warp or block never reach",
    "barrier_not_fenced": "a barrier without fence.proxy.async",
    "copied_over": None,
    "no_fence_for_proxy": "operand B was written without fence.proxy.async",
    "no_barrier": None,
    "no_fence_for_registers": "registers without wgmma.fence",
    "no_commit": None,
    "no_wait_for_products": None,
    "b_overwritten": None,
    "a_overwritten": None,
    "strides_swapped": None,
    "misaligned_copy": "cp.async.bulk: a misaligned address",
    "apart_in_a_warp": "meet at",
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_warpgroup_products_of_what_bulk_copies_bring(kernels: ctypes.CDLL, dtype: torch.dtype, bug: str) -> None:
    """By the PTX manual: wgmma m64n64k16, elements a0 to a7 and d0 to d31 of the fragments; operand B K-major without
    swizzle, in core matrices of 8 rows of n and 16 bytes of k. What is right is right in every order.
    """
    rounds = 3
    a, b = torch.randn(rounds, 64, 16).to(dtype), torch.randn(rounds, 64, 16).to(dtype)  # b: [n, k]
    threads = [(thread // 32, thread % 32 // 4, thread % 4) for thread in range(128)]
    rows = torch.tensor([[16 * w + g + 8 * (i in (2, 3, 6, 7)) for i in range(8)] for w, g, _ in threads])
    columns = torch.tensor([[2 * t + i % 2 + 8 * (i >= 4) for i in range(8)] for _, _, t in threads])
    fragments = a[:, rows, columns].contiguous().view(torch.int32).numpy()
    d_rows = torch.tensor([[16 * w + g + 8 * (i // 2 % 2) for i in range(32)] for w, g, _ in threads])
    d_columns = torch.tensor([[8 * (i // 4) + 2 * t + i % 2 for i in range(32)] for _, _, t in threads])
    truth = torch.einsum("rmk,rnk->mn", a.double(), b.double())[d_rows, d_columns]
    n, k = torch.meshgrid(torch.arange(64), torch.arange(16), indexing="ij")
    for n_stride, k_stride in ((128, 1024), (256, 128)):
        place = (n // 8 * n_stride + k // 8 * k_stride + n % 8 * 16 + k % 8 * 2) // 2
        laid_out = torch.empty_like(b).view(rounds, 1024)
        laid_out[:, place] = b
        image = laid_out.view(torch.int16).numpy()
        said, right = set(), []
        for seed in range(24):
            out = np.full((128, 32), np.nan, np.float32)
            said.add(
                kernels.run_warpgroup(
                    seed, pointer(fragments), pointer(image), pointer(out), rounds, n_stride, k_stride,
                    list(BUGS).index(bug), ctypes.c_bool(dtype == torch.float16),
                )
            )  # fmt: skip
            right.append(np.allclose(out, truth.numpy(), rtol=1e-5, atol=1e-4))
        if bug == "none":
            assert said == {None}
            assert all(right)
        elif BUGS[bug] is None:
            assert not all(right)
        else:
            assert any(message and BUGS[bug].encode() in message for message in said), said


def test_bits(kernels: ctypes.CDLL) -> None:
    low, high = 0x8899AABB, 0xCCDDEEFF
    data = [*low.to_bytes(4, "little"), *high.to_bytes(4, "little")]
    for selector in (0x3210, 0x7654, 0x4410, 0x1044, 0x1233, 0xFFFF3210):
        expected = bytes(data[selector >> 4 * i & 7] for i in range(4))
        assert kernels.call_permute(low, high, selector) == int.from_bytes(expected, "little")
    assert kernels.call_permute(0x0080FF7F, 0, 0xBA98) == 0x00FFFF00  # repeats the signs
    for shift in (0, 1, 16, 31, 32, 33, 48):
        both = high << 32 | low
        assert kernels.call_wrap(low, high, shift) == both >> shift % 32 & 0xFFFFFFFF
        assert kernels.call_clamp(low, high, shift) == both >> min(shift, 32) & 0xFFFFFFFF


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_are_torchs(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    call = kernels.call_bf16 if dtype == torch.bfloat16 else kernels.call_f16
    values = torch.randint(-(2**31), 2**31 - 1, (3000,)).int().view(torch.float32)
    half_way = torch.tensor(
        [1 + 3 / 512, 1 + 1 / 256, 1 + 3 / 2048, 1 + 1 / 2048, 65519.9, 65520.0, 3.4e38, -0.0, 1e-7]
    )
    for value in torch.cat((values, torch.randn(1000), half_way)):
        result = torch.tensor([call(float(value))], dtype=torch.uint16).view(dtype)[0]
        expected = value.to(dtype)
        assert torch.equal(result, expected) or (result.isnan() and expected.isnan()), value
    for bits in (0, 1, 0x8000, 0x3C00, 0x7C00, 0x7F80, 0x0400, 0xABCD):
        wide = kernels.call_float(ctypes.c_uint16(bits), ctypes.c_bool(dtype == torch.float16))
        expected = torch.tensor([bits], dtype=torch.int32).to(BITS[dtype]).view(dtype).float()[0]
        torch.testing.assert_close(torch.tensor(wide), expected, rtol=0, atol=0, equal_nan=True)
