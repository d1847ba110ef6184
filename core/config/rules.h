// Collects the broken rules of a configuration: at most one violation a field, and rules that relate several
// fields are asked only when each of them is sound by itself, so that one mistake is reported once.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <set>
#include <string>
#include <vector>

#include "core/config/violation.h"
#include "proto/config.pb.h"

namespace hybridmoe {

// A number as a user would write it: the shortest decimal that reads back as the same value.
std::string number(double value);
std::string number(std::int64_t value);

// The divisor of `whole` (positive) nearest to `value`; the smaller of two equally near.
std::int64_t nearest_divisor(std::int64_t whole, std::int64_t value);
// The positive multiple of `unit` nearest to `value`; the smaller of two equally near.
std::int64_t nearest_multiple(std::int64_t unit, std::int64_t value);

class Rules {
 public:
  // Notes a violation unless `holds` or the field has one already.
  void check(bool holds, const std::string& field, const std::string& value, const std::string& rule,
             const std::string& suggestion = "");
  void range(const std::string& field, std::int64_t value, std::int64_t lowest, std::int64_t highest);
  void at_least(const std::string& field, std::int64_t value, std::int64_t lowest);
  // lowest <= value, and value finite.
  void at_least(const std::string& field, double value, double lowest);
  void positive(const std::string& field, double value, double suggestion);
  // 0 <= value < 1, or <= 1 when `one_too`.
  void fraction(const std::string& field, double value, bool one_too = false);

  bool sound(std::initializer_list<std::string> fields) const;
  const std::vector<Violation>& violations() const { return violations_; }

 private:
  std::vector<Violation> violations_;
  std::set<std::string> broken_;
};

// Whether everything that resolve_layers() reads has been found sound, so that it does not throw.
bool layers_resolve(const ModelConfig& model, const Rules& rules);

// The parts of validate(): the model with its experts, and the other messages.
void check_model(const ModelConfig& model, Rules* rules);
void check_moe(const ModelConfig& model, Rules* rules);
void check_data(const Config& config, bool needs_data, Rules* rules);
void check_training(const Config& config, Rules* rules);
void check_parallel(const Config& config, int world_size, Rules* rules);

}  // namespace hybridmoe
