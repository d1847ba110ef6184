#include "parallel/watched_communicator.h"

#include <map>
#include <string>
#include <utility>

namespace hybridmoe {
namespace {

class WatchedCommunicator : public Communicator {
 public:
  WatchedCommunicator(Communicator& inner, Activity& activity, int group)
      : inner_(inner), activity_(activity), group_(group) {}

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  void progress() override { inner_.progress(); }
  void add_background(const std::weak_ptr<Background>& work) override { inner_.add_background(work); }

  Event all_reduce(const Tensor& data, ReduceOp op, const char* label) override {
    return issue(label, [&] { return inner_.all_reduce(data, op, label); });
  }
  Event reduce_scatter(const Tensor& input, const Tensor& output, const char* label) override {
    return issue(label, [&] { return inner_.reduce_scatter(input, output, label); });
  }
  Event all_gather(const Tensor& input, const Tensor& output, const char* label) override {
    return issue(label, [&] { return inner_.all_gather(input, output, label); });
  }
  Event broadcast(const Tensor& data, int root, const char* label) override {
    return issue(label, [&] { return inner_.broadcast(data, root, label); });
  }
  Event all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows, const Tensor& recv,
                        const std::vector<std::int64_t>& recv_rows, const char* label) override {
    return issue(label, [&] { return inner_.all_to_all_rows(send, send_rows, recv, recv_rows, label); });
  }
  void barrier(const char* label) override {
    const Activity::Waiting waiting(activity_, activity_.issue(group_, label));
    inner_.barrier(label);
  }
  std::vector<std::string> gather_strings(const std::string& mine, const char* label) override {
    const Activity::Waiting waiting(activity_, activity_.issue(group_, label));
    return inner_.gather_strings(mine, label);
  }

 private:
  class Completion : public Event::State {
   public:
    explicit Completion(Activity& activity) : activity_(activity) {}
    bool test() override { return inner.test(); }
    void wait() override {
      const Activity::Waiting waiting(activity_, collective);
      inner.wait();
    }
    Event inner;
    Activity::Collective collective;

   private:
    Activity& activity_;
  };

  template <class Start>
  Event issue(const char* label, const Start& start) {
    const Activity::Collective collective = activity_.issue(group_, label);
    const std::shared_ptr<Completion> completion = unused();
    completion->inner = start();
    completion->collective = collective;
    return Event(completion);
  }
  // One that no event refers to any more, so that a steady training step allocates none.
  std::shared_ptr<Completion> unused() {
    for (const auto& completion : completions_) {
      if (completion.use_count() == 1) return completion;
    }
    completions_.push_back(std::make_shared<Completion>(activity_));
    return completions_.back();
  }

  Communicator& inner_;
  Activity& activity_;
  int group_;
  std::vector<std::shared_ptr<Completion>> completions_;
};

struct NamedGroup {
  const char* name;
  Communicator* Groups::*member;
};
constexpr NamedGroup kGroups[] = {{"world", &Groups::world},
                                  {"data", &Groups::data},
                                  {"tensor", &Groups::tensor},
                                  {"expert", &Groups::expert},
                                  {"expert data", &Groups::expert_data},
                                  {"key/value", &Groups::key_value}};
struct NamedRelays {
  const char* name;
  Communicator* HostRelays::*member;
};
constexpr NamedRelays kRelays[] = {{"expert, to relays", &HostRelays::gather},
                                   {"expert, between hosts", &HostRelays::cross},
                                   {"expert, from relays", &HostRelays::scatter}};

// Of the world, in the order of `group`.
std::vector<int> members(Communicator& group, int world_rank) {
  std::vector<int> ranks;
  for (const std::string& rank : group.gather_strings(std::to_string(world_rank), "watched groups")) {
    ranks.push_back(std::stoi(rank));
  }
  return ranks;
}

}  // namespace

std::unique_ptr<Communicator> make_watched_communicator(Communicator& inner, Activity& activity, int group) {
  return std::make_unique<WatchedCommunicator>(inner, activity, group);
}

WatchedGroups::WatchedGroups(const Groups& groups, Activity& activity) : groups_(groups) {
  groups_.activity = &activity;
  const int world_rank = groups.world->rank();
  std::map<Communicator*, Communicator*> watched;
  const auto watch = [&](Communicator* inner, const char* name) {
    if (inner->size() == 1) return inner;
    Communicator*& outer = watched[inner];
    if (outer == nullptr) {
      const int group = activity.add_group(name, members(*inner, world_rank));
      if (inner == groups.world) world_group_ = group;
      owned_.push_back(make_watched_communicator(*inner, activity, group));
      outer = owned_.back().get();
      numbers_[outer] = group;
    }
    return outer;
  };
  for (const auto& [name, member] : kGroups) groups_.*member = watch(groups.*member, name);
  if (groups.relays == nullptr) return;
  relays_ = *groups.relays;
  groups_.relays = &relays_;
  for (const auto& [name, member] : kRelays) relays_.*member = watch(relays_.*member, name);
}

WatchedGroups::~WatchedGroups() {
  groups_.mark_phase("end");
  if (world_group_ < 0) return;
  groups_.activity->begin_wait(groups_.activity->issue(world_group_, "end of the job"));
}

}  // namespace hybridmoe
