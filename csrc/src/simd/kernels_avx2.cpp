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
  static constexpr std::int64_t kSteps = 2;
  static constexpr bool kShuffles = true;

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

  PARETOFUSE_INLINE static void load_int4(const std::byte* from, Vec* values) {
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

  // Crossing the 128-bit lanes is what costs here. The shuffled order never does: Vec v holds the elements 4v
  // to 4v + 3 in its low lane and those 16 further in its high one, as unpacking and packing lane by lane
  // give them.
  template <DType D>
  PARETOFUSE_INLINE static void load_shuffled(const std::byte* from, Vec* values) {
    if constexpr (D == DType::F32) {
      for (int v = 0; v < 4; ++v) values[v] = _mm256_castsi256_ps(both(from + v * 16, from + 64 + v * 16));
    } else {
      for (int half = 0; half < 2; ++half) {
        const __m256i eight = both(from + half * 16, from + 32 + half * 16);
        if constexpr (D == DType::BF16) {
          const __m256i zero = _mm256_setzero_si256();
          values[2 * half] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, eight));
          values[2 * half + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, eight));
        } else {
          const __m256i fours = _mm256_permute4x64_epi64(eight, 0xd8);
          values[2 * half] = _mm256_cvtph_ps(_mm256_castsi256_si128(fours));
          values[2 * half + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(fours, 1));
        }
      }
    }
  }

  template <bool Lifted>
  PARETOFUSE_INLINE static void load_int8_shuffled(const std::byte* from, Vec* values) {
    from_int8_shuffled<Lifted>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), values);
  }

  template <bool Lifted>
  PARETOFUSE_INLINE static void load_int4_shuffled(const std::byte* from, Vec* values) {
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m128i low = _mm_and_si128(pairs, _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(pairs, 4), _mm_set1_epi8(15));
    const __m256i all = _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
    from_int8_shuffled<Lifted>(_mm256_sub_epi8(all, _mm256_set1_epi8(8)), values);
  }

  template <DType D, bool Streaming>
  PARETOFUSE_INLINE static void store_shuffled(std::byte* to, const Vec* sums) {
    if constexpr (D == DType::F32) {
      for (int pair = 0; pair < 2; ++pair) {
        const __m256i a = _mm256_castps_si256(sums[2 * pair]);
        const __m256i b = _mm256_castps_si256(sums[2 * pair + 1]);
        put<Streaming>(to + pair * 32, _mm256_permute2x128_si256(a, b, 0x20));
        put<Streaming>(to + 64 + pair * 32, _mm256_permute2x128_si256(a, b, 0x31));
      }
    } else {
      const __m256i a = round_pair<D>(sums[0], sums[1]);
      const __m256i b = round_pair<D>(sums[2], sums[3]);
      put<Streaming>(to, _mm256_permute2x128_si256(a, b, 0x20));
      put<Streaming>(to + 32, _mm256_permute2x128_si256(a, b, 0x31));
    }
  }

  template <DType D, bool Streaming>
  PARETOFUSE_INLINE static void store(std::byte* to, const Vec* sums) {
    if constexpr (D == DType::F32) {
      for (int v = 0; v < 4; ++v) put<Streaming>(to + v * 32, _mm256_castps_si256(sums[v]));
    } else {
      for (int v = 0; v < 4; v += 2) {
        const __m256i pair = round_pair<D>(sums[v], sums[v + 1]);
        put<Streaming>(to + v * 16, _mm256_permute4x64_epi64(pair, 0xd8));
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

  // Bytes 4v to 4v + 3 of each lane into the top of its four numbers of 32 bits.
  template <bool Lifted>
  static void from_int8_shuffled(__m256i bytes, Vec* values) {
    for (int v = 0; v < 4; ++v) {
      const int b = v * 4;
      const __m256i to_top =
          _mm256_setr_epi8(-1, -1, -1, b, -1, -1, -1, b + 1, -1, -1, -1, b + 2, -1, -1, -1, b + 3, -1, -1, -1,
                           b, -1, -1, -1, b + 1, -1, -1, -1, b + 2, -1, -1, -1, b + 3);
      __m256i numbers = _mm256_shuffle_epi8(bytes, to_top);
      if constexpr (!Lifted) numbers = _mm256_srai_epi32(numbers, 24);
      values[v] = _mm256_cvtepi32_ps(numbers);
    }
  }

  static __m256i both(const std::byte* low, const std::byte* high) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(first),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
  }

  // The halves of a in the low part of each 128-bit lane, those of b in its high part.
  template <DType D>
  static __m256i round_pair(Vec a, Vec b) {
    if constexpr (D == DType::BF16) return _mm256_packus_epi32(round_bf16(a), round_bf16(b));
    const __m128i first = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT);
    const __m128i second = _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
    return _mm256_set_m128i(_mm_unpackhi_epi64(first, second), _mm_unpacklo_epi64(first, second));
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
