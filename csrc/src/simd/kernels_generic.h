// The text of the kernels, once for all instruction sets: merges, inner products and copies of the steps in
// steps_generic.h, which says what Arch is and how this file is included.

#include "simd/steps_generic.h"

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

// One step, at any address. A function of its own: with so many mixes of formats the library's size counts.
template <DType Base, Kind K, DType Out>
__attribute__((noinline)) void merge_one_step(const std::byte* base, const Term* terms, const float* weights,
                                              std::int64_t count, std::int64_t at, std::byte* out) {
  merge_step<Arch, Base, K, Out, false, 1>(base, terms, weights, count, at, out);
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
    merge_one_step<Base, K, Out>(base, terms, weights, count, i, out);
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
    if (skip > 0) merge_one_step<Base, K, Out>(base, terms, weights, count, begin, out);
    const std::int64_t last = merge_steps<Base, K, Out>(base, terms, weights, count, begin + skip, end, out);
    if (last < end) merge_one_step<Base, K, Out>(base, terms, weights, count, end - kStep, out);
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

// sums += (weight + weights from `own` on) * elements at .. at + kStep
template <Kind K>
PARETOFUSE_INLINE void add_step_weighted(const Term& term, float weight, const float* own, std::int64_t at,
                                         typename Arch::Vec* sums) {
  const typename Arch::Vec shared = Arch::broadcast(weight);
  typename Arch::Vec scale = shared;
  if constexpr (kScaled<K>) scale = Arch::broadcast(scale_at(term, at));
  typename Arch::Vec values[kVecs];
  values_at<K>(term, at, values);
  for (std::int64_t v = 0; v < kVecs; ++v) {
    const auto* from = reinterpret_cast<const std::byte*>(own + v * Arch::kWidth);
    typename Arch::Vec factor = Arch::add(shared, Arch::template load<DType::F32>(from));
    if constexpr (kScaled<K>) factor = Arch::mul(factor, scale);
    sums[v] = Arch::add(sums[v], Arch::mul(factor, values[v]));
  }
}

__attribute__((noinline)) void add_weighted_one_by_one(const std::byte* base, DType dtype, const Term* terms,
                                                       const float* weights, const float* const* own,
                                                       std::int64_t count, std::int64_t begin, std::int64_t i,
                                                       std::int64_t last, float* sums) {
  const Term own_base{base, nullptr, 0, static_cast<Kind>(dtype)};
  for (; i < last; ++i) {
    float sum = weighted_at<Kind::Mixed>(own_base, 1.0f, i);
    for (std::int64_t t = 0; t < count; ++t) {
      sum += weighted_at<Kind::Mixed>(terms[t], weights[t] + own[t][i], begin + i);
    }
    sums[i] = sum;
  }
}

// Once for all bases, outputs and mixes of formats, of which each would make the library larger: the sums lie
// in the first-level cache, and memory is what such merges wait for.
void add_weighted(const std::byte* base, DType dtype, const Term* terms, const float* weights,
                  const float* const* own, std::int64_t count, std::int64_t begin, std::int64_t length,
                  float* sums) {
  // A step of quantized elements must not cross from one scale to the next.
  const bool floats = std::all_of(terms, terms + count, [](const Term& t) { return t.kind <= Kind::F16; });
  const std::int64_t first = floats ? 0 : std::min(length, (begin + kStep - 1) / kStep * kStep - begin);
  const std::int64_t last = first + (length - first) / kStep * kStep;
  for (std::int64_t i = first; i < last; i += kStep) {
    typename Arch::Vec step[kVecs];
    if (dtype == DType::F32) {
      load_step<DType::F32>(base, i, step);
    } else if (dtype == DType::BF16) {
      load_step<DType::BF16>(base, i, step);
    } else {
      load_step<DType::F16>(base, i, step);
    }
    for (std::int64_t t = 0; t < count; ++t) {
      const Term& term = terms[t];
      switch (term.kind) {
        case Kind::F32:
          add_step_weighted<Kind::F32>(term, weights[t], own[t] + i, begin + i, step);
          break;
        case Kind::BF16:
          add_step_weighted<Kind::BF16>(term, weights[t], own[t] + i, begin + i, step);
          break;
        case Kind::F16:
          add_step_weighted<Kind::F16>(term, weights[t], own[t] + i, begin + i, step);
          break;
        case Kind::Int8:
          add_step_weighted<Kind::Int8>(term, weights[t], own[t] + i, begin + i, step);
          break;
        default:
          add_step_weighted<Kind::Int4>(term, weights[t], own[t] + i, begin + i, step);
      }
    }
    for (std::int64_t v = 0; v < kVecs; ++v) Arch::to_floats(sums + i + v * Arch::kWidth, step[v]);
  }
  add_weighted_one_by_one(base, dtype, terms, weights, own, count, begin, 0, first, sums);
  add_weighted_one_by_one(base, dtype, terms, weights, own, count, begin, last, length, sums);
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
  kernels.add_weighted = add_weighted;
  kernels.copy = copy;
  kernels.loops = make_loops();
  return kernels;
}
