// The CUDA driver, loaded at run time, and what it lends: contexts, memory, modules.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "library/cuda/kernels.h"

namespace paretofuse {

using DeviceAddress = std::uint64_t;

// The driver's functions that we use, by the names and signatures of its documented binary interface.
class CudaDriver {
 public:
  // Throws CudaError. The library stays loaded: the driver's threads may outlive us.
  explicit CudaDriver(const std::string& path);

  // Throws CudaError unless a call returned 0.
  void check(int result, const char* function) const;

  int (*cuInit)(unsigned flags);
  int (*cuDeviceGet)(int* device, int ordinal);
  int (*cuDeviceGetAttribute)(int* value, int attribute, int device);
  int (*cuDevicePrimaryCtxRetain)(void** context, int device);
  int (*cuDevicePrimaryCtxRelease)(int device);
  int (*cuCtxPushCurrent)(void* context);
  int (*cuCtxPopCurrent)(void** context);
  int (*cuCtxSynchronize)();
  int (*cuModuleLoad)(void** module, const char* path);
  int (*cuModuleUnload)(void* module);
  int (*cuModuleGetFunction)(void** function, void* module, const char* name);
  int (*cuMemAlloc)(DeviceAddress* address, std::size_t size);
  int (*cuMemFree)(DeviceAddress address);
  int (*cuMemAllocHost)(void** memory, std::size_t size);
  int (*cuMemFreeHost)(void* memory);
  int (*cuEventCreate)(void** event, unsigned flags);
  int (*cuEventDestroy)(void* event);
  int (*cuEventRecord)(void* event, void* stream);
  int (*cuEventSynchronize)(void* event);
  int (*cuMemsetD8)(DeviceAddress address, unsigned char value, std::size_t size);
  int (*cuMemcpyHtoD)(DeviceAddress to, const void* from, std::size_t size);
  int (*cuMemcpyHtoDAsync)(DeviceAddress to, const void* from, std::size_t size, void* stream);
  int (*cuMemcpyDtoHAsync)(void* to, DeviceAddress from, std::size_t size, void* stream);
  int (*cuStreamIsCapturing)(void* stream, int* status);
  int (*cuStreamSynchronize)(void* stream);
  int (*cuLaunchKernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream,
                        void** arguments, void** extra);
  int (*cuGetErrorName)(int result, const char** name);
  int (*cuGetErrorString)(int result, const char** text);

 private:
  template <class Function>
  void resolve(Function& function, const char* name);

  std::string path_;
  void* library_;
};

// The primary context of a device, retained.
class CudaContext {
 public:
  CudaContext(const std::string& driver, int device);
  CudaContext(const CudaContext&) = delete;
  ~CudaContext();

  const CudaDriver& driver() const { return driver_; }
  // The device's compute capability, times ten: 90 for sm_90.
  int architecture() const { return architecture_; }

 private:
  friend class CurrentContext;
  CudaDriver driver_;
  int device_ = 0;
  int architecture_ = 0;
  void* handle_ = nullptr;
};

// Makes a context the calling thread's current one as long as this lives.
class CurrentContext {
 public:
  explicit CurrentContext(const CudaContext& context);
  CurrentContext(const CurrentContext&) = delete;
  ~CurrentContext();

 private:
  const CudaDriver& driver_;
};

// Device memory, not initialized.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(std::shared_ptr<const CudaContext> context, std::size_t size);
  DeviceMemory(DeviceMemory&& other) noexcept { swap(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    DeviceMemory(std::move(other)).swap(*this);
    return *this;
  }
  ~DeviceMemory();

  // Frees it now. Throws CudaError.
  void give_back();

  // In the current context, waiting for no stream. Throw CudaError.
  void zero();
  void write(std::size_t offset, const void* from, std::size_t size);

  DeviceAddress address() const { return address_; }
  std::size_t size() const { return size_; }

 private:
  void swap(DeviceMemory& other) noexcept;

  std::shared_ptr<const CudaContext> context_;
  DeviceAddress address_ = 0;
  std::size_t size_ = 0;
};

// Device memory that holds what a vector holds.
template <class T>
DeviceMemory on_device(std::shared_ptr<const CudaContext> context, const std::vector<T>& values) {
  DeviceMemory memory(std::move(context), values.size() * sizeof(T));
  memory.write(0, values.data(), memory.size());
  return memory;
}

// A kernel, with the module that it was loaded from.
class CudaFunction {
 public:
  CudaFunction(std::shared_ptr<const CudaContext> context, const KernelCode& code);
  CudaFunction(const CudaFunction&) = delete;
  ~CudaFunction();

  // Queues so many thread blocks in the current context; the driver copies the arguments before it returns.
  void launch(std::int64_t blocks, void* stream, void** arguments) const;

 private:
  std::shared_ptr<const CudaContext> context_;
  KernelCode code_;
  void* module_ = nullptr;
  void* function_ = nullptr;
};

}  // namespace paretofuse
