#include "core/cuda_plugin.h"

#include <cstdlib>
#include <dlfcn.h>
#include <filesystem>
#include <string>

namespace hybridmoe {
namespace {

namespace fs = std::filesystem;

std::string plugin_path() {
  if (const char* given = std::getenv("HYBRIDMOE_CUDA_PLUGIN"); given != nullptr && *given != '\0')
    return given;
  std::error_code ignored;
  return fs::read_symlink("/proc/self/exe", ignored).parent_path() / cuda_plugin::kFile;
}

// Never closed: its threads and its device live as long as the process.
void* plugin() {
  static void* const handle = [] {
    const std::string path = plugin_path();
    require(fs::exists(path), "no CUDA: this build has no plug-in (", path, ")");
    void* loaded = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    require(loaded != nullptr, "no CUDA: the plug-in cannot be loaded: ", dlerror());
    return loaded;
  }();
  return handle;
}

template <class Function>
Function* exported(const char* name) {
  void* const found = dlsym(plugin(), name);
  require(found != nullptr, "no CUDA: ", plugin_path(), " has no ", name, "; build it with this program");
  return reinterpret_cast<Function*>(found);
}

void require_version() {
  const int version = exported<cuda_plugin::Version>("hybridmoe_cuda_version")();
  require(version == cuda_plugin::kVersion, "no CUDA: ", plugin_path(), " is of version ", version,
          ", this program of ", int{cuda_plugin::kVersion}, "; build both together");
}

}  // namespace

int cuda_device_count() {
  require_version();
  return exported<cuda_plugin::DeviceCount>("hybridmoe_cuda_device_count")();
}

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options) {
  require_version();
  return std::unique_ptr<Backend>(exported<cuda_plugin::MakeBackend>("hybridmoe_make_cuda_backend")(options));
}

}  // namespace hybridmoe
