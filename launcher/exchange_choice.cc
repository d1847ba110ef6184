#include "launcher/exchange_choice.h"

#include <algorithm>
#include <cstdio>

#include "core/config/layers.h"
#include "core/error.h"
#include "parallel/exchange_trial.h"

namespace hybridmoe {

namespace {

using Exchange = ParallelConfig::Exchange;

// Enough rows to fill a link, and no more: a large model's run must not begin with moving gigabytes.
constexpr std::int64_t kTrialBytes = std::int64_t{64} << 20;

// A micro-batch of the model on this rank.
TrialSize trial_size(const Config& config, const Backend& backend, const Groups& groups) {
  const ModelConfig& model = config.model();
  TrialSize size{.tokens = config.batch().micro_batch_sequences() * std::int64_t{model.sequence_length()} /
                           groups.world->size(),
                 .d = model.d_model(),
                 .experts = model.moe().experts(),
                 .top_k = model.moe().top_k()};
  const std::int64_t token_bytes =
      size.d * size_of(backend.compute_type()) * size.top_k * groups.expert_tensor;
  size.tokens =
      std::clamp<std::int64_t>(size.tokens, 1, std::max<std::int64_t>(1, kTrialBytes / token_bytes));
  return size;
}

// Some host has several ranks of the group: else all pairs of hosts have one message anyway. The same answer
// on all ranks.
bool hosts_differ(const Groups& groups) {
  std::int32_t shared = 0;
  if (groups.relays != nullptr) {
    const std::vector<int>& host_of = groups.relays->host_of;
    const bool several = host_of.front() != host_of.back();
    const bool neighbours = std::adjacent_find(host_of.begin(), host_of.end()) != host_of.end();
    shared = several && neighbours ? 1 : 0;
  }
  groups.world->all_reduce(Tensor(&shared, DType::I32, {1}), ReduceOp::Max, "hosts of experts").wait();
  return shared != 0;
}

MeasuredChoice choice_of(Exchange exchange, const std::string& reason) {
  MeasuredChoice choice;
  choice.set_name("exchange");
  choice.set_value(ParallelConfig::Exchange_Name(exchange));
  choice.set_reason(reason);
  return choice;
}

MeasuredChoice faster(const TransportSeconds& seconds) {
  char text[160];
  std::snprintf(text, sizeof text, "rows of a layer there and back: flat %.2f ms, hierarchical %.2f ms",
                seconds.flat * 1e3, seconds.hierarchical * 1e3);
  return choice_of(seconds.hierarchical < seconds.flat ? ParallelConfig::HIERARCHICAL : ParallelConfig::FLAT,
                   text);
}

}  // namespace

ExchangeOptions exchange_options(const ParallelConfig& parallel) {
  return {.chunks = parallel.exchange_chunks(),
          .overlap = parallel.exchange_overlap(),
          .hierarchical = parallel.exchange() == ParallelConfig::HIERARCHICAL,
          .expected_load = parallel.expected_load(),
          .load_limit = parallel.load_limit()};
}

MeasuredChoice choose_exchange(const Config& config, Backend& backend, const Groups& groups,
                               const MeasuredChoice* before) {
  const Exchange wanted = config.parallel().exchange();
  if (groups.relays == nullptr) return choice_of(ParallelConfig::FLAT, "no expert group spans several hosts");
  if (wanted != ParallelConfig::AUTO) return choice_of(wanted, "as configured");
  if (before != nullptr) {
    Exchange exchange = ParallelConfig::FLAT;
    require(ParallelConfig::Exchange_Parse(before->value(), &exchange), "the checkpoint's exchange ",
            before->value(), " is unknown");
    return choice_of(exchange, "as the run began");
  }
  if (!hosts_differ(groups)) {
    return choice_of(ParallelConfig::FLAT, "no host has several ranks of an expert group that spans hosts");
  }
  return faster(compare_transports(backend, groups, trial_size(config, backend, groups),
                                   exchange_options(config.parallel())));
}

}  // namespace hybridmoe
