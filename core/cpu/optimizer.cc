// The gradient table and AdamW. Elements go in blocks of fixed size; the sums of each block are added up in
// the order of the blocks, so that they do not depend on the number of threads.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "core/cpu/cpu_backend.h"
#include "core/cpu/parallel.h"
#include "core/cpu/vector_math.h"
#include "core/master_weight.h"

namespace hybridmoe::cpu {
namespace {

using Block = ElementBlock;

constexpr std::int64_t kBlockElements = 16384;  // 64 KiB of fp32

void cut_blocks(const std::vector<Segment>& segments, std::vector<Block>& blocks) {
  blocks.clear();
  for (const Segment& segment : segments) {
    for (std::int64_t begin = segment.begin; begin < segment.end; begin += kBlockElements) {
      blocks.push_back({begin, std::min(begin + kBlockElements, segment.end), &segment, {}, 0});
    }
  }
}

bool is_finite(float value) { return (std::bit_cast<std::uint32_t>(value) & 0x7f800000u) != 0x7f800000u; }

void sum_gradient(const float* grad, Block& block) {
  double squares = 0;
  float largest = 0;
  std::int32_t nonfinite = 0;
#pragma omp simd reduction(+ : squares, nonfinite) reduction(max : largest)
  for (std::int64_t i = block.begin; i < block.end; ++i) {
    const bool finite = is_finite(grad[i]);
    const float value = finite ? grad[i] : 0.f;
    const float magnitude = std::fabs(value);
    squares += static_cast<double>(value) * static_cast<double>(value);
    largest = magnitude > largest ? magnitude : largest;
    nonfinite += finite ? 0 : 1;
  }
  block.sum[kGradSquares] = squares;
  block.sum[kGradNonfinite] = nonfinite;
  block.largest = static_cast<double>(largest);
}

// The step's numbers in fp32.
struct Update {
  float clip, beta1, beta2, one_minus_beta1, one_minus_beta2, rate, correction1, correction2, eps, decay,
      least_second;
};

Update update_of(const AdamW& op) {
  const double* scalars = op.scalars.ptr<double>();
  return {static_cast<float>(scalars[kClipFactor]), static_cast<float>(op.beta1),
          static_cast<float>(op.beta2), static_cast<float>(1 - op.beta1), static_cast<float>(1 - op.beta2),
          static_cast<float>(scalars[kLearningRate]), static_cast<float>(1 / scalars[kBiasCorrection1]),
          static_cast<float>(1 / scalars[kBiasCorrection2]), static_cast<float>(op.eps),
          static_cast<float>(op.weight_decay),
          // Above zero whatever eps is: an element that never had a gradient adds 0, not 0/0.
          std::max(static_cast<float>(op.eps * op.eps), std::numeric_limits<float>::min())};
}

// Where a block's master weights come from and go to. In the weights themselves:
struct MasterIsWeight {
  float* weight;

  explicit MasterIsWeight(const AdamW& op) : weight(op.weight.ptr<float>()) {}
  float get(std::int64_t i) const { return weight[i]; }
  void set(std::int64_t i, float value) const { weight[i] = value; }
};
// Beside bf16 weights:
struct MasterApart {
  float* master;
  BFloat16* weight;

  explicit MasterApart(const AdamW& op) : master(op.master.ptr<float>()), weight(op.weight.ptr<BFloat16>()) {}
  float get(std::int64_t i) const { return master[i]; }
  void set(std::int64_t i, float value) const {
    master[i] = value;
    weight[i].bits = split_master(std::bit_cast<std::uint32_t>(value)).weight;
  }
};
// In bf16 weights and their remainders:
struct MasterInHalves {
  BFloat16* weight;
  std::uint16_t* remainder;

  explicit MasterInHalves(const AdamW& op)
      : weight(op.weight.ptr<BFloat16>()), remainder(op.remainder.ptr<std::uint16_t>()) {}
  float get(std::int64_t i) const { return std::bit_cast<float>(join_master(weight[i].bits, remainder[i])); }
  void set(std::int64_t i, float value) const {
    const MasterHalves halves = split_master(std::bit_cast<std::uint32_t>(value));
    weight[i].bits = halves.weight;
    remainder[i] = halves.remainder;
  }
};

template <class Master>
void update_block(const AdamW& op, const Update& u, Block& block) {
  const Master master(op);
  const float* grad = op.grad.ptr<float>();
  float* first = op.m.ptr<float>();
  float* second = op.v.ptr<float>();
  const float decay = block.segment->decay ? u.decay : 0.f;
  // Short sums in fp32, their sum in double: converting every term would cost as much as the update itself.
  constexpr std::int64_t kTerms = 1024;
  double sums[kUpdateColumns] = {};
  for (std::int64_t begin = block.begin; begin < block.end; begin += kTerms) {
    const std::int64_t end = std::min(begin + kTerms, block.end);
    float weights = 0, updates = 0, ratios = 0;
#pragma omp simd reduction(+ : weights, updates, ratios)
    for (std::int64_t i = begin; i < end; ++i) {
      const float g = grad[i] * u.clip;
      const float m = u.beta1 * first[i] + u.one_minus_beta1 * g;
      const float v = u.beta2 * second[i] + u.one_minus_beta2 * g * g;
      const float second_moment = v * u.correction2;
      const float step = m * u.correction1 / (std::sqrt(second_moment) + u.eps);
      const float before = master.get(i);
      const float change = u.rate * (step + decay * before);
      const float value = before - change;
      first[i] = m;
      second[i] = v;
      master.set(i, value);
      weights += value * value;
      updates += change * change;
      ratios += g * g / (second_moment > u.least_second ? second_moment : u.least_second);
    }
    sums[kParamSquares] += static_cast<double>(weights);
    sums[kUpdateSquares] += static_cast<double>(updates);
    sums[kAdamSquares] += static_cast<double>(ratios);
  }
  std::copy_n(sums, kUpdateColumns, block.sum);
}

}  // namespace

void CpuBackend::grad_table(const GradTable& op, Stream*) {
  static_assert(int{kGradColumns} <= int{kUpdateColumns});
  cut_blocks(*op.segments, blocks_);
  const float* grad = op.grad.ptr<float>();
  parallel_ranges(options_.threads, static_cast<std::int64_t>(blocks_.size()), 1,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t b = begin; b < end; ++b) sum_gradient(grad, blocks_[b]);
                  });
  for (const Block& block : blocks_) {
    const std::int64_t row = block.segment->row;
    for (int i = 0; i < kGradColumns; ++i) op.table.ptr<double>()[row * kGradColumns + i] += block.sum[i];
    if (op.absmax.empty()) continue;
    double& largest = op.absmax.ptr<double>()[row];
    largest = std::max(largest, block.largest);
  }
  progress();
}

void CpuBackend::step_scalars(const StepScalars& op, Stream*) {
  double squares = 0, nonfinite = 0;
  for (std::int64_t row = 0; row < op.table.rows(); ++row) {
    squares += op.table.ptr<double>()[row * kGradColumns + kGradSquares];
    nonfinite += op.table.ptr<double>()[row * kGradColumns + kGradNonfinite];
  }
  const double norm = std::sqrt(squares);
  const auto t = static_cast<double>(op.applied_steps + 1);
  double* scalars = op.scalars.ptr<double>();
  scalars[kGradNorm] = norm;
  scalars[kClipFactor] = op.max_norm == 0 ? 1. : std::min(1., op.max_norm / (norm + 1e-6));
  scalars[kSkip] = nonfinite != 0 || !std::isfinite(squares) ? 1 : 0;
  scalars[kLearningRate] = op.learning_rate;
  scalars[kBiasCorrection1] = 1 - std::pow(op.beta1, t);
  scalars[kBiasCorrection2] = 1 - std::pow(op.beta2, t);
}

void CpuBackend::adamw(const AdamW& op, Stream*) {
  if (op.scalars.ptr<double>()[kSkip] != 0) return;
  const bool apart = op.weight.dtype == DType::BF16;
  require(apart || op.master.data == op.weight.data, "adamw: fp32 weights are their own masters");
  const Update update = update_of(op);
  cut_blocks(*op.segments, blocks_);
  const auto update_one = !op.remainder.empty() ? update_block<MasterInHalves>
                          : apart               ? update_block<MasterApart>
                                                : update_block<MasterIsWeight>;
  parallel_ranges(options_.threads, static_cast<std::int64_t>(blocks_.size()), 1,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t b = begin; b < end; ++b) update_one(op, update, blocks_[b]);
                  });
  if (!op.table.empty()) {
    for (const Block& block : blocks_) {
      double* const row = op.table.ptr<double>() + block.segment->row * kUpdateColumns;
      for (int i = 0; i < kUpdateColumns; ++i) row[i] += block.sum[i];
    }
  }
  progress();
}

void CpuBackend::split_master(const SplitMaster& op, Stream*) {
  const float* master = op.master.ptr<float>();
  BFloat16* weight = op.weight.ptr<BFloat16>();
  std::uint16_t* remainder = op.remainder.empty() ? nullptr : op.remainder.ptr<std::uint16_t>();
  parallel_ranges(
      options_.threads, op.master.elements(), kBlockElements, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t i = begin; i < end; ++i) {
          const MasterHalves halves = hybridmoe::split_master(std::bit_cast<std::uint32_t>(master[i]));
          weight[i].bits = halves.weight;
          if (remainder != nullptr) remainder[i] = halves.remainder;
        }
      });
}

void CpuBackend::join_master(const JoinMaster& op, Stream*) {
  const BFloat16* weight = op.weight.ptr<BFloat16>();
  const std::uint16_t* remainder = op.remainder.ptr<std::uint16_t>();
  float* master = op.master.ptr<float>();
  parallel_ranges(options_.threads, op.master.elements(), kBlockElements,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t i = begin; i < end; ++i)
                      master[i] = std::bit_cast<float>(hybridmoe::join_master(weight[i].bits, remainder[i]));
                  });
}

}  // namespace hybridmoe::cpu
