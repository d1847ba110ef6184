// The emulation of Hopper's instructions: descriptors, swizzles and boxes against plain products, and that a
// forgotten wait, arrival or fence does not pass.
#include "core/cuda/hopper.h"

#include <cmath>
#include <gtest/gtest.h>
#include <vector>

#include "core/cuda/launch.h"
#include "core/error.h"

namespace hybridmoe::cuda {
namespace {

constexpr int kM = 64, kN = 256, kK = 64, kBoxBytes = 64 * kSwizzleBytes;
constexpr int kBytes = kBoxBytes * (1 + kN / 64);

// What a kernel may forget.
enum class Forget {
  Nothing,
  WaitForCopy,
  WaitForProducts,
  AccumulatorFence,
  BarrierFence,
  Arrival,
  SomeBytes,
  Parity,
  LastWait,
  Commit,
  OneWarp,
};

// c [64, 256] = a [64, 64] · b [64, 256] by one warpgroup; transposed: a is stored [k, m], b [n, k].
template <bool kATransposed, bool kBTransposed>
struct OneTile {
  static constexpr int kThreads = kWarpgroup;
  TensorMap a, b;
  std::vector<float>* c;
  Forget forget = Forget::Nothing;
  int leading_of_b = kBoxBytes;

  void copy(unsigned char* stage, Barrier* barrier) const {
    arrive_expecting(barrier, forget == Forget::SomeBytes ? kBytes - 128 : kBytes);
    copy_box(stage, a, 0, 0, 0, barrier);
    if (kBTransposed) {
      copy_box(stage + kBoxBytes, b, 0, 0, 0, barrier);
    } else {
      for (int i = 0; i < kN / 64; ++i) copy_box(stage + (1 + i) * kBoxBytes, b, 64 * i, 0, 0, barrier);
    }
  }

  void operator()() const {
    auto* memory = shared_memory<unsigned char>();
    unsigned char* stage = memory + (1024 - shared_address(memory) % 1024) % 1024;
    auto* barrier = reinterpret_cast<Barrier*>(stage + kBytes);
    if (thread_index() == 0) {
      init_barrier(barrier, forget == Forget::Arrival ? 2 : 1);
      if (forget != Forget::BarrierFence) fence_barrier_init();
      copy(stage, barrier);
    }
    sync_block();
    if (forget != Forget::WaitForCopy) wait_for_phase(barrier, forget == Forget::Parity ? 1 : 0);
    if (forget == Forget::OneWarp && thread_index() < kWarp) return;
    if (forget != Forget::AccumulatorFence) fence_accumulators();
    float sum[128] = {};
    const std::uint64_t left = matrix_descriptor(shared_address(stage), kBoxBytes);
    const std::uint64_t right = matrix_descriptor(shared_address(stage + kBoxBytes), leading_of_b);
    for (int i = 0; i < kK / 16; ++i) {
      multiply_m64n256k16<kATransposed, !kBTransposed>(sum, left + i * (kATransposed ? 128 : 2),
                                                       right + i * (kBTransposed ? 2 : 128), i > 0);
    }
    if (forget != Forget::Commit) commit_products();
    if (forget == Forget::LastWait) return;
    if (forget != Forget::WaitForProducts) wait_for_products(sum);
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    for (int i = 0; i < 128; ++i) {
      const int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      (*c)[row * kN + column] = sum[i];
    }
    if (forget == Forget::WaitForProducts) wait_for_products(sum);
    if (forget == Forget::WaitForCopy || forget == Forget::Parity) wait_for_phase(barrier, 0);
  }
};

std::vector<BFloat16> numbers(int count, int period) {
  std::vector<BFloat16> list(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) list[i] = BFloat16(static_cast<float>(i * 7 % period - period / 2));
  return list;
}

// The tile's c, and what it should be.
struct Result {
  std::vector<float> c = std::vector<float>(kM * kN), expected = std::vector<float>(kM * kN);
};

template <bool kATransposed, bool kBTransposed>
Result one_tile(Forget forget = Forget::Nothing, int leading_of_b = kBoxBytes) {
  const std::vector<BFloat16> a = numbers(kM * kK, 11), b = numbers(kN * kK, 13);
  Result result;
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n)
      for (int k = 0; k < kK; ++k)
        result.expected[m * kN + n] += static_cast<float>(kATransposed ? a[k * kM + m] : a[m * kK + k]) *
                                       static_cast<float>(kBTransposed ? b[n * kK + k] : b[k * kN + n]);
  OneTile<kATransposed, kBTransposed> kernel{
      .a = make_tensor_map({a.data(), 64, 64, 1, 64, 64 * 64, 64}),
      .b = kBTransposed ? make_tensor_map({b.data(), kK, kN, 1, kK, kN * kK, kN})
                        : make_tensor_map({b.data(), kN, kK, 1, kN, kN * kK, kK}),
      .c = &result.c,
      .forget = forget,
      .leading_of_b = leading_of_b};
  launch(kernel, {.threads = kWarpgroup, .shared_bytes = 1024 + kBytes + 8}, nullptr);
  return result;
}

template <bool kATransposed, bool kBTransposed>
void expect_product() {
  const Result result = one_tile<kATransposed, kBTransposed>();
  EXPECT_EQ(result.c, result.expected) << "a transposed " << kATransposed << ", b " << kBTransposed;
}

TEST(HopperEmulation, ProductsOfEveryLayoutAreRight) {
  expect_product<false, false>();
  expect_product<false, true>();
  expect_product<true, false>();
  expect_product<true, true>();
}

TEST(HopperEmulation, WrongOffsetsInADescriptorAreNoticed) {
  const Result shorter = one_tile<false, false>(Forget::Nothing, kBoxBytes / 2);
  EXPECT_NE(shorter.c, shorter.expected);
  EXPECT_THROW((one_tile<false, false>(Forget::Nothing, 16 * kBoxBytes)), Error)
      << "outside of shared memory";
  const Result unused = one_tile<false, true>(Forget::Nothing, 16);
  EXPECT_EQ(unused.c, unused.expected) << "along k the swizzled layouts have no leading offset";
}

TEST(HopperEmulation, WhatIsNotWaitedForIsNotThere) {
  const Result early = one_tile<false, false>(Forget::WaitForCopy);
  EXPECT_TRUE(std::isnan(early.c[0]));
  EXPECT_TRUE(std::isnan(one_tile<false, false>(Forget::Parity).c[0]));
  EXPECT_TRUE(std::isnan(one_tile<true, false>(Forget::WaitForProducts).c[0]));
}

TEST(HopperEmulation, WhatAGpuWouldHangOnOrNotDefineIsAnError) {
  for (const Forget forget : {Forget::Arrival, Forget::SomeBytes, Forget::AccumulatorFence,
                              Forget::BarrierFence, Forget::LastWait, Forget::Commit, Forget::OneWarp}) {
    EXPECT_THROW((one_tile<false, false>(forget)), Error) << static_cast<int>(forget);
  }
  const Result fine = one_tile<false, false>();
  EXPECT_EQ(fine.c, fine.expected) << "the executor is as good as new";
}

// Copies a box that hangs over the end of two matrices of [3, 8], and looks at its first rows.
struct OneBox {
  static constexpr int kThreads = 32;
  TensorMap map;
  std::vector<float>* seen;  // [4, 64]
  void operator()() const {
    auto* memory = shared_memory<unsigned char>();
    unsigned char* box = memory + (1024 - shared_address(memory) % 1024) % 1024;
    auto* barrier = reinterpret_cast<Barrier*>(box + kBoxBytes);
    if (thread_index() == 0) {
      init_barrier(barrier, 1);
      fence_barrier_init();
      arrive_expecting(barrier, 4 * kSwizzleBytes);
      copy_box(box, map, 2, 1, 1, barrier);
    }
    sync_block();
    wait_for_phase(barrier, 0);
    if (thread_index() > 0) return;
    for (int row = 0; row < 4; ++row) {
      for (int i = 0; i < 64; ++i) {
        const auto* from = reinterpret_cast<const BFloat16*>(box + row * kSwizzleBytes + (i / 8 ^ row) * 16);
        (*seen)[row * 64 + i] = to_float(from[i % 8]);
      }
    }
  }
};

TEST(HopperEmulation, BoxesEndWithTheirMatrix) {
  std::vector<BFloat16> matrices(2 * 3 * 16, BFloat16(-1.0f));  // rows of 8, 16 apart
  for (int i = 0; i < 2 * 3; ++i)
    for (int j = 0; j < 8; ++j) matrices[i * 16 + j] = BFloat16(static_cast<float>(10 * i + j));
  std::vector<float> seen(4 * 64), expected(4 * 64);
  for (int row = 0; row < 2; ++row)
    for (int i = 0; i < 6; ++i) expected[row * 64 + i] = static_cast<float>(10 * (3 + 1 + row) + 2 + i);
  launch(OneBox{make_tensor_map({matrices.data(), 8, 3, 2, 16, 48, 4}), &seen},
         {.threads = 32, .shared_bytes = 1024 + kBoxBytes + 8}, nullptr);
  EXPECT_EQ(seen, expected);
  EXPECT_THROW(make_tensor_map({matrices.data(), 8, 3, 2, 12, 48, 4}), Error);
  EXPECT_THROW(make_tensor_map({matrices.data() + 1, 8, 3, 2, 16, 48, 4}), Error);
}

// Zeros are seen by products after the writer's fence.
struct Clearing {
  static constexpr int kThreads = 32;
  bool fence;
  int* seen;
  void operator()() const {
    int* memory = shared_memory<int>();
    if (thread_index() == 0) {
      clear_chunk(memory);
      if (fence) fence_async_proxy();
      *seen = memory[3];
    }
  }
};

TEST(HopperEmulation, ZerosNeedTheFence) {
  int seen = 1;
  launch(Clearing{true, &seen}, {.threads = 32, .shared_bytes = 64}, nullptr);
  EXPECT_EQ(seen, 0);
  launch(Clearing{false, &seen}, {.threads = 32, .shared_bytes = 64}, nullptr);
  EXPECT_EQ(seen, -1);
}

struct TwoHalves {
  static constexpr int kThreads = 96;
  int* order;
  bool all;
  void operator()() const {
    if (thread_index() >= 64) return;  // these do not count
    if (!all && thread_index() < 32) return;
    if (thread_index() == 0) *order = 1;
    sync_threads(3, 64);
    if (thread_index() == 63) *order *= 2;
  }
};

TEST(HopperEmulation, NamedBarriersCountSomeThreads) {
  int order = 0;
  launch(TwoHalves{&order, true}, {.threads = 96}, nullptr);
  EXPECT_EQ(order, 2);
  EXPECT_THROW(launch(TwoHalves{&order, false}, {.threads = 96}, nullptr), Error);
}

}  // namespace
}  // namespace hybridmoe::cuda
