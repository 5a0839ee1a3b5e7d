#include "library/cuda/staging.h"

#include <cstring>
#include <utility>

#include "paretofuse/cuda.h"

namespace paretofuse {
namespace {

constexpr unsigned kNoTiming = 2;  // CU_EVENT_DISABLE_TIMING

}  // namespace

Staging::Staging(std::shared_ptr<const CudaContext> context, std::size_t size)
    : context_(std::move(context)) {
  const CurrentContext current(*context_);
  const CudaDriver& driver = context_->driver();
  try {
    for (Buffer& buffer : buffers_) {
      driver.check(driver.cuMemAllocHost(&buffer.memory, size), "cuMemAllocHost");
      driver.check(driver.cuEventCreate(&buffer.copied, kNoTiming), "cuEventCreate");
    }
  } catch (const CudaError&) {
    free_all();
    throw;
  }
}

Staging::~Staging() {
  if (context_ == nullptr) return;
  try {
    const CurrentContext current(*context_);
    free_all();
  } catch (const CudaError&) {  // a device that is lost takes its memory with it
  }
}

void Staging::free_all() const {
  const CudaDriver& driver = context_->driver();
  for (const Buffer& buffer : buffers_) {
    if (buffer.copied != nullptr) driver.cuEventDestroy(buffer.copied);
    if (buffer.memory != nullptr) driver.cuMemFreeHost(buffer.memory);
  }
}

void Staging::copy(DeviceAddress to, const void* from, std::size_t size, void* stream) {
  const CudaDriver& driver = context_->driver();
  Buffer& buffer = buffers_[next_];
  if (buffer.used) driver.check(driver.cuEventSynchronize(buffer.copied), "cuEventSynchronize");
  std::memcpy(buffer.memory, from, size);
  driver.check(driver.cuMemcpyHtoDAsync(to, buffer.memory, size, stream), "cuMemcpyHtoDAsync");
  driver.check(driver.cuEventRecord(buffer.copied, stream), "cuEventRecord");
  buffer.used = true;
  next_ = (next_ + 1) % buffers_.size();
}

}  // namespace paretofuse
