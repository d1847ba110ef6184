// A backend is one implementation of every operator family, plus the memory it computes in. The model sees
// only this.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "core/operators/attention.h"
#include "core/operators/experts.h"
#include "core/operators/loss.h"
#include "core/operators/norms.h"
#include "core/operators/optimizer.h"
#include "core/operators/products.h"

namespace hybridmoe {

class Backend : public Products,
                public Norms,
                public Attention,
                public Experts,
                public Loss,
                public Optimizer {
 public:
  ~Backend() override = default;

  virtual std::string name() const = 0;  // "cpu (oneDNN 2.6.3, avx2, 1 thread)"
  virtual Device device() const = 0;
  virtual DType compute_type() const = 0;  // C of core/operators/common.h
  DType statistics_type() const { return compute_type() == DType::F64 ? DType::F64 : DType::F32; }

  // Memory for an arena: zeroed, aligned to 64 bytes. CPU backends reserve addresses and let the system fill
  // pages on first use. Throws Error naming the size when it cannot be had. Freed by release.
  virtual void* allocate(std::size_t bytes);
  virtual void release(void* memory, std::size_t bytes) noexcept;
  // The same where the host and the operators both reach it, the host only while nothing is queued that
  // touches it. For what is small, and written or read by the host in every step: a device has it far away.
  virtual void* allocate_shared(std::size_t bytes) { return allocate(bytes); }
  virtual void release_shared(void* memory, std::size_t bytes) noexcept { release(memory, bytes); }
  // Addresses first, memory behind parts of them later, for arenas of which nobody knows how much they will
  // need. Parts begin and end at multiples of `granule` bytes; 0 where memory that is not touched costs
  // nothing, or where the device cannot do it: then reserve is allocate. `map` takes memory for bytes
  // begin .. end of `reserved`, none of which has any yet, and queues the zeroing of it on the main stream;
  // throws Error naming the size when it cannot be had, and has changed nothing then. Who touches addresses
  // without memory crashes. release_reserved gives all of it back.
  virtual std::int64_t granule() const { return 0; }
  virtual void* reserve(std::size_t bytes) { return allocate(bytes); }
  virtual void map(void* /*reserved*/, std::int64_t /*begin*/, std::int64_t /*end*/) {}
  virtual void release_reserved(void* reserved, std::size_t bytes) noexcept { release(reserved, bytes); }
  // target = source, contiguous, of one type and as many elements; each in this backend's memory or the
  // host's. Queued; host memory may be touched again after synchronize.
  virtual void copy(const Tensor& source, const Tensor& target, Stream* stream);

  // Null on CPU backends.
  virtual Stream* main_stream() { return nullptr; }
  virtual void synchronize(Stream*) {}
  // Marks what is queued on the stream up to now, in the place of the mark before; await_mark waits for that
  // and not for what is queued behind it.
  virtual void mark(Stream*) {}
  virtual void await_mark() {}

  // Called now and then, so that nonblocking communication makes progress: between tiles of long operators,
  // again and again while the host waits for what is queued, and once when it has waited. May be null. What
  // it throws ends the operator or the wait; when it has waited nothing may be thrown. It is not called while
  // it runs.
  enum class Moment { Computing, Waiting, Waited };
  using ProgressHook = void (*)(void* argument, Moment moment);
  void set_progress_hook(ProgressHook hook, void* argument) {
    progress_hook_ = hook;
    progress_argument_ = argument;
  }

 protected:
  bool has_progress_hook() const { return progress_hook_ != nullptr && !in_hook_; }
  void progress(Moment moment = Moment::Computing) {
    if (!has_progress_hook()) return;
    struct Inside {
      explicit Inside(bool& inside) : it(inside) { it = true; }
      ~Inside() { it = false; }
      bool& it;
    };
    const Inside inside(in_hook_);
    progress_hook_(progress_argument_, moment);
  }

 private:
  ProgressHook progress_hook_ = nullptr;
  void* progress_argument_ = nullptr;
  bool in_hook_ = false;
};

// Plain loops in double precision (core/reference/): the oracle.
std::unique_ptr<Backend> make_reference_backend();

struct CpuBackendOptions {
  DType compute_type = DType::F32;  // F32 or BF16
  int threads = 1;                  // of OpenMP, for every operator
};
// oneDNN and OpenMP (core/cpu/). BF16 uses native products where cpu_multiplies_bf16(), else converts
// operands to fp32.
std::unique_ptr<Backend> make_cpu_backend(const CpuBackendOptions& options);
bool cpu_multiplies_bf16();

}  // namespace hybridmoe
