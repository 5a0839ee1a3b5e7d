// What CudaWeights holds.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "library/cuda/device_merge.h"
#include "library/cuda/driver.h"
#include "library/cuda/kernels.h"
#include "library/cuda/staging.h"
#include "library/model.h"
#include "paretofuse/cuda.h"

namespace paretofuse {

struct CudaWeights::State {
  State(std::shared_ptr<const Model> opened, const CudaOptions& options);
  ~State();

  void merge(const Weights& weights, void* stream);
  void read(std::string_view name, void* data, std::int64_t nbytes, void* stream) const;

  std::shared_ptr<const Model> model;
  std::shared_ptr<const CudaContext> context;
  MergeKernels kernels;
  // float [groups + 1, planes], then the tensors' own rows [rows, planes]: see WeightRows::all
  DeviceMemory weights;
  std::unique_ptr<Staging> staging;  // of the weights
  DeviceMemory constants;
  std::vector<std::unique_ptr<DeviceMerge>> merges;
  std::vector<TensorView> views;  // in the manifest's order

 private:
  void place_merged();
  void place_constants();
  void merge_statics();
};

}  // namespace paretofuse
