// What a rank leaves behind when its job ends by a failure, said in threads of their own: a disk may hang,
// and neither the rank's states nor its end may wait for that.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

namespace hybridmoe::watchdog {

class LastWords {
 public:
  using Words = std::function<void(const std::string& why)>;

  LastWords() = default;
  ~LastWords();  // waits as wait() does; words that take longer are left to end by themselves
  LastWords(const LastWords&) = delete;
  LastWords& operator=(const LastWords&) = delete;

  // From any thread. The words must not throw, and own what they use: they may outlive this object.
  void set(Words words);
  // Says them, once set, and returns at once; without effect while earlier ones are still being said.
  void say(const std::string& why);
  // Whether nothing is being said any more, within two seconds.
  bool wait() const;

 private:
  std::mutex mutex_;
  Words words_;  // under the mutex
  std::thread thread_;
  std::shared_ptr<std::atomic<bool>> said_ = std::make_shared<std::atomic<bool>>(true);
};

}  // namespace hybridmoe::watchdog
