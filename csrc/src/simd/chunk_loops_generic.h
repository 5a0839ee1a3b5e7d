// Loops over a chunk of floats for core/methods.cpp, written so that compilers turn them into vectors:
// included like kernels_generic.h, once for each instruction set, hence no include guard, no includes and no
// namespace. Nothing here is summed in an order that a compiler may choose, so the bits are the same
// everywhere.

inline constexpr std::int64_t kLanes = 32;  // of running sums

inline void subtract(float* values, const float* less, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) values[i] -= less[i];
}

inline void magnitudes(const float* values, std::int64_t count, std::int32_t* bits) {
  for (std::int64_t i = 0; i < count; ++i)
    bits[i] = static_cast<std::int32_t>(bits_of(values[i]) & 0x7fffffffu);
}

inline void keep_between(const float* values, std::int64_t count, std::int32_t low, std::int32_t high,
                         std::uint32_t* kept) {
  for (std::int64_t i = 0; i < count; ++i) {
    const auto bits = static_cast<std::int32_t>(bits_of(values[i]) & 0x7fffffffu);
    kept[i] = (bits > low ? ~0u : 0u) & (bits > high ? 0u : ~0u);
  }
}

inline void draw(std::uint32_t start, std::uint32_t second, std::int64_t count, std::uint32_t* numbers) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t x = start + static_cast<std::uint32_t>(i) * 0x9e3779b9u;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    x = x ^ (x >> 16) ^ second;
    x = (x ^ (x >> 16)) * 0x21f0aaadu;
    x = (x ^ (x >> 15)) * 0xd35a2d97u;
    numbers[i] = (x ^ (x >> 16)) >> 8;
  }
}

// Numbers below 2^24, thresholds at most 2^24: as signed integers, which more instruction sets compare.
inline void keep_below(const std::uint32_t* numbers, const std::uint32_t* thresholds, std::int64_t count,
                       std::uint32_t* kept) {
  for (std::int64_t i = 0; i < count; ++i) {
    kept[i] = static_cast<std::int32_t>(numbers[i]) < static_cast<std::int32_t>(thresholds[i]) ? ~0u : 0u;
  }
}

inline void pack(const std::uint32_t* kept, std::int64_t count, std::uint8_t* mask) {
  for (std::int64_t i = 0; i < count; i += 8) {
    std::uint32_t byte = 0;
    const std::int64_t end = count - i < 8 ? count - i : 8;
    for (std::int64_t bit = 0; bit < end; ++bit) byte |= kept[i + bit] & (1u << bit);
    mask[i / 8] = static_cast<std::uint8_t>(byte);
  }
}

inline void sum_magnitudes(const float* values, const std::uint32_t* kept, std::int64_t count, double* before,
                           double* after) {
  float all[kLanes] = {}, own[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      const std::uint32_t bits = bits_of(values[i + lane]) & 0x7fffffffu;
      all[lane] += float_of(bits);
      own[lane] += float_of(bits & kept[i + lane]);
    }
  }
  for (std::int64_t lane = 0; i < count; ++i, ++lane) {
    const std::uint32_t bits = bits_of(values[i]) & 0x7fffffffu;
    all[lane] += float_of(bits);
    own[lane] += float_of(bits & kept[i]);
  }
  for (std::int64_t lane = 0; lane < kLanes; ++lane) {
    *before += static_cast<double>(all[lane]);
    *after += static_cast<double>(own[lane]);
  }
}

// values = (values - base) * scale * weight where the mask has a bit, else 0; `bits` is the mask's bits of
// each byte, spread over eight elements, null for no mask. There is room for whole bytes behind the last
// element.
inline void weigh(float* values, const float* base, const std::uint8_t* mask, const std::uint32_t (*bits)[8],
                  float scale, float weight, std::int64_t count) {
  if (mask == nullptr) {
    for (std::int64_t i = 0; i < count; ++i) values[i] = (values[i] - base[i]) * scale * weight;
    return;
  }
  for (std::int64_t i = 0; i < count; i += 8) {
    const std::uint32_t* kept = bits[mask[i / 8]];
    for (std::int64_t bit = 0; bit < 8; ++bit) {
      const float value = (values[i + bit] - base[i + bit]) * scale * weight;
      values[i + bit] = float_of(bits_of(value) & kept[bit]);
    }
  }
}

inline void add(float* sum, const float* values, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] += values[i];
}

// sum and divisor += a value and its weight where the value's sign is the elected one, which is positive at
// 0.
inline void add_elected(const float* values, const float* elected, float weight, std::int64_t count,
                        float* sum, float* divisor) {
  const std::uint32_t own = bits_of(weight);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t up = elected[i] >= 0.0f ? ~0u : 0u;
    const std::uint32_t counts = (values[i] > 0.0f ? up : 0u) | (values[i] < 0.0f ? ~up : 0u);
    sum[i] += float_of(bits_of(values[i]) & counts);
    divisor[i] += float_of(own & counts);
  }
}

inline void divide(float* sum, const float* divisor, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] /= divisor[i] == 0.0f ? 1.0f : divisor[i];
}

// sum = base + scale * sum
inline void finish(float* sum, const float* base, float scale, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] = base[i] + scale * sum[i];
}

// The sum of a[i] * b[i]: running sums in float64, added up in their order.
inline double product(const float* a, const float* b, std::int64_t count) {
  constexpr std::int64_t kSums = 8;
  double sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (std::int64_t lane = 0; lane < kSums; ++lane) {
      sums[lane] += static_cast<double>(a[i + lane]) * static_cast<double>(b[i + lane]);
    }
  }
  for (std::int64_t lane = 0; i < count; ++i, ++lane)
    sums[lane] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}

constexpr Loops make_loops() {
  return {subtract, magnitudes, keep_between, draw,   keep_below, pack,   sum_magnitudes,
          weigh,    add,        add_elected,  divide, finish,     product};
}
