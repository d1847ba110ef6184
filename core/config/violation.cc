#include "core/config/violation.h"

#include <algorithm>
#include <cctype>
#include <numeric>

#include "core/error.h"

namespace hybridmoe {
namespace {

// Levenshtein's distance, case ignored.
int edit_distance(std::string_view a, std::string_view b) {
  const auto lower = [](char c) { return std::tolower(static_cast<unsigned char>(c)); };
  std::vector<int> row(b.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (std::size_t i = 0; i < a.size(); ++i) {
    int diagonal = row[0];
    row[0] = static_cast<int>(i) + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const int replace = diagonal + (lower(a[i]) != lower(b[j]));
      diagonal = row[j + 1];
      row[j + 1] = std::min({replace, row[j] + 1, diagonal + 1});
    }
  }
  return row.back();
}

}  // namespace

std::string to_string(const Violation& violation) {
  std::string line;
  if (!violation.place.empty()) line += violation.place + ": ";
  line += violation.field;
  if (!violation.value.empty()) line += " = " + violation.value;
  if (!violation.field.empty()) line += ": ";
  line += violation.rule;
  if (!violation.suggestion.empty()) line += "; " + violation.suggestion;
  return line;
}

std::string to_string(const std::vector<Violation>& violations, const std::string& name) {
  const std::size_t count = violations.size();
  std::string message = cat(name, ": the configuration has ", count, count == 1 ? " mistake:" : " mistakes:");
  for (const Violation& violation : violations) message += "\n  " + to_string(violation);
  return message;
}

std::string nearest_name(std::string_view word, const std::vector<std::string>& candidates) {
  std::string best;
  int best_distance = std::max(2, static_cast<int>(word.size()) / 3) + 1;
  for (const std::string& candidate : candidates) {
    const int distance = edit_distance(word, candidate);
    const bool unrelated = distance >= static_cast<int>(std::max(word.size(), candidate.size()));
    if (!unrelated && distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

}  // namespace hybridmoe
