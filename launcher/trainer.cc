#include "launcher/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <utility>

#include "core/files/checksum.h"
#include "core/schedule.h"

namespace hybridmoe {

namespace {

// Behind the gradient table in the step's sums.
enum StepSum : int { kCrossEntropy, kStop, kStepSums };

class Stopwatch {
 public:
  double lap() {
    const auto now = std::chrono::steady_clock::now();
    const double seconds = std::chrono::duration<double>(now - last_).count(), waited = seconds_waited();
    last_ = now;
    worked_ = seconds - (waited - waited_);
    waited_ = waited;
    return seconds;
  }
  double worked() const { return worked_; }  // of the last lap, without waiting for other ranks

 private:
  double waited_ = seconds_waited(), worked_ = 0;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// Memory is what a GPU is short of; on a CPU checks find more with masters apart.
OptimizerState optimizer_state(const Config& config, const Backend& backend) {
  switch (config.optimizer().master_weights()) {
    case OptimizerConfig::FP32:
      return OptimizerState::Masters;
    case OptimizerConfig::REMAINDERS:
      return OptimizerState::Remainders;
    default:
      return backend.device() == Device::CPU ? OptimizerState::Masters : OptimizerState::Remainders;
  }
}

}  // namespace

Trainer::Trainer(const Config& config, const Dataset& data, Backend& backend, const Groups& groups,
                 RowExchange* exchange)
    : config_(config),
      data_(data),
      backend_(backend),
      groups_(groups),
      host_(backend),
      masters_(backend, host_),
      memory_(backend.granule(), groups.world->rank()),
      model_(config.model(), config.optimizer(), backend, groups, exchange, parameters_),
      sync_(parameters_),
      meter_(config, parameters_, groups, backend, host_),
      length_(config.model().sequence_length()),
      exceptions_at_start_(std::uncaught_exceptions()) {
  const BatchConfig& batch = config.batch();
  const std::int64_t ranks = groups.data->size();
  require(batch.micro_batch_sequences() % ranks == 0,
          "batch.micro_batch_sequences: ", batch.micro_batch_sequences(), " sequences cannot be split over ",
          ranks, " data-parallel ranks");
  micro_batches_ = batch.sequences() / batch.micro_batch_sequences();
  local_sequences_ = batch.micro_batch_sequences() / ranks;

  parameters_.plan(memory_, backend.compute_type(), backend.statistics_type(),
                   config.parallel().bucket_bytes(), optimizer_state(config, backend));
  model_.set_layer_statistics(meter_.on());
  model_.plan(memory_, {.sequences = local_sequences_, .length = length_});
  const std::int64_t tokens = micro_batches_ * local_sequences_ * length_;
  tokens_.plan(memory_, backend, "tokens", {tokens}, DType::I32, "batch");
  targets_.plan(memory_, backend, "targets", {tokens}, DType::I32, "batch");
  doc_start_.plan(memory_, backend, "document starts", {tokens}, DType::I32, "batch");
  const auto rows = static_cast<std::int64_t>(parameters_.table().size());
  const auto moe_layers = static_cast<std::int64_t>(model_.moe_layers().size());
  memory_.add_shared(&sums_, "step sums", {rows * kGradColumns + kStepSums + moe_layers}, DType::F64,
                     "statistics");
  meter_.plan(memory_, model_.layers(), static_cast<int>(moe_layers));
  scalars_.plan(memory_, backend, "step scalars", {kStepScalars}, DType::F64, "statistics");
  model_.set_before_stage([this](int stage) {
    Stopwatch watch;
    sync_.wait_weights(stage);
    weight_seconds_ += watch.lap();
  });
}

Trainer::~Trainer() {
  if (std::uncaught_exceptions() > exceptions_at_start_) return;
  try {
    sync_.wait_weights();
  } catch (const std::exception&) {  // whoever uses the communicator next is told
  }
}

void Trainer::start() {
  memory_.commit(backend_);
  model_.prepare();
  parameters_.initialise(config_.seed(), backend_);
  meter_.start();
}

void Trainer::upload_samples() {
  for (const Mirrored* samples : {&tokens_, &targets_, &doc_start_}) {
    samples->upload(backend_, backend_.main_stream());
  }
}

void Trainer::load_samples(std::int64_t first) {
  const std::int64_t per_micro_batch = config_.batch().micro_batch_sequences();
  for (std::int64_t m = 0; m < micro_batches_; ++m) {
    for (std::int64_t s = 0; s < local_sequences_; ++s) {
      const std::int64_t sample = own_samples(first) + m * per_micro_batch + s;
      const std::int64_t at = (m * local_sequences_ + s) * length_;
      try {
        data_.training_sample(sample, host_tokens(at), host_targets(at), host_doc_start(at));
      } catch (const Error& bad_data) {
        throw Error(cat("training sample ", data_.origin(sample).number, ": ", bad_data.what(),
                        "; or leave the sample out with data.skip"));
      }
    }
  }
}

std::uint32_t Trainer::batch_hash() const {
  Xxh3Stream hash;
  for (const Mirrored* samples : {&tokens_, &targets_}) {
    const Tensor host = samples->host();
    hash.add({static_cast<const char*>(host.data), static_cast<std::size_t>(host.bytes())});
  }
  return static_cast<std::uint32_t>(hash.value() & 0xffffff);
}

MicroBatch Trainer::micro_batch(std::int64_t index) const {
  const std::int64_t begin = index * local_sequences_ * length_, end = begin + local_sequences_ * length_;
  MicroBatch batch;
  batch.tokens = tokens_.device().rows(begin, end);
  batch.targets = targets_.device().rows(begin, end);
  if (config_.data().document_mask()) batch.doc_start = doc_start_.device().rows(begin, end);
  batch.sequences = local_sequences_;
  batch.length = length_;
  return batch;
}

StepResult Trainer::step(bool stop) {
  StepResult result;
  Stopwatch total, watch;
  result.step = progress_.step + 1;
  result.samples_begin = progress_.samples_consumed;
  result.samples_end = result.samples_begin + config_.batch().sequences();
  result.tokens = tokens_per_step();
  step_begin_ = std::chrono::steady_clock::now();
  waited_before_ = seconds_waited();
  meter_.begin(result.step);
  groups_.mark_step(result.step);
  groups_.mark_phase("data");
  std::string error;
  try {
    load_samples(result.samples_begin);
  } catch (const Error& bad_data) {
    error = bad_data.what();
  }
  groups_.world->agree(error, "training samples");
  upload_samples();
  result.batch_hash = batch_hash();
  result.seconds.data = watch.lap();
  result.seconds.work.data = watch.worked();

  run_micro_batches(&result);
  reduce_sums(stop, &result);
  update(&result);

  progress_.step = result.step;
  progress_.samples_consumed = result.samples_end;
  if (!result.skipped) {
    ++progress_.applied_steps;
    update_biases(result);
  }
  result.seconds.total = total.lap();
  return result;
}

void Trainer::run_micro_batches(StepResult* result) {
  Stopwatch watch;
  for (auto& bucket : parameters_.buckets()) backend_.zero(bucket.gradient, nullptr);
  // The mean runs over the unmasked targets of the whole step.
  std::int64_t targets = 0;
  for (std::int64_t i = 0; i < targets_.host().elements(); ++i) targets += *host_targets(i) >= 0;
  result->own.targets = static_cast<double>(targets);
  groups_.data->all_reduce(Tensor(&targets, DType::I64, {1}), ReduceOp::Sum, "target count").wait();
  LossScale scale;
  scale.cross_entropy = targets > 0 ? 1 / static_cast<double>(targets) : 0;
  scale.global_tokens = config_.batch().micro_batch_sequences() * length_;
  scale.micro_batches = micro_batches_;
  scale.moe_layers = std::max<int>(1, static_cast<int>(model_.moe_layers().size()));
  ModelStatistics& statistics = result->model;
  result->seconds.data += watch.lap();
  result->seconds.work.data += watch.worked();
  for (std::int64_t m = 0; m < micro_batches_; ++m) {
    groups_.mark_phase("forward");
    const bool last = m + 1 == micro_batches_;
    model_.forward_backward(micro_batch(m), scale, &statistics, [&](int stage) {
      if (stage == 0) {
        // The one wait within a micro-batch: else the time would be that of queuing.
        backend_.synchronize(backend_.main_stream());
        result->seconds.forward += watch.lap() - weight_seconds_;
        result->seconds.work.forward += watch.worked();
        result->seconds.communication += std::exchange(weight_seconds_, 0);
        groups_.mark_phase("backward");
      }
      if (!last) return;
      meter_.before_sharding(stage);
      sync_.stage_done(stage);
    });
    result->seconds.backward += watch.lap();
    result->seconds.work.backward += watch.worked();
  }
  statistics.targets = static_cast<double>(targets);
}

void Trainer::reduce_sums(bool stop, StepResult* result) {
  Stopwatch watch;
  groups_.mark_phase("gradients");
  sync_.wait_gradients();
  result->seconds.communication += watch.lap();
  const Tensor table = gradient_table();
  const std::int64_t rows = table.rows();
  backend_.zero(sums_, nullptr);
  for (auto& bucket : parameters_.buckets()) {
    backend_.grad_table({.grad = bucket.owned_gradient(),
                         .segments = &bucket.segments,
                         .table = table,
                         .absmax = meter_.grad_absmax()},
                        nullptr);
  }
  backend_.synchronize(backend_.main_stream());  // the sums go over the world, and the host adds its own
  double* extra = sums_.ptr<double>() + rows * kGradColumns;
  // Tensor ranks share their tokens: one of them brings the loss.
  extra[kCrossEntropy] = groups_.tensor->rank() == 0 ? result->model.cross_entropy : 0;
  extra[kStop] = stop ? 1 : 0;
  auto& moe = result->model.moe;
  for (std::size_t i = 0; i < moe.size(); ++i) extra[kStepSums + i] = static_cast<double>(moe[i].dropped);
  keep_own_sums(result);
  result->seconds.optimizer += watch.lap();
  groups_.world->all_reduce(sums_, ReduceOp::Sum, "step sums").wait();
  result->seconds.communication += watch.lap();

  result->model.cross_entropy = extra[kCrossEntropy];
  result->cross_entropy = result->model.targets > 0 ? extra[kCrossEntropy] / result->model.targets : 0;
  result->balance_loss = result->model.balance_loss;
  result->z_loss = result->model.z_loss;
  result->loss = result->cross_entropy + result->balance_loss + result->z_loss;
  result->stop_requested = extra[kStop] > 0;
  for (std::size_t i = 0; i < moe.size(); ++i) {
    moe[i].dropped = static_cast<std::int64_t>(extra[kStepSums + i]);
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    result->grad_squares.push_back(table.ptr<double>()[row * kGradColumns + kGradSquares]);
    result->nonfinite.push_back(table.ptr<double>()[row * kGradColumns + kGradNonfinite]);
  }
}

// What the sums are on this rank before they are those of the world.
void Trainer::keep_own_sums(StepResult* result) const {
  OwnSums& own = result->own;
  own.cross_entropy = result->model.cross_entropy;
  const Tensor table = gradient_table();
  for (std::int64_t row = 0; row < table.rows(); ++row) {
    own.grad_squares += table.ptr<double>()[row * kGradColumns + kGradSquares];
    own.nonfinite += table.ptr<double>()[row * kGradColumns + kGradNonfinite];
  }
  for (const ModelStatistics::MoeLayer& moe : result->model.moe) {
    own.dropped += static_cast<double>(moe.dropped);
  }
}

Tensor Trainer::gradient_table() const {
  const auto rows = static_cast<std::int64_t>(parameters_.table().size());
  return sums_.flat(0, rows * kGradColumns).reshape({rows, kGradColumns});
}

void Trainer::update(StepResult* result) {
  Stopwatch watch;
  groups_.mark_phase("optimizer");
  std::vector<SharedTensor> on_all_ranks;
  for (MoeLayer* layer : model_.moe_layers()) {
    if (layer->bias().empty()) continue;
    on_all_ranks.push_back({cat("layers.", layer->index(), ".router_bias"), layer->index(), layer->bias()});
  }
  meter_.check(gradient_table(), on_all_ranks);
  const OptimizerConfig& optimizer = config_.optimizer();
  result->learning_rate = learning_rate(config_, result->step);
  backend_.step_scalars({.table = gradient_table(),
                         .max_norm = optimizer.clip_norm(),
                         .learning_rate = result->learning_rate,
                         .beta1 = optimizer.beta1(),
                         .beta2 = optimizer.beta2(),
                         .applied_steps = progress_.applied_steps,
                         .scalars = scalars_.device()},
                        nullptr);
  for (auto& bucket : parameters_.buckets()) {
    backend_.adamw({.grad = bucket.owned_gradient(),
                    .master = bucket.owned_master(),
                    .weight = bucket.owned_weight(),
                    .remainder = bucket.remainder,
                    .m = bucket.m,
                    .v = bucket.v,
                    .segments = &bucket.segments,
                    .scalars = scalars_.device(),
                    .beta1 = optimizer.beta1(),
                    .beta2 = optimizer.beta2(),
                    .eps = optimizer.eps(),
                    .weight_decay = optimizer.weight_decay(),
                    .table = meter_.updates()},
                   nullptr);
  }
  scalars_.download(backend_, backend_.main_stream());
  result->seconds.optimizer += watch.lap();
  groups_.mark_phase("weights");
  // The sums first: they are small, and waited for at once.
  result->seconds.total =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - step_begin_).count();
  result->seconds.waiting = seconds_waited() - waited_before_;
  meter_.start_reductions(result->model, result->seconds);
  sync_.gather_weights();
  result->measures = meter_.finish(gradient_table(), result->model.targets, result->tokens);
  result->seconds.communication += watch.lap();
  const double* scalars = scalars_.host().ptr<double>();
  result->grad_norm = scalars[kGradNorm];
  result->clip_factor = scalars[kClipFactor];
  result->skipped = scalars[kSkip] != 0;
}

std::vector<Tensor> Trainer::router_biases() {
  std::vector<Tensor> biases;
  for (MoeLayer* layer : model_.moe_layers()) {
    if (!layer->bias().empty()) biases.push_back(layer->bias());
  }
  return biases;
}

// b += γ · sign(mean load - load), with the integer load of the step's batch; sign(0) = 0.
void Trainer::update_biases(const StepResult& result) {
  const double gamma = config_.model().moe().router().bias_update();
  const std::vector<Tensor> biases = router_biases();
  for (std::size_t i = 0; i < biases.size(); ++i) {
    const std::vector<double>& load = result.model.moe[i].counts;
    double total = 0;
    for (const double count : load) total += count;
    host_.update(biases[i], [&](const Tensor& bias) {
      for (std::size_t e = 0; e < load.size(); ++e) {
        // Compared as integers, total against experts · load: the mean need not be representable.
        const double excess = total - static_cast<double>(load.size()) * load[e];
        const double change = gamma * (excess > 0 ? 1 : excess < 0 ? -1 : 0);
        if (bias.dtype == DType::F64) {
          bias.ptr<double>()[e] += change;
        } else {
          bias.ptr<float>()[e] += static_cast<float>(change);
        }
      }
    });
  }
}

void Trainer::restored() {
  sync_.gather_weights();
  sync_.wait_weights();
}

double Trainer::flops_per_step() const {
  return model_.training_flops_per_token(length_) * static_cast<double>(tokens_per_step());
}

}  // namespace hybridmoe
