// A folder of merge kernels, as `python -m paretofuse.kernels.aot` writes it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "paretofuse/dtype.h"
#include "paretofuse/merge.h"

namespace paretofuse {

inline constexpr std::int64_t kTile = 1024;  // elements of a flat buffer that belong to one group
inline constexpr std::int64_t kInt8Groups[] = {1024, 32};  // elements of a scale: what pf.stack gives them
inline constexpr std::int64_t kInt4Groups[] = {32};
inline constexpr std::int64_t kSharedRow = 128;  // divides the rows of the kernels that share coefficients
inline constexpr std::int64_t kAlignedColumns = 16;           // divides the columns of a matrix of low rank
inline constexpr std::int64_t kMatrixFields = 12;             // of each in the table that the kernel reads
inline constexpr std::int64_t kTileOuts = 64, kTileIns = 64;  // the tile of a matrix of low rank
inline constexpr std::int64_t kRanks = 16;                    // multiplied at a time

// A kernel's machine code, and how it is launched.
struct KernelCode {
  std::string file;
  std::string symbol;
  unsigned threads;
  unsigned shared_bytes;
};

// Whether a kernel reads coefficients of the tensors' own rows, and for how many elements at a time.
enum class RowCoefficients { none, shared, any };

// What a merge in flat buffers needs of its kernel; floats and quantized numbers by Triton's names of them.
struct MergeUse {
  std::string base;
  std::string deltas;
  std::string out;
  std::int64_t group;  // of quantized deltas, elements; else 0
  RowCoefficients rows;

  bool operator==(const MergeUse& other) const {
    return base == other.base && deltas == other.deltas && out == other.out && group == other.group &&
           rows == other.rows;
  }
};

// A kernel that merges flat buffers (kernels/routed_merge.py).
struct MergeKernel {
  KernelCode code;
  MergeUse use;
  std::int64_t block;    // elements that one thread block merges
  std::int64_t experts;  // whose loads are in flight together
  bool any;              // whether it loops over more experts than that
};

// A kernel that merges matrices of low-rank planes (kernels/lowrank_merge.py), whose factors are float32.
struct LowRankKernel {
  KernelCode code;
  std::string dtype;  // of base and output
  bool by_row;        // whether it reads coefficients of the rows
  std::string dense;  // of dense planes beside those of low rank; empty: it reads none
};

struct MergeKernels {
  std::string folder;
  int architecture;  // 90: sm_90
  std::vector<MergeKernel> merges;
  std::vector<LowRankKernel> low_rank;

  // The kernel for such a merge of that many experts, by the rule of kernels/launch.py: the smallest that
  // holds all experts, else the one that loops. Throws CudaError if the folder has none.
  const MergeKernel& choose(const MergeUse& use, std::int64_t experts) const;
  const LowRankKernel& choose_low_rank(const std::string& dtype, bool by_row, const std::string& dense) const;
};

// Triton's name of a type of numbers: of floats, or of planes of a format.
std::string triton_name(DType dtype);
std::string triton_name(Format format, DType dtype);

// Reads a folder's manifest, ignoring kernels for other purposes. Throws CudaError if it is damaged, of
// another format, for another kind of GPU, or if a kernel does not take the arguments that we would give it.
MergeKernels read_kernels(const std::string& folder);

}  // namespace paretofuse
