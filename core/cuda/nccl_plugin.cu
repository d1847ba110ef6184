// NCCL's collectives, in a plug-in of its own: the CUDA backend loads without NCCL. Everything runs on one
// stream beside the backend's main stream, each waiting for the other by events, never the host. Sums over
// ranks have the order of the ranks: a reduce-scatter is an exchange of parts and a kernel that adds them up,
// in fp32 where the type is bf16, as core/communicator.h asks.
#include <nccl.h>

#include "core/cuda/cuda_error.h"
#include "core/cuda/device.h"
#include "core/cuda/rows.h"
#include "core/cuda_plugin.h"

namespace hybridmoe::cuda {
namespace {

void check_nccl(ncclResult_t status, const char* what) {
  require(status == ncclSuccess || status == ncclInProgress, "NCCL: ", what,
          " failed: ", ncclGetErrorString(status));
}

ncclDataType_t type_of(DType dtype) {
  switch (dtype) {
    case DType::F64:
      return ncclFloat64;
    case DType::F32:
      return ncclFloat32;
    case DType::I64:
      return ncclInt64;
    case DType::I32:
      return ncclInt32;
    default:
      throw Error(cat("all_reduce of ", name_of(dtype), ": f64, f32, i64 or i32 was expected"));
  }
}

HYBRIDMOE_DEVICE float widen(BFloat16 value) { return to_float(value); }
template <class T>
HYBRIDMOE_DEVICE T widen(T value) {
  return value;
}
template <class T>
HYBRIDMOE_DEVICE void narrow(T value, T* to) {
  *to = value;
}
HYBRIDMOE_DEVICE void narrow(float value, BFloat16* to) { *to = to_bfloat16(value); }

// target [count] = the sum of parts [ranks, count], rank by rank.
template <class T>
struct SumRanks {
  static constexpr int kThreads = 256;
  const T* parts;
  T* target;
  std::int64_t count;
  int ranks;

  HYBRIDMOE_DEVICE void operator()() const {
    const std::int64_t i = block_x() * block_threads() + thread_index();
    if (i >= count) return;
    auto sum = widen(parts[i]);
    for (int rank = 1; rank < ranks; ++rank) sum += widen(parts[rank * count + i]);
    narrow(sum, &target[i]);
  }
};

class NcclCollectives final : public DeviceCollectives {
 public:
  NcclCollectives(const NcclMember& member, Backend& backend)
      : backend_(backend),
        main_(reinterpret_cast<cudaStream_t>(backend.main_stream())),
        rank_(member.rank),
        size_(member.size) {
    ncclUniqueId id;
    static_assert(sizeof id.internal == sizeof member.id);
    std::memcpy(id.internal, member.id.data(), sizeof id.internal);
    check_nccl(ncclCommInitRank(&group_, size_, id, rank_), "joining a group");
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  }
  ~NcclCollectives() override {
    for (const cudaEvent_t event : free_events_) cudaEventDestroy(event);
    if (parts_ != nullptr) backend_.release(parts_, parts_bytes_);
    ncclCommAbort(group_);  // no collective: other ranks may be gone
    cudaStreamDestroy(stream_);
  }
  NcclCollectives(const NcclCollectives&) = delete;
  NcclCollectives& operator=(const NcclCollectives&) = delete;

  Event all_reduce(const Tensor& data, ReduceOp op) override {
    begin();
    check_nccl(ncclAllReduce(data.data, data.data, count_of(data), type_of(data.dtype),
                             op == ReduceOp::Sum ? ncclSum : ncclMax, group_, stream_),
               "all-reduce");
    return end();
  }
  Event reduce_scatter(const Tensor& input, const Tensor& output) override;
  Event all_gather(const Tensor& input, const Tensor& output) override {
    begin();
    check_nccl(ncclAllGather(input.data, output.data, static_cast<std::size_t>(input.bytes()), ncclUint8,
                             group_, stream_),
               "all-gather");
    return end();
  }
  Event broadcast(const Tensor& data, int root) override {
    begin();
    check_nccl(ncclBroadcast(data.data, data.data, static_cast<std::size_t>(data.bytes()), ncclUint8, root,
                             group_, stream_),
               "broadcast");
    return end();
  }
  Event all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows, const Tensor& recv,
                        const std::vector<std::int64_t>& recv_rows) override;
  void check() override {
    ncclResult_t state = ncclSuccess;
    check_nccl(ncclCommGetAsyncError(group_, &state), "asking for errors");
    check_nccl(state, "a collective under way");
  }

 private:
  // Of a call: recorded behind it on the stream.
  class Done final : public Event::State {
   public:
    Done(NcclCollectives& owner, cudaEvent_t event) : owner_(owner), event_(event) {}
    ~Done() override { owner_.free_events_.push_back(event_); }
    bool test() override {
      owner_.check();
      const cudaError_t status = cudaEventQuery(event_);
      if (status == cudaErrorNotReady) return false;
      check_cuda(status, "a collective");
      return true;
    }
    void wait() override {
      owner_.check();
      check_cuda(cudaStreamWaitEvent(owner_.main_, event_), "waiting for a collective");
    }

   private:
    NcclCollectives& owner_;
    cudaEvent_t event_;
  };

  static std::size_t count_of(const Tensor& tensor) { return static_cast<std::size_t>(tensor.elements()); }
  cudaEvent_t take_event() {
    cudaEvent_t event = nullptr;
    if (free_events_.empty()) {
      check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
    } else {
      event = free_events_.back();
      free_events_.pop_back();
    }
    return event;
  }
  // What follows on the stream finds what was queued on the main stream.
  void begin() {
    check();
    const cudaEvent_t ready = take_event();
    check_cuda(cudaEventRecord(ready, main_), "recording an event");
    check_cuda(cudaStreamWaitEvent(stream_, ready), "waiting for operators");
    free_events_.push_back(ready);
  }
  Event end() {
    const cudaEvent_t done = take_event();
    check_cuda(cudaEventRecord(done, stream_), "recording an event");
    return Event(std::make_shared<Done>(*this, done));
  }
  // For a part of every rank; calls on the stream use it one after the other.
  void* parts(std::int64_t bytes) {
    if (static_cast<std::size_t>(bytes) > parts_bytes_) {
      check_cuda(cudaStreamSynchronize(stream_), "waiting for collectives");
      if (parts_ != nullptr) backend_.release(parts_, parts_bytes_);
      parts_ = nullptr;
      parts_bytes_ = static_cast<std::size_t>(bytes);
      parts_ = backend_.allocate(parts_bytes_);
    }
    return parts_;
  }
  template <class T>
  void sum_ranks(const Tensor& output) {
    const std::int64_t count = output.elements();
    launch(SumRanks<T>{static_cast<const T*>(parts_), static_cast<T*>(output.data), count, size_},
           {.x = divide_up(count, SumRanks<T>::kThreads), .threads = SumRanks<T>::kThreads},
           reinterpret_cast<Stream*>(stream_));
  }

  Backend& backend_;
  cudaStream_t main_, stream_ = nullptr;
  int rank_, size_;
  ncclComm_t group_ = nullptr;
  std::vector<cudaEvent_t> free_events_;
  void* parts_ = nullptr;
  std::size_t parts_bytes_ = 0;
};

Event NcclCollectives::reduce_scatter(const Tensor& input, const Tensor& output) {
  if (output.elements() == 0) return {};
  begin();
  const auto bytes = static_cast<std::size_t>(output.bytes());
  auto* const received = static_cast<char*>(parts(input.bytes()));
  check_nccl(ncclGroupStart(), "reduce-scatter");
  for (int rank = 0; rank < size_; ++rank) {
    const char* own = static_cast<const char*>(input.data) + rank * bytes;
    check_nccl(ncclSend(own, bytes, ncclUint8, rank, group_, stream_), "reduce-scatter");
    check_nccl(ncclRecv(received + rank * bytes, bytes, ncclUint8, rank, group_, stream_), "reduce-scatter");
  }
  check_nccl(ncclGroupEnd(), "reduce-scatter");
  switch (output.dtype) {
    case DType::F64:
      sum_ranks<double>(output);
      break;
    case DType::F32:
      sum_ranks<float>(output);
      break;
    case DType::BF16:
      sum_ranks<BFloat16>(output);
      break;
    case DType::I64:
      sum_ranks<std::int64_t>(output);
      break;
    case DType::I32:
      sum_ranks<std::int32_t>(output);
      break;
    default:
      throw Error(
          cat("reduce_scatter of ", name_of(output.dtype), ": a type that can be added was expected"));
  }
  return end();
}

Event NcclCollectives::all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows,
                                       const Tensor& recv, const std::vector<std::int64_t>& recv_rows) {
  begin();
  const std::int64_t row = size_of(send.dtype) * send.shape[1];
  const char* from = static_cast<const char*>(send.data);
  char* to = static_cast<char*>(recv.data);
  check_nccl(ncclGroupStart(), "all-to-all");
  for (int rank = 0; rank < size_; ++rank) {
    const auto out = static_cast<std::size_t>(send_rows[rank] * row),
               in = static_cast<std::size_t>(recv_rows[rank] * row);
    if (out > 0) check_nccl(ncclSend(from, out, ncclUint8, rank, group_, stream_), "all-to-all");
    if (in > 0) check_nccl(ncclRecv(to, in, ncclUint8, rank, group_, stream_), "all-to-all");
    from += out;
    to += in;
  }
  check_nccl(ncclGroupEnd(), "all-to-all");
  return end();
}

}  // namespace
}  // namespace hybridmoe::cuda

extern "C" {

int hybridmoe_nccl_version() { return hybridmoe::cuda_plugin::kVersion; }

void hybridmoe_nccl_make_id(std::array<char, 128>* id) {
  ncclUniqueId made;
  hybridmoe::cuda::check_nccl(ncclGetUniqueId(&made), "making an id");
  std::memcpy(id->data(), made.internal, id->size());
}

hybridmoe::DeviceCollectives* hybridmoe_make_nccl_collectives(const hybridmoe::NcclMember& member,
                                                              hybridmoe::Backend& backend) {
  return new hybridmoe::cuda::NcclCollectives(member, backend);
}
}
