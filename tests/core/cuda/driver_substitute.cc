// What cuDNN asks a driver for while it makes a plan, under the driver's name (libcuda.so.1): kernels load,
// everything else fails as it does with the toolkit's own stub. With it plans can be made, and not run, on a
// machine without a driver (attention_graph_test.cc).
namespace {

constexpr int kSuccess = 0, kStubLibrary = 34;
long something = 0;

}  // namespace

extern "C" {

int cuLibraryLoadData(void** library) {
  *library = &something;
  return kSuccess;
}
int cuLibraryGetKernel(void** kernel) {
  *kernel = &something;
  return kSuccess;
}
int cuLibraryUnload() { return kSuccess; }
int cuKernelSetAttribute() { return kSuccess; }

#define HYBRIDMOE_FAILS(name) \
  int name() { return kStubLibrary; }
HYBRIDMOE_FAILS(cuCtxGetCurrent)
HYBRIDMOE_FAILS(cuCtxGetDevice)
HYBRIDMOE_FAILS(cuCtxGetLimit)
HYBRIDMOE_FAILS(cuCtxPopCurrent)
HYBRIDMOE_FAILS(cuCtxPushCurrent)
HYBRIDMOE_FAILS(cuDeviceGet)
HYBRIDMOE_FAILS(cuDeviceGetAttribute)
HYBRIDMOE_FAILS(cuDeviceGetCount)
HYBRIDMOE_FAILS(cuDevicePrimaryCtxRelease)
HYBRIDMOE_FAILS(cuDevicePrimaryCtxReset)
HYBRIDMOE_FAILS(cuDevicePrimaryCtxRetain)
HYBRIDMOE_FAILS(cuDriverGetVersion)
HYBRIDMOE_FAILS(cuFuncGetAttribute)
HYBRIDMOE_FAILS(cuFuncSetAttribute)
HYBRIDMOE_FAILS(cuGetErrorName)
HYBRIDMOE_FAILS(cuGetErrorString)
HYBRIDMOE_FAILS(cuInit)
HYBRIDMOE_FAILS(cuKernelGetAttribute)
HYBRIDMOE_FAILS(cuLaunchCooperativeKernel)
HYBRIDMOE_FAILS(cuLaunchKernel)
HYBRIDMOE_FAILS(cuLaunchKernelEx)
HYBRIDMOE_FAILS(cuLibraryLoadFromFile)
HYBRIDMOE_FAILS(cuLinkAddData)
HYBRIDMOE_FAILS(cuLinkAddData_v2)
HYBRIDMOE_FAILS(cuLinkAddFile_v2)
HYBRIDMOE_FAILS(cuLinkComplete)
HYBRIDMOE_FAILS(cuLinkCreate)
HYBRIDMOE_FAILS(cuLinkCreate_v2)
HYBRIDMOE_FAILS(cuLinkDestroy)
HYBRIDMOE_FAILS(cuMemcpyDtoH_v2)
HYBRIDMOE_FAILS(cuModuleGetFunction)
HYBRIDMOE_FAILS(cuModuleGetGlobal_v2)
HYBRIDMOE_FAILS(cuModuleLoadData)
HYBRIDMOE_FAILS(cuModuleLoadDataEx)
HYBRIDMOE_FAILS(cuModuleLoadFatBinary)
HYBRIDMOE_FAILS(cuModuleUnload)
HYBRIDMOE_FAILS(cuOccupancyMaxActiveBlocksPerMultiprocessor)
HYBRIDMOE_FAILS(cuOccupancyMaxPotentialClusterSize)
HYBRIDMOE_FAILS(cuStreamGetCtx)
HYBRIDMOE_FAILS(cuStreamSynchronize)
HYBRIDMOE_FAILS(cuTensorMapEncodeTiled)
#undef HYBRIDMOE_FAILS
}
