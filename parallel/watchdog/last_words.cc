#include "parallel/watchdog/last_words.h"

#include <chrono>

namespace hybridmoe::watchdog {

LastWords::~LastWords() {
  if (!thread_.joinable()) return;
  if (wait()) {
    thread_.join();
  } else {
    thread_.detach();
  }
}

void LastWords::set(Words words) {
  const std::lock_guard lock(mutex_);
  words_ = std::move(words);
}

void LastWords::say(const std::string& why) {
  Words words;
  {
    const std::lock_guard lock(mutex_);
    words = words_;
  }
  if (!words || !*said_) return;
  if (thread_.joinable()) thread_.join();
  *said_ = false;
  thread_ = std::thread([words = std::move(words), why, said = said_] {
    words(why);
    *said = true;
  });
}

bool LastWords::wait() const {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  while (!*said_ && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return *said_;
}

}  // namespace hybridmoe::watchdog
