// How a warp moves rows of halves and multiplies matrices; every attention kernel uses it.
//
// Legend: K head size (HEAD_SIZE, a compile-time constant). g = lane / 4 and t = lane % 4: a lane's
// position in a tensor-core operand (primitives.cuh).
#pragma once
#include "primitives.cuh"

constexpr int K = HEAD_SIZE;
constexpr int CHUNKS = K / 8;       // 16-byte pieces of a row
constexpr int ROW_BYTES = 2 * K;
constexpr int FRAGMENT = K / 4;     // registers per lane for 16 rows of K halves

static_assert(K == 32 || K == 64, "other head sizes than 32 and 64 need another swizzle");

// ---- tiles in shared memory --------------------------------------------------------------------

// Byte offset of 16-byte chunk `chunk` of row `row`.
//
// Shared memory has 32 banks of 4 bytes, and ldmatrix reads one chunk of eight rows at once. In
// plain row-major order these chunks would share banks and the reads would be serialised. So each
// row's chunks are permuted by the row number (a swizzle), and the eight reads use different banks.
DEVICE int chunk_offset(int row, int chunk) {
  constexpr int rows_per_128_bytes = 8 / CHUNKS;
  return row * ROW_BYTES + ((chunk ^ (row / rows_per_128_bytes % CHUNKS)) << 4);
}

// `ROWS` rows in registers, between global and shared memory.
//
// Turing has no asynchronous copy from global to shared memory (Ampere's cp.async). The overlap is
// explicit instead: `fetch` the next tile, compute on the current one while the loads are in
// flight, then `commit`.
template <int ROWS, int THREADS>
struct Incoming {
  static constexpr int COUNT = ROWS * CHUNKS / THREADS;
  uint4 chunks[COUNT];

  // Rows from `first_row` of a sentence at `source`; rows past its end become zeros.
  DEVICE void fetch(const f16* source, int stride, int first_row, int length) {
    UNROLL for (int i = 0; i < COUNT; i++) {
      const int index = i * THREADS + thread_index() % THREADS;
      const int row = first_row + index / CHUNKS;
      chunks[i] = uint4{0, 0, 0, 0};
      if (row < length) {
        chunks[i] = load_global_16(source + row * stride + index % CHUNKS * 8);
      }
    }
  }

  DEVICE void commit(unsigned char* tile) const {
    UNROLL for (int i = 0; i < COUNT; i++) {
      const int index = i * THREADS + thread_index() % THREADS;
      store_shared(tile + chunk_offset(index / CHUNKS, index % CHUNKS), chunks[i]);
    }
  }
};

// One warp loads 16 rows from global memory as operand A of `mma`: fragment[2i] and [2i + 1] are
// rows g and g + 8 of columns 8i .. 8i + 7. `staging` is this warp's own shared memory for 16 rows.
DEVICE void load_fragment(u32 (&fragment)[FRAGMENT], unsigned char* staging, const f16* source,
                          int stride, int first_row, int length) {
  Incoming<16, 32> rows;
  rows.fetch(source, stride, first_row, length);
  warp_barrier();  // the previous use of `staging` is over
  rows.commit(staging);
  warp_barrier();
  const int matrix = thread_index() % 32 / 8, row = thread_index() % 8;
  UNROLL for (int i = 0; i < CHUNKS; i += 2) {
    u32 m[4];
    load_matrices(m, staging + chunk_offset(matrix % 2 * 8 + row, i + matrix / 2));
    UNROLL for (int j = 0; j < 4; j++) fragment[2 * i + j] = m[j];
  }
}

// One warp stores 16 rows of accumulators, each times a factor, to global memory.
DEVICE void store_rows(const float (&rows)[CHUNKS][4], float factor_low, float factor_high,
                       unsigned char* staging, f16* destination, int stride, int first_row,
                       int length) {
  const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  warp_barrier();
  UNROLL for (int i = 0; i < CHUNKS; i++) {
    store_shared(staging + chunk_offset(g, i) + 4 * t,
                 pack_halves(rows[i][0] * factor_low, rows[i][1] * factor_low));
    store_shared(staging + chunk_offset(g + 8, i) + 4 * t,
                 pack_halves(rows[i][2] * factor_high, rows[i][3] * factor_high));
  }
  warp_barrier();
  UNROLL for (int index = lane; index < 16 * CHUNKS; index += 32) {
    const int row = first_row + index / CHUNKS, chunk = index % CHUNKS;
    if (row < length) {
      store_global_16(destination + (long long)row * stride + chunk * 8,
                      load_shared<uint4>(staging + chunk_offset(index / CHUNKS, chunk)));
    }
  }
}

// ---- the two products --------------------------------------------------------------------------

// q kᵀ: c (16 x 16) = a (16 x K) times the transpose of rows `first` .. `first` + 15 of the tile.
// c[j] holds columns 8j .. 8j + 7.
DEVICE void multiply_transposed(float (&c)[2][4], const u32 (&a)[FRAGMENT],
                                const unsigned char* tile, int first) {
  const int matrix = thread_index() % 32 / 8, row = thread_index() % 8;
  UNROLL for (int j = 0; j < 2; j++) {
    UNROLL for (int e = 0; e < 4; e++) c[j][e] = 0.f;
    UNROLL for (int i = 0; i < CHUNKS; i += 4) {
      u32 b[4];
      load_matrices(b, tile + chunk_offset(first + 8 * j + row, i + matrix));
      UNROLL for (int e = 0; e < 4; e++) {
        multiply_accumulate(c[j], a[2 * (i + e)], a[2 * (i + e) + 1], b[e]);
      }
    }
  }
}

// p v: sum (16 x K) += p (16 x 16) times rows `first` .. `first` + 15 of the tile. The accumulator
// of the first product, rounded to halves, has the layout of operand A of the second: lanes
// exchange nothing.
DEVICE void accumulate(float (&sum)[CHUNKS][4], const float (&p)[2][4], const unsigned char* tile,
                       int first) {
  const int matrix = thread_index() % 32 / 8, row = thread_index() % 8;
  UNROLL for (int j = 0; j < 2; j++) {
    const u32 a_low = pack_halves(p[j][0], p[j][1]), a_high = pack_halves(p[j][2], p[j][3]);
    UNROLL for (int i = 0; i < CHUNKS; i += 4) {
      u32 b[4];
      load_matrices_transposed(b, tile + chunk_offset(first + 8 * j + row, i + matrix));
      UNROLL for (int e = 0; e < 4; e++) multiply_accumulate(sum[i + e], a_low, a_high, b[e]);
    }
  }
}

DEVICE void clear(float (&sum)[CHUNKS][4]) {
  UNROLL for (int i = 0; i < CHUNKS; i++) {
    UNROLL for (int e = 0; e < 4; e++) sum[i][e] = 0.f;
  }
}
