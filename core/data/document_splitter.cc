#include "core/data/document_splitter.h"

#include <charconv>
#include <regex.h>
#include <utility>

#include "core/error.h"

namespace hybridmoe {
namespace {

bool is_blank(std::string_view text) {
  return text.find_first_not_of(" \t\r\n\f\v") == std::string_view::npos;
}

}  // namespace

SplitRule SplitRule::parse(const std::string& text) {
  const std::size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  const bool has_argument = colon != std::string::npos;
  const std::string argument = has_argument ? text.substr(colon + 1) : "";
  SplitRule rule;
  if (name == "none" && !has_argument) return rule;
  if (name == "lines" && !has_argument) {
    rule.kind = Kind::Lines;
    return rule;
  }
  if (name == "pattern" && !argument.empty()) {
    rule.kind = Kind::Pattern;
    rule.pattern = argument;
    return rule;
  }
  rule.kind = name == "size" ? Kind::Size : Kind::BlankLines;
  rule.number = 1;
  const char* end = argument.data() + argument.size();
  const auto parsed = std::from_chars(argument.data(), end, rule.number);
  const bool number = has_argument && parsed.ec == std::errc() && parsed.ptr == end && rule.number > 0;
  const bool legal = name == "size" ? number : name == "blank_lines" && (number || !has_argument);
  require(legal, "--split_documents ", text,
          ": none, lines, blank_lines, blank_lines:N, size:BYTES or pattern:EXPRESSION was expected");
  return rule;
}

struct DocumentSplitter::Pattern {
  explicit Pattern(const std::string& expression) {
    const int code = ::regcomp(&compiled, expression.c_str(), REG_EXTENDED | REG_NOSUB);
    if (code == 0) return;
    char reason[256];
    ::regerror(code, &compiled, reason, sizeof reason);
    throw Error(cat("--split_documents pattern:", expression,
                    ": is not a POSIX extended regular expression: ", reason));
  }
  ~Pattern() { ::regfree(&compiled); }
  Pattern(const Pattern&) = delete;
  Pattern& operator=(const Pattern&) = delete;

  bool found_in(std::string_view line) const {
    if (line.ends_with('\n')) line.remove_suffix(1);
    regmatch_t range;
    range.rm_so = 0;
    range.rm_eo = static_cast<regoff_t>(line.size());
    return ::regexec(&compiled, line.data(), 1, &range, REG_STARTEND) == 0;
  }
  regex_t compiled;
};

DocumentSplitter::DocumentSplitter(const SplitRule& rule, Receiver receiver)
    : rule_(rule), receiver_(std::move(receiver)) {
  if (rule_.kind == SplitRule::Kind::Pattern) pattern_ = std::make_shared<Pattern>(rule_.pattern);
}

void DocumentSplitter::add(std::string_view text) {
  if (rule_.kind == SplitRule::Kind::None) {
    document_ += text;
    return;
  }
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    if (end == std::string_view::npos) {
      line_ += text;
      return;
    }
    if (line_.empty()) {
      add_line(text.substr(0, end + 1));
    } else {
      line_ += text.substr(0, end + 1);
      add_line(line_);
      line_.clear();
    }
    text.remove_prefix(end + 1);
  }
}

void DocumentSplitter::add_line(std::string_view line) {
  using Kind = SplitRule::Kind;
  const bool blank = is_blank(line);
  const bool begins = (rule_.kind == Kind::BlankLines && !blank && blank_lines_ >= rule_.number) ||
                      (rule_.kind == Kind::Pattern && pattern_->found_in(line));
  if (begins) end_document();
  document_ += line;
  has_text_ = has_text_ || !blank;
  blank_lines_ = blank ? blank_lines_ + 1 : 0;
  const bool ends = rule_.kind == Kind::Lines ||
                    (rule_.kind == Kind::Size && static_cast<std::int64_t>(document_.size()) >= rule_.number);
  if (ends) end_document();
}

// White space before the first text stays with the document that it precedes.
void DocumentSplitter::end_document() {
  if (!has_text_) return;
  receiver_(std::exchange(document_, {}));
  has_text_ = false;
}

void DocumentSplitter::finish() {
  if (!line_.empty()) add_line(std::exchange(line_, {}));
  if (rule_.kind == SplitRule::Kind::None) has_text_ = !is_blank(document_);
  end_document();
  document_.clear();
  blank_lines_ = 0;
}

}  // namespace hybridmoe
