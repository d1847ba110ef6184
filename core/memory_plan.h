// All memory of a run, planned first and committed once. Components say which buffers they need (name, shape,
// type); nothing is allocated until `commit`, so the plan can be asked for its size without a device. Buffers
// declared inside a scope are temporaries: scopes that do not enclose each other share the same memory. Views
// never own.
//
// A few buffers hold as many rows as the router sends to this rank, which no plan can know. They count in the
// plan with the rows expected of them, while the arena reserves addresses for the most rows that can come:
// memory that nobody touches costs nothing.
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
  // Bytes of some buffers: addresses, and what is expected to be touched of them.
  struct Extent {
    std::int64_t reserved = 0, expected = 0;
  };

  MemoryPlan() = default;
  MemoryPlan(const MemoryPlan&) = delete;
  MemoryPlan& operator=(const MemoryPlan&) = delete;
  ~MemoryPlan();

  // Plans a buffer and sets *target: shape and type now, the address at commit (zeroed memory). The target
  // must stay where it is until then. `component` groups buffers in the report ("weights", "activations",
  // ...).
  void add(Tensor* target, std::string name, const Shape& shape, DType dtype, std::string component);
  // The same for a buffer of up to shape[0] rows, of which the plan counts `expected_rows`.
  void add_rows(Tensor* target, std::string name, const Shape& shape, std::int64_t expected_rows, DType dtype,
                std::string component);
  // A buffer that the host reads or writes too (Backend::allocate_shared); never a temporary.
  void add_shared(Tensor* target, std::string name, const Shape& shape, DType dtype, std::string component);
  void add_shared_rows(Tensor* target, std::string name, const Shape& shape, std::int64_t expected_rows,
                       DType dtype, std::string component);

  // Temporaries declared between a scope's construction and destruction end with it.
  class Scope {
   public:
    explicit Scope(MemoryPlan& plan) : plan_(plan), mark_(plan.scratch_) { ++plan_.depth_; }
    ~Scope() {
      plan_.scratch_.reserved = mark_.reserved;
      plan_.scratch_.expected = mark_.expected;
      --plan_.depth_;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    MemoryPlan& plan_;
    Extent mark_;
  };

  // What the plan counts on.
  std::int64_t bytes() const { return persistent_.expected + scratch_peak_.expected + shared_.expected; }
  // Addresses taken at commit.
  std::int64_t reserved_bytes() const { return arena_bytes() + shared_.reserved; }
  // Component -> bytes; temporaries appear once, as "workspace".
  std::map<std::string, std::int64_t> by_component() const;
  // Allocates the arenas and fills every target. Throws when the memory cannot be had.
  void commit(Backend& backend);
  // Bytes of the arenas that are resident in memory now; the most that was ever used, since nothing is given
  // back.
  std::int64_t resident_bytes() const;

 private:
  struct Buffer {
    Tensor* target;
    std::string name, component;
    std::int64_t offset;
    Extent size;
    Extent MemoryPlan::*region;
  };
  void place(Tensor* target, std::string name, const Shape& shape, std::int64_t expected_rows, DType dtype,
             std::string component, Extent MemoryPlan::*region);
  std::int64_t arena_bytes() const { return persistent_.reserved + scratch_peak_.reserved; }

  std::vector<Buffer> buffers_;
  Extent persistent_, scratch_, scratch_peak_, shared_;
  int depth_ = 0;
  Backend* backend_ = nullptr;
  void *arena_ = nullptr, *shared_arena_ = nullptr;
};

}  // namespace hybridmoe
