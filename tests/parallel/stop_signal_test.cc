#include "parallel/stop_signal.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <gtest/gtest.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "core/backend.h"
#include "core/error.h"

namespace hybridmoe {
namespace {

TEST(StopSignal, RemembersEachOfItsSignals) {
  const std::pair<int, const char*> signals[] = {
      {SIGUSR1, "SIGUSR1"}, {SIGTERM, "SIGTERM"}, {SIGINT, "SIGINT"}};
  for (const auto& [number, name] : signals) {
    StopSignal stop;
    EXPECT_FALSE(stop.requested());
    EXPECT_EQ(stop.name(), "");
    ::kill(::getpid(), number);
    const auto begin = std::chrono::steady_clock::now();
    while (!stop.requested() && std::chrono::steady_clock::now() - begin < std::chrono::seconds(10)) {
      std::this_thread::yield();
    }
    EXPECT_TRUE(stop.requested());
    EXPECT_EQ(stop.number(), number);
    EXPECT_EQ(stop.name(), name);
  }
}

TEST(StopSignal, RestoresTheFormerHandlers) {
  const auto before = std::signal(SIGUSR1, SIG_IGN);
  {
    StopSignal stop;
    EXPECT_THROW(StopSignal(), Error);
  }
  EXPECT_EQ(std::signal(SIGUSR1, before), SIG_IGN);
}

// A product that is interrupted by a handler on its own stack loses its temporaries, and with them the heap.
TEST(StopSignal, ProductsAreNotInterrupted) {
  const StopSignal stop;
  std::atomic<bool> enough{false};
  std::atomic<int> sent{0};
  std::thread sender([&] {
    for (; !enough; ++sent) {
      ::kill(::getpid(), SIGUSR1);
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  });
  const auto backend = make_cpu_backend({});
  const std::vector<std::int64_t> sizes = {1, 16, 48, 257, 700};
  std::int64_t wrong = 0;
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - begin < std::chrono::seconds(2)) {
    for (const std::int64_t rows : sizes) {
      for (const std::int64_t in : sizes) {
        for (const std::int64_t out : sizes) {
          std::vector<float> x(rows * in, 1), weight(in * out, 1), y(rows * out);
          backend->linear_forward({.x = Tensor(x.data(), DType::F32, {rows, in}),
                                   .weight = Tensor(weight.data(), DType::F32, {out, in}),
                                   .y = Tensor(y.data(), DType::F32, {rows, out})},
                                  nullptr);
          wrong += std::count_if(y.begin(), y.end(), [&](float value) { return value != in; });
        }
      }
    }
  }
  enough = true;
  sender.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_TRUE(stop.requested());
  EXPECT_GT(sent, 1000);
}

}  // namespace
}  // namespace hybridmoe
