// softmax(q k' / sqrt(d)) v without the scores ever in memory (Dao et al. 2022, arXiv 2205.14135): a warp keeps 16 queries in
// registers and goes over the keys, 64 at a time, with a running maximum and sum.
#include "warp.cuh"

struct Attention {
  const void *q, *k, *v;  // [b, n, heads, d], [b, m, heads, d], rows as far apart as said
  void* y;                // [b, n, heads, d]
  int n, m, heads, d;
  int q_stride, k_stride, v_stride;
  float scale;  // 1 / sqrt(d), times log2(e)
};

// D is d, up to the next multiple of 16. Blocks (ceil(n / 64), b * heads) of four warps.
template <typename T, int D> __device__ __forceinline__ void attention(const Attention& p) {
  constexpr int KEYS = 64, WARPS = 4;
  constexpr int ROW = D * 2 + 16;  // bytes; an odd number of chunks, so that the rows of a matrix stand in different banks
  constexpr int TILE = KEYS * ROW;
  SHARED(memory);  // keys and values of two tiles
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int b = blockIdx.y / p.heads, head = blockIdx.y % p.heads, row0 = blockIdx.x * 16 * WARPS;
  const T* q = (const T*)p.q + (size_t)b * p.n * p.q_stride + head * p.d;
  const T* k = (const T*)p.k + (size_t)b * p.m * p.k_stride + head * p.d;
  const T* v = (const T*)p.v + (size_t)b * p.m * p.v_stride + head * p.d;

  // A thread reads every eighth chunk of every sixteenth row, from `from` on, of which there are so many rows.
  const int own_row = tid / 8, own_chunk = tid % 8;
  auto load = [&](unsigned char* to, const T* from, int stride, int rows) {
#pragma unroll
    for (int row = 0; row < KEYS; row += WARPS * 4)
#pragma unroll
      for (int chunk = 0; chunk < D / 8; chunk += 8)
        if (chunk + 8 <= D / 8 || own_chunk < D / 8 - chunk) {
          bool valid = own_row + row < rows && (own_chunk + chunk) * 8 < p.d;
          const T* at = from + (size_t)row * stride + chunk * 8;
          copy_async(to + (own_row + row) * ROW + (own_chunk + chunk) * 16, valid ? at : (const T*)p.k, valid);
        }
  };
  const T* next_k = k + (size_t)own_row * p.k_stride + own_chunk * 8;
  const T* next_v = v + (size_t)own_row * p.v_stride + own_chunk * 8;
  int left = p.m;  // keys that are not under way yet
  auto load_next = [&](unsigned char* to) {
    load(to, next_k, p.k_stride, left);
    load(to + TILE, next_v, p.v_stride, left);
    next_k += (size_t)KEYS * p.k_stride, next_v += (size_t)KEYS * p.v_stride, left -= KEYS;
  };

  load(memory + 2 * TILE, q + (size_t)(row0 + own_row) * p.q_stride + own_chunk * 8, p.q_stride, p.n - row0);
  copy_commit();
  load_next(memory);
  copy_commit();
  copy_wait<1>();
  __syncthreads();
  uint32_t queries[D / 16][4];
#pragma unroll
  for (int i = 0; i < D / 16; i++) load_matrices(queries[i], memory + 2 * TILE + (16 * warp + lane % 16) * ROW + (2 * i + lane / 16) * 16);
  __syncthreads();

  float y[D / 8][4] = {};
  // of rows lane/4 and lane/4 + 8
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
  const int tiles = ceil_div(p.m, KEYS);
  for (int t = 0; t < tiles; t++) {
    if (t + 1 < tiles) load_next(memory + (t + 1) % 2 * 2 * TILE);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    const unsigned char *keys = memory + t % 2 * 2 * TILE, *values = keys + TILE;

    float scores[KEYS / 8][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; i++)
#pragma unroll
      for (int j = 0; j < KEYS / 16; j++) {
        uint32_t r[4];
        load_matrices(r, keys + (16 * j + lane / 16 * 8 + lane % 8) * ROW + (2 * i + lane / 8 % 2) * 16);
        const uint32_t low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
        multiply_add(scores[2 * j], queries[i], low, T());
        multiply_add(scores[2 * j + 1], queries[i], high, T());
      }
    if ((t + 1) * KEYS > p.m) {
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (t * KEYS + 8 * j + lane % 4 * 2 + e % 2 >= p.m) scores[j][e] = -INFINITY;
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
      float most = largest[half];
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++) most = fmaxf(most, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(most, shuffle_xor(most, 2));
      const float shrink = exp2_fast((largest[half] - most) * p.scale), offset = most * p.scale;
      largest[half] = most;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) sum += scores[j][e] = exp2_fast(scores[j][e] * p.scale - offset);
      total[half] = total[half] * shrink + sum;
#pragma unroll
      for (int j = 0; j < D / 8; j++) y[j][2 * half] *= shrink, y[j][2 * half + 1] *= shrink;
    }

#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) {
      const float *low = scores[2 * i], *high = scores[2 * i + 1];
      const uint32_t weights[4] = {pack(low[0], low[1], T()), pack(low[2], low[3], T()), pack(high[0], high[1], T()), pack(high[2], high[3], T())};
#pragma unroll
      for (int j = 0; j < D / 16; j++) {
        uint32_t r[4];
        load_matrices_transposed(r, values + (16 * i + lane % 16) * ROW + (2 * j + lane / 16) * 16);
        const uint32_t low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
        multiply_add(y[2 * j], weights, low, T());
        multiply_add(y[2 * j + 1], weights, high, T());
      }
    }
    __syncthreads();
  }
  copy_wait<0>();

#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = total[half] + shuffle_xor(total[half], 1);
    sum += shuffle_xor(sum, 2);
    const int row = row0 + 16 * warp + lane / 4 + 8 * half;
    T* to = (T*)p.y + ((size_t)b * p.n + row) * p.heads * p.d + head * p.d;
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
      int at = 8 * j + lane % 4 * 2;
      if (row < p.n && at < p.d) *(uint32_t*)(to + at) = pack(y[j][2 * half] / sum, y[j][2 * half + 1] / sum, T());
    }
  }
}

#define ATTENTION(D)                                                                       \
  KERNEL(attention_##D##_f16, 128, 2, Attention) { attention<half, D>(p); }                   \
  KERNEL(attention_##D##_bf16, 128, 2, Attention) { attention<bfloat16, D>(p); }
ATTENTION(16)
ATTENTION(32)
ATTENTION(48)
ATTENTION(64)
ATTENTION(80)
ATTENTION(96)
ATTENTION(128)
ATTENTION(160)
