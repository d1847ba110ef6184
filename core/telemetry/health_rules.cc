#include <fcntl.h>
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/io/zero_copy_stream_impl.h>
#include <google/protobuf/text_format.h>

#include "core/error.h"
#include "core/telemetry/health.h"

namespace hybridmoe {
namespace {

class ErrorLines : public google::protobuf::io::ErrorCollector {
 public:
  explicit ErrorLines(std::string path) : path_(std::move(path)) {}
  void AddError(int line, int column, const std::string& message) override {
    if (text_.empty()) text_ = cat(path_, ":", line + 1, ":", column + 1, ": ", message);
  }
  const std::string& text() const { return text_; }

 private:
  std::string path_, text_;
};

}  // namespace

HealthRules read_health_rules(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  require(file >= 0, path, ": cannot read this rules file");
  google::protobuf::io::FileInputStream stream(file);
  stream.SetCloseOnDelete(true);
  ErrorLines errors(path);
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&errors);
  HealthRules rules;
  const bool good = parser.Parse(&stream, &rules);
  require(good, errors.text(), " (fields are listed in docs/telemetry.md)");
  require(rules.window() > 0, path, ": window = ", rules.window(), ": expected at least 1 step");
  return rules;
}

}  // namespace hybridmoe
