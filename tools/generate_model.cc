#include "tools/generate_model.h"

#include <algorithm>
#include <vector>

namespace hybridmoe {

namespace {

constexpr std::int64_t kLoadElements = 1 << 20;  // read and converted at once

// The type that the run computed in, which the manifest records because AUTO depends on the machine.
Precision precision_of(const CheckpointManifest& manifest) {
  Precision precision = manifest.config().precision();
  for (const MeasuredChoice& choice : manifest.choice()) {
    if (choice.name() != "precision") continue;
    require(Precision_Parse(choice.value(), &precision), "the checkpoint's precision ", choice.value(),
            " is unknown to this version");
  }
  require(precision != AUTO, "the checkpoint's manifest does not say in which precision the run computed");
  return precision;
}

std::unique_ptr<Backend> make_backend(Precision precision, int threads) {
  if (precision == F64) return make_reference_backend();
  return make_cpu_backend({.compute_type = precision == BF16 ? DType::BF16 : DType::F32, .threads = threads});
}

// Fills `target` through read(begin, piece), whose pieces have type `source`.
template <class Read>
void fill(Backend& backend, DType source, const Tensor& target, const Read& read) {
  if (source == target.dtype) return read(std::int64_t{0}, target);
  const std::int64_t elements = target.elements();
  std::vector<char> buffer(static_cast<std::size_t>(std::min(elements, kLoadElements) * size_of(source)));
  for (std::int64_t begin = 0; begin < elements; begin += kLoadElements) {
    const std::int64_t end = std::min(elements, begin + kLoadElements);
    const Tensor piece(buffer.data(), source, {end - begin});
    read(begin, piece);
    round_masters(piece, target.flat(begin, end), {}, backend, backend.main_stream());
    backend.synchronize(backend.main_stream());
  }
}

}  // namespace

InferenceModel::InferenceModel(CheckpointReader& checkpoint, const Options& options)
    : config_(checkpoint.manifest().config()),
      size_{.length = options.chunk, .training = false, .cache_positions = options.cache_positions},
      backend_(make_backend(precision_of(checkpoint.manifest()), options.threads)),
      world_(make_local_communicator()) {
  const ModelConfig& model = config_.model();
  if (model.has_moe()) {
    // Always dropless: a capacity is shared by the tokens of a training batch, while here a token must not
    // depend on those behind it, nor on how the prompt was cut into chunks.
    exchange_ = make_local_row_exchange(*backend_, *world_, model.moe().experts(), model.moe().top_k(),
                                        {.factor = 0});
  }
  const Groups groups = data_parallel_groups(*world_, *world_);
  transformer_ = std::make_unique<Transformer>(model, config_.optimizer(), *backend_, groups, exchange_.get(),
                                               parameters_);
  parameters_.plan(memory_, backend_->compute_type(), backend_->statistics_type(),
                   config_.parallel().bucket_bytes(), OptimizerState::None);
  transformer_->plan(memory_, size_);
  memory_.commit(*backend_);
  transformer_->prepare();
  load_weights(checkpoint);
  load_router_biases(checkpoint);
}

void InferenceModel::load_weights(CheckpointReader& checkpoint) {
  const DType stored = checkpoint.dtype("master");
  for (ParameterStore::Id id = 0; id < parameters_.size(); ++id) {
    const ParameterSpec& spec = parameters_.spec(id);
    std::int64_t elements = 1;
    for (const std::int64_t extent : checkpoint.parameter(spec.name).shape()) elements *= extent;
    require(elements == spec.global_shape.elements(), "parameter ", spec.name, " has ", elements,
            " elements in the checkpoint, ", spec.global_shape.elements(),
            " in the model of its configuration");
    const Tensor weight = parameters_.weight(id);
    fill(
        *backend_, stored, weight.reshape({weight.elements()}),
        [&](std::int64_t begin, const Tensor& piece) { checkpoint.read(spec.name, "master", begin, piece); });
  }
}

void InferenceModel::load_router_biases(const CheckpointReader& checkpoint) {
  std::vector<Tensor> biases;
  for (MoeLayer* layer : transformer_->moe_layers()) {
    if (!layer->bias().empty()) biases.push_back(layer->bias());
  }
  if (biases.empty()) return;
  // Replicated state, kept by rank 0: the layers' biases one behind the other.
  const ShardReader shard = open_shard(checkpoint.directory(), checkpoint.manifest(), 0);
  shard.verify("router_bias");
  const DType stored = dtype_from_name(shard.find("router_bias").dtype());
  std::int64_t offset = 0;
  for (const Tensor& bias : biases) {
    fill(*backend_, stored, bias, [&](std::int64_t begin, const Tensor& piece) {
      shard.read_unverified("router_bias", offset + begin, piece);
    });
    offset += bias.elements();
  }
}

}  // namespace hybridmoe
