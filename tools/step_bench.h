// Times whole training steps of a model on random tokens and puts them next to the machine's product limit.
#pragma once

#include <ostream>

#include "core/backend.h"
#include "core/groups.h"
#include "proto/config.pb.h"

namespace hybridmoe {

struct StepBench {
  Config config;       // model, batch and data's vocabulary; its data sources are replaced
  double seconds = 5;  // about how long to go on stepping; at least three steps
  double skew = 1;     // of the routers: their weights for a quarter of the experts are multiplied by this
};

// Collective over groups.world. `rank_limit` is this rank's product limit in FLOP/s, measured on all ranks at
// once. Rank 0 prints the median and best step, tokens per second, FLOP/s over the world without
// recomputation and with causal attention as half, their share of the sum of the ranks' limits, and where the
// time went.
void bench_step(Backend& backend, const Groups& groups, double rank_limit, const StepBench& bench,
                std::ostream& out);

// What telemetry costs: a measured and recorded step and one that is neither, in random order, again and
// again for `bench.seconds` in one process. Collective over groups.world. Rank 0 prints the difference
// (Hodges and Lehmann's estimate) as a share of the median step, between the ends of its 95 % interval
// (Wilcoxon's). What the configuration measures every so many steps only is left out, unless its number of
// steps is 1.
void bench_telemetry(Backend& backend, const Groups& groups, const StepBench& bench, std::ostream& out);

}  // namespace hybridmoe
