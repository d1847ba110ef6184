// Measures the exchange of rows of a model's MoE layers: against MPI's own all-to-all for the same bytes,
// flat against hierarchical, and how much of it runs under products.
#pragma once

#include <ostream>

#include "core/backend.h"
#include "core/groups.h"
#include "parallel/mpi_world.h"
#include "proto/config.pb.h"

namespace hybridmoe {

struct ExchangeBench {
  Config config;  // model, batch and parallel; completed
  int rounds = 15;
};

// Collective over the world; its expert group is the world. Every number is a median over rounds, in which
// what is compared takes turns; a round's time is that of the slowest rank. Rank 0 prints.
void bench_exchange(Backend& backend, const Groups& groups, const MpiWorld& ranks, const ExchangeBench& bench,
                    std::ostream& out);

}  // namespace hybridmoe
