// A master weight W (fp32) in two halves: the bf16 weight that is computed with, and the 16 bits that it
// leaves away. The weight is W rounded to nearest, halves away from zero (every 2^16th value is a half; to
// even, the remainder could not tell a half that went up from one that went down), the remainder W's lower
// half. Read as a signed number it is what W's bits are beyond the weight's, so that
//   bits of W = (bits of the weight << 16) + remainder.
// All W come back, a NaN as a NaN.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HYBRIDMOE_HOST_DEVICE __host__ __device__
#else
#define HYBRIDMOE_HOST_DEVICE
#endif

namespace hybridmoe {

struct MasterHalves {
  std::uint16_t weight = 0, remainder = 0;
};

HYBRIDMOE_HOST_DEVICE inline MasterHalves split_master(std::uint32_t bits) {
  // A NaN must stay one: with its lower half gone, or rounded up, it could become an infinity, or zero.
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const std::uint32_t kept = nan ? (bits & 0xffff0000u) | 0x00400000u : bits;
  return {static_cast<std::uint16_t>((kept + 0x8000u) >> 16), static_cast<std::uint16_t>(kept)};
}

HYBRIDMOE_HOST_DEVICE inline std::uint32_t join_master(std::uint16_t weight, std::uint16_t remainder) {
  const std::uint32_t borrowed = (remainder & 0x8000u) << 1;  // the weight was rounded up
  return (static_cast<std::uint32_t>(weight) << 16) + remainder - borrowed;
}

}  // namespace hybridmoe
