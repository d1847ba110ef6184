#include "parallel/watchdog/last_words.h"

#include <chrono>
#include <gtest/gtest.h>

namespace hybridmoe::watchdog {
namespace {

TEST(LastWords, AreSaidInAThreadOfTheirOwn) {
  LastWords words;
  words.say("nobody has any yet");
  EXPECT_TRUE(words.wait());
  std::string said;
  std::thread::id thread;
  words.set([&](const std::string& why) {
    said += why;
    thread = std::this_thread::get_id();
  });
  words.say("one");
  EXPECT_TRUE(words.wait());
  words.say("two");
  EXPECT_TRUE(words.wait());
  EXPECT_EQ(said, "onetwo");
  EXPECT_NE(thread, std::this_thread::get_id());
}

// The words own the flags: they outlive the object.
TEST(LastWords, AHangingDiskDelaysNobodyForLong) {
  const auto go_on = std::make_shared<std::atomic<bool>>(false);
  const auto said = std::make_shared<std::atomic<int>>(0);
  const auto begin = std::chrono::steady_clock::now();
  {
    LastWords words;
    words.set([go_on, said](const std::string&) {
      while (!*go_on) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      ++*said;
    });
    words.say("one");
    words.say("while it hangs, nothing more is said");
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(1));
    EXPECT_FALSE(words.wait());
  }
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(15));
  EXPECT_EQ(*said, 0);
  *go_on = true;
  for (int i = 0; i < 5000 && *said == 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(*said, 1);
}

}  // namespace
}  // namespace hybridmoe::watchdog
