// Merging on the CPU: out = base + sum over experts of weight * delta, for a whole model in one pass.
//
// All functions here give the same bits whatever the number of threads, and, for numbers other than NaN,
// whatever the instruction set: products and sums are rounded to float32 one by one, in the order of the
// experts, and the result is rounded once to the output type, to nearest even.
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

// One tensor of the model, as a run of `length` elements.
struct Segment {
  const void* base;
  std::int64_t length;
  std::int64_t row;  // row of the weights that applies to this tensor
  DType base_dtype;
  DType delta_dtype;
  DType out_dtype;
};

class PARETOFUSE_API MergePlan {
 public:
  // deltas: segments.size() * experts addresses, segment by segment; null: this expert leaves the tensor
  // unchanged. row_count: rows of the weights that `run` will be given.
  MergePlan(std::vector<Segment> segments, std::vector<const void*> deltas, std::int64_t experts,
            std::int64_t row_count);

  // Writes out[k * segments + s] for every preference k and segment s. An expert whose weight is exactly zero
  // is skipped, so zero weights give back the base bit for bit.
  //
  // weights: [preferences, row_count, experts], dense.   out: [preferences, segments] addresses; no output
  // may overlap an input or another output.   isa: see chosen_isa. Returns the name of the instruction set
  // that did the work.
  const char* run(const float* weights, std::int64_t preferences, void* const* out, int threads,
                  const std::string& isa = {}) const;

  std::int64_t segment_count() const { return static_cast<std::int64_t>(segments_.size()); }
  std::int64_t experts() const { return experts_; }
  std::int64_t row_count() const { return row_count_; }

 private:
  // A run of elements of one segment, small enough that sharing runs out evenly keeps all threads busy.
  struct Piece {
    std::int64_t segment;
    std::int64_t begin;
    std::int64_t count;
  };
  struct Scratch;

  void check_outputs(void* const* out, std::int64_t preferences) const;
  void merge_piece(const Piece& piece, const float* weights, std::int64_t preferences, void* const* out,
                   const struct Kernels& kernels, Scratch& scratch) const;

  std::vector<Segment> segments_;
  std::vector<const void*> deltas_;
  std::vector<Piece> pieces_;
  std::vector<std::int64_t>
      chunks_;  // first piece of each chunk of work, and the number of pieces at the end
  std::int64_t experts_;
  std::int64_t row_count_;
};

// result[e] = sum over i of grad[i] * delta[e][i], for one tensor. grad is read once. Null deltas give 0.
// Sums run in float32 over 128 products at most and in float64 from there on, in a fixed order.
// result: [experts].   Returns the name of the instruction set that did the work.
PARETOFUSE_API const char* inner(const void* grad, DType grad_dtype, const void* const* deltas,
                                 DType delta_dtype, std::int64_t experts, std::int64_t length, double* result,
                                 int threads, const std::string& isa = {});

// A copy with the same stores and the same threads as the merge: the yardstick for its speed.
PARETOFUSE_API const char* copy(void* dst, const void* src, std::int64_t nbytes, int threads,
                                const std::string& isa = {});

}  // namespace paretofuse
