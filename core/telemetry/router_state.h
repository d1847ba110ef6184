// What the loads of a layer's experts say about its router.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/telemetry/run_series.h"

namespace hybridmoe {

inline constexpr double kLeastLoadEntropy = 0.8;  // share of ln E; below it a router has collapsed
inline constexpr std::int64_t kDeadExpertSteps =
    100;  // without a token, after which an expert counts as dead

// Of one layer at one step, or of loads summed over steps.
struct RouterState {
  double tokens = 0;         // routed, over all experts
  double max_violation = 0;  // (largest load - mean load) / mean load
  double entropy_share = 1;  // entropy of the load's distribution / ln E; 1: even, 0: one expert takes all
  double gini = 0;           // 0: even, (E - 1) / E: one expert takes all
  int idle = 0;              // experts without a token
  int busiest = 0;           // expert with the largest load
};
// A layer without any token is reported as even.
RouterState router_state(std::span<const double> load);

// Follows the loads of all MoE layers step by step: for how long has an expert been without a token, a router
// collapsed?
class RouterWatch {
 public:
  struct Layer {
    std::string label;
    int layer = -1;
    RouterState state;  // of the newest step
    std::vector<std::int64_t>
        idle_since;                    // by expert: first step of its current run without a token; 0: none
    std::int64_t collapsed_since = 0;  // first step of the current run below kLeastLoadEntropy; 0: none
    // The experts without a token for at least `steps` steps up to the newest.
    std::vector<int> dead(std::int64_t newest_step, std::int64_t steps = kDeadExpertSteps) const;
  };

  // Takes the newest header's definition of expert_load; without one there are no layers.
  explicit RouterWatch(const RunHeader& header);
  // From the elements of expert_load.
  explicit RouterWatch(const std::vector<DenseSeries::Element>& elements);

  // Steps must ascend. Ignores a step without loads (dropped by the writer) or of another size.
  void add(const RunHeader& header, const StepRecord& step);
  void add(std::int64_t step, const std::vector<double>& load);  // [layers, experts]

  const std::vector<Layer>& layers() const { return layers_; }
  int experts() const { return experts_; }
  std::int64_t newest_step() const { return newest_step_; }  // 0: none yet

 private:
  std::vector<Layer> layers_;
  int experts_ = 0;
  std::int64_t newest_step_ = 0;
};

}  // namespace hybridmoe
