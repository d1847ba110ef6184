#include "core/config/load.h"

#include <fstream>
#include <google/protobuf/text_format.h>
#include <sstream>

#include "core/config/overrides.h"
#include "core/config/text_parser.h"
#include "core/error.h"

namespace hybridmoe {
namespace {

Config parse(const std::string& text, const std::string& name, const std::vector<std::string>& overrides) {
  Config config;
  ParseReport report;
  TextParser parser(
      text, [&](int line, int column) { return cat(name, ":", line, ":", column); }, &report);
  parser.parse_message(&config, "");
  for (const std::string& each : overrides) apply_override(&config, each, &report);
  if (!report.mistakes.empty()) throw Error(to_string(report.mistakes, name));
  return config;
}

std::string read_text(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    throw Error(cat(path,
                    ": the configuration cannot be read; expected a file in protobuf text format, such as "
                    "those in configs/"));
  }
  return text.str();
}

}  // namespace

Config load_config(const std::string& path, const std::vector<std::string>& overrides) {
  return parse(read_text(path), path, overrides);
}

Config parse_config_text(const std::string& text, const std::string& name,
                         const std::vector<std::string>& overrides) {
  return parse(text, name, overrides);
}

std::string to_text(const Config& config) {
  std::string text;
  google::protobuf::TextFormat::PrintToString(config, &text);
  return text;
}

std::string override_grammar() {
  return R"(--set PATH=VALUE changes one field of the configuration; it may be repeated, in order.
  PATH   names joined by dots, an element of a list by its index from 0: data.source[0].path
         A message on the way that is absent is created.
  VALUE  as in the file: 4, 3e-4, true, HYBRID_STAR, {path: "a" weight: 2}, [1, 2, 3]
         A string needs no quotes. An empty VALUE restores the default: model.moe= makes every layer dense.
         A list is replaced as a whole, by a [list] or by one value; PATH+=VALUE appends.
  Examples:
    --set model.layers=4 --set model.placement=PRE --set optimizer.learning_rate=1e-3
    --set data.source='[{path: "a"}, {path: "b" weight: 2}]' --set data.source[0].path=c
    --set model.layer_override+='{layer: [0, -1] feed_forward: DENSE}'
)";
}

}  // namespace hybridmoe
