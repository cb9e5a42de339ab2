// What the kernels ask of the machine: NVIDIA's GPUs from compute capability 8.0 on, or host.h.
#pragma once
#ifdef __CUDACC__
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A kernel of blocks of so many threads, of which so many at least shall find room on a multiprocessor.
#define KERNEL(name, threads, blocks, Params) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p)
#define SHARED(name) extern __shared__ __align__(128) unsigned char name[]

typedef __nv_bfloat16 bfloat16;

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float of_bits(uint32_t u) { return __uint_as_float(u); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ half from_float<half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }

__device__ __forceinline__ float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffff, x, lanes); }
// To 2 ulp; what is below the least normal number is 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four 8x8 matrices of 16-byte rows: lanes 8i..8i+7 name the rows of matrix i, lane l gets bytes 4(l%4).. of row l/4.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// The same of 2-byte numbers, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// c [16, 8] += a [16, k] b [8, k]': k is 16 for numbers of 2 bytes, 8 for floats, which count as tf32.
#define MULTIPLY_ADD(shape, type, T)                                                                                              \
  __device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {                \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "    \
                 "{%0, %1, %2, %3};"                                                                                              \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                             \
  }
MULTIPLY_ADD("m16n8k16", "f16", half)
MULTIPLY_ADD("m16n8k16", "bf16", bfloat16)
MULTIPLY_ADD("m16n8k8", "tf32", float)

__device__ __forceinline__ uint32_t pack(float low, float high, half) {
  half2 both = __floats2half2_rn(low, high);
  return *(uint32_t*)&both;
}
__device__ __forceinline__ uint32_t pack(float low, float high, bfloat16) {
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *(uint32_t*)&both;
}

// 16 bytes to shared memory, zeros if not valid; `from` is not read then.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all groups but the last N have landed.
template <int N> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
#else
#include "host.h"
#endif

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// 16 bytes of numbers, moved at once.
template <typename T> struct alignas(16) Chunk {
  static constexpr int N = 16 / sizeof(T);
  T at[N];
};
