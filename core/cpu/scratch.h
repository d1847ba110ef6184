// Working memory of operators: one block per thread, grown when an operator first needs more and reused from
// then on, so that a steady training step allocates nothing. Contents are undefined between operators.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "core/error.h"

namespace hybridmoe::cpu {

class Scratch {
 public:
  explicit Scratch(int threads) : blocks_(static_cast<std::size_t>(threads)) {}

  // At least `bytes` for each of the first `threads` threads; called outside parallel regions.
  void reserve(int threads, std::int64_t bytes) {
    for (int thread = 0; thread < threads; ++thread) blocks_[static_cast<std::size_t>(thread)].grow(bytes);
  }
  std::byte* block(int thread) const { return blocks_[static_cast<std::size_t>(thread)].memory.get(); }

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  struct Block {
    std::unique_ptr<std::byte, Free> memory;
    std::int64_t bytes = 0;

    void grow(std::int64_t wanted) {
      if (wanted <= bytes) return;
      // Whole pages: two threads' blocks then share no cache line.
      const std::int64_t rounded = (wanted + 4095) / 4096 * 4096;
      memory.reset();
      memory.reset(static_cast<std::byte*>(std::aligned_alloc(4096, static_cast<std::size_t>(rounded))));
      bytes = memory ? rounded : 0;
      require(memory != nullptr, "cannot allocate ", rounded, " bytes of working memory for the CPU backend");
    }
  };
  std::vector<Block> blocks_;
};

// Hands out parts of a block in order. A first pass over a null block adds up the size.
class Carver {
 public:
  explicit Carver(std::byte* block = nullptr) : block_(block) {}

  template <class T>
  T* take(std::int64_t count) {
    T* part = block_ == nullptr ? nullptr : reinterpret_cast<T*>(block_ + used_);
    used_ += (count * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
    return part;
  }
  std::int64_t used() const { return used_; }

 private:
  std::byte* block_;
  std::int64_t used_ = 0;
};

}  // namespace hybridmoe::cpu
