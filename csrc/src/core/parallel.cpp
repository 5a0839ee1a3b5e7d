#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#if defined(PARETOFUSE_STD_THREADS)
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace paretofuse {
namespace {

// While it lives, this thread computes with the default floating-point environment.
class DefaultFloats {
 public:
#if defined(__x86_64__)
  DefaultFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloats() { _mm_setcsr(saved_); }
  DefaultFloats(const DefaultFloats&) = delete;
  DefaultFloats& operator=(const DefaultFloats&) = delete;

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloats() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(std::uint64_t{0}));
  }
  ~DefaultFloats() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }
  DefaultFloats(const DefaultFloats&) = delete;
  DefaultFloats& operator=(const DefaultFloats&) = delete;

 private:
  std::uint64_t saved_;
#endif
};

void finish_streaming_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#elif defined(__aarch64__)
  __asm__ volatile("dmb ishst" : : : "memory");
#endif
}

}  // namespace

void check_threads(int threads) {
  if (threads < 1 || threads > 1024) {
    throw std::invalid_argument("threads: got " + std::to_string(threads) + ", expected 1 to 1024");
  }
}

void parallel_for(int threads, std::int64_t tasks, const std::function<void(int, std::int64_t)>& task) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&](int thread) {
    const DefaultFloats floats;
    for (std::int64_t index = next++; index < tasks; index = next++) task(thread, index);
    finish_streaming_stores();
  };
  const int team = static_cast<int>(std::min<std::int64_t>(threads, tasks));
  if (team <= 1) {  // also keeps single-threaded callers usable in a forked child, where libgomp is not
    work(0);
    return;
  }
#if defined(PARETOFUSE_STD_THREADS)
  // For machines without OpenMP, and for the thread sanitizer, which knows nothing of libgomp's own
  // synchronization.
  std::vector<std::thread> helpers;
  for (int thread = 1; thread < team; ++thread) helpers.emplace_back(work, thread);
  work(0);
  for (std::thread& helper : helpers) helper.join();
#else
#pragma omp parallel num_threads(team)
  work(omp_get_thread_num());
#endif
}

}  // namespace paretofuse
