// What is made of the elements that are kept, and inner products of differences.
#include "core/methods.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/chunks.h"
#include "core/dispatch.h"
#include "core/parallel.h"

namespace paretofuse {
namespace {

// For each byte of a mask, all ones or zeros for each of its elements.
struct Spread {
  std::uint32_t bits[256][8];
};

const Spread& spread() {
  static const Spread table = [] {
    Spread made{};
    for (unsigned byte = 0; byte < 256; ++byte) {
      for (unsigned bit = 0; bit < 8; ++bit) made.bits[byte][bit] = (byte >> bit & 1u) != 0 ? ~0u : 0u;
    }
    return made;
  }();
  return table;
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
void add_up(const Loops& loops, const std::vector<Share>& shares, const Rule& rule, std::int64_t count,
            Workspace& work) {
  work.sum.fill(0.0f);
  for (const Chunk& own : work.weighted) loops.add(work.sum.data(), own.data(), count);
  work.divisor.fill(0.0f);
  if (rule.elects) {
    const Chunk elected = work.sum;
    work.sum.fill(0.0f);
    for (std::size_t k = 0; k < shares.size(); ++k) {
      loops.add_elected(work.weighted[k].data(), elected.data(), shares[k].weight, count, work.sum.data(),
                        work.divisor.data());
    }
  } else {
    float weights = 0.0f;
    for (const Share& share : shares) weights += share.weight;
    work.divisor.fill(std::abs(weights) < 1e-8f ? 1.0f : weights);
  }
  if (rule.normalizes) loops.divide(work.sum.data(), work.divisor.data(), count);
}

}  // namespace

void merge_differences(const Numbers& base, const std::vector<Share>& shares, const Rule& rule,
                       std::int64_t length, void* out, DType out_dtype, const Run& run) {
  check_numbers(base, "base");
  for (const Share& share : shares) check_numbers(share.model, "model");
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
      widen(kernels, base, at, count, work.base.data());
      for (std::size_t k = 0; k < shares.size(); ++k) {
        const Share& own = shares[k];
        float* values = work.weighted[k].data();
        widen(kernels, own.model, at, count, values);
        kernels.loops.weigh(values, work.base.data(), own.mask == nullptr ? nullptr : own.mask + at / 8,
                            spread().bits, own.scale, own.weight, count);
      }
      add_up(kernels.loops, shares, rule, count, work);
      kernels.loops.finish(work.sum.data(), work.base.data(), rule.lambda, count);
      auto* to = static_cast<std::byte*>(out) + at * item_size(out_dtype);
      round(reinterpret_cast<const std::byte*>(work.sum.data()), nullptr, nullptr, 0, 0, count, to);
    }
  });
}

void products(const Numbers& base, const std::vector<Numbers>& models, std::int64_t length,
              std::int64_t columns, double* result, const Run& run) {
  for (const Numbers& model : models) check_numbers(model, "model");
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
            sums[a * count + b] += kernels.loops.product(values[a].data(), values[b].data(), n);
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
