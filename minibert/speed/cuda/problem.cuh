// The inputs of an attention kernel, the part of one block, and dropout.
//
// Legend: N tokens of the batch, H heads, B sentences, K head size.
#pragma once
#include "tiles.cuh"
#include "random.cuh"

// The parameters of every attention kernel. Pointers that a kernel does not use are null.
struct Problem {
  const f16 *q, *k, *v;      // (N, H, K), rows of one token `*_stride` halves apart
  f16* context;              // (N, H, K), contiguous: forward's result, backward's input
  const f16* d_context;      // (N, H, K), contiguous: gradient of the context
  float* lse;                // (H, N): log of the sum of exp of a row's scores
  float* delta;              // (H, N): sum over K of context * d_context; written by backward_q
  f16 *dq, *dk, *dv;         // (N, H, K), rows of one token `grad_stride` halves apart
  const int* starts;         // (B + 1): sentence b holds tokens starts[b] .. starts[b + 1] - 1
  const u64* seed;           // one number that selects the dropout mask; in memory, so that it can
                             // change between replays of a CUDA graph
  int tokens, heads, tiles;  // N, H, tiles of rows in the longest sentence
  int q_stride, k_stride, v_stride, grad_stride;
  float scale;               // 1 / √K
  float keep_scale;          // 1 / (1 - dropout probability)
  u32 drop_below;            // a weight is dropped when its 16 random bits are below this
};

#define PROBLEM_PARAMETERS                                                                         \
  (const f16* q, const f16* k, const f16* v, f16* context, const f16* d_context, float* lse,       \
   float* delta, f16* dq, f16* dk, f16* dv, const int* starts, const u64* seed, int tokens,        \
   int heads, int tiles, int q_stride, int k_stride, int v_stride, int grad_stride, float scale,   \
   float keep_scale, u32 drop_below)
#define PROBLEM                                                                                    \
  Problem {                                                                                        \
    q, k, v, context, d_context, lse, delta, dq, dk, dv, starts, seed, tokens, heads, tiles,       \
        q_stride, k_stride, v_stride, grad_stride, scale, keep_scale, drop_below                   \
  }

// The part of the problem that this block computes. The grid is (sentences * tiles, heads).
struct Place {
  int first_token;  // of the sentence
  int length;       // tokens of the sentence
  int head;
  int first_row;    // of this block, relative to the sentence

  DEVICE Place(const Problem& p, int rows_per_block) {
    const int sentence = block_index_x() / p.tiles;
    first_token = load_global(p.starts + sentence);
    length = load_global(p.starts + sentence + 1) - first_token;
    head = block_index_y();
    first_row = block_index_x() % p.tiles * rows_per_block;
  }

  // Offset of this sentence and head in a tensor whose tokens are `stride` apart.
  DEVICE long long offset(int stride) const { return (long long)first_token * stride + head * K; }

  // The same in an (H, N) table.
  DEVICE long long row_offset(int tokens) const { return (long long)head * tokens + first_token; }
};

// ---- dropout -----------------------------------------------------------------------------------

// Which of a lane's 2 x 4 probabilities of a 16 x 16 patch are kept: bit 4j + e for p[j][e].
//
// One draw decides the four weights (i, j), (i, j + 8), (i + 8, j) and (i + 8, j + 8). A lane holds
// rows g, g + 8 and columns 2t, 2t + 1, 2t + 8, 2t + 9. These are exactly two draws, and the same
// ones whether rows are queries (forward, backward_q) or keys (backward_kv).
template <bool ROWS_ARE_KEYS>
DEVICE u32 kept(const Problem& p, u64 seed, const Place& at, int row, int column) {
  const int lane = thread_index() % 32;
  const u32 row_draw = row / 16 * 8 + lane / 4;
  u32 bits = 0;
  UNROLL for (int i = 0; i < 2; i++) {
    const u32 column_draw = column / 16 * 8 + lane % 4 * 2 + i;
    const u32 query = ROWS_ARE_KEYS ? column_draw : row_draw;
    const u32 key = ROWS_ARE_KEYS ? row_draw : column_draw;
    const u64 random = philox(seed, at.first_token + query, (u32)at.head << 16 | key);
    UNROLL for (int j = 0; j < 2; j++) {
      UNROLL for (int r = 0; r < 2; r++) {
        const int which = ROWS_ARE_KEYS ? 2 * j + r : 2 * r + j;
        const bool survives = ((u32)(random >> (16 * which)) & 0xffffu) >= p.drop_below;
        bits |= (u32)survives << (4 * j + 2 * r + i);
      }
    }
  }
  return bits;
}

// A weight after dropout; `bit` is its index in the result of `kept`.
DEVICE float dropped(float weight, u32 keep, int bit, const Problem& p) {
  return keep >> bit & 1 ? weight * p.keep_scale : 0.f;
}
