// The table of inner loops that each instruction set fills in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "paretofuse/dtype.h"

// Of what stands in the inner loops: a call would put the sums into memory.
#define PARETOFUSE_INLINE inline __attribute__((always_inline))

namespace paretofuse {

// Elements that a kernel handles at a time: a multiple of every vector width, and one cache line of 16-bit
// elements.
inline constexpr std::int64_t kStep = 32;

// How the numbers of a plane lie in memory. The floats come first, as in DType.
enum class Kind : std::uint8_t { F32 = 0, BF16 = 1, F16 = 2, Int8 = 3, Int4 = 4, Mixed = 5 };

inline constexpr int kKinds = 5;  // of one plane; Mixed says that the planes of a merge differ

// A plane with a number for each element of its tensor: values[i], or values[i] * scales[i >> shift] where it
// is quantized. Int4: two to a byte, the low half first, each 8 more than its value.
struct Term {
  const std::byte* values;
  const std::byte* scales;  // float32, one for each 2^shift >= kStep elements
  int shift;
  Kind kind;
};

// Low-rank planes side by side: sum over r < rank of left[row * rank + r] * right[r * stride + column].
struct LowRank {
  const float* left;   // [rows, rank], weights folded in
  const float* right;  // [rank, stride]
  std::int64_t rank;
  std::int64_t stride;
};

// Elements begin + row * columns + i of a tensor, row < rows and i < width.
struct Tile {
  std::int64_t begin;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t width;
};

// out[i] = round(base[i] + sum over t < count of weights[t] * terms[t][i]) for begin <= i < begin + length.
// The scale of a quantized term is multiplied into its weight first.
using MergeFn = void (*)(const std::byte* base, const Term* terms, const float* weights, std::int64_t count,
                         std::int64_t begin, std::int64_t length, std::byte* out);

// The same over a tile, with weights [rows, count], and with low-rank planes added last, rank by rank.
using MergeTileFn = void (*)(const std::byte* base, const Term* terms, const float* weights,
                             std::int64_t count, const LowRank& low_rank, const Tile& tile, std::byte* out);

// sums[i] = base[i] + the sum over t < count of (weights[t] + own[t][i]) * terms[t][begin + i] for i <
// length, in the order of the terms. The scale of a quantized term is multiplied into its weight first. base
// may be sums.
using AddWeightedFn = void (*)(const std::byte* base, DType dtype, const Term* terms, const float* weights,
                               const float* const* own, std::int64_t count, std::int64_t begin,
                               std::int64_t length, float* sums);

// The sum of a[i] * b[i] for begin <= i < begin + count: kStep running sums in float32, added up in float64.
using DotFn = double (*)(const std::byte* a, const Term& b, std::int64_t begin, std::int64_t count);

// to[i] = from[i] for i < count.
using WidenFn = void (*)(const std::byte* from, std::int64_t count, float* to);

using CopyFn = void (*)(std::byte* dst, const std::byte* src, std::int64_t nbytes);

// The loops of merge methods over a chunk of floats; chunk_loops_generic.h says what each does. Masks have 32
// bits for each element, all ones or all zeros, until `pack` makes bits of them.
struct Loops {
  void (*subtract)(float* values, const float* less, std::int64_t count);
  void (*magnitudes)(const float* values, std::int64_t count, std::int32_t* bits);
  void (*keep_between)(const float* values, std::int64_t count, std::int32_t low, std::int32_t high,
                       std::uint32_t* kept);
  void (*draw)(std::uint32_t start, std::uint32_t second, std::int64_t count, std::uint32_t* numbers);
  void (*keep_below)(const std::uint32_t* numbers, const std::uint32_t* thresholds, std::int64_t count,
                     std::uint32_t* kept);
  void (*pack)(const std::uint32_t* kept, std::int64_t count, std::uint8_t* mask);
  void (*sum_magnitudes)(const float* values, const std::uint32_t* kept, std::int64_t count, double* before,
                         double* after);
  void (*weigh)(float* values, const float* base, const std::uint8_t* mask, const std::uint32_t (*bits)[8],
                float scale, float weight, std::int64_t count);
  void (*add)(float* sum, const float* values, std::int64_t count);
  void (*add_elected)(const float* values, const float* elected, float weight, std::int64_t count, float* sum,
                      float* divisor);
  void (*divide)(float* sum, const float* divisor, std::int64_t count);
  void (*finish)(float* sum, const float* base, float scale, std::int64_t count);
  double (*product)(const float* a, const float* b, std::int64_t count);
};

struct Kernels {
  const char* name;
  MergeFn merge[kDTypes][kKinds + 1][kDTypes];  // [base][kind of all terms][out]
  MergeTileFn merge_tile[kDTypes][kDTypes];     // [base][out]
  AddWeightedFn add_weighted;
  DotFn dot[kDTypes][kKinds];
  WidenFn widen[kDTypes];
  CopyFn copy;
  Loops loops;
};

// Null where the instruction set does not exist on the architecture compiled for.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

}  // namespace paretofuse
