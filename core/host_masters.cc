#include "core/host_masters.h"

#include <algorithm>

#include "core/buffer.h"

namespace hybridmoe {
namespace {

// Calls body(first, values) for the masters of elements begin .. end, put together part by part.
template <class Body>
void for_parts(const ParameterStore::Bucket& bucket, std::int64_t begin, std::int64_t end, Backend& backend,
               const Body& body) {
  constexpr std::int64_t kValues = 1 << 20;
  const Buffer values(backend, bucket.m.dtype, {std::min(kValues, end - begin)});
  for (std::int64_t first = begin; first < end; first += kValues) {
    const Tensor part = values.tensor().flat(0, std::min(kValues, end - first));
    bucket.get_masters(first, part, backend, backend.main_stream());
    body(first, part);
  }
  backend.synchronize(backend.main_stream());  // the buffer ends here
}

}  // namespace

void HostMasters::read(const ParameterStore::Bucket& bucket, std::int64_t begin, std::int64_t end,
                       const std::function<void(const Tensor&)>& use) {
  if (begin == end) return;
  const Tensor whole = bucket.owned_master();
  if (!whole.empty()) return host_.read(whole.flat(begin, end), use);
  for_parts(bucket, begin, end, backend_,
            [&](std::int64_t, const Tensor& values) { host_.read(values, use); });
}

void HostMasters::update(const ParameterStore::Bucket& bucket, std::int64_t begin, std::int64_t end,
                         const std::function<void(const Tensor&)>& change) {
  if (begin == end) return;
  for_parts(bucket, begin, end, backend_, [&](std::int64_t first, const Tensor& values) {
    host_.update(values, change);
    bucket.set_masters(first, values, backend_, backend_.main_stream());
  });
}

}  // namespace hybridmoe
