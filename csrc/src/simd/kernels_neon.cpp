// Kernels for 64-bit Arm, where NEON and its float16 conversions are part of the base architecture.
#include "simd/kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd/convert.h"

namespace paretofuse {
namespace {

struct Arch {
  using Vec = float32x4_t;
  static constexpr std::int64_t kWidth = 4;
  static constexpr std::int64_t kRows = 2;
  static constexpr std::int64_t kSteps = 1;
  static constexpr bool kShuffles = false;

  static Vec broadcast(float value) { return vdupq_n_f32(value); }
  static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
  static void to_floats(float* to, Vec value) { vst1q_f32(to, value); }

  // Loads of bytes take any address.
  template <DType D>
  static Vec load(const std::byte* from) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(from);
    if constexpr (D == DType::F32) {
      return vreinterpretq_f32_u8(vld1q_u8(bytes));
    } else {
      const uint16x4_t halves = vreinterpret_u16_u8(vld1_u8(bytes));
      if constexpr (D == DType::F16) return vcvt_f32_f16(vreinterpret_f16_u16(halves));
      return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
    }
  }

  static Vec load_int8(const std::byte* from) {
    std::uint32_t bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return from_int16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bytes)))));
  }

  PARETOFUSE_INLINE static void load_int4(const std::byte* from, Vec* values) {
    const uint8x16_t pairs = vld1q_u8(reinterpret_cast<const std::uint8_t*>(from));
    const uint8x16_t low = vandq_u8(pairs, vdupq_n_u8(15));
    const uint8x16_t high = vshrq_n_u8(pairs, 4);
    const uint8x16_t halves[2] = {vzip1q_u8(low, high), vzip2q_u8(low, high)};
    for (int half = 0; half < 2; ++half) {
      const int8x16_t bytes = vsubq_s8(vreinterpretq_s8_u8(halves[half]), vdupq_n_s8(8));
      const int16x8_t first = vmovl_s8(vget_low_s8(bytes));
      const int16x8_t second = vmovl_s8(vget_high_s8(bytes));
      values[half * 4] = from_int16(vget_low_s16(first));
      values[half * 4 + 1] = from_int16(vget_high_s16(first));
      values[half * 4 + 2] = from_int16(vget_low_s16(second));
      values[half * 4 + 3] = from_int16(vget_high_s16(second));
    }
  }

  template <DType D, bool Streaming>
  PARETOFUSE_INLINE static void store(std::byte* to, const Vec* sums) {
    if constexpr (D == DType::F32) {
      for (int v = 0; v < 8; v += 2) {
        put<Streaming>(to + v * 16, vreinterpretq_u8_f32(sums[v]), vreinterpretq_u8_f32(sums[v + 1]));
      }
    } else {
      for (int v = 0; v < 8; v += 4) {
        put<Streaming>(to + v * 8, pair<D>(sums[v], sums[v + 1]), pair<D>(sums[v + 2], sums[v + 3]));
      }
    }
  }

  template <bool Streaming>
  static void copy_line(std::byte* dst, const std::byte* src) {
    const auto* from = reinterpret_cast<const std::uint8_t*>(src);
    put<Streaming>(dst, vld1q_u8(from), vld1q_u8(from + 16));
    put<Streaming>(dst + 32, vld1q_u8(from + 32), vld1q_u8(from + 48));
  }

 private:
  static Vec from_int16(int16x4_t values) { return vcvtq_f32_s32(vmovl_s16(values)); }

  template <bool Streaming>
  static void put(std::byte* to, uint8x16_t first, uint8x16_t second) {
    if constexpr (Streaming) {
      // The only store with a non-temporal hint; compilers other than clang have no intrinsic for it.
      __asm__ volatile("stnp %q0, %q1, [%2]" : : "w"(first), "w"(second), "r"(to) : "memory");
    } else {
      auto* bytes = reinterpret_cast<std::uint8_t*>(to);
      vst1q_u8(bytes, first);
      vst1q_u8(bytes + 16, second);
    }
  }

  template <DType D>
  static uint8x16_t pair(Vec low, Vec high) {
    return vreinterpretq_u8_u16(vcombine_u16(round<D>(low), round<D>(high)));
  }

  template <DType D>
  static uint16x4_t round(Vec value) {
    if constexpr (D == DType::F16) {
      return vreinterpret_u16_f16(vcvt_f16_f32(value));
    } else {  // see bf16_from_float
      const uint32x4_t bits = vreinterpretq_u32_f32(value);
      const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
      const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
      const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
      return vshrn_n_u32(vbslq_u32(vceqq_f32(value, value), rounded, quiet), 16);
    }
  }
};

#include "simd/chunk_loops_generic.h"
#include "simd/kernels_generic.h"

}  // namespace

const Kernels* neon_kernels() {
  static constexpr Kernels kernels = make_kernels("neon");
  return &kernels;
}

}  // namespace paretofuse

#else

const paretofuse::Kernels* paretofuse::neon_kernels() { return nullptr; }

#endif
