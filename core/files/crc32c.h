// CRC-32C (Castagnoli; RFC 3720 B.4): reflected polynomial 0x82F63B78, initial value and final xor ~0.
#pragma once

#include <cstdint>
#include <string_view>

namespace hybridmoe {

// The checksum of `before` followed by `bytes`, where `crc` is that of `before`. Uses the CPU's instruction
// where there is one.
std::uint32_t crc32c(std::string_view bytes, std::uint32_t crc = 0);
// The same by tables, on any CPU.
std::uint32_t crc32c_by_tables(std::string_view bytes, std::uint32_t crc = 0);

// TFRecord stores checksums masked, because the checksum of data that holds its own checksum is degenerate.
inline std::uint32_t masked_crc32c(std::string_view bytes) {
  const std::uint32_t crc = crc32c(bytes);
  return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

}  // namespace hybridmoe
