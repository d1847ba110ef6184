#include "core/limits.h"

#include <algorithm>
#include <array>
#include <chrono>

#include "core/buffer.h"
#include "core/random.h"

namespace hybridmoe {
namespace {

struct ProductShape {
  std::int64_t rows, in, out;
};
// Large in every direction, and none so large that a round takes long on one core; a device needs more to
// fill it.
constexpr std::array<ProductShape, 3> kShapes = {{{1024, 768, 1024}, {2048, 512, 512}, {768, 1024, 768}}};

// Written once, so that it is memory of its own and not the system's one page of zeros; with values, since a
// GPU that multiplies zeros needs less power and clocks higher than it does with any others.
class Written : public Buffer {
 public:
  Written(Backend& backend, DType dtype, const Shape& shape) : Buffer(backend, dtype, shape) {
    constexpr std::int64_t kValues = 1 << 16;
    const Buffer values(backend, DType::F64, {kValues}, Where::Shared);
    const Random random(1, "operands");
    for (std::int64_t i = 0; i < kValues; ++i) values.tensor().ptr<double>()[i] = random.normal(i);
    const Tensor all = tensor().reshape({tensor().elements()});
    for (std::int64_t begin = 0; begin < all.elements(); begin += kValues) {
      const std::int64_t end = std::min(begin + kValues, all.elements());
      backend.convert(values.tensor().flat(0, end - begin), all.flat(begin, end), backend.main_stream());
    }
    backend.synchronize(backend.main_stream());
  }
};

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds of the best run within the time.
template <class Run>
double best_seconds(Backend& backend, double seconds, const Run& run) {
  run();  // touches the memory, creates what is cached
  backend.synchronize(backend.main_stream());
  double best = 0;
  const double end = seconds_now() + seconds;
  do {
    const double start = seconds_now();
    run();
    backend.synchronize(backend.main_stream());
    const double taken = seconds_now() - start;
    if (best == 0 || taken < best) best = taken;
  } while (seconds_now() < end);
  return best;
}

}  // namespace

double measure_product_limit(Backend& backend, double seconds) {
  // The reference backend's plain loops need no large products to show their speed.
  const DType type = backend.compute_type();
  const std::int64_t divisor = type == DType::F64 ? 16 : 1;
  double best = 0;
  const std::int64_t factor = backend.device() == Device::CPU ? 1 : 8;
  for (ProductShape shape : kShapes) {
    shape = {shape.rows * factor / divisor, shape.in * factor / divisor, shape.out * factor / divisor};
    const Written x(backend, type, {shape.rows, shape.in}), w(backend, type, {shape.out, shape.in}),
        y(backend, type, {shape.rows, shape.out});
    const LinearForward product = {.x = x.tensor(), .weight = w.tensor(), .y = y.tensor()};
    const double taken = best_seconds(backend, seconds / kShapes.size(),
                                      [&] { backend.linear_forward(product, backend.main_stream()); });
    best = std::max(best, 2. * static_cast<double>(shape.rows * shape.in * shape.out) / taken);
  }
  return best;
}

double measure_copy_limit(Backend& backend, double seconds) {
  // A device's caches hold tens of megabytes.
  const bool on_host = backend.device() == Device::CPU;
  const std::int64_t elements = std::int64_t{on_host ? 16 : 256} << 20;
  const Written source(backend, DType::F32, {elements}), target(backend, DType::F32, {elements});
  const double taken = best_seconds(backend, seconds, [&] {
    if (on_host) {
      backend.convert(source.tensor(), target.tensor(), backend.main_stream());
    } else {
      backend.copy(source.tensor(), target.tensor(), backend.main_stream());
    }
  });
  return 2. * static_cast<double>(source.tensor().bytes()) / taken;
}

}  // namespace hybridmoe
