#include "tools/step_bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "core/config/layers.h"
#include "core/random.h"
#include "launcher/recorder.h"
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
  std::string folder() const { return folder_; }

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
  double busiest = 0;         // the most that an expert of any layer got, in balanced loads; of the last step
  StepSeconds parts;          // of this rank, summed over the steps
};

Timing time_steps(Trainer& trainer, Communicator& world, double seconds) {
  trainer.step(false);  // touches the memory
  Timing timing;
  double spent = 0;
  while (timing.steps.size() < 3 || spent < seconds) {
    const StepResult result = trainer.step(false);
    const StepSeconds& own = result.seconds;
    timing.busiest = 0;
    for (const ModelStatistics::MoeLayer& layer : result.model.moe) {
      const double total = std::accumulate(layer.counts.begin(), layer.counts.end(), 0.0);
      const double most = *std::max_element(layer.counts.begin(), layer.counts.end());
      timing.busiest = std::max(timing.busiest, most * static_cast<double>(layer.counts.size()) / total);
    }
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
      "limit %.1f\n  forward %.1f%%, backward %.1f%%, communication %.1f%%, optimizer %.1f%%; the busiest "
      "expert had %.1f times a balanced load\n",
      median * 1e3, timing.steps.front() * 1e3, timing.steps.size(),
      static_cast<double>(trainer.tokens_per_step()) / median, flops / median * 1e-9,
      100 * flops / median / limit, limit * 1e-9, share(timing.parts.forward), share(timing.parts.backward),
      share(timing.parts.communication), share(timing.parts.optimizer), timing.busiest);
  out << text;
}

// A trainer on random tokens.
class BenchTrainer {
 public:
  BenchTrainer(Backend& backend, const Groups& groups, const Config& config)
      : config_(config), tokens_(config.model().vocabulary()) {
    DataConfig& data = *config_.mutable_data();
    data.clear_source();
    data.add_source()->set_path(tokens_.path());
    data.set_file_type(DataConfig::RAW_UINT16);
    data.set_raw_vocabulary(config_.model().vocabulary());
    complete(&config_, config_.model().vocabulary());
    dataset_ = Dataset::open(config_);
    const MoeConfig& moe = config_.model().moe();
    exchange_ =
        make_row_exchange(backend, groups, moe.experts(), moe.top_k(), CapacityRule{}, ExchangeOptions{});
    trainer_.emplace(config_, *dataset_, backend, groups, exchange_.get());
    trainer_->start();
  }
  Trainer& trainer() { return *trainer_; }
  // Makes the routers prefer the first quarter of the experts: their logits spread so many times as wide.
  void skew(double factor) {
    ParameterStore& parameters = trainer_->parameters();
    for (auto& bucket : parameters.buckets()) {
      for (const auto& range : bucket.owned) {
        if (range.kind != TensorKind::Router) continue;
        const Shape& shape = parameters.spec(range.parameter).global_shape;
        const std::int64_t end =
            std::clamp<std::int64_t>(shape.elements() / 4 - range.global_begin, 0, range.length);
        trainer_->masters().update(bucket, range.shard_begin, range.shard_begin + end,
                                   [&](const Tensor& part) {
                                     for (std::int64_t i = 0; i < part.elements(); ++i)
                                       part.ptr<float>()[i] *= static_cast<float>(factor);
                                   });
      }
    }
    trainer_->restored();
  }
  std::string folder() const { return tokens_.folder(); }

 private:
  Config config_;
  RandomTokens tokens_;
  std::unique_ptr<Dataset> dataset_;
  std::unique_ptr<RowExchange> exchange_;
  std::optional<Trainer> trainer_;
};

// Where symmetric differences lie, and between what with a probability of 95 %.
struct Shift {
  double estimate, low, high;
};

// Hodges and Lehmann's estimate, the median of the means of all pairs, and the interval that belongs to it:
// the order statistics of those means that Wilcoxon's signed rank test does not reject (normal limit). Which
// of two steps comes first is random, so that the differences are symmetric whatever a step's time looks
// like; about a fifth narrower than what the order statistics of the differences themselves say.
Shift shift_of(const std::vector<double>& differences) {
  std::vector<double> means;
  for (std::size_t i = 0; i < differences.size(); ++i)
    for (std::size_t j = 0; j <= i; ++j) means.push_back((differences[i] + differences[j]) / 2);
  std::sort(means.begin(), means.end());
  const auto n = static_cast<double>(differences.size());
  const double middle = n * (n + 1) / 4, reach = 1.96 * std::sqrt(n * (n + 1) * (2 * n + 1) / 24);
  const auto at = [&](double place) {
    return means[static_cast<std::size_t>(
        std::clamp<std::int64_t>(std::lround(place), 0, std::ssize(means) - 1))];
  };
  return {at(middle), at(middle - reach), at(middle + reach)};
}

}  // namespace

void bench_step(Backend& backend, const Groups& groups, double rank_limit, const StepBench& bench,
                std::ostream& out) {
  BenchTrainer trained(backend, groups, bench.config);
  if (bench.skew != 1) trained.skew(bench.skew);
  const Timing timing = time_steps(trained.trainer(), *groups.world, bench.seconds);
  const double limit = sum_over(*groups.world, rank_limit);
  print(trained.trainer(), timing, limit, out);
}

void bench_telemetry(Backend& backend, const Groups& groups, const StepBench& bench, std::ostream& out) {
  Config config = bench.config;
  TelemetryConfig& telemetry = *config.mutable_telemetry();
  if (telemetry.expert_every() != 1) telemetry.set_expert_every(0);
  if (telemetry.noise_every() != 1) telemetry.set_noise_every(0);
  if (telemetry.check_every() != 1) telemetry.set_check_every(0);
  BenchTrainer trained(backend, groups, config);
  Trainer& trainer = trained.trainer();
  std::unique_ptr<Recorder> recorder;
  if (groups.world->rank() == 0)
    recorder = std::make_unique<Recorder>(trained.folder(), trainer, RunHeader{}, 1);
  const auto timed = [&](bool measured) {
    trainer.pause_measuring(!measured);
    const auto begin = std::chrono::steady_clock::now();
    const StepResult result = trainer.step(false);
    if (measured && recorder) recorder->step(result);
    // Else the gathering that one step begins counts for the next where nothing in between waits for others.
    trainer.wait_weights();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    return largest_over(*groups.world, seconds);
  };
  timed(true);
  timed(false);
  const Random random(2, "which step of a pair is measured");
  std::vector<double> differences, without;
  for (double spent = 0; differences.size() < 10 || spent < bench.seconds;) {
    const bool first = random.below(static_cast<std::int64_t>(differences.size()), 2) == 0;
    const double one = timed(first), two = timed(!first);
    differences.push_back(first ? one - two : two - one);
    without.push_back(first ? two : one);
    spent += one + two;  // the same on every rank, so that all stop together
  }
  std::sort(without.begin(), without.end());
  const Shift shift = shift_of(differences);
  const double step = without[without.size() / 2];
  char text[200];
  std::snprintf(
      text, sizeof text,
      "telemetry: %.3f%% of a step of %.1f ms, 95%% interval %.3f%% to %.3f%% (%zu pairs of steps)\n",
      100 * shift.estimate / step, step * 1e3, 100 * shift.low / step, 100 * shift.high / step,
      differences.size());
  out << text;
}

}  // namespace hybridmoe
