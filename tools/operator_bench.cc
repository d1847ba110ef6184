#include "tools/operator_bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

namespace hybridmoe {
namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The best of as many runs as fit into the time, at least three. On a device a run is queued ten times, so
// that waiting for it does not count.
double best_seconds(testing::BoundCase& bound, bool on_device, const OperatorBench& bench) {
  constexpr std::size_t kFlush = std::size_t{64} << 20;
  const int times = on_device ? 10 : 1;
  std::vector<char> flushed(bench.flush_caches && !on_device ? kFlush : 0);
  bound.run();
  double best = 1e30, spent = 0;
  for (int run = 0; run < 3 || spent < bench.seconds; ++run) {
    std::fill(flushed.begin(), flushed.end(), static_cast<char>(run));
    const double start = seconds_now();
    bound.run(times);
    const double taken = seconds_now() - start;
    best = std::min(best, taken / times);
    spent += taken;
  }
  return best;
}

}  // namespace

void bench_operators(Backend& backend, const MachineLimits& limits, const OperatorBench& bench,
                     std::ostream& out) {
  char line[160];
  std::snprintf(line, sizeof line, "%-44s %10s %9s %8s %7s\n", "operator", "us", "GFLOP/s", "GB/s", "limit");
  out << line;
  for (const testing::OperatorCase& c : testing::benchmark_cases(bench.size)) {
    if (c.name.find(bench.filter) != std::string::npos) bench_case(c, backend, limits, bench, out);
  }
}

double bench_case(const testing::OperatorCase& c, Backend& backend, const MachineLimits& limits,
                  const OperatorBench& bench, std::ostream& out) {
  char line[160];
  testing::BoundCase bound(c, testing::Target(backend));
  const double seconds = best_seconds(bound, backend.device() != Device::CPU, bench);
  const double bytes = testing::moved_bytes(c, backend);
  const double ideal = std::max(c.flops / limits.product_flops, bytes / limits.copy_bytes);
  std::snprintf(line, sizeof line, "%-44s %10.1f %9.1f %8.2f %6.1f%%\n", c.name.c_str(), seconds * 1e6,
                c.flops / seconds * 1e-9, bytes / seconds * 1e-9, 100 * ideal / seconds);
  out << line << std::flush;
  return seconds;
}

}  // namespace hybridmoe
