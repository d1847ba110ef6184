#include "core/testing/operator_case.h"

#include <algorithm>
#include <cstring>

namespace hybridmoe::testing {
namespace {

constexpr std::size_t kMargin = 64;  // bytes behind each operand

double load(const unsigned char* at, DType dtype) {
  const auto as = [at](auto value) {
    std::memcpy(&value, at, sizeof value);
    return value;
  };
  switch (dtype) {
    case DType::F64:
      return as(double{});
    case DType::F32:
      return as(float{});
    case DType::BF16:
      return static_cast<float>(as(BFloat16{}));
    case DType::I64:
      return static_cast<double>(as(std::int64_t{}));
    case DType::I32:
      return as(std::int32_t{});
    default:
      throw Error(cat("operator cases hold no ", name_of(dtype)));
  }
}

void store(unsigned char* at, DType dtype, double value) {
  const auto put = [at](auto converted) { std::memcpy(at, &converted, sizeof converted); };
  switch (dtype) {
    case DType::F64:
      return put(value);
    case DType::F32:
      return put(static_cast<float>(value));
    case DType::BF16:
      return put(BFloat16(static_cast<float>(value)));
    case DType::I64:
      return put(static_cast<std::int64_t>(value));
    case DType::I32:
      return put(static_cast<std::int32_t>(value));
    default:
      throw Error(cat("operator cases hold no ", name_of(dtype)));
  }
}

bool filled(Role role) { return role == Role::Input || role == Role::Accumulate; }

}  // namespace

DType dtype_in(const Backend& backend, ElementType type) {
  switch (type) {
    case ElementType::Compute:
      return backend.compute_type();
    case ElementType::Statistics:
      return backend.statistics_type();
    case ElementType::Double:
      return DType::F64;
    case ElementType::Int32:
      return DType::I32;
    case ElementType::Int64:
      return DType::I64;
  }
  throw Error("unknown element type");
}

Fill normal(double scale, double mean) {
  return [=](const Random& random, std::int64_t i) { return mean + scale * random.normal(i); };
}

Fill constant(double value) {
  return [=](const Random&, std::int64_t) { return value; };
}

Fill values(std::vector<double> list) {
  return [list = std::move(list)](const Random&, std::int64_t i) { return list.at(i); };
}

Fill below(std::uint64_t n) {
  return [=](const Random& random, std::int64_t i) { return static_cast<double>(random.below(i, n)); };
}

Operand& OperatorCase::append(Operand operand) {
  operands.push_back(std::move(operand));
  return operands.back();
}

Operand& OperatorCase::input(const std::string& operand, ElementType type, const Shape& shape, Fill fill) {
  return append(
      {.name = operand, .type = type, .role = Role::Input, .shape = shape, .fill = std::move(fill)});
}

Operand& OperatorCase::derived(const std::string& operand, ElementType type, const Shape& shape) {
  return append({.name = operand, .type = type, .role = Role::Derived, .shape = shape});
}

Operand& OperatorCase::output(const std::string& operand, ElementType type, const Shape& shape) {
  return append({.name = operand, .type = type, .role = Role::Output, .shape = shape});
}

Operand& OperatorCase::accumulate(const std::string& operand, ElementType type, const Shape& shape,
                                  Fill fill) {
  return append(
      {.name = operand, .type = type, .role = Role::Accumulate, .shape = shape, .fill = std::move(fill)});
}

Operand& OperatorCase::scratch(const std::string& operand, ElementType type, const Shape& shape) {
  return append({.name = operand, .type = type, .role = Role::Scratch, .shape = shape});
}

double moved_bytes(const OperatorCase& c, const Backend& backend) {
  double bytes = 0;
  for (const Operand& operand : c.operands) {
    if (operand.role == Role::Scratch) continue;
    const double times = operand.role == Role::Accumulate ? 2 : 1;
    bytes += times * operand.touched * static_cast<double>(operand.shape.elements()) *
             static_cast<double>(size_of(dtype_in(backend, operand.type)));
  }
  return bytes;
}

void Target::copy(void* to, const void* from, std::size_t bytes) const {
  const Shape shape{static_cast<std::int64_t>(bytes)};
  backend->copy({const_cast<void*>(from), DType::U8, shape}, {to, DType::U8, shape}, backend->main_stream());
  backend->synchronize(backend->main_stream());
}

TensorSet::TensorSet(const OperatorCase& c, const Target& target) : target_(target), stream_(c.name) {
  slots_.reserve(c.operands.size());
  for (const Operand& operand : c.operands) {
    Slot slot;
    slot.operand = &operand;
    slot.dtype = dtype_in(*target.backend, operand.type);
    if (!operand.alias.empty()) {
      const int other = find(operand.alias);
      require(other >= 0, c.name, ": ", operand.name, " is an alias of ", operand.alias,
              ", which must be added before it");
      if (slots_[other].dtype == slot.dtype) {
        slot.alias = other;
        slot.shared = slots_[other].shared = true;
      }
    }
    if (slot.alias < 0) {
      const std::int64_t rows = operand.shape.rank == 0 ? 1 : operand.shape[0];
      const std::int64_t span = operand.shape.elements() + rows * operand.row_gap;
      slot.image.assign(span * size_of(slot.dtype) + kMargin, 0xff);
      slot.memory = target.backend->allocate(slot.image.size());
    }
    slots_.push_back(std::move(slot));
  }
}

TensorSet::~TensorSet() {
  for (const Slot& slot : slots_) {
    if (slot.memory != nullptr) target_.backend->release(slot.memory, slot.image.size());
  }
}

int TensorSet::find(const std::string& operand) const {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].operand->name == operand) return static_cast<int>(i);
  }
  return -1;
}

Tensor TensorSet::operator[](const std::string& operand) const {
  const int slot = find(operand);
  if (slot < 0) return {};
  const Slot& owner = storage(slot);
  Tensor tensor(owner.memory, owner.dtype, slots_[slot].operand->shape, target_.backend->device());
  if (tensor.shape.rank == 2) tensor.stride[0] += owner.operand->row_gap;
  return tensor;
}

bool TensorSet::shares_memory(const std::string& operand) const { return slots_.at(find(operand)).shared; }

std::int64_t TensorSet::position(const Slot& slot, std::int64_t i) const {
  const Shape& shape = slot.operand->shape;
  const std::int64_t gaps = shape.rank == 2 ? i / shape[1] * slot.operand->row_gap : 0;
  return (i + gaps) * size_of(slot.dtype);
}

double TensorSet::get(const std::string& operand, std::int64_t i) const {
  const Slot& slot = storage(find(operand));
  return load(slot.image.data() + position(slot, i), slot.dtype);
}

void TensorSet::put(Slot& slot, std::int64_t i, double value) {
  store(slot.image.data() + position(slot, i), slot.dtype, value);
}

void TensorSet::set(const std::string& operand, std::int64_t i, double value) {
  const int found = find(operand);
  put(slots_[slots_[found].alias < 0 ? found : slots_[found].alias], i, value);
}

std::vector<unsigned char> TensorSet::bytes_of(const std::string& operand) const {
  const Slot& slot = storage(find(operand));
  std::vector<unsigned char> bytes;
  for (std::int64_t i = 0; i < slot.operand->shape.elements(); ++i) {
    const unsigned char* at = slot.image.data() + position(slot, i);
    bytes.insert(bytes.end(), at, at + size_of(slot.dtype));
  }
  return bytes;
}

bool TensorSet::margins_intact(const std::string& operand) const {
  const Slot& slot = storage(find(operand));
  std::vector<bool> inside(slot.image.size(), false);
  for (std::int64_t i = 0; i < slot.operand->shape.elements(); ++i) {
    const std::int64_t at = position(slot, i);
    for (std::int64_t byte = 0; byte < size_of(slot.dtype); ++byte) inside[at + byte] = true;
  }
  for (std::size_t i = 0; i < inside.size(); ++i) {
    if (!inside[i] && slot.image[i] != 0xff) return false;
  }
  return true;
}

void TensorSet::fill_inputs() {
  for (Slot& slot : slots_) {
    if (slot.alias >= 0 || !filled(slot.operand->role)) continue;
    const Random random(1, stream_ + "/" + slot.operand->name);
#pragma omp parallel for schedule(static)
    for (std::int64_t i = 0; i < slot.operand->shape.elements(); ++i) {
      put(slot, i, slot.operand->fill(random, i));
    }
  }
}

void TensorSet::assign_inputs(const TensorSet& other) {
  for (Slot& slot : slots_) {
    if (slot.alias >= 0 || !(filled(slot.operand->role) || slot.operand->role == Role::Derived)) continue;
    const std::string& name = slot.operand->name;
    for (std::int64_t i = 0; i < slot.operand->shape.elements(); ++i) put(slot, i, other.get(name, i));
  }
}

void TensorSet::upload() {
  for (const Slot& slot : slots_) {
    if (slot.memory != nullptr) target_.copy(slot.memory, slot.image.data(), slot.image.size());
  }
}

void TensorSet::download() {
  for (Slot& slot : slots_) {
    if (slot.memory != nullptr) target_.copy(slot.image.data(), slot.memory, slot.image.size());
  }
}

BoundCase::BoundCase(const OperatorCase& c, const Target& target)
    : case_(c), target_(target), tensors_(case_, target) {
  tensors_.fill_inputs();
  tensors_.upload();
  // Without derived operands, prepare would only serve the loss.
  const bool derives = std::any_of(case_.operands.begin(), case_.operands.end(),
                                   [](const Operand& operand) { return operand.role == Role::Derived; });
  if (derives) case_.prepare(*target_.backend, tensors_);
  run();
}

void BoundCase::run(int times) {
  for (int i = 0; i < times; ++i) case_.run(*target_.backend, tensors_);
  target_.backend->synchronize(target_.backend->main_stream());
}

}  // namespace hybridmoe::testing
