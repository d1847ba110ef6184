// All memory of a run, planned first and committed once. Components say which buffers they need (name, shape,
// type); nothing is allocated until `commit`, so the plan can be asked for its size without a device. Buffers
// declared inside a scope are temporaries: scopes that do not enclose each other share the same memory. Views
// never own.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/tensor.h"

namespace hybridmoe {

class MemoryPlan {
 public:
  MemoryPlan() = default;
  MemoryPlan(const MemoryPlan&) = delete;
  MemoryPlan& operator=(const MemoryPlan&) = delete;
  ~MemoryPlan();

  // Plans a buffer and sets *target: shape and type now, the address at commit (zeroed memory). The target
  // must stay where it is until then. `component` groups buffers in the report ("weights", "activations",
  // ...).
  void add(Tensor* target, std::string name, const Shape& shape, DType dtype, std::string component);

  // Temporaries declared between a scope's construction and destruction end with it.
  class Scope {
   public:
    explicit Scope(MemoryPlan& plan) : plan_(plan), mark_(plan.scratch_top_) { ++plan_.depth_; }
    ~Scope() {
      plan_.scratch_top_ = mark_;
      --plan_.depth_;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    MemoryPlan& plan_;
    std::int64_t mark_;
  };

  std::int64_t bytes() const { return persistent_ + scratch_peak_; }
  // Component -> bytes; temporaries appear once, as "workspace".
  std::map<std::string, std::int64_t> by_component() const;
  // Allocates one arena and fills every target. Throws when the memory cannot be had.
  void commit(Backend& backend);
  // Bytes of the arena that are resident in memory now; the most that was ever used, since nothing is given
  // back.
  std::int64_t resident_bytes() const;

 private:
  struct Buffer {
    Tensor* target;
    std::string name, component;
    std::int64_t offset, bytes;
    bool temporary;
  };
  std::vector<Buffer> buffers_;
  std::int64_t persistent_ = 0, scratch_top_ = 0, scratch_peak_ = 0;
  int depth_ = 0;
  Backend* backend_ = nullptr;
  void* arena_ = nullptr;
};

}  // namespace hybridmoe
