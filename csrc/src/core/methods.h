// Merge methods over differences to a base: which elements are kept, and what is made of those. The plain
// definitions are in engine/methods/*.py; these give the same masks and, within rounding, the same numbers.
//
// All functions check their arguments (std::invalid_argument), and their results do not depend on the number
// of threads or the instruction set. Addresses are trusted. A mask has a bit for each element, the low ones
// first: bit i % 8 of byte i / 8.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "paretofuse/dtype.h"

namespace paretofuse {

// One tensor's numbers.
struct Numbers {
  const void* data;
  DType dtype;
};

// A model's tensor and the base's; elements are the differences.
struct Difference {
  Numbers model;
  Numbers base;
  std::int64_t length;
};

// Sums of magnitudes: of all elements, and of those that are kept.
struct Kept {
  double before;
  double after;
};

struct Run {
  int threads;
  const std::string& isa;
};

// Keeps `count` elements in the order of their magnitudes, the largest first, after leaving out the `first`
// ones. Equal magnitudes come in the order of their positions.
Kept keep_largest(const Difference& difference, std::int64_t first, std::int64_t count, std::uint8_t* mask,
                  const Run& run);

// The number of element i, from 0 to 2^24 - 1; see engine/methods/random.py.
struct Draw {
  std::uint32_t first;
  std::uint32_t second;
};

// Keeps every element whose number is below `threshold`.
Kept keep_drawn(const Difference& difference, const Draw& key, std::uint32_t threshold, std::uint8_t* mask,
                const Run& run);

// Keeps an element whose number is below 2^24 times (low + rise * rank / (columns - 1)), rounded; rank 0 is
// the smallest magnitude in its row of `columns` elements.
Kept keep_ranked(const Difference& difference, std::int64_t columns, const Draw& key, float low, float rise,
                 std::uint8_t* mask, const Run& run);

// One model of a merge. mask: null for all elements. scale: of the kept elements, before the weight.
struct Share {
  Numbers model;
  const std::uint8_t* mask;
  float scale;
  float weight;
};

// How differences are added up. elects: only those count whose sign is that of the weighted sum, which is
// positive at 0. normalizes: the sum is divided by the weights of those that count.
struct Rule {
  bool elects;
  bool normalizes;
  float lambda;
};

// out = base + lambda * sum over shares of weight * scale * difference / divisor.
void merge_differences(const Numbers& base, const std::vector<Share>& shares, const Rule& rule,
                       std::int64_t length, void* out, DType out_dtype, const Run& run);

// Inner products of the models' rows with each other, float64 [length / columns, K, K]. base: of the
// differences to it; data null for the models themselves.
void products(const Numbers& base, const std::vector<Numbers>& models, std::int64_t length,
              std::int64_t columns, double* result, const Run& run);

}  // namespace paretofuse
