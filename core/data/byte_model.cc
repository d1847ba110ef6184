#include "core/data/byte_model.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace hybridmoe {
namespace {

constexpr std::int32_t kEndSymbol = 256;

std::size_t context_of(int order, std::span<const std::int32_t> run, std::size_t at) {
  std::size_t context = 0;
  for (int k = order; k > 0; --k) context = context * ByteModel::kSymbols + run[at - k];
  return context;
}

}  // namespace

ByteModel::ByteModel() {
  std::size_t contexts = 1;
  for (Order& order : orders_) {
    order.counts.resize(contexts * kSymbols);
    order.total.resize(contexts);
    order.distinct.resize(contexts);
    contexts *= kSymbols;
  }
}

void ByteModel::count(std::span<const std::int32_t> run, std::size_t first) {
  for (std::size_t at = first; at < run.size(); ++at) {
    for (int order = 0; order < kOrders && static_cast<std::size_t>(order) <= at; ++order) {
      ++orders_[order].counts[context_of(order, run, at) * kSymbols + run[at]];
    }
  }
}

void ByteModel::fit() {
  for (Order& order : orders_) {
    std::int64_t once = 0, twice = 0;
    for (std::size_t context = 0; context < order.total.size(); ++context) {
      order.total[context] = 0;
      order.distinct[context] = 0;
      for (int symbol = 0; symbol < kSymbols; ++symbol) {
        const std::uint32_t n = order.counts[context * kSymbols + symbol];
        order.total[context] += n;
        order.distinct[context] += n > 0;
        once += n == 1;
        twice += n == 2;
      }
    }
    // Of very small or very regular texts nothing was counted once: half a count is then as good as any.
    order.discount =
        once > 0 ? static_cast<double>(once) / (static_cast<double>(once) + 2 * static_cast<double>(twice))
                 : 0.5;
  }
}

double ByteModel::probability(int order, std::span<const std::int32_t> run, std::size_t at) const {
  const double lower = order == 0 ? 1.0 / kSymbols : probability(order - 1, run, at);
  const Order& model = orders_[order];
  const std::size_t context = context_of(order, run, at);
  if (model.total[context] == 0) return lower;
  const double seen = std::max(0.0, model.counts[context * kSymbols + run[at]] - model.discount);
  return (seen + model.discount * model.distinct[context] * lower) /
         static_cast<double>(model.total[context]);
}

std::array<double, ByteModel::kOrders> ByteModel::bits(std::span<const std::int32_t> run,
                                                       std::size_t at) const {
  std::array<double, kOrders> bits{};
  for (int order = 0; order < kOrders; ++order) {
    bits[order] = -std::log2(
        probability(std::min(order, static_cast<int>(std::min<std::size_t>(at, kOrders))), run, at));
  }
  return bits;
}

namespace {

// Cuts samples into runs of symbols that a model may see together.
class Runs {
 public:
  Runs(const Tokenizer& tokenizer, std::int32_t length)
      : tokenizer_(tokenizer), inputs_(length), targets_(length), doc_start_(length) {}

  std::int32_t* inputs() { return inputs_.data(); }
  std::int32_t* targets() { return targets_.data(); }
  std::int32_t* doc_start() { return doc_start_.data(); }

  // Calls use(run, first): the symbols [first, end) are those of unmasked targets.
  template <class Use>
  void for_each(const Use& use) {
    const int length = static_cast<int>(inputs_.size());
    for (int begin = 0, end; begin < length; begin = end) {
      for (end = begin + 1; end < length && doc_start_[end] == doc_start_[begin];) ++end;
      run_.clear();
      append(inputs_[begin]);
      const std::size_t first = run_.size();
      for (int j = begin; j < end && targets_[j] >= 0; ++j) append(targets_[j]);
      use(std::span<const std::int32_t>(run_), first);
    }
  }

 private:
  void append(std::int32_t token) {
    if (token == tokenizer_.end_of_document()) {
      run_.push_back(kEndSymbol);
      return;
    }
    for (const char byte : tokenizer_.token_text(token)) run_.push_back(static_cast<unsigned char>(byte));
  }

  const Tokenizer& tokenizer_;
  std::vector<std::int32_t> inputs_, targets_, doc_start_, run_;
};

}  // namespace

Baseline fit_baseline(const Dataset& dataset, const Tokenizer& tokenizer, std::int64_t training_samples,
                      std::int64_t held_out_samples) {
  require(dataset.held_out_samples() > 0, "data.held_out is 0: there is no held-out split to evaluate on");
  require(dataset.info() != nullptr, "a source of the data has no .info, so its tokens' bytes are unknown");
  if (training_samples == 0) training_samples = dataset.training_samples_per_epoch();
  if (held_out_samples == 0) held_out_samples = dataset.held_out_samples();
  ByteModel model;
  Baseline result;
  Runs runs(tokenizer, dataset.sequence_length());
  for (std::int64_t i = 0; i < training_samples; ++i) {
    dataset.training_sample(i, runs.inputs(), runs.targets(), runs.doc_start());
    runs.for_each([&](std::span<const std::int32_t> run, std::size_t first) {
      model.count(run, first);
      result.training_symbols += static_cast<std::int64_t>(run.size() - first);
    });
  }
  model.fit();
  std::array<double, ByteModel::kOrders> sum{};
  for (std::int64_t i = 0; i < std::min(held_out_samples, dataset.held_out_samples()); ++i) {
    dataset.held_out_sample(i, runs.inputs(), runs.targets(), runs.doc_start());
    runs.for_each([&](std::span<const std::int32_t> run, std::size_t first) {
      for (std::size_t at = first; at < run.size(); ++at) {
        const auto bits = model.bits(run, at);
        for (int order = 0; order < ByteModel::kOrders; ++order) sum[order] += bits[order];
      }
    });
    for (std::int32_t j = 0; j < dataset.sequence_length(); ++j)
      result.held_out_targets += runs.targets()[j] >= 0;
    result.held_out_bytes += dataset.held_out_target_bytes(i);
  }
  require(result.held_out_bytes > 0, "the held-out samples stand for no text");
  for (int order = 0; order < ByteModel::kOrders; ++order) {
    result.bits_per_byte[order] = sum[order] / static_cast<double>(result.held_out_bytes);
  }
  return result;
}

}  // namespace hybridmoe
