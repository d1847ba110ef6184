#include "core/memory_plan.h"

#include <algorithm>
#include <sys/mman.h>
#include <unistd.h>

namespace hybridmoe {

namespace {
constexpr std::int64_t kPlanAlignment = 64;
std::int64_t aligned(std::int64_t bytes) {
  return (bytes + kPlanAlignment - 1) / kPlanAlignment * kPlanAlignment;
}
}  // namespace

MemoryPlan::~MemoryPlan() {
  if (arena_ != nullptr) backend_->release(arena_, static_cast<std::size_t>(arena_bytes()));
  if (shared_arena_ != nullptr)
    backend_->release_shared(shared_arena_, static_cast<std::size_t>(shared_.reserved));
}

void MemoryPlan::add(Tensor* target, std::string name, const Shape& shape, DType dtype,
                     std::string component) {
  add_rows(target, std::move(name), shape, shape.rank == 0 ? 1 : shape[0], dtype, std::move(component));
}

void MemoryPlan::add_rows(Tensor* target, std::string name, const Shape& shape, std::int64_t expected_rows,
                          DType dtype, std::string component) {
  place(target, std::move(name), shape, expected_rows, dtype, std::move(component),
        depth_ > 0 ? &MemoryPlan::scratch_ : &MemoryPlan::persistent_);
}

void MemoryPlan::add_shared(Tensor* target, std::string name, const Shape& shape, DType dtype,
                            std::string component) {
  add_shared_rows(target, std::move(name), shape, shape.rank == 0 ? 1 : shape[0], dtype,
                  std::move(component));
}

void MemoryPlan::add_shared_rows(Tensor* target, std::string name, const Shape& shape,
                                 std::int64_t expected_rows, DType dtype, std::string component) {
  place(target, std::move(name), shape, expected_rows, dtype, std::move(component), &MemoryPlan::shared_);
}

void MemoryPlan::place(Tensor* target, std::string name, const Shape& shape, std::int64_t expected_rows,
                       DType dtype, std::string component, Extent MemoryPlan::*region) {
  require(arena_ == nullptr, "buffer ", name, " is planned after the plan was committed");
  for (const Buffer& buffer : buffers_) {
    require(buffer.target != target, "buffer ", name, " has the target of buffer ", buffer.name);
  }
  *target = Tensor(nullptr, dtype, shape);
  const std::int64_t rows = target->rows();
  require(0 <= expected_rows && expected_rows <= rows, "buffer ", name, " of up to ", rows,
          " rows cannot be expected to hold ", expected_rows);
  const std::int64_t row_bytes = rows == 0 ? 0 : target->bytes() / rows;
  const Extent size{aligned(target->bytes()), aligned(row_bytes * expected_rows)};
  Extent& top = this->*region;
  buffers_.push_back({target, std::move(name), std::move(component), top.reserved, size, region});
  top.reserved += size.reserved;
  top.expected += size.expected;
  scratch_peak_.reserved = std::max(scratch_peak_.reserved, scratch_.reserved);
  scratch_peak_.expected = std::max(scratch_peak_.expected, scratch_.expected);
}

std::map<std::string, std::int64_t> MemoryPlan::by_component() const {
  std::map<std::string, std::int64_t> result;
  for (const Buffer& buffer : buffers_) {
    if (buffer.region != &MemoryPlan::scratch_) result[buffer.component] += buffer.size.expected;
  }
  if (scratch_peak_.expected > 0) result["workspace"] = scratch_peak_.expected;
  return result;
}

void MemoryPlan::commit(Backend& backend) {
  require(arena_ == nullptr, "a memory plan is committed once");
  backend_ = &backend;
  arena_ = backend.allocate(static_cast<std::size_t>(arena_bytes()));
  if (shared_.reserved > 0)
    shared_arena_ = backend.allocate_shared(static_cast<std::size_t>(shared_.reserved));
  for (const Buffer& buffer : buffers_) {
    const bool shared = buffer.region == &MemoryPlan::shared_;
    char* const begin = static_cast<char*>(shared ? shared_arena_ : arena_);
    buffer.target->device = shared ? Device::CPU : backend.device();
    buffer.target->data =
        begin + (buffer.region == &MemoryPlan::scratch_ ? persistent_.reserved : 0) + buffer.offset;
  }
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
  if (arena_ == nullptr || backend_->device() != Device::CPU) return 0;
  return resident_of(arena_, arena_bytes()) + resident_of(shared_arena_, shared_.reserved);
}

}  // namespace hybridmoe
