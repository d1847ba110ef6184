// Counter-based random numbers: every value is a function of (seed, stream name, index), so that it depends
// neither on the layout nor on what was drawn before. Philox4x32-10 (Salmon et al., SC 2011).
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace hybridmoe {

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::array<std::uint32_t, 2> key);

class Random {
 public:
  Random(std::uint64_t seed, std::string_view stream);

  std::uint64_t bits(std::uint64_t index) const;                     // 64 uniform bits
  double uniform(std::uint64_t index) const;                         // in (0, 1)
  double normal(std::uint64_t index) const;                          // standard normal
  double truncated_normal(std::uint64_t index, double limit) const;  // |value| <= limit, by redrawing
  std::uint64_t below(std::uint64_t index,
                      std::uint64_t n) const;  // in [0, n), without bias worth naming (2^-64 n)

 private:
  std::array<std::uint32_t, 4> draw(std::uint64_t index, std::uint32_t attempt) const;
  std::array<std::uint32_t, 2> key_;
  std::uint32_t stream_ = 0;
};

}  // namespace hybridmoe
