// A folder of merge kernels, as `python -m paretofuse.kernels.aot` writes it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "paretofuse/dtype.h"

namespace paretofuse {

inline constexpr std::int64_t kTile = 1024;  // elements of a flat buffer that belong to one group

// A kernel that merges deltas of a floating-point type.
struct MergeKernel {
  std::string file;
  std::string symbol;
  DType base;
  DType delta;
  DType out;
  std::int64_t block;    // elements that one thread block merges
  std::int64_t experts;  // whose loads are in flight together
  bool any;              // whether it loops over more experts than that
  unsigned threads;
  unsigned shared_bytes;
};

struct MergeKernels {
  std::string folder;
  int architecture;  // 90: sm_90
  std::vector<MergeKernel> kernels;

  // The kernel for these dtypes and that many experts, by the rule of kernels/launch.py: the smallest that
  // holds all experts, else the one that loops. Throws CudaError if the folder has none.
  const MergeKernel& choose(DType base, DType delta, DType out, std::int64_t experts) const;
};

// Reads a folder's manifest, ignoring kernels for other purposes. Throws CudaError if it is damaged, of
// another format, for another kind of GPU, or if a kernel does not take the arguments that we would give it.
MergeKernels read_kernels(const std::string& folder);

}  // namespace paretofuse
