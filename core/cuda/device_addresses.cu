#include <algorithm>

#include "core/cuda/device_addresses.h"
#include "core/cuda/driver_function.h"

namespace hybridmoe::cuda {
namespace {

constexpr unsigned kSince = 10020;  // the driver's version that has all of these: 10.2

struct Driver {
  decltype(&cuDeviceGetAttribute) attribute =
      driver_function<decltype(cuDeviceGetAttribute)>("cuDeviceGetAttribute", kSince);
  decltype(&cuMemGetAllocationGranularity) granularity =
      driver_function<decltype(cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity", kSince);
  decltype(&cuMemAddressReserve) reserve =
      driver_function<decltype(cuMemAddressReserve)>("cuMemAddressReserve", kSince);
  decltype(&cuMemAddressFree) free = driver_function<decltype(cuMemAddressFree)>("cuMemAddressFree", kSince);
  decltype(&cuMemCreate) create = driver_function<decltype(cuMemCreate)>("cuMemCreate", kSince);
  decltype(&cuMemRelease) release = driver_function<decltype(cuMemRelease)>("cuMemRelease", kSince);
  decltype(&cuMemMap) map = driver_function<decltype(cuMemMap)>("cuMemMap", kSince);
  decltype(&cuMemUnmap) unmap = driver_function<decltype(cuMemUnmap)>("cuMemUnmap", kSince);
  decltype(&cuMemSetAccess) set_access = driver_function<decltype(cuMemSetAccess)>("cuMemSetAccess", kSince);
};

const Driver& driver() {
  static const Driver functions;
  return functions;
}

void check(CUresult result, const char* what, std::size_t bytes) {
  require(result == CUDA_SUCCESS, "CUDA: ", what, " of ", bytes, " bytes failed (CUresult ", int{result},
          ")");
}

CUmemLocation place_of(int device) {
  CUmemLocation location{};
  location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  location.id = device;
  return location;
}

CUmemAllocationProp memory_of(int device) {
  CUmemAllocationProp memory{};
  memory.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  memory.location = place_of(device);
  return memory;
}

}  // namespace

DeviceAddresses::DeviceAddresses(int device) : device_(device) {
  int supported = 0;
  check(driver().attribute(&supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device),
        "asking for the device's addresses", 0);
  if (supported == 0) return;
  const CUmemAllocationProp memory = memory_of(device);
  std::size_t granule = 0;
  check(driver().granularity(&granule, &memory, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
        "asking for the granularity of memory", 0);
  granule_ = static_cast<std::int64_t>(granule);
}

std::size_t DeviceAddresses::rounded(std::size_t bytes) const {
  const auto granule = static_cast<std::size_t>(granule_);
  return std::max<std::size_t>(1, (bytes + granule - 1) / granule) * granule;
}

void* DeviceAddresses::reserve(std::size_t bytes) {
  CUdeviceptr reserved = 0;
  check(driver().reserve(&reserved, rounded(bytes), static_cast<std::size_t>(granule_), 0, 0),
        "reserving addresses", rounded(bytes));
  return reinterpret_cast<void*>(reserved);
}

bool DeviceAddresses::map(void* part, std::size_t bytes) {
  const auto address = reinterpret_cast<CUdeviceptr>(part);
  const CUmemAllocationProp memory = memory_of(device_);
  CUmemGenericAllocationHandle handle{};
  const CUresult created = driver().create(&handle, bytes, &memory, 0);
  if (created == CUDA_ERROR_OUT_OF_MEMORY) return false;
  check(created, "getting memory", bytes);
  const CUresult mapped = driver().map(address, bytes, 0, handle, 0);
  driver().release(handle);  // the mapping keeps the memory
  check(mapped, "mapping memory", bytes);
  CUmemAccessDesc access{};
  access.location = place_of(device_);
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  const CUresult allowed = driver().set_access(address, bytes, &access, 1);
  if (allowed != CUDA_SUCCESS) driver().unmap(address, bytes);
  check(allowed, "allowing access to memory", bytes);
  parts_[address] = bytes;
  return true;
}

void DeviceAddresses::release(void* reserved, std::size_t bytes) noexcept {
  const auto begin = reinterpret_cast<CUdeviceptr>(reserved);
  const auto first = parts_.lower_bound(begin), last = parts_.lower_bound(begin + rounded(bytes));
  for (auto part = first; part != last; ++part) driver().unmap(part->first, part->second);
  parts_.erase(first, last);
  driver().free(begin, rounded(bytes));
}

}  // namespace hybridmoe::cuda
