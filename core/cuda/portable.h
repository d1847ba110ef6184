// The thin layer that kernels are written against. Under nvcc it is CUDA's own functions; under a plain C++
// compiler the same kernel sources run on the host executor (host_executor.h), which is how they are tested
// where there is no GPU.
//
// A kernel is a struct of its parameters with `HYBRIDMOE_DEVICE void operator()() const`, run once by every
// thread of a one-dimensional block; launch.h starts it. Every warp operation below is called by all 32 lanes
// of a warp, every block barrier by all threads of a block. Shared memory is dynamic only, in bytes given at
// the launch, and holds anything (on the host executor: NaN) at first.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/bfloat16.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#define HYBRIDMOE_DEVICE __device__ __forceinline__
#define HYBRIDMOE_UNROLL _Pragma("unroll")
#define HYBRIDMOE_ROLLED _Pragma("unroll 1")
#else
#include "core/cuda/host_executor.h"
#define HYBRIDMOE_DEVICE inline
#define HYBRIDMOE_UNROLL
#define HYBRIDMOE_ROLLED
#endif

namespace hybridmoe::cuda {

constexpr int kWarp = 32;

// A run of W elements that is read and written at once.
template <class T, int W>
struct alignas(sizeof(T) * W) Vector {
  T value[W];
};

// An integer as large as that.
__extension__ typedef unsigned __int128 LongWord;
template <class T, int W>
using WordOf = std::conditional_t<
    sizeof(T) * W == 16, LongWord,
    std::conditional_t<sizeof(T) * W == 8, std::uint64_t,
                       std::conditional_t<sizeof(T) * W == 4, std::uint32_t, std::uint16_t>>>;

#ifdef __CUDACC__

HYBRIDMOE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
HYBRIDMOE_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
HYBRIDMOE_DEVICE std::int64_t block_x() { return blockIdx.x; }
HYBRIDMOE_DEVICE std::int64_t block_y() { return blockIdx.y; }
HYBRIDMOE_DEVICE std::int64_t grid_x() { return gridDim.x; }
// The same value, but what is computed from it within a loop does not wait in registers outside of the loop.
HYBRIDMOE_DEVICE int computed_again(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
HYBRIDMOE_DEVICE void sync_block() { __syncthreads(); }
HYBRIDMOE_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
HYBRIDMOE_DEVICE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

template <class T>
HYBRIDMOE_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
HYBRIDMOE_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// Bit l is what lane l said.
HYBRIDMOE_DEVICE std::uint32_t ballot(bool yes) { return __ballot_sync(0xffffffffu, yes); }
HYBRIDMOE_DEVICE int bits_set(std::uint32_t word) { return __popc(word); }

HYBRIDMOE_DEVICE float to_float(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
HYBRIDMOE_DEVICE BFloat16 to_bfloat16(float value) {
  BFloat16 result;
  result.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
  return result;
}
// Bit l: lane l has the same value.
HYBRIDMOE_DEVICE std::uint32_t lanes_with(int value) { return __match_any_sync(0xffffffffu, value); }

// 16 bytes of global into shared memory, under way until wait_for_copies; not `inside`: zeros, and nothing is
// read from `from`, which may be beyond a tensor, but must be an address.
HYBRIDMOE_DEVICE void start_copy_if(bool inside, void* to, const void* from) {
  const auto target = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
// null: zeros.
HYBRIDMOE_DEVICE void start_copy(void* to, const void* from) {
  start_copy_if(from != nullptr, to, from == nullptr ? to : from);
}
HYBRIDMOE_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
HYBRIDMOE_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four 8 × 8 matrices of 16-bit elements from shared memory: lane 8 i + r gives the address of row r of
// matrix i; lane l gets elements 2 (l % 4) and the next of row l / 4 of each. Transposed: of column l / 4.
HYBRIDMOE_DEVICE void load_matrices(const BFloat16* row, std::uint32_t (&to)[4]) {
  const auto from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}
HYBRIDMOE_DEVICE void load_matrices_transposed(const BFloat16* row, std::uint32_t (&to)[4]) {
  const auto from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}
// sum [16, 8] += a [16, 16] · b [16, 8] in the fragments of mma.m16n8k16 (PTX ISA): with g = lane / 4 and
// t = lane % 4, sum holds (g, 2t), (g, 2t + 1), (g + 8, ..), (g + 8, ..); a the pairs from (g, 2t), (g + 8,
// 2t), (g, 2t + 8), (g + 8, 2t + 8); b from (2t, g), (2t + 8, g).
HYBRIDMOE_DEVICE void multiply_add(const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                                   float (&sum)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two values rounded to bf16, the first in the lower half.
HYBRIDMOE_DEVICE std::uint32_t packed(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
// To two units in the last place; below 2^-126 it is 0, which saves the two instructions for such numbers.
HYBRIDMOE_DEVICE float power_of_two(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}

// To two units in the last place; of a value above 2^126 it is 0.
HYBRIDMOE_DEVICE float fast_reciprocal(float value) { return __fdividef(1.0f, value); }

// A line of 128 bytes on its way to the L2 cache.
HYBRIDMOE_DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Reads and writes of what is used once: they make room in the caches first.
template <class T, int W>
HYBRIDMOE_DEVICE Vector<T, W> load_once(const T* from) {
  if constexpr (sizeof(T) * W == 16) {
    const int4 raw = __ldcs(reinterpret_cast<const int4*>(from));
    return *reinterpret_cast<const Vector<T, W>*>(&raw);
  } else {
    return *reinterpret_cast<const Vector<T, W>*>(from);
  }
}
template <class T, int W>
HYBRIDMOE_DEVICE void store_once(T* to, const Vector<T, W>& value) {
  if constexpr (sizeof(T) * W == 16) {
    __stcs(reinterpret_cast<int4*>(to), *reinterpret_cast<const int4*>(&value));
  } else {
    *reinterpret_cast<Vector<T, W>*>(to) = value;
  }
}

#else

HYBRIDMOE_DEVICE int thread_index() { return host::thread_index(); }
HYBRIDMOE_DEVICE int block_threads() { return host::block_threads(); }
HYBRIDMOE_DEVICE std::int64_t block_x() { return host::block_x(); }
HYBRIDMOE_DEVICE std::int64_t block_y() { return host::block_y(); }
HYBRIDMOE_DEVICE std::int64_t grid_x() { return host::grid_x(); }
HYBRIDMOE_DEVICE int computed_again(int value) { return value; }
HYBRIDMOE_DEVICE void sync_block() { host::sync_block(); }
HYBRIDMOE_DEVICE void sync_warp() {
  const char nothing = 0;
  host::exchange_in_warp(&nothing, 1);
}

template <class T>
HYBRIDMOE_DEVICE T* shared_memory() {
  return static_cast<T*>(host::shared_memory());
}

template <class T>
HYBRIDMOE_DEVICE T shuffle(T value, int lane) {
  T result;
  std::memcpy(&result, host::exchange_in_warp(&value, sizeof value) + lane % kWarp * host::kLaneBytes,
              sizeof result);
  return result;
}
template <class T>
HYBRIDMOE_DEVICE T shuffle_xor(T value, int mask) {
  return shuffle(value, (thread_index() % kWarp) ^ mask);
}
HYBRIDMOE_DEVICE std::uint32_t ballot(bool yes) {
  const std::byte* said = host::exchange_in_warp(&yes, sizeof yes);
  std::uint32_t word = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (said[lane * host::kLaneBytes] != std::byte{0}) word |= 1u << lane;
  }
  return word;
}
HYBRIDMOE_DEVICE int bits_set(std::uint32_t word) { return __builtin_popcount(word); }

HYBRIDMOE_DEVICE void start_copy(void* to, const void* from) { host::start_copy(to, from, 16); }
HYBRIDMOE_DEVICE void start_copy_if(bool inside, void* to, const void* from) {
  start_copy(to, inside ? from : nullptr);
}
HYBRIDMOE_DEVICE void commit_copies() { host::commit_copies(); }
template <int kLeft>
HYBRIDMOE_DEVICE void wait_for_copies() {
  host::wait_for_copies(kLeft);
}
HYBRIDMOE_DEVICE void load_matrices(const BFloat16* row, std::uint32_t (&to)[4]) {
  host::load_matrices(row, false, to);
}
HYBRIDMOE_DEVICE void load_matrices_transposed(const BFloat16* row, std::uint32_t (&to)[4]) {
  host::load_matrices(row, true, to);
}
HYBRIDMOE_DEVICE void multiply_add(const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                                   float (&sum)[4]) {
  const std::uint32_t given[6] = {a[0], a[1], a[2], a[3], b0, b1};
  host::multiply_add(given, sum);
}

HYBRIDMOE_DEVICE float to_float(BFloat16 value) { return static_cast<float>(value); }
HYBRIDMOE_DEVICE BFloat16 to_bfloat16(float value) { return BFloat16(value); }
HYBRIDMOE_DEVICE std::uint32_t lanes_with(int value) {
  const std::byte* given = host::exchange_in_warp(&value, sizeof value);
  std::uint32_t word = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (std::memcmp(given + lane * host::kLaneBytes, &value, sizeof value) == 0) word |= 1u << lane;
  }
  return word;
}

HYBRIDMOE_DEVICE std::uint32_t packed(float first, float second) {
  return BFloat16(first).bits | static_cast<std::uint32_t>(BFloat16(second).bits) << 16;
}
HYBRIDMOE_DEVICE float power_of_two(float exponent) { return __builtin_exp2f(exponent); }
HYBRIDMOE_DEVICE float fast_reciprocal(float value) { return 1.0f / value; }
// Reads, so that memory which is not there is noticed: a GPU would say nothing.
HYBRIDMOE_DEVICE void prefetch(const void* from) {
  static_cast<void>(*static_cast<const volatile char*>(from));
}

template <class T, int W>
HYBRIDMOE_DEVICE Vector<T, W> load_once(const T* from) {
  return *reinterpret_cast<const Vector<T, W>*>(from);
}
template <class T, int W>
HYBRIDMOE_DEVICE void store_once(T* to, const Vector<T, W>& value) {
  *reinterpret_cast<Vector<T, W>*>(to) = value;
}

#endif

HYBRIDMOE_DEVICE float to_float(float value) { return value; }

template <class T, int W>
HYBRIDMOE_DEVICE Vector<T, W> load(const T* from) {
  return *reinterpret_cast<const Vector<T, W>*>(from);
}
template <class T, int W>
HYBRIDMOE_DEVICE void store(T* to, const Vector<T, W>& value) {
  if constexpr (std::is_same_v<T, BFloat16> && W > 1) {
    // As one word: of a vector, and of a struct of words, nvcc may write element after element.
    using Word = WordOf<T, W>;
    Word word = 0;
    HYBRIDMOE_UNROLL
    for (int j = 0; j < W; ++j) word |= static_cast<Word>(value.value[j].bits) << (16 * j);
    *reinterpret_cast<Word*>(to) = word;
  } else {
    *reinterpret_cast<Vector<T, W>*>(to) = value;
  }
}

// The same run as one value. nvcc takes a Vector apart right behind its load when another one follows under a
// condition, and waits for it there: what is to be under way together, or for longer, is loaded as this.
template <class T, int W>
struct Packed {
  WordOf<T, W> word = 0;

  HYBRIDMOE_DEVICE float operator[](int j) const {
    using Bits = WordOf<T, 1>;
    const auto bits = static_cast<Bits>(word >> (8 * sizeof(T) * j));
    T element;
    std::memcpy(static_cast<void*>(&element), &bits, sizeof element);
    return to_float(element);
  }
};
template <class T, int W>
HYBRIDMOE_DEVICE Packed<T, W> load_packed(const T* from) {
  return {*reinterpret_cast<const WordOf<T, W>*>(from)};
}
template <class T, int W>
HYBRIDMOE_DEVICE Packed<T, W> load_packed_once(const T* from) {
  if constexpr (sizeof(T) * W != 16) return load_packed<T, W>(from);
  const auto parts = load_once<std::uint32_t, 4>(reinterpret_cast<const std::uint32_t*>(from));
  Packed<T, W> result;
  HYBRIDMOE_UNROLL
  for (int j = 0; j < 4; ++j) result.word |= static_cast<WordOf<T, W>>(parts.value[j]) << (32 * j);
  return result;
}

HYBRIDMOE_DEVICE float reciprocal_root(float value) { return 1.0f / sqrtf(value); }

HYBRIDMOE_DEVICE void round_to(float value, float* to) { *to = value; }
HYBRIDMOE_DEVICE void round_to(float value, BFloat16* to) { *to = to_bfloat16(value); }
// The value rounded to C.
template <class C>
HYBRIDMOE_DEVICE C rounded(float value) {
  C result;
  round_to(value, &result);
  return result;
}

}  // namespace hybridmoe::cuda
