// NCCL's collectives, in a plug-in of its own: the CUDA backend loads without NCCL. Everything runs on one
// stream beside the backend's main stream, each waiting for the other by events, never the host. Sums over
// ranks have the order of the ranks: a reduce-scatter is an exchange of parts and a kernel that adds them up,
// in fp32 where the type is bf16, as core/communicator.h asks.
#include <algorithm>
#include <cstdlib>
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

// Calls that go together; closed even when one of them fails.
class Grouped {
 public:
  explicit Grouped(const char* what) : what_(what) { check_nccl(ncclGroupStart(), what); }
  ~Grouped() {
    if (open_) ncclGroupEnd();
  }
  Grouped(const Grouped&) = delete;
  Grouped& operator=(const Grouped&) = delete;
  void check(ncclResult_t status) const { check_nccl(status, what_); }
  void end() {
    open_ = false;
    check(ncclGroupEnd());
  }

 private:
  const char* what_;
  bool open_ = true;
};

// A rank has a communicator for each of its groups, and their kernels may run at the same time: NCCL is to
// start them in the program's order everywhere, lest two ranks wait for each other (2.26 and newer know
// this).
void order_launches() { setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "1", 0); }

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
    order_launches();
    ncclUniqueId id;
    static_assert(sizeof id.internal == sizeof member.id);
    std::memcpy(id.internal, member.id.data(), sizeof id.internal);
    check_nccl(ncclCommInitRank(&group_, size_, id, rank_), "joining a group");
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  }
  ~NcclCollectives() override {
    ncclCommAbort(group_);  // no collective: other ranks may be gone, and freeing memory waits for kernels
    for (const cudaEvent_t event : free_events_) cudaEventDestroy(event);
    cudaStreamDestroy(stream_);
    if (parts_ != nullptr) backend_.release(parts_, parts_bytes_);
  }
  NcclCollectives(const NcclCollectives&) = delete;
  NcclCollectives& operator=(const NcclCollectives&) = delete;

  Event all_reduce(const Tensor& data, ReduceOp op) override;
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
  // target = the sum of what parts() has of every rank.
  void sum_ranks(const Tensor& target);
  template <class T>
  void sum_ranks_of(const Tensor& target) {
    const std::int64_t count = target.elements();
    launch(SumRanks<T>{static_cast<const T*>(parts_), static_cast<T*>(target.data), count, size_},
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

void NcclCollectives::sum_ranks(const Tensor& target) {
  switch (target.dtype) {
    case DType::F64:
      return sum_ranks_of<double>(target);
    case DType::F32:
      return sum_ranks_of<float>(target);
    case DType::BF16:
      return sum_ranks_of<BFloat16>(target);
    case DType::I64:
      return sum_ranks_of<std::int64_t>(target);
    case DType::I32:
      return sum_ranks_of<std::int32_t>(target);
    default:
      throw Error(
          cat("a sum over ranks of ", name_of(target.dtype), ": a type that can be added was expected"));
  }
}

// The order of a sum is NCCL's choice: the parts are gathered, and added up in ours. These tensors are small.
Event NcclCollectives::all_reduce(const Tensor& data, ReduceOp op) {
  if (data.elements() == 0) return {};
  begin();
  if (op == ReduceOp::Max) {
    check_nccl(ncclAllReduce(data.data, data.data, static_cast<std::size_t>(data.elements()),
                             type_of(data.dtype), ncclMax, group_, stream_),
               "all-reduce");
    return end();
  }
  void* const gathered = parts(size_ * data.bytes());
  check_nccl(
      ncclAllGather(data.data, gathered, static_cast<std::size_t>(data.bytes()), ncclUint8, group_, stream_),
      "all-reduce");
  sum_ranks(data);
  return end();
}

// Slice by slice, so that gradients of any size need little memory beside them.
Event NcclCollectives::reduce_scatter(const Tensor& input, const Tensor& output) {
  constexpr std::int64_t kBytes = 64 << 20;  // of the parts of all ranks
  const std::int64_t all = output.elements(), width = size_of(output.dtype);
  if (all == 0) return {};
  begin();
  const std::int64_t slice = std::clamp<std::int64_t>(kBytes / (size_ * width), 1, all);
  auto* const received = static_cast<char*>(parts(size_ * slice * width));
  for (std::int64_t first = 0; first < all; first += slice) {
    const std::int64_t count = std::min(slice, all - first);
    const auto bytes = static_cast<std::size_t>(count * width);
    Grouped calls("reduce-scatter");
    for (int rank = 0; rank < size_; ++rank) {
      const char* own = static_cast<const char*>(input.data) + (rank * all + first) * width;
      calls.check(ncclSend(own, bytes, ncclUint8, rank, group_, stream_));
      calls.check(ncclRecv(received + rank * count * width, bytes, ncclUint8, rank, group_, stream_));
    }
    calls.end();
    sum_ranks(output.reshape({all}).flat(first, first + count));
  }
  return end();
}

Event NcclCollectives::all_to_all_rows(const Tensor& send, const std::vector<std::int64_t>& send_rows,
                                       const Tensor& recv, const std::vector<std::int64_t>& recv_rows) {
  begin();
  const std::int64_t row = size_of(send.dtype) * send.shape[1];
  const char* from = static_cast<const char*>(send.data);
  char* to = static_cast<char*>(recv.data);
  Grouped calls("all-to-all");
  for (int rank = 0; rank < size_; ++rank) {
    const auto out = static_cast<std::size_t>(send_rows[rank] * row),
               in = static_cast<std::size_t>(recv_rows[rank] * row);
    if (out > 0) calls.check(ncclSend(from, out, ncclUint8, rank, group_, stream_));
    if (in > 0) calls.check(ncclRecv(to, in, ncclUint8, rank, group_, stream_));
    from += out;
    to += in;
  }
  calls.end();
  return end();
}

}  // namespace
}  // namespace hybridmoe::cuda

extern "C" {

int hybridmoe_nccl_version() { return hybridmoe::cuda_plugin::kVersion; }

void hybridmoe_nccl_make_id(std::array<char, 128>* id) {
  hybridmoe::cuda::order_launches();
  ncclUniqueId made;
  hybridmoe::cuda::check_nccl(ncclGetUniqueId(&made), "making an id");
  std::memcpy(id->data(), made.internal, id->size());
}

hybridmoe::DeviceCollectives* hybridmoe_make_nccl_collectives(const hybridmoe::NcclMember& member,
                                                              hybridmoe::Backend& backend) {
  return new hybridmoe::cuda::NcclCollectives(member, backend);
}
}
