// Inner products of a gradient with the deltas, and the plain copy.
#include <algorithm>
#include <cstddef>
#include <stdexcept>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/planes.h"
#include "paretofuse/merge.h"

namespace paretofuse {
namespace {

// Elements whose products are summed in float32: the gradient's block stays in the first-level cache for all
// experts.
constexpr std::int64_t kBlock = 128 * kStep;

constexpr std::int64_t kBlocksPerTask = 16;

constexpr std::int64_t kCopyTask = 1 << 18;  // bytes

// Of sums by column: columns and rows that are worked on together, whose gradient as floats stays in the
// second-level cache for all planes; and how many parts the rows of a tensor are cut into, so that narrow
// ones have work for many threads.
constexpr std::int64_t kColumns = 512;
constexpr std::int64_t kColumnRows = 64;
constexpr std::int64_t kParts = 16;

// Ranks of a low-rank plane that are multiplied together there.
constexpr std::int64_t kRanks = 8;

// Rows whose products with one row of a low-rank plane's right factor are taken together.
constexpr std::int64_t kRows = 8;

void check(const void* grad, DType grad_dtype, const Plane* planes, std::int64_t count, std::int64_t length,
           std::int64_t columns, int threads) {
  if (count < 1)
    throw std::invalid_argument("planes: got " + std::to_string(count) + ", expected at least 1");
  if (length < 0)
    throw std::invalid_argument("length: got " + std::to_string(length) + ", expected 0 or more");
  if (grad == nullptr && length > 0) throw std::invalid_argument("grad: got a null address");
  if (static_cast<int>(grad_dtype) >= kDTypes) throw std::invalid_argument("dtype: unknown");
  for (std::int64_t p = 0; p < count; ++p) {
    check_plane(planes[p], length, columns, " of plane " + std::to_string(p));
  }
  check_threads(threads);
}

// The gradient of one tensor, ready for products with its planes.
struct Gradient {
  const std::byte* values;
  DType dtype;
  std::int64_t columns;
  const Kernels& kernels;

  double dot(const Term& term, std::int64_t begin, std::int64_t count) const {
    const DotFn dot = kernels.dot[static_cast<int>(dtype)][static_cast<int>(term.kind)];
    double sum = 0.0;
    for (std::int64_t done = 0; done < count; done += kBlock) {
      sum += dot(values, term, begin + done, std::min(kBlock, count - done));
    }
    return sum;
  }

  // result[i] = <gradient, plane> in row first + i.
  void dot_rows(const Plane& plane, std::int64_t first, std::int64_t rows, double* result) const {
    if (plane.format != Format::LowRank) {
      for (std::int64_t i = 0; i < rows; ++i) result[i] = dot(term_of(plane), (first + i) * columns, columns);
      return;
    }
    std::fill(result, result + rows, 0.0);
    for (std::int64_t r = 0; r < plane.size; ++r) {
      const auto* right = static_cast<const std::byte*>(plane.values) + r * columns * item_size(plane.dtype);
      for (std::int64_t i = 0; i < rows; ++i) {
        const Gradient row{values + (first + i) * columns * item_size(dtype), dtype, columns, kernels};
        const double left = float_at(plane.factors, plane.dtype, (first + i) * plane.size + r);
        result[i] += left * row.dot({right, nullptr, 0, static_cast<Kind>(plane.dtype)}, 0, columns);
      }
    }
  }
};

// One thread's memory for sums by column.
struct ColumnScratch {
  float grad[kColumnRows * kColumns];  // [rows, width]
  float sums[kColumns];
  float left[kRanks * kColumnRows];  // of B^T
  float zeros[kRanks * kColumns] = {};
  // Off the cache lines by one element, so that the merge does not stream to what is read again at once.
  alignas(64) float product[1 + kRanks * kColumns];
};

// Some rows and columns of a tensor, at most kColumnRows and kColumns.
struct Window {
  std::int64_t row;
  std::int64_t rows;
  std::int64_t column;
  std::int64_t width;
};

// result[i] += the sum over the window's rows of grad * plane in column i.
void add_columns_of(const Plane& plane, std::int64_t columns, const Window& window, const Kernels& kernels,
                    ColumnScratch& scratch, double* result) {
  const std::int64_t width = window.width;
  if (plane.format != Format::LowRank) {
    const Term term = term_of(plane);
    const float zero = 0.0f;  // its weight, but for the gradient
    std::fill_n(scratch.sums, width, 0.0f);
    const std::int64_t bytes = values_size(plane, width, columns);
    for (std::int64_t i = 0; i < window.rows; ++i) {
      const std::int64_t at = (window.row + i) * columns + window.column;
      // A row's part is too short for the hardware to foresee the next one.
      for (std::int64_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(term.values + values_size(plane, at + columns, columns) + line);
      const float* grad = scratch.grad + i * width;
      kernels.add_weighted(reinterpret_cast<const std::byte*>(scratch.sums), DType::F32, &term, &zero, &grad,
                           1, at, width, scratch.sums);
    }
    for (std::int64_t c = 0; c < width; ++c) result[c] += static_cast<double>(scratch.sums[c]);
    return;
  }
  // A weighs B^T G, which is a merge of low-rank planes into zeros.
  for (std::int64_t first = 0; first < plane.size; first += kRanks) {
    const std::int64_t ranks = std::min(kRanks, plane.size - first);
    for (std::int64_t r = 0; r < ranks; ++r) {
      for (std::int64_t i = 0; i < window.rows; ++i) {
        scratch.left[r * window.rows + i] =
            float_at(plane.factors, plane.dtype, (window.row + i) * plane.size + first + r);
      }
    }
    float* product = scratch.product + 1;
    kernels.merge_tile[static_cast<int>(DType::F32)][static_cast<int>(DType::F32)](
        reinterpret_cast<const std::byte*>(scratch.zeros), nullptr, nullptr, 0,
        LowRank{scratch.left, scratch.grad, window.rows, width}, Tile{0, ranks, width, width},
        reinterpret_cast<std::byte*>(product));
    for (std::int64_t r = 0; r < ranks; ++r, product += width) {
      const std::int64_t at = (first + r) * columns + window.column;
      kernels.widen[static_cast<int>(plane.dtype)](
          static_cast<const std::byte*>(plane.values) + at * item_size(plane.dtype), width, scratch.sums);
      for (std::int64_t c = 0; c < width; ++c) {
        result[c] += static_cast<double>(scratch.sums[c]) * static_cast<double>(product[c]);
      }
    }
  }
}

}  // namespace

const char* inner_columns(const void* grad, DType grad_dtype, const Plane* planes, std::int64_t count,
                          std::int64_t length, std::int64_t columns, double* result, int threads,
                          const std::string& isa) {
  check_columns(length, columns, "");
  check(grad, grad_dtype, planes, count, length, columns, threads);
  const Kernels& kernels = choose_kernels(isa);
  const std::int64_t rows = length / columns;
  const std::int64_t strips = ceil_div(columns, kColumns);
  const std::int64_t part = std::max<std::int64_t>(1, ceil_div(rows, kParts * kColumnRows)) * kColumnRows;
  const std::int64_t parts = ceil_div(rows, part);
  std::vector<double> sums(static_cast<std::size_t>(parts * count * columns));  // [parts, count, columns]
  std::vector<ColumnScratch> scratch(
      static_cast<std::size_t>(std::min<std::int64_t>(threads, strips * parts)));
  parallel_for(threads, strips * parts, [&](int thread, std::int64_t task) {
    ColumnScratch& own = scratch[static_cast<std::size_t>(thread)];
    const std::int64_t column = task % strips * kColumns;
    const std::int64_t last = std::min(rows, (task / strips + 1) * part);
    Window window{task / strips * part, 0, column, std::min(kColumns, columns - column)};
    for (; window.row < last; window.row += window.rows) {
      window.rows = std::min(kColumnRows, last - window.row);
      for (std::int64_t i = 0; i < window.rows; ++i) {
        const auto* from = static_cast<const std::byte*>(grad) +
                           ((window.row + i) * columns + column) * item_size(grad_dtype);
        kernels.widen[static_cast<int>(grad_dtype)](from, window.width, own.grad + i * window.width);
      }
      for (std::int64_t p = 0; p < count; ++p) {
        if (planes[p].values == nullptr) continue;
        add_columns_of(planes[p], columns, window, kernels, own,
                       sums.data() + (task / strips * count + p) * columns + column);
      }
    }
  });
  std::fill(result, result + count * columns, 0.0);
  for (std::int64_t i = 0; i < parts * count * columns; ++i) result[i % (count * columns)] += sums[i];
  return kernels.name;
}

const char* inner_rows(const void* grad, DType grad_dtype, const Plane* planes, std::int64_t count,
                       std::int64_t length, std::int64_t columns, double* result, int threads,
                       const std::string& isa) {
  check_columns(length, columns, "");
  check(grad, grad_dtype, planes, count, length, columns, threads);
  const Gradient gradient{static_cast<const std::byte*>(grad), grad_dtype, columns, choose_kernels(isa)};
  const std::int64_t rows = length / columns;
  parallel_for(threads, ceil_div(rows, kRows), [&](int, std::int64_t task) {
    const std::int64_t first = task * kRows;
    const std::int64_t some = std::min(kRows, rows - first);
    for (std::int64_t p = 0; p < count; ++p) {
      double* own = result + p * rows + first;
      if (planes[p].values == nullptr) {
        std::fill(own, own + some, 0.0);
      } else {
        gradient.dot_rows(planes[p], first, some, own);
      }
    }
  });
  return gradient.kernels.name;
}

const char* inner(const void* grad, DType grad_dtype, const Plane* planes, std::int64_t count,
                  std::int64_t length, std::int64_t columns, double* result, int threads,
                  const std::string& isa) {
  check(grad, grad_dtype, planes, count, length, columns, threads);
  const Gradient gradient{static_cast<const std::byte*>(grad), grad_dtype, columns, choose_kernels(isa)};
  const std::int64_t blocks = ceil_div(length, kBlock);
  std::vector<double> sums(static_cast<std::size_t>(blocks * count));
  parallel_for(threads, ceil_div(blocks, kBlocksPerTask), [&](int, std::int64_t task) {
    const std::int64_t last = std::min(blocks, (task + 1) * kBlocksPerTask);
    for (std::int64_t p = 0; p < count; ++p) {
      if (planes[p].values == nullptr || planes[p].format == Format::LowRank) continue;
      const Term term = term_of(planes[p]);
      for (std::int64_t b = task * kBlocksPerTask; b < last; ++b) {
        const std::int64_t begin = b * kBlock;
        sums[static_cast<std::size_t>(b * count + p)] =
            gradient.dot(term, begin, std::min(kBlock, length - begin));
      }
    }
  });
  std::fill(result, result + count, 0.0);
  for (std::int64_t b = 0; b < blocks; ++b) {
    for (std::int64_t p = 0; p < count; ++p) result[p] += sums[static_cast<std::size_t>(b * count + p)];
  }
  for (std::int64_t p = 0; p < count; ++p) {
    if (planes[p].values == nullptr || planes[p].format != Format::LowRank || length == 0) continue;
    std::vector<double> rows(static_cast<std::size_t>(length / columns));
    inner_rows(grad, grad_dtype, &planes[p], 1, length, columns, rows.data(), threads, isa);
    for (const double row : rows) result[p] += row;
  }
  return gradient.kernels.name;
}

const char* copy(void* dst, const void* src, std::int64_t nbytes, int threads, const std::string& isa) {
  if (nbytes < 0)
    throw std::invalid_argument("nbytes: got " + std::to_string(nbytes) + ", expected 0 or more");
  if (nbytes > 0 && (dst == nullptr || src == nullptr))
    throw std::invalid_argument("dst, src: got a null address");
  check_threads(threads);
  const Kernels& kernels = choose_kernels(isa);
  parallel_for(threads, ceil_div(nbytes, kCopyTask), [&](int, std::int64_t task) {
    const std::int64_t begin = task * kCopyTask;
    kernels.copy(static_cast<std::byte*>(dst) + begin, static_cast<const std::byte*>(src) + begin,
                 std::min(kCopyTask, nbytes - begin));
  });
  return kernels.name;
}

}  // namespace paretofuse
