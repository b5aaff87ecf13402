// fasticl._C_cuda: the CUDA kernels as a Python module. Importing it needs no GPU and no driver.
#include <pybind11/pybind11.h>

#include "bitmap_linear_cuda.h"
#include "nm_linear_cuda.h"
#include "sliced_linear_cuda.h"

#ifdef FASTICL_CUDA_ON_CPU
#include "testing/cuda_on_cpu.h"
#define FASTICL_MODULE _cuda_on_cpu
#else
#define FASTICL_MODULE _C_cuda
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using Address = uintptr_t;  // Tensor.data_ptr(); 0 is "none"

template <class T>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

}  // namespace

PYBIND11_MODULE(FASTICL_MODULE, m) {
  using namespace fasticl;
  m.doc() = "CUDA kernels of FastICL. Takes addresses; fasticl.ops checks what is passed here.";
#ifdef FASTICL_CUDA_ON_CPU
  m.def("set_seed", [](unsigned seed) { cuda_on_cpu::seed = seed; }, "seed"_a, "Orders of threads and of copies.");
#endif
  m.attr("lane_stream") =
      py::dict("LAG"_a = lane_stream::kLag, "RING"_a = lane_stream::kRing, "QUAD"_a = lane_stream::kQuad,
               "DEPTHS"_a = py::make_tuple(lane_stream::kMaxDepth, lane_stream::kMinDepth),
               "WARP_BYTES"_a = lane_stream::kWarpBytes, "TABLE_BYTES"_a = lane_stream::kTableBytes,
               "MAX_WARPS"_a = lane_stream::kMaxWarps, "MAX_BLOCKS"_a = lane_stream::kMaxBlocks);
  m.def("bitmap_linear_workspace", &bitmap_linear_workspace, "M"_a, "strips"_a, "blocks"_a,
        "Bytes of memory, whatever they hold, that bitmap_linear needs where several blocks share a strip.");
  m.def(
      "bitmap_linear",
      [](Address x, int64_t M, int64_t x_stride, Address values, Address masks, Address starts, Address row_order,
         int64_t strips, int K, int splits, int blocks, int depth, Address workspace, Address bias, int activation,
         Address y, int64_t y_stride, int dtype, int device, Address stream, bool wgmma) {
        py::gil_scoped_release release;
        BitmapLinearCuda p{};
        p.x = pointer<const void>(x), p.M = M, p.x_stride = x_stride;
        p.values = pointer<const uint32_t>(values), p.masks = pointer<const uint32_t>(masks);
        p.starts = pointer<const int32_t>(starts), p.row_order = pointer<const int32_t>(row_order);
        p.strips = strips, p.chunks = (K + 63) / 64, p.K = K, p.splits = splits, p.depth = depth;
        p.blocks = blocks, p.workspace = pointer<void>(workspace);
        p.bias = pointer<const void>(bias), p.activation = static_cast<Activation>(activation);
        p.y = pointer<void>(y), p.y_stride = y_stride;
        if (wgmma) return bitmap_linear_wgmma(p, static_cast<DType>(dtype), device, stream);
        bitmap_linear_cuda(p, splits / blocks, static_cast<DType>(dtype), device, stream);
      },
      "x"_a, "M"_a, "x_stride"_a, "values"_a, "masks"_a, "starts"_a, "row_order"_a, "strips"_a, "K"_a, "splits"_a,
      "blocks"_a, "depth"_a, "workspace"_a, "bias"_a, "activation"_a, "y"_a, "y_stride"_a, "dtype"_a, "device"_a,
      "stream"_a, "wgmma"_a = false,
      "y = act(x W^T + b), W in the lane-stream layout, bfloat16 or float16. Addresses and strides (elements); nothing "
      "is checked here. wgmma: by the kernel of has_bitmap_linear_wgmma, whose workspace is "
      "bitmap_linear_wgmma_workspace's. Raises RuntimeError where CUDA refuses.");
  m.def("has_bitmap_linear_wgmma", &has_bitmap_linear_wgmma, "device"_a,
        "Whether the device is a Hopper GPU for whose tensor cores this module has machine code.");
  m.def("bitmap_linear_wgmma_workspace", &bitmap_linear_wgmma_workspace, "M"_a, "strips"_a, "K"_a, "splits"_a,
        "device"_a, "Bytes of memory, whatever they hold, that bitmap_linear needs with wgmma.");

  m.attr("sparse_fragments") =
      py::dict("STRIP"_a = sparse_fragments::kStrip, "CHUNK"_a = sparse_fragments::kChunk,
               "RECORD"_a = sparse_fragments::kRecord / 4, "MAX_TOKENS"_a = sparse_fragments::kMaxTokens);
  m.def(
      "nm_linear",
      [](Address x, int M, int64_t x_stride, Address fragments, int64_t N, int K, Address bias, int activation,
         Address y, int64_t y_stride, int dtype, int device, Address stream, int strips, int splits) {
        py::gil_scoped_release release;
        NmLinearCuda p{};
        p.x = pointer<const void>(x), p.M = M, p.x_stride = x_stride;
        p.fragments = pointer<const unsigned char>(fragments);
        p.N = N, p.strips = (N + 15) / 16, p.K = K, p.chunks = (K + 63) / 64;
        p.bias = pointer<const void>(bias), p.activation = static_cast<Activation>(activation);
        p.y = pointer<void>(y), p.y_stride = y_stride;
        nm_linear_cuda(p, {strips, splits}, static_cast<DType>(dtype), device, stream);
      },
      "x"_a, "M"_a, "x_stride"_a, "fragments"_a, "N"_a, "K"_a, "bias"_a, "activation"_a, "y"_a, "y_stride"_a, "dtype"_a,
      "device"_a, "stream"_a, "strips"_a = 0, "splits"_a = 0,
      "y = act(x W^T + b), W 2:4 in the fragment layout, bfloat16 or float16, at most 64 tokens. Addresses and strides "
      "(elements); nothing else is checked here. strips and splits, how blocks share the work, are chosen if 0. Raises "
      "RuntimeError where CUDA refuses.");

  m.attr("gather_layout") = py::dict(
      "GROUP"_a = gather_layout::kGroup, "CLASSES"_a = gather_layout::kClasses, "ENTRIES"_a = gather_layout::kEntries,
      "STEP_BITS"_a = gather_layout::kStepBits, "EIGHT_BYTES"_a = gather_layout::kEightBytes,
      "MAX_WARPS"_a = gather_layout::kMaxWarps, "MAX_TOKENS"_a = gather_layout::kMaxTokens);
  m.def("sliced_linear_workspace", &sliced_linear_workspace, "M"_a, "groups"_a, "shares"_a, "blocks"_a,
        "Bytes of memory, whatever they hold, that sliced_linear needs where K has several shares.");
  m.def(
      "sliced_linear",
      [](Address x, int M, int64_t x_stride, Address records, Address starts, Address row_order, int groups, int K,
         int shares, int blocks, int warps, Address workspace, Address bias, int activation, Address y,
         int64_t y_stride, int dtype, int device, Address stream) {
        py::gil_scoped_release release;
        SlicedLinearCuda p{};
        p.x = pointer<const void>(x), p.M = M, p.x_stride = x_stride;
        p.records = pointer<const void>(records);
        p.starts = pointer<const int32_t>(starts), p.row_order = pointer<const int32_t>(row_order);
        p.groups = groups, p.K = K, p.shares = shares, p.blocks = blocks, p.warps = warps;
        p.workspace = pointer<void>(workspace);
        p.bias = pointer<const void>(bias), p.activation = static_cast<Activation>(activation);
        p.y = pointer<void>(y), p.y_stride = y_stride;
        sliced_linear_cuda(p, static_cast<DType>(dtype), device, stream);
      },
      "x"_a, "M"_a, "x_stride"_a, "records"_a, "starts"_a, "row_order"_a, "groups"_a, "K"_a, "shares"_a, "blocks"_a,
      "warps"_a, "workspace"_a, "bias"_a, "activation"_a, "y"_a, "y_stride"_a, "dtype"_a, "device"_a, "stream"_a,
      "y = act(x W^T + b), W in the gather layout, bfloat16 or float16, at most 8 tokens. Addresses and strides "
      "(elements); nothing else is checked here. Raises RuntimeError where CUDA refuses.");
}
