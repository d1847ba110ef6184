#include "core/cuda/cudnn_library.h"

#include <array>
#include <dlfcn.h>

namespace hybridmoe::cuda {
namespace {

constexpr const char* kFile = "libcudnn.so.9";
// Up to 9.15.0 attention over sequences whose length is no multiple of 128 needs a padding mask beside the
// causal one, which these graphs do not have.
constexpr std::size_t kOldest = 91501;

std::string name_of_version(std::size_t version) {
  return cat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

template <class Function>
void find(void* library, const char* name, Function*& function) {
  void* const found = dlsym(library, name);
  require(found != nullptr, "cuDNN cannot be used: ", kFile, " has no ", name, "; version ",
          name_of_version(kOldest), " or newer is needed");
  function = reinterpret_cast<Function*>(found);
}

}  // namespace

CudnnLibrary::CudnnLibrary() {
  void* const library = dlopen(kFile, RTLD_NOW | RTLD_LOCAL);
  const char* const reason = library == nullptr ? dlerror() : "";
  require(library != nullptr, "cuDNN cannot be loaded: ", reason, "; install cuDNN 9 and put its folder on ",
          "LD_LIBRARY_PATH");
  find(library, "cudnnGetVersion", get_version);
  require(get_version() >= kOldest, "cuDNN ", version(), " is too old: ", name_of_version(kOldest),
          " or newer is needed");
  find(library, "cudnnGetErrorString", error_string);
  find(library, "cudnnGetLastErrorString", last_error_string);
  find(library, "cudnnCreate", create);
  find(library, "cudnnDestroy", destroy);
  find(library, "cudnnSetStream", set_stream);
  find(library, "cudnnBackendCreateDescriptor", create_descriptor);
  find(library, "cudnnBackendDestroyDescriptor", destroy_descriptor);
  find(library, "cudnnBackendSetAttribute", set_attribute);
  find(library, "cudnnBackendGetAttribute", get_attribute);
  find(library, "cudnnBackendFinalize", finalize);
  find(library, "cudnnBackendExecute", execute);
}

const CudnnLibrary& CudnnLibrary::of_process() {
  static const CudnnLibrary library;
  return library;
}

std::string CudnnLibrary::version() const { return name_of_version(get_version()); }

std::string CudnnLibrary::reason_of(cudnnStatus_t status) const {
  std::array<char, 1024> text{};
  last_error_string(text.data(), text.size() - 1);
  return cat(error_string(status), text[0] == '\0' ? "" : ": ", text.data());
}

void CudnnLibrary::check(cudnnStatus_t status, const char* what) const {
  if (status != CUDNN_STATUS_SUCCESS) throw Error(cat("cuDNN: ", what, " failed: ", reason_of(status)));
}

CudnnDescriptor::CudnnDescriptor(const CudnnLibrary& library, cudnnBackendDescriptorType_t type)
    : library_(&library) {
  library.check(library.create_descriptor(type, &handle_), "creating a descriptor");
}

CudnnDescriptor::~CudnnDescriptor() {
  if (handle_ != nullptr) library_->destroy_descriptor(handle_);
}

void CudnnDescriptor::set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                          std::int64_t count, const void* values) {
  const cudnnStatus_t status = library_->set_attribute(handle_, name, type, count, values);
  if (status != CUDNN_STATUS_SUCCESS)
    throw Error(cat("cuDNN: setting attribute ", static_cast<int>(name),
                    " of a descriptor failed: ", library_->reason_of(status)));
}

void CudnnDescriptor::finalize(const char* what) { library_->check(try_finalize(), what); }

std::int64_t CudnnDescriptor::get(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                                  std::int64_t most, void* values) const {
  std::int64_t count = 0;
  const cudnnStatus_t status = library_->get_attribute(handle_, name, type, most, &count, values);
  if (status != CUDNN_STATUS_SUCCESS)
    throw Error(cat("cuDNN: asking for attribute ", static_cast<int>(name),
                    " of a descriptor failed: ", library_->reason_of(status)));
  return count;
}

std::int64_t CudnnDescriptor::number(cudnnBackendAttributeName_t name) const {
  std::int64_t value = 0;
  get(name, CUDNN_TYPE_INT64, 1, &value);
  return value;
}

}  // namespace hybridmoe::cuda
