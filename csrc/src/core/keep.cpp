// Which elements of a difference are kept.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/chunks.h"
#include "core/dispatch.h"
#include "core/methods.h"
#include "core/parallel.h"
#include "simd/convert.h"

namespace paretofuse {
namespace {

constexpr std::uint32_t kNone = 0xffffffffu;  // more than any magnitude's bits
constexpr std::uint32_t kMagnitude = 0x7fffffffu;

using Marks = std::array<std::uint32_t, kChunk>;

void check(const Difference& difference, const Run& run) {
  if (difference.length < 1) {
    throw std::invalid_argument("length: got " + std::to_string(difference.length) + ", expected 1 or more");
  }
  check_numbers(difference.model, "model");
  check_numbers(difference.base, "base");
  check_threads(run.threads);
}

// Calls visit(thread, task, at, count, differences) chunk by chunk, the tasks on several threads.
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

// Stores a chunk's mask and adds up its magnitudes.
void store_mask(const Kernels& kernels, const float* values, const Marks& kept, std::int64_t at,
                std::int64_t count, std::uint8_t* mask, Kept& sums) {
  kernels.loops.pack(kept.data(), count, mask + at / 8);
  kernels.loops.sum_magnitudes(values, kept.data(), count, &sums.before, &sums.after);
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

  // Of elements before `end` those lie above it that have more bits than this, unless it splits them.
  std::int32_t limit(std::int64_t end) const {
    const std::int64_t value = bits == kNone ? std::int64_t{kMagnitude} : std::int64_t{bits};
    return static_cast<std::int32_t>(bits != kNone && index >= end ? value - 1 : value);
  }
  bool splits(std::int64_t begin, std::int64_t end) const { return begin < index && index < end; }
};

// The largest value whose own count together with those of all larger values reaches `rank`; `above` becomes
// the count of the larger ones.
std::size_t bin_of(const std::vector<std::int64_t>& counts, std::int64_t rank, std::int64_t& above) {
  std::size_t bin = counts.size() - 1;
  while (above + counts[bin] < rank) above += counts[bin--];
  return bin;
}

// Counts of the differences by 16 of their magnitudes' bits: the upper half, or the lower one of those whose
// upper half is given.
std::vector<std::int64_t> histogram(const Difference& difference, const Kernels& kernels, int threads,
                                    std::int64_t upper = -1) {
  // Neighbours are often alike, and a counter is not ready again at once: two tables take turns.
  constexpr std::size_t kBins = 1 << 16;
  std::vector<std::vector<std::int64_t>> own(static_cast<std::size_t>(threads));
  each_chunk(difference, kernels, threads,
             [&](int thread, std::int64_t, std::int64_t, std::int64_t count, const float* values) {
               std::vector<std::int64_t>& counts = own[static_cast<std::size_t>(thread)];
               if (counts.empty()) counts.resize(2 * kBins);
               std::array<std::int32_t, kChunk> bits;
               kernels.loops.magnitudes(values, count, bits.data());
               std::int64_t* odd = counts.data() + kBins;
               if (upper < 0) {
                 for (std::int64_t i = 0; i < count; ++i) {
                   ++(i % 2 != 0 ? odd : counts.data())[bits[static_cast<std::size_t>(i)] >> 16];
                 }
               } else {
                 for (std::int64_t i = 0; i < count; ++i) {
                   const std::int32_t own_bits = bits[static_cast<std::size_t>(i)];
                   if (own_bits >> 16 == upper) ++odd[own_bits & 0xffff];
                 }
               }
             });
  std::vector<std::int64_t> all(kBins);
  for (const std::vector<std::int64_t>& counts : own) {
    for (std::size_t bin = 0; bin < counts.size(); ++bin) all[bin % kBins] += counts[bin];
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
      histogram(difference, kernels, threads, static_cast<std::int64_t>(high));
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

// The numbers of elements at .. at + count. Their upper half counts multiples of 2^32.
void draw(const Kernels& kernels, const Draw& key, std::int64_t at, std::int64_t count,
          std::uint32_t* numbers) {
  const auto index = static_cast<std::uint64_t>(at);
  const auto left = static_cast<std::int64_t>((std::uint64_t{1} << 32) - (index & 0xffffffffu));
  if (count > left) {
    draw(kernels, key, at + left, count - left, numbers + left);
    count = left;
  }
  const std::uint32_t high = static_cast<std::uint32_t>(index >> 32) * 0x85ebca6bu;
  const std::uint32_t start = static_cast<std::uint32_t>(index) * 0x9e3779b9u + key.first + high;
  kernels.loops.draw(start, key.second, count, numbers);
}

// Thresholds of a row's elements by rank: the smallest magnitude has rank 0, equal ones come in the order of
// their positions.
//
// Few ranks are needed. Elements of like magnitude share a bin; their ranks are neighbours, and nearly every
// number lies below or above the thresholds of all of them. Only where one lies between is the bin sorted.
class RankedRow {
 public:
  RankedRow(const Kernels& kernels, const std::vector<std::uint32_t>& by_rank)
      : kernels_(kernels),
        by_rank_(by_rank),
        bits_(by_rank.size()),
        bins_(by_rank.size()),
        ordered_(by_rank.size()) {}

  // Sets for each element a threshold that is above its number where that of its rank is, and only there.
  void thresholds(const float* row, const std::uint32_t* numbers, std::uint32_t* out) {
    fill_bins(row);
    unsure_.clear();
    for (std::size_t i = 0; i < bins_.size(); ++i) {
      const Bin& bin = table_[bins_[i]];
      out[i] = bin.low;
      if (numbers[i] - bin.low < bin.high - bin.low)
        unsure_.push_back(bins_[i]);  // unsigned: low <= number < high
    }
    if (unsure_.empty()) return;
    order_by_bin();
    for (const std::uint16_t number : unsure_) {
      Bin& bin = table_[number];
      if (bin.low < bin.high) sort(bin, out);
      bin.high = bin.low;  // once
    }
  }

 private:
  static constexpr std::int32_t kShift = 17;  // leaves the exponent and six bits
  static constexpr std::int32_t kBins = 512;  // eight exponents; what is smaller shares the first bin

  // A bin's ranks first .. end, and the least and the largest of their thresholds.
  struct Bin {
    std::uint32_t first;
    std::uint32_t end;
    std::uint32_t low;
    std::uint32_t high;
  };

  void fill_bins(const float* row) {
    kernels_.loops.magnitudes(row, static_cast<std::int64_t>(bits_.size()), bits_.data());
    std::int32_t largest = 0;
    for (const std::int32_t bits : bits_) largest = std::max(largest, bits);
    const std::int32_t floor = std::max(0, (largest >> kShift) - (kBins - 1));
    for (std::size_t i = 0; i < bits_.size(); ++i) {
      bins_[i] = static_cast<std::uint16_t>(std::max(0, (bits_[i] >> kShift) - floor));
    }
    std::array<std::uint32_t, kBins> counts{}, odd{};  // two take turns, as in histogram()
    for (std::size_t i = 0; i < bins_.size(); ++i) ++(i % 2 != 0 ? odd : counts)[bins_[i]];
    std::uint32_t first = 0;
    for (std::size_t bin = 0; bin < counts.size(); ++bin) {
      const std::uint32_t end = first + counts[bin] + odd[bin];
      if (end == first) continue;
      const auto [low, high] = std::minmax(by_rank_[first], by_rank_[end - 1]);  // a rise may be negative
      table_[bin] = {first, end, low, high};
      first = end;
    }
  }

  // Brings magnitudes and positions into the order of the bins; in each, positions rise.
  void order_by_bin() {
    std::array<std::uint32_t, kBins> next;
    for (std::size_t bin = 0; bin < next.size(); ++bin) next[bin] = table_[bin].first;
    for (std::size_t i = 0; i < bins_.size(); ++i) {
      ordered_[next[bins_[i]]++] = static_cast<std::uint64_t>(bits_[i]) << 32 | i;
    }
  }

  // Gives the elements of a bin the thresholds of their ranks. Often they are all alike, and in order.
  void sort(const Bin& bin, std::uint32_t* out) {
    const auto begin = ordered_.begin() + bin.first, end = ordered_.begin() + bin.end;
    if (!std::is_sorted(begin, end)) std::sort(begin, end);
    for (std::uint32_t rank = bin.first; rank < bin.end; ++rank) {
      out[ordered_[rank] & 0xffffffffu] = by_rank_[rank];
    }
  }

  const Kernels& kernels_;
  const std::vector<std::uint32_t>& by_rank_;
  std::vector<std::int32_t> bits_;
  std::vector<std::uint16_t> bins_;
  std::array<Bin, kBins> table_{};
  std::vector<std::uint16_t> unsure_;
  std::vector<std::uint64_t> ordered_;  // magnitude and position
};

}  // namespace

Kept keep_largest(const Difference& difference, std::int64_t first, std::int64_t count, std::uint8_t* mask,
                  const Run& run) {
  check(difference, run);
  if (first < 0 || count < 0 || first > difference.length - count) {
    throw std::invalid_argument("count: got " + std::to_string(first) + " and " + std::to_string(count) +
                                " of " + std::to_string(difference.length) + " elements");
  }
  const Kernels& kernels = choose_kernels(run.isa);
  const std::vector<std::int64_t> upper = histogram(difference, kernels, run.threads);
  const Cut outer = find_cut(difference, kernels, run.threads, upper, first);
  const Cut inner = find_cut(difference, kernels, run.threads, upper, first + count);
  std::vector<Kept> sums(static_cast<std::size_t>(tasks_of(difference.length, kTask)));
  each_chunk(difference, kernels, run.threads,
             [&](int, std::int64_t task, std::int64_t at, std::int64_t length, const float* values) {
               Marks kept;
               // Where a cut lies within the chunk, its two parts have limits of their own.
               std::int64_t begin = 0;
               while (begin < length) {
                 std::int64_t end = length;
                 for (const Cut& cut : {outer, inner}) {
                   if (cut.splits(at + begin, at + end)) end = cut.index - at;
                 }
                 kernels.loops.keep_between(values + begin, end - begin, inner.limit(at + end),
                                            outer.limit(at + end), kept.data() + begin);
                 begin = end;
               }
               store_mask(kernels, values, kept, at, length, mask, sums[static_cast<std::size_t>(task)]);
             });
  return total(sums);
}

Kept keep_drawn(const Difference& difference, const Draw& key, std::uint32_t threshold, std::uint8_t* mask,
                const Run& run) {
  check(difference, run);
  const Kernels& kernels = choose_kernels(run.isa);
  Marks thresholds;
  thresholds.fill(threshold);
  std::vector<Kept> sums(static_cast<std::size_t>(tasks_of(difference.length, kTask)));
  each_chunk(difference, kernels, run.threads,
             [&](int, std::int64_t task, std::int64_t at, std::int64_t length, const float* values) {
               Marks numbers, kept;
               draw(kernels, key, at, length, numbers.data());
               kernels.loops.keep_below(numbers.data(), thresholds.data(), length, kept.data());
               store_mask(kernels, values, kept, at, length, mask, sums[static_cast<std::size_t>(task)]);
             });
  return total(sums);
}

Kept keep_ranked(const Difference& difference, std::int64_t columns, const Draw& key, float low, float rise,
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
  std::vector<std::uint32_t> by_rank(static_cast<std::size_t>(columns));
  for (std::size_t rank = 0; rank < by_rank.size(); ++rank) {
    const float share = static_cast<float>(rank) / steps;
    by_rank[rank] = static_cast<std::uint32_t>(std::lrint((low + share * rise) * 0x1p24f));
  }
  std::vector<Kept> sums(static_cast<std::size_t>(tasks));
  parallel_for(run.threads, tasks, [&](int, std::int64_t task) {
    const std::int64_t start = task * task_rows * columns;
    const std::int64_t end = std::min(difference.length, start + task_rows * columns);
    RankedRow ranked(kernels, by_rank);
    std::vector<float> values(static_cast<std::size_t>(end - start));
    std::vector<std::uint32_t> numbers(values.size()), thresholds(values.size());
    for (std::int64_t at = start; at < end; at += kChunk) {
      load(kernels, difference.model, difference.base, at, std::min(kChunk, end - at),
           values.data() + (at - start));
    }
    draw(kernels, key, start, end - start, numbers.data());
    for (std::int64_t row = 0; row < end - start; row += columns) {
      ranked.thresholds(values.data() + row, numbers.data() + row, thresholds.data() + row);
    }
    for (std::int64_t at = start; at < end; at += kChunk) {
      const std::int64_t count = std::min(kChunk, end - at), place = at - start;
      Marks kept;
      kernels.loops.keep_below(numbers.data() + place, thresholds.data() + place, count, kept.data());
      store_mask(kernels, values.data() + place, kept, at, count, mask, sums[static_cast<std::size_t>(task)]);
    }
  });
  return total(sums);
}

}  // namespace paretofuse
