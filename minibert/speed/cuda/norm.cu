// Dropout, residual and LayerNorm in one pass, forward and backward.
//
//   h = dropout(x) + residual        y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias
//
// As separate operations, intermediate results are written and read twice, and the dropout mask is
// stored for the backward pass. Here a warp processes a row and keeps it in registers; sums over the
// row are exchanges between lanes; each number is read once and written once. For the backward pass
// only each row's mean and 1 / sqrt(var + eps) are stored: h is recomputed from x and the residual,
// the mask from the seed.
//
// HIDDEN (a multiple of 64), DROPOUT and WIDE are compile-time constants. x is float16. The
// residual, the weights and y are float32 if WIDE (as under autocast), else float16. Arithmetic is
// in float32.
//
// Legend: N rows (tokens), D = HIDDEN.
#include "primitives.cuh"
#include "random.cuh"

constexpr int WARPS = 4;             // per block; each processes one row at a time
constexpr int STEPS = HIDDEN / 64;   // a lane holds numbers 64 * step + 2 * lane and the next

struct alignas(8) Pair {
  float low, high;
};

DEVICE Pair load_pair(const f16* address) {
  Pair pair;
  unpack_halves(load_global((const u32*)address), pair.low, pair.high);
  return pair;
}

DEVICE void store_pair(f16* address, Pair pair) {
  store_global((u32*)address, pack_halves(pair.low, pair.high));
}

#if WIDE
typedef float wide;
DEVICE Pair load_pair(const float* address) { return load_global((const Pair*)address); }
DEVICE void store_pair(float* address, Pair pair) { store_global((Pair*)address, pair); }
#else
typedef f16 wide;
#endif

struct Dropout {
  u64 seed;
  float keep_scale;  // 1 / (1 - dropout probability)
  u32 drop_below;    // a number is dropped when its 16 random bits are below this

  // A pair of a row after dropout. Two steps share one draw of 64 bits, 32 each.
  DEVICE Pair of(Pair x, int row, int step) const {
    if (!DROPOUT) return x;
    const u64 random = philox(seed, row, step / 2 * 32 + thread_index() % 32);
    const u32 bits = (u32)(random >> (step % 2 * 32));
    return Pair{(bits & 0xffffu) >= drop_below ? x.low * keep_scale : 0.f,
                bits >> 16 >= drop_below ? x.high * keep_scale : 0.f};
  }
};

// The column of this lane's pair in a step.
DEVICE int column(int step) { return 64 * step + thread_index() % 32 * 2; }

// This lane's numbers of h = dropout(x) + residual in one row.
DEVICE void load_sum(Pair (&h)[STEPS], const f16* x, const wide* residual, int row,
                     const Dropout& dropout) {
  const long long start = (long long)row * HIDDEN;
  UNROLL for (int i = 0; i < STEPS; i++) {
    const Pair a = dropout.of(load_pair(x + start + column(i)), row, i);
    const Pair b = load_pair(residual + start + column(i));
    h[i] = Pair{a.low + b.low, a.high + b.high};
  }
}

KERNEL(add_norm, WARPS * 32, 4,
       (const f16* x, const wide* residual, const wide* weight, const wide* bias, const u64* seed,
        wide* y, float* mean, float* scale, int rows, float eps, float keep_scale, u32 drop_below),
       // scale (N): 1 / sqrt(var + eps). seed: one number in memory, as in problem.cuh.
       const int row = block_index_x() * WARPS + thread_index() / 32;
       if (row >= rows) return;
       const Dropout dropout{DROPOUT ? load_global(seed) : 0, keep_scale, drop_below};
       Pair h[STEPS];
       load_sum(h, x, residual, row, dropout);
       float sum = 0.f;
       UNROLL for (int i = 0; i < STEPS; i++) sum += h[i].low + h[i].high;
       const float m = warp_sum(sum) / HIDDEN;
       // The row is in registers, so a second pass is free, and it avoids cancellation.
       float squares = 0.f;
       UNROLL for (int i = 0; i < STEPS; i++) {
         h[i] = Pair{h[i].low - m, h[i].high - m};
         squares += h[i].low * h[i].low + h[i].high * h[i].high;
       }
       const float s = 1.f / square_root(warp_sum(squares) / HIDDEN + eps);
       UNROLL for (int i = 0; i < STEPS; i++) {
         const Pair w = load_pair(weight + column(i));
         const Pair b = load_pair(bias + column(i));
         store_pair(y + (long long)row * HIDDEN + column(i),
                    Pair{h[i].low * s * w.low + b.low, h[i].high * s * w.high + b.high});
       }
       if (thread_index() % 32 == 0) {
         store_global(mean + row, m);
         store_global(scale + row, s);
       })

// With n = (h - mean) * scale and g = dy * weight:
//   dh = (g - mean(g) - n * mean(g * n)) * scale      dweight = sum over rows of dy * n
//   dresidual = dh, dx = dropout(dh)                  dbias = sum over rows of dy
// A warp processes rows `warp`, `warp + all warps`, ... and keeps the sums over its rows in
// registers. Shared memory adds up the warps of a block, add_norm_sums the blocks, always in the
// same order: the same batch gives the same bits.
KERNEL(add_norm_backward, WARPS * 32, 2,
       (const wide* dy, const f16* x, const wide* residual, const wide* weight, const u64* seed,
        const float* mean, const float* scale, f16* dx, wide* dresidual, float* partial, int rows,
        int blocks, float keep_scale, u32 drop_below),
       // partial (blocks, 2, D): each block's share of dweight and dbias.
       SHARED_MEMORY(shared, WARPS * 2 * HIDDEN * 4);
       const int warp = thread_index() / 32;
       const Dropout dropout{DROPOUT ? load_global(seed) : 0, keep_scale, drop_below};
       Pair dweight[STEPS], dbias[STEPS];
       UNROLL for (int i = 0; i < STEPS; i++) dweight[i] = dbias[i] = Pair{0.f, 0.f};
       for (int row = block_index_x() * WARPS + warp; row < rows; row += blocks * WARPS) {
         const float m = load_global(mean + row), s = load_global(scale + row);
         Pair n[STEPS], g[STEPS];
         load_sum(n, x, residual, row, dropout);
         float sum = 0.f, product = 0.f;
         UNROLL for (int i = 0; i < STEPS; i++) {
           const Pair d = load_pair(dy + (long long)row * HIDDEN + column(i));
           const Pair w = load_pair(weight + column(i));
           n[i] = Pair{(n[i].low - m) * s, (n[i].high - m) * s};
           g[i] = Pair{d.low * w.low, d.high * w.high};
           dweight[i] = Pair{dweight[i].low + d.low * n[i].low, dweight[i].high + d.high * n[i].high};
           dbias[i] = Pair{dbias[i].low + d.low, dbias[i].high + d.high};
           sum += g[i].low + g[i].high;
           product += g[i].low * n[i].low + g[i].high * n[i].high;
         }
         sum = warp_sum(sum) / HIDDEN;
         product = warp_sum(product) / HIDDEN;
         UNROLL for (int i = 0; i < STEPS; i++) {
           const long long at = (long long)row * HIDDEN + column(i);
           const Pair dh{(g[i].low - sum - n[i].low * product) * s,
                         (g[i].high - sum - n[i].high * product) * s};
           store_pair(dresidual + at, dh);
           store_pair(dx + at, dropout.of(dh, row, i));
         }
       }
       UNROLL for (int i = 0; i < STEPS; i++) {
         unsigned char* const mine = shared + (warp * 2 * HIDDEN + column(i)) * 4;
         store_shared(mine, dweight[i]);
         store_shared(mine + HIDDEN * 4, dbias[i]);
       }
       block_barrier();  // all warps' sums are stored
       for (int at = thread_index(); at < 2 * HIDDEN; at += WARPS * 32) {
         float sum = 0.f;
         UNROLL for (int other = 0; other < WARPS; other++) {
           sum += load_shared<float>(shared + (other * 2 * HIDDEN + at) * 4);
         }
         store_global(partial + (long long)block_index_x() * 2 * HIDDEN + at, sum);
       })

// sums (2, D): dweight and dbias. A thread adds up one column of `partial`.
KERNEL(add_norm_sums, 128, 4, (const float* partial, float* sums, int blocks),
       const int at = block_index_x() * 128 + thread_index();
       if (at >= 2 * HIDDEN) return;
       float sum = 0.f;
       for (int block = 0; block < blocks; block++) {
         sum += load_global(partial + (long long)block * 2 * HIDDEN + at);
       }
       store_global(sums + at, sum);)
