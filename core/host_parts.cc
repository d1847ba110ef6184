#include "core/host_parts.h"

#include <algorithm>

namespace hybridmoe {

void HostParts::walk(const Tensor& tensor, bool in, bool out,
                     const std::function<void(const Tensor&)>& body) {
  constexpr std::int64_t kBytes = 8 << 20;
  Stream* const stream = backend_.main_stream();
  const Tensor all = tensor.reshape({tensor.elements()});
  if (tensor.device == Device::CPU) {
    backend_.synchronize(stream);
    return body(all);
  }
  if (!staging_) staging_.emplace(backend_, DType::U8, Shape{kBytes}, Where::Shared);
  const std::int64_t most = kBytes / size_of(tensor.dtype);
  for (std::int64_t begin = 0; begin < all.elements(); begin += most) {
    const std::int64_t end = std::min(begin + most, all.elements());
    const Tensor part = all.flat(begin, end), staged(staging_->tensor().data, tensor.dtype, {end - begin});
    if (in) backend_.copy(part, staged, stream);
    backend_.synchronize(stream);
    body(staged);
    if (out) backend_.copy(staged, part, stream);
  }
  if (out) backend_.synchronize(stream);
}

}  // namespace hybridmoe
