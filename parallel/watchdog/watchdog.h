// The watchdog of a rank: a thread that tells the collector (parallel/watchdog/collector.h) several times a
// second what the rank is doing. When a rank dies or one waits in a collective for longer than the limit, the
// collector writes one report and every rank ends.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "core/activity.h"
#include "core/communicator.h"
#include "parallel/watchdog/collector_process.h"

namespace hybridmoe {

// Exit status of a rank that its watchdog ends (sysexits.h: an internal error).
inline constexpr int kWatchdogStatus = 70;

struct WatchdogOptions {
  double seconds = 300;  // the longest wait in one collective; 0: no watchdog
  std::string run_dir;   // the report becomes RUN_DIR/failure-NNN.txt
};

class Watchdog {
 public:
  // `activity` is this rank's and outlives the watchdog.
  explicit Watchdog(const Activity& activity);
  // Says goodbye: the rank has ended in order. Make the watchdog before MpiEnvironment, so that MPI's own end
  // is watched as well.
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  // Collective over `world`, once, after the activity has all its groups. Returns on rank 0 why there is no
  // collector, in words for the user; empty when there is one. Without a collector each rank watches its own
  // waits: it says so and ends after the limit.
  std::string start(Communicator& world, const WatchdogOptions& options);

  // This rank is about to end the job with this error: the report will say so.
  void failed(const std::string& error);

  // What the rank leaves behind when the job ends by a failure, its own or another rank's: called with the
  // reason in words, in a thread of its own, while the thread that trains may be stuck anywhere. It may be
  // called several times, by one thread at a time (a sign of a failure may prove false), and not at all when
  // the process is killed. A rank that is to end waits for it, but not for a disk that hangs: then the
  // process ends in the middle of it. It must not throw, and owns what it uses. Before start it is without
  // effect; a second call replaces the first.
  void set_last_words(std::function<void(const std::string& why)> last_words);

 private:
  class Agent;

  const Activity& activity_;
  std::optional<watchdog::CollectorProcess> collector_;  // on rank 0; ends after the agents' goodbyes
  std::unique_ptr<Agent> agent_;
};

}  // namespace hybridmoe
