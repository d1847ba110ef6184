// Conventions of all operators.
//
// Every method takes one named struct of tensors and a stream, checks nothing twice, and returns when the
// work is queued on the stream (CPU backends: when it is done). Tensors are row-major; a matrix may have a
// row stride larger than its width, everything of another rank is contiguous unless its comment says
// otherwise. Types:
//   C   the compute type: f64 (reference backend), f32 or bf16 (cpu)
//   S   the statistics type: f64 with C = f64, else f32. Also of weight gradients ("gradient type").
// "=" behind an output means it is overwritten, "+=" that it is added to. An optional tensor is absent when
// empty(). n is the number of rows (tokens), d the model width. Outputs may not alias inputs unless a comment
// allows it. Results depend neither on timing nor on earlier calls: the same inputs on the same machine give
// the same bits.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace hybridmoe {

// A queue of device work; opaque. CPU backends execute at once and take null.
class Stream;

// How a weight [a, b] is stored. Output-major [out, in] (y = x Wᵀ) where tensor parallelism splits the
// outputs (qkv, gate, up, router, head), input-major [in, out] (y = x W) where it splits the inputs
// (attention out, down): so every shard is a run of rows.
enum class WeightLayout { OutputMajor, InputMajor };

}  // namespace hybridmoe
