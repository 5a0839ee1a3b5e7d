#include "core/methods.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "simd/convert.h"
#include "simd/kernels.h"

namespace paretofuse {
namespace {

constexpr std::int64_t kChunk =
    2048;  // elements worked on at a time: a few of these fit into the first cache
constexpr std::int64_t kTask = 32 * kChunk;   // elements of a thread's task; sums are added task by task
constexpr std::uint32_t kNone = 0xffffffffu;  // more than any magnitude's bits
constexpr std::uint32_t kMagnitude = 0x7fffffffu;

using Chunk = std::array<float, kChunk>;

std::int64_t tasks_of(std::int64_t length, std::int64_t task) { return (length + task - 1) / task; }

void check(const Numbers& numbers, const char* what) {
  if (numbers.data == nullptr) throw std::invalid_argument(std::string(what) + ": got a null address");
  if (static_cast<int>(numbers.dtype) >= kDTypes)
    throw std::invalid_argument(std::string(what) + ": unknown dtype");
}

void check(const Difference& difference, const Run& run) {
  if (difference.length < 1) {
    throw std::invalid_argument("length: got " + std::to_string(difference.length) + ", expected 1 or more");
  }
  check(difference.model, "model");
  check(difference.base, "base");
  check_threads(run.threads);
}

void widen(const Kernels& kernels, const Numbers& from, std::int64_t at, std::int64_t count, float* to) {
  const auto* data = static_cast<const std::byte*>(from.data) + at * item_size(from.dtype);
  kernels.widen[static_cast<int>(from.dtype)](data, count, to);
}

// Elements at .. at + count of a model, less the base's where there is one.
void load(const Kernels& kernels, const Numbers& model, const Numbers& base, std::int64_t at,
          std::int64_t count, float* to) {
  widen(kernels, model, at, count, to);
  if (base.data == nullptr) return;
  Chunk own;
  widen(kernels, base, at, count, own.data());
  for (std::int64_t i = 0; i < count; ++i) to[i] -= own[static_cast<std::size_t>(i)];
}

// Calls visit(task, at, count, differences) chunk by chunk, the tasks on several threads.
template <class Visit>
void each_chunk(const Difference& difference, const Kernels& kernels, int threads, const Visit& visit) {
  parallel_for(threads, tasks_of(difference.length, kTask), [&](int thread, std::int64_t task) {
    const std::int64_t end = std::min(difference.length, (task + 1) * kTask);
    Chunk values;
    for (std::int64_t at = task * kTask; at < end; at += kChunk) {
      const std::int64_t count = std::min(kChunk, end - at);
      load(kernels, difference.model, difference.base, at, count, values.data());
      visit(thread, task, at, count, values.data());
    }
  });
}

std::uint32_t magnitude(float value) { return bits_of(value) & kMagnitude; }

// Stores a chunk's mask, kept[i] for each element, and adds up magnitudes.
void store_mask(const float* values, const std::uint8_t* kept, std::int64_t at, std::int64_t count,
                std::uint8_t* mask, Kept& sums) {
  for (std::int64_t byte = 0; byte * 8 < count; ++byte) {
    unsigned bits = 0;
    const std::int64_t end = std::min<std::int64_t>(8, count - byte * 8);
    for (std::int64_t bit = 0; bit < end; ++bit) bits |= static_cast<unsigned>(kept[byte * 8 + bit]) << bit;
    mask[at / 8 + byte] = static_cast<std::uint8_t>(bits);
  }
  constexpr std::int64_t kLanes = 8;
  double before[kLanes] = {}, after[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) {
    const double size = float_of(magnitude(values[i]));
    before[i % kLanes] += size;
    after[i % kLanes] += kept[i] != 0 ? size : 0.0;
  }
  for (std::int64_t lane = 0; lane < kLanes; ++lane) {
    sums.before += before[lane];
    sums.after += after[lane];
  }
}

// Adds up the tasks' sums in their order.
Kept total(const std::vector<Kept>& sums) {
  Kept all{0.0, 0.0};
  for (const Kept& own : sums) {
    all.before += own.before;
    all.after += own.after;
  }
  return all;
}

// A place in the order of magnitudes: what is larger than `bits`, or as large and before `index`, lies above.
struct Cut {
  std::uint32_t bits;
  std::int64_t index;

  bool is_under(std::uint32_t other, std::int64_t i) const {
    return other > bits || (other == bits && i < index);
  }
};

// The largest value whose own count together with those of all larger values reaches `rank`; `above` becomes
// the count of the larger ones.
std::size_t bin_of(const std::vector<std::int64_t>& counts, std::int64_t rank, std::int64_t& above) {
  std::size_t bin = counts.size() - 1;
  while (above + counts[bin] < rank) above += counts[bin--];
  return bin;
}

// Counts of the differences by `part`, a number below `bins`; elements where it is not are left out.
template <class Part>
std::vector<std::int64_t> histogram(const Difference& difference, const Kernels& kernels, int threads,
                                    std::size_t bins, const Part& part) {
  std::vector<std::vector<std::int64_t>> own(static_cast<std::size_t>(threads));
  each_chunk(difference, kernels, threads,
             [&](int thread, std::int64_t, std::int64_t, std::int64_t count, const float* values) {
               std::vector<std::int64_t>& counts = own[static_cast<std::size_t>(thread)];
               if (counts.empty()) counts.resize(bins);
               for (std::int64_t i = 0; i < count; ++i) {
                 const std::size_t bin = part(magnitude(values[i]));
                 if (bin < bins) ++counts[bin];
               }
             });
  std::vector<std::int64_t> all(bins);
  for (const std::vector<std::int64_t>& counts : own) {
    for (std::size_t bin = 0; bin < counts.size(); ++bin) all[bin] += counts[bin];
  }
  return all;
}

// The cut above which `rank` elements lie: by the upper half of their bits, then by the lower half, then by
// their positions.
Cut find_cut(const Difference& difference, const Kernels& kernels, int threads,
             const std::vector<std::int64_t>& upper, std::int64_t rank) {
  if (rank <= 0) return {kNone, 0};
  std::int64_t above = 0;
  const std::size_t high = bin_of(upper, rank, above);
  const std::vector<std::int64_t> lower =
      histogram(difference, kernels, threads, 1 << 16, [high](std::uint32_t bits) {
        return bits >> 16 == high ? std::size_t{bits & 0xffffu} : std::size_t{kNone};
      });
  const std::size_t low = bin_of(lower, rank, above);
  const std::uint32_t bits = static_cast<std::uint32_t>(high << 16 | low);
  std::int64_t wanted = rank - above;
  if (wanted == lower[low]) return {bits, difference.length};
  std::vector<std::int64_t> equal(static_cast<std::size_t>(tasks_of(difference.length, kTask)));
  each_chunk(difference, kernels, threads,
             [&](int, std::int64_t task, std::int64_t, std::int64_t count, const float* values) {
               std::int64_t found = 0;
               for (std::int64_t i = 0; i < count; ++i) found += magnitude(values[i]) == bits;
               equal[static_cast<std::size_t>(task)] += found;
             });
  std::int64_t task = 0;
  while (wanted > equal[static_cast<std::size_t>(task)]) wanted -= equal[static_cast<std::size_t>(task++)];
  for (std::int64_t at = task * kTask;; at += kChunk) {
    Chunk values;
    const std::int64_t count = std::min(kChunk, difference.length - at);
    load(kernels, difference.model, difference.base, at, count, values.data());
    for (std::int64_t i = 0; i < count; ++i) {
      if (magnitude(values[static_cast<std::size_t>(i)]) == bits && --wanted == 0) return {bits, at + i + 1};
    }
  }
}

// Two rounds of multiplications and shifts over a counter; see engine/methods/random.py.
std::uint32_t mixed(std::uint32_t x, std::uint32_t first, std::uint32_t second) {
  x = (x ^ (x >> 16)) * first;
  x = (x ^ (x >> 15)) * second;
  return x ^ (x >> 16);
}

std::uint32_t number_of(const Draw& draw, std::uint64_t index) {
  const std::uint32_t high = static_cast<std::uint32_t>(index >> 32) * 0x85ebca6bu;
  const std::uint32_t x = static_cast<std::uint32_t>(index) * 0x9e3779b9u + draw.first + high;
  return mixed(mixed(x, 0x7feb352du, 0x846ca68bu) ^ draw.second, 0x21f0aaadu, 0xd35a2d97u) >> 8;
}

// Ranks a row's elements by their magnitudes, the smallest first, equal ones in the order of their positions:
// a radix sort, byte by byte, of (magnitude, position).
class Ranks {
 public:
  explicit Ranks(std::int64_t columns)
      : from_(static_cast<std::size_t>(columns)), to_(from_.size()), ranks_(from_.size()) {}

  const std::uint32_t* of(const float* row) {
    std::array<std::array<std::uint32_t, 256>, 4> counts{};
    for (std::size_t i = 0; i < from_.size(); ++i) {
      const std::uint32_t bits = magnitude(row[i]);
      from_[i] = {bits, static_cast<std::uint32_t>(i)};
      for (unsigned byte = 0; byte < 4; ++byte) ++counts[byte][bits >> (8 * byte) & 255u];
    }
    for (unsigned byte = 0; byte < 4; ++byte) {
      std::array<std::uint32_t, 256>& ends = counts[byte];
      if (std::find(ends.begin(), ends.end(), from_.size()) != ends.end()) continue;  // all alike
      std::uint32_t start = 0;
      for (std::uint32_t& end : ends) start += std::exchange(end, start);
      for (const Item& item : from_) to_[ends[item.bits >> (8 * byte) & 255u]++] = item;
      from_.swap(to_);
    }
    for (std::size_t rank = 0; rank < from_.size(); ++rank) {
      ranks_[from_[rank].index] = static_cast<std::uint32_t>(rank);
    }
    return ranks_.data();
  }

 private:
  struct Item {
    std::uint32_t bits;
    std::uint32_t index;
  };

  std::vector<Item> from_;
  std::vector<Item> to_;
  std::vector<std::uint32_t> ranks_;
};

// For each byte of a mask, all ones or zeros for each of its elements.
using Spread = std::array<std::array<std::uint32_t, 8>, 256>;

const Spread& spread() {
  static const Spread table = [] {
    Spread made{};
    for (unsigned byte = 0; byte < 256; ++byte) {
      for (unsigned bit = 0; bit < 8; ++bit) made[byte][bit] = (byte >> bit & 1u) != 0 ? kNone : 0u;
    }
    return made;
  }();
  return table;
}

// Makes those of a chunk's values 0 that are not kept.
void apply_mask(const std::uint8_t* mask, std::int64_t at, std::int64_t count, float* values) {
  const Spread& table = spread();
  for (std::int64_t i = 0; i < count; i += 8) {
    std::uint32_t bits[8];
    std::memcpy(bits, values + i, sizeof bits);  // a chunk has room for whole bytes
    const std::array<std::uint32_t, 8>& kept = table[mask[(at + i) / 8]];
    for (std::size_t bit = 0; bit < 8; ++bit) bits[bit] &= kept[bit];
    std::memcpy(values + i, bits, sizeof bits);
  }
}

// A thread's memory for merging chunks.
struct Workspace {
  explicit Workspace(std::size_t shares) : weighted(shares) {}

  Chunk base;
  Chunk sum;
  Chunk divisor;
  std::vector<Chunk> weighted;  // one for each share
};

// Adds up one chunk: work.sum = sum over shares, divided where the rule says so.
void add_up(const std::vector<Share>& shares, const Rule& rule, std::int64_t count, Workspace& work) {
  const auto n = static_cast<std::size_t>(count);
  Chunk& sum = work.sum;
  std::fill_n(sum.begin(), n, 0.0f);
  for (const Chunk& own : work.weighted) {
    for (std::size_t i = 0; i < n; ++i) sum[i] += own[i];
  }
  if (!rule.elects) {
    float weights = 0.0f;
    for (const Share& share : shares) weights += share.weight;
    if (rule.normalizes && std::abs(weights) >= 1e-8f) {
      for (std::size_t i = 0; i < n; ++i) sum[i] /= weights;
    }
    return;
  }
  Chunk elected = sum;
  Chunk& divisor = work.divisor;
  std::fill_n(sum.begin(), n, 0.0f);
  std::fill_n(divisor.begin(), n, 0.0f);
  for (std::size_t k = 0; k < shares.size(); ++k) {
    const Chunk& own = work.weighted[k];
    const float weight = shares[k].weight;
    for (std::size_t i = 0; i < n; ++i) {
      const bool counts = elected[i] >= 0.0f ? own[i] > 0.0f : own[i] < 0.0f;
      sum[i] += counts ? own[i] : 0.0f;
      divisor[i] += counts ? weight : 0.0f;
    }
  }
  if (!rule.normalizes) return;
  for (std::size_t i = 0; i < n; ++i) sum[i] /= divisor[i] == 0.0f ? 1.0f : divisor[i];
}

}  // namespace

Kept keep_largest(const Difference& difference, std::int64_t first, std::int64_t count, std::uint8_t* mask,
                  const Run& run) {
  check(difference, run);
  if (first < 0 || count < 0 || first > difference.length - count) {
    throw std::invalid_argument("count: got " + std::to_string(first) + " and " + std::to_string(count) +
                                " of " + std::to_string(difference.length) + " elements");
  }
  const Kernels& kernels = choose_kernels(run.isa);
  const std::vector<std::int64_t> upper = histogram(
      difference, kernels, run.threads, 1 << 15, [](std::uint32_t bits) { return std::size_t{bits >> 16}; });
  const Cut outer = find_cut(difference, kernels, run.threads, upper, first);
  const Cut inner = find_cut(difference, kernels, run.threads, upper, first + count);
  std::vector<Kept> sums(static_cast<std::size_t>(tasks_of(difference.length, kTask)));
  each_chunk(difference, kernels, run.threads,
             [&](int, std::int64_t task, std::int64_t at, std::int64_t length, const float* values) {
               std::array<std::uint8_t, kChunk> kept;
               for (std::int64_t i = 0; i < length; ++i) {
                 const std::uint32_t bits = magnitude(values[i]);
                 kept[static_cast<std::size_t>(i)] =
                     inner.is_under(bits, at + i) & !outer.is_under(bits, at + i);
               }
               store_mask(values, kept.data(), at, length, mask, sums[static_cast<std::size_t>(task)]);
             });
  return total(sums);
}

Kept keep_drawn(const Difference& difference, const Draw& draw, std::uint32_t threshold, std::uint8_t* mask,
                const Run& run) {
  check(difference, run);
  const Kernels& kernels = choose_kernels(run.isa);
  std::vector<Kept> sums(static_cast<std::size_t>(tasks_of(difference.length, kTask)));
  each_chunk(difference, kernels, run.threads,
             [&](int, std::int64_t task, std::int64_t at, std::int64_t length, const float* values) {
               std::array<std::uint8_t, kChunk> kept;
               for (std::int64_t i = 0; i < length; ++i) {
                 kept[static_cast<std::size_t>(i)] =
                     number_of(draw, static_cast<std::uint64_t>(at + i)) < threshold;
               }
               store_mask(values, kept.data(), at, length, mask, sums[static_cast<std::size_t>(task)]);
             });
  return total(sums);
}

Kept keep_ranked(const Difference& difference, std::int64_t columns, const Draw& draw, float low, float rise,
                 std::uint8_t* mask, const Run& run) {
  check(difference, run);
  if (columns < 1 || difference.length % columns != 0) {
    throw std::invalid_argument("columns: got " + std::to_string(columns) + ", expected a divisor of " +
                                std::to_string(difference.length));
  }
  const Kernels& kernels = choose_kernels(run.isa);
  // Eight rows fill whole bytes of the mask, so that no two tasks write to the same.
  const std::int64_t task_rows = std::max<std::int64_t>(8, kTask / columns / 8 * 8);
  const std::int64_t tasks = tasks_of(difference.length / columns, task_rows);
  const float steps = static_cast<float>(std::max<std::int64_t>(1, columns - 1));
  std::vector<Kept> sums(static_cast<std::size_t>(tasks));
  parallel_for(run.threads, tasks, [&](int, std::int64_t task) {
    const std::int64_t start = task * task_rows * columns;
    const std::int64_t end = std::min(difference.length, start + task_rows * columns);
    Ranks ranks(columns);
    std::vector<float> values(static_cast<std::size_t>(end - start));
    std::vector<std::uint8_t> kept(values.size());
    for (std::int64_t at = start; at < end; at += kChunk) {
      load(kernels, difference.model, difference.base, at, std::min(kChunk, end - at),
           values.data() + (at - start));
    }
    for (std::int64_t row = 0; row < end - start; row += columns) {
      const std::uint32_t* found = ranks.of(values.data() + row);
      for (std::int64_t i = 0; i < columns; ++i) {
        const float share = static_cast<float>(found[i]) / steps;
        const auto threshold = static_cast<std::uint32_t>(std::lrint((low + share * rise) * 0x1p24f));
        kept[static_cast<std::size_t>(row + i)] =
            number_of(draw, static_cast<std::uint64_t>(start + row + i)) < threshold;
      }
    }
    store_mask(values.data(), kept.data(), start, end - start, mask, sums[static_cast<std::size_t>(task)]);
  });
  return total(sums);
}

void merge_differences(const Numbers& base, const std::vector<Share>& shares, const Rule& rule,
                       std::int64_t length, void* out, DType out_dtype, const Run& run) {
  check(base, "base");
  for (const Share& share : shares) check(share.model, "model");
  if (out == nullptr) throw std::invalid_argument("out: got a null address");
  if (static_cast<int>(out_dtype) >= kDTypes) throw std::invalid_argument("out: unknown dtype");
  check_threads(run.threads);
  const Kernels& kernels = choose_kernels(run.isa);
  const MergeFn round =
      kernels.merge[static_cast<int>(DType::F32)][static_cast<int>(Kind::F32)][static_cast<int>(out_dtype)];
  parallel_for(run.threads, tasks_of(length, kTask), [&](int, std::int64_t task) {
    Workspace work(shares.size());
    const std::int64_t end = std::min(length, (task + 1) * kTask);
    for (std::int64_t at = task * kTask; at < end; at += kChunk) {
      const std::int64_t count = std::min(kChunk, end - at);
      const auto n = static_cast<std::size_t>(count);
      widen(kernels, base, at, count, work.base.data());
      for (std::size_t k = 0; k < shares.size(); ++k) {
        Chunk& own = work.weighted[k];
        widen(kernels, shares[k].model, at, count, own.data());
        for (std::size_t i = 0; i < n; ++i) own[i] -= work.base[i];
        if (shares[k].mask != nullptr) apply_mask(shares[k].mask, at, count, own.data());
        for (std::size_t i = 0; i < n; ++i) own[i] = own[i] * shares[k].scale * shares[k].weight;
      }
      add_up(shares, rule, count, work);
      for (std::size_t i = 0; i < n; ++i) work.sum[i] = work.base[i] + rule.lambda * work.sum[i];
      auto* to = static_cast<std::byte*>(out) + at * item_size(out_dtype);
      round(reinterpret_cast<const std::byte*>(work.sum.data()), nullptr, nullptr, 0, 0, count, to);
    }
  });
}

void products(const Numbers& base, const std::vector<Numbers>& models, std::int64_t length,
              std::int64_t columns, double* result, const Run& run) {
  for (const Numbers& model : models) check(model, "model");
  check_threads(run.threads);
  if (columns < 1 || length % columns != 0) {
    throw std::invalid_argument("columns: got " + std::to_string(columns) + ", expected a divisor of " +
                                std::to_string(length));
  }
  const Kernels& kernels = choose_kernels(run.isa);
  const std::size_t count = models.size(), cells = count * count;
  // A long row is cut into tasks, whose sums are added in their order; short rows share a task.
  const std::int64_t rows = length / columns, pieces = tasks_of(columns, kTask);
  const std::int64_t task_rows = pieces > 1 ? 1 : std::max<std::int64_t>(1, kTask / columns);
  std::vector<double> partial(pieces > 1 ? static_cast<std::size_t>(rows * pieces) * cells : 0);
  parallel_for(run.threads, tasks_of(rows, task_rows) * pieces, [&](int, std::int64_t task) {
    std::vector<Chunk> values(count);
    for (std::int64_t row = task / pieces * task_rows; row < std::min(rows, (task / pieces + 1) * task_rows);
         ++row) {
      const std::int64_t start = row * columns + task % pieces * kTask;
      const std::int64_t end = std::min((row + 1) * columns, start + kTask);
      double* sums = pieces > 1 ? partial.data() + static_cast<std::size_t>(task) * cells
                                : result + static_cast<std::size_t>(row) * cells;
      std::fill_n(sums, cells, 0.0);
      for (std::int64_t at = start; at < end; at += kChunk) {
        const std::int64_t n = std::min(kChunk, end - at);
        for (std::size_t k = 0; k < count; ++k) load(kernels, models[k], base, at, n, values[k].data());
        for (std::size_t a = 0; a < count; ++a) {
          for (std::size_t b = a; b < count; ++b) {
            double lanes[8] = {};
            for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) {
              lanes[i % 8] += static_cast<double>(values[a][i]) * static_cast<double>(values[b][i]);
            }
            for (const double lane : lanes) sums[a * count + b] += lane;
          }
        }
      }
      for (std::size_t a = 0; a < count; ++a) {
        for (std::size_t b = 0; b < a; ++b) sums[a * count + b] = sums[b * count + a];
      }
    }
  });
  if (pieces == 1) return;
  for (std::size_t row = 0; row < static_cast<std::size_t>(rows); ++row) {
    std::fill_n(result + row * cells, cells, 0.0);
    for (std::size_t piece = 0; piece < static_cast<std::size_t>(pieces); ++piece) {
      for (std::size_t cell = 0; cell < cells; ++cell) {
        result[row * cells + cell] +=
            partial[(row * static_cast<std::size_t>(pieces) + piece) * cells + cell];
      }
    }
  }
}

}  // namespace paretofuse
