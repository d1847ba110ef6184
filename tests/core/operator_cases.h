// Names of operator cases as GoogleTest parameters.
#pragma once

#include <cctype>
#include <gtest/gtest.h>
#include <ostream>
#include <string>
#include <vector>

#include "core/testing/cases.h"

namespace hybridmoe::testing {

// Cases print as their name.
inline void PrintTo(const OperatorCase& c, std::ostream* out) { *out << c.name; }

inline std::string parameter_name(const ::testing::TestParamInfo<OperatorCase>& info) {
  std::string name = info.param.name;
  for (char& letter : name) {
    if (!std::isalnum(static_cast<unsigned char>(letter))) letter = '_';
  }
  return name;
}

inline std::string lines(const std::vector<std::string>& mistakes) {
  std::string text;
  for (const std::string& mistake : mistakes) text += mistake + "\n";
  return text;
}

}  // namespace hybridmoe::testing
