// Where the ranks of parallel/thread_communicator.h meet: a group counts each rank's calls, brings those of
// the same number together, and tells whoever waits in vain why.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "parallel/thread_collectives.h"

namespace hybridmoe {

// What all groups of a world share.
struct ThreadRanks {
  ThreadRanks(int ranks, std::chrono::milliseconds longest)
      : patience(longest), last(ranks), ended(ranks), background(ranks) {}

  // With the mutex held: wakes those who wait.
  void notify() {
    ++changes;
    changed.notify_all();
  }
  // Without it: what this rank of the world has to do for others.
  void advance(int rank) const {
    for (const auto& work : background[rank]) {
      if (const auto alive = work.lock()) alive->advance();
    }
  }

  const std::chrono::milliseconds patience;  // how long a rank waits for others
  std::mutex mutex;                          // of all below, and of the groups
  std::condition_variable changed;           // somebody arrived last, failed or ended
  std::int64_t changes = 0;                  // how often
  std::vector<std::string> last;             // each rank's last collective; empty: none yet
  std::vector<bool> ended;                   // the rank's body has returned or thrown
  std::string failure;                       // "rank 2 failed: TEXT"; empty: none has

  std::vector<std::vector<std::weak_ptr<Background>>> background;  // each rank's own, for its thread only
};

class ThreadGroup : public std::enable_shared_from_this<ThreadGroup> {
 public:
  // `members`: ranks of the world, ascending.
  ThreadGroup(std::shared_ptr<ThreadRanks> world, std::vector<int> members);
  int size() const { return static_cast<int>(members_.size()); }
  // For work of this rank of the group, on its thread.
  void add_background(int rank, const std::weak_ptr<Background>& work) {
    world_->background[members_[rank]].push_back(work);
  }
  void advance(int rank) const { world_->advance(members_[rank]); }

  // The next call of this rank of the group; returns at once, unless it is the last to arrive: then the
  // collective is done first. Throws Error when the ranks' calls do not match or the world has failed.
  Event arrive(int rank, ThreadArguments arguments);
  // The same, and waits: the texts of all ranks.
  std::vector<std::string> meet(int rank, ThreadArguments arguments);

 private:
  struct Call {
    std::int64_t number = 0;  // from 1
    std::vector<ThreadArguments> ranks;
    std::vector<bool> arrived;
    int missing = 0;
    bool done = false;
  };
  class Pending;  // the event's state

  std::shared_ptr<Call> register_call(int rank, ThreadArguments arguments);
  void execute(Call& call);
  bool finished(const Call& call, std::chrono::steady_clock::time_point since) const;
  void wait(const Call& call, int rank) const;
  // With the mutex held. Throws when the call can never be done.
  void require_hope(const Call& call, int rank) const;
  void require_match(const Call& call, int rank, const ThreadArguments& arguments);
  bool hopeless(const Call& call) const;
  std::string title(const Call& call) const;
  std::string missing_ranks(const Call& call) const;

  const std::shared_ptr<ThreadRanks> world_;
  const std::vector<int> members_;
  std::vector<std::int64_t> calls_;                           // that each rank has made
  std::map<std::int64_t, std::shared_ptr<Call>> incomplete_;  // by number
  std::string failure_;                                       // of the group; empty: none
};

}  // namespace hybridmoe
