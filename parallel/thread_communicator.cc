#include "parallel/thread_communicator.h"

#include <algorithm>
#include <exception>
#include <map>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "parallel/collective_arguments.h"
#include "parallel/thread_group.h"

namespace hybridmoe {
namespace {

class ThreadCommunicator : public Communicator {
 public:
  ThreadCommunicator(std::shared_ptr<ThreadGroup> group, int rank) : group_(std::move(group)), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }

  Event all_reduce(const Tensor& data, ReduceOp op, const char* label) override {
    check_all_reduce(data, label);
    return group_->arrive(
        rank_,
        {.collective = Collective::AllReduce, .label = label, .op = op, .input = data, .output = data});
  }
  Event reduce_scatter(const Tensor& input, const Tensor& output, const char* label) override {
    check_reduce_scatter(input, output, size(), label);
    return group_->arrive(
        rank_, {.collective = Collective::ReduceScatter, .label = label, .input = input, .output = output});
  }
  Event all_gather(const Tensor& input, const Tensor& output, const char* label) override {
    check_all_gather(input, output, size(), label);
    return group_->arrive(
        rank_, {.collective = Collective::AllGather, .label = label, .input = input, .output = output});
  }
  Event broadcast(const Tensor& data, int root, const char* label) override {
    check_broadcast(data, root, size(), label);
    return group_->arrive(
        rank_,
        {.collective = Collective::Broadcast, .label = label, .root = root, .input = data, .output = data});
  }
  Event all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows, const Tensor& recv,
                        const std::vector<std::int64_t>& recv_rows, const char* label) override {
    check_all_to_all_rows(send, send_rows, recv, recv_rows, rank_, size(), label);
    return group_->arrive(rank_, {.collective = Collective::AllToAllRows,
                                  .label = label,
                                  .input = send,
                                  .output = recv,
                                  .send_rows = send_rows,
                                  .recv_rows = recv_rows});
  }
  void barrier(const char* label) override {
    group_->meet(rank_, {.collective = Collective::Barrier, .label = label});
  }
  void progress() override { group_->advance(rank_); }
  void add_background(const std::weak_ptr<Background>& work) override { group_->add_background(rank_, work); }
  std::vector<std::string> gather_strings(const std::string& mine, const char* label) override {
    return group_->meet(rank_, {.collective = Collective::GatherStrings, .label = label, .text = mine});
  }

 private:
  std::shared_ptr<ThreadGroup> group_;
  int rank_;
};

}  // namespace

struct ThreadWorld::State {
  State(int ranks, std::chrono::milliseconds patience)
      : size(ranks), shared(std::make_shared<ThreadRanks>(ranks, patience)), made(ranks) {}

  // The group of the rank's next request. All ranks ask for the same kinds in the same order, so the number
  // of the request and the members name it.
  std::shared_ptr<ThreadGroup> group(int rank, Group kind, const std::vector<int>& members);
  // The end of a rank's body, with what it threw.
  void end(int rank, std::exception_ptr thrown);

  const int size;
  const std::shared_ptr<ThreadRanks> shared;  // its mutex guards what follows
  std::vector<std::size_t> made;              // requests by rank
  std::vector<Group> kinds;                   // of each request
  std::map<std::pair<std::size_t, std::vector<int>>, std::shared_ptr<ThreadGroup>> groups;
  std::exception_ptr first, echo;  // a failure of its own; of a rank that waited for another
  bool started = false;
};

std::shared_ptr<ThreadGroup> ThreadWorld::State::group(int rank, Group kind,
                                                       const std::vector<int>& members) {
  require(std::is_sorted(members.begin(), members.end()) &&
              std::binary_search(members.begin(), members.end(), rank),
          "rank ", rank, " asks for a group that is not in order or without itself");
  const std::lock_guard lock(shared->mutex);
  const std::size_t request = made[rank]++;
  if (request == kinds.size()) kinds.push_back(kind);
  require(kinds[request] == kind, "rank ", rank, " makes a group of kind ", int(kind), " as number ",
          request + 1, ", where another rank made one of kind ", int(kinds[request]));
  std::shared_ptr<ThreadGroup>& place = groups[{request, members}];
  if (place == nullptr) place = std::make_shared<ThreadGroup>(shared, members);
  return place;
}

void ThreadWorld::State::end(int rank, std::exception_ptr thrown) {
  std::string failure;
  bool other = false;
  try {
    if (thrown != nullptr) std::rethrow_exception(thrown);
  } catch (const OtherRankFailed&) {
    other = true;
  } catch (const std::exception& error) {
    failure = cat("rank ", rank, " failed: ", error.what());
  } catch (...) {
    failure = cat("rank ", rank, " failed: it threw something that is no std::exception");
  }
  {
    const std::lock_guard lock(shared->mutex);
    shared->ended[rank] = true;
    if (shared->failure.empty()) shared->failure = failure;
    std::exception_ptr& place = other ? echo : first;
    if (place == nullptr) place = thrown;
    shared->notify();
  }
}

ThreadWorld::ThreadWorld(int ranks, std::chrono::milliseconds patience)
    : state_(std::make_shared<State>(ranks, patience)) {
  require(ranks >= 1, "a world of ", ranks, " threads");
}

ThreadWorld::~ThreadWorld() = default;

void ThreadWorld::run(const std::function<void(Rank&)>& body) {
  class OneRank : public Rank {
   public:
    OneRank(std::shared_ptr<State> state, int rank, std::shared_ptr<ThreadGroup> all)
        : state_(std::move(state)), rank_(rank), world_(std::move(all), rank) {}
    Communicator& world() override { return world_; }
    MakeCommunicator make_groups() override {
      return [state = state_, rank = rank_](Group kind, const std::vector<int>& members) {
        const auto place = std::lower_bound(members.begin(), members.end(), rank) - members.begin();
        return std::make_unique<ThreadCommunicator>(state->group(rank, kind, members),
                                                    static_cast<int>(place));
      };
    }

   private:
    std::shared_ptr<State> state_;
    int rank_;
    ThreadCommunicator world_;
  };

  require(!std::exchange(state_->started, true), "a world of threads runs once");
  std::vector<int> everybody(state_->size);
  std::iota(everybody.begin(), everybody.end(), 0);
  const auto all = std::make_shared<ThreadGroup>(state_->shared, everybody);
  {
    std::vector<std::jthread> threads;
    for (int r = 0; r < state_->size; ++r) {
      threads.emplace_back([&, r] {
        std::exception_ptr thrown;
        try {
          OneRank rank(state_, r, all);
          body(rank);
        } catch (...) {
          thrown = std::current_exception();
        }
        state_->end(r, thrown);
      });
    }
  }
  if (state_->first != nullptr) std::rethrow_exception(state_->first);
  if (state_->echo != nullptr) std::rethrow_exception(state_->echo);
}

void run_ranks(int ranks, const std::function<void(ThreadWorld::Rank&)>& body,
               std::chrono::milliseconds patience) {
  ThreadWorld(ranks, patience).run(body);
}

}  // namespace hybridmoe
