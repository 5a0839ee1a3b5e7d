// Merging on the CPU: out = base + sum over planes of weight * plane, for a whole model in one pass. A plane
// is what an expert adds to a tensor.
//
// All functions here give the same bits whatever the number of threads, and, for numbers other than NaN,
// whatever the instruction set: products and sums are rounded to float32 one by one, in the order of the
// planes but low-rank ones last, and the result is rounded once to the output type, to nearest even.
//
// Memory is the caller's: it must stay valid during the call. Inputs may have any alignment. Errors in the
// arguments throw std::invalid_argument before anything is written.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "paretofuse/dtype.h"
#include "paretofuse/export.h"

namespace paretofuse {

// How a plane is stored.
enum class Format : std::uint8_t { Dense = 0, Int8 = 1, Int4 = 2, LowRank = 3 };

// What one expert adds to one tensor. Which fields count depends on the format:
//   Dense    values: [length] of `dtype`.
//   Int8     values: int8 [length]; factors: float32 [ceil(length / size)], a scale for each group of `size`.
//   Int4     values: two to a byte [ceil(length / 2)], the low half first, each 8 more than its value;
//   factors,
//            size: as Int8's.
//   LowRank  B A: values: A [size, columns], factors: B [length / columns, size], both of `dtype`.
struct Plane {
  const void* values;  // null: the expert leaves the tensor unchanged
  const void* factors;
  std::int64_t size;  // elements of a group, a power of two from 32 on; or the rank
  Format format;
  DType dtype;
};

// One tensor of the model, as a run of `length` elements.
struct Segment {
  const void* base;
  std::int64_t length;
  std::int64_t row;  // row of the weights that applies to this tensor
  std::int64_t
      columns;  // elements of one of the tensor's own rows, for low-rank planes, row and column coefficients
  DType base_dtype;
  DType out_dtype;
};

class PARETOFUSE_API MergePlan {
 public:
  // planes: segments.size() * plane_count, segment by segment. row_count: rows of the weights that `run` will
  // be given.
  MergePlan(std::vector<Segment> segments, std::vector<Plane> planes, std::int64_t plane_count,
            std::int64_t row_count);

  // Writes out[k * segments + s] for every preference k and segment s. A plane whose weight is exactly zero
  // is skipped, so zero weights give back the base bit for bit.
  //
  // weights: [preferences, row_count, plane_count], dense.   out: [preferences, segments] addresses; no
  // output may overlap an input or another output.   row_weights: null, or [preferences, segments] addresses
  // of float32 [plane_count, rows of the tensor], to be added to the weights row by row; a null one adds
  // nothing.   column_weights: the same for columns, float32 [plane_count, columns], added to the sums of
  // those; planes of a tensor that has them are read whatever their weights.   isa: see chosen_isa. Returns
  // the name of the instruction set that did the work.
  const char* run(const float* weights, std::int64_t preferences, void* const* out, int threads,
                  const std::string& isa = {}, const float* const* row_weights = nullptr,
                  const float* const* column_weights = nullptr) const;

  std::int64_t segment_count() const { return static_cast<std::int64_t>(segments_.size()); }
  std::int64_t plane_count() const { return plane_count_; }
  std::int64_t row_count() const { return row_count_; }

 private:
  // A run of elements of one segment, small enough that sharing runs out evenly keeps all threads busy; whole
  // rows where a plane is of low rank.
  struct Piece {
    std::int64_t segment;
    std::int64_t begin;
    std::int64_t count;
  };
  struct Scratch;
  struct Target;

  void check_outputs(void* const* out, std::int64_t preferences) const;
  void merge_piece(const Piece& piece, const Target& target, Scratch& scratch) const;
  void merge_run(const Piece& run, const Target& target, std::int64_t k, Scratch& scratch) const;
  void merge_tiles(const Piece& piece, const Target& target, std::int64_t k, Scratch& scratch) const;

  std::vector<Segment> segments_;
  std::vector<Plane> planes_;
  std::vector<std::int64_t> ranks_;  // of each segment's low-rank planes together
  std::vector<Piece> pieces_;
  std::vector<std::int64_t>
      chunks_;  // first piece of each chunk of work, and the number of pieces at the end
  std::int64_t plane_count_;
  std::int64_t row_count_;
};

// result[p] = sum over i of grad[i] * plane_p[i], for one tensor. Null planes give 0. Sums run in float32
// over 128 products at most and in float64 from there on, in a fixed order; those of a low-rank plane are of
// each row of grad with each row of A, weighted by B. columns: as Segment's.   result: [count].   Returns the
// name of the instruction set that did the work.
PARETOFUSE_API const char* inner(const void* grad, DType grad_dtype, const Plane* planes, std::int64_t count,
                                 std::int64_t length, std::int64_t columns, double* result, int threads,
                                 const std::string& isa = {});

// The same for each row of the tensor: result[p, row], [count, length / columns].
PARETOFUSE_API const char* inner_rows(const void* grad, DType grad_dtype, const Plane* planes,
                                      std::int64_t count, std::int64_t length, std::int64_t columns,
                                      double* result, int threads, const std::string& isa = {});

// The same for each column: result[p, column], [count, columns]. Of a low-rank plane the products are of each
// column of grad with each column of B, weighted by A.
PARETOFUSE_API const char* inner_columns(const void* grad, DType grad_dtype, const Plane* planes,
                                         std::int64_t count, std::int64_t length, std::int64_t columns,
                                         double* result, int threads, const std::string& isa = {});

// A copy with the same stores and the same threads as the merge: the yardstick for its speed.
PARETOFUSE_API const char* copy(void* dst, const void* src, std::int64_t nbytes, int threads,
                                const std::string& isa = {});

}  // namespace paretofuse
