// What is checked of every operator case. Both functions return what is wrong, one sentence each; nothing
// when all is well.
#pragma once

#include <string>
#include <vector>

#include "core/testing/operator_case.h"

namespace hybridmoe::testing {

// Runs the case on the reference and on the target with the same inputs, rounded to the target's types.
//
// An output x of M = max |x| over the tensor (or the operand's `magnitude` where that is larger) may be off
// by
//   ε(type of x) · |x|  +  M · (4 · ε(S) · √length + ε(C) · roundings):
// one rounding when it is stored; `length` terms whose roundings in the statistics type add up like a random
// walk; and what was rounded to the compute type before. Integers and non-finite values must be equal. Inputs
// and everything around the outputs must be untouched, "=" must not read what was there before, and a second
// run from the same inputs must give the same bits.
std::vector<std::string> check_parity(const OperatorCase& c, Backend& reference, const Target& target);

// Compares the gradients of a backward case with central differences of its loss, in double on `reference`.
// With the step h = 1e-5 their error is h²/6 · f''' ~ 1e-10 f''' from truncation and 1e-16/h · |loss| ~ 1e-11
// |loss| (times the roundings in the loss) from cancellation: the tolerance is 1e-7 of the tensor's largest
// gradient plus 1e-9 · max(1, |loss|). Of large inputs, a sample of elements is taken.
std::vector<std::string> check_gradients(const OperatorCase& c, Backend& reference);

// Of a backend in bf16: masters that were split come back, the weights are the nearest of the type, and
// updates with remainders give the bits that updates with masters give.
std::vector<std::string> check_remainders(Backend& backend);

}  // namespace hybridmoe::testing
