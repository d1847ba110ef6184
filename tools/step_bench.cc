#include "tools/step_bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "core/config/layers.h"
#include "core/random.h"
#include "launcher/trainer.h"
#include "parallel/row_exchange.h"

namespace hybridmoe {
namespace {

// A file of random ids, gone with this object.
class RandomTokens {
 public:
  explicit RandomTokens(std::int32_t vocabulary) {
    std::string pattern = (std::filesystem::temp_directory_path() / "hybridmoe-bench-XXXXXX").string();
    require(mkdtemp(pattern.data()) != nullptr, "cannot make a directory like ", pattern, "; set TMPDIR");
    folder_ = pattern;
    const Random random(1, "bench tokens");
    std::vector<std::uint16_t> ids(std::size_t{1} << 20);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      ids[i] = static_cast<std::uint16_t>(random.below(i, static_cast<std::uint64_t>(vocabulary)));
    }
    std::ofstream file(path(), std::ios::binary);
    file.write(reinterpret_cast<const char*>(ids.data()), static_cast<std::streamsize>(ids.size() * 2));
    require(file.good(), "cannot write ", path(), "; set TMPDIR to a place with 2 MB of room");
  }
  ~RandomTokens() {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }
  RandomTokens(const RandomTokens&) = delete;
  RandomTokens& operator=(const RandomTokens&) = delete;
  std::string path() const { return folder_ / "tokens.bin"; }

 private:
  std::filesystem::path folder_;
};

double sum_over(Communicator& world, double value) {
  world.all_reduce(Tensor(&value, DType::F64, {1}), ReduceOp::Sum, "bench sum").wait();
  return value;
}
double largest_over(Communicator& world, double value) {
  world.all_reduce(Tensor(&value, DType::F64, {1}), ReduceOp::Max, "bench max").wait();
  return value;
}

struct Timing {
  std::vector<double> steps;  // seconds, of the slowest rank
  StepSeconds parts;          // of this rank, summed over the steps
};

Timing time_steps(Trainer& trainer, Communicator& world, double seconds) {
  trainer.step(false);  // touches the memory
  Timing timing;
  double spent = 0;
  while (timing.steps.size() < 3 || spent < seconds) {
    const StepSeconds own = trainer.step(false).seconds;
    const double slowest = largest_over(world, own.total);
    timing.steps.push_back(slowest);
    spent += slowest;  // the same on every rank, so that all stop together
    timing.parts.forward += own.forward;
    timing.parts.backward += own.backward;
    timing.parts.communication += own.communication;
    timing.parts.optimizer += own.optimizer;
  }
  std::sort(timing.steps.begin(), timing.steps.end());
  return timing;
}

void print(const Trainer& trainer, const Timing& timing, double limit, std::ostream& out) {
  const double median = timing.steps[timing.steps.size() / 2], flops = trainer.flops_per_step();
  double total = 0;
  for (const double seconds : timing.steps) total += seconds;
  const auto share = [&](double seconds) { return 100 * seconds / total; };
  char text[400];
  std::snprintf(
      text, sizeof text,
      "training step: median %.1f ms, best %.1f ms (%zu steps); %.0f tokens/s; %.1f GFLOP/s, %.1f%% of the "
      "limit %.1f\n  forward %.1f%%, backward %.1f%%, communication %.1f%%, optimizer %.1f%%\n",
      median * 1e3, timing.steps.front() * 1e3, timing.steps.size(),
      static_cast<double>(trainer.tokens_per_step()) / median, flops / median * 1e-9,
      100 * flops / median / limit, limit * 1e-9, share(timing.parts.forward), share(timing.parts.backward),
      share(timing.parts.communication), share(timing.parts.optimizer));
  out << text;
}

}  // namespace

void bench_step(Backend& backend, const Groups& groups, double rank_limit, const StepBench& bench,
                std::ostream& out) {
  Config config = bench.config;
  const RandomTokens tokens(config.model().vocabulary());
  DataConfig& data = *config.mutable_data();
  data.clear_source();
  data.add_source()->set_path(tokens.path());
  data.set_file_type(DataConfig::RAW_UINT16);
  data.set_raw_vocabulary(config.model().vocabulary());
  complete(&config, config.model().vocabulary());
  const std::unique_ptr<Dataset> dataset = Dataset::open(config);
  const MoeConfig& moe = config.model().moe();
  const std::unique_ptr<RowExchange> exchange =
      make_row_exchange(backend, groups, moe.experts(), moe.top_k(), CapacityRule{}, ExchangeOptions{});
  Trainer trainer(config, *dataset, backend, groups, exchange.get());
  trainer.start();
  const Timing timing = time_steps(trainer, *groups.world, bench.seconds);
  const double limit = sum_over(*groups.world, rank_limit);
  print(trainer, timing, limit, out);
}

}  // namespace hybridmoe
