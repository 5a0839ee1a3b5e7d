// The text of the kernels' steps, kStep elements each, once for all instruction sets. Each kernels_*.cpp
// defines `Arch` in a namespace of its own and includes this file there, below its target pragma: hence no
// include guard, no includes and no namespace.
//
// Arch gives: Vec, kWidth (floats in a Vec), kRows (rows of a tile whose sums fit the registers), kSteps
// (steps whose sums do), broadcast, add, mul, load<DType>(address), load_int8(address), load_int4(address,
// kStep / kWidth Vecs), store<DType, streaming>(address, kStep / kWidth Vecs), to_floats(float*, Vec),
// copy_line<streaming>(dst, src). Loads take any address; store and copy_line need a 64-byte boundary when
// streaming.
//
// Where kShuffles is true, a step may have its elements in another order that is cheaper to load, the same in
// all its Vecs: load_shuffled<DType>(address, Vecs), load_int8_shuffled<lifted> and
// load_int4_shuffled<lifted>, store_shuffled<DType, streaming>. Lifted numbers are 2^24 times what they
// should be.

inline constexpr std::int64_t kVecs = kStep / Arch::kWidth;
inline constexpr std::int64_t kLine = 64;

// Bytes by which software prefetching runs ahead of the loads. Measured on Zen 5 with nine streams: 128 gives
// 7 % in float32 and 35 % in bfloat16 over none; from 192 on the hardware's own prefetching suffers.
// Planes that lie side by side in one block merge 15 to 35 % faster with 512, but those with memory of their
// own, as pf.stack has them, up to a third slower.
inline constexpr std::int64_t kAhead = 128;

// The same for quantized numbers, which the loads pass more slowly: on Zen 3, 256 gives a fifth in int8 over
// 128.
inline constexpr std::int64_t kAheadQuantized = 256;

// Asks for the `bytes` bytes that lie `ahead` after `from`. Asking beyond the end of the data is harmless.
template <std::int64_t bytes, std::int64_t ahead = kAhead>
inline void prefetch(const std::byte* from) {
  for (std::int64_t line = 0; line < bytes; line += kLine) __builtin_prefetch(from + ahead + line);
}

// Elements from `address` to the next cache line, or -1 where no element starts on one.
inline std::int64_t elements_to_line(const std::byte* address, std::int64_t size) {
  const auto past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(address) % kLine);
  if (past % size != 0) return -1;
  return past == 0 ? 0 : (kLine - past) / size;
}

template <Kind K>
inline constexpr DType kDTypeOf = static_cast<DType>(K);  // of the floats

inline float scale_at(const Term& term, std::int64_t i) {
  return load_one<DType::F32>(term.scales + (i >> term.shift) * 4);
}

// Element i without its scale.
template <Kind K>
inline float value_at(const Term& term, std::int64_t i) {
  if constexpr (K == Kind::Int8) {
    return static_cast<float>(static_cast<std::int8_t>(term.values[i]));
  } else if constexpr (K == Kind::Int4) {
    const auto pair = std::to_integer<int>(term.values[i / 2]);
    return static_cast<float>((i % 2 != 0 ? pair >> 4 : pair & 15) - 8);
  } else {
    return load_one<kDTypeOf<K>>(term.values + i * item_size(kDTypeOf<K>));
  }
}

template <Kind K>
inline constexpr bool kScaled = K == Kind::Int8 || K == Kind::Int4;

// Bytes of the elements of a step.
template <Kind K>
inline constexpr std::int64_t kStepBytes = K == Kind::Int4   ? kStep / 2
                                           : K == Kind::Int8 ? kStep
                                                             : kStep * item_size(kDTypeOf<K>);

// Where element `at` lies, an even one of Int4.
template <Kind K>
inline const std::byte* address_of(const Term& term, std::int64_t at) {
  if constexpr (K == Kind::Int4) return term.values + at / 2;
  return term.values + at * (kStepBytes<K> / kStep);
}

// Elements at .. at + kStep without their scale; at is a multiple of kStep unless K is a float.
template <Kind K>
PARETOFUSE_INLINE void values_at(const Term& term, std::int64_t at, typename Arch::Vec* values) {
  const std::byte* from = address_of<K>(term, at);
  prefetch<kStepBytes<K>>(from);
  if constexpr (K == Kind::Int8) {
    for (std::int64_t v = 0; v < kVecs; ++v) values[v] = Arch::load_int8(from + v * Arch::kWidth);
  } else if constexpr (K == Kind::Int4) {
    Arch::load_int4(from, values);
  } else {
    for (std::int64_t v = 0; v < kVecs; ++v) {
      values[v] = Arch::template load<kDTypeOf<K>>(from + v * Arch::kWidth * item_size(kDTypeOf<K>));
    }
  }
}

// The same in the shuffled order; numbers that have a scale may be lifted. A is Arch, here and below: a
// parameter, so that those without the order need not have its functions.
template <typename A, Kind K, bool Lifted>
PARETOFUSE_INLINE void values_shuffled(const std::byte* from, typename A::Vec* values) {
  if constexpr (K == Kind::Int8) {
    A::template load_int8_shuffled<Lifted>(from, values);
  } else if constexpr (K == Kind::Int4) {
    A::template load_int4_shuffled<Lifted>(from, values);
  } else {
    A::template load_shuffled<kDTypeOf<K>>(from, values);
  }
}

// sums += weight * elements at .. at + kStep, in the shuffled order; `ahead`: whether to prefetch.
template <typename A, Kind K>
PARETOFUSE_INLINE void add_step_shuffled(const Term& term, float weight, std::int64_t at, bool ahead,
                                         typename Arch::Vec* sums) {
  const std::byte* from = address_of<K>(term, at);
  if (ahead) prefetch<kStepBytes<K>, kScaled<K> ? kAheadQuantized : kAhead>(from);
  typename Arch::Vec values[kVecs];
  if constexpr (kScaled<K>) {
    weight *= scale_at(term, at);
    if (ahead) prefetch<1, kLine>(term.scales + (at >> term.shift) * 4);
    // What is lifted costs an instruction less. Lowering the factor instead is exact, unless it would become
    // subnormal: factors near that, zero and NaN take the numbers as they are.
    if (__builtin_expect(__builtin_fabsf(weight) >= 0x1p-100f, 1)) {
      weight *= 0x1p-24f;
      values_shuffled<A, K, true>(from, values);
    } else {
      values_shuffled<A, K, false>(from, values);
    }
  } else {
    values_shuffled<A, K, false>(from, values);
  }
  const typename Arch::Vec factor = Arch::broadcast(weight);
  for (std::int64_t v = 0; v < kVecs; ++v) sums[v] = Arch::add(sums[v], Arch::mul(factor, values[v]));
}

// sums += weight * elements at .. at + kStep
template <Kind K>
PARETOFUSE_INLINE void add_step(const Term& term, float weight, std::int64_t at, typename Arch::Vec* sums) {
  if constexpr (K == Kind::Mixed) {
    switch (term.kind) {
      case Kind::F32:
        return add_step<Kind::F32>(term, weight, at, sums);
      case Kind::BF16:
        return add_step<Kind::BF16>(term, weight, at, sums);
      case Kind::F16:
        return add_step<Kind::F16>(term, weight, at, sums);
      case Kind::Int8:
        return add_step<Kind::Int8>(term, weight, at, sums);
      default:
        return add_step<Kind::Int4>(term, weight, at, sums);
    }
  } else {
    if constexpr (kScaled<K>) weight *= scale_at(term, at);
    const typename Arch::Vec factor = Arch::broadcast(weight);
    typename Arch::Vec values[kVecs];
    values_at<K>(term, at, values);
    for (std::int64_t v = 0; v < kVecs; ++v) sums[v] = Arch::add(sums[v], Arch::mul(factor, values[v]));
  }
}

// The same for element i alone.
template <Kind K>
inline float weighted_at(const Term& term, float weight, std::int64_t i) {
  if constexpr (K == Kind::Mixed) {
    switch (term.kind) {
      case Kind::F32:
        return weighted_at<Kind::F32>(term, weight, i);
      case Kind::BF16:
        return weighted_at<Kind::BF16>(term, weight, i);
      case Kind::F16:
        return weighted_at<Kind::F16>(term, weight, i);
      case Kind::Int8:
        return weighted_at<Kind::Int8>(term, weight, i);
      default:
        return weighted_at<Kind::Int4>(term, weight, i);
    }
  } else {
    if constexpr (kScaled<K>) weight *= scale_at(term, i);
    return weight * value_at<K>(term, i);
  }
}

template <DType Base>
PARETOFUSE_INLINE void load_step(const std::byte* base, std::int64_t at, typename Arch::Vec* sums) {
  const std::byte* from = base + at * item_size(Base);
  prefetch<kStep * item_size(Base)>(from);
  for (std::int64_t v = 0; v < kVecs; ++v) {
    sums[v] = Arch::template load<Base>(from + v * Arch::kWidth * item_size(Base));
  }
}
