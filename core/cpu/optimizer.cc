// The gradient table and AdamW. Elements go in blocks of fixed size; the sums of each block are added up in
// the order of the blocks, so that they do not depend on the number of threads.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "core/cpu/cpu_backend.h"
#include "core/cpu/parallel.h"
#include "core/cpu/vector_math.h"

namespace hybridmoe::cpu {
namespace {

using Block = ElementBlock;

void cut_blocks(const std::vector<Segment>& segments, std::vector<Block>& blocks) {
  constexpr std::int64_t kElements = 16384;  // 64 KiB of fp32
  blocks.clear();
  for (const Segment& segment : segments) {
    for (std::int64_t begin = segment.begin; begin < segment.end; begin += kElements) {
      blocks.push_back({begin, std::min(begin + kElements, segment.end), &segment, {}, 0});
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

// C is BFloat16 where the weights are kept apart from the master copy.
template <class C>
void update_block(const AdamW& op, const Update& u, Block& block) {
  const float* grad = op.grad.ptr<float>();
  float* master = op.master.ptr<float>();
  float* first = op.m.ptr<float>();
  float* second = op.v.ptr<float>();
  C* weight = op.weight.ptr<C>();
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
      const float change = u.rate * (step + decay * master[i]);
      const float value = master[i] - change;
      first[i] = m;
      second[i] = v;
      master[i] = value;
      if constexpr (!std::is_same_v<C, float>) weight[i] = from_float<C>(value);
      weights += value * value;
      updates += change * change;
      ratios += g * g / (second_moment > u.least_second ? second_moment : u.least_second);
    }
    sums[kParamSquares] += static_cast<double>(weights);
    sums[kUpdateSquares] += static_cast<double>(updates);
    sums[kAdamSquares] += static_cast<double>(ratios);
  }
  if constexpr (std::is_same_v<C, float>) {
    if (weight != master) std::copy(master + block.begin, master + block.end, weight + block.begin);
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
  const Update update = update_of(op);
  cut_blocks(*op.segments, blocks_);
  parallel_ranges(options_.threads, static_cast<std::int64_t>(blocks_.size()), 1,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t b = begin; b < end; ++b) {
                      with_compute_type([&]<class C>(C) { update_block<C>(op, update, blocks_[b]); });
                    }
                  });
  if (!op.table.empty()) {
    for (const Block& block : blocks_) {
      double* const row = op.table.ptr<double>() + block.segment->row * kUpdateColumns;
      for (int i = 0; i < kUpdateColumns; ++i) row[i] += block.sum[i];
    }
  }
  progress();
}

}  // namespace hybridmoe::cpu
