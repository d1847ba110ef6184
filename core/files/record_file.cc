#include "core/files/record_file.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "core/files/crc32c.h"

namespace hybridmoe {
namespace {

constexpr std::size_t kHeaderBytes = 12;
constexpr std::size_t kWindowBytes = 1 << 18;  // read at once

struct Framing {
  char header[kHeaderBytes];
  char footer[4];
};

Framing framing_of(std::string_view payload) {
  Framing framing;
  const std::uint64_t length = payload.size();
  std::memcpy(framing.header, &length, 8);
  const std::uint32_t length_crc = masked_crc32c({framing.header, 8});
  std::memcpy(framing.header + 8, &length_crc, 4);
  const std::uint32_t payload_crc = masked_crc32c(payload);
  std::memcpy(framing.footer, &payload_crc, 4);
  return framing;
}

std::uint32_t load_u32(const char* from) {
  std::uint32_t value;
  std::memcpy(&value, from, 4);
  return value;
}

}  // namespace

RecordWriter::RecordWriter(const std::string& path) : file_(File::create_new(path)) {}

void RecordWriter::cut() {
  file_.cut(bytes_);
  torn_ = false;
}

void RecordWriter::write(std::string_view payload) {
  if (torn_) cut();
  const Framing framing = framing_of(payload);
  try {
    file_.write({{framing.header, sizeof framing.header}, payload, {framing.footer, sizeof framing.footer}});
  } catch (const Error&) {
    torn_ = true;
    cut();
    throw;
  }
  bytes_ += static_cast<std::int64_t>(payload.size()) + kRecordOverhead;
}

std::string frame_record(std::string_view payload) {
  const Framing framing = framing_of(payload);
  std::string framed(framing.header, sizeof framing.header);
  framed.append(payload);
  framed.append(framing.footer, sizeof framing.footer);
  return framed;
}

RecordReader::RecordReader(const std::string& path, ReadMode mode)
    : file_(File::open_for_reading(path)), mode_(mode) {}

std::string_view RecordReader::bytes_at(std::int64_t at, std::size_t bytes) {
  const std::int64_t buffered_end = buffer_begin_ + static_cast<std::int64_t>(buffer_.size());
  if (at < buffer_begin_ || at + static_cast<std::int64_t>(bytes) > buffered_end) {
    buffer_.resize(std::max(bytes, kWindowBytes));
    buffer_.resize(file_.read_at(at, buffer_.data(), buffer_.size()));
    buffer_begin_ = at;
  }
  return std::string_view(buffer_).substr(static_cast<std::size_t>(at - buffer_begin_), bytes);
}

RecordReader::State RecordReader::check(std::int64_t at, std::string_view* payload) {
  const std::string_view header = bytes_at(at, kHeaderBytes);
  if (header.empty()) return State::End;
  if (header.size() < kHeaderBytes) return State::Torn;
  if (masked_crc32c(header.substr(0, 8)) != load_u32(header.data() + 8)) return State::Corrupt;
  std::uint64_t length;
  std::memcpy(&length, header.data(), 8);
  const std::int64_t left = file_.size() - at - kRecordOverhead;
  if (left < 0 || length > static_cast<std::uint64_t>(left)) return State::Torn;
  const std::string_view record = bytes_at(at, kHeaderBytes + length + 4);
  if (record.size() < kHeaderBytes + length + 4) return State::Torn;  // cut since its size was asked for
  *payload = record.substr(kHeaderBytes, length);
  return masked_crc32c(*payload) == load_u32(record.data() + kHeaderBytes + length) ? State::Whole
                                                                                    : State::Corrupt;
}

bool RecordReader::find_next(std::int64_t from, std::int64_t* found) {
  const std::int64_t last = file_.size() - kRecordOverhead;
  std::string_view payload;
  for (std::int64_t at = from; at <= last; ++at) {
    if (check(at, &payload) == State::Whole) {
      *found = at;
      return true;
    }
  }
  return false;
}

bool RecordReader::next(std::string* payload) {
  std::string_view view;
  std::int64_t at = offset_;
  const State state = check(at, &view);
  if (state == State::End) return false;
  if (state != State::Whole) {
    const char* what = state == State::Torn ? "an incomplete record" : "a checksum does not match";
    require(mode_ != ReadMode::Strict, path(), ": ", what, " at byte ", offset_);
    if (!find_next(offset_ + 1, &at)) return false;
    require(mode_ != ReadMode::TolerateTail, path(), ": ", what, " at byte ", offset_,
            ", and whole records follow from byte ", at, "; read it skipping corrupt records");
    check(at, &view);
    skipped_bytes_ += at - offset_;
    ++skipped_places_;
  }
  payload->assign(view);
  skipped_before_record_ = at - offset_;
  record_offset_ = at;
  offset_ = at + static_cast<std::int64_t>(view.size()) + kRecordOverhead;
  return true;
}

}  // namespace hybridmoe
