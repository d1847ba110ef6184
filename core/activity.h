// What a rank is doing right now, for whoever asks why nothing moves (parallel/watchdog/): where in a step it
// is, which collectives it has issued, and which one it waits in.
//
// One thread writes, the one that trains; any other may read at any time. A write is a few plain stores,
// without a clock and without a lock: a reader learns how long something lasts by looking again.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace hybridmoe {

class Activity {
 public:
  static constexpr int kLabels = 8;

  // A communicator, and the collectives issued on it so far.
  struct Group {
    Group(std::string its_name, std::vector<int> its_ranks)
        : name(std::move(its_name)), ranks(std::move(its_ranks)) {}
    const std::string name;
    const std::vector<int> ranks;                            // of the world, in the group's order
    std::atomic<std::int64_t> issued{0};                     // how many: the latest one's number
    std::array<std::atomic<const char*>, kLabels> labels{};  // of number n: labels[n % kLabels]
  };

  // Which collective: the number-th (from 1) of a group (as add_group counts them). group -1: none.
  struct Collective {
    int group = -1;
    std::int64_t number = 0;
    const char* label = "";
  };

  // Where the rank is. All names are string literals.
  void set_step(std::int64_t step) { put(step_, step); }
  void set_phase(const char* phase) { put(phase_, phase); }
  void set_layer(int layer) { put(layer_, layer); }  // -1: in none

  // Before anybody reads. Returns the group's number, from 0.
  int add_group(std::string name, std::vector<int> ranks) {
    groups_.push_back(std::make_unique<Group>(std::move(name), std::move(ranks)));
    return static_cast<int>(groups_.size()) - 1;
  }
  // The rank enters its next collective of the group.
  Collective issue(int group, const char* label) {
    Group& its = *groups_[group];
    const std::int64_t number = its.issued.load(std::memory_order_relaxed) + 1;
    its.labels[number % kLabels].store(label, std::memory_order_relaxed);
    its.issued.store(number, std::memory_order_release);
    put(latest_group_, group);
    return {group, number, label};
  }
  // It waits in a collective from construction to destruction; then again in the one in which it was waiting
  // before, since whoever waits also finishes work of others (Background).
  class Waiting {
   public:
    Waiting(Activity& activity, const Collective& collective)
        : activity_(activity), before_(activity.waiting()) {
      activity_.begin_wait(collective);
    }
    ~Waiting() {
      if (before_.group >= 0) {
        activity_.begin_wait(before_);
      } else {
        activity_.end_wait();
      }
    }
    Waiting(const Waiting&) = delete;
    Waiting& operator=(const Waiting&) = delete;

   private:
    Activity& activity_;
    Collective before_;
  };
  void begin_wait(const Collective& collective) {
    wait_label_.store(collective.label, std::memory_order_release);
    put(wait_, static_cast<std::int64_t>(collective.group + 1) << kNumberBits | collective.number);
  }
  void end_wait() { put(wait_, std::int64_t{0}); }

  // For readers. What belongs to one collective fits together; the rest may be from neighbouring moments.
  std::int64_t changes() const { return changes_.load(std::memory_order_acquire); }
  std::int64_t step() const { return step_.load(std::memory_order_relaxed); }
  const char* phase() const { return phase_.load(std::memory_order_relaxed); }
  int layer() const { return layer_.load(std::memory_order_relaxed); }
  const std::vector<std::unique_ptr<Group>>& groups() const { return groups_; }
  int latest_group() const { return latest_group_.load(std::memory_order_relaxed); }  // -1: none yet
  Collective waiting() const {
    while (true) {
      const std::int64_t wait = wait_.load(std::memory_order_acquire);
      if (wait == 0) return {};
      const char* label = wait_label_.load(std::memory_order_acquire);
      if (wait_.load(std::memory_order_relaxed) != wait) continue;
      return {static_cast<int>(wait >> kNumberBits) - 1, wait & ((std::int64_t{1} << kNumberBits) - 1),
              label};
    }
  }

 private:
  static constexpr int kNumberBits = 48;

  template <class T>
  void put(std::atomic<T>& place, T value) {
    place.store(value, std::memory_order_release);
    changes_.store(changes_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  }

  std::atomic<std::int64_t> changes_{0}, step_{0}, wait_{0};  // wait_: group + 1, then the number; 0: none
  std::atomic<const char*> phase_{"start"}, wait_label_{""};
  std::atomic<int> layer_{-1}, latest_group_{-1};
  std::vector<std::unique_ptr<Group>> groups_;
};

}  // namespace hybridmoe
