#include "tools/ckpt_export.h"

#include <algorithm>
#include <filesystem>
#include <map>

#include "core/backend.h"
#include "core/config/layers.h"
#include "core/config/load.h"
#include "core/files/checkpoint_reader.h"
#include "core/files/safetensors.h"

namespace hybridmoe {

namespace {

constexpr std::int64_t kPieceElements = 1 << 20;  // read and written at once where the order stays

std::int64_t elements_of(const std::vector<std::int64_t>& shape) {
  std::int64_t product = 1;
  for (const std::int64_t extent : shape) product *= extent;
  return product;
}

// Takes a parameter apart into tensors that follow one another in it.
class Splitter {
 public:
  Splitter(const ParameterRecord& parameter, std::vector<ExportTensor>* plan)
      : parameter_(parameter), plan_(plan) {}
  void take(const std::string& name, std::vector<std::int64_t> shape, bool transposed = false) {
    plan_->push_back({name, std::move(shape), parameter_.name(), begin_, transposed});
    begin_ += elements_of(plan_->back().shape);
  }
  // Elements that are not exported may be left at the end.
  void finish(bool whole = true) const {
    const std::int64_t elements = elements_of({parameter_.shape().begin(), parameter_.shape().end()});
    require(whole ? begin_ == elements : begin_ <= elements, "parameter ", parameter_.name(), " has ",
            elements, " elements in the checkpoint, ", begin_, " by its configuration");
  }

 private:
  const ParameterRecord& parameter_;
  std::vector<ExportTensor>* plan_;
  std::int64_t begin_ = 0;
};

// A parameter of a feed-forward network: prefix.gate_up.weight or prefix.down.weight, of `experts` of them
// where experts >= 0.
void split_feed_forward(const ParameterRecord& parameter, const std::string& prefix, bool gate_up,
                        std::int64_t experts, Splitter* split) {
  const int rank = parameter.shape_size();
  const std::int64_t d = parameter.shape(rank - 1), hidden = parameter.shape(rank - 2) / (gate_up ? 2 : 1);
  for (std::int64_t e = 0; e < std::max<std::int64_t>(experts, 1); ++e) {
    const std::string name = experts < 0 ? prefix : cat(prefix, ".", e);
    if (gate_up) {
      split->take(name + ".gate.weight", {hidden, d});
      split->take(name + ".up.weight", {hidden, d});
    } else {
      split->take(name + ".down.weight", {d, hidden}, true);
    }
  }
}

void add_parameter(const ModelConfig& model, const ParameterRecord& parameter,
                   std::vector<ExportTensor>* plan) {
  const std::string& name = parameter.name();
  const std::vector<std::int64_t> shape(parameter.shape().begin(), parameter.shape().end());
  const std::int64_t dk = model.head_dim();
  Splitter split(parameter, plan);
  const auto before = [&](const char* ending) {
    return name.substr(0, name.size() - std::string(ending).size());
  };
  if (name == "embedding.weight" || name == "head.weight") {
    split.take(name, {model.vocabulary(), shape.back()});
    return split.finish(false);  // the rows behind the vocabulary are padding
  }
  if (shape.size() == 1 || name.ends_with(".router.weight")) {
    split.take(name, shape);
  } else if (name.ends_with(".qkv.weight")) {
    const std::string layer = before("qkv.weight");
    split.take(layer + "q.weight", {model.heads() * dk, shape[1]});
    split.take(layer + "k.weight", {model.kv_heads() * dk, shape[1]});
    split.take(layer + "v.weight", {model.kv_heads() * dk, shape[1]});
  } else if (name.ends_with(".attn_out.weight")) {
    split.take(name, {shape[1], shape[0]}, true);
  } else if (name.ends_with(".gate_up.weight")) {
    split_feed_forward(parameter, before(".gate_up.weight"), true, shape.size() == 3 ? shape[0] : -1, &split);
  } else if (name.ends_with(".down.weight")) {
    split_feed_forward(parameter, before(".down.weight"), false, shape.size() == 3 ? shape[0] : -1, &split);
  } else {
    throw Error(cat("parameter ", name, " is unknown to this version's export"));
  }
  split.finish();
}

// Reads, converts and writes one tensor after another.
class Exporter {
 public:
  Exporter(CheckpointReader& checkpoint, DType dtype, SafetensorsWriter& file)
      : checkpoint_(checkpoint), dtype_(dtype), file_(file), stored_(checkpoint.dtype("master")) {}

  void write(const ExportTensor& tensor) {
    if (tensor.parameter.empty()) return write_bias(tensor);
    if (tensor.transposed) return write_transposed(tensor);
    const std::int64_t elements = elements_of(tensor.shape);
    for (std::int64_t begin = 0; begin < elements; begin += kPieceElements) {
      append(read(tensor, begin, std::min(elements, begin + kPieceElements)));
    }
  }

 private:
  // A view of `buffer` that is valid until it is used again.
  static Tensor view(std::vector<char>* buffer, DType dtype, std::int64_t elements) {
    buffer->resize(static_cast<std::size_t>(elements * size_of(dtype)));
    return Tensor(buffer->data(), dtype, {elements});
  }

  Tensor read(const ExportTensor& tensor, std::int64_t begin, std::int64_t end) {
    const Tensor target = view(&read_, stored_, end - begin);
    checkpoint_.read(tensor.parameter, "master", tensor.begin + begin, target);
    return target;
  }

  void append(const Tensor& values) {
    if (values.dtype == dtype_) return file_.append(values);
    const Tensor converted = view(&converted_, dtype_, values.elements());
    converter_->convert(values, converted, nullptr);
    file_.append(converted);
  }

  void write_transposed(const ExportTensor& tensor) {
    const Tensor stored = read(tensor, 0, elements_of(tensor.shape));
    const Tensor target = view(&transposed_, stored_, stored.elements());
    const std::int64_t rows = tensor.shape[0], columns = tensor.shape[1];  // of the file
    const auto transpose = [&]<class T>(const T* from, T* to) {
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < columns; ++c) to[r * columns + c] = from[c * rows + r];
      }
    };
    if (stored_ == DType::F64) {
      transpose(stored.ptr<double>(), target.ptr<double>());
    } else {
      transpose(stored.ptr<float>(), target.ptr<float>());
    }
    append(target);
  }

  // The layers' biases lie one behind the other in rank 0's shard: replicated state, no parameters.
  void write_bias(const ExportTensor& tensor) {
    const ShardReader shard = open_shard(checkpoint_.directory(), checkpoint_.manifest(), 0);
    shard.verify("router_bias");
    const DType dtype = dtype_from_name(shard.find("router_bias").dtype());
    const Tensor target = view(&read_, dtype, elements_of(tensor.shape));
    shard.read_unverified("router_bias", tensor.begin, target);
    append(target);
  }

  CheckpointReader& checkpoint_;
  DType dtype_;
  SafetensorsWriter& file_;
  DType stored_;
  std::unique_ptr<Backend> converter_ = make_reference_backend();
  std::vector<char> read_, transposed_, converted_;
};

}  // namespace

std::vector<ExportTensor> export_plan(const CheckpointManifest& manifest) {
  const ModelConfig& model = manifest.config().model();
  std::vector<ExportTensor> plan;
  for (const ParameterRecord& parameter : manifest.parameter()) add_parameter(model, parameter, &plan);
  if (!model.has_moe() || model.moe().router().bias_update() <= 0) return plan;
  const std::vector<LayerShape> layers = resolve_layers(model);
  std::int64_t begin = 0;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    if (layers[l].feed_forward != MOE) continue;
    plan.push_back({cat("layers.", l, ".router.bias"), {model.moe().experts()}, "", begin, false});
    begin += model.moe().experts();
  }
  return plan;
}

ExportResult export_checkpoint(const ExportCommand& command) {
  CheckpointReader checkpoint(find_checkpoint(command.run_dir, command.step).path);
  const CheckpointManifest& manifest = checkpoint.manifest();
  ExportResult result;
  result.step = manifest.step();
  result.dtype = command.dtype.value_or(checkpoint.dtype("master"));
  result.path = command.out + "/model.safetensors";
  require(command.force || !std::filesystem::exists(result.path), result.path,
          ": exists already; choose another --out, or replace it with --force");
  const std::vector<ExportTensor> plan = export_plan(manifest);
  std::vector<SafetensorsEntry> entries;
  for (const ExportTensor& tensor : plan) {
    entries.push_back({tensor.name, result.dtype, tensor.shape});
    result.elements += entries.back().elements();
  }
  result.tensors = static_cast<std::int64_t>(plan.size());
  make_directories(command.out);
  // "format" tells readers of this metadata how matrices are oriented: "pt", that is [out, in].
  SafetensorsWriter file(result.path, entries,
                         {{"format", "pt"},
                          {"name", manifest.config().name()},
                          {"run_id", manifest.run_id()},
                          {"step", std::to_string(manifest.step())}});
  Exporter exporter(checkpoint, result.dtype, file);
  for (const ExportTensor& tensor : plan) exporter.write(tensor);
  write_file_atomically(command.out + "/config.textproto", to_text(manifest.config()));
  file.commit();
  return result;
}

}  // namespace hybridmoe
