// Virtual memory management as the driver's documentation describes it, in the driver's place: what is not
// allowed there fails the test.
#include "core/cuda/device_addresses.h"

#include <gtest/gtest.h>
#include <map>
#include <string>

#include "core/cuda/driver_function.h"

namespace hybridmoe::cuda {
namespace {

constexpr std::size_t kGranule = 2 << 20;
constexpr CUdeviceptr kFirstAddress = CUdeviceptr{1} << 40;

struct Mapping {
  std::size_t bytes;
  bool accessible;
};

// Everything that a process has of the driver.
struct Substitute {
  bool supported = true, gives_access = true;
  std::size_t memory = 64 * kGranule, taken = 0;
  std::map<CUdeviceptr, std::size_t> reserved;
  std::map<CUdeviceptr, Mapping> mapped;
  std::map<CUmemGenericAllocationHandle, std::size_t> handles;  // not released
  CUdeviceptr next_address = kFirstAddress;
  CUmemGenericAllocationHandle next_handle = 1;
} its;

CUresult allowed(bool condition, const char* what) {
  EXPECT_TRUE(condition) << what;
  return condition ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult attribute(int* value, CUdevice_attribute, CUdevice) {
  *value = its.supported;
  return CUDA_SUCCESS;
}
CUresult granularity(std::size_t* granule, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *granule = kGranule;
  return CUDA_SUCCESS;
}
CUresult reserve(CUdeviceptr* address, std::size_t bytes, std::size_t, CUdeviceptr, unsigned long long) {
  *address = its.next_address;
  its.next_address += bytes + 16 * kGranule;
  its.reserved[*address] = bytes;
  return allowed(bytes > 0 && bytes % kGranule == 0, "addresses in granules");
}
CUresult free_addresses(CUdeviceptr address, std::size_t bytes) {
  const auto it = its.reserved.find(address);
  const bool whole = it != its.reserved.end() && it->second == bytes;
  const auto inside = its.mapped.lower_bound(address);
  const bool empty = inside == its.mapped.end() || inside->first >= address + bytes;
  if (whole) its.reserved.erase(it);
  return allowed(whole && empty, "a whole reservation without memory is freed");
}
CUresult create(CUmemGenericAllocationHandle* handle, std::size_t bytes, const CUmemAllocationProp* memory,
                unsigned long long) {
  if (its.taken + bytes > its.memory) return CUDA_ERROR_OUT_OF_MEMORY;
  its.taken += bytes;
  *handle = its.next_handle++;
  its.handles[*handle] = bytes;
  return allowed(bytes > 0 && bytes % kGranule == 0 && memory->location.id == 5 &&
                     memory->location.type == CU_MEM_LOCATION_TYPE_DEVICE,
                 "memory of the device, in granules");
}
// Mappings keep the memory: what is released without one is lost here.
CUresult release(CUmemGenericAllocationHandle handle) {
  return allowed(its.handles.erase(handle) == 1, "a handle is released once");
}
CUresult map(CUdeviceptr address, std::size_t bytes, std::size_t offset, CUmemGenericAllocationHandle handle,
             unsigned long long) {
  bool inside = false;
  for (const auto& [begin, size] : its.reserved)
    inside = inside || (begin <= address && address + bytes <= begin + size);
  bool apart = true;
  for (const auto& [begin, part] : its.mapped)
    apart = apart && (address + bytes <= begin || begin + part.bytes <= address);
  const bool whole = its.handles.contains(handle) && its.handles[handle] == bytes && offset == 0;
  its.mapped[address] = {bytes, false};
  return allowed(inside && apart && whole && address % kGranule == 0, "memory behind free addresses");
}
CUresult unmap(CUdeviceptr address, std::size_t bytes) {
  const auto it = its.mapped.find(address);
  const bool as_mapped = it != its.mapped.end() && it->second.bytes == bytes;
  if (as_mapped) {
    its.mapped.erase(it);
    its.taken -= bytes;
  }
  return allowed(as_mapped, "a part is unmapped as it was mapped");
}
CUresult set_access(CUdeviceptr address, std::size_t bytes, const CUmemAccessDesc* access,
                    std::size_t count) {
  if (!its.gives_access) return CUDA_ERROR_INVALID_DEVICE;
  const auto it = its.mapped.find(address);
  const bool mapped = it != its.mapped.end() && it->second.bytes == bytes;
  if (mapped) it->second.accessible = access->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  return allowed(mapped && count == 1 && access->location.id == 5, "access to what is mapped");
}

void* function_named(const std::string& name) {
  const std::map<std::string, void*> functions = {
      {"cuDeviceGetAttribute", reinterpret_cast<void*>(attribute)},
      {"cuMemGetAllocationGranularity", reinterpret_cast<void*>(granularity)},
      {"cuMemAddressReserve", reinterpret_cast<void*>(reserve)},
      {"cuMemAddressFree", reinterpret_cast<void*>(free_addresses)},
      {"cuMemCreate", reinterpret_cast<void*>(create)},
      {"cuMemRelease", reinterpret_cast<void*>(release)},
      {"cuMemMap", reinterpret_cast<void*>(map)},
      {"cuMemUnmap", reinterpret_cast<void*>(unmap)},
      {"cuMemSetAccess", reinterpret_cast<void*>(set_access)}};
  const auto it = functions.find(name);
  return it == functions.end() ? nullptr : it->second;
}

class DeviceAddressesTest : public ::testing::Test {
 protected:
  void SetUp() override { its = {}; }
};

char* part(void* reserved, std::size_t granule) { return static_cast<char*>(reserved) + granule * kGranule; }

TEST_F(DeviceAddressesTest, GetMemoryByPartsAndGiveAllOfItBack) {
  DeviceAddresses addresses(5);
  ASSERT_EQ(addresses.granule(), static_cast<std::int64_t>(kGranule));
  void* const other = addresses.reserve(1);
  void* const reserved = addresses.reserve(5 * kGranule - 10);
  EXPECT_TRUE(addresses.map(part(reserved, 3), kGranule));
  EXPECT_TRUE(addresses.map(part(reserved, 0), 2 * kGranule));
  EXPECT_TRUE(addresses.map(part(other, 0), kGranule));
  EXPECT_EQ(its.taken, 4 * kGranule);
  EXPECT_TRUE(its.handles.empty()) << "the mappings keep the memory";
  for (const auto& [address, mapping] : its.mapped) EXPECT_TRUE(mapping.accessible) << address;
  addresses.release(reserved, 5 * kGranule - 10);
  EXPECT_EQ(its.taken, kGranule) << "the other's";
  addresses.release(other, 1);
  EXPECT_EQ(its.taken, 0u);
  EXPECT_TRUE(its.reserved.empty());
}

TEST_F(DeviceAddressesTest, WithoutMemoryNothingChanges) {
  its.memory = 2 * kGranule;
  DeviceAddresses addresses(5);
  void* const reserved = addresses.reserve(4 * kGranule);
  EXPECT_FALSE(addresses.map(reserved, 3 * kGranule));
  EXPECT_TRUE(its.mapped.empty());
  EXPECT_TRUE(addresses.map(reserved, 2 * kGranule));
  addresses.release(reserved, 4 * kGranule);
}

TEST_F(DeviceAddressesTest, WithoutAccessTheMemoryGoesBack) {
  its.gives_access = false;
  DeviceAddresses addresses(5);
  void* const reserved = addresses.reserve(4 * kGranule);
  EXPECT_THROW(addresses.map(reserved, kGranule), Error);
  EXPECT_EQ(its.taken, 0u);
  addresses.release(reserved, 4 * kGranule);
}

TEST_F(DeviceAddressesTest, ADeviceMayNotHaveIt) {
  its.supported = false;
  EXPECT_EQ(DeviceAddresses(5).granule(), 0);
}

}  // namespace
}  // namespace hybridmoe::cuda

// What driver_function.h asks of the runtime, which no test is linked with.
cudaError_t CUDARTAPI cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned int,
                                                       unsigned long long,
                                                       cudaDriverEntryPointQueryResult* found) {
  *function = hybridmoe::cuda::function_named(symbol);
  *found = *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
const char* CUDARTAPI cudaGetErrorString(cudaError_t) { return "an error of the substitute"; }
const char* CUDARTAPI cudaGetErrorName(cudaError_t) { return "error"; }
