// XXH3-64 (xxHash 0.8), for arrays: as fast as memory.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

namespace hybridmoe {

std::uint64_t xxh3(std::string_view bytes);

// The same of bytes that come in parts.
class Xxh3Stream {
 public:
  Xxh3Stream();
  ~Xxh3Stream();
  void add(std::string_view bytes);
  std::uint64_t value() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace hybridmoe
