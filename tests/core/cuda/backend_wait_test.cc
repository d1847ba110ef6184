// How the backend waits for its device: other ranks may keep it from finishing, which the hook has to find
// out.
#include <gtest/gtest.h>

#include "core/cuda/cuda_backend.h"
#include "tests/core/cuda/idle_device.h"

namespace hybridmoe::cuda {
namespace {

// Finishes when it has been asked so many times.
class SlowDevice final : public IdleDevice {
 public:
  explicit SlowDevice(int* questions) : questions_(questions) {}
  bool finished(Stream*) override { return --*questions_ < 0; }
  bool reached_mark() override { return --*questions_ < 0; }
  void synchronize(Stream*) override { EXPECT_LT(*questions_, 0) << "blocked, where nobody could be asked"; }

 private:
  int* questions_;
};

using Moment = Backend::Moment;

struct Waits {
  int questions = 0;
  CudaBackend backend{std::make_unique<SlowDevice>(&questions), DType::F32, GroupedKernels::Fastest};
  std::vector<Moment> moments;
  bool fails = false;

  Waits() {
    backend.set_progress_hook(
        [](void* argument, Moment moment) {
          Waits& waits = *static_cast<Waits*>(argument);
          waits.moments.push_back(moment);
          require(!waits.fails || moment == Moment::Waited, "a rank is gone");
        },
        this);
  }
};

TEST(BackendWait, TheHookIsCalledUntilTheDeviceHasFinished) {
  Waits waits;
  waits.backend.synchronize(nullptr);
  EXPECT_TRUE(waits.moments.empty()) << "it had finished";
  waits.questions = 3;
  waits.backend.synchronize(nullptr);
  const std::vector expected{Moment::Waiting, Moment::Waiting, Moment::Waiting, Moment::Waited};
  EXPECT_EQ(waits.moments, expected);
  waits.moments.clear();
  waits.questions = 3;
  waits.backend.await_mark();
  EXPECT_EQ(waits.moments, expected) << "for a mark as for everything";
}

TEST(BackendWait, WhatTheHookThrowsEndsTheWait) {
  Waits waits;
  waits.fails = true;
  waits.questions = 1000;
  EXPECT_THROW(waits.backend.synchronize(nullptr), Error);
  EXPECT_EQ(waits.moments, (std::vector{Moment::Waiting, Moment::Waited}));
}

}  // namespace
}  // namespace hybridmoe::cuda
