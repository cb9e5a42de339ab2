// Group and layer normalisation over the channels-last layout, sums in f32.
#include "warp.cuh"

struct GroupSums {
  const void* x;       // [b, pixels, channels]
  const void* origin;  // [b, .., channels], pictures `origin_stride` apart: see origin()
  float* sums;         // [b, slices, groups, 2]: of x - origin, and of their squares
  int pixels, channels, groups, slices, origin_stride;
};

struct GroupApply {
  const void* x;              // [b, pixels, channels]
  const void* origin;
  const void *weight, *bias;  // [channels]
  const float* sums;          // of whole pictures, of which x may be a part
  void* y;
  int pixels, channels, groups, slices, origin_stride;
  int all;  // pixels of a whole picture
  int silu;
  float eps;
};

struct LayerNorm {
  const void* x;              // [rows, channels]
  const void *weight, *bias;  // [channels]
  void* y;
  int rows, channels;
  float eps;
};

constexpr int THREADS = 256;

// V numbers at once.
template <typename T, int V> struct alignas(V * sizeof(T)) Some { T at[V]; };

// The first number of a group in its picture, from which all are counted: sums of squares stay exact far from zero.
template <typename T, typename Params> __device__ __forceinline__ float origin(const Params& p, int b, int group) {
  return to_float(((const T*)p.origin)[(size_t)b * p.origin_stride + group * (p.channels / p.groups)]);
}

// Blocks (slices, b). Shared memory: two floats for every channel of every row that is read at once.
template <typename T, int V> __device__ __forceinline__ void group_sums(const GroupSums& p) {
  SHARED(memory);
  const int b = blockIdx.y, tid = threadIdx.x, across = p.channels / V, per_group = p.channels / p.groups;
  const int at_once = across < THREADS ? THREADS / across : 1;
  const int per_slice = ceil_div(p.pixels, p.slices), from = blockIdx.x * per_slice, to = min(p.pixels, from + per_slice);
  float* own = (float*)memory;  // [at_once, channels, 2]
  const T* x = (const T*)p.x + (size_t)b * p.pixels * p.channels;
  if (tid < at_once * across || across >= THREADS) {
    for (int v = tid % across; v < across; v += THREADS) {
      const int row = tid / across;
      float sum[V] = {}, squares[V] = {}, zero[V];
#pragma unroll
      for (int e = 0; e < V; e++) zero[e] = origin<T>(p, b, (v * V + e) / per_group);
      for (int pixel = from + row; pixel < to; pixel += at_once) {
        Some<T, V> some = *(const Some<T, V>*)(x + (size_t)pixel * p.channels + v * V);
#pragma unroll
        for (int e = 0; e < V; e++) {
          float off = to_float(some.at[e]) - zero[e];
          sum[e] += off, squares[e] += off * off;
        }
      }
#pragma unroll
      for (int e = 0; e < V; e++) {
        own[(row * p.channels + v * V + e) * 2] = sum[e];
        own[(row * p.channels + v * V + e) * 2 + 1] = squares[e];
      }
    }
  }
  __syncthreads();
  for (int group = tid; group < p.groups; group += THREADS) {
    float sum = 0, squares = 0;
    for (int row = 0; row < at_once; row++)
      for (int c = group * per_group; c < (group + 1) * per_group; c++) {
        sum += own[(row * p.channels + c) * 2];
        squares += own[(row * p.channels + c) * 2 + 1];
      }
    float* part = p.sums + (((size_t)b * p.slices + blockIdx.x) * p.groups + group) * 2;
    part[0] = sum, part[1] = squares;
  }
}

// Blocks (any number, b), which share the pixels. Shared memory: two floats a channel.
template <typename T, int V> __device__ __forceinline__ void group_apply(const GroupApply& p) {
  SHARED(memory);
  const int b = blockIdx.y, tid = threadIdx.x, per_group = p.channels / p.groups;
  float* factors = (float*)memory;  // [channels, 2]: y = x factor + offset
  for (int group = tid; group < p.groups; group += THREADS) {
    float sum = 0, squares = 0;
    for (int s = 0; s < p.slices; s++) {
      const float* part = p.sums + (((size_t)b * p.slices + s) * p.groups + group) * 2;
      sum += part[0], squares += part[1];
    }
    const float count = float(p.all) * per_group, off = sum / count;
    const float mean = off + origin<T>(p, b, group), variance = fmaxf(squares / count - off * off, 0.0f);
    const float scale = 1.0f / sqrtf(variance + p.eps);
    for (int c = group * per_group; c < (group + 1) * per_group; c++) {
      // the mean is taken away first: far from zero, x factor + offset would lose what is left
      factors[2 * c] = mean;
      factors[2 * c + 1] = scale * to_float(((const T*)p.weight)[c]);
    }
  }
  __syncthreads();
  const int across = p.channels / V;
  const T *x = (const T*)p.x + (size_t)b * p.pixels * p.channels, *bias = (const T*)p.bias;
  T* y = (T*)p.y + (size_t)b * p.pixels * p.channels;
  // 32 bits count the parts of a picture that is 16384 pixels wide and high
  for (uint32_t i = blockIdx.x * THREADS + tid; i < (uint32_t)p.pixels * across; i += gridDim.x * THREADS) {
    const int c = i % (uint32_t)across * V;
    Some<T, V> some = *(const Some<T, V>*)(x + (size_t)i * V), shift = *(const Some<T, V>*)(bias + c);
#pragma unroll
    for (int e = 0; e < V; e++) {
      float value = (to_float(some.at[e]) - factors[2 * (c + e)]) * factors[2 * (c + e) + 1] + to_float(shift.at[e]);
      some.at[e] = from_float<T>(p.silu ? value / (1.0f + exp2_fast(value * -1.44269504f)) : value);
    }
    *(Some<T, V>*)(y + (size_t)i * V) = some;
  }
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int lanes = 16; lanes; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}

// A warp a row.
template <typename T, int V> __device__ __forceinline__ void layer_norm(const LayerNorm& p) {
  const int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int across = p.channels / V;
  if (row >= p.rows) return;
  const Some<T, V>* x = (const Some<T, V>*)((const T*)p.x + (size_t)row * p.channels);
  Some<T, V>* y = (Some<T, V>*)((T*)p.y + (size_t)row * p.channels);
  float sum = 0;
  for (int i = lane; i < across; i += 32)
#pragma unroll
    for (int e = 0; e < V; e++) sum += to_float(x[i].at[e]);
  const float mean = warp_sum(sum) / p.channels;
  float squares = 0;
  for (int i = lane; i < across; i += 32)
#pragma unroll
    for (int e = 0; e < V; e++) {
      float off = to_float(x[i].at[e]) - mean;
      squares += off * off;
    }
  const float scale = 1.0f / sqrtf(warp_sum(squares) / p.channels + p.eps);
  const Some<T, V> *weight = (const Some<T, V>*)p.weight, *bias = (const Some<T, V>*)p.bias;
  for (int i = lane; i < across; i += 32) {
    Some<T, V> some = x[i], factor = weight[i], shift = bias[i];
#pragma unroll
    for (int e = 0; e < V; e++) some.at[e] = from_float<T>((to_float(some.at[e]) - mean) * scale * to_float(factor.at[e]) + to_float(shift.at[e]));
    y[i] = some;
  }
}

// `wide`: 16 bytes at once, where channels and addresses allow it.
#define NORMS(T, V, name)                                                           \
  KERNEL(group_sums_##name, THREADS, 1, GroupSums) { group_sums<T, V>(p); }            \
  KERNEL(group_apply_##name, THREADS, 1, GroupApply) { group_apply<T, V>(p); }          \
  KERNEL(layer_norm_##name, THREADS, 1, LayerNorm) { layer_norm<T, V>(p); }
NORMS(half, 1, f16)
NORMS(bfloat16, 1, bf16)
NORMS(float, 1, f32)
NORMS(half, 8, wide_f16)
NORMS(bfloat16, 8, wide_bf16)
NORMS(float, 4, wide_f32)
