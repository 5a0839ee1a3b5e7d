// What the files of merge methods share: tensors as chunks of floats, and differences to a base.
#pragma once

#include <array>
#include <cstdint>

#include "core/methods.h"
#include "simd/kernels.h"

namespace paretofuse {

// Elements worked on at a time: a few of these fit into the first cache.
inline constexpr std::int64_t kChunk = 2048;

// Elements of a thread's task; sums are added task by task.
inline constexpr std::int64_t kTask = 32 * kChunk;

using Chunk = std::array<float, kChunk>;

inline std::int64_t tasks_of(std::int64_t length, std::int64_t task) { return (length + task - 1) / task; }

// Throws std::invalid_argument for a null address or an unknown dtype.
void check_numbers(const Numbers& numbers, const char* what);

// Elements at .. at + count as floats.
void widen(const Kernels& kernels, const Numbers& from, std::int64_t at, std::int64_t count, float* to);

// The same of a model, less the base's where there is one.
void load(const Kernels& kernels, const Numbers& model, const Numbers& base, std::int64_t at,
          std::int64_t count, float* to);

}  // namespace paretofuse
