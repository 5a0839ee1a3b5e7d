// Kernels in plain C++, for every machine.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd/convert.h"
#include "simd/kernels.h"

namespace paretofuse {
namespace {

struct Arch {
  using Vec = float;
  static constexpr std::int64_t kWidth = 1;
  static constexpr std::int64_t kRows = 2;
  static constexpr std::int64_t kSteps = 1;
  static constexpr bool kShuffles = false;

  static float broadcast(float value) { return value; }
  static float add(float a, float b) { return a + b; }
  static float mul(float a, float b) { return a * b; }
  static void to_floats(float* to, float value) { *to = value; }

  template <DType D>
  static float load(const std::byte* from) {
    return load_one<D>(from);
  }

  static float load_int8(const std::byte* from) {
    return static_cast<float>(static_cast<std::int8_t>(*from));
  }

  PARETOFUSE_INLINE static void load_int4(const std::byte* from, float* values) {
    for (std::int64_t i = 0; i < kStep; ++i) {
      const auto pair = std::to_integer<int>(from[i / 2]);
      values[i] = static_cast<float>((i % 2 != 0 ? pair >> 4 : pair & 15) - 8);
    }
  }

  template <DType D, bool Streaming>
  PARETOFUSE_INLINE static void store(std::byte* to, const float* values) {
    for (std::int64_t i = 0; i < kStep; ++i) store_one<D>(to + i * item_size(D), values[i]);
  }

  template <bool Streaming>
  static void copy_line(std::byte* dst, const std::byte* src) {
    std::memcpy(dst, src, 64);
  }
};

#include "simd/chunk_loops_generic.h"
#include "simd/kernels_generic.h"

}  // namespace

const Kernels* scalar_kernels() {
  static constexpr Kernels kernels = make_kernels("scalar");
  return &kernels;
}

}  // namespace paretofuse
