#include "paretofuse/merge.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <utility>

#include "core/dispatch.h"
#include "core/parallel.h"

namespace paretofuse {
namespace {

// Elements of one piece and of one chunk of work: large against the cost of handing it out, small against a
// model. A multiple of kStep and of a cache line, so that pieces of an aligned output are aligned.
constexpr std::int64_t kPiece = 1 << 16;

// With several preferences, elements taken at a time: the experts' deltas for them stay in the second-level
// cache.
constexpr std::int64_t kBlock = 4096;

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

std::string at_segment(std::int64_t s) { return " of segment " + std::to_string(s); }

bool overlap(const void* a, std::int64_t a_bytes, const void* b, std::int64_t b_bytes) {
  const auto first = reinterpret_cast<std::uintptr_t>(a);
  const auto second = reinterpret_cast<std::uintptr_t>(b);
  return first < second + static_cast<std::uintptr_t>(b_bytes) &&
         second < first + static_cast<std::uintptr_t>(a_bytes);
}

}  // namespace

struct MergePlan::Scratch {
  std::vector<const std::byte*> deltas;  // of the experts with a delta and a non-zero weight
  std::vector<float> weights;
};

MergePlan::MergePlan(std::vector<Segment> segments, std::vector<const void*> deltas, std::int64_t experts,
                     std::int64_t row_count)
    : segments_(std::move(segments)), deltas_(std::move(deltas)), experts_(experts), row_count_(row_count) {
  if (experts < 1) fail("experts: got " + std::to_string(experts) + ", expected at least 1");
  if (row_count < 1) fail("row_count: got " + std::to_string(row_count) + ", expected at least 1");
  if (deltas_.size() % static_cast<std::size_t>(experts) != 0 ||
      deltas_.size() / static_cast<std::size_t>(experts) != segments_.size()) {
    fail("deltas: got " + std::to_string(deltas_.size()) + " addresses, expected " +
         std::to_string(segments_.size()) + " segments x " + std::to_string(experts) + " experts");
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
    for (const DType dtype : {segment.base_dtype, segment.delta_dtype, segment.out_dtype}) {
      if (static_cast<int>(dtype) >= kDTypes) fail("dtype" + at_segment(s) + ": unknown");
    }
    for (std::int64_t begin = 0; begin < segment.length; begin += kPiece) {
      const std::int64_t count = std::min(kPiece, segment.length - begin);
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
      const std::string where = "out" + at_segment(s) + ", preference " + std::to_string(k);
      if (target == nullptr) fail(where + ": got a null address");
      const std::int64_t bytes = segment.length * item_size(segment.out_dtype);
      bool clash = overlap(target, bytes, segment.base, segment.length * item_size(segment.base_dtype));
      for (std::int64_t e = 0; e < experts_; ++e) {
        const void* delta = deltas_[static_cast<std::size_t>(s * experts_ + e)];
        clash |= delta != nullptr &&
                 overlap(target, bytes, delta, segment.length * item_size(segment.delta_dtype));
      }
      if (clash) fail(where + ": overlaps the base or a delta; merges need memory of their own");
    }
  }
}

void MergePlan::merge_piece(const Piece& piece, const float* weights, std::int64_t preferences,
                            void* const* out, const Kernels& kernels, Scratch& scratch) const {
  const Segment& segment = segments_[static_cast<std::size_t>(piece.segment)];
  const void* const* deltas = deltas_.data() + piece.segment * experts_;
  const auto* base = static_cast<const std::byte*>(segment.base);
  const MergeFn merge =
      kernels.merge[static_cast<int>(segment.base_dtype)][static_cast<int>(segment.delta_dtype)]
                   [static_cast<int>(segment.out_dtype)];
  const std::int64_t block = preferences == 1 ? piece.count : kBlock;
  for (std::int64_t done = 0; done < piece.count; done += block) {
    const std::int64_t begin = piece.begin + done;
    const std::int64_t count = std::min(block, piece.count - done);
    for (std::int64_t k = 0; k < preferences; ++k) {
      const float* row = weights + (k * row_count_ + segment.row) * experts_;
      std::int64_t active = 0;
      for (std::int64_t e = 0; e < experts_; ++e) {
        if (row[e] == 0.0f || deltas[e] == nullptr) continue;
        scratch.deltas[static_cast<std::size_t>(active)] = static_cast<const std::byte*>(deltas[e]);
        scratch.weights[static_cast<std::size_t>(active)] = row[e];
        ++active;
      }
      auto* target = static_cast<std::byte*>(out[k * segment_count() + piece.segment]);
      if (active == 0 && segment.base_dtype == segment.out_dtype) {
        // Bit for bit: arithmetic would alter signalling NaNs.
        const std::int64_t size = item_size(segment.base_dtype);
        kernels.copy(target + begin * size, base + begin * size, count * size);
      } else {
        merge(base, scratch.deltas.data(), scratch.weights.data(), active, begin, count, target);
      }
    }
  }
}

const char* MergePlan::run(const float* weights, std::int64_t preferences, void* const* out, int threads,
                           const std::string& isa) const {
  if (preferences < 1)
    fail("weights: got " + std::to_string(preferences) + " preferences, expected at least 1");
  check_threads(threads);
  check_outputs(out, preferences);
  const Kernels& kernels = choose_kernels(isa);
  const auto chunk_count = static_cast<std::int64_t>(chunks_.size()) - 1;
  const auto width = static_cast<std::size_t>(experts_);
  std::vector<Scratch> scratch(static_cast<std::size_t>(std::min<std::int64_t>(threads, chunk_count) + 1),
                               Scratch{std::vector<const std::byte*>(width), std::vector<float>(width)});
  parallel_for(threads, chunk_count, [&](int thread, std::int64_t chunk) {
    const auto c = static_cast<std::size_t>(chunk);
    for (std::int64_t p = chunks_[c]; p < chunks_[c + 1]; ++p) {
      merge_piece(pieces_[static_cast<std::size_t>(p)], weights, preferences, out, kernels,
                  scratch[static_cast<std::size_t>(thread)]);
    }
  });
  return kernels.name;
}

}  // namespace paretofuse
