// The table of inner loops that each instruction set fills in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "paretofuse/dtype.h"

namespace paretofuse {

// Elements that a kernel handles at a time: a multiple of every vector width, and one cache line of 16-bit
// elements.
inline constexpr std::int64_t kStep = 32;

// out[i] = round(base[i] + sum over e < experts of weights[e] * deltas[e][i]) for begin <= i < begin + count.
using MergeFn = void (*)(const std::byte* base, const std::byte* const* deltas, const float* weights,
                         std::int64_t experts, std::int64_t begin, std::int64_t count, std::byte* out);

// The sum of a[i] * b[i] for begin <= i < begin + count: kStep running sums in float32, added up in float64.
using DotFn = double (*)(const std::byte* a, const std::byte* b, std::int64_t begin, std::int64_t count);

using CopyFn = void (*)(std::byte* dst, const std::byte* src, std::int64_t nbytes);

struct Kernels {
  const char* name;
  MergeFn merge[kDTypes][kDTypes][kDTypes];  // [base][delta][out]
  DotFn dot[kDTypes][kDTypes];
  CopyFn copy;
};

// Null where the instruction set does not exist on the architecture compiled for.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

}  // namespace paretofuse
