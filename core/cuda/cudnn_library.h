// cuDNN's graph interface (its C "backend" interface), loaded at run time: the plug-in also starts where the
// library is missing.
#pragma once

#include <cstdint>
#include <cudnn_backend.h>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"

namespace hybridmoe::cuda {

// The functions that are used of it, by their names in the library.
class CudnnLibrary {
 public:
  // Loaded once for a process and never closed. Throws Error saying what is missing, or that it is too old.
  static const CudnnLibrary& of_process();

  std::string version() const;  // "9.19.0"
  // Throws Error with cuDNN's own words when a call failed.
  void check(cudnnStatus_t status, const char* what) const;
  std::string reason_of(cudnnStatus_t status) const;

  decltype(&cudnnGetVersion) get_version = nullptr;
  decltype(&cudnnGetErrorString) error_string = nullptr;
  decltype(&cudnnGetLastErrorString) last_error_string = nullptr;
  decltype(&cudnnCreate) create = nullptr;
  decltype(&cudnnDestroy) destroy = nullptr;
  decltype(&cudnnSetStream) set_stream = nullptr;
  decltype(&cudnnBackendCreateDescriptor) create_descriptor = nullptr;
  decltype(&cudnnBackendDestroyDescriptor) destroy_descriptor = nullptr;
  decltype(&cudnnBackendSetAttribute) set_attribute = nullptr;
  decltype(&cudnnBackendGetAttribute) get_attribute = nullptr;
  decltype(&cudnnBackendFinalize) finalize = nullptr;
  decltype(&cudnnBackendExecute) execute = nullptr;

 private:
  CudnnLibrary();
};

// One descriptor: attributes are set, then it is finalized, then it can be used by others.
class CudnnDescriptor {
 public:
  CudnnDescriptor(const CudnnLibrary& library, cudnnBackendDescriptorType_t type);
  ~CudnnDescriptor();
  CudnnDescriptor(CudnnDescriptor&& other) noexcept
      : library_(other.library_), handle_(std::exchange(other.handle_, nullptr)) {}
  CudnnDescriptor& operator=(CudnnDescriptor&& other) noexcept {
    std::swap(library_, other.library_);
    std::swap(handle_, other.handle_);
    return *this;
  }

  cudnnBackendDescriptor_t handle() const { return handle_; }

  // `count` values of the C type that cuDNN documents for `type`. Throws Error when they are refused.
  void set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, std::int64_t count,
           const void* values);
  template <class T>
  void set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, const T& value) {
    set(name, type, 1, &value);
  }
  void set(cudnnBackendAttributeName_t name, cudnnBackendDescriptor_t other) {
    set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &other);
  }
  // Throws Error naming `what` when cuDNN refuses the whole.
  void finalize(const char* what);
  cudnnStatus_t try_finalize() { return library_->finalize(handle_); }

  std::int64_t number(cudnnBackendAttributeName_t name) const;  // of type CUDNN_TYPE_INT64
  // Up to `most` values; descriptors among them must have been created by the caller. How many there are.
  std::int64_t get(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, std::int64_t most,
                   void* values) const;

 private:
  const CudnnLibrary* library_;
  cudnnBackendDescriptor_t handle_ = nullptr;
};

}  // namespace hybridmoe::cuda
