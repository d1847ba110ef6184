// Context models of bytes, to compare a trained model with: order k predicts a symbol (a byte or the end of a
// document) from the k symbols before it. Probabilities are counts with interpolated absolute discounting
// (Chen and Goodman, "An empirical study of smoothing techniques for language modeling", 1999, section 2.6):
//   p_k(s | c) = (max(n(c s) - D_k, 0) + D_k distinct(c) p_{k-1}(s | c')) / n(c),
// with c' the context without its oldest symbol, p_{-1} uniform, D_k = n1 / (n1 + 2 n2) where n1 and n2 are
// the numbers of (c, s) counted once and twice. A context that was never counted has the next lower order's
// probability.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "core/data/dataset.h"
#include "core/data/tokenizer.h"

namespace hybridmoe {

class ByteModel {
 public:
  static constexpr int kSymbols = 257;  // bytes, and the end of a document
  static constexpr int kOrders = 3;     // 0, 1, 2

  ByteModel();

  // Counts symbols [first, end) of a run, each after those before it in the run.
  void count(std::span<const std::int32_t> run, std::size_t first);
  // To be called between counting and asking.
  void fit();
  // -log2 of each order's probability of symbol run[at] after the symbols before it in the run: where there
  // are fewer of them than the order, after as many as there are.
  std::array<double, kOrders> bits(std::span<const std::int32_t> run, std::size_t at) const;

 private:
  // Contexts of order k are numbered by the base-257 digits of their symbols, the oldest first.
  struct Order {
    std::vector<std::uint32_t> counts;    // [contexts, kSymbols]
    std::vector<std::uint64_t> total;     // [contexts]
    std::vector<std::uint32_t> distinct;  // [contexts]
    double discount = 0;
  };
  double probability(int order, std::span<const std::int32_t> run, std::size_t at) const;

  std::array<Order, kOrders> orders_;
};

struct Baseline {
  std::array<double, ByteModel::kOrders> bits_per_byte{};
  std::int64_t training_symbols = 0;  // counted
  std::int64_t held_out_targets = 0;  // unmasked tokens
  std::int64_t held_out_bytes = 0;
};

// Fits the models to the targets of the first `training_samples` training samples (0: one epoch) and
// evaluates them on the targets of the first `held_out_samples` held-out samples (0: all), with the same
// limits as the trained model: the context begins with the sample, and with data.document_mask with the
// document. Tokens of several bytes are predicted byte by byte. Throws Error when the data set has no
// held-out samples or no sidecar.
Baseline fit_baseline(const Dataset& dataset, const Tokenizer& tokenizer, std::int64_t training_samples,
                      std::int64_t held_out_samples);

}  // namespace hybridmoe
