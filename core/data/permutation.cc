#include "core/data/permutation.h"

#include <bit>

#include "core/error.h"

namespace hybridmoe {
namespace {

// SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014).
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

Permutation::Permutation(std::int64_t n, const Random& random) : n_(static_cast<std::uint64_t>(n)) {
  require(n >= 1, "a permutation of ", n, " elements was asked for");
  half_bits_ = (std::bit_width(n_ - 1) + 1) / 2;
  for (int round = 0; round < kRounds; ++round) keys_[round] = random.bits(round);
}

std::int64_t Permutation::operator()(std::int64_t i) const {
  const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
  auto value = static_cast<std::uint64_t>(i);
  do {
    std::uint64_t left = value >> half_bits_, right = value & mask;
    for (const std::uint64_t key : keys_) {
      const std::uint64_t next = left ^ (mix(right + key) & mask);
      left = right;
      right = next;
    }
    value = left << half_bits_ | right;
  } while (value >= n_);
  return static_cast<std::int64_t>(value);
}

}  // namespace hybridmoe
