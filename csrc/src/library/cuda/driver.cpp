#include "library/cuda/driver.h"

#include <dlfcn.h>

#include "paretofuse/cuda.h"

namespace paretofuse {
namespace {

// CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
constexpr int kMajor = 75, kMinor = 76;

constexpr std::int64_t kMaxGrid = 0x7fffffff;

void* open_library(const std::string& path) {
  void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = ::dlerror();
    throw CudaError("the CUDA driver cannot be loaded (" + std::string(why == nullptr ? path : why) +
                    "); install NVIDIA's driver, or merge on the CPU");
  }
  return library;
}

}  // namespace

template <class Function>
void CudaDriver::resolve(Function& function, const char* name) {
  void* symbol = ::dlsym(library_, name);
  if (symbol == nullptr) {
    throw CudaError(path_ + " has no function " + name + "; install a newer NVIDIA driver");
  }
  function = reinterpret_cast<Function>(symbol);
}

CudaDriver::CudaDriver(const std::string& path) : path_(path), library_(open_library(path)) {
  // _v2: the 64-bit forms, which the headers of CUDA give these names.
  resolve(cuInit, "cuInit");
  resolve(cuDeviceGet, "cuDeviceGet");
  resolve(cuDeviceGetAttribute, "cuDeviceGetAttribute");
  resolve(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  resolve(cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2");
  resolve(cuCtxPushCurrent, "cuCtxPushCurrent_v2");
  resolve(cuCtxPopCurrent, "cuCtxPopCurrent_v2");
  resolve(cuCtxSynchronize, "cuCtxSynchronize");
  resolve(cuModuleLoad, "cuModuleLoad");
  resolve(cuModuleUnload, "cuModuleUnload");
  resolve(cuModuleGetFunction, "cuModuleGetFunction");
  resolve(cuMemAlloc, "cuMemAlloc_v2");
  resolve(cuMemFree, "cuMemFree_v2");
  resolve(cuMemAllocHost, "cuMemAllocHost_v2");
  resolve(cuMemFreeHost, "cuMemFreeHost");
  resolve(cuEventCreate, "cuEventCreate");
  resolve(cuEventDestroy, "cuEventDestroy_v2");
  resolve(cuEventRecord, "cuEventRecord");
  resolve(cuEventSynchronize, "cuEventSynchronize");
  resolve(cuMemsetD8, "cuMemsetD8_v2");
  resolve(cuMemcpyHtoD, "cuMemcpyHtoD_v2");
  resolve(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2");
  resolve(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2");
  resolve(cuStreamIsCapturing, "cuStreamIsCapturing");
  resolve(cuStreamSynchronize, "cuStreamSynchronize");
  resolve(cuLaunchKernel, "cuLaunchKernel");
  resolve(cuGetErrorName, "cuGetErrorName");
  resolve(cuGetErrorString, "cuGetErrorString");
}

void CudaDriver::check(int result, const char* function) const {
  if (result == 0) return;
  const char *name = nullptr, *text = nullptr;
  if (cuGetErrorName(result, &name) != 0 || name == nullptr) name = "unknown error";
  if (cuGetErrorString(result, &text) != 0 || text == nullptr) text = "the driver does not know it";
  throw CudaError(std::string(function) + " failed: " + name + " (" + std::to_string(result) + "), " + text);
}

CudaContext::CudaContext(const std::string& driver, int device) : driver_(driver) {
  driver_.check(driver_.cuInit(0), "cuInit");
  driver_.check(driver_.cuDeviceGet(&device_, device), "cuDeviceGet");
  int major = 0, minor = 0;
  driver_.check(driver_.cuDeviceGetAttribute(&major, kMajor, device_), "cuDeviceGetAttribute");
  driver_.check(driver_.cuDeviceGetAttribute(&minor, kMinor, device_), "cuDeviceGetAttribute");
  architecture_ = 10 * major + minor;
  driver_.check(driver_.cuDevicePrimaryCtxRetain(&handle_, device_), "cuDevicePrimaryCtxRetain");
}

CudaContext::~CudaContext() { driver_.cuDevicePrimaryCtxRelease(device_); }

CurrentContext::CurrentContext(const CudaContext& context) : driver_(context.driver_) {
  driver_.check(driver_.cuCtxPushCurrent(context.handle_), "cuCtxPushCurrent");
}

CurrentContext::~CurrentContext() {
  void* popped = nullptr;
  driver_.cuCtxPopCurrent(&popped);
}

DeviceMemory::DeviceMemory(std::shared_ptr<const CudaContext> context, std::size_t size)
    : context_(std::move(context)), size_(size) {
  if (size_ == 0) return;
  const CurrentContext current(*context_);
  const CudaDriver& driver = context_->driver();
  driver.check(driver.cuMemAlloc(&address_, size_), "cuMemAlloc");
}

void DeviceMemory::give_back() {
  if (address_ == 0) return;
  const CurrentContext current(*context_);
  const CudaDriver& driver = context_->driver();
  driver.check(driver.cuMemFree(std::exchange(address_, 0)), "cuMemFree");
}

void DeviceMemory::zero() {
  if (size_ == 0) return;
  const CudaDriver& driver = context_->driver();
  driver.check(driver.cuMemsetD8(address_, 0, size_), "cuMemsetD8");
}

void DeviceMemory::write(std::size_t offset, const void* from, std::size_t size) {
  if (size == 0) return;
  const CudaDriver& driver = context_->driver();
  driver.check(driver.cuMemcpyHtoD(address_ + offset, from, size), "cuMemcpyHtoD");
}

DeviceMemory::~DeviceMemory() {
  try {
    give_back();
  } catch (const CudaError&) {  // a device that is lost takes its memory with it
  }
}

void DeviceMemory::swap(DeviceMemory& other) noexcept {
  std::swap(context_, other.context_);
  std::swap(address_, other.address_);
  std::swap(size_, other.size_);
}

CudaFunction::CudaFunction(std::shared_ptr<const CudaContext> context, const KernelCode& code)
    : context_(std::move(context)), code_(code) {
  const CurrentContext current(*context_);
  const CudaDriver& driver = context_->driver();
  driver.check(driver.cuModuleLoad(&module_, code.file.c_str()), ("cuModuleLoad of " + code.file).c_str());
  const int found = driver.cuModuleGetFunction(&function_, module_, code.symbol.c_str());
  if (found == 0) return;
  driver.cuModuleUnload(module_);
  driver.check(found, ("cuModuleGetFunction of " + code.symbol + " in " + code.file).c_str());
}

void CudaFunction::launch(std::int64_t blocks, void* stream, void** arguments) const {
  if (blocks > kMaxGrid) throw CudaError("the model is too large for one launch");
  const CudaDriver& driver = context_->driver();
  driver.check(driver.cuLaunchKernel(function_, static_cast<unsigned>(blocks), 1, 1, code_.threads, 1, 1,
                                     code_.shared_bytes, stream, arguments, nullptr),
               "cuLaunchKernel");
}

CudaFunction::~CudaFunction() {
  try {
    const CurrentContext current(*context_);
    context_->driver().cuModuleUnload(module_);
  } catch (const CudaError&) {  // as above
  }
}

}  // namespace paretofuse
