#include "core/data/token_file.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <filesystem>

#include "core/error.h"

namespace hybridmoe {
namespace {

static_assert(std::endian::native == std::endian::little, "token files are little endian and read in place");

constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};
constexpr std::int64_t kHeaderBytes = 9 + 8 + 1 + 8 + 8;
constexpr std::int64_t kCheckedAtOpening = std::int64_t{1} << 24;  // sequences: 0.3 GB of index

// The index's arrays follow an odd number of bytes: nothing in it is aligned.
template <class T>
T load(const std::uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
const std::uint8_t* find_bad(const std::uint8_t* data, std::int64_t count, std::int64_t vocabulary,
                             std::int32_t* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    const auto id = static_cast<std::int64_t>(load<T>(data + i * sizeof(T)));
    if (id < 0 || id >= vocabulary) return data + i * sizeof(T);
    out[i] = static_cast<std::int32_t>(id);
  }
  return nullptr;
}

std::int64_t load_id(TokenType type, const std::uint8_t* from) {
  switch (type) {
    case TokenType::UInt8:
      return load<std::uint8_t>(from);
    case TokenType::Int8:
      return load<std::int8_t>(from);
    case TokenType::Int16:
      return load<std::int16_t>(from);
    case TokenType::Int32:
      return load<std::int32_t>(from);
    case TokenType::Int64:
      return load<std::int64_t>(from);
    case TokenType::UInt16:
      return load<std::uint16_t>(from);
    case TokenType::UInt32:
      return load<std::uint32_t>(from);
  }
  throw Error(cat("token type ", static_cast<int>(type), " is unknown"));
}

const std::uint8_t* convert(TokenType type, const std::uint8_t* data, std::int64_t count,
                            std::int64_t vocabulary, std::int32_t* out) {
  switch (type) {
    case TokenType::UInt8:
      return find_bad<std::uint8_t>(data, count, vocabulary, out);
    case TokenType::Int8:
      return find_bad<std::int8_t>(data, count, vocabulary, out);
    case TokenType::Int16:
      return find_bad<std::int16_t>(data, count, vocabulary, out);
    case TokenType::Int32:
      return find_bad<std::int32_t>(data, count, vocabulary, out);
    case TokenType::Int64:
      return find_bad<std::int64_t>(data, count, vocabulary, out);
    case TokenType::UInt16:
      return find_bad<std::uint16_t>(data, count, vocabulary, out);
    case TokenType::UInt32:
      return find_bad<std::uint32_t>(data, count, vocabulary, out);
  }
  throw Error(cat("token type ", static_cast<int>(type), " is unknown"));
}

std::string without_extension(const std::string& path) {
  if (path.ends_with(".bin") || path.ends_with(".idx")) return path.substr(0, path.size() - 4);
  return path;
}

}  // namespace

std::int64_t size_of(TokenType type) {
  switch (type) {
    case TokenType::UInt8:
    case TokenType::Int8:
      return 1;
    case TokenType::Int16:
    case TokenType::UInt16:
      return 2;
    case TokenType::Int32:
    case TokenType::UInt32:
      return 4;
    case TokenType::Int64:
      return 8;
  }
  throw Error(cat("token type ", static_cast<int>(type), " is unknown"));
}

const char* name_of(TokenType type) {
  switch (type) {
    case TokenType::UInt8:
      return "uint8";
    case TokenType::Int8:
      return "int8";
    case TokenType::Int16:
      return "int16";
    case TokenType::Int32:
      return "int32";
    case TokenType::Int64:
      return "int64";
    case TokenType::UInt16:
      return "uint16";
    case TokenType::UInt32:
      return "uint32";
  }
  return "unknown";
}

TokenFile TokenFile::open_indexed(const std::string& path) {
  const std::string prefix = without_extension(path);
  for (const char* extension : {".idx", ".bin"}) {
    require(
        std::filesystem::exists(prefix + extension), prefix, extension,
        ": does not exist. An indexed corpus is PREFIX.bin with PREFIX.idx; make one with `hybridmoe-data "
        "tokenize --output PREFIX`, or correct the path");
  }
  TokenFile file;
  file.index_ = MappedFile(prefix + ".idx");
  file.tokens_ = MappedFile(prefix + ".bin");
  file.parse_index();
  return file;
}

TokenFile TokenFile::open_raw(const std::string& path, TokenType type, std::int32_t end_of_document) {
  TokenFile file;
  file.tokens_ = MappedFile(path);
  file.type_ = type;
  file.end_of_document_ = end_of_document;
  const std::int64_t bytes = file.tokens_.bytes();
  require(bytes > 0, path, ": is empty; a raw token file holds at least one ", name_of(type));
  require(bytes % size_of(type) == 0, path, ": has ", bytes, " bytes, which is not a multiple of the ",
          size_of(type), " bytes of a ", name_of(type), "; the file is truncated or data.file_type is wrong");
  file.token_count_ = bytes / size_of(type);
  return file;
}

void TokenFile::parse_index() {
  const std::string& name = index_.path();
  const std::uint8_t* at = index_.data();
  require(index_.bytes() >= kHeaderBytes, name, ": has ", index_.bytes(), " bytes, less than the ",
          kHeaderBytes, " of an index's header; it is truncated: write the corpus again");
  require(std::memcmp(at, kMagic, sizeof kMagic) == 0, name,
          ": does not begin with MMIDIDX; it is not a Megatron index of the current layout");
  const auto version = load<std::uint64_t>(at + 9);
  require(version == 1, name, ": is of version ", version, "; this program reads version 1");
  const int code = at[17];
  require((code >= 1 && code <= 5) || code == 8, name, ": has type code ", code,
          "; token ids are of type 1 (uint8), 2 (int8), 3 (int16), 4 (int32), 5 (int64) or 8 (uint16)");
  type_ = static_cast<TokenType>(code);
  const auto sequences = load<std::uint64_t>(at + 18);
  const auto entries = load<std::uint64_t>(at + 26);
  // Each sequence takes 12 bytes and each entry 8, so counts beyond the file's size cannot be true; testing
  // that first keeps the sum below from overflowing.
  const auto size = static_cast<std::uint64_t>(index_.bytes());
  require(sequences <= size && entries <= size && kHeaderBytes + 12 * sequences + 8 * entries <= size, name,
          ": has ", size, " bytes, but its header announces ", sequences, " sequences and ", entries,
          " entries of the document index, which take ", kHeaderBytes, " + 12 x ", sequences, " + 8 x ",
          entries, "; it is truncated: write the corpus again");
  sequence_count_ = static_cast<std::int64_t>(sequences);
  document_entries_ = static_cast<std::int64_t>(entries);
  lengths_ = at + kHeaderBytes;
  pointers_ = lengths_ + 4 * sequence_count_;
  document_index_ = pointers_ + 8 * sequence_count_;
  const std::int64_t rest = index_.bytes() - kHeaderBytes - 12 * sequence_count_ - 8 * document_entries_;
  require(rest == 0 || rest == sequence_count_, name, ": has ", rest,
          " bytes after the document index; none, or one mode byte for each of ", sequence_count_,
          " sequences was expected");
  require(sequence_count_ > 0 && tokens_.bytes() > 0, name, ": the corpus is empty (", sequence_count_,
          " sequences, ", tokens_.bytes(), " bytes of tokens); tokenize some text into it");
  require(document_entries_ >= 2, name, ": the document index has ", document_entries_,
          " entries; one per document and the sequence count at its end were expected");
  require(document_entry(0) == 0, name, ": the document index begins with ", document_entry(0),
          ", not with 0");
  require(document_entry(document_entries_ - 1) == sequence_count_, name, ": the document index ends with ",
          document_entry(document_entries_ - 1), ", not with the number of sequences, ", sequence_count_);
  const std::int64_t last = sequence_count_ - 1;
  require(length_at(last) >= 0, name, ": sequence ", last, " has the negative length ", length_at(last));
  const std::int64_t expected = pointer_at(last) + length_at(last) * size_of(type_);
  require(pointer_at(last) >= 0 && expected == tokens_.bytes(), tokens_.path(), ": has ", tokens_.bytes(),
          " bytes, but by its .idx the last sequence ends at byte ", expected,
          "; one of the two is truncated or belongs to another corpus: write or copy both again");
  token_count_ = tokens_.bytes() / size_of(type_);
  if (sequence_count_ <= kCheckedAtOpening) check_index();
}

void TokenFile::check_index() const {
  for (std::int64_t i = 0; i < sequence_count_; ++i) check_sequence(i);
  for (std::int64_t i = 0; i + 1 < document_entries_; ++i) check_document_entry(i);
}

// Sequences lie one after another without gaps, which is what makes the file one stream.
void TokenFile::check_sequence(std::int64_t sequence) const {
  const std::int64_t begin = pointer_at(sequence);
  const std::int64_t length = length_at(sequence);
  const std::int64_t end = sequence + 1 < sequence_count_ ? pointer_at(sequence + 1) : tokens_.bytes();
  require(length >= 0 && begin >= 0 && begin % size_of(type_) == 0 &&
              end == begin + length * size_of(type_) && end <= tokens_.bytes() &&
              (sequence > 0 || begin == 0),
          index_.path(), ": sequence ", sequence, " has ", length, " tokens of ", size_of(type_),
          " bytes at byte ", begin, ", but the next one begins at byte ", end,
          "; sequences that follow one another from byte 0 on were expected: write the corpus again");
}

void TokenFile::check_document_entry(std::int64_t entry) const {
  const std::int64_t begin = document_entry(entry), end = document_entry(entry + 1);
  require(0 <= begin && begin <= end && end <= sequence_count_, index_.path(), ": document ", entry,
          " holds sequences ", begin, " to ", end, " of ", sequence_count_,
          "; ascending numbers were expected: write the corpus again");
}

std::int32_t TokenFile::length_at(std::int64_t sequence) const {
  return load<std::int32_t>(lengths_ + 4 * sequence);
}
std::int64_t TokenFile::pointer_at(std::int64_t sequence) const {
  return load<std::int64_t>(pointers_ + 8 * sequence);
}
std::int64_t TokenFile::document_entry(std::int64_t entry) const {
  return load<std::int64_t>(document_index_ + 8 * entry);
}

std::int64_t TokenFile::sequence_start(std::int64_t sequence) const {
  return sequence == sequence_count_ ? token_count_ : pointer_at(sequence) / size_of(type_);
}

void TokenFile::read(std::int64_t begin, std::int64_t count, std::int32_t vocabulary,
                     std::int32_t* out) const {
  require(begin >= 0 && count >= 0 && begin <= token_count_ - count, path(), ": tokens ", begin, " to ",
          begin + count, " were asked for; it has ", token_count_);
  const std::uint8_t* data = tokens_.data() + begin * size_of(type_);
  const std::uint8_t* bad = convert(type_, data, count, vocabulary, out);
  if (bad == nullptr) {
    tokens_.release(begin * size_of(type_), count * size_of(type_));
    return;
  }
  const std::int64_t position = (bad - tokens_.data()) / size_of(type_);
  throw Error(
      cat(path(), ": token ", position, " has id ", load_id(type_, bad), "; ids from 0 to ", vocabulary - 1,
          " were expected (vocabulary ", vocabulary,
          "): correct model.vocabulary or data.raw_vocabulary, or tokenize again with the right tokenizer"));
}

std::int64_t TokenFile::document_of(std::int64_t position) const {
  require(documents() >= 0, path(), ": a raw file has no document index");
  require(position >= 0 && position < token_count_, path(), ": token ", position, " of ", token_count_);
  // The last sequence that starts at or before the position, then the last document that starts at or before
  // it: empty ones lie before the one that holds the token.
  std::int64_t low = 0, high = sequence_count_;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (sequence_start(middle) <= position ? low : high) = middle;
  }
  check_sequence(low);
  const std::int64_t sequence = low;
  low = 0;
  high = documents();
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (document_entry(middle) <= sequence ? low : high) = middle;
  }
  check_document_entry(low);
  return low;
}

TokenRange TokenFile::document(std::int64_t number) const {
  require(number >= 0 && number < documents(), path(), ": document ", number, " of ", documents());
  check_document_entry(number);
  return {sequence_start(document_entry(number)), sequence_start(document_entry(number + 1))};
}

std::vector<std::int64_t> TokenFile::document_starts(std::int64_t begin, std::int64_t end) const {
  std::vector<std::int64_t> starts;
  if (begin >= end) return starts;
  if (documents() >= 0) {
    for (std::int64_t d = document_of(begin); d < documents(); ++d) {
      const TokenRange range = document(d);
      if (range.begin >= end) break;
      if (range.begin >= begin && range.end > range.begin) starts.push_back(range.begin);
    }
    return starts;
  }
  if (begin == 0) starts.push_back(0);
  if (end_of_document_ < 0) return starts;
  for (std::int64_t i = std::max<std::int64_t>(begin, 1); i < end; ++i) {
    if (load_id(type_, tokens_.data() + (i - 1) * size_of(type_)) == end_of_document_) starts.push_back(i);
  }
  return starts;
}

}  // namespace hybridmoe
