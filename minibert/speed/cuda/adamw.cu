// AdamW over all parameters of a model in one launch, and before it the squares for clipping.
//
// AdamW is limited by memory traffic. As separate operations it reads and writes every parameter
// and both moments several times, and clipping and unscaling read and write every gradient once
// more. Here each number is read once and written once.
//
// A block processes one chunk of one tensor and finds it in a table. SEMANTICS is a compile-time
// constant: 0 "torch", 1 "transformers", 2 "google" (the published versions, see adamw.py).
#include "primitives.cuh"

constexpr int THREADS = 256, UNROLLED = 4;
constexpr int CHUNK = 4096;  // elements per block, as in adamw.py

struct Tensors {  // one row of the table: addresses of a parameter, its gradient and its moments
  float* parameter;
  const float* gradient;
  float* first;
  float* second;
};

struct Part {  // of a tensor: from element `start` on, CHUNK elements or up to `size`
  int tensor, start, size;
};

// This block's part. chunks (blocks, 2): index of the tensor, index of its chunk.
DEVICE Part part_of_block(const int* chunks, const int* sizes) {
  const int tensor = load_global(chunks + 2 * block_index_x());
  const int start = load_global(chunks + 2 * block_index_x() + 1) * CHUNK;
  return Part{tensor, start, load_global(sizes + tensor)};
}

// squares (blocks,): the sum of the squares of each chunk's gradients, always added in the same
// order: a thread its numbers, a warp its threads, one thread the warps.
KERNEL(squares, THREADS, 4,
       (const Tensors* tensors, const int* sizes, const int* chunks, float* squares),
       SHARED_MEMORY(shared, THREADS / 32 * 4);
       const Part part = part_of_block(chunks, sizes);
       const float* const gradient = load_global(&tensors[part.tensor].gradient);
       float sum = 0.f;
       UNROLL for (int i = 0; i < CHUNK / THREADS; i++) {
         const int at = part.start + i * THREADS + thread_index();
         const float g = at < part.size ? load_global(gradient + at) : 0.f;
         sum += g * g;
       }
       sum = warp_sum(sum);
       if (thread_index() % 32 == 0) store_shared(shared + thread_index() / 32 * 4, sum);
       block_barrier();  // all warps' sums are stored
       if (thread_index() == 0) {
         for (int warp = 1; warp < THREADS / 32; warp++) {
           sum += load_shared<float>(shared + warp * 4);
         }
         store_global(squares + block_index_x(), sum);
       })

KERNEL(adamw, THREADS, 4,
       (const Tensors* tensors, const int* sizes, const float* rates, const int* chunks,
        const float* scalars, float lr, float rest1, float beta2, float rest2,
        float eps),
       // rest1 and rest2 are 1 - beta, computed in float64: in float32, 1 - 0.999 has four digits.
       const Part part = part_of_block(chunks, sizes);
       const int tensor = part.tensor, start = part.start, size = part.size;
       // scalars: the factor on gradients (clipping and unscaling), the two bias corrections, and
       // whether to update at all: an overflow skips the step.
       const float factor = load_global(scalars), correction1 = load_global(scalars + 1);
       const float correction2 = load_global(scalars + 2);
       if (load_global(scalars + 3) == 0.f) return;
       const Tensors t = load_global(tensors + tensor);
       // rates (tensors, 2): factor on the learning rate, and weight decay.
       const float rate = lr * load_global(rates + 2 * tensor);
       const float decay = load_global(rates + 2 * tensor + 1);

       for (int base = start; base < start + CHUNK && base < size; base += THREADS * UNROLLED) {
         float p[UNROLLED], g[UNROLLED], m[UNROLLED], v[UNROLLED];
         UNROLL for (int i = 0; i < UNROLLED; i++) {  // all loads first: their latencies overlap
           const int at = base + i * THREADS + thread_index();
           if (at < size) {
             p[i] = load_global(t.parameter + at);
             g[i] = load_global(t.gradient + at) * factor;
             m[i] = load_global(t.first + at);
             v[i] = load_global(t.second + at);
           }
         }
         UNROLL for (int i = 0; i < UNROLLED; i++) {
           const int at = base + i * THREADS + thread_index();
           if (at < size) {
             m[i] += (g[i] - m[i]) * rest1;
             v[i] = v[i] * beta2 + g[i] * g[i] * rest2;
             if (SEMANTICS == 0) {
               p[i] -= rate * decay * p[i];
               p[i] -= rate / correction1 * (m[i] / (square_root(v[i]) / correction2 + eps));
             } else if (SEMANTICS == 1) {
               p[i] -= rate * correction2 / correction1 * (m[i] / (square_root(v[i]) + eps));
               p[i] -= rate * decay * p[i];
             } else {
               p[i] -= rate * (m[i] / (square_root(v[i]) + eps) + decay * p[i]);
             }
             store_global(t.parameter + at, p[i]);
             store_global(t.first + at, m[i]);
             store_global(t.second + at, v[i]);
           }
         }
       })
