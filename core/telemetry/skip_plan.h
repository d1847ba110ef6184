// How to take a run past an incident as PaLM (Chowdhery et al. 2022, section 5.1) did: go back to a
// checkpoint before it and leave out the batches around it.
#pragma once

#include <cstdint>
#include <string>

#include "core/telemetry/explain.h"

namespace hybridmoe {

struct SkipPlan {
  Attribution why;
  std::int64_t first_step = 0, last_step = 0;  // whose batches are left out
  std::int64_t checkpoint_step = 0;            // to go back to; 0: there is none before first_step
  std::int64_t skip_begin = 0, skip_end = 0;   // numbers of the data order, as data.skip counts
  std::int64_t lost_steps = 0;                 // computed after the checkpoint, to be computed again
  std::string command;                         // a shell line
};

// `step` as in explain(). The incident's steps are left out, the first 32 of them where there are more, and
// `margin` on both sides, but none before the checkpoint. Throws Error when the log cannot be read or has no
// sample numbers.
SkipPlan plan_skip(const std::string& run_dir, ReadMode mode, std::int64_t step, std::int64_t margin);

// Number, in the order without the skip list, of the i-th sample (from 0) that the list leaves.
std::int64_t sample_number(const DataConfig& data, std::int64_t i);

}  // namespace hybridmoe
