// Products y = x w' with what follows them, as an implicit convolution: a row of y is a pixel, and the row of x that it
// needs, [taps, channels], is gathered from x [b, stored_h, stored_w, channels] as it is read. A linear layer is a
// convolution of one tap over pictures of one pixel. w is [n, taps, channels].
//
// A block makes a tile of y from tiles of x and w that are 128 bytes of k wide, several of them under way at a time.
// 16-byte chunks are swizzled within their rows, so that no two rows of a matrix share a bank.
#include "warp.cuh"

struct Gemm {
  const void *x, *w;
  const void* bias;      // [n], or null, as all that follow
  const void* shift;     // [m / per_shift, n], rows `shift_stride` apart: added
  const void* residual;  // [m, n]: added
  const void* slope;     // [n]: what is below 0 is multiplied by it
  void* y;               // [m, n], or [m, n/2]: what is in even columns times the exact GELU of the next
  float* parts;          // [splits, m, n] of sums over slices of k
  int m, n, k;
  int channels, size, stride, before;
  int stored_h, stored_w;  // of x in memory
  int h, w_;               // to which it is scaled as it is read
  int first_row, rows, out_w;
  int wrap_y, wrap_x;
  int per_shift, shift_stride;
  int splits;
  int gated;
  int wide;     // whether chunks of x and w are whole and aligned
  int aligned;  // the same of n, and of what is added
};

constexpr int ROW = 128;  // bytes of a tile's row

// Where chunk `chunk` of a tile's row stands.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * ROW + ((chunk ^ (row & 7)) << 4); }

template <typename T> __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_add(c, a, b, T());
}

// Floats are cut in two parts that tf32 can hold: all 24 bits but the last two or three count.
template <> __device__ __forceinline__ void multiply<float>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t small_a[4], small_b[2];
  for (int i = 0; i < 4; i++) small_a[i] = bits_of(of_bits(a[i]) - of_bits(a[i] & 0xffffe000));
  for (int i = 0; i < 2; i++) small_b[i] = bits_of(of_bits(b[i]) - of_bits(b[i] & 0xffffe000));
  multiply_add(c, small_a, b, 0.0f);
  multiply_add(c, a, small_b, 0.0f);
  multiply_add(c, a, b, 0.0f);
}

// The pixel of x at (y, x) of the scaled and padded picture, as an offset in pixels; -1 if it is a zero.
__device__ __forceinline__ int pixel(const Gemm& p, int y, int x) {
  if (p.wrap_y) y = y < 0 ? y + p.h : y >= p.h ? y - p.h : y;
  if (p.wrap_x) x = x < 0 ? x + p.w_ : x >= p.w_ ? x - p.w_ : x;
  if (y < 0 || y >= p.h || x < 0 || x >= p.w_) return -1;
  if (p.h != p.stored_h) y = int(int64_t(y) * p.stored_h / p.h);
  if (p.w_ != p.stored_w) x = int(int64_t(x) * p.stored_w / p.w_);
  return y * p.stored_w + x;
}

// Adds what belongs to columns from.. of a row of sums, and stores what comes out: a chunk, of twice as many sums if gated.
template <typename T, bool GATED> __device__ __forceinline__ void epilogue(const Gemm& p, int row, int from, float (&sums)[GATED ? 2 * Chunk<T>::N : Chunk<T>::N]) {
  constexpr int N = Chunk<T>::N, WIDTH = GATED ? 2 * N : N;
  const int col = GATED ? from / 2 : from, outputs = GATED ? p.n / 2 : p.n;
  const T* added[3] = {
      (const T*)p.bias,
      p.shift ? (const T*)p.shift + (size_t)(row / p.per_shift) * p.shift_stride : nullptr,
      p.residual ? (const T*)p.residual + (size_t)row * p.n : nullptr,
  };
#pragma unroll
  for (int i = 0; i < 3; i++) {
    if (!added[i]) continue;
    if (p.aligned) {
#pragma unroll
      for (int j = 0; j < WIDTH; j += N) {
        Chunk<T> chunk = *(const Chunk<T>*)(added[i] + from + j);
#pragma unroll
        for (int e = 0; e < N; e++) sums[j + e] += to_float(chunk.at[e]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < WIDTH; j++)
        if (from + j < p.n) sums[j] += to_float(added[i][from + j]);
    }
  }
  if (GATED) {
#pragma unroll
    for (int j = 0; j < N; j++) sums[j] = sums[2 * j] * (0.5f * sums[2 * j + 1] * (1.0f + erff(sums[2 * j + 1] * 0.70710678f)));
  }
  if (p.slope) {
#pragma unroll
    for (int j = 0; j < N; j++)
      if (col + j < outputs && sums[j] < 0) sums[j] *= to_float(((const T*)p.slope)[col + j]);
  }
  T* y = (T*)p.y + (size_t)row * outputs + col;
  if (p.aligned) {
    Chunk<T> chunk;
#pragma unroll
    for (int j = 0; j < N; j++) chunk.at[j] = from_float<T>(sums[j]);
    *(Chunk<T>*)y = chunk;
  } else {
#pragma unroll
    for (int j = 0; j < N; j++)
      if (col + j < outputs) y[j] = from_float<T>(sums[j]);
  }
}

// A tile of sums, whose rows are 8 floats longer than wide.
template <typename T, bool GATED, int BM, int BN, int THREADS> __device__ __forceinline__ void epilogue_tile(const Gemm& p, const float* tile, int m0, int n0) {
  constexpr int WIDTH = GATED ? 2 * Chunk<T>::N : Chunk<T>::N;
  for (int i = threadIdx.x; i < BM * BN / WIDTH; i += THREADS) {
    int row = i / (BN / WIDTH), col = i % (BN / WIDTH) * WIDTH;
    if (m0 + row >= p.m || n0 + col >= p.n) continue;
    float sums[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) sums[e] = tile[row * (BN + 8) + col + e];
    epilogue<T, GATED>(p, m0 + row, n0 + col, sums);
  }
}

// What a row of a tile sees: the first pixel of its picture, and where that starts: row and column, 16 bits each.
struct Row {
  int picture, corner;
};

// BM x BN of y a block, WM x WN a warp; blocks (m tiles * n tiles, splits), those of one m next to each other. Shared memory:
// the stages, and a Row for each row.
template <typename T, int BM, int BN, int WM, int WN, int STAGES> __device__ __forceinline__ void gemm(const Gemm& p) {
  constexpr int N = Chunk<T>::N, BK = ROW / sizeof(T);
  constexpr int ACROSS = BN / WN, THREADS = BM / WM * ACROSS * 32;
  constexpr int LOADED = THREADS / 8;  // rows at a time
  constexpr int STAGE = (BM + BN) * ROW, SUMS = BN + 8;
  static_assert(BM * SUMS * 4 <= STAGES * STAGE, "the sums of a tile find room where its factors were");
  SHARED(memory);
  Row* const rows = (Row*)(memory + STAGES * STAGE);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int tiles_n = ceil_div(p.n, BN), m0 = blockIdx.x / tiles_n * BM, n0 = blockIdx.x % tiles_n * BN;
  const int all = ceil_div(p.k, BK), per_split = ceil_div(all, p.splits);
  const int first = blockIdx.y * per_split, tiles = max(0, min(all - first, per_split));
  const T *const x = (const T*)p.x, *const w = (const T*)p.w;

  for (int i = tid; i < BM; i += THREADS) {
    int row = m0 + i, per_picture = p.rows * p.out_w, b = row / per_picture, inside = row % per_picture;
    // beyond m, far above all pictures
    int top = row < p.m ? (inside / p.out_w + p.first_row) * p.stride - p.before : -(1 << 15);
    rows[i] = {b * p.stored_h * p.stored_w, top << 16 | ((inside % p.out_w * p.stride - p.before) & 0xffff)};
  }
  __syncthreads();
  // What a tap of a row sees, as a number of pixels from x; -1 for a zero.
  auto seen = [&](int row, int tap) {
    Row r = rows[row];
    int at = pixel(p, (r.corner >> 16) + tap / p.size, int16_t(r.corner) + tap % p.size);
    return at < 0 ? at : r.picture + at;
  };

  // This thread reads one column of chunks, of several rows. Where they stand, in chunks from x and w, only changes by the width
  // of a tile until the next tap begins.
  const int chunk = tid % 8, row0 = tid / 8, taps = p.size * p.size;
  int k = first * BK + chunk * N, tap = k / p.channels, c = k % p.channels;
  uint32_t from[BM / LOADED], from_w = (uint32_t)(n0 + row0) * (p.k / N) + k / N, is_seen = 0;
  const uint32_t next_w = LOADED * (p.k / N);
  auto look = [&] {
    is_seen = 0;
#pragma unroll
    for (int i = 0; i < BM / LOADED; i++) {
      int at = tap < taps ? seen(row0 + i * LOADED, tap) : -1;
      from[i] = (uint32_t)max(at, 0) * (p.channels / N) + c / N;
      is_seen |= (at >= 0) << i;
    }
  };
  if (p.wide) look();

  // The next tile into a stage.
  auto load = [&](unsigned char* stage) {
    unsigned char *to = stage + swizzled(row0, chunk), *to_w = to + BM * ROW;
    if (p.wide) {
#pragma unroll
      for (int i = 0; i < BM / LOADED; i++) {
        bool valid = is_seen >> i & 1;
        copy_async(to + i * LOADED * ROW, x + (valid ? (size_t)from[i] * N : 0), valid);
      }
#pragma unroll
      for (int i = 0; i < BN / LOADED; i++) {
        bool valid = n0 + row0 + i * LOADED < p.n && k < p.k;
        copy_async(to_w + i * LOADED * ROW, w + (valid ? (size_t)(from_w + i * next_w) * N : 0), valid);
      }
      k += BK, c += BK, from_w += ROW / 16;
      if (c < p.channels) {
#pragma unroll
        for (int i = 0; i < BM / LOADED; i++) from[i] += ROW / 16;
      } else {
        while (c >= p.channels) c -= p.channels, tap++;
        look();
      }
    } else {
      for (int e = 0; e < N; e++, k++) {
        int tap = k / p.channels, c = k % p.channels;
        for (int i = 0; i < BM / LOADED; i++) {
          int at = tap < taps ? seen(row0 + i * LOADED, tap) : -1;
          ((T*)(to + i * LOADED * ROW))[e] = at < 0 ? from_float<T>(0.0f) : x[(size_t)at * p.channels + c];
        }
        for (int i = 0; i < BN / LOADED; i++) {
          int row = n0 + row0 + i * LOADED;
          ((T*)(to_w + i * LOADED * ROW))[e] = row < p.n && k < p.k ? w[(size_t)row * p.k + k] : from_float<T>(0.0f);
        }
      }
      k += BK - N;
    }
  };

  float sums[WM / 16][WN / 8][4] = {};
  const int warp_m = warp / ACROSS * WM, warp_n = warp % ACROSS * WN;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < tiles) load(memory + s * STAGE);
    copy_commit();
  }
  unsigned char *full = memory, *empty = memory + (STAGES - 1) * STAGE;
  auto next = [&](unsigned char* stage) { return stage == memory + (STAGES - 1) * STAGE ? memory : stage + STAGE; };
  for (int t = 0; t < tiles; t++) {
    copy_wait<STAGES - 2>();
    __syncthreads();
    if (t + STAGES - 1 < tiles) load(empty);
    copy_commit();
    const unsigned char *a_tile = full, *b_tile = full + BM * ROW;
    full = next(full), empty = next(empty);
#pragma unroll
    for (int step = 0; step < 4; step++) {
      uint32_t a[WM / 16][4], b[WN / 16][4];
#pragma unroll
      for (int i = 0; i < WM / 16; i++) load_matrices(a[i], a_tile + swizzled(warp_m + 16 * i + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int j = 0; j < WN / 16; j++)
        load_matrices(b[j], b_tile + swizzled(warp_n + 16 * j + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < WM / 16; i++)
#pragma unroll
        for (int j = 0; j < WN / 8; j++) {
          uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          multiply<T>(sums[i][j], a[i], pair);
        }
    }
  }
  copy_wait<0>();
  __syncthreads();

  // through shared memory, so that rows are written in one go
  float* tile = (float*)memory;
#pragma unroll
  for (int i = 0; i < WM / 16; i++)
#pragma unroll
    for (int j = 0; j < WN / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        tile[(warp_m + 16 * i + lane / 4 + e / 2 * 8) * SUMS + warp_n + 8 * j + lane % 4 * 2 + e % 2] = sums[i][j][e];
  __syncthreads();
  if (p.splits > 1) {
    for (int i = tid; i < BM * BN; i += THREADS) {
      int row = m0 + i / BN, col = n0 + i % BN;
      if (row < p.m && col < p.n) p.parts[((size_t)blockIdx.y * p.m + row) * p.n + col] = tile[i / BN * SUMS + i % BN];
    }
    return;
  }
  if (p.gated) epilogue_tile<T, true, BM, BN, THREADS>(p, tile, m0, n0);
  else epilogue_tile<T, false, BM, BN, THREADS>(p, tile, m0, n0);
}

// Adds up the parts, in order. A thread for as many outputs as 16 bytes hold.
template <typename T, bool GATED> __device__ __forceinline__ void add_parts(const Gemm& p) {
  constexpr int WIDTH = GATED ? 2 * Chunk<T>::N : Chunk<T>::N;
  const int across = ceil_div(p.n, WIDTH);
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (uint32_t)p.m * across) return;
  const int row = i / (uint32_t)across, col = i % (uint32_t)across * WIDTH;
  float sums[WIDTH] = {};
  for (int s = 0; s < p.splits; s++) {
    const float* from = p.parts + ((size_t)s * p.m + row) * p.n + col;
#pragma unroll
    for (int e = 0; e < WIDTH; e++)
      if (col + e < p.n) sums[e] += from[e];
  }
  epilogue<T, GATED>(p, row, col, sums);
}

#define PRODUCTS(T, name)                                                                            \
  KERNEL(gemm_128_##name, 256, 2, Gemm) { gemm<T, 128, 128, 64, 32, 3>(p); }                   \
  KERNEL(gemm_64_##name, 128, 3, Gemm) { gemm<T, 64, 64, 32, 32, 4>(p); }                      \
  KERNEL(gemm_parts_##name, 256, 1, Gemm) { p.gated ? add_parts<T, true>(p) : add_parts<T, false>(p); }
PRODUCTS(half, f16)
PRODUCTS(bfloat16, bf16)
PRODUCTS(float, f32)
