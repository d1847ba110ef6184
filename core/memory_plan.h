// All memory of a run, planned first and committed once. Components say which buffers they need (name, shape,
// type); nothing is allocated until `commit`, so the plan can be asked for its size without a device. Buffers
// declared inside a scope are temporaries: scopes that do not enclose each other share the same memory. Views
// never own.
//
// A few buffers hold as many rows as the router sends to this rank, which no plan can know. They count in the
// plan with the rows expected of them, while the arena reserves addresses for the most rows that can come. On
// a CPU memory that nobody touches costs nothing. A device (Backend::granule) puts memory behind the expected
// rows at commit, and behind more of them when ensure_rows asks for it; these buffers lie at the arena's end.
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

  // granule: of the backend that it will be committed to, or 0, which takes all memory at commit. rank: of
  // the world, for messages.
  explicit MemoryPlan(std::int64_t granule = 0, int rank = 0) : granule_(granule), rank_(rank) {}
  MemoryPlan(const MemoryPlan&) = delete;
  MemoryPlan& operator=(const MemoryPlan&) = delete;
  ~MemoryPlan();

  // Plans a buffer and sets *target: shape and type now, the address at commit (zeroed memory). The target
  // must stay where it is until then. `component` groups buffers in the report ("weights", "activations",
  // ...).
  void add(Tensor* target, std::string name, const Shape& shape, DType dtype, std::string component);
  // The same for a buffer of up to shape[0] rows, of which the plan counts `expected_rows`. Whoever is about
  // to touch others calls ensure_rows first.
  void add_rows(Tensor* target, std::string name, const Shape& shape, std::int64_t expected_rows, DType dtype,
                std::string component);
  // A buffer that the host reads or writes too (Backend::allocate_shared); never a temporary. Its memory is
  // there from the start: numbers of rows, not the rows themselves, a hundredth of what they need.
  void add_shared(Tensor* target, std::string name, const Shape& shape, DType dtype, std::string component);
  void add_shared_rows(Tensor* target, std::string name, const Shape& shape, std::int64_t expected_rows,
                       DType dtype, std::string component);

  // Temporaries declared between a scope's construction and destruction end with it.
  class Scope {
   public:
    explicit Scope(MemoryPlan& plan)
        : plan_(plan), mark_(plan.scratch_.now), growing_mark_(plan.growing_scratch_.now) {
      ++plan_.depth_;
    }
    ~Scope() {
      plan_.scratch_.now = mark_;
      plan_.growing_scratch_.now = growing_mark_;
      --plan_.depth_;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    MemoryPlan& plan_;
    Extent mark_, growing_mark_;
  };

  // What the plan counts on; what commit takes, where memory comes by granules.
  std::int64_t bytes() const {
    return persistent_.peak.expected + scratch_.peak.expected + growing_.peak.expected +
           growing_scratch_.peak.expected + shared_.peak.expected;
  }
  // Addresses taken at commit.
  std::int64_t reserved_bytes() const { return arena_bytes() + shared_.peak.reserved; }
  // Component -> bytes; temporaries appear once, as "workspace".
  std::map<std::string, std::int64_t> by_component() const;
  // Allocates the arenas and fills every target. Throws when the memory cannot be had.
  void commit(Backend& backend);
  // Puts memory behind the first `rows` rows of a buffer that add_rows planned (its target itself), and a
  // quarter more when there is not enough, so that it seldom happens; what is there stays as it is. Waits for
  // the backend then. Throws Error that names the buffer when the memory cannot be had. Nothing to do for
  // targets that were not planned.
  void ensure_rows(const Tensor& buffer, std::int64_t rows);
  std::int64_t growths() const { return growths_; }  // how often ensure_rows took memory
  // Bytes of the arenas that are resident in memory now; the most that was ever used, since nothing is given
  // back.
  std::int64_t resident_bytes() const;

 private:
  // Buffers side by side.
  struct Region {
    Extent now, peak;  // peak: of what scopes stack up
  };
  struct Buffer {
    Tensor* target;
    std::string name, component;
    std::int64_t offset;
    Extent size;
    Region MemoryPlan::*region;
  };
  void place(Tensor* target, std::string name, const Shape& shape, std::int64_t expected_rows, DType dtype,
             std::string component, bool shared);
  bool is_temporary(const Buffer& buffer) const {
    return buffer.region == &MemoryPlan::scratch_ || buffer.region == &MemoryPlan::growing_scratch_;
  }
  // The arena: what has memory from the start, then what grows.
  std::int64_t growing_begin() const;
  std::int64_t arena_bytes() const {
    return growing_begin() + growing_.peak.reserved + growing_scratch_.peak.reserved;
  }
  std::int64_t region_begin(Region MemoryPlan::*region) const;
  // Memory behind bytes begin .. end of the arena, wherever there is none yet.
  void map(std::int64_t begin, std::int64_t end);
  bool is_mapped(std::int64_t begin, std::int64_t end) const;

  std::int64_t granule_;
  int rank_;
  std::vector<Buffer> buffers_;
  Region persistent_, scratch_, shared_;
  Region growing_, growing_scratch_;  // what has fewer rows than it may get; empty without granules
  int depth_ = 0;
  Backend* backend_ = nullptr;
  void *arena_ = nullptr, *shared_arena_ = nullptr;
  std::vector<bool> mapped_;  // by granule of the arena
  std::int64_t growths_ = 0;
};

}  // namespace hybridmoe
