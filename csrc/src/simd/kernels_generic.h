// The text of the kernels, once for all instruction sets. Each kernels_*.cpp defines `Arch` in a namespace of
// its own and includes this file there, below its target pragma: hence no include guard, no includes and no
// namespace.
//
// Arch gives: Vec, kWidth (floats in a Vec), zero, broadcast, add, mul, load<DType>(address),
// store<DType, streaming>(address, kStep / kWidth Vecs), to_floats(float*, Vec), copy_line<streaming>(dst,
// src). load takes any address; store and copy_line need a 64-byte boundary when streaming.

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

template <DType Base, DType Delta, DType Out, bool Streaming>
inline void merge_step(const std::byte* base, const std::byte* const* deltas, const float* weights,
                       std::int64_t experts, std::int64_t at, std::byte* out) {
  typename Arch::Vec sums[kVecs];
  prefetch<kStep * item_size(Base)>(base + at * item_size(Base));
  for (std::int64_t v = 0; v < kVecs; ++v) {
    sums[v] = Arch::template load<Base>(base + (at + v * Arch::kWidth) * item_size(Base));
  }
  for (std::int64_t e = 0; e < experts; ++e) {
    const typename Arch::Vec weight = Arch::broadcast(weights[e]);
    const std::byte* delta = deltas[e] + at * item_size(Delta);
    prefetch<kStep * item_size(Delta)>(delta);
    for (std::int64_t v = 0; v < kVecs; ++v) {
      const auto values = Arch::template load<Delta>(delta + v * Arch::kWidth * item_size(Delta));
      sums[v] = Arch::add(sums[v], Arch::mul(weight, values));
    }
  }
  Arch::template store<Out, Streaming>(out + at * item_size(Out), sums);
}

// The first and the last step may overlap the streaming ones between them: an element's result does not
// depend on the step that computes it, and inputs never overlap outputs.
template <DType Base, DType Delta, DType Out>
void merge(const std::byte* base, const std::byte* const* deltas, const float* weights, std::int64_t experts,
           std::int64_t begin, std::int64_t count, std::byte* out) {
  const std::int64_t end = begin + count;
  if (count < kStep) {
    for (std::int64_t i = begin; i < end; ++i) {
      float sum = load_one<Base>(base + i * item_size(Base));
      for (std::int64_t e = 0; e < experts; ++e) {
        sum += weights[e] * load_one<Delta>(deltas[e] + i * item_size(Delta));
      }
      store_one<Out>(out + i * item_size(Out), sum);
    }
    return;
  }
  const std::int64_t skip = elements_to_line(out + begin * item_size(Out), item_size(Out));
  std::int64_t i = begin;
  if (skip < 0) {
    for (; i + kStep <= end; i += kStep) {
      merge_step<Base, Delta, Out, false>(base, deltas, weights, experts, i, out);
    }
  } else {
    if (skip > 0) merge_step<Base, Delta, Out, false>(base, deltas, weights, experts, i, out);
    for (i += skip; i + kStep <= end; i += kStep) {
      merge_step<Base, Delta, Out, true>(base, deltas, weights, experts, i, out);
    }
  }
  if (i < end) merge_step<Base, Delta, Out, false>(base, deltas, weights, experts, end - kStep, out);
}

// Element i always adds to running sum i % kStep, so that all instruction sets give the same bits.
template <DType A, DType B>
double dot(const std::byte* a, const std::byte* b, std::int64_t begin, std::int64_t count) {
  typename Arch::Vec sums[kVecs];
  for (std::int64_t v = 0; v < kVecs; ++v) sums[v] = Arch::zero();
  const std::int64_t end = begin + count;
  std::int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    prefetch<kStep * item_size(B)>(b + i * item_size(B));
    for (std::int64_t v = 0; v < kVecs; ++v) {
      const std::int64_t at = i + v * Arch::kWidth;
      sums[v] = Arch::add(sums[v], Arch::mul(Arch::template load<A>(a + at * item_size(A)),
                                             Arch::template load<B>(b + at * item_size(B))));
    }
  }
  float lanes[kStep];
  for (std::int64_t v = 0; v < kVecs; ++v) Arch::to_floats(lanes + v * Arch::kWidth, sums[v]);
  for (std::int64_t lane = 0; i < end; ++i, ++lane) {
    lanes[lane] += load_one<A>(a + i * item_size(A)) * load_one<B>(b + i * item_size(B));
  }
  double total = 0.0;
  for (const float lane : lanes) total += static_cast<double>(lane);
  return total;
}

void copy(std::byte* dst, const std::byte* src, std::int64_t nbytes) {
  std::int64_t i = elements_to_line(dst, 1);
  if (i > nbytes) i = nbytes;
  std::memcpy(dst, src, static_cast<std::size_t>(i));
  for (; i + kLine <= nbytes; i += kLine) Arch::template copy_line<true>(dst + i, src + i);
  std::memcpy(dst + i, src + i, static_cast<std::size_t>(nbytes - i));
}

template <DType Base, DType Delta>
constexpr void fill_outputs(MergeFn (&row)[kDTypes]) {
  row[0] = merge<Base, Delta, DType::F32>;
  row[1] = merge<Base, Delta, DType::BF16>;
  row[2] = merge<Base, Delta, DType::F16>;
}

template <DType Base>
constexpr void fill_base(Kernels& kernels) {
  constexpr auto base = static_cast<std::size_t>(Base);
  fill_outputs<Base, DType::F32>(kernels.merge[base][0]);
  fill_outputs<Base, DType::BF16>(kernels.merge[base][1]);
  fill_outputs<Base, DType::F16>(kernels.merge[base][2]);
  kernels.dot[base][0] = dot<Base, DType::F32>;
  kernels.dot[base][1] = dot<Base, DType::BF16>;
  kernels.dot[base][2] = dot<Base, DType::F16>;
}

constexpr Kernels make_kernels(const char* name) {
  Kernels kernels{};
  kernels.name = name;
  fill_base<DType::F32>(kernels);
  fill_base<DType::BF16>(kernels);
  fill_base<DType::F16>(kernels);
  kernels.copy = copy;
  return kernels;
}
