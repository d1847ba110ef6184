#include "core/cuda/library_attention.h"

#if HYBRIDMOE_WITH_CUDNN

#include <cstdio>
#include <limits>
#include <map>
#include <vector>

#include "core/cuda/attention_bindings.h"
#include "core/cuda/launch.h"

namespace hybridmoe::cuda {
namespace {

// Of a backward pass: the gradients of the scores of 16 heads over 4096 tokens, which fill a device for long.
constexpr std::int64_t kScoreBytes = 512 << 20;

// lse = max + log(sum) for each query.
struct JoinStatistics {
  static constexpr int kThreads = 256;
  const float *max, *sum;
  float* lse;
  std::int64_t count;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t i = block_x() * kThreads + thread_index();
    if (i < count) lse[i] = max[i] + logf(sum[i]);
  }
};

// cuDNN's handle of the current device.
class Session {
 public:
  explicit Session(const CudnnLibrary& library) : library_(library) {
    library.check(library.create(&handle_), "starting");
  }
  ~Session() { library_.destroy(handle_); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  cudnnHandle_t handle() const { return handle_; }

 private:
  const CudnnLibrary& library_;
  cudnnHandle_t handle_ = nullptr;
};

CudnnDescriptor pack(const CudnnLibrary& library, const AttentionBindings& bindings, void* workspace) {
  CudnnDescriptor it(library, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
  it.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, std::ssize(bindings.ids), bindings.ids.data());
  it.set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, std::ssize(bindings.places),
         bindings.places.data());
  it.set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, workspace);
  it.finalize("naming the tensors of attention");
  return it;
}

}  // namespace

struct LibraryAttention::State {
  using Plans = std::map<AttentionGraphShape, AttentionPlan>;
  using Planner = AttentionPlan(const CudnnLibrary&, const CudnnDescriptor&, const AttentionGraphShape&);

  explicit State(DeviceRuntime& its_device)
      : device(its_device),
        library(CudnnLibrary::of_process()),
        session(library),
        gpu(device_of(library, session.handle())) {}
  ~State() {
    for (GrowingMemory* memory : {&workspace, &statistics}) memory->release(device);
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  const AttentionPlan& plan_of(Plans& plans, Planner* planner, const AttentionGraphShape& shape,
                               const char* which);
  void execute(const AttentionPlan& plan, AttentionBindings& bindings, double scale, Stream* stream);

  DeviceRuntime& device;
  const CudnnLibrary& library;
  Session session;
  CudnnDescriptor gpu;
  GrowingMemory workspace, statistics;  // of the main stream
  Plans forward_plans, backward_plans;
};

const AttentionPlan& LibraryAttention::State::plan_of(Plans& plans, Planner* planner,
                                                      const AttentionGraphShape& shape, const char* which) {
  const auto [place, added] = plans.try_emplace(shape);
  if (added) {
    place->second = planner(library, gpu, shape);
    // Asked for and not to be had: once for each shape, on every rank's own output.
    if (!place->second.found())
      std::fprintf(stderr,
                   "cuDNN has no plan for the %s pass of attention over %s (%s): the backend's own "
                   "kernels run\n",
                   which, describe(shape).c_str(), place->second.lacking.c_str());
  }
  return place->second;
}

void LibraryAttention::State::execute(const AttentionPlan& plan, AttentionBindings& bindings, double scale,
                                      Stream* stream) {
  const float factor = static_cast<float>(scale), hidden = -std::numeric_limits<float>::infinity(), one = 1;
  bindings.add(AttentionTensor::Scale, &factor);
  bindings.add(AttentionTensor::MinusInfinity, &hidden);
  bindings.add(AttentionTensor::One, &one);
  const CudnnDescriptor tensors =
      pack(library, bindings, workspace.get(device, plan.workspace_bytes, stream));
  library.check(library.set_stream(session.handle(), native(stream)), "choosing the stream");
  library.check(library.execute(session.handle(), plan.execution(), tensors.handle()), "attention");
}

LibraryAttention::LibraryAttention(DeviceRuntime& device) : state_(std::make_unique<State>(device)) {}
LibraryAttention::~LibraryAttention() = default;

std::string LibraryAttention::version() const { return state_->library.version(); }

bool LibraryAttention::forward(const AttentionForward& op, float* maxima, Stream* stream) {
  if (!expressible(op) || native(stream) != main_stream_of_process()) return false;
  const AttentionPlan& plan =
      state_->plan_of(state_->forward_plans, plan_attention_forward, graph_shape_of(op), "forward");
  if (!plan.found()) return false;
  const std::int64_t count = op.batch * op.heads * op.queries;
  float* const lse = elements<float>(op.lse);
  // The graph has to leave its sums, or an lse that nobody wants, somewhere.
  const auto spare = [&] {
    return static_cast<float*>(
        state_->statistics.get(state_->device, count * static_cast<std::int64_t>(sizeof(float)), stream));
  };
  AttentionBindings bindings = bind_forward(op);
  if (maxima == nullptr) {
    bindings.add(AttentionTensor::Lse, lse == nullptr ? spare() : lse);
    state_->execute(plan, bindings, op.scale, stream);
    return true;
  }
  float* const sums = spare();
  bindings.add(AttentionTensor::Max, maxima);
  bindings.add(AttentionTensor::Sum, sums);
  state_->execute(plan, bindings, op.scale, stream);
  if (lse != nullptr)
    launch(JoinStatistics{maxima, sums, lse, count},
           {.x = divide_up(count, JoinStatistics::kThreads), .threads = JoinStatistics::kThreads}, stream);
  return true;
}

bool LibraryAttention::backward(const AttentionBackward& op, Stream* stream) {
  if (!expressible(op) || native(stream) != main_stream_of_process()) return false;
  const AttentionGraphShape part = backward_part(graph_shape_of(op), kScoreBytes);
  std::vector<AttentionBindings> runs = bind_backward(op, part);
  if (runs.empty()) return false;
  const AttentionPlan& plan =
      state_->plan_of(state_->backward_plans, plan_attention_backward, part, "backward");
  if (!plan.found()) return false;
  for (AttentionBindings& run : runs) state_->execute(plan, run, op.forward.scale, stream);
  return true;
}

}  // namespace hybridmoe::cuda

#else

namespace hybridmoe::cuda {

struct LibraryAttention::State {};

LibraryAttention::LibraryAttention(DeviceRuntime&) {
  throw Error(
      "this build has no cuDNN: its header cudnn_backend.h was not found when the build was configured");
}
LibraryAttention::~LibraryAttention() = default;
std::string LibraryAttention::version() const { return {}; }
bool LibraryAttention::forward(const AttentionForward&, float*, Stream*) { return false; }
bool LibraryAttention::backward(const AttentionBackward&, Stream*) { return false; }

}  // namespace hybridmoe::cuda

#endif
