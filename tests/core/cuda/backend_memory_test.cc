// Addresses first, memory behind parts of them later: what the backend asks of its device, and that the host
// executor's guarded memory is as strict as a GPU's.
#include <array>
#include <gtest/gtest.h>

#include "core/cuda/cuda_backend.h"
#include "core/cuda/host_device.h"
#include "core/cuda_plugin.h"
#include "tests/core/cuda/idle_device.h"

namespace hybridmoe::cuda {
namespace {

constexpr std::int64_t kPart = 64;

// Writes down what it is asked for.
class TellingDevice final : public IdleDevice {
 public:
  TellingDevice(std::string* told, std::int64_t granule) : told_(told), granule_(granule) {}
  std::int64_t granule() const override { return granule_; }
  void* allocate(std::size_t) override { return tell("allocate ", memory_.data()); }
  void release(void*, std::size_t) noexcept override { *told_ += "release "; }
  void* reserve(std::size_t) override { return tell("reserve ", memory_.data()); }
  void map(void* part, std::size_t bytes) override { tell(cat("map ", at(part), "+", bytes, " "), part); }
  void release_reserved(void*, std::size_t) noexcept override { *told_ += "release_reserved "; }
  void fill_zero(void* memory, std::size_t bytes, Stream*) override {
    tell(cat("zero ", at(memory), "+", bytes, " "), memory);
  }

 private:
  std::ptrdiff_t at(void* memory) const { return static_cast<const char*>(memory) - memory_.data(); }
  void* tell(const std::string& what, void* memory) {
    *told_ += what;
    return memory;
  }
  std::string* told_;
  std::int64_t granule_;
  std::array<char, 4 * kPart> memory_{};
};

std::string told_by_a_device(std::int64_t granule) {
  std::string told;
  CudaBackend backend(std::make_unique<TellingDevice>(&told, granule), DType::F32, GroupedKernels::Fastest);
  void* const memory = backend.reserve(4 * kPart);
  backend.map(memory, kPart, 3 * kPart);
  backend.release_reserved(memory, 4 * kPart);
  return told;
}

TEST(BackendMemory, PartsAreMappedThenZeroed) {
  EXPECT_EQ(told_by_a_device(kPart), "reserve map 64+128 zero 64+128 release_reserved ");
}

TEST(BackendMemory, ADeviceThatCannotMapAllocatesAll) { EXPECT_EQ(told_by_a_device(0), "allocate release "); }

TEST(BackendMemory, GuardedAddressesWithoutMemoryCrashCopiesAndKernels) {
  const auto backend = make_host_executed_backend(DType::F32, true);
  const std::int64_t granule = backend->granule(), floats = granule / 4;
  ASSERT_GT(granule, 0);
  void* const memory = backend->reserve(static_cast<std::size_t>(3 * granule));
  backend->map(memory, granule, 2 * granule);
  const Tensor all(memory, DType::F32, {3, floats}, backend->device());
  std::vector<float> host(floats, 1);
  const Tensor values(host.data(), DType::F32, {1, floats});
  backend->copy(all.rows(1, 2), values, nullptr);
  EXPECT_EQ(host, std::vector<float>(floats));
  EXPECT_DEATH(backend->copy(values, all.rows(0, 1), nullptr), "");
  EXPECT_DEATH(backend->add(all.rows(1, 2), all.rows(2, 3), all.rows(1, 2), nullptr), "");
  backend->map(memory, 2 * granule, 3 * granule);
  backend->add(all.rows(1, 2), all.rows(2, 3), all.rows(1, 2), nullptr);
  EXPECT_DEATH(static_cast<float*>(memory)[floats] = 1, "") << "the host reaches none of it";
  backend->release_reserved(memory, static_cast<std::size_t>(3 * granule));
}

// Null where there is no GPU.
Backend* device_backend() {
  static const auto backend = []() -> std::unique_ptr<Backend> {
    try {
      return make_cuda_backend({.compute_type = DType::F32});
    } catch (const Error&) {
      return nullptr;
    }
  }();
  return backend.get();
}

class MemoryOnDevice : public ::testing::TestWithParam<int> {};  // parts mapped at a time

// Copies, fills and kernels work across the border of two parts, and what was there stays when more comes.
TEST_P(MemoryOnDevice, PartsAreOneArena) {
  Backend& backend = *device_backend();
  const std::int64_t granule = backend.granule(), floats = granule / 4;
  if (granule == 0) GTEST_SKIP() << backend.name() << " maps no memory";
  const auto bytes = static_cast<std::size_t>(1024 * granule);
  void* const memory = backend.reserve(bytes);
  const Tensor all(memory, DType::F32, {1024, floats}, backend.device());
  std::vector<float> host(8 * floats), back(8 * floats);
  const Tensor source(host.data(), DType::F32, {8, floats}), target(back.data(), DType::F32, {8, floats});
  const auto read = [&](std::int64_t begin, std::int64_t end) {
    backend.copy(all.rows(begin, end), target.rows(begin, end), nullptr);
    backend.synchronize(backend.main_stream());
  };
  for (std::int64_t part = 0; part < 8; part += GetParam()) {
    const std::int64_t end = part + GetParam();
    backend.map(memory, part * granule, end * granule);
    read(0, end);
    EXPECT_EQ(back, host) << "zeros behind what was there";
    for (std::int64_t i = part * floats; i < end * floats; ++i) host[i] = static_cast<float>(i % 1000);
    backend.copy(source.rows(0, end), all.rows(0, end), nullptr);
    backend.add(all.rows(0, end), all.rows(0, end), all.rows(0, end), nullptr);
    for (std::int64_t i = 0; i < end * floats; ++i) host[i] *= 2;
    read(0, end);
    EXPECT_EQ(back, host);
    std::fill(back.begin() + end * floats, back.end(), 0.0F);
  }
  backend.zero(all.rows(0, 8), nullptr);
  read(0, 8);
  EXPECT_EQ(back, std::vector<float>(8 * floats));
  backend.release_reserved(memory, bytes);
}
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(MemoryOnDevice);
INSTANTIATE_TEST_SUITE_P(Cuda, MemoryOnDevice,
                         ::testing::ValuesIn(device_backend() == nullptr ? std::vector<int>{}
                                                                         : std::vector{1, 2, 8}));

}  // namespace
}  // namespace hybridmoe::cuda
