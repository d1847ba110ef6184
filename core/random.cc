#include "core/random.h"

#include <cmath>
#include <numbers>

namespace hybridmoe {

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> c, std::array<std::uint32_t, 2> k) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * c[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * c[2];
    c = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<std::uint32_t>(b),
         static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<std::uint32_t>(a)};
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return c;
}

namespace {

// FNV-1a, then a finaliser: streams with similar names are unrelated.
std::uint64_t hash_name(std::string_view name) {
  std::uint64_t h = 0xcbf29ce484222325u;
  for (const char c : name) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdu;
  h = (h ^ (h >> 33)) * 0xc4ceb9fe1a85ec53u;
  return h ^ (h >> 33);
}

double to_uniform(std::uint32_t high, std::uint32_t low) {
  const std::uint64_t bits = (std::uint64_t{high} << 32 | low) >> 11;  // 53 bits
  return (static_cast<double>(bits) + 0.5) * 0x1p-53;
}

double box_muller(const std::array<std::uint32_t, 4>& r) {
  return std::sqrt(-2 * std::log(to_uniform(r[0], r[1]))) *
         std::cos(2 * std::numbers::pi * to_uniform(r[2], r[3]));
}

}  // namespace

Random::Random(std::uint64_t seed, std::string_view stream) {
  const std::uint64_t h = hash_name(stream);
  key_ = {static_cast<std::uint32_t>(seed) ^ static_cast<std::uint32_t>(h),
          static_cast<std::uint32_t>(seed >> 32) ^ static_cast<std::uint32_t>(h >> 32)};
  stream_ = static_cast<std::uint32_t>(h ^ (h >> 17));
}

std::array<std::uint32_t, 4> Random::draw(std::uint64_t index, std::uint32_t attempt) const {
  return philox4x32(
      {static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(index >> 32), attempt, stream_}, key_);
}

std::uint64_t Random::bits(std::uint64_t index) const {
  const auto r = draw(index, 0);
  return std::uint64_t{r[0]} << 32 | r[1];
}

double Random::uniform(std::uint64_t index) const {
  const auto r = draw(index, 0);
  return to_uniform(r[0], r[1]);
}

double Random::normal(std::uint64_t index) const { return box_muller(draw(index, 0)); }

double Random::truncated_normal(std::uint64_t index, double limit) const {
  for (std::uint32_t attempt = 0;; ++attempt) {
    const double value = box_muller(draw(index, attempt));
    if (std::abs(value) <= limit) return value;
  }
}

std::uint64_t Random::below(std::uint64_t index, std::uint64_t n) const {
  return static_cast<std::uint64_t>((static_cast<unsigned __int128>(bits(index)) * n) >> 64);
}

}  // namespace hybridmoe
