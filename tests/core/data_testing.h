// What the tests of the data part share: a fresh folder, and small corpora in it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

#include "core/data/corpus_info.h"
#include "core/data/token_writer.h"
#include "core/error.h"
#include "proto/config.pb.h"
#include "proto/data.pb.h"
#include "tests/temporary_directory.h"

namespace hybridmoe::testing {

// A folder of its own for each test, removed afterwards.
class TemporaryFolder : public ::testing::Test {
 protected:
  std::string path(const std::string& name) const { return folder_.file(name); }

  std::string write(const std::string& name, const std::string& content) const {
    std::filesystem::create_directories(std::filesystem::path(path(name)).parent_path());
    std::ofstream file(path(name), std::ios::binary);
    file << content;
    if (!file.flush()) throw Error(path(name) + ": cannot be written");
    return path(name);
  }

  static std::string read(const std::string& file) {
    std::ifstream in(file, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  // Documents of the given tokens, as they are.
  std::string write_corpus(const std::string& name, const std::vector<std::vector<std::int32_t>>& documents,
                           TokenType type = TokenType::UInt16) const {
    TokenWriter writer(path(name), type, false);
    for (const auto& document : documents) {
      writer.append(document);
      writer.end_document();
    }
    CorpusInfo info;
    info.set_vocabulary(257);
    info.set_end_of_document(256);
    writer.finish(info);
    return path(name);
  }

  TemporaryDirectory folder_;
};

// 0, 1, 2, ... modulo `modulus`.
inline std::vector<std::int32_t> counting(std::int64_t count, std::int32_t modulus) {
  std::vector<std::int32_t> tokens(count);
  for (std::int64_t i = 0; i < count; ++i) tokens[i] = static_cast<std::int32_t>(i % modulus);
  return tokens;
}

// The text of the Error that `action` throws; a test failure when it throws none.
template <class Action>
std::string error_of(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "no Error was thrown";
  return "";
}

}  // namespace hybridmoe::testing
