#include "core/config/rules.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "core/error.h"

namespace hybridmoe {

std::string number(double value) {
  char text[32];
  return std::string(text, std::to_chars(text, text + sizeof text, value).ptr);
}

std::string number(std::int64_t value) { return std::to_string(value); }

std::int64_t nearest_divisor(std::int64_t whole, std::int64_t value) {
  std::int64_t best = 1;
  const auto consider = [&](std::int64_t divisor) {
    const std::int64_t distance = std::abs(divisor - value), so_far = std::abs(best - value);
    if (distance < so_far || (distance == so_far && divisor < best)) best = divisor;
  };
  for (std::int64_t i = 1; i * i <= whole; ++i) {
    if (whole % i != 0) continue;
    consider(i);
    consider(whole / i);
  }
  return best;
}

std::int64_t nearest_multiple(std::int64_t unit, std::int64_t value) {
  const std::int64_t below = value / unit * unit, above = below + unit;
  return below > 0 && value - below <= above - value ? below : above;
}

void Rules::check(bool holds, const std::string& field, const std::string& value, const std::string& rule,
                  const std::string& suggestion) {
  if (holds || !broken_.insert(field).second) return;
  violations_.push_back({field, value, rule, suggestion});
}

void Rules::range(const std::string& field, std::int64_t value, std::int64_t lowest, std::int64_t highest) {
  check(lowest <= value && value <= highest, field, number(value),
        cat("must be from ", lowest, " to ", highest), cat("nearest: ", std::clamp(value, lowest, highest)));
}

void Rules::at_least(const std::string& field, std::int64_t value, std::int64_t lowest) {
  check(value >= lowest, field, number(value), cat("must be at least ", lowest), cat("nearest: ", lowest));
}

void Rules::at_least(const std::string& field, double value, double lowest) {
  check(std::isfinite(value) && value >= lowest, field, number(value),
        cat("must be a finite number, at least ", number(lowest)), cat("nearest: ", number(lowest)));
}

void Rules::positive(const std::string& field, double value, double suggestion) {
  check(std::isfinite(value) && value > 0, field, number(value), "must be a finite number above 0",
        cat("usual: ", number(suggestion)));
}

void Rules::fraction(const std::string& field, double value, bool one_too) {
  const bool holds = value >= 0 && (value < 1 || (one_too && value == 1));
  check(holds, field, number(value), one_too ? "must be from 0 to 1" : "must be at least 0 and below 1",
        value > 0 ? (one_too ? "nearest: 1" : "nearest: just below 1") : "nearest: 0");
}

bool Rules::sound(std::initializer_list<std::string> fields) const {
  return std::none_of(fields.begin(), fields.end(),
                      [&](const std::string& field) { return broken_.contains(field); });
}

}  // namespace hybridmoe
