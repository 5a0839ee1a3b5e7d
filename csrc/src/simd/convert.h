// One element at a time between memory and float32, by integer arithmetic: the definition of the roundings,
// which the vector paths repeat exactly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "paretofuse/dtype.h"

namespace paretofuse {

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float float_from_bf16(std::uint16_t half) { return float_of(static_cast<std::uint32_t>(half) << 16); }

inline std::uint16_t bf16_from_float(float value) {
  const std::uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return static_cast<std::uint16_t>((bits >> 16) | 0x40u);  // quiet NaN
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float_from_f16(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) {  // infinity or NaN
    const std::uint32_t quiet = magnitude > 0x0f800000u ? 0x00400000u : 0u;
    return float_of(sign | magnitude | 0x7f800000u | quiet);
  }
  // Read as float32, the number is 2^112 times too small, subnormal or not.
  return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}

inline std::uint16_t f16_from_float(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);  // quiet NaN
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;  // 2^16 and more: infinity; what rounds up to 2^16 gets there below
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {
    // Below 2^-14 the result counts units of 2^-24, which is the spacing of float32 numbers near 0.5.
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  }
  return static_cast<std::uint16_t>(sign | half);
}

template <DType D>
inline float load_one(const std::byte* from) {
  if constexpr (D == DType::F32) {
    float value;
    std::memcpy(&value, from, sizeof value);
    return value;
  } else {
    std::uint16_t half;
    std::memcpy(&half, from, sizeof half);
    return D == DType::BF16 ? float_from_bf16(half) : float_from_f16(half);
  }
}

template <DType D>
inline void store_one(std::byte* to, float value) {
  if constexpr (D == DType::F32) {
    std::memcpy(to, &value, sizeof value);
  } else {
    const std::uint16_t half = D == DType::BF16 ? bf16_from_float(value) : f16_from_float(value);
    std::memcpy(to, &half, sizeof half);
  }
}

}  // namespace paretofuse
