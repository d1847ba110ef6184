// Tensors over a test's own vectors of doubles.
#pragma once

#include <vector>

#include "core/tensor.h"

namespace hybridmoe {

using Vector = std::vector<double>;

inline Tensor view(Vector& values, const Shape& shape) { return Tensor(values.data(), DType::F64, shape); }

}  // namespace hybridmoe
