#include "core/files/shard_file.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "core/files/atomic_file.h"
#include "core/files/checksum.h"

namespace hybridmoe {
namespace {

constexpr int kShardVersion = 1;
constexpr char kMagic[9] = "HMoEshrd";
constexpr std::int64_t kMagicBytes = 8, kTrailerBytes = 24, kPayloadAlignment = 64;
constexpr std::size_t kChunkBytes = 8 << 20;  // hashed and written while it is in the cache

struct Trailer {
  std::uint64_t table_bytes = 0, table_checksum = 0;
  char magic[kMagicBytes];
};
static_assert(sizeof(Trailer) == kTrailerBytes);

std::string_view bytes_of(const Tensor& tensor) {
  return {static_cast<const char*>(tensor.data), static_cast<std::size_t>(tensor.bytes())};
}

// Calls use(part) for consecutive parts of at most a chunk.
template <class Use>
void for_chunks(std::string_view bytes, const Use& use) {
  for (std::size_t at = 0; at < bytes.size(); at += kChunkBytes) use(bytes.substr(at, kChunkBytes));
}

void write_array(AtomicFile* file, const ShardArray& array, ShardTable::Array* entry) {
  const std::int64_t gap = (kPayloadAlignment - file->bytes() % kPayloadAlignment) % kPayloadAlignment;
  file->write(std::string(static_cast<std::size_t>(gap), '\0'));
  entry->set_name(array.name);
  entry->set_offset(file->bytes());
  Xxh3Stream hash;
  std::int64_t elements = 0;
  for (const ShardPiece& piece : array.pieces) {
    elements += piece.shape.elements();
    piece.read([&](const Tensor& in_memory) {
      for_chunks(bytes_of(in_memory), [&](std::string_view part) {
        hash.add(part);
        file->write(part);
      });
    });
    require(piece.dtype == array.pieces.front().dtype &&
                file->bytes() - entry->offset() == elements * size_of(piece.dtype),
            "array ", array.name, ": pieces of one type, of ", elements,
            " elements up to here, were expected");
  }
  require(!array.pieces.empty(), "array ", array.name, " has no pieces");
  const ShardPiece& only = array.pieces.front();
  entry->set_dtype(name_of(only.dtype));
  if (array.pieces.size() == 1) {
    for (int i = 0; i < only.shape.rank; ++i) entry->add_shape(only.shape[i]);
  } else {
    entry->add_shape(elements);
  }
  entry->set_bytes(file->bytes() - entry->offset());
  entry->set_checksum(hash.value());
}

}  // namespace

DType dtype_from_name(const std::string& name) {
  for (const DType dtype :
       {DType::F64, DType::F32, DType::BF16, DType::I64, DType::I32, DType::U16, DType::U8}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw Error(cat("\"", name, "\" is no element type"));
}

ShardPiece::ShardPiece(const Tensor& in_host_memory)
    : dtype(in_host_memory.dtype),
      shape(in_host_memory.shape),
      read([in_host_memory](const UsePart& use) { use(in_host_memory); }) {
  require(in_host_memory.contiguous() && in_host_memory.device == Device::CPU,
          "a contiguous tensor in host memory was expected");
}

ShardInfo write_shard(const std::string& path, std::span<const ShardArray> arrays) {
  AtomicFile file(path);
  file.write({kMagic, kMagicBytes});
  ShardTable table;
  table.set_format_version(kShardVersion);
  for (const ShardArray& array : arrays) write_array(&file, array, table.add_array());
  const std::string text = table.SerializeAsString();
  Trailer trailer{text.size(), xxh3(text), {}};
  std::memcpy(trailer.magic, kMagic, kMagicBytes);
  file.write(text);
  file.write({reinterpret_cast<const char*>(&trailer), sizeof trailer});
  file.commit();
  return {file.bytes(), trailer.table_checksum};
}

ShardReader::ShardReader(const std::string& path) : file_(File::open_for_reading(path)) {
  const std::int64_t size = file_.size();
  char magic[kMagicBytes];
  Trailer trailer;
  if (size < kMagicBytes + kTrailerBytes) corrupt(cat("it has only ", size, " bytes"));
  file_.read_at(0, magic, sizeof magic);
  file_.read_at(size - kTrailerBytes, &trailer, sizeof trailer);
  if (std::memcmp(magic, kMagic, kMagicBytes) != 0) corrupt("it does not begin as one");
  if (std::memcmp(trailer.magic, kMagic, kMagicBytes) != 0) corrupt("its end is missing (truncated?)");
  const std::int64_t table_end = size - kTrailerBytes;
  if (trailer.table_bytes > static_cast<std::uint64_t>(table_end - kMagicBytes))
    corrupt("its table's length is wrong");
  std::string text(trailer.table_bytes, '\0');
  file_.read_at(table_end - static_cast<std::int64_t>(text.size()), text.data(), text.size());
  if (xxh3(text) != trailer.table_checksum) corrupt("the checksum of its table does not match");
  if (!table_.ParseFromString(text)) corrupt("its table cannot be read");
  require(table_.format_version() == kShardVersion, path, ": shard format version ", table_.format_version(),
          ", this program reads ", kShardVersion, "; use the version that wrote it");
  for (const ShardTable::Array& array : table_.array()) {
    const std::int64_t end = table_end - static_cast<std::int64_t>(text.size());
    if (array.offset() < kMagicBytes || array.bytes() < 0 || array.offset() > end - array.bytes()) {
      corrupt(cat("array ", array.name(), " does not lie within it"));
    }
  }
  info_ = {size, trailer.table_checksum};
}

void ShardReader::corrupt(const std::string& what) const {
  throw Error(cat(path(), ": not a whole shard file: ", what, "; resume from another checkpoint"));
}

const ShardTable::Array& ShardReader::find(const std::string& name) const {
  std::string names;
  for (const ShardTable::Array& array : table_.array()) {
    if (array.name() == name) return array;
    names += " " + array.name();
  }
  throw Error(cat(path(), ": there is no array ", name, "; it has", names));
}

void ShardReader::compare_checksum(const ShardTable::Array& array, std::uint64_t found) const {
  require(found == array.checksum(), path(), ": array ", array.name(),
          ": its checksum does not match, the file was changed or the disk failed; resume from another "
          "checkpoint");
}

void ShardReader::read_unverified(const std::string& name, std::int64_t begin, const Tensor& target) const {
  const ShardTable::Array& array = find(name);
  require(target.contiguous() && target.dtype == dtype_from_name(array.dtype()), path(), ": array ", name,
          " is ", array.dtype(), ", read into a tensor of ", name_of(target.dtype));
  const std::int64_t offset = begin * size_of(target.dtype), bytes = target.bytes();
  require(begin >= 0 && offset + bytes <= array.bytes(), path(), ": array ", name, " has ",
          array.bytes() / size_of(target.dtype), " elements, asked for were ", begin, " to ",
          begin + target.elements());
  const std::size_t got =
      file_.read_at(array.offset() + offset, target.data, static_cast<std::size_t>(bytes));
  if (got < static_cast<std::size_t>(bytes)) corrupt(cat("array ", name, " ends early"));
}

void ShardReader::read(const std::string& name, const Tensor& target) const {
  const ShardTable::Array& array = find(name);
  require(target.bytes() == array.bytes(), path(), ": array ", name, " has ", array.bytes(), " bytes, ",
          target.bytes(), " were expected");
  read_unverified(name, 0, target);
  compare_checksum(array, xxh3(bytes_of(target)));
}

void ShardReader::verify(const std::string& name) const {
  const ShardTable::Array& array = find(name);
  std::string chunk;
  Xxh3Stream hash;
  for (std::int64_t at = 0; at < array.bytes(); at += static_cast<std::int64_t>(chunk.size())) {
    chunk.resize(static_cast<std::size_t>(std::min<std::int64_t>(kChunkBytes, array.bytes() - at)));
    if (file_.read_at(array.offset() + at, chunk.data(), chunk.size()) < chunk.size()) {
      corrupt(cat("array ", name, " ends early"));
    }
    hash.add(chunk);
  }
  compare_checksum(array, hash.value());
}

}  // namespace hybridmoe
