// Attention over sentences without padding: context = softmax(q kᵀ / √K) v, and its gradients.
//
// Reading order: primitives.cuh (hardware operations), tiles.cuh (how a warp multiplies),
// problem.cuh (inputs; dropout), then here `forward`, `backward_q`, `backward_kv`.
// docs/fused-attention.md draws the tiling.
//
// As in flash attention, the S x S matrix of scores never exists. A block owns 64 (or 16) query
// rows of one head of one sentence and iterates over tiles of keys. The softmax of a row is updated
// online, as the maximum `m` and the sum `l` over the keys seen so far. The backward pass
// recomputes the probabilities from q, k and the saved log-sum-exp.
//   Milakov and Gimelshein 2018, arXiv 1805.02867 (online softmax)
//   Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4; Dao 2023, arXiv 2307.08691
//
// No two threads accumulate into the same memory, so gradients are deterministic.
//
// Legend: N tokens of the batch, H heads, K head size.
// HEAD_SIZE (32 or 64) and DROPOUT (0 or 1) are compile-time constants: four binaries, of which a
// program needs one for inference and one for training.
#include "problem.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// ---- the three algorithms ----------------------------------------------------------------------
//
// A block of WARPS warps owns 16 * WARPS rows, 16 per warp. It iterates over the other side of the
// score matrix in tiles of STEP rows, BUFFERS of them in shared memory. With two buffers a warp can
// store the next tile while another still reads the current one: one barrier per tile.

template <int WARPS, int STEP_, int BUFFERS_, int FLOATS_A_ROW = 0>
struct Shape {
  static constexpr int STEP = STEP_, BUFFERS = BUFFERS_;
  static constexpr int THREADS = 32 * WARPS, ROWS = 16 * WARPS;
  static constexpr int TILE_BYTES = STEP * ROW_BYTES;
  static constexpr int PAIR_BYTES = 2 * TILE_BYTES;  // one tile of each of two tensors
  static constexpr int STAGING_BYTES = 16 * ROW_BYTES;  // per warp, used before and after the loop
  static constexpr int LOOP_BYTES = BUFFERS * PAIR_BYTES;
  static constexpr int STATISTICS =  // offset of the floats that belong to the rows of a tile
      LOOP_BYTES > WARPS * STAGING_BYTES ? LOOP_BYTES : WARPS * STAGING_BYTES;
  static constexpr int BYTES = STATISTICS + 4 * FLOATS_A_ROW * BUFFERS * STEP;
  using Rows = Incoming<STEP, THREADS>;
};

template <class S>
DEVICE void forward(const Problem& p, unsigned char* shared) {
  constexpr int STEP = S::STEP, BUFFERS = S::BUFFERS;
  const Place at(p, S::ROWS);
  if (at.first_row >= at.length) return;  // past the end of a shorter sentence
  const int warp = thread_index() / 32, lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  const int row = at.first_row + 16 * warp;  // the first row of this warp
  unsigned char* staging = shared + warp * S::STAGING_BYTES;
  const f16 *k = p.k + at.offset(p.k_stride), *v = p.v + at.offset(p.v_stride);

  typename S::Rows next_k, next_v;
  next_k.fetch(k, p.k_stride, 0, at.length);
  next_v.fetch(v, p.v_stride, 0, at.length);
  u32 q[FRAGMENT];
  load_fragment(q, staging, p.q + at.offset(p.q_stride), p.q_stride, row, at.length);
  const u64 seed = DROPOUT ? load_global(p.seed) : 0;
  block_barrier();
  next_k.commit(shared);
  next_v.commit(shared + S::TILE_BYTES);

  // Per lane and row (g and g + 8): the maximum of the raw scores, the sum of exponentials (over
  // this lane's columns until the end), and the weighted sum of values.
  float m[2] = {-infinity(), -infinity()}, l[2] = {0.f, 0.f}, sum[CHUNKS][4];
  clear(sum);
  const float scale_log2 = p.scale * LOG2_E;  // the hardware has 2^x: exp(x) = 2^(x log2 e)

  for (int first_key = 0, buffer = 0; first_key < at.length; first_key += STEP) {
    block_barrier();  // the tile is complete
    const unsigned char* k_tile = shared + buffer * S::PAIR_BYTES;
    const unsigned char* v_tile = k_tile + S::TILE_BYTES;
    const bool more = first_key + STEP < at.length;
    if (more) {
      next_k.fetch(k, p.k_stride, first_key + STEP, at.length);
      next_v.fetch(v, p.v_stride, first_key + STEP, at.length);
    }

    u32 keep[STEP / 16];
    UNROLL for (int i = 0; i < STEP / 16; i++) {
      keep[i] = DROPOUT ? kept<false>(p, seed, at, row, first_key + 16 * i) : 0;
    }
    float s[STEP / 16][2][4];
    UNROLL for (int i = 0; i < STEP / 16; i++) multiply_transposed(s[i], q, k_tile, 16 * i);
    if (first_key + STEP > at.length) {  // keys past the end of the sentence get no weight
      UNROLL for (int i = 0; i < STEP / 16; i++) {
        UNROLL for (int j = 0; j < 2; j++) {
          UNROLL for (int e = 0; e < 4; e++) {
            if (first_key + 16 * i + 8 * j + 2 * t + e % 2 >= at.length) s[i][j][e] = -infinity();
          }
        }
      }
    }

    UNROLL for (int r = 0; r < 2; r++) {
      float largest = m[r];
      UNROLL for (int i = 0; i < STEP / 16; i++) {
        UNROLL for (int j = 0; j < 2; j++) {
          largest = fmaxf(largest, fmaxf(s[i][j][2 * r], s[i][j][2 * r + 1]));
        }
      }
      largest = quad_max(largest);
      // Rescale the sums from the old maximum to the new one; exp2(-inf) is 0 the first time.
      const float shrink = exp2_fast((m[r] - largest) * scale_log2);
      m[r] = largest;
      l[r] *= shrink;
      UNROLL for (int i = 0; i < CHUNKS; i++) {
        sum[i][2 * r] *= shrink;
        sum[i][2 * r + 1] *= shrink;
      }
    }

    UNROLL for (int i = 0; i < STEP / 16; i++) {
      UNROLL for (int j = 0; j < 2; j++) {
        UNROLL for (int e = 0; e < 4; e++) {
          s[i][j][e] = exp2_fast(s[i][j][e] * scale_log2 - m[e / 2] * scale_log2);
          l[e / 2] += s[i][j][e];  // before dropout: softmax comes first
        }
      }
      if (DROPOUT) {
        UNROLL for (int j = 0; j < 2; j++) {
          UNROLL for (int e = 0; e < 4; e++) {
            s[i][j][e] = dropped(s[i][j][e], keep[i], 4 * j + e, p);
          }
        }
      }
      accumulate(sum, s[i], v_tile, 16 * i);
    }

    if (more) {
      if (BUFFERS == 1) block_barrier();  // all warps have read the tile that is replaced now
      buffer = (buffer + 1) % BUFFERS;
      next_k.commit(shared + buffer * S::PAIR_BYTES);
      next_v.commit(shared + buffer * S::PAIR_BYTES + S::TILE_BYTES);
    }
  }

  l[0] = quad_sum(l[0]);
  l[1] = quad_sum(l[1]);
  UNROLL for (int r = 0; r < 2; r++) {
    if (t == 0 && row + g + 8 * r < at.length) {
      store_global(p.lse + at.row_offset(p.tokens) + row + g + 8 * r,
                   m[r] * p.scale + log2_fast(l[r]) * LN_2);
    }
  }
  block_barrier();  // all tiles are read; their memory becomes staging again
  const int stride = p.heads * K;
  store_rows(sum, 1.f / l[0], 1.f / l[1], staging, p.context + at.offset(stride), stride, row,
             at.length);
}

// dq = scale * ds k, with ds = p * (dp - delta) and dp = (d_context vᵀ) * keep. delta, the sum over
// a row of context * d_context, comes from the derivative of softmax. A block owns query rows and
// iterates over the keys. It writes delta for backward_kv.
template <class S>
DEVICE void backward_q(const Problem& p, unsigned char* shared) {
  constexpr int STEP = S::STEP, BUFFERS = S::BUFFERS;
  const Place at(p, S::ROWS);
  if (at.first_row >= at.length) return;
  const int warp = thread_index() / 32, lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  const int row = at.first_row + 16 * warp;
  unsigned char* staging = shared + warp * S::STAGING_BYTES;
  const int stride = p.heads * K;
  const f16 *k = p.k + at.offset(p.k_stride), *v = p.v + at.offset(p.v_stride);

  u32 q[FRAGMENT], d_context[FRAGMENT];
  load_fragment(q, staging, p.context + at.offset(stride), stride, row, at.length);
  load_fragment(d_context, staging, p.d_context + at.offset(stride), stride, row, at.length);
  float lse_log2[2], delta[2] = {0.f, 0.f};
  UNROLL for (int i = 0; i < FRAGMENT; i++) {  // `q` still holds the context
    float c0, c1, d0, d1;
    unpack_halves(q[i], c0, c1);
    unpack_halves(d_context[i], d0, d1);
    delta[i % 2] += c0 * d0 + c1 * d1;
  }
  UNROLL for (int r = 0; r < 2; r++) {
    const long long index = at.row_offset(p.tokens) + row + g + 8 * r;
    const bool inside = row + g + 8 * r < at.length;
    delta[r] = quad_sum(delta[r]);
    if (t == 0 && inside) store_global(p.delta + index, delta[r]);
    lse_log2[r] = inside ? load_global(p.lse + index) * LOG2_E : infinity();
  }
  load_fragment(q, staging, p.q + at.offset(p.q_stride), p.q_stride, row, at.length);
  const u64 seed = DROPOUT ? load_global(p.seed) : 0;

  typename S::Rows next_k, next_v;
  next_k.fetch(k, p.k_stride, 0, at.length);
  next_v.fetch(v, p.v_stride, 0, at.length);
  block_barrier();
  next_k.commit(shared);
  next_v.commit(shared + S::TILE_BYTES);
  float sum[CHUNKS][4];
  clear(sum);
  const float scale_log2 = p.scale * LOG2_E;

  for (int first_key = 0, buffer = 0; first_key < at.length; first_key += STEP) {
    block_barrier();
    const unsigned char* k_tile = shared + buffer * S::PAIR_BYTES;
    const unsigned char* v_tile = k_tile + S::TILE_BYTES;
    const bool more = first_key + STEP < at.length;
    if (more) {
      next_k.fetch(k, p.k_stride, first_key + STEP, at.length);
      next_v.fetch(v, p.v_stride, first_key + STEP, at.length);
    }
    ROLLED for (int i = 0; i < STEP / 16; i++) {
      float s[2][4], dp[2][4];
      multiply_transposed(s, q, k_tile, 16 * i);
      multiply_transposed(dp, d_context, v_tile, 16 * i);
      const u32 keep = DROPOUT ? kept<false>(p, seed, at, row, first_key + 16 * i) : 0;
      UNROLL for (int j = 0; j < 2; j++) {
        UNROLL for (int e = 0; e < 4; e++) {
          const bool inside = first_key + 16 * i + 8 * j + 2 * t + e % 2 < at.length;
          const float prob = inside ? exp2_fast(s[j][e] * scale_log2 - lse_log2[e / 2]) : 0.f;
          if (DROPOUT) dp[j][e] = dropped(dp[j][e], keep, 4 * j + e, p);
          s[j][e] = prob * (dp[j][e] - delta[e / 2]);
        }
      }
      accumulate(sum, s, k_tile, 16 * i);
    }
    if (more) {
      if (BUFFERS == 1) block_barrier();
      buffer = (buffer + 1) % BUFFERS;
      next_k.commit(shared + buffer * S::PAIR_BYTES);
      next_v.commit(shared + buffer * S::PAIR_BYTES + S::TILE_BYTES);
    }
  }

  block_barrier();
  store_rows(sum, p.scale, p.scale, staging, p.dq + at.offset(p.grad_stride), p.grad_stride, row,
             at.length);
}

// dv = (p * keep)ᵀ d_context and dk = scale * dsᵀ q. A block owns key rows and iterates over the
// queries. Everything is transposed: rows of the accumulators are keys, columns are queries.
template <class S>
DEVICE void backward_kv(const Problem& p, unsigned char* shared) {
  constexpr int STEP = S::STEP, BUFFERS = S::BUFFERS;
  const Place at(p, S::ROWS);
  if (at.first_row >= at.length) return;
  const int warp = thread_index() / 32, lane = thread_index() % 32, t = lane % 4;
  const int row = at.first_row + 16 * warp;
  unsigned char* staging = shared + warp * S::STAGING_BYTES;
  // After the tiles: lse and delta of the queries of each buffer, STEP floats each.
  unsigned char* statistics = shared + S::STATISTICS;
  const int stride = p.heads * K;
  const f16 *q = p.q + at.offset(p.q_stride), *d_context = p.d_context + at.offset(stride);
  const float *lse = p.lse + at.row_offset(p.tokens), *delta = p.delta + at.row_offset(p.tokens);

  u32 k[FRAGMENT], v[FRAGMENT];
  load_fragment(k, staging, p.k + at.offset(p.k_stride), p.k_stride, row, at.length);
  load_fragment(v, staging, p.v + at.offset(p.v_stride), p.v_stride, row, at.length);
  const u64 seed = DROPOUT ? load_global(p.seed) : 0;

  typename S::Rows next_q, next_d;
  float next_lse, next_delta;
  const auto fetch = [&](int first_query) {
    next_q.fetch(q, p.q_stride, first_query, at.length);
    next_d.fetch(d_context, stride, first_query, at.length);
    const int query = first_query + thread_index();
    const bool inside = thread_index() < STEP && query < at.length;
    // A query past the end gets probability 2^-inf = 0.
    next_lse = inside ? load_global(lse + query) * LOG2_E : infinity();
    next_delta = inside ? load_global(delta + query) : 0.f;
  };
  const auto commit = [&](int buffer) {
    next_q.commit(shared + buffer * S::PAIR_BYTES);
    next_d.commit(shared + buffer * S::PAIR_BYTES + S::TILE_BYTES);
    if (thread_index() < STEP) {
      unsigned char* here = statistics + 8 * (buffer * STEP + thread_index());
      store_shared(here, next_lse);
      store_shared(here + 4, next_delta);
    }
  };
  fetch(0);
  block_barrier();
  commit(0);
  float sum_k[CHUNKS][4], sum_v[CHUNKS][4];
  clear(sum_k);
  clear(sum_v);
  const float scale_log2 = p.scale * LOG2_E;

  for (int first_query = 0, buffer = 0; first_query < at.length; first_query += STEP) {
    block_barrier();
    const unsigned char* q_tile = shared + buffer * S::PAIR_BYTES;
    const unsigned char* d_tile = q_tile + S::TILE_BYTES;
    const bool more = first_query + STEP < at.length;
    if (more) fetch(first_query + STEP);
    ROLLED for (int i = 0; i < STEP / 16; i++) {
      float s[2][4], dp[2][4];
      multiply_transposed(s, k, q_tile, 16 * i);
      multiply_transposed(dp, v, d_tile, 16 * i);
      const u32 keep = DROPOUT ? kept<true>(p, seed, at, row, first_query + 16 * i) : 0;
      UNROLL for (int j = 0; j < 2; j++) {
        UNROLL for (int c = 0; c < 2; c++) {
          const unsigned char* here =
              statistics + 8 * (buffer * STEP + 16 * i + 8 * j + 2 * t + c);
          const float lse_log2 = load_shared<float>(here);
          const float row_delta = load_shared<float>(here + 4);
          UNROLL for (int e = c; e < 4; e += 2) {
            const float prob = exp2_fast(s[j][e] * scale_log2 - lse_log2);
            s[j][e] = DROPOUT ? dropped(prob, keep, 4 * j + e, p) : prob;
            if (DROPOUT) dp[j][e] = dropped(dp[j][e], keep, 4 * j + e, p);
            dp[j][e] = prob * (dp[j][e] - row_delta);
          }
        }
      }
      accumulate(sum_v, s, d_tile, 16 * i);
      accumulate(sum_k, dp, q_tile, 16 * i);
    }
    if (more) {
      if (BUFFERS == 1) block_barrier();
      buffer = (buffer + 1) % BUFFERS;
      commit(buffer);
    }
  }

  block_barrier();
  store_rows(sum_v, 1.f, 1.f, staging, p.dv + at.offset(p.grad_stride), p.grad_stride, row,
             at.length);
  store_rows(sum_k, p.scale, p.scale, staging, p.dk + at.offset(p.grad_stride), p.grad_stride, row,
             at.length);
}

// ---- the kernels that Python launches ----------------------------------------------------------
//
// `long`: four warps, 64 rows, tiles of 32, two buffers. `short`: one warp, 16 rows, tiles of 16,
// one buffer. A sentence of 12 tokens would leave most of a 64 x 32 tile idle, and has few tiles to
// overlap; one buffer lets more blocks fit on a multiprocessor.

using Long = Shape<4, 32, 2>;
using Short = Shape<1, 16, 1>;
using LongQueries = Shape<4, 32, 2, 2>;  // iterates over queries, each with lse and delta
using ShortQueries = Shape<1, 16, 1, 2>;

#define ATTENTION(name, body, S, min_blocks)                                                       \
  KERNEL(name, S::THREADS, min_blocks, PROBLEM_PARAMETERS, SHARED_MEMORY(shared, S::BYTES);        \
         body<S>(PROBLEM, shared))

// The last column, blocks per multiprocessor, is the largest number that spills no register;
// benchmarks/kernel_resources.py measures it.
#if DROPOUT && __CUDA_ARCH__ >= 800
ATTENTION(forward_long, forward, Long, 2)
#else
ATTENTION(forward_long, forward, Long, 3)
#endif
ATTENTION(forward_short, forward, Short, 12)
ATTENTION(backward_q_long, backward_q, Long, 3)
ATTENTION(backward_q_short, backward_q, Short, 8)
ATTENTION(backward_kv_long, backward_kv, LongQueries, 2)
ATTENTION(backward_kv_short, backward_kv, ShortQueries, 8)
