#include "core/data/text_input.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fnmatch.h>
#include <nlohmann/json.hpp>
#include <string_view>
#include <unistd.h>
#include <zlib.h>

#include "core/data/document_splitter.h"
#include "core/error.h"

namespace hybridmoe {
namespace {

namespace fs = std::filesystem;

constexpr char kStandardInput[] = "-";
constexpr std::size_t kLookedAt = 8192;  // bytes in which a text file has no zero

// zlib reads what is not compressed as it is.
class InputFile {
 public:
  explicit InputFile(const std::string& path) : path_(path == kStandardInput ? "standard input" : path) {
    errno = 0;
    file_ = path == kStandardInput ? ::gzdopen(::dup(STDIN_FILENO), "rb") : ::gzopen(path.c_str(), "rb");
    require(file_ != nullptr, path_, ": cannot be opened: ", std::strerror(errno == 0 ? ENOMEM : errno));
    ::gzbuffer(file_, buffer_.size());
  }
  ~InputFile() { ::gzclose(file_); }
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  // The next bytes; empty at the end.
  std::string_view next() {
    const int count = ::gzread(file_, buffer_.data(), static_cast<unsigned>(buffer_.size()));
    int code = Z_OK;
    const char* reason = ::gzerror(file_, &code);
    if (code == Z_ERRNO) reason = std::strerror(errno);
    require(count >= 0 && (code == Z_OK || code == Z_STREAM_END || (code == Z_BUF_ERROR && count > 0)), path_,
            ": cannot be read: ", reason, "; is it truncated?");
    return {buffer_.data(), static_cast<std::size_t>(count)};
  }

 private:
  std::string path_;
  gzFile file_ = nullptr;
  std::array<char, 1 << 17> buffer_;
};

std::string json_text(const std::string& line, const std::string& field, const std::string& place) {
  const auto object = nlohmann::json::parse(line, nullptr, false);
  require(!object.is_discarded(), place, ": is not JSON; each line must be an object with the field ", field);
  const auto value = object.is_object() ? object.find(field) : object.end();
  require(object.is_object() && value != object.end() && value->is_string(), place,
          ": has no text field named ", field, "; correct --json_field");
  return value->get<std::string>();
}

class Reader {
 public:
  Reader(const TextInputs& inputs, const std::function<void(std::string&&)>& receive,
         TextStatistics* statistics)
      : json_field_(inputs.json_field),
        statistics_(statistics),
        splitter_(SplitRule::parse(inputs.split_documents), [this, &receive](std::string&& document) {
          ++statistics_->documents;
          statistics_->bytes += static_cast<std::int64_t>(document.size());
          receive(std::move(document));
        }) {}

  void read(const std::string& path, bool from_folder) {
    InputFile file(path);
    std::string line;
    std::int64_t number = 0;
    bool first = true;
    for (std::string_view piece = file.next(); !piece.empty(); piece = file.next()) {
      if (first && from_folder && piece.substr(0, kLookedAt).find('\0') != std::string_view::npos) {
        ++statistics_->binary_files;
        return;
      }
      first = false;
      if (json_field_.empty()) {
        splitter_.add(piece);
        continue;
      }
      for (std::size_t end; (end = piece.find('\n')) != std::string_view::npos;
           piece.remove_prefix(end + 1)) {
        line += piece.substr(0, end);
        add_json(line, cat(path, ":", ++number));
        line.clear();
      }
      line += piece;
    }
    if (json_field_.empty()) {
      splitter_.finish();
    } else {
      add_json(line, cat(path, ":", ++number));
    }
    ++statistics_->files;
  }

 private:
  void add_json(const std::string& line, const std::string& place) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) return;
    splitter_.add(json_text(line, json_field_, place));
    splitter_.finish();
  }

  std::string json_field_;
  TextStatistics* statistics_;
  DocumentSplitter splitter_;
};

std::vector<std::string> files_of_folder(const std::string& folder, const std::string& match) {
  std::vector<std::string> files;
  for (const auto& entry :
       fs::recursive_directory_iterator(folder, fs::directory_options::skip_permission_denied)) {
    std::error_code failure;  // what cannot be looked at is no file
    if (!entry.is_regular_file(failure)) continue;
    if (!match.empty() && ::fnmatch(match.c_str(), entry.path().filename().c_str(), 0) != 0) continue;
    files.push_back(entry.path().string());
  }
  require(!files.empty(), folder, ": holds no file", match.empty() ? "" : " that matches ", match);
  std::sort(files.begin(), files.end());
  return files;
}

// Calls use(path, found in a folder) for each file.
template <class Use>
void for_each_file(const TextInputs& inputs, const Use& use) {
  require(!inputs.paths.empty(), "no input was named; expected are files, folders or - for standard input");
  for (const std::string& path : inputs.paths) {
    if (path == kStandardInput) {
      use(path, false);
      continue;
    }
    require(fs::exists(path), path, ": does not exist; an input is a file, a folder or - for standard input");
    if (!fs::is_directory(path)) {
      use(path, false);
      continue;
    }
    for (const std::string& file : files_of_folder(path, inputs.match)) use(file, true);
  }
}

}  // namespace

std::vector<std::string> list_text_files(const TextInputs& inputs) {
  std::vector<std::string> files;
  for_each_file(inputs, [&](const std::string& path, bool) { files.push_back(path); });
  return files;
}

void read_documents(const TextInputs& inputs, const std::function<void(std::string&&)>& receive,
                    TextStatistics* statistics) {
  list_text_files(inputs);  // a path that is wrong is reported before work is done
  Reader reader(inputs, receive, statistics);
  for_each_file(inputs, [&](const std::string& path, bool from_folder) { reader.read(path, from_folder); });
}

}  // namespace hybridmoe
