// Documents out of files: plain text, gzip (found by its first bytes, whatever the name), JSON lines, folders
// of them and standard input.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace hybridmoe {

struct TextInputs {
  std::vector<std::string>
      paths;               // files, folders (read recursively, in order of name) and "-" for standard input
  std::string match = {};  // in folders: only names that match this shell pattern; empty: all
  std::string json_field = {};  // not empty: every line is a JSON object, and this field of it is a text
  std::string split_documents = "none";  // SplitRule
};

struct TextStatistics {
  std::int64_t files = 0;
  std::int64_t binary_files = 0;  // found in folders and left out because their beginning holds a zero byte
  std::int64_t documents = 0;
  std::int64_t bytes = 0;  // of documents
};

// The files that `inputs` stands for. Throws Error for a path that does not exist and for a folder without
// files.
std::vector<std::string> list_text_files(const TextInputs& inputs);

// Calls `receive` with each document, in order, keeping `statistics` up to date. A document is held in memory
// as a whole. Throws Error naming the file (and line, of JSON) that cannot be read.
void read_documents(const TextInputs& inputs, const std::function<void(std::string&&)>& receive,
                    TextStatistics* statistics);

}  // namespace hybridmoe
