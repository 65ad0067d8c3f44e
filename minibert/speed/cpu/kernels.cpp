// Inference on a CPU with AVX2, FMA and F16C: linear layers, attention, LayerNorm with residual.
//
// Libraries pack a weight for many rows, and share the work among them by the number of rows. Here
// one loop serves every batch: a tile of up to six rows times a panel of 16 outputs keeps its sums
// in 12 of the 16 vector registers while it runs over the inputs. Each weight that is loaded
// serves six rows, each number of x 16 outputs. A row's sums run in the same order in every tile,
// so a sentence has the same bits in every batch.
//
// AVX512 needs one instruction for products of bytes (VNNI) instead of three, and only it multiplies
// bf16. Its registers have twice the width: there a tile of bytes or of bf16 has two panels. The other
// functions, and those of bytes, have the same bits with it and without.
//
// Threads are those of torch's OpenMP library. The compiler fuses nothing (-ffp-contract=off): only
// an explicit fmadd rounds once. A function returns 1 if memory is short, else 0.
//
// Legend: N rows (tokens), I inputs and O outputs of a linear layer, B sentences, S tokens of one,
// H heads, K head size, D width. x is (N, I), row by row; a weight is (O / 16, I, 16), which is
// panel by panel, the last one filled up with zeros; a bias is filled up likewise.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

namespace {

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

constexpr long WIDE = 16;      // outputs of a panel: two registers
constexpr long TALL = 6;       // rows of a tile
constexpr long DEEP = 1024;    // inputs that are summed up before the sum joins the others
constexpr long BLOCK = 96;     // rows that meet every panel before the next rows: they stay in L2

// Above 2^23 neighbouring numbers differ by 1: adding this rounds to an integer, whose last bits are
// those of the sum.
constexpr float ROUNDING = 1.5f * (1 << 23);
constexpr float LEAST = -87.f;           // below, exp is taken as 0: it would not be a normal number
constexpr float TINY = 1.17549435e-38f;  // the least normal number

struct Pair {
  __m256 a, b;
};

INLINE Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }

// Of weights, which are aligned.
INLINE Pair load(const float* w) { return {_mm256_load_ps(w), _mm256_load_ps(w + 8)}; }

INLINE Pair load(const uint16_t* w) {  // fp16
  const __m128i* halves = (const __m128i*)w;
  return {_mm256_cvtph_ps(_mm_load_si128(halves)), _mm256_cvtph_ps(_mm_load_si128(halves + 1))};
}

// The first n of 16 numbers.
INLINE Pair load_first(const float* x, long n) {
  if (n >= WIDE) return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
  alignas(32) float all[WIDE] = {};
  std::memcpy(all, x, n * sizeof(float));
  return load(all);
}

INLINE void store_first(float* y, Pair sum, long n) {
  if (n >= WIDE) {
    _mm256_storeu_ps(y, sum.a);
    _mm256_storeu_ps(y + 8, sum.b);
    return;
  }
  alignas(32) float all[WIDE];
  _mm256_store_ps(all, sum.a);
  _mm256_store_ps(all + 8, sum.b);
  std::memcpy(y, all, n * sizeof(float));
}

INLINE float sum_of(__m256 x) {
  const __m128 four = _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return two[0] + two[1];
}

INLINE float largest_of(__m256 x) {
  alignas(32) float all[8];
  _mm256_store_ps(all, x);
  return *std::max_element(all, all + 8);
}

INLINE __m256 magnitude(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), x); }

INLINE __m256 fma(__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }
#ifdef __AVX512BF16__
INLINE __m512 fma(__m512 x, __m512 y, __m512 z) { return _mm512_fmadd_ps(x, y, z); }
#endif

// e^x for x <= 88: 2^n e^r with |r| <= ln(2) / 2, and the Taylor polynomial of e^r, which is off by
// 6e-9 at most. ln(2) is subtracted in two parts, the first with few bits: n times it is exact.
template <class Vector>
INLINE Vector exp(Vector x) {
  using Bits = decltype(x < x);
  const Vector zero = {}, clipped = x < LEAST ? zero + LEAST : x;  // NaN stays NaN
  const Vector shifted = clipped * 1.44269504f + ROUNDING, n = shifted - ROUNDING;
  const Vector r = fma(n, zero - 1.42860677e-6f, fma(n, zero - 0.693145752f, clipped));
  Vector y = zero + 1.f / 5040;
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
    y = fma(y, r, zero + c);
  y = (Vector)((Bits)y + ((Bits)shifted << 23));
  return x < LEAST ? zero : x == x ? y : x;
}

// x P(X <= x) for a standard normal X. P(X <= -a) = exp(-a^2 / 2) f(1 / (1 + a / 4)), where f is a
// polynomial, fitted to the relative error over 0 <= a <= 14.
template <class Vector>
INLINE Vector gelu(Vector x) {
  const Vector zero = {}, a = x < 0 ? -x : x, t = 1 / fma(a, zero + 0.25f, zero + 1);
  Vector f = zero + 0.0339469592f;
  for (float c : {-0.19617853f, 0.395004091f, -0.33347256f, 0.304489439f, -0.0203853327f,
                  0.121568349f, 0.0948201697f, 0.100229008f, -2.16005302e-05f})
    f = fma(f, t, zero + c);
  const Vector below = exp(a * a * -0.5f) * f;
  return x * (x < 0 ? below : 1 - below);
}

#ifdef __AVX512BF16__

INLINE Pair gelu(Pair x) {
  const __m512 y = gelu(_mm512_insertf32x8(_mm512_castps256_ps512(x.a), x.b, 1));
  return {_mm512_castps512_ps256(y), _mm512_extractf32x8_ps(y, 1)};
}

#else

INLINE Pair gelu(Pair x) { return {gelu(x.a), gelu(x.b)}; }

#endif

// Calls product(n, R) for tiles that begin at row n and have R rows, a compile-time constant: `Tall` of
// them, and fewer in the last.
template <long Tall, class Product>
INLINE void by_tiles(long first, long last, Product product) {
  long n = first;
  for (; n + Tall <= last; n += Tall) product(n, std::integral_constant<int, Tall>());
  // Not a recursion: from one, GCC 12 copies the sums of bytes in every step.
  switch (last - n) {
    case 7: if constexpr (Tall > 7) product(n, std::integral_constant<int, 7>()); return;
    case 6: if constexpr (Tall > 6) product(n, std::integral_constant<int, 6>()); return;
    case 5: return product(n, std::integral_constant<int, 5>());
    case 4: return product(n, std::integral_constant<int, 4>());
    case 3: return product(n, std::integral_constant<int, 3>());
    case 2: return product(n, std::integral_constant<int, 2>());
    case 1: return product(n, std::integral_constant<int, 1>());
  }
}

// The part of the next panel that a tile prefetches, a step at a time. The tiles of a panel share the
// next one among them, so that memory is read all the time and not by the first tile alone.
struct Next {
  const char* place;
  long step;  // bytes

  template <class Weight>
  INLINE static Next part(const Weight* panel, long depth, long tile, long tiles) {
    const long bytes = WIDE * sizeof(Weight) * depth;
    return {(const char*)panel + bytes * tile / tiles, bytes / depth / tiles};
  }
  INLINE void fetch() {
    _mm_prefetch(place, _MM_HINT_T1);
    place += step;
  }
};

// R rows of x, which are `stride` apart, times one panel of a weight, over `depth` inputs.
template <int R, class Weight>
INLINE void multiply_tile(const float* x, long stride, const Weight* w, long depth, Next next,
                          Pair (&sums)[R]) {
  __m256 a[R], b[R];
  UNROLL for (int r = 0; r < R; r++) a[r] = b[r] = _mm256_setzero_ps();
  for (long i = 0; i < depth; i++, w += WIDE) {
    const Pair weight = load(w);
    next.fetch();
    UNROLL for (int r = 0; r < R; r++) {
      const __m256 number = _mm256_broadcast_ss(x + r * stride + i);
      a[r] = _mm256_fmadd_ps(number, weight.a, a[r]);
      b[r] = _mm256_fmadd_ps(number, weight.b, b[r]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) sums[r] = {a[r], b[r]};
}

template <class Weight>
void multiply(const float* x, long N, long I, const Weight* w, const float* bias, bool with_gelu,
              long O, float* y) {
  // Every loop over panels is shared in the same way, so that a thread only meets its own sums.
  #pragma omp parallel
  for (long block = 0; block < N; block += BLOCK) {
    const long end = std::min(block + BLOCK, N), tiles = (end - block + TALL - 1) / TALL;
    for (long i = 0; i < I; i += DEEP) {
      const long depth = std::min(DEEP, I - i);
      const bool is_first = i == 0, is_last = i + depth == I;
      #pragma omp for nowait schedule(static)
      for (long o = 0; o < O; o += WIDE)
        by_tiles<TALL>(block, end, [&](long n, auto R) {
          Pair sums[R];
          const Weight* panel = w + o * I + i * WIDE;
          const Next next = Next::part(panel + I * WIDE, depth, (n - block) / TALL, tiles);
          multiply_tile<R>(x + n * I + i, I, panel, depth, next, sums);
          for (int r = 0; r < R; r++) {
            float* place = y + (n + r) * O + o;
            Pair sum = is_first ? sums[r] : load_first(place, O - o) + sums[r];
            if (is_last) sum = sum + load(bias + o);
            if (is_last && with_gelu) sum = gelu(sum);
            store_first(place, sum, O - o);
          }
        });
    }
  }
}

// The integers x / scale + 128 of a row, and the scale, which maps the largest magnitude to 127.
// A row with a number that is not finite gets NaN as its scale.
float round_row(const float* x, long I, uint8_t* rounded) {
  __m256 largest_8 = _mm256_setzero_ps(), nan_8 = _mm256_setzero_ps();
  long i = 0;
  for (; i + 8 <= I; i += 8) {
    const __m256 numbers = _mm256_loadu_ps(x + i);
    largest_8 = _mm256_max_ps(largest_8, magnitude(numbers));
    nan_8 += numbers * 0.f;
  }
  float largest = largest_of(largest_8), nan = sum_of(nan_8);
  for (; i < I; i++) {
    largest = std::max(largest, std::abs(x[i]));
    nan += x[i] * 0.f;
  }
  const float scale = TINY + largest * (1.f / 127) + nan;  // TINY: a row of zeros has one too
  for (i = 0; i + 8 <= I; i += 8) {
    const __m256i signed_8 = _mm256_cvtps_epi32(_mm256_loadu_ps(x + i) / scale);
    const __m256i words = _mm256_add_epi32(signed_8, _mm256_set1_epi32(128));
    const __m128i shorts =
        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64((__m128i*)(rounded + i), _mm_packus_epi16(shorts, shorts));
  }
  for (; i < I; i++) rounded[i] = (uint8_t)(_mm_cvtss_si32(_mm_set_ss(x[i] / scale)) + 128);
  for (; i % 4; i++) rounded[i] = 0;  // multiplied by zeros
  return scale;
}

struct Integers {
  __m256i a, b;
};

#ifdef __AVX512BF16__

constexpr int PANELS = 2;        // of a tile of bytes or of bf16
constexpr long TALL_BF16 = 8;    // rows of a tile of bf16: more sums hide its longer latency

// Adds the products of 4 bytes of x and 4 bytes of each of 16 weights to 16 sums.
struct Bytes {  // unsigned times signed, in 32 bits
  INLINE static __m512i add(__m512i sums, __m512i x, __m512i weights) {
    return _mm512_dpbusd_epi32(sums, x, weights);
  }
};
struct Bf16 {  // in fp32
  INLINE static __m512i add(__m512i sums, __m512i x, __m512i weights) {
    return (__m512i)_mm512_dpbf16_ps((__m512)sums, (__m512bh)x, (__m512bh)weights);
  }
};

// R rows of x, which are `stride` bytes apart and `depth` long, times two panels, of which each has 64
// bytes for 4 of x.
template <class Numbers, int R>
INLINE void multiply_two(const void* x, long stride, const void* w, long depth, Next next,
                         __m512i (&sums)[PANELS][R]) {
  __m512i a[R], b[R];
  UNROLL for (int r = 0; r < R; r++) a[r] = b[r] = _mm512_setzero_si512();
  const char *row = (const char*)x, *panel = (const char*)w, *second = panel + depth * WIDE;
  for (long i = 0; i < depth; i += 4, panel += 4 * WIDE, second += 4 * WIDE) {
    const __m512i weights_a = _mm512_load_si512(panel), weights_b = _mm512_load_si512(second);
    UNROLL for (int p = 0; p < PANELS; p++) next.fetch();
    UNROLL for (int r = 0; r < R; r++) {
      int32_t four;
      std::memcpy(&four, row + r * stride + i, 4);
      a[r] = Numbers::add(a[r], _mm512_set1_epi32(four), weights_a);
      b[r] = Numbers::add(b[r], _mm512_set1_epi32(four), weights_b);
    }
  }
  UNROLL for (int r = 0; r < R; r++) {
    sums[0][r] = a[r];
    sums[1][r] = b[r];
  }
}

template <int R>
INLINE void multiply_tile(const uint8_t* x, long stride, const int8_t* w, long depth, Next next,
                          Integers (&sums)[PANELS][R]) {
  __m512i wide[PANELS][R];
  multiply_two<Bytes>(x, stride, w, depth, next, wide);
  for (int p = 0; p < PANELS; p++)
    for (int r = 0; r < R; r++)
      sums[p][r] = {_mm512_castsi512_si256(wide[p][r]), _mm512_extracti64x4_epi64(wide[p][r], 1)};
}

#else

constexpr int PANELS = 1;  // of a tile of bytes

// R rows of bytes times one panel (I / 4, 16, 4). vpmaddubsw adds two products of a byte and a
// signed byte in 16 bits, which hold 2 * 255 * 64; vpmaddwd adds two such sums in 32.
template <int R>
INLINE void multiply_tile(const uint8_t* x, long stride, const int8_t* w, long depth, Next next,
                          Integers (&sums)[PANELS][R]) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i a[R], b[R];
  UNROLL for (int r = 0; r < R; r++) a[r] = b[r] = _mm256_setzero_si256();
  for (long i = 0; i < depth; i += 4, w += 4 * WIDE) {
    const __m256i* weight = (const __m256i*)w;  // read where it is used: registers are short
    next.fetch();
    UNROLL for (int r = 0; r < R; r++) {
      int32_t four;
      std::memcpy(&four, x + r * stride + i, 4);
      const __m256i bytes = _mm256_set1_epi32(four);
      const __m256i low = _mm256_maddubs_epi16(bytes, weight[0]);
      a[r] = _mm256_add_epi32(a[r], _mm256_madd_epi16(low, ones));
      const __m256i high = _mm256_maddubs_epi16(bytes, weight[1]);
      b[r] = _mm256_add_epi32(b[r], _mm256_madd_epi16(high, ones));
    }
  }
  UNROLL for (int r = 0; r < R; r++) sums[0][r] = {a[r], b[r]};
}

#endif

// Numbers of one token and head to a panel: (S, K) to (K / 16, S, 16).
void pack_values(const float* v, long stride, long S, long K, float* panels) {
  for (long k = 0; k < K; k += WIDE)
    for (long s = 0; s < S; s++)
      store_first(panels + k * S + s * WIDE, load_first(v + s * stride + k, K - k), WIDE);
}

// And transposed: (S, K) to (S / 16, K, 16), the last panel filled up with zeros.
void pack_keys(const float* k, long stride, long S, long K, float* panels) {
  for (long s = 0; s < S; s += WIDE)
    for (long i = 0; i < K; i++)
      for (long j = 0; j < WIDE; j++)
        panels[s * K + i * WIDE + j] = s + j < S ? k[(s + j) * stride + i] : 0.f;
}

// In place, softmax(scale scores) of S scores. There is room for S rounded up to panels.
void softmax(float* scores, long S, float scale) {
  const long room = (S + WIDE - 1) / WIDE * WIDE;
  std::fill(scores + S, scores + room, -__builtin_inff());
  __m256 largest_8 = _mm256_loadu_ps(scores), sum = _mm256_setzero_ps();
  for (long s = 8; s < room; s += 8)
    largest_8 = _mm256_max_ps(largest_8, _mm256_loadu_ps(scores + s));
  const float largest = largest_of(largest_8);
  for (long s = 0; s < room; s += 8) {
    const __m256 weight = exp((_mm256_loadu_ps(scores + s) - largest) * scale);
    _mm256_storeu_ps(scores + s, weight);
    sum += weight;
  }
  const float inverse = 1 / sum_of(sum);
  for (long s = 0; s < room; s += 8)
    _mm256_storeu_ps(scores + s, _mm256_loadu_ps(scores + s) * inverse);
}

}  // namespace

extern "C" {

// y = x Wt + b, then GELU if `with_gelu`.
int multiply_fp32(const float* x, long N, long I, const float* w, const float* bias, int with_gelu,
                  long O, float* y) {
  multiply(x, N, I, w, bias, with_gelu, O, y);
  return 0;
}

int multiply_fp16(const float* x, long N, long I, const uint16_t* w, const float* bias,
                  int with_gelu, long O, float* y) {
  multiply(x, N, I, w, bias, with_gelu, O, y);
  return 0;
}

// The same with integers. w is (O / 16, I / 4, 16, 4), filled up with zeros to an even number of
// panels; `offset` is 128 times the sum of an output's weights, `scale` its scale.
int multiply_int8(const float* x, long N, long I, const int8_t* w, const float* bias,
                  int with_gelu, long O, float* y, const int32_t* offset, const float* scale) {
  const long depth = (I + 3) / 4 * 4;
  const std::unique_ptr<uint8_t[]> rounded_room(new (std::nothrow) uint8_t[N * depth]);
  const std::unique_ptr<float[]> scales_room(new (std::nothrow) float[N]);
  uint8_t* rounded = rounded_room.get();
  float* scales_N = scales_room.get();
  if (!rounded || !scales_N) return 1;
  #pragma omp parallel
  {
    #pragma omp for schedule(static)
    for (long n = 0; n < N; n++) scales_N[n] = round_row(x + n * I, I, rounded + n * depth);
    for (long block = 0; block < N; block += BLOCK) {
      const long end = std::min(block + BLOCK, N), tiles = (end - block + TALL - 1) / TALL;
      #pragma omp for nowait schedule(static)
      for (long o = 0; o < O; o += PANELS * WIDE)
        by_tiles<TALL>(block, end, [&](long n, auto R) {
          Integers sums[PANELS][R];
          const int8_t* panel = w + o * depth;
          const Next next = Next::part((const int32_t*)(panel + PANELS * WIDE * depth),
                                       PANELS * depth / 4, (n - block) / TALL, tiles);
          multiply_tile<R>(rounded + n * depth, depth, panel, depth, next, sums);
          for (long p = 0, from = o; p < PANELS && from < O; p++, from += WIDE) {
            const __m256i* offsets = (const __m256i*)(offset + from);
            const Pair scales = load(scale + from), b = load(bias + from);
            for (int r = 0; r < R; r++) {
              const __m256i whole_a = _mm256_sub_epi32(sums[p][r].a, offsets[0]);
              const __m256i whole_b = _mm256_sub_epi32(sums[p][r].b, offsets[1]);
              Pair sum = {_mm256_cvtepi32_ps(whole_a) * scales.a * scales_N[n + r] + b.a,
                          _mm256_cvtepi32_ps(whole_b) * scales.b * scales_N[n + r] + b.b};
              if (with_gelu) sum = gelu(sum);
              store_first(y + (n + r) * O + from, sum, O - from);
            }
          }
        });
    }
  }
  return 0;
}

#ifdef __AVX512BF16__

// y = x Wt + b in bf16, plus a residual (N, O) unless that is null, then GELU if `with_gelu`; all of
// it in fp32 and rounded once. w is (O / 16, I / 2, 16, 2), filled up with zeros to an even number of
// panels; I is even.
int multiply_bf16(const uint16_t* x, long N, long I, const uint16_t* w, const float* bias,
                  int with_gelu, long O, uint16_t* y, const uint16_t* residual) {
  #pragma omp parallel
  for (long block = 0; block < N; block += BLOCK) {
    const long end = std::min(block + BLOCK, N);
    const long tiles = (end - block + TALL_BF16 - 1) / TALL_BF16;
    #pragma omp for nowait schedule(static)
    for (long o = 0; o < O; o += PANELS * WIDE)
      by_tiles<TALL_BF16>(block, end, [&](long n, auto R) {
        __m512i sums[PANELS][R];
        const uint16_t* panel = w + o * I;
        const Next next = Next::part((const int32_t*)(panel + PANELS * WIDE * I), PANELS * I / 2,
                                     (n - block) / TALL_BF16, tiles);
        multiply_two<Bf16>(x + n * I, 2 * I, panel, 2 * I, next, sums);
        for (long p = 0, from = o; p < PANELS && from < O; p++, from += WIDE)
          for (int r = 0; r < R; r++) {
            __m512 sum = _mm512_castsi512_ps(sums[p][r]) + _mm512_load_ps(bias + from);
            const long place = (n + r) * O + from, bytes = 2 * std::min(WIDE, O - from);
            if (residual) {
              __m256i halves = {};
              std::memcpy(&halves, residual + place, bytes);
              sum += (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
            }
            if (with_gelu) sum = gelu(sum);
            const __m256bh rounded = _mm512_cvtneps_pbh(sum);
            std::memcpy(y + place, &rounded, bytes);
          }
      });
  }
  return 0;
}

#endif

// softmax(scale Q Kt) V of every sentence and head. qkv is (N, 3, H, K), sentences lie end to end;
// `starts` is (B + 1,).
int attend(const float* qkv, const int32_t* starts, long B, long H, long K, float scale,
           float* context) {
  long longest = 0;
  for (long b = 0; b < B; b++) longest = std::max<long>(longest, starts[b + 1] - starts[b]);
  const long stride = 3 * H * K;
  const long room_S = (longest + WIDE - 1) / WIDE * WIDE, room_K = (K + WIDE - 1) / WIDE * WIDE;
  const long each = room_S * (K + room_K + TALL);  // numbers that a thread has room for
  const std::unique_ptr<float, decltype(&std::free)> room(
      (float*)std::aligned_alloc(64, omp_get_max_threads() * each * sizeof(float)), std::free);
  if (!room && each) return 1;
  #pragma omp parallel
  {
    float* keys = room.get() + omp_get_thread_num() * each;
    float *values = keys + room_S * K, *scores = values + room_S * room_K;
    #pragma omp for collapse(2) schedule(dynamic)
    for (long b = 0; b < B; b++)
      for (long h = 0; h < H; h++) {
        const long S = starts[b + 1] - starts[b], D = H * K;
        const float* q = qkv + starts[b] * stride + h * K;
        pack_keys(q + D, stride, S, K, keys);
        pack_values(q + 2 * D, stride, S, K, values);
        by_tiles<TALL>(0, S, [&](long s, auto R) {
          Pair sums[R];
          for (long key = 0; key < S; key += WIDE) {
            multiply_tile<R>(q + s * stride, stride, keys + key * K, K, {(const char*)q, 0}, sums);
            for (int r = 0; r < R; r++) store_first(scores + r * room_S + key, sums[r], WIDE);
          }
          for (int r = 0; r < R; r++) softmax(scores + r * room_S, S, scale);
          for (long k = 0; k < K; k += WIDE) {
            multiply_tile<R>(scores, room_S, values + k * S, S, {(const char*)q, 0}, sums);
            float* place = context + (starts[b] + s) * D + h * K + k;
            for (int r = 0; r < R; r++) store_first(place + r * D, sums[r], K - k);
          }
        });
      }
  }
  return 0;
}

// LayerNorm(y + x), row by row.
int add_norm(const float* y, const float* x, const float* weight, const float* bias, float eps,
             long N, long D, float* out) {
  #pragma omp parallel for schedule(static)
  for (long n = 0; n < N; n++) {
    const float *a = y + n * D, *b = x + n * D;
    float* to = out + n * D;
    __m256 sum_8 = _mm256_setzero_ps();
    float rest = 0;  // of a width that is not a multiple of 8
    long d = 0;
    for (; d + 8 <= D; d += 8) {
      const __m256 sum = _mm256_loadu_ps(a + d) + _mm256_loadu_ps(b + d);
      _mm256_storeu_ps(to + d, sum);
      sum_8 += sum;
    }
    for (; d < D; d++) rest += to[d] = a[d] + b[d];
    const float mean = (sum_of(sum_8) + rest) / D;
    sum_8 = _mm256_setzero_ps();
    rest = 0;
    for (d = 0; d + 8 <= D; d += 8) {
      const __m256 distance = _mm256_loadu_ps(to + d) - mean;
      sum_8 = _mm256_fmadd_ps(distance, distance, sum_8);
    }
    for (; d < D; d++) rest += (to[d] - mean) * (to[d] - mean);
    const float inverse = 1 / std::sqrt((sum_of(sum_8) + rest) / D + eps);
    for (d = 0; d + 8 <= D; d += 8) {
      const __m256 normal = (_mm256_loadu_ps(to + d) - mean) * inverse;
      const __m256 scaled = normal * _mm256_loadu_ps(weight + d) + _mm256_loadu_ps(bias + d);
      _mm256_storeu_ps(to + d, scaled);
    }
    for (; d < D; d++) to[d] = (to[d] - mean) * inverse * weight[d] + bias[d];
  }
  return 0;
}

}  // extern "C"
