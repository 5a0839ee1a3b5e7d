#include "paretofuse/merge.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <utility>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/planes.h"

namespace paretofuse {
namespace {

// Elements of one piece and of one chunk of work: large against the cost of handing it out, small against a
// model. A multiple of kStep and of a cache line, so that pieces of an aligned output are aligned.
constexpr std::int64_t kPiece = 1 << 16;

// With several preferences, elements taken at a time: the planes' data for them stay in the second-level
// cache.
constexpr std::int64_t kBlock = 4096;

// Rows of a piece with low-rank planes, at least: each reads the right factors anew.
constexpr std::int64_t kRows = 16;

// Floats of the right factors of all low-rank planes that are kept in the first-level cache while the rows of
// a piece pass by: half of it.
constexpr std::int64_t kStrip = 4096;

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

std::string at_segment(std::int64_t s) { return " of segment " + std::to_string(s); }

std::string at_output(std::int64_t s, std::int64_t k) {
  return "out" + at_segment(s) + ", preference " + std::to_string(k);
}

bool overlap(const void* a, std::int64_t a_bytes, const void* b, std::int64_t b_bytes) {
  const auto first = reinterpret_cast<std::uintptr_t>(a);
  const auto second = reinterpret_cast<std::uintptr_t>(b);
  return first < second + static_cast<std::uintptr_t>(b_bytes) &&
         second < first + static_cast<std::uintptr_t>(a_bytes);
}

// Of a table that may be null.
const float* at(const float* const* table, std::int64_t i) { return table != nullptr ? table[i] : nullptr; }

// Columns that are summed up in floats where columns have coefficients: reading and writing take turns so
// often that neither waits for the other.
constexpr std::int64_t kColumns = 512;

// Columns that are merged together where the low-rank planes have this rank: whole steps.
std::int64_t strip_width(std::int64_t rank) { return std::max(kStep, kStrip / rank / kStep * kStep); }

// A row of a low-rank plane's B times its weight; returns where it ends.
float* widen_left(const Plane& plane, std::int64_t row, float weight, const Kernels& kernels, float* left) {
  const auto* from = static_cast<const std::byte*>(plane.factors) + row * plane.size * item_size(plane.dtype);
  kernels.widen[static_cast<int>(plane.dtype)](from, plane.size, left);
  for (std::int64_t r = 0; r < plane.size; ++r) *left++ *= weight;
  return left;
}

// `width` of the columns of its A; returns where they end.
float* widen_right(const Plane& plane, std::int64_t columns, std::int64_t first, std::int64_t width,
                   const Kernels& kernels, float* right) {
  for (std::int64_t r = 0; r < plane.size; ++r, right += width) {
    const auto* from =
        static_cast<const std::byte*>(plane.values) + (r * columns + first) * item_size(plane.dtype);
    kernels.widen[static_cast<int>(plane.dtype)](from, width, right);
  }
  return right;
}

}  // namespace

// What one call of `run` reads and writes.
struct MergePlan::Target {
  const float* weights;
  const float* const* row_weights;     // or null
  const float* const* column_weights;  // or null
  std::int64_t preferences;
  void* const* out;
  const Kernels& kernels;
};

struct MergePlan::Scratch {
  std::vector<Term> terms;                   // of the planes with a coefficient, low-rank ones left out
  std::vector<float> weights;                // theirs; of a tile [rows, terms]
  std::vector<float> left;                   // [rows of a piece, rank]
  std::vector<float> right;                  // [rank, strip]
  std::vector<float> sums;                   // [strip], where columns have coefficients
  std::vector<const float*> column_weights;  // of the terms, from a strip's first column on
};

MergePlan::MergePlan(std::vector<Segment> segments, std::vector<Plane> planes, std::int64_t plane_count,
                     std::int64_t row_count)
    : segments_(std::move(segments)),
      planes_(std::move(planes)),
      plane_count_(plane_count),
      row_count_(row_count) {
  if (plane_count < 1) fail("plane_count: got " + std::to_string(plane_count) + ", expected at least 1");
  if (row_count < 1) fail("row_count: got " + std::to_string(row_count) + ", expected at least 1");
  if (planes_.size() % static_cast<std::size_t>(plane_count) != 0 ||
      planes_.size() / static_cast<std::size_t>(plane_count) != segments_.size()) {
    fail("planes: got " + std::to_string(planes_.size()) + ", expected " + std::to_string(segments_.size()) +
         " segments x " + std::to_string(plane_count));
  }
  std::int64_t filled = kPiece;  // elements in the last chunk; full, so that the first piece opens one
  for (std::int64_t s = 0; s < segment_count(); ++s) {
    const Segment& segment = segments_[static_cast<std::size_t>(s)];
    if (segment.length < 0 || segment.length > std::numeric_limits<std::int64_t>::max() / 8) {
      fail("length" + at_segment(s) + ": got " + std::to_string(segment.length) +
           ", expected 0 or more elements");
    }
    if (segment.row < 0 || segment.row >= row_count) {
      fail("row" + at_segment(s) + ": got " + std::to_string(segment.row) + ", expected 0 to " +
           std::to_string(row_count - 1));
    }
    if (segment.base == nullptr && segment.length > 0) fail("base" + at_segment(s) + ": got a null address");
    for (const DType dtype : {segment.base_dtype, segment.out_dtype}) {
      if (static_cast<int>(dtype) >= kDTypes) fail("dtype" + at_segment(s) + ": unknown");
    }
    std::int64_t rank = 0;
    for (std::int64_t p = 0; p < plane_count; ++p) {
      const Plane& plane = planes_[static_cast<std::size_t>(s * plane_count + p)];
      check_plane(plane, segment.length, segment.columns, " of plane " + std::to_string(p) + at_segment(s));
      if (plane.values != nullptr && plane.format == Format::LowRank) rank += plane.size;
    }
    ranks_.push_back(rank);
    const std::int64_t size =
        rank == 0 ? kPiece : segment.columns * std::max(kRows, kPiece / segment.columns);
    for (std::int64_t begin = 0; begin < segment.length; begin += size) {
      const std::int64_t count = std::min(size, segment.length - begin);
      if (filled + count > kPiece) {
        chunks_.push_back(static_cast<std::int64_t>(pieces_.size()));
        filled = 0;
      }
      pieces_.push_back({s, begin, count});
      filled += count;
    }
  }
  chunks_.push_back(static_cast<std::int64_t>(pieces_.size()));
}

void MergePlan::check_outputs(void* const* out, std::int64_t preferences) const {
  for (std::int64_t k = 0; k < preferences; ++k) {
    for (std::int64_t s = 0; s < segment_count(); ++s) {
      const Segment& segment = segments_[static_cast<std::size_t>(s)];
      if (segment.length == 0) continue;
      const void* target = out[k * segment_count() + s];
      if (target == nullptr) fail(at_output(s, k) + ": got a null address");
      const std::int64_t bytes = segment.length * item_size(segment.out_dtype);
      bool clash = overlap(target, bytes, segment.base, segment.length * item_size(segment.base_dtype));
      for (std::int64_t p = 0; p < plane_count_; ++p) {
        const Plane& plane = planes_[static_cast<std::size_t>(s * plane_count_ + p)];
        if (plane.values == nullptr) continue;
        clash |= overlap(target, bytes, plane.values, values_size(plane, segment.length, segment.columns));
        clash |= overlap(target, bytes, plane.factors, factors_size(plane, segment.length, segment.columns));
      }
      if (clash) fail(at_output(s, k) + ": overlaps the base or a plane; merges need memory of their own");
    }
  }
}

// A run of one tensor whose coefficients are the same for all of it: the weights, and those of the row that
// it lies in where rows have some.
void MergePlan::merge_run(const Piece& run, const Target& target, std::int64_t k, Scratch& scratch) const {
  const Segment& segment = segments_[static_cast<std::size_t>(run.segment)];
  const Plane* planes = planes_.data() + run.segment * plane_count_;
  const float* weights = target.weights + (k * row_count_ + segment.row) * plane_count_;
  const float* rows = at(target.row_weights, k * segment_count() + run.segment);
  const std::int64_t row_count = rows != nullptr ? segment.length / segment.columns : 0;
  std::int64_t active = 0;
  Kind kind = Kind::F32;
  for (std::int64_t p = 0; p < plane_count_; ++p) {
    const float weight =
        rows != nullptr ? weights[p] + rows[p * row_count + run.begin / segment.columns] : weights[p];
    if (weight == 0.0f || planes[p].values == nullptr) continue;
    const Term term = term_of(planes[p]);
    kind = active == 0 || term.kind == kind ? term.kind : Kind::Mixed;
    scratch.terms[static_cast<std::size_t>(active)] = term;
    scratch.weights[static_cast<std::size_t>(active)] = weight;
    ++active;
  }
  const auto* base = static_cast<const std::byte*>(segment.base);
  auto* out = static_cast<std::byte*>(target.out[k * segment_count() + run.segment]);
  if (active == 0 && segment.base_dtype == segment.out_dtype) {
    // Bit for bit: arithmetic would alter signalling NaNs.
    const std::int64_t size = item_size(segment.base_dtype);
    target.kernels.copy(out + run.begin * size, base + run.begin * size, run.count * size);
  } else {
    target.kernels.merge[static_cast<int>(segment.base_dtype)][static_cast<int>(kind)][static_cast<int>(
        segment.out_dtype)](base, scratch.terms.data(), scratch.weights.data(), active, run.begin, run.count,
                            out);
  }
}

// Whole rows of a tensor, or a part of one row, where planes are of low rank or columns have coefficients.
// All low-rank planes together are one product of a left factor, into which the coefficients are folded, and
// a right factor, of which a strip of columns stays in the first-level cache for all rows. Coefficients k of
// columns make it [w B, B] times [A, A k]: four operations for each product, where (w + k) B A would take
// three, but in the kernel that there is. What the other planes add is summed up in floats before, row by
// row.
void MergePlan::merge_tiles(const Piece& piece, const Target& target, std::int64_t k,
                            Scratch& scratch) const {
  const Segment& segment = segments_[static_cast<std::size_t>(piece.segment)];
  const Plane* planes = planes_.data() + piece.segment * plane_count_;
  const float* weights = target.weights + (k * row_count_ + segment.row) * plane_count_;
  const float* row_weights = at(target.row_weights, k * segment_count() + piece.segment);
  const float* column_weights = at(target.column_weights, k * segment_count() + piece.segment);
  const std::int64_t columns = segment.columns;
  const std::int64_t first_column = piece.begin % columns;
  const std::int64_t end_column = std::min(columns, first_column + piece.count);
  const std::int64_t rows = piece.count / (end_column - first_column);
  const std::int64_t first = piece.begin / columns;
  const auto coefficient = [&](std::int64_t p, std::int64_t row) {
    return row_weights != nullptr ? weights[p] + row_weights[p * (segment.length / columns) + first + row]
                                  : weights[p];
  };
  const auto is_active = [&](std::int64_t p) {
    return planes[p].values != nullptr &&
           (row_weights != nullptr || column_weights != nullptr || weights[p] != 0.0f);
  };
  std::int64_t rank = 0;
  std::int64_t count = 0;
  for (std::int64_t p = 0; p < plane_count_; ++p) {
    if (!is_active(p)) continue;
    if (planes[p].format == Format::LowRank) {
      rank += column_weights != nullptr ? 2 * planes[p].size : planes[p].size;
    } else {
      scratch.terms[static_cast<std::size_t>(count++)] = term_of(planes[p]);
    }
  }
  if (rank == 0 && row_weights == nullptr && (column_weights == nullptr || count == 0))
    return merge_run(piece, target, k, scratch);

  float* left = scratch.left.data();
  float* own = scratch.weights.data();
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t p = 0; p < plane_count_; ++p) {
      if (!is_active(p)) continue;
      const float weight = coefficient(p, row);
      if (planes[p].format != Format::LowRank) {
        *own++ = weight;
        continue;
      }
      left = widen_left(planes[p], first + row, weight, target.kernels, left);
      if (column_weights != nullptr) left = widen_left(planes[p], first + row, 1.0f, target.kernels, left);
    }
  }
  const MergeTileFn merge =
      target.kernels.merge_tile[static_cast<int>(segment.base_dtype)][static_cast<int>(segment.out_dtype)];
  // The same from sums that are floats already.
  const MergeTileFn finish =
      target.kernels.merge_tile[static_cast<int>(DType::F32)][static_cast<int>(segment.out_dtype)];
  const auto* base = static_cast<const std::byte*>(segment.base);
  auto* out = static_cast<std::byte*>(target.out[k * segment_count() + piece.segment]);
  std::int64_t strip = strip_width(std::max<std::int64_t>(1, rank));
  if (column_weights != nullptr) strip = std::min(kColumns, strip);
  for (std::int64_t column = first_column; column < end_column; column += strip) {
    const std::int64_t width = std::min(strip, end_column - column);
    float* right = scratch.right.data();
    std::size_t term = 0;
    for (std::int64_t p = 0; p < plane_count_; ++p) {
      if (!is_active(p)) continue;
      const float* by_column = column_weights != nullptr ? column_weights + p * columns + column : nullptr;
      if (planes[p].format != Format::LowRank) {
        scratch.column_weights[term++] = by_column;
        continue;
      }
      right = widen_right(planes[p], columns, column, width, target.kernels, right);
      if (by_column == nullptr) continue;
      for (std::int64_t r = 0; r < planes[p].size; ++r, right += width) {
        const float* shared = right - planes[p].size * width;
        for (std::int64_t c = 0; c < width; ++c) right[c] = shared[c] * by_column[c];
      }
    }
    const std::int64_t begin = piece.begin + column - first_column;
    if (column_weights == nullptr || count == 0) {
      merge(base, scratch.terms.data(), scratch.weights.data(), count,
            LowRank{scratch.left.data(), scratch.right.data(), rank, width},
            Tile{begin, rows, columns, width}, out);
      continue;
    }
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t at = begin + row * columns;
      float* sums = scratch.sums.data();
      target.kernels.add_weighted(base + at * item_size(segment.base_dtype), segment.base_dtype,
                                  scratch.terms.data(), scratch.weights.data() + row * count,
                                  scratch.column_weights.data(), count, at, width, sums);
      finish(reinterpret_cast<const std::byte*>(sums), nullptr, nullptr, 0,
             LowRank{scratch.left.data() + row * rank, scratch.right.data(), rank, width},
             Tile{0, 1, width, width}, out + at * item_size(segment.out_dtype));
    }
  }
}

void MergePlan::merge_piece(const Piece& piece, const Target& target, Scratch& scratch) const {
  const Segment& segment = segments_[static_cast<std::size_t>(piece.segment)];
  const auto by_column = [&](std::int64_t k) {
    return at(target.column_weights, k * segment_count() + piece.segment) != nullptr;
  };
  const std::int64_t columns = segment.columns;
  const std::int64_t end = piece.begin + piece.count;
  const bool low_rank = ranks_[static_cast<std::size_t>(piece.segment)] > 0;
  std::int64_t rest = 0;
  for (std::int64_t k = 0; k < target.preferences; ++k) {
    if (!low_rank && !by_column(k)) {
      ++rest;
      continue;
    }
    for (std::int64_t begin = piece.begin; begin < end;) {
      // Pieces with low-rank planes are whole rows. Others go row by row, in the order of memory.
      const std::int64_t count = low_rank ? piece.count : std::min(end - begin, columns - begin % columns);
      merge_tiles({piece.segment, begin, count}, target, k, scratch);
      begin += count;
    }
  }
  if (rest == 0) return;
  const std::int64_t block = target.preferences == 1 ? piece.count : kBlock;
  for (std::int64_t first = piece.begin; first < end; first += block) {
    const std::int64_t last = std::min(end, first + block);
    for (std::int64_t k = 0; k < target.preferences; ++k) {
      if (by_column(k)) continue;
      const bool by_row = at(target.row_weights, k * segment_count() + piece.segment) != nullptr;
      for (std::int64_t begin = first; begin < last;) {
        const std::int64_t stop =
            by_row ? std::min(last, (begin / segment.columns + 1) * segment.columns) : last;
        merge_run({piece.segment, begin, stop - begin}, target, k, scratch);
        begin = stop;
      }
    }
  }
}

const char* MergePlan::run(const float* weights, std::int64_t preferences, void* const* out, int threads,
                           const std::string& isa, const float* const* row_weights,
                           const float* const* column_weights) const {
  if (preferences < 1)
    fail("weights: got " + std::to_string(preferences) + " preferences, expected at least 1");
  check_threads(threads);
  check_outputs(out, preferences);
  for (std::int64_t i = 0; i < preferences * segment_count(); ++i) {
    const Segment& segment = segments_[static_cast<std::size_t>(i % segment_count())];
    if (at(row_weights, i) != nullptr || at(column_weights, i) != nullptr)
      check_columns(segment.length, segment.columns, at_segment(i % segment_count()));
  }
  const Target target{weights, row_weights, column_weights, preferences, out, choose_kernels(isa)};
  const auto chunk_count = static_cast<std::int64_t>(chunks_.size()) - 1;
  std::int64_t own = plane_count_;
  std::int64_t left = 0;
  std::int64_t right = 0;
  for (const Piece& piece : pieces_) {
    const std::int64_t rank = ranks_[static_cast<std::size_t>(piece.segment)];
    if (rank == 0 && column_weights == nullptr) continue;
    const std::int64_t all = column_weights != nullptr ? 2 * rank : rank;
    const std::int64_t columns = segments_[static_cast<std::size_t>(piece.segment)].columns;
    const std::int64_t rows = rank > 0 ? piece.count / columns : 1;
    own = std::max(own, rows * plane_count_);
    left = std::max(left, rows * all);
    right = std::max({right, all * kStep, kStrip});
  }
  const Scratch empty{std::vector<Term>(static_cast<std::size_t>(plane_count_)),
                      std::vector<float>(static_cast<std::size_t>(own)),
                      std::vector<float>(static_cast<std::size_t>(left)),
                      std::vector<float>(static_cast<std::size_t>(right)),
                      std::vector<float>(static_cast<std::size_t>(column_weights != nullptr ? kColumns : 0)),
                      std::vector<const float*>(static_cast<std::size_t>(plane_count_))};
  std::vector<Scratch> scratch(static_cast<std::size_t>(std::min<std::int64_t>(threads, chunk_count) + 1),
                               empty);
  parallel_for(threads, chunk_count, [&](int thread, std::int64_t chunk) {
    const auto c = static_cast<std::size_t>(chunk);
    for (std::int64_t p = chunks_[c]; p < chunks_[c + 1]; ++p) {
      merge_piece(pieces_[static_cast<std::size_t>(p)], target, scratch[static_cast<std::size_t>(thread)]);
    }
  });
  return target.kernels.name;
}

}  // namespace paretofuse
