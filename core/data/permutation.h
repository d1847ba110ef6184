// A pseudo-random permutation of [0, n) that stores nothing: each image is computed, so that a shuffled order
// of any length costs no memory and any place in it can be asked for. A balanced Feistel network over the
// next even power of two, walked until it falls below n (Black and Rogaway, "Ciphers with Arbitrary Finite
// Domains", CT-RSA 2002): fewer than four rounds of the network on average.
#pragma once

#include <array>
#include <cstdint>

#include "core/random.h"

namespace hybridmoe {

class Permutation {
 public:
  // The permutation of n elements (n >= 1) that `random` stands for.
  Permutation(std::int64_t n, const Random& random);

  std::int64_t operator()(std::int64_t i) const;  // 0 <= i < n

 private:
  static constexpr int kRounds = 8;
  std::uint64_t n_;
  int half_bits_;
  std::array<std::uint64_t, kRounds> keys_;
};

}  // namespace hybridmoe
