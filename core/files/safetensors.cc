#include "core/files/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>

#include "core/error.h"

namespace hybridmoe {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kMetadata = "__metadata__";
constexpr std::int64_t kLengthBytes = 8, kHeaderAlignment = 8;
constexpr std::int64_t kMaxHeaderBytes = 100'000'000;  // the reference implementation's limit

constexpr std::array<std::pair<DType, const char*>, 7> kTypes = {{{DType::F64, "F64"},
                                                                  {DType::F32, "F32"},
                                                                  {DType::BF16, "BF16"},
                                                                  {DType::I64, "I64"},
                                                                  {DType::I32, "I32"},
                                                                  {DType::U16, "U16"},
                                                                  {DType::U8, "U8"}}};

const char* safetensors_name(DType dtype) {
  for (const auto& [type, name] : kTypes) {
    if (type == dtype) return name;
  }
  throw Error(cat("safetensors has no name for type ", name_of(dtype)));
}

// The whole beginning of the file: length and padded header.
std::string make_header(const std::string& path, const std::vector<SafetensorsEntry>& entries,
                        const std::map<std::string, std::string>& metadata) {
  Json json = Json::object();
  if (!metadata.empty()) json[kMetadata] = metadata;
  std::int64_t begin = 0;
  for (const SafetensorsEntry& entry : entries) {
    require(entry.name != kMetadata && !entry.name.empty() && !json.contains(entry.name), path,
            ": tensor name \"", entry.name, "\" is empty, reserved or used twice");
    json[entry.name] = {{"dtype", safetensors_name(entry.dtype)},
                        {"shape", entry.shape},
                        {"data_offsets", {begin, begin + entry.bytes()}}};
    begin += entry.bytes();
  }
  std::string text;
  try {
    text = json.dump();
  } catch (const Json::exception& error) {
    throw Error(cat(path, ": names and metadata must be UTF-8: ", error.what()));
  }
  text.append(static_cast<std::size_t>(-static_cast<std::int64_t>(text.size()) & (kHeaderAlignment - 1)),
              ' ');
  const std::uint64_t length = text.size();
  require(length <= kMaxHeaderBytes, path, ": the header takes ", length, " bytes, the format allows ",
          kMaxHeaderBytes);
  std::string header(kLengthBytes, '\0');
  std::memcpy(header.data(), &length, kLengthBytes);
  return header + text;
}

}  // namespace

std::int64_t SafetensorsEntry::elements() const {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<SafetensorsEntry> entries,
                                     const std::map<std::string, std::string>& metadata)
    : file_(path), path_(path), entries_(std::move(entries)) {
  file_.write(make_header(path, entries_, metadata));
}

// The entry that the next element belongs to, null when the file is full.
const SafetensorsEntry* SafetensorsWriter::current() {
  while (entry_ < entries_.size() && written_ == entries_[entry_].elements()) {
    ++entry_;
    written_ = 0;
  }
  return entry_ < entries_.size() ? &entries_[entry_] : nullptr;
}

void SafetensorsWriter::append(const Tensor& part) {
  if (part.elements() == 0) return;
  const SafetensorsEntry* entry = current();
  require(entry != nullptr, path_, ": more elements than the header announces");
  require(part.dtype == entry->dtype && part.contiguous() && part.device == Device::CPU, path_, ": tensor ",
          entry->name, ": contiguous ", name_of(entry->dtype), " in host memory was expected, not ",
          name_of(part.dtype));
  require(part.elements() <= entry->elements() - written_, path_, ": tensor ", entry->name, " has ",
          entry->elements(), " elements, given were ", written_ + part.elements());
  file_.write({static_cast<const char*>(part.data), static_cast<std::size_t>(part.bytes())});
  written_ += part.elements();
}

void SafetensorsWriter::commit() {
  const SafetensorsEntry* entry = current();
  require(entry == nullptr, path_, ": tensor ", entry == nullptr ? "" : entry->name,
          " is incomplete: ", written_, " elements were given");
  file_.commit();
}

SafetensorsReader::SafetensorsReader(const std::string& path) : file_(File::open_for_reading(path)) {
  std::uint64_t length = 0;
  const std::int64_t size = file_.size();
  if (size < kLengthBytes) damaged("it is too short");
  file_.read_at(0, &length, sizeof length);
  if (length > static_cast<std::uint64_t>(std::min(kMaxHeaderBytes, size - kLengthBytes))) {
    damaged(cat("its header has ", length, " bytes"));
  }
  std::string header(length, '\0');
  file_.read_at(kLengthBytes, header.data(), header.size());
  data_begin_ = kLengthBytes + static_cast<std::int64_t>(length);
  try {
    parse(header);
  } catch (const Json::exception& error) {
    damaged(error.what());
  }
  check_offsets(size - data_begin_);
}

void SafetensorsReader::damaged(const std::string& what) const {
  throw Error(cat(file_.path(), ": not a whole safetensors file: ", what));
}

void SafetensorsReader::parse(const std::string& header) {
  struct Item {
    std::pair<std::int64_t, std::int64_t> offsets;
    SafetensorsEntry entry;
  };
  std::vector<Item> items;
  const Json json = Json::parse(header);
  if (!json.is_object()) damaged("its header is no JSON object");
  for (const auto& [name, value] : json.items()) {
    if (name == kMetadata) {
      metadata_ = value.get<std::map<std::string, std::string>>();
      continue;
    }
    Item item;
    item.entry.name = name;
    item.entry.shape = value.at("shape").get<std::vector<std::int64_t>>();
    item.offsets = value.at("data_offsets").get<std::pair<std::int64_t, std::int64_t>>();
    const auto dtype = value.at("dtype").get<std::string>();
    const auto type =
        std::find_if(kTypes.begin(), kTypes.end(), [&](const auto& known) { return dtype == known.second; });
    if (type == kTypes.end())
      damaged(cat("tensor ", name, " is of type ", dtype, ", which is not read here"));
    item.entry.dtype = type->first;
    items.push_back(std::move(item));
  }
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& a, const Item& b) { return a.offsets < b.offsets; });
  for (Item& item : items) {
    offsets_.push_back(item.offsets);
    entries_.push_back(std::move(item.entry));
  }
}

void SafetensorsReader::check_offsets(std::int64_t data_bytes) const {
  std::int64_t end = 0;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const SafetensorsEntry& entry = entries_[i];
    std::int64_t bytes = size_of(entry.dtype);
    for (const std::int64_t extent : entry.shape) {
      if (extent < 0 || __builtin_mul_overflow(bytes, extent, &bytes))
        damaged(cat("the shape of ", entry.name));
    }
    if (offsets_[i].first != end || offsets_[i].second - offsets_[i].first != bytes) {
      damaged(cat("tensor ", entry.name, " lies at bytes ", offsets_[i].first, " to ", offsets_[i].second,
                  "; expected were ", end, " to ", end + bytes));
    }
    end = offsets_[i].second;
  }
  if (end != data_bytes)
    damaged(cat("it holds ", data_bytes, " bytes of tensors, its header announces ", end));
}

void SafetensorsReader::read(const std::string& name, std::int64_t begin, const Tensor& target) const {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const SafetensorsEntry& entry = entries_[i];
    if (entry.name != name) continue;
    require(target.dtype == entry.dtype && target.contiguous(), file_.path(), ": tensor ", name, " is ",
            name_of(entry.dtype), ", read into a tensor of ", name_of(target.dtype));
    require(begin >= 0 && begin + target.elements() <= entry.elements(), file_.path(), ": tensor ", name,
            " has ", entry.elements(), " elements, asked for were ", begin, " to ",
            begin + target.elements());
    const std::int64_t offset = data_begin_ + offsets_[i].first + begin * size_of(entry.dtype);
    const auto bytes = static_cast<std::size_t>(target.bytes());
    if (file_.read_at(offset, target.data, bytes) < bytes) damaged(cat("tensor ", name, " ends early"));
    return;
  }
  throw Error(cat(file_.path(), ": there is no tensor ", name));
}

}  // namespace hybridmoe
