// The CUDA backend, which the program loads at run time: one binary starts on machines with and without a
// driver, with and without the toolkit's libraries.
#pragma once

#include <memory>

#include "core/backend.h"

namespace hybridmoe {

struct CudaOptions {
  DType compute_type = DType::BF16;  // or F32
  int device = 0;                    // of this host
};

// The GPUs of this host, at least 1. Throws Error saying why there is none: this build has no plug-in, it
// cannot be loaded (which library is missing), there is no driver, or no device.
int cuda_device_count();

// Opens a device; a process opens one. Throws Error as above, or when the device cannot be used.
std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options);

// What the plug-in exports: made by the same compiler from the same sources, which the version is to tell.
namespace cuda_plugin {
constexpr int kVersion = 1;  // of the operator interface; to be raised with every change of it
constexpr char kFile[] = "libhybridmoe_cuda.so";  // beside the program
using Version = int();
using DeviceCount = int();
using MakeBackend = Backend*(const CudaOptions&);
}  // namespace cuda_plugin

}  // namespace hybridmoe
