// Every hardware operation of the kernels: memory accesses, barriers, exchanges, tensor cores.
//
// The tests' emulator has the same functions for the CPU, with checks, and compiles the kernels
// unchanged.
//
// Vocabulary, for a reader new to CUDA:
//   lane     one of the 32 threads of a warp; they execute together
//   block    a few warps on one multiprocessor that share memory and can wait for each other
//   global   the GPU's main memory: large and slow
//   shared   a few KB on the multiprocessor, visible to one block: small and fast
//
// The instructions are those of PTX ISA 6.5 for sm_75 (Turing); later GPUs execute them too.
// https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short f16;  // the bits of a half; arithmetic on halves happens in tensor cores

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")  // unrolling would only cost registers

// A kernel that Python can launch by `name`. `min_blocks` per multiprocessor limits the registers
// of a thread to 65536 / (threads * min_blocks).
#define KERNEL(name, threads, min_blocks, parameters, ...)                                        \
  extern "C" __global__ void __launch_bounds__(threads, min_blocks) name parameters { __VA_ARGS__; }

// `bytes` of shared memory for this block.
#define SHARED_MEMORY(name, bytes) __shared__ alignas(128) unsigned char name[bytes]

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index_x() { return blockIdx.x; }
DEVICE int block_index_y() { return blockIdx.y; }

// ---- memory ------------------------------------------------------------------------------------

template <class T>
DEVICE T load_global(const T* address) {
  return *address;
}

// 16 bytes of an input that no thread writes during this kernel: may use the read-only cache.
DEVICE uint4 load_global_16(const f16* address) {
  uint4 v;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
  return v;
}

template <class T>
DEVICE void store_global(T* address, T value) {
  *address = value;
}

DEVICE void store_global_16(f16* address, uint4 value) { *(uint4*)address = value; }

template <class T>
DEVICE T load_shared(const unsigned char* address) {
  return *(const T*)address;
}

template <class T>
DEVICE void store_shared(unsigned char* address, T value) {
  *(T*)address = value;
}

// ---- barriers and exchanges --------------------------------------------------------------------

DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

// The sum and the maximum over the four lanes 4i .. 4i + 3, which hold one row of an accumulator.
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The sum over the warp, the same in every lane.
DEVICE float warp_sum(float x) {
  UNROLL for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  }
  return x;
}

// ---- tensor cores ------------------------------------------------------------------------------

DEVICE u32 shared_address(const unsigned char* p) { return (u32)__cvta_generic_to_shared(p); }

// Four 8 x 8 matrices of halves from shared memory. Lanes 8i .. 8i + 7 give the addresses of the
// eight rows (16 bytes each) of matrix i; afterwards m[i] in lane l holds row l / 4, columns
// 2 * (l % 4) and the next: the operand layout of `mma`.
DEVICE void load_matrices(u32 (&m)[4], const unsigned char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with each matrix transposed: lane l holds column l / 4, rows 2 * (l % 4) and the next.
DEVICE void load_matrices_transposed(u32 (&m)[4], const unsigned char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// The whole warp computes c (16 x 8, float) += a (16 x 8, half) * b (8 x 8, half).
// With g = lane / 4 and t = lane % 4, a lane holds
//   a_low   row g,     columns 2t, 2t + 1        c[0], c[1]   row g,     columns 2t, 2t + 1
//   a_high  row g + 8, columns 2t, 2t + 1        c[2], c[3]   row g + 8, columns 2t, 2t + 1
//   b       column g,  rows    2t, 2t + 1
DEVICE void multiply_accumulate(float (&c)[4], u32 a_low, u32 a_high, u32 b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a_low), "r"(a_high), "r"(b));
}

// ---- numbers -----------------------------------------------------------------------------------

// Two floats, rounded to nearest, as halves in one register; `low` in the low bits.
DEVICE u32 pack_halves(float low, float high) {
  u32 packed;
  asm("{.reg .f16 l, h;\n cvt.rn.f16.f32 l, %1;\n cvt.rn.f16.f32 h, %2;\n mov.b32 %0, {l, h};}"
      : "=r"(packed)
      : "f"(low), "f"(high));
  return packed;
}

DEVICE void unpack_halves(u32 packed, float& low, float& high) {
  asm("{.reg .f16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(packed));
}

// 2^x and log2(x) from the special-function unit: relative error at most 2^-22.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float square_root(float x) { return sqrtf(x); }  // correctly rounded
DEVICE float infinity() { return __int_as_float(0x7f800000); }
