// One token of each of M sequences through a decoder-only language model: what csrc/decoder.cpp reads. Target-free.
#pragma once
#include "cpu.h"
#include "linear.h"

namespace fasticl {

// y = scales * (W x) + bias; scales and bias [N] float32, or null.
struct DecoderLinear {
  RowWeight weight;
  const float* scales;
  const float* bias;
};

// (x - mean) / sqrt(variance + eps) * weight + bias if centred (LayerNorm), x / sqrt(mean(x^2) + eps) * weight if not
// (RMSNorm); weight and bias float32, bias or null. Without a weight there is no norm.
struct DecoderNorm {
  const float* weight;
  const float* bias;
  float eps;
  bool centred;
};

// The heads of queries, keys or values within the outputs of a block's first linears: head h begins at first + h *
// step.
struct Heads {
  int64_t count, first, step;
};

// Keys or values: [M, heads, positions, d] of the blocks' dtype, the last two dimensions close; strides in elements.
struct DecoderCache {
  void* data;
  int64_t sequence_stride, head_stride;

  int64_t at(int64_t m, int64_t head) const { return m * sequence_stride + head * head_stride; }
};

constexpr int kMaxLinears = 3;  // that read the same input: q, k and v; or gate and up

// x += out_norm(out(attention(norm(x)))), then x += mlp_out_norm(down(act(gate h) * up h)) with h = mlp_norm(x); or, if
// `parallel`, both of the same x.
struct DecoderBlock {
  DecoderNorm norm, q_norm, k_norm, out_norm, mlp_norm, mlp_out_norm;
  DecoderLinear qkv[kMaxLinears];  // outputs one behind another
  int qkv_count;
  Heads q, k, v;
  float scale;             // of q . k
  int64_t window;          // positions that a token sees, itself included; 0: all
  const float *cos, *sin;  // [.., rotary / 2]
  int64_t rotary;          // leading dimensions of a head that rotary positions turn, halves paired; 0: none
  DecoderCache keys, values;
  DecoderLinear out, up, down, gate;
  bool gated, parallel;
  Activation activation;  // of gate, or without one of up
};

// A block in two, for a caller who keeps the keys and values: up to this token's, and from attention on.
enum class Part { all, start, finish };

struct DecoderParams {
  Part part;
  const DecoderBlock* blocks;
  int64_t count;
  int64_t D;           // of x
  int64_t d;           // of a head
  DType cache_dtype;   // of keys and values, and of in and out
  DecoderNorm norm;    // after the blocks
  DecoderLinear head;  // to the vocabulary; N = 0: none
  int64_t widest;      // outputs of a block's qkv, or hidden neurons, or D: the most
  int64_t M;           // tokens, each of another sequence
  // Of each token: its row of cos and sin, its position in the cache, and the positions that it attends to, of which a
  // block with a window takes the last.
  const int64_t *angles, *slots, *begins, *ends;
  float* x;        // [M, D], in: the tokens' embeddings, out: what the last block adds up to
  const void* in;  // instead of x, or null
  void* out;       // besides x, or null
  float* outputs;  // what one part of a block leaves to the other, or null
  float* logits;   // [M, head.N]
  int threads;
};

}  // namespace fasticl
