#include "launcher/step_meter.h"

#include <algorithm>
#include <cmath>

namespace hybridmoe {

namespace {

// Behind the table of updates in the sums: two numbers a layer, the following ones, then three a rank.
enum LayerSum : int { kResidSquares, kDresidSquares, kLayerSums };
enum SingleSum : int { kLse, kLocalSquares, kSingleSums };
enum RankSecond : int {
  kStepSeconds,
  kCommunicationSeconds,
  kWaitingSeconds,
  kDataWork,
  kForwardWork,
  kBackwardWork,
  kRankSeconds
};
// Behind the largest gradients in the maxima: two numbers a layer, one a MoE layer, then the following ones.
enum LayerMax : int { kResidAbsmax, kAttnLogitMax, kLayerMaxima };
enum SingleMax : int { kLseMax, kOutputLogitMax, kSingleMaxima };

// Weights that are compared with their masters at once; on a device each comparison is a copy to the host.
std::int64_t rounded_at_once(const Backend& backend) {
  return std::int64_t{1} << (backend.device() == Device::CPU ? 14 : 22);
}

// Whose gradients tell the noise: matrices that every token meets, each whole on one tensor group.
bool is_dense(TensorKind kind) {
  switch (kind) {
    case TensorKind::AttnOut:
    case TensorKind::DenseGate:
    case TensorKind::DenseUp:
    case TensorKind::DenseDown:
    case TensorKind::SharedGate:
    case TensorKind::SharedUp:
    case TensorKind::SharedDown:
    case TensorKind::Embedding:
    case TensorKind::Head:
      return true;
    default:
      return false;
  }
}

bool of_experts(TensorKind kind) {
  return kind == TensorKind::ExpertGate || kind == TensorKind::ExpertUp || kind == TensorKind::ExpertDown;
}

template <class Value>
RankSpread spread(int ranks, const Value& value) {
  RankSpread result{value(0), 0, value(0), 0};
  for (int rank = 0; rank < ranks; ++rank) {
    const double seconds = value(rank);
    result.min = std::min(result.min, seconds);
    result.mean += seconds / ranks;
    if (seconds > result.max) result.max = seconds, result.max_rank = rank;
  }
  return result;
}

}  // namespace

StepMeter::StepMeter(const Config& config, ParameterStore& parameters, const Groups& groups, Backend& backend,
                     HostParts& host)
    : config_(config.telemetry()),
      experts_(config.model().moe().experts()),
      parameters_(parameters),
      groups_(groups),
      backend_(backend),
      host_(host),
      planned_(config.telemetry().enabled() && config.telemetry().metrics()),
      on_(planned_) {}

void StepMeter::plan(MemoryPlan& memory, int layers, int moe_layers) {
  if (!on_) return;
  layers_ = layers;
  moe_layers_ = moe_layers;
  const auto add = [&](Tensor* tensor, const char* name, const Shape& shape) {
    memory.add_shared(tensor, name, shape, DType::F64, "statistics");
  };
  add(&sums_, "measured sums",
      {rows() * kUpdateColumns + layers * kLayerSums + kSingleSums + groups_.world->size() * kRankSeconds});
  add(&maxima_, "measured maxima", {rows() + layers * kLayerMaxima + moe_layers + kSingleMaxima});
  add(&local_squares_, "squares before sharding", {1, kGradColumns});
  if (moe_layers > 0) add(&expert_table_, "squares of experts", {moe_layers * experts_, kGradColumns});
  if (config_.check_every() > 0 && backend_.compute_type() != backend_.statistics_type()) {
    memory.add(&rounded_, "rounded masters", {rounded_at_once(backend_)}, backend_.compute_type(),
               "statistics");
  }
  lay_out_experts();
  lay_out_dense();
}

// An owned range may reach over several experts.
void StepMeter::lay_out_experts() {
  std::vector<int> moe_layers;
  for (const GradientRow& row : parameters_.table()) {
    if (row.kind == TensorKind::ExpertDown) moe_layers.push_back(row.layer);
  }
  for (const auto& bucket : parameters_.buckets()) {
    std::vector<Segment>& segments = expert_segments_.emplace_back();
    for (const auto& range : bucket.owned) {
      if (!of_experts(range.kind)) continue;
      const ParameterSpec& spec = parameters_.spec(range.parameter);
      const std::int64_t per_expert = spec.global_shape.elements() / experts_;
      const auto layer = std::find(moe_layers.begin(), moe_layers.end(), spec.layer) - moe_layers.begin();
      for (std::int64_t done = 0; done < range.length;) {
        const std::int64_t at = range.global_begin + done, expert = at / per_expert;
        const std::int64_t n = std::min(range.length - done, (expert + 1) * per_expert - at);
        segments.push_back({range.shard_begin + done, range.shard_begin + done + n,
                            static_cast<std::int32_t>(layer * experts_ + expert)});
        done += n;
      }
    }
  }
}

void StepMeter::lay_out_dense() {
  for (ParameterStore::Id id = 0; id < parameters_.size(); ++id) {
    const ParameterSpec& spec = parameters_.spec(id);
    if (spec.runs.empty() || !is_dense(spec.runs.front().kind)) continue;
    dense_.push_back({id, {{0, spec.local_shape.elements(), 0}}});
  }
}

void StepMeter::start() {
  if (!on_) return;
  row_elements_.assign(rows(), 0);
  for (const auto& bucket : parameters_.buckets()) {
    for (const Segment& segment : bucket.segments) {
      row_elements_[segment.row] += static_cast<double>(segment.end - segment.begin);
    }
  }
  groups_.world->all_reduce(Tensor(row_elements_.data(), DType::F64, {rows()}), ReduceOp::Sum, "row elements")
      .wait();
}

void StepMeter::begin(std::int64_t step) {
  step_ = step;
  measures_ = {};
  if (!on_) return;
  backend_.zero(sums_, nullptr);
  backend_.zero(maxima_, nullptr);
  backend_.zero(local_squares_, nullptr);
}

void StepMeter::before_sharding(int stage) {
  if (!due(config_.noise_every()) || groups_.data->size() == 1) return;
  for (const Dense& dense : dense_) {
    if (parameters_.spec(dense.id).ready_stage != stage) continue;
    const Tensor gradient = parameters_.gradient(dense.id);
    backend_.grad_table({.grad = gradient.reshape({gradient.elements()}),
                         .segments = &dense.segments,
                         .table = local_squares_},
                        nullptr);
  }
}

void StepMeter::check(const Tensor& table, const std::vector<SharedTensor>& on_all_ranks) {
  if (due(config_.expert_every()) && moe_layers_ > 0) {
    backend_.zero(expert_table_, nullptr);
    for (std::size_t b = 0; b < expert_segments_.size(); ++b) {
      backend_.grad_table({.grad = parameters_.buckets()[b].owned_gradient(),
                           .segments = &expert_segments_[b],
                           .table = expert_table_},
                          nullptr);
    }
    experts_summed_ = groups_.world->all_reduce(expert_table_, ReduceOp::Sum, "squares of experts");
  }
  if (!due(config_.check_every())) return;
  measures_.table_error = check_gradient_table(parameters_, table, groups_, host_);
  ReplicaReport replicas = check_replicas(parameters_, on_all_ranks, rounded_, backend_, host_, groups_);
  measures_.replica_mismatches = replicas.copies;
  measures_.mismatches = std::move(replicas.mismatches);
}

void StepMeter::start_reductions(const ModelStatistics& local, const StepSeconds& seconds) {
  if (!on_) return;
  backend_.synchronize(nullptr);
  double* sum = sums_.ptr<double>() + rows() * kUpdateColumns;
  for (int layer = 0; layer < layers_; ++layer, sum += kLayerSums) {
    sum[kResidSquares] = local.resid_squares[layer];
    sum[kDresidSquares] = local.dresid_squares[layer];
  }
  // Tensor ranks share their tokens: one of them brings what each counts for all.
  sum[kLse] = groups_.tensor->rank() == 0 ? local.lse : 0;
  sum[kLocalSquares] = local_squares_.ptr<double>()[kGradSquares];
  sum += kSingleSums + groups_.world->rank() * kRankSeconds;
  sum[kStepSeconds] = seconds.total;
  sum[kCommunicationSeconds] = seconds.communication;
  sum[kWaitingSeconds] = seconds.waiting;
  sum[kDataWork] = seconds.work.data;
  sum[kForwardWork] = seconds.work.forward;
  sum[kBackwardWork] = seconds.work.backward;

  double* most = maxima_.ptr<double>() + rows();
  for (int layer = 0; layer < layers_; ++layer, most += kLayerMaxima) {
    most[kResidAbsmax] = local.resid_absmax[layer];
    most[kAttnLogitMax] = local.attn_logit_max[layer];
  }
  for (const auto& moe : local.moe) *most++ = moe.logit_max;
  most[kLseMax] = local.lse_max;
  most[kOutputLogitMax] = local.output_logit_max;
  summed_ = groups_.world->all_reduce(sums_, ReduceOp::Sum, "measured sums");
  maximum_ = groups_.world->all_reduce(maxima_, ReduceOp::Max, "measured maxima");
}

StepMeasures StepMeter::finish(const Tensor& table, double targets, std::int64_t tokens) {
  if (!on_) return {};
  summed_.wait();
  maximum_.wait();
  StepMeasures& m = measures_;
  m.measured = true;
  const double *sum = sums_.ptr<double>(), *most = maxima_.ptr<double>();
  for (std::int64_t row = 0; row < rows(); ++row, sum += kUpdateColumns) {
    m.grad_absmax.push_back(*most++);
    m.param_squares.push_back(sum[kParamSquares]);
    m.update_squares.push_back(sum[kUpdateSquares]);
    m.adam_squares.push_back(sum[kAdamSquares]);
  }
  for (int layer = 0; layer < layers_; ++layer, sum += kLayerSums, most += kLayerMaxima) {
    m.resid_squares.push_back(sum[kResidSquares]);
    m.dresid_squares.push_back(sum[kDresidSquares]);
    m.resid_absmax.push_back(most[kResidAbsmax]);
    m.attn_logit_max.push_back(most[kAttnLogitMax]);
  }
  for (int layer = 0; layer < moe_layers_; ++layer) m.router_logit_max.push_back(*most++);
  m.lse_mean = targets > 0 ? sum[kLse] / targets : 0;
  m.lse_max = most[kLseMax];
  m.output_logit_max = most[kOutputLogitMax];
  if (due(config_.noise_every())) m.gradient_noise_scale = noise_scale(table, sum[kLocalSquares], tokens);
  sum += kSingleSums;
  const auto of_rank = [&](int rank, RankSecond what) { return sum[rank * kRankSeconds + what]; };
  const int ranks = groups_.world->size();
  const auto spread_of = [&](RankSecond what) {
    return spread(ranks, [&](int rank) { return of_rank(rank, what); });
  };
  m.waiting_seconds = spread_of(kWaitingSeconds);
  m.step_seconds = spread_of(kStepSeconds);
  m.communication_seconds = spread_of(kCommunicationSeconds);
  m.data_work = spread_of(kDataWork);
  m.forward_work = spread_of(kForwardWork);
  m.backward_work = spread_of(kBackwardWork);
  m.compute_seconds =
      spread(ranks, [&](int rank) { return of_rank(rank, kStepSeconds) - of_rank(rank, kWaitingSeconds); });
  if (due(config_.expert_every()) && moe_layers_ > 0) {
    experts_summed_.wait();
    for (std::int64_t i = 0; i < expert_table_.rows(); ++i) {
      m.expert_squares.push_back(expert_table_.ptr<double>()[i * kGradColumns + kGradSquares]);
    }
  }
  return std::move(measures_);
}

// arXiv 1812.06162, appendix A.1: tr(Σ) / |G|² from the squared norms of gradients of two batch sizes, the
// whole batch and what one data-parallel rank has of it. A rank's gradient g is its tokens' part of the
// whole sum, so its mean gradient is D g, and the mean of |D g|² over the D ranks is D Σ |g|².
double StepMeter::noise_scale(const Tensor& table, double local_squares, std::int64_t tokens) const {
  const double ranks = groups_.data->size();
  constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
  if (ranks == 1) return kUnknown;
  double large = 0;
  for (std::int64_t row = 0; row < rows(); ++row) {
    if (is_dense(parameters_.table()[row].kind)) {
      large += table.ptr<double>()[row * kGradColumns + kGradSquares];
    }
  }
  const double small = ranks * local_squares;
  const double big_batch = static_cast<double>(tokens), small_batch = big_batch / ranks;
  const double signal = (big_batch * large - small_batch * small) / (big_batch - small_batch);
  const double noise = (small - large) / (1 / small_batch - 1 / big_batch);
  return signal > 0 ? noise / signal : kUnknown;  // drowned in the noise: the batch is far too small to tell
}

}  // namespace hybridmoe
