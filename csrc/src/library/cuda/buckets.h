// Flat device buffers of a model: which tensor lies where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "paretofuse/dtype.h"
#include "store/manifest.h"

namespace paretofuse {

// Tensors of one role and one pair of dtypes, in one flat buffer. Each starts on a tile, so that a tile
// belongs to one row of the weights. The same layout as engine/merging/flat.py.
struct Bucket {
  Role role;
  DType dtype;
  DType delta_dtype;
  std::vector<std::size_t> tensors;   // positions in the manifest
  std::vector<std::int64_t> offsets;  // in elements
  std::vector<std::int32_t> rows;     // of the weights, for each tile

  std::int64_t length() const;  // elements, in whole tiles
};

// The buckets of all routed and static tensors, in the order of their first tensors. Static tensors take the
// row after the last group's.
std::vector<Bucket> make_buckets(const Manifest& manifest);

}  // namespace paretofuse
