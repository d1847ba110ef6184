#include "parallel/thread_group.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "parallel/thread_communicator.h"

namespace hybridmoe {
namespace {

using Clock = std::chrono::steady_clock;
using Lock = std::unique_lock<std::mutex>;

// "rank 3", "ranks 0, 1, 3"
std::string ranks_text(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i) text += cat(i == 0 ? "" : ", ", ranks[i]);
  return text;
}

}  // namespace

class ThreadGroup::Pending : public Event::State {
 public:
  Pending(std::shared_ptr<const ThreadGroup> group, std::shared_ptr<const Call> call, int rank)
      : group_(std::move(group)), call_(std::move(call)), rank_(rank) {}
  // Finished, or has no hope: wait() tells. Whoever polls leaves the core to the ranks that are missing.
  bool test() override {
    if (since_ == Clock::time_point()) since_ = Clock::now();
    const bool finished = group_->finished(*call_, since_);
    if (!finished) std::this_thread::yield();
    return finished;
  }
  void wait() override { group_->wait(*call_, rank_); }

 private:
  std::shared_ptr<const ThreadGroup> group_;
  std::shared_ptr<const Call> call_;
  int rank_;
  Clock::time_point since_;  // of the first test
};

ThreadGroup::ThreadGroup(std::shared_ptr<ThreadRanks> world, std::vector<int> members)
    : world_(std::move(world)), members_(std::move(members)), calls_(members_.size()) {}

Event ThreadGroup::arrive(int rank, ThreadArguments arguments) {
  const std::shared_ptr<Call> call = register_call(rank, std::move(arguments));
  return Event(std::make_shared<Pending>(shared_from_this(), call, rank));
}

std::vector<std::string> ThreadGroup::meet(int rank, ThreadArguments arguments) {
  const std::shared_ptr<Call> call = register_call(rank, std::move(arguments));
  wait(*call, rank);
  std::vector<std::string> texts;
  for (const ThreadArguments& each : call->ranks) texts.push_back(each.text);
  return texts;
}

std::shared_ptr<ThreadGroup::Call> ThreadGroup::register_call(int rank, ThreadArguments arguments) {
  std::shared_ptr<Call> call;
  {
    const Lock lock(world_->mutex);
    if (!failure_.empty()) throw Error(failure_);
    if (!world_->failure.empty()) throw OtherRankFailed(world_->failure);
    const std::int64_t number = ++calls_[rank];
    std::shared_ptr<Call>& place = incomplete_[number];
    if (place == nullptr) {
      place = std::make_shared<Call>();
      place->number = number;
      place->ranks.resize(size());
      place->arrived.resize(size());
      place->missing = size();
    }
    call = place;
    world_->last[members_[rank]] = cat(description(arguments), " (", title(*call), ")");
    require_match(*call, rank, arguments);
    call->ranks[rank] = std::move(arguments);
    call->arrived[rank] = true;
    if (--call->missing > 0) return call;
    incomplete_.erase(number);
  }
  execute(*call);
  return call;
}

// All ranks are here: nobody else touches the call or its tensors until it is done.
void ThreadGroup::execute(Call& call) {
  std::string failure;
  try {
    perform(call.ranks);
  } catch (const Error& error) {
    failure = cat(title(call), ", ", description(call.ranks[0]), ": ", error.what());
  }
  {
    const Lock lock(world_->mutex);
    call.done = failure.empty();
    if (failure_.empty()) failure_ = failure;
    world_->notify();
  }
  if (!failure.empty()) throw Error(failure);
}

bool ThreadGroup::finished(const Call& call, Clock::time_point since) const {
  const Lock lock(world_->mutex);
  return call.done || hopeless(call) || Clock::now() - since >= world_->patience;
}

void ThreadGroup::wait(const Call& call, int rank) const {
  Lock lock(world_->mutex);
  const Clock::time_point deadline = Clock::now() + world_->patience;
  while (!call.done) {
    require_hope(call, rank);
    require(Clock::now() < deadline, "rank ", members_[rank], " has waited ",
            static_cast<double>(world_->patience.count()) / 1000, " s in ", title(call), ", ",
            description(call.ranks[rank]), ": ", missing_ranks(call));
    const std::int64_t seen = world_->changes;
    lock.unlock();
    advance(rank);
    lock.lock();
    if (!call.done && world_->changes == seen) world_->changed.wait_until(lock, deadline);
  }
}

bool ThreadGroup::hopeless(const Call& call) const {
  if (!failure_.empty() || !world_->failure.empty()) return true;
  for (int r = 0; r < size(); ++r) {
    if (!call.arrived[r] && world_->ended[members_[r]]) return true;
  }
  return false;
}

void ThreadGroup::require_hope(const Call& call, int rank) const {
  if (!hopeless(call)) return;
  if (!failure_.empty()) throw Error(failure_);
  if (!world_->failure.empty()) throw OtherRankFailed(world_->failure);
  throw Error(cat("rank ", members_[rank], " waits for ranks that have ended in ", title(call), ", ",
                  description(call.ranks[rank]), ": ", missing_ranks(call)));
}

void ThreadGroup::require_match(const Call& call, int rank, const ThreadArguments& arguments) {
  std::vector<int> here;
  std::string theirs;
  for (int r = 0; r < size(); ++r) {
    if (!call.arrived[r]) continue;
    here.push_back(members_[r]);
    theirs = description(call.ranks[r]);
  }
  const std::string mine = description(arguments);
  if (here.empty() || mine == theirs) return;
  failure_ = cat(title(call), " is not the same on all of them: ", ranks_text(here), ": ", theirs, "; rank ",
                 members_[rank], ": ", mine);
  world_->notify();
  throw Error(failure_);
}

std::string ThreadGroup::title(const Call& call) const {
  return cat("call ", call.number, " of ", ranks_text(members_));
}

std::string ThreadGroup::missing_ranks(const Call& call) const {
  std::string text;
  for (int r = 0; r < size(); ++r) {
    if (call.arrived[r]) continue;
    const std::string& last = world_->last[members_[r]];
    text += cat(text.empty() ? "" : "; ", "rank ", members_[r], " did not arrive, ",
                world_->ended[members_[r]] ? "has ended, " : "",
                last.empty() ? "no collective yet" : "last collective: ", last);
  }
  return text;
}

}  // namespace hybridmoe
