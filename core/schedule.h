// The learning rate as a function of the step.
#pragma once

#include <cstdint>

#include "proto/config.pb.h"

namespace hybridmoe {

// Of update `step`, counted from 1, of a complete()d configuration. Warm-up rises linearly from
// warmup_from · peak (before the first update) to the peak at update warmup_steps; then the shape falls to
// floor · peak at update total_steps and stays there.
double learning_rate(const Config& config, std::int64_t step);

}  // namespace hybridmoe
