// One token through a decoder-only language model: what csrc/decoder.cpp reads. Target-free.
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
  const float *cos, *sin;  // [positions, rotary / 2]
  int64_t rotary;          // leading dimensions of a head that rotary positions turn, halves paired; 0: none
  void *keys, *values;     // [k.count, capacity, d] of cache_dtype
  DecoderLinear out, up, down, gate;
  bool gated, parallel;
  Activation activation;  // of gate, or without one of up
};

struct DecoderParams {
  const DecoderBlock* blocks;
  int64_t count;
  int64_t D;         // of x
  int64_t d;         // of a head
  int64_t capacity;  // positions for which the caches have room
  DType cache_dtype;
  DecoderNorm norm;    // after the blocks
  DecoderLinear head;  // to the vocabulary; N = 0: none
  int64_t widest;      // outputs of a block's qkv, or hidden neurons, or D: the most
  int64_t position;    // of this token
  float* x;            // [D], in: its embedding, out: what the last block adds up to
  float* logits;       // [head.N]
  int threads;
};

}  // namespace fasticl
