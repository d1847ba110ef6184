#include "parallel/stop_signal.h"

#include <atomic>

#include "core/error.h"

namespace hybridmoe {
namespace {

// A handler has no argument of its own, so what it sets is the one mutable global there is.
std::atomic<int> received{0};
std::atomic<bool> installed{false};
static_assert(std::atomic<int>::is_always_lock_free, "a handler may use lock-free atomics only");

void remember(int number) { received.store(number, std::memory_order_relaxed); }

}  // namespace

StopSignal::StopSignal() {
  require(!installed.exchange(true), "a process has one StopSignal at a time");
  received = 0;
  struct sigaction action {};
  action.sa_handler = remember;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  for (std::size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &former_[i]);
}

StopSignal::~StopSignal() {
  for (std::size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &former_[i], nullptr);
  installed = false;
}

int StopSignal::number() const { return received.load(std::memory_order_relaxed); }

std::string StopSignal::name() const {
  switch (number()) {
    case SIGUSR1:
      return "SIGUSR1";
    case SIGTERM:
      return "SIGTERM";
    case SIGINT:
      return "SIGINT";
    default:
      return "";
  }
}

}  // namespace hybridmoe
