// The kernels' machine for tests without a GPU: blocks run one after the other, threads as fibers on one processor.
// What a GPU leaves undefined is made to show: shared memory starts as NaN, asynchronous copies land no
// earlier than they are waited for, the order of threads can be turned around, and threads of a warp that do not do the
// same together are an error, as are matrices whose rows cannot be read at once.
#pragma once
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <ucontext.h>
#include <vector>

#define __device__
#define __forceinline__ inline
#define KERNEL(name, threads, blocks, Params) extern "C" void name(const Params& p)
#define SHARED(name) unsigned char* name = host::shared.data()

struct half { uint16_t bits; };
struct bfloat16 { uint16_t bits; };

inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
inline float of_bits(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return of_bits(uint32_t(x.bits) << 16); }
inline float to_float(half x) {
  int exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  float size = exponent == 31 ? (mantissa ? NAN : INFINITY) : exponent ? ldexpf(float(1024 + mantissa), exponent - 25) : ldexpf(float(mantissa), -24);
  return x.bits >> 15 ? -size : size;
}
template <typename T> inline T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bfloat16 from_float<bfloat16>(float x) {
  uint32_t u = bits_of(x);
  if (x != x) return {uint16_t((u >> 16) | 64)};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <> inline half from_float<half>(float x) {
  uint16_t sign = (bits_of(x) >> 16) & 0x8000;
  float size = fabsf(x);
  if (x != x) return {uint16_t(sign | 0x7e00)};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent = size < ldexpf(1.0f, -14) ? -14 : ilogbf(size);
  // to the nearest, ties to even, as nearbyint does; a carry moves on into the exponent by itself
  uint32_t steps = uint32_t(nearbyintf(ldexpf(size, 10 - exponent)));
  return {uint16_t(sign | (size < ldexpf(1.0f, -14) ? steps : ((exponent + 14) << 10) + steps))};
}

struct Index { unsigned x, y, z; };
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {

struct Copy { void* to; const void* from; };
struct Fiber {
  ucontext_t first;
  jmp_buf at;
  std::vector<char> stack;
  bool started, done;
  std::vector<Copy> group;
  std::deque<std::vector<Copy>> groups;
};
struct Warp { const void* mine[32]; const void* what; int arrived; long epoch; };

inline std::vector<unsigned char> shared;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline jmp_buf out;
inline unsigned current, threads, alive, waiting, idle;
inline long epoch;
inline bool backwards;
inline const char* error;
inline void (*body)(const void*);
inline const void* params;

inline void copy(const Copy& c) {
  if (c.from) memcpy(c.to, c.from, 16);
  else memset(c.to, 0, 16);
}

inline void fail(const char* why) {
  error = why;
  _longjmp(out, 1);
}

inline void next();

inline void start() {
  body(params);
  Fiber& f = fibers[current];
  f.done = true;
  if (!f.groups.empty() || !f.group.empty()) fail("a thread ends before its copies do");
  idle = 0;
  if (--alive == 0) _longjmp(out, 1);
  if (waiting) fail("a thread ends while others wait for it");
  for (;;) next();
}

// Goes on with the next thread of the block.
inline void next() {
  if (++idle > 3 * threads) fail("threads wait for each other");
  Fiber& me = fibers[current];
  if (!me.done && _setjmp(me.at)) return;
  do current = backwards ? (current + threads - 1) % threads : (current + 1) % threads;
  while (fibers[current].done);
  threadIdx.x = current;
  Fiber& f = fibers[current];
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  setcontext(&f.first);
}

// Lets the last lane of a warp that comes here do `all` for what every lane brings.
template <typename F> inline void together(const void* what, const void* mine, F all) {
  Warp& w = warps[current / 32];
  if (w.arrived && w.what != what) fail("threads of a warp do different things together");
  w.what = what;
  w.mine[current % 32] = mine;
  idle = 0;
  if (++w.arrived == int(threads - current / 32 * 32 < 32 ? threads - current / 32 * 32 : 32)) {
    all(w.mine);
    w.arrived = 0;
    w.epoch++;
    return;
  }
  for (long now = w.epoch; w.epoch == now;) next();
}

}  // namespace host

inline void __syncthreads() {
  using namespace host;
  idle = 0;
  if (++waiting == threads) {
    waiting = 0;
    epoch++;
    return;
  }
  for (long now = epoch; epoch == now;) next();
}

inline float shuffle_xor(float x, int lanes) {
  struct Mine { float x, y; int lanes; } m{x, 0, lanes};
  static const char what = 0;
  host::together(&what, &m, [](const void** all) {
    for (int i = 0; i < 32; i++) ((Mine*)all[i])->y = ((Mine*)all[i ^ ((Mine*)all[i])->lanes])->x;
  });
  return m.y;
}

namespace host {
// That the rows of every matrix can be read at once: shared memory has eight banks of 16 bytes.
inline void require_banks(const void* const* rows) {
  for (int i = 0; i < 32; i++)
    for (int j = i / 8 * 8; j < i; j++) {
      size_t a = (const unsigned char*)rows[i] - shared.data(), b = (const unsigned char*)rows[j] - shared.data();
      if (a % 16) fail("a row of a matrix is not aligned");
      if (a != b && a / 16 % 8 == b / 16 % 8) fail("rows of a matrix share a bank");
    }
}
}  // namespace host

namespace host {
// Register i of lane l gets what `read` takes of the eight rows of matrix i.
template <typename F> inline void load(uint32_t (&r)[4], const void* row, F read) {
  struct Mine { uint32_t* r; const void* row; } m{r, row};
  static const char what = 0;
  together(&what, &m, [&](const void** all) {
    const void* rows[32];
    for (int l = 0; l < 32; l++) rows[l] = ((Mine*)all[l])->row;
    require_banks(rows);
    for (int i = 0; i < 4; i++)
      for (int l = 0; l < 32; l++) read((char*)&((Mine*)all[l])->r[i], (const char* const*)rows + 8 * i, l);
  });
}
}  // namespace host

// Four 8x8 matrices of 16-byte rows: lanes 8i..8i+7 name the rows of matrix i, lane l gets bytes 4(l%4).. of row l/4.
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  host::load(r, row, [](char* to, const char* const* rows, int l) { memcpy(to, rows[l / 4] + 4 * (l % 4), 4); });
}

// The same of 2-byte numbers, each matrix transposed.
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  host::load(r, row, [](char* to, const char* const* rows, int l) {
    for (int e = 0; e < 2; e++) memcpy(to + 2 * e, rows[2 * (l % 4) + e] + 2 * (l / 4), 2);
  });
}

namespace host {
template <typename T> inline float part(uint32_t r, int e) {
  T x;
  memcpy(&x, (char*)&r + 2 * e, 2);
  return to_float(x);
}
// tensor cores drop what tf32 has no bits for
template <> inline float part<float>(uint32_t r, int) { return of_bits(r & 0xffffe000); }

template <typename T> inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Mine { float* c; const uint32_t *a, *b; } m{c, a, b};
  static const char what = 0;
  together(&what, &m, [](const void** all) {
    constexpr int E = 4 / sizeof(T);  // numbers in a register
    float x[16][8 * E], y[8][8 * E];
    for (int l = 0; l < 32; l++) {
      const Mine& m = *(const Mine*)all[l];
      for (int e = 0; e < E; e++) {
        for (int r = 0; r < 4; r++) x[l / 4 + 8 * (r % 2)][E * (l % 4) + e + 4 * E * (r / 2)] = part<T>(m.a[r], e);
        for (int r = 0; r < 2; r++) y[l / 4][E * (l % 4) + e + 4 * E * r] = part<T>(m.b[r], e);
      }
    }
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) {
        const float *row = x[l / 4 + 8 * (i / 2)], *column = y[2 * (l % 4) + i % 2];
        float sum = 0;
        for (int k = 0; k < 8 * E; k++) sum += row[k] * column[k];
        ((const Mine*)all[l])->c[i] += sum;
      }
  });
}
}  // namespace host

// c [16, 8] += a [16, k] b [8, k]': k is 16 for numbers of 2 bytes, 8 for floats, which count as tf32.
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half) { host::multiply<half>(c, a, b); }
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) { host::multiply<bfloat16>(c, a, b); }
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) { host::multiply<float>(c, a, b); }

inline uint32_t pack(float low, float high, half) { return from_float<half>(low).bits | uint32_t(from_float<half>(high).bits) << 16; }
inline uint32_t pack(float low, float high, bfloat16) { return from_float<bfloat16>(low).bits | uint32_t(from_float<bfloat16>(high).bits) << 16; }

inline void copy_async(void* to, const void* from, bool valid) { host::fibers[host::current].group.push_back({to, valid ? from : nullptr}); }
inline void copy_commit() {
  host::Fiber& f = host::fibers[host::current];
  f.groups.push_back(std::move(f.group));
  f.group.clear();
}
template <int N> inline void copy_wait() {
  host::Fiber& f = host::fibers[host::current];
  for (; f.groups.size() > N; f.groups.pop_front())
    for (const host::Copy& c : f.groups.front()) host::copy(c);
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float exp2_fast(float x) { return x < -126 ? 0 : exp2f(x); }

// Runs a kernel. Gives what went wrong, or nothing.
extern "C" inline __attribute__((used)) const char* emulate(void (*kernel)(const void*), const void* params, const uint32_t* grid, uint32_t threads, uint32_t shared, bool backwards) {
  using namespace host;
  host::body = kernel, host::params = params, host::threads = threads, host::backwards = backwards, host::error = nullptr;
  gridDim = {grid[0], grid[1], 1}, blockDim = {threads, 1, 1};
  fibers.resize(threads);
  static volatile uint32_t block;
  for (block = 0; block < grid[0] * grid[1] && !error; block = block + 1) {
    blockIdx = {block % grid[0], block / grid[0], 0};
    host::shared.assign(shared + 16, 0xff);
    warps.assign((threads + 31) / 32, Warp{});
    alive = threads, waiting = idle = 0;
    for (Fiber& f : fibers) {
      f.started = f.done = false;
      f.group.clear(), f.groups.clear();
      f.stack.resize(1 << 17);
      getcontext(&f.first);
      f.first.uc_stack.ss_sp = f.stack.data(), f.first.uc_stack.ss_size = f.stack.size(), f.first.uc_link = nullptr;
      makecontext(&f.first, host::start, 0);
    }
    if (_setjmp(out)) continue;
    current = backwards ? threads - 1 : 0;
    threadIdx = {current, 0, 0};
    fibers[current].started = true;
    setcontext(&fibers[current].first);
  }
  return error;
}
