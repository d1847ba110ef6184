// The host executor itself: order, barriers, warp operations, copies under way, and what would hang on a GPU.
#include <gtest/gtest.h>
#include <vector>

#include "core/cuda/launch.h"
#include "core/cuda/reduce.h"
#include "core/error.h"

namespace hybridmoe::cuda {
namespace {

struct Written {
  static constexpr int kThreads = 128;
  std::vector<int>* seen;
  void operator()() const {
    (*seen)[(block_y() * grid_x() + block_x()) * block_threads() + thread_index()] += 1;
  }
};

TEST(HostExecutor, RunsEveryThreadOfEveryBlockOnce) {
  std::vector<int> seen(3 * 2 * 96);
  launch(Written{&seen}, {.x = 3, .y = 2, .threads = 96}, nullptr);
  EXPECT_EQ(seen, std::vector<int>(seen.size(), 1));
}

// Thread t reads what thread t + 1 wrote before the barrier.
struct Neighbour {
  static constexpr int kThreads = 128;
  std::vector<int>* result;
  bool wait;
  void operator()() const {
    int* shared = shared_memory<int>();
    shared[thread_index()] = thread_index();
    if (wait) sync_block();
    (*result)[thread_index()] = shared[(thread_index() + 1) % block_threads()];
  }
};

TEST(HostExecutor, BarriersOrderSharedMemoryAndAreNeeded) {
  std::vector<int> result(128);
  launch(Neighbour{&result, true}, {.threads = 128, .shared_bytes = 512}, nullptr);
  for (int t = 0; t < 128; ++t) EXPECT_EQ(result[t], (t + 1) % 128);
  launch(Neighbour{&result, false}, {.threads = 128, .shared_bytes = 512}, nullptr);
  EXPECT_EQ(result[0], -1) << "what nobody has written yet is 0xff";
}

struct WarpOperations {
  static constexpr int kThreads = 64;
  std::vector<double>* result;
  void operator()() const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    double sum = warp_sum(static_cast<double>(lane + 100 * warp));
    sum += 1e6 * bits_set(ballot(lane < 5 + warp)) + 1e8 * bits_set(lanes_with(lane % 4));
    sum += 1e-3 * shuffle(lane, 7) + 1e-6 * over_lanes<Larger>(lane, 8);
    (*result)[thread_index()] = sum;
  }
};

TEST(HostExecutor, WarpOperationsSeeTheWholeWarp) {
  std::vector<double> result(64);
  launch(WarpOperations{&result}, {.threads = 64}, nullptr);
  for (int t = 0; t < 64; ++t) {
    const int lane = t % 32, warp = t / 32;
    EXPECT_DOUBLE_EQ(result[t],
                     496 + 3200 * warp + 1e6 * (5 + warp) + 8e8 + 7e-3 + 1e-6 * (lane / 8 * 8 + 7));
  }
}

// c [16, 8] = a [16, 16] · b [16, 8], b stored [8, 16], by load_matrices and multiply_add.
struct OneProduct {
  static constexpr int kThreads = 32;
  const BFloat16 *a, *b;
  float* c;
  bool transposed;  // a is stored [k, m]
  void operator()() const {
    const int lane = thread_index();
    std::uint32_t left[4], right[4];
    if (transposed) {
      load_matrices_transposed(a + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8, left);
    } else {
      load_matrices(a + lane % 16 * 16 + lane / 16 * 8, left);
    }
    load_matrices(b + lane % 8 * 16 + lane / 8 % 2 * 8, right);
    float sum[4] = {};
    multiply_add(left, right[0], right[1], sum);
    for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + 2 * (lane % 4) + i % 2] = sum[i];
  }
};

TEST(HostExecutor, MatrixFragmentsMultiply) {
  std::vector<BFloat16> a(256), a_transposed(256), b(128);
  std::vector<float> expected(128), c(128);
  for (int i = 0; i < 256; ++i) a[i] = BFloat16(static_cast<float>(i % 13 - 6));
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k) a_transposed[k * 16 + m] = a[m * 16 + k];
  for (int i = 0; i < 128; ++i) b[i] = BFloat16(static_cast<float>(i % 7 - 3));
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < 16; ++k)
        expected[m * 8 + n] += static_cast<float>(a[m * 16 + k]) * static_cast<float>(b[n * 16 + k]);
  launch(OneProduct{a.data(), b.data(), c.data(), false}, {.threads = 32}, nullptr);
  EXPECT_EQ(c, expected);
  launch(OneProduct{a_transposed.data(), b.data(), c.data(), true}, {.threads = 32}, nullptr);
  EXPECT_EQ(c, expected);
}

struct CopyUnderWay {
  static constexpr int kThreads = 32;
  const int* source;
  std::vector<int>* before;
  std::vector<int>* behind;
  bool wait;
  void operator()() const {
    int* shared = shared_memory<int>() + 8 * thread_index();
    start_copy(shared, source);
    commit_copies();
    start_copy(shared + 4, nullptr);
    commit_copies();
    (*before)[thread_index()] = shared[0];
    wait_for_copies<1>();
    (*behind)[thread_index()] = shared[3];
    if (!wait) return;
    wait_for_copies<0>();
    (*behind)[thread_index()] += shared[4];
  }
};

TEST(HostExecutor, CopiesArriveWhenTheyAreWaitedFor) {
  const std::vector<int> source = {1, 2, 3, 4};
  std::vector<int> before(32), behind(32);
  launch(CopyUnderWay{source.data(), &before, &behind, true}, {.threads = 32, .shared_bytes = 1024}, nullptr);
  EXPECT_EQ(before, std::vector<int>(32, -1));
  EXPECT_EQ(behind, std::vector<int>(32, 4));
  EXPECT_THROW(launch(CopyUnderWay{source.data(), &before, &behind, false},
                      {.threads = 32, .shared_bytes = 1024}, nullptr),
               Error);
}

struct Diverging {
  static constexpr int kThreads = 64;
  int leave,
      barrier;  // threads from `leave` on return; from `barrier` on wait for the block, others for the warp
  void operator()() const {
    if (thread_index() >= leave) return;
    if (thread_index() >= barrier) return sync_block();
    warp_sum(1.0f);
  }
};

TEST(HostExecutor, WaitsThatCannotEndAreErrors) {
  launch(Diverging{64, 64}, {.threads = 64}, nullptr);
  launch(Diverging{64, 0}, {.threads = 64}, nullptr);
  EXPECT_THROW(launch(Diverging{63, 0}, {.threads = 64}, nullptr), Error);   // one thread misses the barrier
  EXPECT_THROW(launch(Diverging{60, 64}, {.threads = 64}, nullptr), Error);  // lanes miss a warp operation
  EXPECT_THROW(launch(Diverging{64, 40}, {.threads = 64}, nullptr), Error);  // a warp waits in two places
  launch(Diverging{64, 64}, {.threads = 64}, nullptr);  // and the executor is as good as new
}

TEST(HostExecutor, LaunchesThatAGpuRefusesAreErrors) {
  const Diverging fine{64, 64};
  EXPECT_THROW(launch(fine, {.threads = 33}, nullptr), Error);
  EXPECT_THROW(launch(fine, {.threads = 128}, nullptr), Error);  // more than the kernel is made for
  EXPECT_THROW(launch(fine, {.x = 0, .threads = 64}, nullptr), Error);
  EXPECT_THROW(launch(fine, {.threads = 64, .shared_bytes = 228 << 10}, nullptr), Error);
}

}  // namespace
}  // namespace hybridmoe::cuda
