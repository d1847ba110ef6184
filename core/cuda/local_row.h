// A rank's part of a table of tokens.
#pragma once

#include <cstdint>

#include "core/cuda/portable.h"

namespace hybridmoe::cuda {

// Row of a rank's part of the table, `rows` for a token that it does not hold.
struct LocalRow {
  const std::int32_t* tokens;
  std::int64_t first_row, rows;
  HYBRIDMOE_DEVICE std::int64_t operator()(std::int64_t t) const {
    const std::int64_t row = tokens[t] - first_row;
    return tokens[t] >= 0 && row >= 0 && row < rows ? row : rows;
  }
};

}  // namespace hybridmoe::cuda
