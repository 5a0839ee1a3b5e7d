// Host memory that the device reads while the host goes on: from ordinary memory the driver may first wait
// for all of a stream's work.
#pragma once

#include <array>
#include <cstddef>
#include <memory>

#include "library/cuda/driver.h"

namespace paretofuse {

// Two page-locked buffers, which copies take in turns. Made, used and freed in any context of the thread.
class Staging {
 public:
  Staging() = default;
  // Throws CudaError.
  Staging(std::shared_ptr<const CudaContext> context, std::size_t size);
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging();

  // Queues a copy to the device, in the current context. Waits until the copy before the last one is done:
  // then its buffer is free. Throws CudaError.
  void copy(DeviceAddress to, const void* from, std::size_t size, void* stream);

 private:
  struct Buffer {
    void* memory = nullptr;
    void* copied = nullptr;  // an event
    bool used = false;
  };

  void free_all() const;

  std::shared_ptr<const CudaContext> context_;
  std::array<Buffer, 2> buffers_;
  std::size_t next_ = 0;
};

}  // namespace paretofuse
