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
  sigset_t signals;
  sigemptyset(&signals);
  for (const int number : kSignals) sigaddset(&signals, number);
  pthread_sigmask(SIG_BLOCK, &signals, &former_mask_);
  receiver_ = std::thread([this, signals] {
    pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
    std::unique_lock lock(mutex_);
    end_.wait(lock, [&] { return ending_; });
  });
}

StopSignal::~StopSignal() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  end_.notify_one();
  receiver_.join();
  for (std::size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &former_[i], nullptr);
  pthread_sigmask(SIG_SETMASK, &former_mask_, nullptr);
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
