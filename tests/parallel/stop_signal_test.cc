#include "parallel/stop_signal.h"

#include <gtest/gtest.h>

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
    std::raise(number);
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

}  // namespace
}  // namespace hybridmoe
