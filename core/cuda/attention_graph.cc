#include "core/cuda/attention_graph.h"

#include <algorithm>
#include <array>
#include <string_view>

namespace hybridmoe::cuda {
namespace {

using Extents = std::array<std::int64_t, 4>;  // batch, head, row, column
using Handle = cudnnBackendDescriptor_t;

Extents packed(const Extents& dims) { return {dims[1] * dims[2] * dims[3], dims[2] * dims[3], dims[3], 1}; }
Extents transposed(Extents extents) {
  std::swap(extents[2], extents[3]);
  return extents;
}

// Collects operations. A tensor between two operations has no memory: it lives within the fused kernel.
class Graph {
 public:
  Graph(const CudnnLibrary& library, const AttentionGraphShape& shape)
      : library_(library),
        shape_(shape),
        scores_{shape.batch, shape.heads, shape.length, shape.length},
        rows_{shape.batch, shape.heads, shape.length, 1},
        vectors_{shape.batch, shape.heads, shape.length, shape.head_dim} {}

  void forward();
  void backward();
  std::vector<CudnnDescriptor> finish() &&;  // the last one is the graph

 private:
  Handle tensor(std::int64_t id, const Extents& dims, const Extents& strides, cudnnDataType_t type,
                cudnnBackendAttributeName_t kind = CUDNN_ATTR_TENSOR_UNIQUE_ID);
  // Rows of `heads` vectors in bf16; transposed: as cuDNN wants the right side of a product.
  Handle matrix(AttentionTensor id, std::int64_t heads, std::int64_t row_stride, bool transpose = false);
  Handle statistic(AttentionTensor id) {
    return tensor(static_cast<std::int64_t>(id), rows_, packed(rows_), CUDNN_DATA_FLOAT);
  }
  Handle scalar(AttentionTensor id) {
    return tensor(static_cast<std::int64_t>(id), {1, 1, 1, 1}, {1, 1, 1, 1}, CUDNN_DATA_FLOAT,
                  CUDNN_ATTR_TENSOR_IS_BY_VALUE);
  }
  Handle between(const Extents& dims, cudnnDataType_t type = CUDNN_DATA_FLOAT) {
    return between(dims, packed(dims), type);
  }
  Handle between(const Extents& dims, const Extents& strides, cudnnDataType_t type) {
    return tensor(next_id_++, dims, strides, type, CUDNN_ATTR_TENSOR_IS_VIRTUAL);
  }

  // Each returns `result`.
  Handle pointwise(cudnnPointwiseMode_t mode, const std::vector<Handle>& inputs, Handle result,
                   cudnnDataType_t precision = CUDNN_DATA_FLOAT, std::int64_t axis = -1);
  Handle reduce(cudnnReduceTensorOp_t operation, Handle input, Handle result);
  Handle product(Handle a, Handle b, Handle result);
  Handle reshape(Handle input, Handle result);
  Handle on_scores(cudnnPointwiseMode_t mode, Handle a, Handle b) {
    return pointwise(mode, {a, b}, between(scores_));
  }
  Handle causal(Handle scores);
  // The gradient of keys or values: the sum over the query heads that share them where there are several.
  void head_gradient(Handle slopes, Handle rows, AttentionTensor id, std::int64_t row_stride);

  CudnnDescriptor& add(cudnnBackendDescriptorType_t type) { return parts_.emplace_back(library_, type); }
  Handle finished(CudnnDescriptor& part, const char* what) {
    part.finalize(what);
    return part.handle();
  }

  const CudnnLibrary& library_;
  const AttentionGraphShape& shape_;
  const Extents scores_, rows_, vectors_;
  std::vector<CudnnDescriptor> parts_;
  std::vector<Handle> operations_;
  std::int64_t next_id_ = 100;  // beyond AttentionTensor
};

Handle Graph::tensor(std::int64_t id, const Extents& dims, const Extents& strides, cudnnDataType_t type,
                     cudnnBackendAttributeName_t kind) {
  CudnnDescriptor& it = add(CUDNN_BACKEND_TENSOR_DESCRIPTOR);
  it.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, id);
  it.set(CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, type);
  it.set(CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, std::ssize(dims), dims.data());
  it.set(CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, std::ssize(strides), strides.data());
  it.set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, AttentionGraphShape::kAlignment);
  if (kind != CUDNN_ATTR_TENSOR_UNIQUE_ID) it.set(kind, CUDNN_TYPE_BOOLEAN, true);
  return finished(it, "describing a tensor of attention");
}

Handle Graph::matrix(AttentionTensor id, std::int64_t heads, std::int64_t row_stride, bool transpose) {
  const Extents dims{shape_.batch, heads, shape_.length, shape_.head_dim};
  const Extents strides{shape_.length * row_stride, shape_.head_dim, row_stride, 1};
  return tensor(static_cast<std::int64_t>(id), transpose ? transposed(dims) : dims,
                transpose ? transposed(strides) : strides, CUDNN_DATA_BFLOAT16);
}

Handle Graph::pointwise(cudnnPointwiseMode_t mode, const std::vector<Handle>& inputs, Handle result,
                        cudnnDataType_t precision, std::int64_t axis) {
  CudnnDescriptor& how = add(CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
  how.set(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, mode);
  how.set(CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, precision);
  if (axis >= 0) how.set(CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, axis);
  const Handle described = finished(how, "describing a pointwise operation");
  CudnnDescriptor& it = add(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
  it.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, described);
  constexpr std::array kInputs = {CUDNN_ATTR_OPERATION_POINTWISE_XDESC, CUDNN_ATTR_OPERATION_POINTWISE_BDESC,
                                  CUDNN_ATTR_OPERATION_POINTWISE_TDESC};
  for (std::size_t i = 0; i < inputs.size(); ++i) it.set(kInputs[i], inputs[i]);
  it.set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, result);
  operations_.push_back(finished(it, "adding a pointwise operation"));
  return result;
}

Handle Graph::reduce(cudnnReduceTensorOp_t operation, Handle input, Handle result) {
  CudnnDescriptor& how = add(CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
  how.set(CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, operation);
  how.set(CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, CUDNN_DATA_FLOAT);
  const Handle described = finished(how, "describing a reduction");
  CudnnDescriptor& it = add(CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
  it.set(CUDNN_ATTR_OPERATION_REDUCTION_DESC, described);
  it.set(CUDNN_ATTR_OPERATION_REDUCTION_XDESC, input);
  it.set(CUDNN_ATTR_OPERATION_REDUCTION_YDESC, result);
  operations_.push_back(finished(it, "adding a reduction"));
  return result;
}

Handle Graph::product(Handle a, Handle b, Handle result) {
  CudnnDescriptor& how = add(CUDNN_BACKEND_MATMUL_DESCRIPTOR);
  how.set(CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, CUDNN_DATA_FLOAT);
  const Handle described = finished(how, "describing a product");
  CudnnDescriptor& it = add(CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
  it.set(CUDNN_ATTR_OPERATION_MATMUL_DESC, described);
  it.set(CUDNN_ATTR_OPERATION_MATMUL_ADESC, a);
  it.set(CUDNN_ATTR_OPERATION_MATMUL_BDESC, b);
  it.set(CUDNN_ATTR_OPERATION_MATMUL_CDESC, result);
  operations_.push_back(finished(it, "adding a product"));
  return result;
}

Handle Graph::reshape(Handle input, Handle result) {
  CudnnDescriptor& it = add(CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR);
  it.set(CUDNN_ATTR_OPERATION_RESHAPE_XDESC, input);
  it.set(CUDNN_ATTR_OPERATION_RESHAPE_YDESC, result);
  operations_.push_back(finished(it, "adding a transposition"));
  return result;
}

Handle Graph::causal(Handle scores) {
  const auto index = [&](std::int64_t axis) {
    return pointwise(CUDNN_POINTWISE_GEN_INDEX, {scores}, between(scores_, CUDNN_DATA_INT32),
                     CUDNN_DATA_FLOAT, axis);
  };
  const Handle query = index(2), key = index(3);
  const Handle seen = pointwise(CUDNN_POINTWISE_CMP_GE, {query, key}, between(scores_, CUDNN_DATA_BOOLEAN),
                                CUDNN_DATA_BOOLEAN);
  return pointwise(CUDNN_POINTWISE_BINARY_SELECT, {scores, scalar(AttentionTensor::MinusInfinity), seen},
                   between(scores_));
}

void Graph::forward() {
  const bool apart = shape_.statistics == SoftmaxStatistics::MaxAndSum;
  const Handle q = matrix(AttentionTensor::Q, shape_.heads, shape_.q);
  const Handle k = matrix(AttentionTensor::K, shape_.kv_heads, shape_.k, true);
  const Handle v = matrix(AttentionTensor::V, shape_.kv_heads, shape_.v);
  const Handle o = matrix(AttentionTensor::O, shape_.heads, shape_.o);
  const Handle scaled =
      on_scores(CUDNN_POINTWISE_MUL, product(q, k, between(scores_)), scalar(AttentionTensor::Scale));
  const Handle masked = causal(scaled);
  const Handle max =
      reduce(CUDNN_REDUCE_TENSOR_MAX, masked, apart ? statistic(AttentionTensor::Max) : between(rows_));
  const Handle e =
      pointwise(CUDNN_POINTWISE_EXP, {on_scores(CUDNN_POINTWISE_SUB, masked, max)}, between(scores_));
  const Handle sum =
      reduce(CUDNN_REDUCE_TENSOR_ADD, e, apart ? statistic(AttentionTensor::Sum) : between(rows_));
  if (shape_.statistics == SoftmaxStatistics::Lse) {
    const Handle log = pointwise(CUDNN_POINTWISE_LOG, {sum}, between(rows_));
    pointwise(CUDNN_POINTWISE_ADD, {max, log}, statistic(AttentionTensor::Lse));
  }
  const Handle p = pointwise(CUDNN_POINTWISE_DIV, {e, sum}, between(scores_, CUDNN_DATA_BFLOAT16));
  product(p, v, o);
}

void Graph::head_gradient(Handle slopes, Handle rows, AttentionTensor id, std::int64_t row_stride) {
  const Handle by_key =
      reshape(slopes, between(transposed(scores_), transposed(packed(scores_)), CUDNN_DATA_BFLOAT16));
  const Handle result = matrix(id, shape_.kv_heads, row_stride);
  if (shape_.heads == shape_.kv_heads) {
    product(by_key, rows, result);
  } else {
    reduce(CUDNN_REDUCE_TENSOR_ADD, product(by_key, rows, between(vectors_, CUDNN_DATA_BFLOAT16)), result);
  }
}

void Graph::backward() {
  const Handle q = matrix(AttentionTensor::Q, shape_.heads, shape_.q);
  const Handle k = matrix(AttentionTensor::K, shape_.kv_heads, shape_.k, true);
  const Handle v = matrix(AttentionTensor::V, shape_.kv_heads, shape_.v, true);
  const Handle o = matrix(AttentionTensor::O, shape_.heads, shape_.o);
  const Handle d_o = matrix(AttentionTensor::DO, shape_.heads, shape_.d_o);
  const Handle scale = scalar(AttentionTensor::Scale);

  const Handle weighed = pointwise(CUDNN_POINTWISE_MUL, {d_o, o}, between(vectors_));
  const Handle delta =
      pointwise(CUDNN_POINTWISE_MUL,
                {reduce(CUDNN_REDUCE_TENSOR_ADD, weighed, between(rows_)), scalar(AttentionTensor::One)},
                statistic(AttentionTensor::Delta));

  const Handle scaled = on_scores(CUDNN_POINTWISE_MUL, product(q, k, between(scores_)), scale);
  const Handle masked = causal(on_scores(CUDNN_POINTWISE_SUB, scaled, statistic(AttentionTensor::Lse)));
  const Handle p = pointwise(CUDNN_POINTWISE_EXP, {masked}, between(scores_));
  head_gradient(p, d_o, AttentionTensor::DV, shape_.dv);

  const Handle dp = on_scores(CUDNN_POINTWISE_SUB, product(d_o, v, between(scores_)), delta);
  const Handle ds = on_scores(CUDNN_POINTWISE_MUL, on_scores(CUDNN_POINTWISE_MUL, dp, p), scale);
  head_gradient(ds, q, AttentionTensor::DK, shape_.dk);

  // The product goes to dq at once: cuDNN then keeps ds and multiplies it in a kernel of its own, the same
  // bits every time (NVIDIA/cudnn-frontend#398). Over a stored fp32 sum the pattern stands for one kernel,
  // whose blocks add to dq in the order that they come in, and its engine's notes (9.19) do not tell.
  const Extents keys{shape_.batch, shape_.kv_heads, shape_.length, shape_.head_dim};
  const Handle by_row = reshape(
      k, between(keys, {shape_.length * shape_.k, shape_.head_dim, shape_.k, 1}, CUDNN_DATA_BFLOAT16));
  product(ds, by_row, matrix(AttentionTensor::DQ, shape_.heads, shape_.dq));
}

std::vector<CudnnDescriptor> Graph::finish() && {
  CudnnDescriptor& it = add(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
  it.set(CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, std::ssize(operations_),
         operations_.data());
  it.finalize("joining the operations of attention");
  return std::move(parts_);
}

bool not_known_to_vary(const CudnnLibrary& library, const CudnnDescriptor& config) {
  const CudnnDescriptor engine(library, CUDNN_BACKEND_ENGINE_DESCRIPTOR);
  Handle handle = engine.handle();
  config.get(CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &handle);
  std::array<cudnnBackendNumericalNote_t, CUDNN_NUMERICAL_NOTE_TYPE_COUNT> notes{};
  const std::int64_t count = engine.get(CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, CUDNN_TYPE_NUMERICAL_NOTE,
                                        std::ssize(notes), notes.data());
  const auto end = notes.begin() + std::min(count, std::int64_t{std::ssize(notes)});
  return std::find(notes.begin(), end, CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC) == end;
}

// The first of the reasons that cuDNN lists for the last call.
std::string first_reason(const CudnnLibrary& library) {
  constexpr std::string_view kMark = "Reason: ";
  const std::string all = library.reason_of(CUDNN_STATUS_NOT_SUPPORTED);
  const std::size_t begin = all.find(kMark);
  if (begin == std::string::npos) return all;
  return all.substr(begin + kMark.size(), all.find('\n', begin) - begin - kMark.size());
}

// The engine configurations that cuDNN proposes, the best first.
std::vector<CudnnDescriptor> proposals(const CudnnLibrary& library, const CudnnDescriptor& device,
                                       Handle graph, cudnnBackendHeurMode_t mode, std::string* lacking) {
  CudnnDescriptor heuristics(library, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
  heuristics.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph);
  heuristics.set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, mode);
  heuristics.set(CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, device.handle());
  std::vector<CudnnDescriptor> configs;
  if (const cudnnStatus_t status = heuristics.try_finalize(); status != CUDNN_STATUS_SUCCESS) {
    *lacking = library.reason_of(status);
    return configs;
  }
  const std::int64_t most =
      heuristics.get(CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, 0, nullptr);
  std::vector<Handle> handles;
  for (std::int64_t i = 0; i < most; ++i)
    handles.push_back(configs.emplace_back(library, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR).handle());
  if (most == 0) return configs;
  const std::int64_t count =
      heuristics.get(CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, most, handles.data());
  if (count == 0) *lacking = first_reason(library);  // none of them can run
  while (std::ssize(configs) > count) configs.pop_back();
  return configs;
}

void make_plan(const CudnnLibrary& library, const CudnnDescriptor& device, AttentionPlan* plan) {
  const Handle operations = plan->parts.back().handle();
  plan->lacking = "its heuristics propose nothing";
  for (const cudnnBackendHeurMode_t mode : {CUDNN_HEUR_MODE_A, CUDNN_HEUR_MODE_FALLBACK}) {
    for (CudnnDescriptor& config : proposals(library, device, operations, mode, &plan->lacking)) {
      if (!not_known_to_vary(library, config)) {
        plan->lacking = "what its heuristics propose differs from run to run";
        continue;
      }
      CudnnDescriptor execution(library, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
      execution.set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config.handle());
      execution.set(CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, device.handle());
      if (const cudnnStatus_t status = execution.try_finalize(); status != CUDNN_STATUS_SUCCESS) {
        plan->lacking = library.reason_of(status);
        continue;
      }
      plan->workspace_bytes = execution.number(CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE);
      plan->parts.push_back(std::move(config));
      plan->parts.push_back(std::move(execution));
      plan->lacking.clear();
      return;
    }
  }
}

AttentionPlan plan_of(const CudnnLibrary& library, const CudnnDescriptor& device,
                      const AttentionGraphShape& shape, void (Graph::*describe_pass)()) {
  AttentionPlan plan;
  try {
    Graph graph(library, shape);
    (graph.*describe_pass)();
    plan.parts = std::move(graph).finish();
    make_plan(library, device, &plan);
  } catch (const Error& refusal) {  // of a shape: our own kernels take it
    plan.lacking = refusal.what();
  }
  return plan;
}

}  // namespace

std::string describe(const AttentionGraphShape& shape) {
  return cat(shape.batch, " sequences of ", shape.length, ", ", shape.heads, " heads of ", shape.head_dim,
             ", ", shape.kv_heads, " key/value heads");
}

AttentionGraphShape backward_part(const AttentionGraphShape& whole, std::int64_t bytes) {
  constexpr std::int64_t kTile = 128;  // rows of the scores are padded to it
  const std::int64_t rows = (whole.length + kTile - 1) / kTile * kTile;
  const std::int64_t kv_head = whole.heads / whole.kv_heads * rows * rows * 2;
  const auto largest_divisor = [](std::int64_t of, std::int64_t most) {
    std::int64_t divisor = std::clamp<std::int64_t>(most, 1, of);
    while (of % divisor != 0) --divisor;
    return divisor;
  };
  AttentionGraphShape part = whole;
  part.batch = largest_divisor(whole.batch, bytes / (kv_head * whole.kv_heads));
  if (part.batch == 1) part.kv_heads = largest_divisor(whole.kv_heads, bytes / kv_head);
  part.heads = whole.heads / whole.kv_heads * part.kv_heads;
  return part;
}

CudnnDescriptor device_of(const CudnnLibrary& library, cudnnHandle_t handle) {
  CudnnDescriptor device(library, CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR);
  device.set(CUDNN_ATTR_DEVICEPROP_HANDLE, CUDNN_TYPE_HANDLE, handle);
  device.finalize("asking for the device's properties");
  return device;
}

CudnnDescriptor device_from_text(const CudnnLibrary& library, const std::string& text) {
  CudnnDescriptor device(library, CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR);
  device.set(CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, std::ssize(text), text.data());
  device.finalize("reading a device's properties");
  return device;
}

AttentionPlan plan_attention_forward(const CudnnLibrary& library, const CudnnDescriptor& device,
                                     const AttentionGraphShape& shape) {
  return plan_of(library, device, shape, &Graph::forward);
}

AttentionPlan plan_attention_backward(const CudnnLibrary& library, const CudnnDescriptor& device,
                                      const AttentionGraphShape& shape) {
  return plan_of(library, device, shape, &Graph::backward);
}

}  // namespace hybridmoe::cuda
