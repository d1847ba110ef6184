// Starting kernels, on the device or on the host executor.
#pragma once

#include "core/cuda/portable.h"
#include "core/operators/common.h"

#ifdef __CUDACC__
#include "core/cuda/cuda_error.h"
#endif

namespace hybridmoe::cuda {

struct Grid {
  std::int64_t x = 1, y = 1;
  int threads = 256;             // of a block, a multiple of 32
  std::size_t shared_bytes = 0;  // of a block
};

#ifdef __CUDACC__

// A process works with one device, and has one main stream: what null stands for.
inline cudaStream_t& main_stream_of_process() {
  static cudaStream_t stream = nullptr;
  return stream;
}
// Stream is opaque outside of this folder: here it is CUDA's.
inline cudaStream_t native(Stream* stream) {
  return stream == nullptr ? main_stream_of_process() : reinterpret_cast<cudaStream_t>(stream);
}

// A kernel that says how many of its blocks a processor is to hold is bound to the registers for that.
template <class Kernel>
constexpr int blocks_per_processor() {
  if constexpr (requires { Kernel::kBlocksPerProcessor; }) return Kernel::kBlocksPerProcessor;
  return 0;  // any
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, blocks_per_processor<Kernel>())
    run_kernel(const __grid_constant__ Kernel kernel) {
  kernel();
}

// Lets a kernel have as much shared memory as a block can: once for all launches, since threads that are
// ranks launch it with different sizes.
inline bool grant_shared_memory(const void* kernel) {
  int device = 0, most = 0;
  check_cuda(cudaGetDevice(&device), "asking for the device");
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "asking for the most shared memory");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
             "asking for shared memory");
  return true;
}

// Queues kernel() for every thread of the grid. Kernel::kThreads is the most threads that a block of it has.
template <class Kernel>
void launch(const Kernel& kernel, const Grid& grid, Stream* stream) {
  constexpr std::size_t kWithoutAsking = 48 << 10;
  if (grid.shared_bytes > kWithoutAsking) {
    static const bool granted = grant_shared_memory(reinterpret_cast<const void*>(&run_kernel<Kernel>));
    static_cast<void>(granted);
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  run_kernel<<<blocks, static_cast<unsigned>(grid.threads), grid.shared_bytes, native(stream)>>>(kernel);
  check_cuda(cudaGetLastError(), "launching a kernel");
}

#else

template <class Kernel>
void launch(const Kernel& kernel, const Grid& grid, Stream*) {
  require(grid.threads <= Kernel::kThreads, "a block of ", grid.threads, " threads, its kernel has up to ",
          int{Kernel::kThreads});
  host::run({grid.x, grid.y, grid.threads, grid.shared_bytes}, [&] { kernel(); });
}

#endif

}  // namespace hybridmoe::cuda
