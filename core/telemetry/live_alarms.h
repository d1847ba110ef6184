// What a run says while it goes on: spikes of the gradient norm and the loss, and slow ranks, as events for
// its log. By the same rules as hybridmoe-log judges the finished log (core/telemetry/incidents.h).
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "core/telemetry/incidents.h"
#include "core/telemetry/spike_detector.h"
#include "proto/telemetry.pb.h"

namespace hybridmoe {

class LiveAlarms {
 public:
  struct Step {
    std::int64_t step = 0;
    double loss = 0, grad_norm = 0;  // not finite: somebody else's alarm
    // Seconds of the ranks' own work; 0: not measured.
    double fastest_seconds = 0, slowest_seconds = 0;
    int slowest_rank = 0;
  };

  // Events that begin at this step: SPIKE (values `value`, `usual`, `score`), STRAGGLER (value `ratio`;
  // rank: that which was the slowest in most of the slow steps). Steps come in ascending order. A slow rank
  // is named again after 256 steps at the earliest, another one at once.
  std::vector<EventRecord> add(const Step& step);

 private:
  static constexpr std::int64_t kSilence = 256;  // steps between two alarms about one rank
  // Whose median counts: shorter waits, which hybridmoe-log finds, are no reason to interrupt anybody.
  static constexpr std::size_t kSteps = 65;

  int most_often_slow() const;  // while a slow step is among the last kSteps

  SpikeDetector norm_{SpikeDetector::Kind::Norm}, loss_{SpikeDetector::Kind::Loss};
  RollingMedian ratios_{kSteps}, seconds_{kSteps};  // slowest / fastest rank; of the slowest
  std::deque<int> ranks_;              // the slowest of a slow step, -1 of another; the last kSteps
  bool told_ = false;                  // of the ranks that are slow now
  int slow_rank_ = -1;                 // named last
  std::map<int, std::int64_t> named_;  // when, by rank
};

}  // namespace hybridmoe
