// Kernels for AVX2 with F16C. The target is opened below the includes, so that nothing they define is
// compiled for it.
#include "simd/kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd/convert.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

namespace paretofuse {
namespace {

struct Arch {
  using Vec = __m256;
  static constexpr std::int64_t kWidth = 8;
  static constexpr std::int64_t kRows = 2;

  static Vec broadcast(float value) { return _mm256_set1_ps(value); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static void to_floats(float* to, Vec value) { _mm256_storeu_ps(to, value); }

  template <DType D>
  static Vec load(const std::byte* from) {
    if constexpr (D == DType::F32) {
      return _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    } else {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      if constexpr (D == DType::F16) return _mm256_cvtph_ps(halves);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
  }

  static Vec load_int8(const std::byte* from) {
    return from_int8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }

  static void load_int4(const std::byte* from, Vec* values) {
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m128i low = _mm_and_si128(pairs, _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(pairs, 4), _mm_set1_epi8(15));
    const __m128i first = _mm_sub_epi8(_mm_unpacklo_epi8(low, high), _mm_set1_epi8(8));
    const __m128i second = _mm_sub_epi8(_mm_unpackhi_epi8(low, high), _mm_set1_epi8(8));
    values[0] = from_int8(first);
    values[1] = from_int8(_mm_srli_si128(first, 8));
    values[2] = from_int8(second);
    values[3] = from_int8(_mm_srli_si128(second, 8));
  }

  template <DType D, bool Streaming>
  static void store(std::byte* to, const Vec* sums) {
    if constexpr (D == DType::F32) {
      for (int v = 0; v < 4; ++v) put<Streaming>(to + v * 32, _mm256_castps_si256(sums[v]));
    } else if constexpr (D == DType::BF16) {
      for (int v = 0; v < 4; v += 2) {
        const __m256i pair = _mm256_packus_epi32(round_bf16(sums[v]), round_bf16(sums[v + 1]));
        put<Streaming>(to + v * 16, _mm256_permute4x64_epi64(pair, 0xd8));
      }
    } else {
      for (int v = 0; v < 4; v += 2) {
        const __m128i low = _mm256_cvtps_ph(sums[v], _MM_FROUND_TO_NEAREST_INT);
        const __m128i high = _mm256_cvtps_ph(sums[v + 1], _MM_FROUND_TO_NEAREST_INT);
        put<Streaming>(to + v * 16, _mm256_set_m128i(high, low));
      }
    }
  }

  template <bool Streaming>
  static void copy_line(std::byte* dst, const std::byte* src) {
    for (int half = 0; half < 64; half += 32) {
      put<Streaming>(dst + half, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + half)));
    }
  }

 private:
  // The low eight bytes.
  static Vec from_int8(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }

  template <bool Streaming>
  static void put(std::byte* to, __m256i value) {
    if constexpr (Streaming) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), value);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
    }
  }

  // bfloat16 in the low half of each 32-bit lane; see bf16_from_float.
  static __m256i round_bf16(Vec value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i top = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
    const __m256i rounding = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, rounding), 16);
    const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, quiet, is_nan);
  }
};

#include "simd/chunk_loops_generic.h"
#include "simd/kernels_generic.h"

}  // namespace

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = make_kernels("avx2");
  return &kernels;
}

}  // namespace paretofuse

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

const paretofuse::Kernels* paretofuse::avx2_kernels() { return nullptr; }

#endif
