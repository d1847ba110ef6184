// Cuts text into documents. Nothing is lost or added: the documents of a text, one after another, are the
// text, except that a rest of nothing but white space is dropped.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace hybridmoe {

// How a text becomes documents. Documents end at line ends only.
struct SplitRule {
  enum class Kind {
    None,        // one document
    Lines,       // each line
    BlankLines,  // a document begins after `number` or more blank lines
    Size,        // a document ends with the line that brings it to `number` bytes or more
    Pattern,     // a document begins with each line in which `pattern` is found
  };
  Kind kind = Kind::None;
  std::int64_t number = 0;
  std::string pattern;  // POSIX extended regular expression

  // "none", "lines", "blank_lines", "blank_lines:N", "size:N", "pattern:EXPRESSION". Throws Error with the
  // legal ones.
  static SplitRule parse(const std::string& text);
};

class DocumentSplitter {
 public:
  using Receiver = std::function<void(std::string&&)>;

  // Throws Error when the pattern is no regular expression.
  DocumentSplitter(const SplitRule& rule, Receiver receiver);

  void add(std::string_view text);  // a piece of the text, of any length
  void finish();                    // the text ends here; another may follow

 private:
  struct Pattern;
  void add_line(std::string_view line);
  void end_document();

  SplitRule rule_;
  Receiver receiver_;
  std::shared_ptr<Pattern> pattern_;
  std::string document_;
  std::string line_;              // one that is not complete yet
  bool has_text_ = false;         // the document holds more than white space
  std::int64_t blank_lines_ = 0;  // at the document's end
};

}  // namespace hybridmoe
