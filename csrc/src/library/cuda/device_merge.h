// One bucket of a model on the device: its base, and what it is merged to. How its planes lie there, and
// which kernel merges them, is what the classes below it say.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "library/cuda/buckets.h"
#include "library/cuda/driver.h"
#include "library/cuda/kernels.h"
#include "library/model.h"

namespace paretofuse {

// What a bucket is made from.
struct Source {
  std::shared_ptr<const CudaContext> context;
  const MergeKernels& kernels;
  const Model& model;
};

class DeviceMerge {
 public:
  // Copies the base in the current context. Throws CudaError.
  DeviceMerge(const Source& source, Bucket bucket);
  DeviceMerge(const DeviceMerge&) = delete;
  virtual ~DeviceMerge() = default;

  const Bucket& bucket() const { return bucket_; }
  // Where tensor i of the bucket is merged to.
  DeviceAddress output(std::size_t i) const {
    return out_.address() + bytes(bucket_.offsets[i], bucket_.dtype);
  }

  // Queues the merge at weights float32 [1 + groups, planes]. by_row, of routed tensors only: the rows' own
  // coefficients [rows, planes] lie behind them and are read.
  virtual void launch(DeviceAddress weights, bool by_row, void* stream) const = 0;

  // Gives back all but the output.
  virtual void keep_output() { base_.give_back(); }

 protected:
  static std::size_t bytes(std::int64_t count, DType dtype) {
    return static_cast<std::size_t>(count * item_size(dtype));
  }

  Bucket bucket_;
  DeviceMemory base_;  // [length]
  DeviceMemory out_;   // [length]
  std::int32_t planes_;
  std::int32_t rows_;  // of the weights, without the tensors' own
};

// Planes in flat buffers, as floats or quantized, merged by kernels/routed_merge.py.
std::unique_ptr<DeviceMerge> flat_merge(const Source& source, Bucket bucket);

// Matrices with planes of low rank, dense ones beside them or not, merged by kernels/lowrank_merge.py.
std::unique_ptr<DeviceMerge> low_rank_merge(const Source& source, Bucket bucket);

}  // namespace paretofuse
