// Flat device buffers of a model: which tensor lies where, and how its planes lie there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "library/cuda/kernels.h"
#include "paretofuse/dtype.h"
#include "store/store.h"
#include "store/weight_rows.h"

namespace paretofuse {

// Tensors that one launch merges, in flat buffers. Each starts on a tile, so that a tile belongs to one row
// of the weights. The same layout as engine/merging/flat.py.
struct Bucket {
  Role role;
  DType dtype;
  DType delta_dtype;
  Format format;                      // of all planes in here; dense ones may lie beside those of low rank
  std::int64_t group;                 // of quantized ones, elements; else 0
  bool shares;                        // whether kSharedRow divides the rows of each tensor
  std::vector<std::size_t> tensors;   // positions in the manifest
  std::vector<std::int64_t> offsets;  // in elements
  std::vector<std::int64_t> lengths;
  std::vector<std::int32_t> rows;  // of the weights, for each tile

  std::int64_t length() const;  // elements, in whole tiles
};

// The buckets of all routed and static tensors, in the order of their first tensors. Planes that no kernel
// reads as they are, of unusual groups or shapes or of several formats (but dense beside low rank), are to be
// decoded: those are dense.
std::vector<Bucket> make_buckets(const Store& store, const WeightRows& rows);

}  // namespace paretofuse
