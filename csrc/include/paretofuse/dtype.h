// Element types of tensors.
#pragma once

#include <cstdint>

namespace paretofuse {

enum class DType : std::uint8_t { F32 = 0, BF16 = 1, F16 = 2 };

inline constexpr int kDTypes = 3;

// Bytes per element.
constexpr std::int64_t item_size(DType dtype) { return dtype == DType::F32 ? 4 : 2; }

}  // namespace paretofuse
