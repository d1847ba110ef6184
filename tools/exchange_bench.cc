#include "tools/exchange_bench.h"

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "launcher/exchange_choice.h"
#include "parallel/exchange_trial.h"
#include "parallel/mpi_all_to_all.h"
#include "tools/moe_layer_trial.h"

namespace hybridmoe {

namespace {

double reduced(Communicator& world, double value, ReduceOp op) {
  world.all_reduce(Tensor(&value, DType::F64, {1}), op, "bench exchange").wait();
  return value;
}

__attribute__((format(printf, 1, 2))) std::string formatted(const char* format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return text;
}

// What is measured in turns. `run` returns nothing or the part of its time that `part` is to hold.
struct Measured {
  std::function<double()> run;
  std::vector<double> seconds = {}, part = {};

  static double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
  }
  double total() const { return median(seconds); }
  double best() const { return *std::min_element(seconds.begin(), seconds.end()); }
  double of_part() const { return median(part); }
};

void measure(Communicator& world, int rounds, const std::vector<Measured*>& each) {
  constexpr int kWarmUp = 3;
  for (int round = 0; round < rounds + kWarmUp; ++round) {
    for (Measured* measured : each) {
      world.barrier("bench exchange");
      const auto begin = std::chrono::steady_clock::now();
      const double part = measured->run();
      const std::chrono::duration<double> own = std::chrono::steady_clock::now() - begin;
      const double slowest = reduced(world, own.count(), ReduceOp::Max);
      const double parts = reduced(world, part, ReduceOp::Max);
      if (round < kWarmUp) continue;
      measured->seconds.push_back(slowest);
      measured->part.push_back(parts);
    }
  }
}

double load_average() {
  double load = 0;
  return getloadavg(&load, 1) == 1 ? load : -1;
}

class Bench {
 public:
  Bench(Backend& backend, const Groups& groups, const MpiWorld& ranks, const ExchangeBench& bench,
        std::ostream& out)
      : backend_(backend),
        groups_(groups),
        world_(*groups.world),
        ranks_(ranks),
        bench_(bench),
        out_(out),
        options_(exchange_options(bench.config.parallel())) {
    const ModelConfig& model = bench.config.model();
    size_ = {.tokens = bench.config.batch().micro_batch_sequences() * std::int64_t{model.sequence_length()} /
                       world_.size(),
             .d = model.d_model(),
             .experts = model.moe().experts(),
             .top_k = model.moe().top_k()};
    options_.load_limit = 0;
  }

  void run() {
    out_ << formatted(
        "exchange: %d ranks on %d hosts, %lld tokens a rank, rows of %lld %s, %d of %d experts, "
        "%d chunks; load average %.2f\n",
        world_.size(), ranks_.hosts().count(), static_cast<long long>(size_.tokens),
        static_cast<long long>(size_.d), name_of(backend_.compute_type()), size_.top_k, size_.experts,
        options_.chunks, load_average());
    movement();
    whole_exchange();
    for (const bool hierarchical : transports()) layer(hierarchical);
  }

 private:
  std::vector<bool> transports() const {
    return groups_.relays == nullptr ? std::vector<bool>{false} : std::vector<bool>{false, true};
  }
  static const char* name(bool hierarchical) { return hierarchical ? "hierarchical" : "flat"; }
  ExchangeOptions with(bool hierarchical, bool overlap = true) const {
    ExchangeOptions options = options_;
    options.hierarchical = hierarchical;
    options.overlap = overlap;
    return options;
  }

  void movement();
  void whole_exchange();
  void layer(bool hierarchical);

  Backend& backend_;
  const Groups& groups_;
  Communicator& world_;
  const MpiWorld& ranks_;
  const ExchangeBench& bench_;
  std::ostream& out_;
  ExchangeOptions options_;
  TrialSize size_;
};

// Rows that lie ready, there and back.
void Bench::movement() {
  TransportTrial flat(backend_, groups_, size_, with(false));
  std::optional<TransportTrial> relayed;
  if (groups_.relays != nullptr) relayed.emplace(backend_, groups_, size_, with(true));
  Measured mpi{[&] {
    mpi_all_to_all(ranks_, flat.sent(), flat.send_rows(), flat.received(), flat.recv_rows());
    mpi_all_to_all(ranks_, flat.received(), flat.recv_rows(), flat.sent(), flat.send_rows());
    return 0.0;
  }};
  const auto both_ways = [](TransportTrial* trial) {
    return [trial] {
      trial->dispatch();
      trial->combine();
      return 0.0;
    };
  };
  Measured ours{both_ways(&flat)}, hierarchical;
  std::vector<Measured*> all = {&mpi, &ours};
  if (relayed) {
    hierarchical.run = both_ways(&*relayed);
    all.push_back(&hierarchical);
  }
  measure(world_, bench_.rounds, all);
  const double row_bytes = static_cast<double>(size_.d * size_of(backend_.compute_type()));
  const double bytes =
      reduced(world_, static_cast<double>(flat.rows_sent()), ReduceOp::Sum) * row_bytes / world_.size();
  const double plain =
      reduced(world_, static_cast<double>(flat.rows_without_deduplication()), ReduceOp::Sum) * row_bytes /
      world_.size();
  out_ << formatted("  a rank sends %.2f MB one way; one row for each choice would be %.2f MB (%.2f)\n",
                    bytes * 1e-6, plain * 1e-6, bytes / plain);
  const auto line = [&](const char* what, const Measured& measured) {
    out_ << formatted(
        "  %-18s there and back %8.3f ms (best %.3f), %5.2f GB/s a rank, %3.0f %% of MPI_Alltoallv "
        "(best: %.0f %%)\n",
        what, measured.total() * 1e3, measured.best() * 1e3, 2 * bytes / measured.total() * 1e-9,
        100 * mpi.total() / measured.total(), 100 * mpi.best() / measured.best());
  };
  line("MPI_Alltoallv", mpi);
  line("rows, flat", ours);
  if (relayed) line("rows, hierarchical", hierarchical);
}

// Plan, dispatch and combine with packing.
void Bench::whole_exchange() {
  for (const bool hierarchical : transports()) {
    ExchangeTrial trial(backend_, groups_, size_, with(hierarchical));
    const auto timed = [&](auto call) {
      return [&trial, call] {
        const double before = trial.seconds_moving();
        (trial.*call)();
        return trial.seconds_moving() - before;
      };
    };
    Measured plan{timed(&ExchangeTrial::plan)}, there{timed(&ExchangeTrial::dispatch)},
        back{timed(&ExchangeTrial::combine)};
    measure(world_, bench_.rounds, {&plan, &there, &back});
    out_ << formatted(
        "  exchange, %-12s  plan %.3f ms; dispatch %.3f ms, of which moving %.3f; combine %.3f ms, "
        "of which moving %.3f\n",
        name(hierarchical), plan.total() * 1e3, there.total() * 1e3, there.of_part() * 1e3,
        back.total() * 1e3, back.of_part() * 1e3);
  }
}

void Bench::layer(bool hierarchical) {
  MoeLayerTrial waits(bench_.config, backend_, groups_, with(hierarchical, false));
  MoeLayerTrial overlaps(bench_.config, backend_, groups_, with(hierarchical, true));
  const auto pass = [](MoeLayerTrial* trial, auto call) {
    return [trial, call] {
      const double before = trial->seconds_moving();
      (trial->*call)();
      return trial->seconds_moving() - before;
    };
  };
  Measured f_off{pass(&waits, &MoeLayerTrial::forward)}, b_off{pass(&waits, &MoeLayerTrial::backward)},
      f_on{pass(&overlaps, &MoeLayerTrial::forward)}, b_on{pass(&overlaps, &MoeLayerTrial::backward)};
  measure(world_, bench_.rounds, {&f_off, &b_off, &f_on, &b_on});
  const double off = f_off.total() + b_off.total(), on = f_on.total() + b_on.total();
  const double moving = f_off.of_part() + b_off.of_part(), exposed = f_on.of_part() + b_on.of_part();
  const double experts =
      reduced(world_, expert_seconds(bench_.config, backend_, groups_, with(false)), ReduceOp::Max);
  out_ << formatted(
      "  MoE layer, %-12s forward %.2f and backward %.2f ms waiting at once; %.2f and %.2f ms "
      "overlapping\n",
      name(hierarchical), f_off.total() * 1e3, b_off.total() * 1e3, f_on.total() * 1e3, b_on.total() * 1e3);
  out_ << formatted(
      "    moving rows %.2f + %.2f ms, experts %.2f ms; overlapped (off - on) / min = %.2f; still "
      "waited for: %.2f + %.2f ms (%.0f %%)\n",
      f_off.of_part() * 1e3, b_off.of_part() * 1e3, experts * 1e3, (off - on) / std::min(moving, experts),
      f_on.of_part() * 1e3, b_on.of_part() * 1e3, 100 * exposed / moving);
}

}  // namespace

void bench_exchange(Backend& backend, const Groups& groups, const MpiWorld& ranks, const ExchangeBench& bench,
                    std::ostream& out) {
  Bench(backend, groups, ranks, bench, out).run();
}

}  // namespace hybridmoe
