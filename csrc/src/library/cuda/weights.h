// What CudaWeights holds.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "library/cuda/buckets.h"
#include "library/cuda/driver.h"
#include "library/cuda/kernels.h"
#include "library/model.h"
#include "paretofuse/cuda.h"

namespace paretofuse {

// Where a bucket lies on the device, and the kernel that merges it.
struct DeviceBucket {
  Bucket bucket;
  const MergeKernel* kernel;
  std::unique_ptr<CudaFunction> function;
  DeviceMemory base;    // [length]
  DeviceMemory deltas;  // [experts, length]
  DeviceMemory tiles;   // int32 [length / kTile]
  DeviceMemory out;     // [length]
};

struct CudaWeights::State {
  State(std::shared_ptr<const Model> opened, const CudaOptions& options);
  ~State();

  void merge(const Weights& weights, void* stream);
  void read(std::string_view name, void* data, std::int64_t nbytes, void* stream) const;

  std::shared_ptr<const Model> model;
  std::shared_ptr<const CudaContext> context;
  MergeKernels kernels;
  DeviceMemory weights;  // float [groups + 1, planes]
  DeviceMemory constants;
  std::vector<DeviceBucket> buckets;
  std::vector<TensorView> views;  // in the manifest's order

 private:
  void fill(DeviceBucket& device);
  void copy(DeviceAddress to, const void* from, std::int64_t nbytes);
  void place_constants();
  void merge_statics();
  void launch(const DeviceBucket& device, void* stream) const;
};

}  // namespace paretofuse
