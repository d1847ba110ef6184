#include "core/limits.h"

#include <algorithm>
#include <array>
#include <chrono>

namespace hybridmoe {
namespace {

struct ProductShape {
  std::int64_t rows, in, out;
};
// Large in every direction, and none so large that a round takes long on one core.
constexpr std::array<ProductShape, 3> kShapes = {{{1024, 768, 1024}, {2048, 512, 512}, {768, 1024, 768}}};

class Buffer {
 public:
  Buffer(Backend& backend, const Shape& shape) : backend_(backend) {
    tensor_ = Tensor(nullptr, backend.compute_type(), shape, backend.device());
    bytes_ = static_cast<std::size_t>(tensor_.bytes());
    tensor_.data = backend.allocate(bytes_);
    // Written once, so that it is memory of its own and not the system's one page of zeros. Products take the
    // same time whatever the finite values are.
    backend.zero(tensor_, backend.main_stream());
  }
  ~Buffer() { backend_.release(tensor_.data, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  const Tensor& tensor() const { return tensor_; }

 private:
  Backend& backend_;
  Tensor tensor_;
  std::size_t bytes_ = 0;
};

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The best rate of one shape within the time.
double measure_shape(Backend& backend, const ProductShape& shape, double seconds) {
  const Buffer x(backend, {shape.rows, shape.in}), w(backend, {shape.out, shape.in}),
      y(backend, {shape.rows, shape.out});
  const LinearForward product = {.x = x.tensor(), .weight = w.tensor(), .y = y.tensor()};
  const double flops = 2. * static_cast<double>(shape.rows * shape.in * shape.out);
  backend.linear_forward(product, backend.main_stream());  // touches the memory, creates what is cached
  backend.synchronize(backend.main_stream());
  double best = 0;
  const double end = seconds_now() + seconds;
  do {
    const double start = seconds_now();
    backend.linear_forward(product, backend.main_stream());
    backend.synchronize(backend.main_stream());
    best = std::max(best, flops / (seconds_now() - start));
  } while (seconds_now() < end);
  return best;
}

}  // namespace

double measure_product_limit(Backend& backend, double seconds) {
  // The reference backend's plain loops need no large products to show their speed.
  const std::int64_t divisor = backend.compute_type() == DType::F64 ? 16 : 1;
  double best = 0;
  for (ProductShape shape : kShapes) {
    shape = {shape.rows / divisor, shape.in / divisor, shape.out / divisor};
    best = std::max(best, measure_shape(backend, shape, seconds / kShapes.size()));
  }
  return best;
}

}  // namespace hybridmoe
