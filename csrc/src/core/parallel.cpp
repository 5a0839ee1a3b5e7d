#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(PARETOFUSE_STD_THREADS)
#include <omp.h>
#include <unistd.h>
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

using Work = std::function<void(int)>;

// Threads of its own for one call: some 20 us each.
void run_std(int team, const Work& work) {
  std::vector<std::thread> helpers;
  try {
    for (int thread = 1; thread < team; ++thread) helpers.emplace_back(work, thread);
  } catch (const std::system_error&) {
    // The system has no more threads to give; those that there are do all of it.
  }
  work(0);
  for (std::thread& helper : helpers) helper.join();
}

#if !defined(PARETOFUSE_STD_THREADS)
// A process keeps libgomp's threads for the next call, but a child that it forks inherits only the memory of
// them, and would wait for ever for threads that are not there. Whoever used libgomp first (PyTorch shares
// it) may have been somebody else, so every process other than the one that loaded this library goes without.
const pid_t loaded_by = getpid();
#endif

void run_team(int team, const Work& work) {
#if defined(PARETOFUSE_STD_THREADS)
  // For machines without OpenMP, and for the thread sanitizer, which knows nothing of libgomp's own
  // synchronization.
  run_std(team, work);
#else
  if (getpid() != loaded_by) return run_std(team, work);
#pragma omp parallel num_threads(team)
  work(omp_get_thread_num());
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
  if (team <= 1) {
    work(0);
  } else {
    run_team(team, work);
  }
}

}  // namespace paretofuse
