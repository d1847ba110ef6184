// bf16 as storage: the upper half of an fp32, rounded to nearest even. Arithmetic happens in float.
#pragma once

#include <cstdint>
#include <cstring>

namespace hybridmoe {

struct BFloat16 {
  std::uint16_t bits = 0;

  BFloat16() = default;
  explicit BFloat16(float value) {
    std::uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    if ((word & 0x7fffffffu) > 0x7f800000u) {  // NaN: rounding could turn it into an infinity
      bits = static_cast<std::uint16_t>((word >> 16) | 0x40u);
    } else {
      bits = static_cast<std::uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
    }
  }
  explicit operator float() const {
    const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
};

static_assert(sizeof(BFloat16) == 2);

}  // namespace hybridmoe
