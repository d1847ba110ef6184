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
inline cudaStream_t main_stream_of_process() {
  // Made once, whichever of the threads that are ranks comes first.
  static const cudaStream_t stream = [] {
    cudaStream_t made = nullptr;
    check_cuda(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "creating a stream");
    return made;
  }();
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

// Lets a kernel have as much shared memory as a block can, and says how much that is: once for all launches,
// since threads that are ranks launch it with different sizes.
inline std::size_t grant_shared_memory(const void* kernel) {
  int device = 0, most = 0;
  check_cuda(cudaGetDevice(&device), "asking for the device");
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "asking for the most shared memory");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
             "asking for shared memory");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared),
             "asking for shared memory");
  return static_cast<std::size_t>(most);
}

// Queues kernel() for every thread of the grid. Kernel::kThreads is the most threads that a block of it has.
template <class Kernel>
void launch(const Kernel& kernel, const Grid& grid, Stream* stream) {
  constexpr std::size_t kWithoutAsking = 48 << 10;
  if (grid.shared_bytes > kWithoutAsking) {
    static const std::size_t most = grant_shared_memory(reinterpret_cast<const void*>(&run_kernel<Kernel>));
    require(grid.shared_bytes <= most, "a kernel needs ", grid.shared_bytes,
            " bytes of shared memory for this model's sizes, a block of this GPU has ", most,
            "; a GPU of compute capability 8.0 or 9.0 has more");
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
