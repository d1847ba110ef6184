// Communicators that tell an Activity which collectives their rank has issued and which one it waits in, and
// otherwise are the communicator they wrap. A rank that asks test() again and again counts as computing: the
// watchdog sees only who waits.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "core/activity.h"
#include "core/groups.h"

namespace hybridmoe {

// `inner` and `activity` outlive it; the events that it gave out need `activity` alone. `group` is the number
// that activity.add_group gave.
std::unique_ptr<Communicator> make_watched_communicator(Communicator& inner, Activity& activity, int group);

// The groups of a rank with every communicator of more than one rank watched. Members that are the same
// communicator stay the same. Construction is collective over groups.world.
class WatchedGroups {
 public:
  WatchedGroups(const Groups& groups, Activity& activity);
  // From here on the rank counts as waiting for all others to end, which is what MPI_Finalize does next.
  ~WatchedGroups();
  WatchedGroups(const WatchedGroups&) = delete;
  WatchedGroups& operator=(const WatchedGroups&) = delete;

  Groups groups() const { return groups_; }
  // What the activity knows the group of one of groups()' communicators by; -1: it is not watched, being of
  // one rank.
  int number_of(const Communicator& communicator) const {
    const auto place = numbers_.find(&communicator);
    return place == numbers_.end() ? -1 : place->second;
  }

 private:
  std::vector<std::unique_ptr<Communicator>> owned_;
  std::map<const Communicator*, int> numbers_;
  HostRelays relays_;
  Groups groups_;
  int world_group_ = -1;
};

}  // namespace hybridmoe
