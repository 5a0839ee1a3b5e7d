// Kernels for AVX-512 (F, BW, VL, DQ). The target is opened below the includes, so that nothing they define
// is compiled for it. bfloat16 is rounded by integer arithmetic: the processor's own instruction flushes
// subnormal numbers to zero.
#include "simd/kernels.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own headers start from registers they leave undefined on purpose, and its warning does not see
// that.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd/convert.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif

namespace paretofuse {
namespace {

struct Arch {
  using Vec = __m512;
  static constexpr std::int64_t kWidth = 16;
  static constexpr std::int64_t kRows = 4;
  static constexpr std::int64_t kSteps = 2;
  static constexpr bool kShuffles = false;

  static Vec broadcast(float value) { return _mm512_set1_ps(value); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static void to_floats(float* to, Vec value) { _mm512_storeu_ps(to, value); }

  template <DType D>
  static Vec load(const std::byte* from) {
    if constexpr (D == DType::F32) {
      return _mm512_castsi512_ps(_mm512_loadu_si512(from));
    } else {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      if constexpr (D == DType::F16) return _mm512_cvtph_ps(halves);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
  }

  static Vec load_int8(const std::byte* from) {
    return from_int8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }

  PARETOFUSE_INLINE static void load_int4(const std::byte* from, Vec* values) {
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m128i low = _mm_and_si128(pairs, _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(pairs, 4), _mm_set1_epi8(15));
    values[0] = from_int8(_mm_sub_epi8(_mm_unpacklo_epi8(low, high), _mm_set1_epi8(8)));
    values[1] = from_int8(_mm_sub_epi8(_mm_unpackhi_epi8(low, high), _mm_set1_epi8(8)));
  }

  template <DType D, bool Streaming>
  PARETOFUSE_INLINE static void store(std::byte* to, const Vec* sums) {
    if constexpr (D == DType::F32) {
      put<Streaming>(to, _mm512_castps_si512(sums[0]));
      put<Streaming>(to + 64, _mm512_castps_si512(sums[1]));
    } else {
      const __m512i low = _mm512_castsi256_si512(round<D>(sums[0]));
      put<Streaming>(to, _mm512_inserti64x4(low, round<D>(sums[1]), 1));
    }
  }

  template <bool Streaming>
  static void copy_line(std::byte* dst, const std::byte* src) {
    put<Streaming>(dst, _mm512_loadu_si512(src));
  }

 private:
  static Vec from_int8(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }

  template <bool Streaming>
  static void put(std::byte* to, __m512i value) {
    if constexpr (Streaming) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), value);
    } else {
      _mm512_storeu_si512(to, value);
    }
  }

  template <DType D>
  static __m256i round(Vec value) {
    if constexpr (D == DType::F16) {
      return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    } else {  // see bf16_from_float
      const __m512i bits = _mm512_castps_si512(value);
      const __m512i top = _mm512_srli_epi32(bits, 16);
      const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
      const __m512i rounding = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
      const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, rounding), 16);
      const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      const __m512i result = _mm512_mask_or_epi32(rounded, is_nan, top, _mm512_set1_epi32(0x40));
      return _mm512_cvtepi32_epi16(result);
    }
  }
};

#include "simd/chunk_loops_generic.h"
#include "simd/kernels_generic.h"

}  // namespace

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = make_kernels("avx512");
  return &kernels;
}

}  // namespace paretofuse

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

const paretofuse::Kernels* paretofuse::avx512_kernels() { return nullptr; }

#endif
