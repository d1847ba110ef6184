#include <bit>
#include <cmath>

#include "core/buffer.h"
#include "core/random.h"
#include "core/testing/checks.h"

namespace hybridmoe::testing {
namespace {

constexpr std::int64_t kElements = 3001;

float from_bits(std::uint32_t bits) { return std::bit_cast<float>(bits); }

// Halves both ways, signs, the largest and the smallest numbers, and any others.
float master_at(std::int64_t i, bool finite) {
  constexpr std::uint32_t kSpecial[] = {
      0x3f808000, 0x3f818000, 0xbf808000, 0xbf818000, 0x3f807fff, 0x3f808001, 0x3f80ffff, 0x3f800000,
      0x00000000, 0x80000000, 0x00008000, 0x00018000, 0x80007fff, 0x7f7f7fff, 0x7f7f8000, 0x7f7fffff,
      0xff7fffff, 0x7f800000, 0xff800000, 0x7fc00000, 0x7fffffff, 0x7f800001, 0xffffffff};
  const std::int64_t count = finite ? 13 : std::ssize(kSpecial);
  if (i < count) return from_bits(kSpecial[i]);
  return static_cast<float>(Random(11, "masters").normal(i));
}

bool same(float a, float b) {
  return std::isnan(a) ? std::isnan(b) : std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

// Weights with their masters in either form, moments, and the last update's table.
struct State {
  Buffer master, weight, remainder, m, v, table;

  explicit State(Backend& b)
      : master(b, DType::F32, {kElements}, Where::Shared),
        weight(b, DType::BF16, {kElements}, Where::Shared),
        remainder(b, DType::U16, {kElements}, Where::Shared),
        m(b, DType::F32, {kElements}, Where::Shared),
        v(b, DType::F32, {kElements}, Where::Shared),
        table(b, DType::F64, {2, kUpdateColumns}, Where::Shared) {}

  void start(Backend& b, bool finite) {
    for (std::int64_t i = 0; i < kElements; ++i) master.tensor().ptr<float>()[i] = master_at(i, finite);
    b.split_master({.master = master.tensor(), .weight = weight.tensor(), .remainder = remainder.tensor()},
                   b.main_stream());
    b.synchronize(b.main_stream());
  }
  void join(Backend& b) {
    b.zero(master.tensor(), b.main_stream());
    b.join_master({.weight = weight.tensor(), .remainder = remainder.tensor(), .master = master.tensor()},
                  b.main_stream());
    b.synchronize(b.main_stream());
  }
};

void check_split(Backend& backend, std::vector<std::string>* wrong) {
  State state(backend);
  state.start(backend, false);
  state.join(backend);
  for (std::int64_t i = 0; i < kElements; ++i) {
    const float given = master_at(i, false), back = state.master.tensor().ptr<float>()[i];
    if (!same(given, back)) wrong->push_back(cat("master ", given, " came back as ", back));
    const auto weight = static_cast<float>(state.weight.tensor().ptr<BFloat16>()[i]);
    const auto nearest = static_cast<float>(BFloat16(given));
    // BFloat16 rounds halves to even: the same distance.
    const bool near = std::isfinite(nearest) && std::isfinite(weight)
                          ? std::fabs(weight - given) == std::fabs(nearest - given)
                          : same(weight, nearest);
    if (!near) wrong->push_back(cat("master ", given, " was rounded to ", weight));
  }
}

void check_updates(Backend& backend, std::vector<std::string>* wrong) {
  State apart(backend), halves(backend);
  const Buffer grad(backend, DType::F32, {kElements}, Where::Shared),
      scalars(backend, DType::F64, {kStepScalars}, Where::Shared);
  apart.start(backend, true);
  halves.start(backend, true);
  const std::vector<Segment> segments = {{0, 2000, 0, true}, {2007, kElements, 1, false}};
  for (int step = 0; step < 5; ++step) {
    for (std::int64_t i = 0; i < kElements; ++i)
      grad.tensor().ptr<float>()[i] = static_cast<float>(Random(step, "gradient").normal(i));
    double* const s = scalars.tensor().ptr<double>();
    s[kClipFactor] = 0.7;
    s[kSkip] = step == 3 ? 1 : 0;
    s[kLearningRate] = step == 0 ? 0 : 0.01;  // 0: everything stays, the halves too
    s[kBiasCorrection1] = 0.3;
    s[kBiasCorrection2] = 0.14;
    const auto update = [&](State& state, const Tensor& master, const Tensor& remainder) {
      backend.adamw({.grad = grad.tensor(),
                     .master = master,
                     .weight = state.weight.tensor(),
                     .remainder = remainder,
                     .m = state.m.tensor(),
                     .v = state.v.tensor(),
                     .segments = &segments,
                     .scalars = scalars.tensor(),
                     .table = state.table.tensor()},
                    backend.main_stream());
    };
    update(apart, apart.master.tensor(), {});
    update(halves, {}, halves.remainder.tensor());
    halves.join(backend);
    std::int64_t different = 0;
    for (std::int64_t i = 0; i < kElements; ++i) {
      const auto value = [i](const Buffer& buffer) { return buffer.tensor().ptr<float>()[i]; };
      const auto weight = [i](const State& state) { return state.weight.tensor().ptr<BFloat16>()[i].bits; };
      if (!same(value(apart.master), value(halves.master)) || weight(apart) != weight(halves) ||
          !same(value(apart.m), value(halves.m)) || !same(value(apart.v), value(halves.v)))
        ++different;
    }
    for (std::int64_t i = 0; i < apart.table.tensor().elements(); ++i)
      different += apart.table.tensor().ptr<double>()[i] == halves.table.tensor().ptr<double>()[i] ? 0 : 1;
    if (different > 0) wrong->push_back(cat("step ", step, ": ", different, " values differ"));
  }
}

}  // namespace

std::vector<std::string> check_remainders(Backend& backend) {
  std::vector<std::string> wrong;
  check_split(backend, &wrong);
  check_updates(backend, &wrong);
  return wrong;
}

}  // namespace hybridmoe::testing
