// How a run's rows move between ranks: what its configuration says, and what is left to measurement.
#pragma once

#include "core/backend.h"
#include "core/groups.h"
#include "parallel/row_exchange.h"
#include "proto/config.pb.h"
#include "proto/telemetry.pb.h"

namespace hybridmoe {

// As configured; `hierarchical` only where the configuration says so itself.
ExchangeOptions exchange_options(const ParallelConfig& parallel);

// "exchange": FLAT or HIERARCHICAL, and why. `before`: the choice with which a continued run began, or null;
// AUTO keeps it. Collective over groups.world: AUTO measures where an expert group spans several hosts.
MeasuredChoice choose_exchange(const Config& config, Backend& backend, const Groups& groups,
                               const MeasuredChoice* before);

}  // namespace hybridmoe
