// Times every operator of a backend at one model size and puts each next to the machine's limits.
#pragma once

#include <ostream>
#include <string>

#include "core/backend.h"
#include "core/testing/cases.h"

namespace hybridmoe {

struct MachineLimits {
  double product_flops = 0;  // per second, of large products (core/limits.h)
  double copy_bytes = 0;     // per second, read and written
};

struct OperatorBench {
  testing::BenchmarkSize size;
  std::string filter;        // operators whose name contains it; empty: all
  double seconds = 0.2;      // spent on each operator
  bool flush_caches = true;  // of a CPU: write 64 MiB between runs, as a training step would have done
};

// One line per operator: time of the best run, GFLOP/s, GB/s of what must move, and the share of the limit:
// the time that the work would take at the limits, over the measured time.
void bench_operators(Backend& backend, const MachineLimits& limits, const OperatorBench& bench,
                     std::ostream& out);
// The same of one operator, without the line of headings. Returns the seconds of the best run.
double bench_case(const testing::OperatorCase& c, Backend& backend, const MachineLimits& limits,
                  const OperatorBench& bench, std::ostream& out);

}  // namespace hybridmoe
