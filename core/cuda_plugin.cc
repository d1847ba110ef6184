#include "core/cuda_plugin.h"

#include <cstdlib>
#include <dlfcn.h>
#include <filesystem>
#include <string>

namespace hybridmoe {
namespace {

namespace fs = std::filesystem;

// A plug-in beside the program, or in the folder that HYBRIDMOE_PLUGINS names. Never closed: its threads and
// its device live as long as the process.
class Plugin {
 public:
  Plugin(const std::string& what, const std::string& file, const char* version_function) : what_(what) {
    std::error_code ignored;
    const char* folder = std::getenv("HYBRIDMOE_PLUGINS");
    path_ = folder != nullptr && *folder != '\0' ? fs::path(folder)
                                                 : fs::read_symlink("/proc/self/exe", ignored).parent_path();
    path_ /= file;
    require(fs::exists(path_), "no ", what, ": this build has no plug-in", folder != nullptr ? " in " : "",
            folder != nullptr ? folder : "");
    handle_ = dlopen(path_.c_str(), RTLD_NOW | RTLD_LOCAL);
    require(handle_ != nullptr, "no ", what, ": the plug-in cannot be loaded: ", dlerror());
    const int version = exported<cuda_plugin::Version>(version_function)();
    require(version == cuda_plugin::kVersion, "no ", what, ": ", path_.string(), " is of version ", version,
            ", this program of ", int{cuda_plugin::kVersion}, "; build both together");
  }

  template <class Function>
  Function* exported(const char* name) const {
    void* const found = dlsym(handle_, name);
    require(found != nullptr, "no ", what_, ": ", path_.string(), " has no ", name,
            "; build it with this program");
    return reinterpret_cast<Function*>(found);
  }

 private:
  std::string what_;
  fs::path path_;
  void* handle_ = nullptr;
};

const Plugin& cuda() {
  static const Plugin plugin("CUDA", "libhybridmoe_cuda.so", "hybridmoe_cuda_version");
  return plugin;
}
const Plugin& nccl() {
  static const Plugin plugin("NCCL", "libhybridmoe_nccl.so", "hybridmoe_nccl_version");
  return plugin;
}

}  // namespace

int cuda_device_count() { return cuda().exported<cuda_plugin::DeviceCount>("hybridmoe_cuda_device_count")(); }

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options) {
  return std::unique_ptr<Backend>(
      cuda().exported<cuda_plugin::MakeBackend>("hybridmoe_make_cuda_backend")(options));
}

std::array<char, 128> make_nccl_id() {
  std::array<char, 128> id;
  nccl().exported<cuda_plugin::MakeNcclId>("hybridmoe_nccl_make_id")(&id);
  return id;
}

std::unique_ptr<DeviceCollectives> make_nccl_collectives(const NcclMember& member, Backend& backend) {
  return std::unique_ptr<DeviceCollectives>(
      nccl().exported<cuda_plugin::MakeNcclCollectives>("hybridmoe_make_nccl_collectives")(member, backend));
}

}  // namespace hybridmoe
