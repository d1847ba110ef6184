#include "core/config/load.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <google/protobuf/text_format.h>
#include <sstream>

#include "core/config/overrides.h"
#include "core/config/text_parser.h"
#include "core/config/validate.h"
#include "core/error.h"

namespace hybridmoe {
namespace {

// Whether a mistake of the text concerns this field, one inside it, or one around it: then the field's value
// is not what was meant, and rules about it would only repeat the mistake.
bool concerns(const Violation& mistake, const std::string& field) {
  const std::string &a = mistake.field, &b = field;
  const std::size_t common = std::min(a.size(), b.size());
  if (common == 0 || a.compare(0, common, b, 0, common) != 0) return false;
  const std::string& longer = a.size() > b.size() ? a : b;
  return longer.size() == common || longer[common] == '.' || longer[common] == '[';
}

Config parse(const std::string& text, const std::string& name, const std::vector<std::string>& overrides,
             bool needs_data, int world_size) {
  Config config;
  ParseReport report;
  TextParser parser(
      text, [&](int line, int column) { return cat(name, ":", line, ":", column); }, &report);
  parser.parse_message(&config, "");
  for (const std::string& each : overrides) apply_override(&config, each, &report);

  std::vector<Violation> all = report.mistakes;
  for (Violation violation : validate(config, world_size, needs_data)) {
    const auto meant = [&](const Violation& mistake) { return concerns(mistake, violation.field); };
    if (std::any_of(report.mistakes.begin(), report.mistakes.end(), meant)) continue;
    const auto place = report.places.find(violation.field);
    if (place != report.places.end()) violation.place = place->second;
    all.push_back(violation);
  }
  if (!all.empty()) throw Error(to_string(all, name));
  return config;
}

std::string read_text(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  const bool empty = file.peek() == std::ifstream::traits_type::eof();
  if (!empty) text << file.rdbuf();
  require(file.is_open() && !file.bad() && text.good() && !std::filesystem::is_directory(path), path,
          ": the configuration cannot be read; expected a file in protobuf text format, such as those in "
          "configs/");
  return text.str();
}

}  // namespace

Config load_config(const std::string& path, const std::vector<std::string>& overrides, int world_size) {
  return parse(read_text(path), path, overrides, true, world_size);
}

Config parse_config_text(const std::string& text, const std::string& name,
                         const std::vector<std::string>& overrides) {
  return parse(text, name, overrides, false, 0);
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
