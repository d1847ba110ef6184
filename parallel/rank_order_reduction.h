// The arithmetic of reductions whose order is part of the contract: x_0 op x_1 op ..., element by element.
#pragma once

#include <cstdint>
#include <vector>

#include "core/communicator.h"

namespace hybridmoe {

bool is_reducible(DType dtype);  // F64, F32, BF16, I64, I32

// output [count] = the sources [count] combined from the first to the last. bf16 is summed in fp32 and
// rounded once; the other types are summed in their own. A source may be output itself. Throws Error for a
// type that is not reducible.
void reduce_in_order(ReduceOp op, DType dtype, const std::vector<const void*>& sources, void* output,
                     std::int64_t count);

}  // namespace hybridmoe
