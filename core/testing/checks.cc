#include "core/testing/checks.h"

#include <algorithm>
#include <cmath>

namespace hybridmoe::testing {
namespace {

double epsilon(DType dtype) {
  switch (dtype) {
    case DType::F64:
      return 0x1p-52;
    case DType::F32:
      return 0x1p-23;
    case DType::BF16:
      return 0x1p-7;
    default:
      return 0;  // integers are exact
  }
}

bool integer(ElementType type) { return type == ElementType::Int32 || type == ElementType::Int64; }

bool is_result(const Operand& operand) {
  return operand.role == Role::Output || operand.role == Role::Accumulate;
}

std::int64_t defined_elements(const Operand& operand) {
  return operand.defined < 0 ? operand.shape.elements() : operand.defined;
}

// The same case with everything rounded to the target's types: filled, prepared on the reference, rounded
// again.
void fill_rounded(const OperatorCase& c, Backend& reference, TensorSet& expected, TensorSet& rounded) {
  rounded.fill_inputs();
  expected.assign_inputs(rounded);
  if (c.prepare) {
    expected.upload();
    c.prepare(reference, expected);
    expected.download();
    rounded.assign_inputs(expected);
  }
}

// Poisons what `prepare` may have left in outputs and scratch, and takes over the rounded inputs.
void start_from(const TensorSet& rounded, TensorSet& set) {
  set.assign_inputs(rounded);
  set.upload();
}

double largest_finite(const TensorSet& set, const Operand& operand) {
  double largest = operand.magnitude;
  for (std::int64_t i = 0; i < defined_elements(operand); ++i) {
    const double value = std::abs(set.get(operand.name, i));
    if (std::isfinite(value)) largest = std::max(largest, value);
  }
  return largest;
}

// The worst element of a result, in words; "" when all are within tolerance.
std::string compare(const Operand& operand, const TensorSet& expected, const TensorSet& actual,
                    const Backend& backend) {
  const double stored = epsilon(dtype_in(backend, operand.type));
  const double drift = largest_finite(expected, operand) *
                       (4 * epsilon(backend.statistics_type()) * std::sqrt(operand.length) +
                        epsilon(backend.compute_type()) * operand.roundings);
  std::string worst;
  double worst_excess = 1;
  for (std::int64_t i = 0; i < defined_elements(operand); ++i) {
    const double want = expected.get(operand.name, i), got = actual.get(operand.name, i);
    if (want == got || (std::isnan(want) && std::isnan(got))) continue;
    const double tolerance = integer(operand.type) ? 0 : stored * std::abs(want) + drift;
    double excess = std::abs(got - want) / tolerance;
    if (!std::isfinite(want) || !std::isfinite(got)) excess = INFINITY;
    if (excess <= worst_excess) continue;
    worst_excess = excess;
    worst = cat(operand.name, "[", i, "] of ", operand.shape.str(), " is ", got, ", expected ", want,
                " within ", tolerance);
  }
  return worst;
}

void check_surroundings(const OperatorCase& c, const TensorSet& before, const TensorSet& after,
                        std::vector<std::string>& mistakes) {
  for (const Operand& operand : c.operands) {
    if (!after.margins_intact(operand.name)) {
      mistakes.push_back(cat(c.name, ": something was written between or behind the rows of ", operand.name));
    }
    const bool input = operand.role == Role::Input || operand.role == Role::Derived;
    if (input && !operand.consumed && !after.shares_memory(operand.name) &&
        before.bytes_of(operand.name) != after.bytes_of(operand.name)) {
      mistakes.push_back(cat(c.name, ": the input ", operand.name, " was changed"));
    }
  }
}

}  // namespace

std::vector<std::string> check_parity(const OperatorCase& c, Backend& reference, const Target& target) {
  std::vector<std::string> mistakes;
  const Target oracle(reference);
  TensorSet rounded(c, target), prepared(c, oracle);
  fill_rounded(c, reference, prepared, rounded);
  TensorSet expected(c, oracle), actual(c, target), again(c, target);
  start_from(rounded, expected);
  c.run(reference, expected);
  expected.download();
  for (TensorSet* set : {&actual, &again}) {
    start_from(rounded, *set);
    c.run(*target.backend, *set);
    target.backend->synchronize(target.backend->main_stream());
    set->download();
  }
  check_surroundings(c, rounded, actual, mistakes);
  if (c.reconcile) {
    const std::string wrong = c.reconcile(expected, actual, 4 * epsilon(target.backend->compute_type()));
    if (!wrong.empty()) mistakes.push_back(cat(c.name, ": ", wrong));
  }
  for (const Operand& operand : c.operands) {
    if (!is_result(operand)) continue;
    const std::string wrong = compare(operand, expected, actual, *target.backend);
    if (!wrong.empty()) mistakes.push_back(cat(c.name, ": ", wrong));
    if (defined_elements(operand) == operand.shape.elements() &&
        actual.bytes_of(operand.name) != again.bytes_of(operand.name)) {
      mistakes.push_back(cat(c.name, ": ", operand.name, " has other bits in a second run"));
    }
  }
  return mistakes;
}

namespace {

// The loss with element i of an input moved by `step`.
double loss_at(const OperatorCase& c, Backend& reference, TensorSet& set, const std::string& input,
               std::int64_t i, double step) {
  const double value = set.get(input, i);
  set.set(input, i, value + step);
  set.upload();
  c.prepare(reference, set);
  set.download();
  const double loss = c.loss(set);
  set.set(input, i, value);
  return loss;
}

}  // namespace

std::vector<std::string> check_gradients(const OperatorCase& c, Backend& reference) {
  constexpr double kStep = 1e-5;
  constexpr std::int64_t kSample = 48;
  std::vector<std::string> mistakes;
  const Target oracle(reference);
  TensorSet set(c, oracle), initial(c, oracle), perturbed(c, oracle);
  initial.fill_inputs();
  perturbed.fill_inputs();
  set.fill_inputs();
  set.upload();
  c.prepare(reference, set);
  set.download();
  const double loss = c.loss(set);
  c.run(reference, set);
  set.download();

  for (const OperatorCase::Gradient& pair : c.gradients) {
    const auto gradient_operand = std::find_if(c.operands.begin(), c.operands.end(),
                                               [&](const Operand& o) { return o.name == pair.gradient; });
    const bool accumulated = gradient_operand->role == Role::Accumulate;
    const auto gradient = [&](std::int64_t i) {
      return set.get(pair.gradient, i) - (accumulated ? initial.get(pair.gradient, i) : 0.0);
    };
    const std::int64_t elements = gradient_operand->shape.elements();
    double largest = 0;
    for (std::int64_t i = 0; i < elements; ++i) largest = std::max(largest, std::abs(gradient(i)));
    const double tolerance = 1e-7 * largest + 1e-9 * std::max(1.0, std::abs(loss));
    const Random random(1, c.name + "/sample/" + pair.input);
    for (std::int64_t s = 0; s < std::min(elements, kSample); ++s) {
      const std::int64_t i = elements <= kSample ? s : static_cast<std::int64_t>(random.below(s, elements));
      const double difference = (loss_at(c, reference, perturbed, pair.input, i, kStep) -
                                 loss_at(c, reference, perturbed, pair.input, i, -kStep)) /
                                (2 * kStep);
      if (std::abs(difference - gradient(i)) <= tolerance) continue;
      mistakes.push_back(cat(c.name, ": ", pair.gradient, "[", i, "] is ", gradient(i),
                             ", the difference of ", "the loss in ", pair.input, " is ", difference,
                             " (tolerance ", tolerance, ")"));
      break;
    }
  }
  return mistakes;
}

}  // namespace hybridmoe::testing
