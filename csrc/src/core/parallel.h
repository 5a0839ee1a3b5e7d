// Threads: the one place that knows OpenMP.
#pragma once

#include <cstdint>
#include <functional>

namespace paretofuse {

// Throws std::invalid_argument unless 1 <= threads <= 1024.
void check_threads(int threads);

// Calls task(thread, index) once for each index < tasks, on at most `threads` threads; thread < threads tells
// which. Tasks go to whichever thread is free, so results must not depend on who does what; task must not
// throw. Every call sees the default floating-point environment (round to nearest, subnormals kept), whatever
// the caller's own is. On return everything the tasks stored is visible to all threads, streaming stores
// included. In a process that was forked after this library was loaded, it makes threads of its own.
void parallel_for(int threads, std::int64_t tasks, const std::function<void(int, std::int64_t)>& task);

}  // namespace paretofuse
