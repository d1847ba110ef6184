// The collector: a process that is no rank, so that it outlives what Open MPI does to the survivors of a
// failure. Ranks tell it their states over TCP; when they mean a failure (parallel/watchdog/verdict.h) it
// writes one report, sees to it that every rank ends, and ends itself.
#pragma once

#include <cstdint>
#include <list>
#include <string>
#include <vector>

#include "parallel/watchdog/channel.h"
#include "parallel/watchdog/verdict.h"

namespace hybridmoe::watchdog {

struct CollectorOptions {
  int ranks = 1;
  double seconds = 300;        // parallel.watchdog_seconds
  std::string run_dir;         // where failure-NNN.txt goes
  bool loopback_only = false;  // all ranks are on this host
  int report_descriptor = 2;
};

// The limits that the collector judges by, and how often ranks send their states.
Limits limits_for(double seconds);
double heartbeat_for(double seconds);

class Collector {
 public:
  // Listens from now on. Throws Error when that is impossible.
  explicit Collector(const CollectorOptions& options);

  // What ranks need to find it. The token is random: nobody else can speak for a rank.
  const CollectorOffer& offer() const { return offer_; }

  // Until every rank has ended, or none is left that could be watched. Returns whether the job was well.
  bool run();

 private:
  struct Peer {
    Channel channel;
    int rank = -1;  // -1: has not said who it is
    double since = 0;
  };

  void tick();
  void wait_for_messages();
  void accept();
  void read(Peer& peer);
  bool greet(Peer& peer, const RankHello& hello);
  int group_index(const GroupMembers& members);
  void take(Peer& peer, const RankMessage& message);
  void drop_closed();
  void tell_all(const CollectorMessage& message);

  void allow_for_suspension();
  void look_for_failure();
  void write_report(const Verdict& verdict);
  void end_ranks();
  bool nobody_left() const;

  CollectorOptions options_;
  Limits limits_;
  CollectorOffer offer_;
  Socket listener_;
  std::list<Peer> peers_;
  Job job_;
  double last_time_ = 0;  // of the system's clock
  bool anybody_came_ = false;
  double asked_at_ = 0;  // for the latest states, after the first sign of a failure; 0: not
  bool reported_ = false;
  double end_at_ = 0, kill_at_ = 0;  // what is still to be done after the report; 0: done
};

}  // namespace hybridmoe::watchdog
