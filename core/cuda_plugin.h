// The CUDA backend and NCCL, which the program loads at run time: one binary starts on machines with and
// without a driver, with and without the libraries.
#pragma once

#include <array>
#include <memory>

#include "core/backend.h"
#include "core/device_collectives.h"

namespace hybridmoe {

// Whose kernels compute attention; sequences and types that cuDNN has no plan for are always our own
// kernels'.
enum class AttentionKernels {
  Auto,  // our own: cuDNN's have not been measured
  Own,
  Cudnn,  // needs bf16, and cuDNN
};

// The kernel of grouped products of bf16 factors. None takes every shape: what it does not take, and fp32,
// goes to the more general ones.
enum class GroupedKernels {
  Fastest,  // Mma: Wgmma has not been measured
  Mma,      // mma.sync: every device
  Wgmma,    // wgmma and bulk copies: devices of compute capability 9.x (H100, H200)
};

struct CudaOptions {
  DType compute_type = DType::BF16;  // or F32
  int device = 0;                    // of this host
  AttentionKernels attention = AttentionKernels::Auto;
  GroupedKernels grouped = GroupedKernels::Fastest;
  // Which of the algorithms that cuBLASLt proposes for a dense product, best first, is taken (the first where
  // it proposes fewer): for measuring what the first leaves.
  int product_candidate = 0;
};

// The GPUs of this host, at least 1. Throws Error saying why there is none: this build has no plug-in, it
// cannot be loaded (which library is missing), there is no driver, or no device.
int cuda_device_count();

// Opens a device. Throws Error as above, or when the device, or a library or a kernel that the options insist
// on, cannot be used.
std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options);

// A rank of a group that NCCL connects.
struct NcclMember {
  int rank = 0, size = 1;
  std::array<char, 128> id = {};  // of the group: make_nccl_id on one rank, the same on all
};

// Throws Error when NCCL cannot be loaded.
std::array<char, 128> make_nccl_id();
// Collective over the group's ranks, each with its own device. The backend must be make_cuda_backend's and
// outlive what is returned.
std::unique_ptr<DeviceCollectives> make_nccl_collectives(const NcclMember& member, Backend& backend);

// What the plug-ins export: made by the same compiler from the same sources, which the version is to tell.
namespace cuda_plugin {
constexpr int kVersion = 5;  // of the interfaces that they implement; to be raised with every change
using Version = int();
using DeviceCount = int();
using MakeBackend = Backend*(const CudaOptions&);
using MakeNcclId = void(std::array<char, 128>*);
using MakeNcclCollectives = DeviceCollectives*(const NcclMember&, Backend&);
}  // namespace cuda_plugin

}  // namespace hybridmoe
