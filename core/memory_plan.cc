#include "core/memory_plan.h"

#include <algorithm>
#include <sys/mman.h>
#include <unistd.h>

namespace hybridmoe {

namespace {
constexpr std::int64_t kPlanAlignment = 64;

std::int64_t rounded_up(std::int64_t bytes, std::int64_t unit) { return (bytes + unit - 1) / unit * unit; }

std::int64_t row_bytes(const Tensor& tensor) {
  return tensor.rows() == 0 ? 0 : tensor.bytes() / tensor.rows();
}
}  // namespace

MemoryPlan::~MemoryPlan() {
  if (arena_ != nullptr) {
    const auto bytes = static_cast<std::size_t>(arena_bytes());
    granule_ > 0 ? backend_->release_reserved(arena_, bytes) : backend_->release(arena_, bytes);
  }
  if (shared_arena_ != nullptr)
    backend_->release_shared(shared_arena_, static_cast<std::size_t>(shared_.peak.reserved));
}

void MemoryPlan::add(Tensor* target, std::string name, const Shape& shape, DType dtype,
                     std::string component) {
  add_rows(target, std::move(name), shape, shape.rank == 0 ? 1 : shape[0], dtype, std::move(component));
}

void MemoryPlan::add_rows(Tensor* target, std::string name, const Shape& shape, std::int64_t expected_rows,
                          DType dtype, std::string component) {
  place(target, std::move(name), shape, expected_rows, dtype, std::move(component), false);
}

void MemoryPlan::add_shared(Tensor* target, std::string name, const Shape& shape, DType dtype,
                            std::string component) {
  add_shared_rows(target, std::move(name), shape, shape.rank == 0 ? 1 : shape[0], dtype,
                  std::move(component));
}

void MemoryPlan::add_shared_rows(Tensor* target, std::string name, const Shape& shape,
                                 std::int64_t expected_rows, DType dtype, std::string component) {
  place(target, std::move(name), shape, expected_rows, dtype, std::move(component), true);
}

void MemoryPlan::place(Tensor* target, std::string name, const Shape& shape, std::int64_t expected_rows,
                       DType dtype, std::string component, bool shared) {
  require(arena_ == nullptr, "buffer ", name, " is planned after the plan was committed");
  for (const Buffer& buffer : buffers_) {
    require(buffer.target != target, "buffer ", name, " has the target of buffer ", buffer.name);
  }
  *target = Tensor(nullptr, dtype, shape);
  const std::int64_t rows = target->rows();
  require(0 <= expected_rows && expected_rows <= rows, "buffer ", name, " of up to ", rows,
          " rows cannot be expected to hold ", expected_rows);
  const std::int64_t expected_bytes = row_bytes(*target) * expected_rows;
  Extent size{rounded_up(target->bytes(), kPlanAlignment), rounded_up(expected_bytes, kPlanAlignment)};
  Region MemoryPlan::*region = shared       ? &MemoryPlan::shared_
                               : depth_ > 0 ? &MemoryPlan::scratch_
                                            : &MemoryPlan::persistent_;
  if (granule_ > 0) {
    if (!shared && size.reserved - size.expected >= granule_) {
      size = {rounded_up(target->bytes(), granule_), rounded_up(expected_bytes, granule_)};
      region = depth_ > 0 ? &MemoryPlan::growing_scratch_ : &MemoryPlan::growing_;
    } else {
      size.expected = size.reserved;  // nothing is gained: all of its memory is there from the start
    }
  }
  Region& of = this->*region;
  buffers_.push_back({target, std::move(name), std::move(component), of.now.reserved, size, region});
  of.now.reserved += size.reserved;
  of.now.expected += size.expected;
  of.peak.reserved = std::max(of.peak.reserved, of.now.reserved);
  of.peak.expected = std::max(of.peak.expected, of.now.expected);
}

std::map<std::string, std::int64_t> MemoryPlan::by_component() const {
  std::map<std::string, std::int64_t> result;
  for (const Buffer& buffer : buffers_) {
    if (!is_temporary(buffer)) result[buffer.component] += buffer.size.expected;
  }
  const std::int64_t workspace = scratch_.peak.expected + growing_scratch_.peak.expected;
  if (workspace > 0) result["workspace"] = workspace;
  return result;
}

std::int64_t MemoryPlan::growing_begin() const {
  return rounded_up(persistent_.peak.reserved + scratch_.peak.reserved, granule_ > 0 ? granule_ : 1);
}

std::int64_t MemoryPlan::region_begin(Region MemoryPlan::*region) const {
  if (region == &MemoryPlan::scratch_) return persistent_.peak.reserved;
  if (region == &MemoryPlan::growing_) return growing_begin();
  if (region == &MemoryPlan::growing_scratch_) return growing_begin() + growing_.peak.reserved;
  return 0;
}

void MemoryPlan::commit(Backend& backend) {
  require(arena_ == nullptr, "a memory plan is committed once");
  require(granule_ == 0 || granule_ == backend.granule(), "the plan was made for granules of ", granule_,
          " bytes, ", backend.name(), " has ", backend.granule());
  backend_ = &backend;
  const auto bytes = static_cast<std::size_t>(arena_bytes());
  arena_ = granule_ > 0 ? backend.reserve(bytes) : backend.allocate(bytes);
  if (shared_.peak.reserved > 0)
    shared_arena_ = backend.allocate_shared(static_cast<std::size_t>(shared_.peak.reserved));
  if (granule_ > 0) {
    mapped_.resize(static_cast<std::size_t>(arena_bytes() / granule_));
    map(0, growing_begin());
  }
  for (const Buffer& buffer : buffers_) {
    const bool shared = buffer.region == &MemoryPlan::shared_;
    const std::int64_t begin = region_begin(buffer.region) + buffer.offset;
    buffer.target->device = shared ? Device::CPU : backend.device();
    buffer.target->data = static_cast<char*>(shared ? shared_arena_ : arena_) + begin;
    if (buffer.region == &MemoryPlan::growing_ || buffer.region == &MemoryPlan::growing_scratch_)
      map(begin, begin + buffer.size.expected);
  }
  if (granule_ > 0) backend.synchronize(backend.main_stream());
}

bool MemoryPlan::is_mapped(std::int64_t begin, std::int64_t end) const {
  for (std::int64_t g = begin / granule_; g * granule_ < end; ++g) {
    if (!mapped_[static_cast<std::size_t>(g)]) return false;
  }
  return true;
}

void MemoryPlan::map(std::int64_t begin, std::int64_t end) {
  const auto missing = [&](std::int64_t g) {
    return g * granule_ < end && !mapped_[static_cast<std::size_t>(g)];
  };
  for (std::int64_t g = begin / granule_; g * granule_ < end; ++g) {
    const std::int64_t first = g;
    while (missing(g)) ++g;
    if (g == first) continue;
    backend_->map(arena_, first * granule_, g * granule_);
    std::fill(mapped_.begin() + first, mapped_.begin() + g, true);
  }
}

void MemoryPlan::ensure_rows(const Tensor& buffer, std::int64_t rows) {
  if (granule_ == 0 || buffer.data == nullptr) return;
  require(rows <= buffer.rows(), "a buffer of ", buffer.rows(), " rows cannot hold ", rows);
  const auto address = reinterpret_cast<std::uintptr_t>(buffer.data),
             arena = reinterpret_cast<std::uintptr_t>(arena_);
  if (address < arena || address - arena >= static_cast<std::uintptr_t>(arena_bytes())) return;  // shared
  const auto begin = static_cast<std::int64_t>(address - arena);
  const std::int64_t needed = rows * row_bytes(buffer);
  if (is_mapped(begin, begin + needed)) return;
  ++growths_;
  try {
    map(begin, begin + std::min(buffer.bytes(), needed + needed / 4));
  } catch (const Error&) {  // without the quarter, then
    try {
      map(begin, begin + needed);
    } catch (const Error& error) {
      const auto named = std::find_if(buffers_.begin(), buffers_.end(),
                                      [&](const Buffer& planned) { return planned.target == &buffer; });
      throw Error(
          cat(named == buffers_.end() ? std::string("a buffer of rows") : named->name, ": rank ", rank_,
              " is sent ", rows, " rows or slots, for which ", needed,
              " bytes are needed, and the memory has run out (", error.what(),
              "); balance the router (moe.balance_loss, moe.capacity_factor), take fewer sequences at "
              "a time (batch.micro_batch_sequences) or more ranks; parallel.expected_load takes more "
              "from the start, parallel.load_limit bounds what is accepted"));
    }
  }
  // Other streams may write to the new memory: it is zeroed before.
  backend_->synchronize(backend_->main_stream());
}

namespace {
std::int64_t resident_of(void* memory, std::int64_t bytes) {
  if (memory == nullptr) return 0;
  const std::int64_t page = sysconf(_SC_PAGESIZE);
  std::vector<unsigned char> resident((bytes + page - 1) / page);
  if (mincore(memory, static_cast<std::size_t>(bytes), resident.data()) != 0) return 0;
  const std::int64_t count =
      std::count_if(resident.begin(), resident.end(), [](auto p) { return (p & 1) != 0; });
  return std::min(count * page, bytes);
}
}  // namespace

std::int64_t MemoryPlan::resident_bytes() const {
  if (arena_ == nullptr) return 0;
  if (granule_ > 0)
    return std::count(mapped_.begin(), mapped_.end(), true) * granule_ + shared_.peak.reserved;
  if (backend_->device() != Device::CPU) return reserved_bytes();
  return resident_of(arena_, arena_bytes()) + resident_of(shared_arena_, shared_.peak.reserved);
}

}  // namespace hybridmoe
