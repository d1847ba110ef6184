// Damage for tests of what finds it.
#pragma once

#include <cstdint>
#include <fstream>
#include <string>

namespace hybridmoe {

// Turns bit `bit` of the byte at `offset`; a second call turns it back.
inline void flip_bit(const std::string& path, std::int64_t offset, int bit = 2) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(offset);
  const auto byte = static_cast<char>(file.get() ^ (1 << bit));
  file.seekp(offset);
  file.put(byte);
}

}  // namespace hybridmoe
