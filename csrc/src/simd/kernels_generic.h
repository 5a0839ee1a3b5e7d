// The text of the kernels, once for all instruction sets. Each kernels_*.cpp defines `Arch` in a namespace of
// its own and includes this file there, below its target pragma: hence no include guard, no includes and no
// namespace.
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
inline constexpr std::int64_t kAhead = 128;

// Asks for the `bytes` bytes that lie kAhead after `from`. Asking beyond the end of the data is harmless.
template <std::int64_t bytes>
inline void prefetch(const std::byte* from) {
  for (std::int64_t line = 0; line < bytes; line += kLine) __builtin_prefetch(from + kAhead + line);
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

// Elements at .. at + kStep without their scale; at is a multiple of kStep unless K is a float.
template <Kind K>
PARETOFUSE_INLINE void values_at(const Term& term, std::int64_t at, typename Arch::Vec* values) {
  if constexpr (K == Kind::Int8) {
    const std::byte* from = term.values + at;
    prefetch<kStep>(from);
    for (std::int64_t v = 0; v < kVecs; ++v) values[v] = Arch::load_int8(from + v * Arch::kWidth);
  } else if constexpr (K == Kind::Int4) {
    const std::byte* from = term.values + at / 2;
    prefetch<kStep / 2>(from);
    Arch::load_int4(from, values);
  } else {
    constexpr std::int64_t size = item_size(kDTypeOf<K>);
    const std::byte* from = term.values + at * size;
    prefetch<kStep * size>(from);
    for (std::int64_t v = 0; v < kVecs; ++v) {
      values[v] = Arch::template load<kDTypeOf<K>>(from + v * Arch::kWidth * size);
    }
  }
}

template <Kind K>
inline constexpr bool kScaled = K == Kind::Int8 || K == Kind::Int4;

// Bytes of the elements of a step.
template <Kind K>
inline constexpr std::int64_t kStepBytes = K == Kind::Int4   ? kStep / 2
                                           : K == Kind::Int8 ? kStep
                                                             : kStep * item_size(kDTypeOf<K>);

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
  const std::byte* from = term.values + at / kStep * kStepBytes<K>;
  if constexpr (!kScaled<K>) from = term.values + at * item_size(kDTypeOf<K>);
  if (ahead) prefetch<kStepBytes<K>>(from);
  typename Arch::Vec values[kVecs];
  if constexpr (kScaled<K>) {
    weight *= scale_at(term, at);
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

// float32 has no lanes to cross, and float16's conversion crosses them by itself.
template <Kind K>
inline constexpr bool kShuffled = Arch::kShuffles && (K == Kind::BF16 || K == Kind::Int8 || K == Kind::Int4);

// Several steps at once: each term's address and weight are then read once for all of them, and each cache
// line is asked for once.
template <typename A, DType Base, Kind K, DType Out, bool Streaming, std::int64_t Steps>
PARETOFUSE_INLINE void merge_step(const std::byte* base, const Term* terms, const float* weights,
                                  std::int64_t count, std::int64_t at, std::byte* out) {
  typename Arch::Vec sums[Steps][kVecs];
  for (std::int64_t s = 0; s < Steps; ++s) {
    const std::int64_t first = at + s * kStep;
    if constexpr (kShuffled<K>) {
      const std::byte* from = base + first * item_size(Base);
      prefetch<kStep * item_size(Base)>(from);
      A::template load_shuffled<Base>(from, sums[s]);
    } else {
      load_step<Base>(base, first, sums[s]);
    }
  }
  for (std::int64_t t = 0; t < count; ++t) {
    for (std::int64_t s = 0; s < Steps; ++s) {
      if constexpr (kShuffled<K>) {
        const bool ahead = s * kStepBytes<K> % kLine == 0;
        add_step_shuffled<A, K>(terms[t], weights[t], at + s * kStep, ahead, sums[s]);
      } else {
        add_step<K>(terms[t], weights[t], at + s * kStep, sums[s]);
      }
    }
  }
  for (std::int64_t s = 0; s < Steps; ++s) {
    std::byte* to = out + (at + s * kStep) * item_size(Out);
    if constexpr (kShuffled<K>) {
      A::template store_shuffled<Out, Streaming>(to, sums[s]);
    } else {
      Arch::template store<Out, Streaming>(to, sums[s]);
    }
  }
}

template <DType Base, Kind K, DType Out>
inline void merge_one_by_one(const std::byte* base, const Term* terms, const float* weights,
                             std::int64_t count, std::int64_t begin, std::int64_t end, std::byte* out) {
  for (std::int64_t i = begin; i < end; ++i) {
    float sum = load_one<Base>(base + i * item_size(Base));
    for (std::int64_t t = 0; t < count; ++t) sum += weighted_at<K>(terms[t], weights[t], i);
    store_one<Out>(out + i * item_size(Out), sum);
  }
}

// Steps between begin and end, streaming where their outputs lie on cache lines; returns where they end.
template <DType Base, Kind K, DType Out>
inline std::int64_t merge_steps(const std::byte* base, const Term* terms, const float* weights,
                                std::int64_t count, std::int64_t begin, std::int64_t end, std::byte* out) {
  constexpr std::int64_t some = K == Kind::Mixed ? 1 : Arch::kSteps;
  std::int64_t i = begin;
  if (elements_to_line(out + i * item_size(Out), item_size(Out)) == 0) {
    for (; i + some * kStep <= end; i += some * kStep) {
      merge_step<Arch, Base, K, Out, true, some>(base, terms, weights, count, i, out);
    }
  }
  for (; i + kStep <= end; i += kStep) {
    merge_step<Arch, Base, K, Out, false, 1>(base, terms, weights, count, i, out);
  }
  return i;
}

template <DType Base, Kind K, DType Out>
void merge(const std::byte* base, const Term* terms, const float* weights, std::int64_t count,
           std::int64_t begin, std::int64_t length, std::byte* out) {
  const std::int64_t end = begin + length;
  if constexpr (K > Kind::F16) {
    // A step of quantized elements must not cross from one scale to the next.
    const std::int64_t first = std::min(end, (begin + kStep - 1) / kStep * kStep);
    merge_one_by_one<Base, K, Out>(base, terms, weights, count, begin, first, out);
    const std::int64_t last = merge_steps<Base, K, Out>(base, terms, weights, count, first, end, out);
    merge_one_by_one<Base, K, Out>(base, terms, weights, count, last, end, out);
  } else if (length < kStep) {
    merge_one_by_one<Base, K, Out>(base, terms, weights, count, begin, end, out);
  } else {
    // The first and the last step may overlap the streaming ones between them: an element's result does not
    // depend on the step that computes it, and inputs never overlap outputs.
    const std::int64_t skip =
        std::max<std::int64_t>(0, elements_to_line(out + begin * item_size(Out), item_size(Out)));
    if (skip > 0) merge_step<Arch, Base, K, Out, false, 1>(base, terms, weights, count, begin, out);
    const std::int64_t last = merge_steps<Base, K, Out>(base, terms, weights, count, begin + skip, end, out);
    if (last < end) merge_step<Arch, Base, K, Out, false, 1>(base, terms, weights, count, end - kStep, out);
  }
}

// Rows row .. row + Rows of a tile: their sums share the loads of the low-rank planes' right factor.
template <DType Base, DType Out, bool Streaming, std::int64_t Rows>
inline void merge_tile_rows(const std::byte* base, const Term* terms, const float* weights,
                            std::int64_t count, const LowRank& low_rank, const Tile& tile, std::int64_t row,
                            std::byte* out) {
  const std::int64_t first = tile.begin + row * tile.columns;
  const float* left = low_rank.left + row * low_rank.rank;
  for (std::int64_t column = 0; column + kStep <= tile.width; column += kStep) {
    typename Arch::Vec sums[Rows][kVecs];
    for (std::int64_t i = 0; i < Rows; ++i) {
      const std::int64_t at = first + i * tile.columns + column;
      load_step<Base>(base, at, sums[i]);
      for (std::int64_t t = 0; t < count; ++t) {
        add_step<Kind::Mixed>(terms[t], weights[(row + i) * count + t], at, sums[i]);
      }
    }
    const auto* right = reinterpret_cast<const std::byte*>(low_rank.right + column);
    for (std::int64_t r = 0; r < low_rank.rank; ++r, right += low_rank.stride * 4) {
      typename Arch::Vec values[kVecs];
      for (std::int64_t v = 0; v < kVecs; ++v) {
        values[v] = Arch::template load<DType::F32>(right + v * Arch::kWidth * 4);
      }
      for (std::int64_t i = 0; i < Rows; ++i) {
        const typename Arch::Vec factor = Arch::broadcast(left[i * low_rank.rank + r]);
        for (std::int64_t v = 0; v < kVecs; ++v) {
          sums[i][v] = Arch::add(sums[i][v], Arch::mul(factor, values[v]));
        }
      }
    }
    for (std::int64_t i = 0; i < Rows; ++i) {
      const std::int64_t at = first + i * tile.columns + column;
      Arch::template store<Out, Streaming>(out + at * item_size(Out), sums[i]);
    }
  }
}

template <DType Base, DType Out, bool Streaming>
inline void merge_tile_steps(const std::byte* base, const Term* terms, const float* weights,
                             std::int64_t count, const LowRank& low_rank, const Tile& tile, std::byte* out) {
  std::int64_t row = 0;
  for (; row + Arch::kRows <= tile.rows; row += Arch::kRows) {
    merge_tile_rows<Base, Out, Streaming, Arch::kRows>(base, terms, weights, count, low_rank, tile, row, out);
  }
  for (; row < tile.rows; ++row) {
    merge_tile_rows<Base, Out, Streaming, 1>(base, terms, weights, count, low_rank, tile, row, out);
  }
}

template <DType Base, DType Out>
void merge_tile(const std::byte* base, const Term* terms, const float* weights, std::int64_t count,
                const LowRank& low_rank, const Tile& tile, std::byte* out) {
  // A step of quantized elements must not cross from one scale to the next.
  bool in_steps = tile.columns % kStep == 0 && tile.begin % kStep == 0;
  in_steps |= std::all_of(terms, terms + count, [](const Term& term) { return term.kind <= Kind::F16; });
  std::int64_t column = 0;
  if (in_steps) {
    const bool lines = elements_to_line(out + tile.begin * item_size(Out), item_size(Out)) == 0 &&
                       tile.columns * item_size(Out) % kLine == 0;
    if (lines) {
      merge_tile_steps<Base, Out, true>(base, terms, weights, count, low_rank, tile, out);
    } else {
      merge_tile_steps<Base, Out, false>(base, terms, weights, count, low_rank, tile, out);
    }
    column = tile.width / kStep * kStep;
  }
  for (std::int64_t row = 0; row < tile.rows; ++row) {
    const float* left = low_rank.left + row * low_rank.rank;
    for (std::int64_t c = column; c < tile.width; ++c) {
      const std::int64_t i = tile.begin + row * tile.columns + c;
      float sum = load_one<Base>(base + i * item_size(Base));
      for (std::int64_t t = 0; t < count; ++t) {
        sum += weighted_at<Kind::Mixed>(terms[t], weights[row * count + t], i);
      }
      for (std::int64_t r = 0; r < low_rank.rank; ++r) {
        sum += left[r] * low_rank.right[r * low_rank.stride + c];
      }
      store_one<Out>(out + i * item_size(Out), sum);
    }
  }
}

// Element i of floats always adds to running sum (i - begin) % kStep, of quantized numbers to i % kStep, so
// that all instruction sets give the same bits.
template <DType A, Kind K>
double dot(const std::byte* a, const Term& b, std::int64_t begin, std::int64_t count) {
  const std::int64_t end = begin + count;
  const std::int64_t origin = kScaled<K> ? 0 : begin;
  float lanes[kStep] = {};
  const auto one_by_one = [&](std::int64_t i, std::int64_t last) {
    for (; i < last; ++i) {
      lanes[(i - origin) % kStep] += load_one<A>(a + i * item_size(A)) * weighted_at<K>(b, 1.0f, i);
    }
  };
  std::int64_t i = kScaled<K> ? std::min(end, (begin + kStep - 1) / kStep * kStep) : begin;
  one_by_one(begin, i);
  typename Arch::Vec sums[kVecs];
  for (std::int64_t v = 0; v < kVecs; ++v) {
    sums[v] = Arch::template load<DType::F32>(reinterpret_cast<const std::byte*>(lanes + v * Arch::kWidth));
  }
  for (; i + kStep <= end; i += kStep) {
    typename Arch::Vec values[kVecs];
    values_at<K>(b, i, values);
    if constexpr (kScaled<K>) {
      const typename Arch::Vec scale = Arch::broadcast(scale_at(b, i));
      for (std::int64_t v = 0; v < kVecs; ++v) values[v] = Arch::mul(scale, values[v]);
    }
    for (std::int64_t v = 0; v < kVecs; ++v) {
      const std::byte* from = a + (i + v * Arch::kWidth) * item_size(A);
      sums[v] = Arch::add(sums[v], Arch::mul(Arch::template load<A>(from), values[v]));
    }
  }
  for (std::int64_t v = 0; v < kVecs; ++v) Arch::to_floats(lanes + v * Arch::kWidth, sums[v]);
  one_by_one(i, end);
  double total = 0.0;
  for (const float lane : lanes) total += static_cast<double>(lane);
  return total;
}

template <DType D>
void widen(const std::byte* from, std::int64_t count, float* to) {
  std::int64_t i = 0;
  for (; i + Arch::kWidth <= count; i += Arch::kWidth) {
    Arch::to_floats(to + i, Arch::template load<D>(from + i * item_size(D)));
  }
  for (; i < count; ++i) to[i] = load_one<D>(from + i * item_size(D));
}

void copy(std::byte* dst, const std::byte* src, std::int64_t nbytes) {
  std::int64_t i = elements_to_line(dst, 1);
  if (i > nbytes) i = nbytes;
  std::memcpy(dst, src, static_cast<std::size_t>(i));
  for (; i + kLine <= nbytes; i += kLine) Arch::template copy_line<true>(dst + i, src + i);
  std::memcpy(dst + i, src + i, static_cast<std::size_t>(nbytes - i));
}

template <DType Base, Kind K>
constexpr void fill_outputs(Kernels& kernels) {
  MergeFn(&row)[kDTypes] = kernels.merge[static_cast<std::size_t>(Base)][static_cast<std::size_t>(K)];
  row[0] = merge<Base, K, DType::F32>;
  row[1] = merge<Base, K, DType::BF16>;
  row[2] = merge<Base, K, DType::F16>;
  if constexpr (K != Kind::Mixed) {
    kernels.dot[static_cast<std::size_t>(Base)][static_cast<std::size_t>(K)] = dot<Base, K>;
  }
}

template <DType Base>
constexpr void fill_base(Kernels& kernels) {
  fill_outputs<Base, Kind::F32>(kernels);
  fill_outputs<Base, Kind::BF16>(kernels);
  fill_outputs<Base, Kind::F16>(kernels);
  fill_outputs<Base, Kind::Int8>(kernels);
  fill_outputs<Base, Kind::Int4>(kernels);
  fill_outputs<Base, Kind::Mixed>(kernels);
  MergeTileFn(&row)[kDTypes] = kernels.merge_tile[static_cast<std::size_t>(Base)];
  row[0] = merge_tile<Base, DType::F32>;
  row[1] = merge_tile<Base, DType::BF16>;
  row[2] = merge_tile<Base, DType::F16>;
  kernels.widen[static_cast<std::size_t>(Base)] = widen<Base>;
}

constexpr Kernels make_kernels(const char* name) {
  Kernels kernels{};
  kernels.name = name;
  fill_base<DType::F32>(kernels);
  fill_base<DType::BF16>(kernels);
  fill_base<DType::F16>(kernels);
  kernels.copy = copy;
  kernels.loops = make_loops();
  return kernels;
}
