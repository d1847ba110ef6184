#include "core/backend.h"

#include <cerrno>
#include <cstring>
#include <sys/mman.h>

namespace hybridmoe {

void* Backend::allocate(std::size_t bytes) {
  if (bytes == 0) bytes = 1;
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require(memory != MAP_FAILED, "cannot reserve ", bytes, " bytes of memory: ", std::strerror(errno),
          "; make the model or the micro-batch smaller, or use more ranks");
  // Arenas are read and written from end to end in every step: large pages save most of the address
  // translation.
  madvise(memory, bytes, MADV_HUGEPAGE);
  return memory;
}

void Backend::release(void* memory, std::size_t bytes) noexcept {
  if (memory != nullptr) munmap(memory, bytes == 0 ? 1 : bytes);
}

void Backend::copy(const Tensor& source, const Tensor& target, Stream*) {
  if (source.bytes() > 0) std::memcpy(target.data, source.data, static_cast<std::size_t>(source.bytes()));
}

}  // namespace hybridmoe
