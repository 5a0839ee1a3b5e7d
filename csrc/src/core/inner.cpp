// Inner products of a gradient with the deltas, and the plain copy.
#include <algorithm>
#include <cstddef>
#include <stdexcept>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "paretofuse/merge.h"

namespace paretofuse {
namespace {

// Elements whose products are summed in float32: the gradient's block stays in the first-level cache for all
// experts.
constexpr std::int64_t kBlock = 128 * kStep;

constexpr std::int64_t kBlocksPerTask = 16;

constexpr std::int64_t kCopyTask = 1 << 18;  // bytes

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

const char* inner(const void* grad, DType grad_dtype, const void* const* deltas, DType delta_dtype,
                  std::int64_t experts, std::int64_t length, double* result, int threads,
                  const std::string& isa) {
  if (experts < 1)
    throw std::invalid_argument("experts: got " + std::to_string(experts) + ", expected at least 1");
  if (length < 0)
    throw std::invalid_argument("length: got " + std::to_string(length) + ", expected 0 or more");
  if (grad == nullptr && length > 0) throw std::invalid_argument("grad: got a null address");
  if (static_cast<int>(grad_dtype) >= kDTypes || static_cast<int>(delta_dtype) >= kDTypes) {
    throw std::invalid_argument("dtype: unknown");
  }
  check_threads(threads);
  const Kernels& kernels = choose_kernels(isa);
  const DotFn dot = kernels.dot[static_cast<int>(grad_dtype)][static_cast<int>(delta_dtype)];
  const auto* a = static_cast<const std::byte*>(grad);
  const std::int64_t blocks = ceil_div(length, kBlock);
  std::vector<double> sums(static_cast<std::size_t>(blocks * experts));
  parallel_for(threads, ceil_div(blocks, kBlocksPerTask), [&](int, std::int64_t task) {
    const std::int64_t last = std::min(blocks, (task + 1) * kBlocksPerTask);
    for (std::int64_t e = 0; e < experts; ++e) {
      if (deltas[e] == nullptr) continue;
      const auto* delta = static_cast<const std::byte*>(deltas[e]);
      for (std::int64_t b = task * kBlocksPerTask; b < last; ++b) {
        const std::int64_t begin = b * kBlock;
        sums[static_cast<std::size_t>(b * experts + e)] =
            dot(a, delta, begin, std::min(kBlock, length - begin));
      }
    }
  });
  std::fill(result, result + experts, 0.0);
  for (std::int64_t b = 0; b < blocks; ++b) {
    for (std::int64_t e = 0; e < experts; ++e) result[e] += sums[static_cast<std::size_t>(b * experts + e)];
  }
  return kernels.name;
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
