// Switches and acquires again and again: memory must stay flat, and, under the address sanitizer, nothing
// leak.
//
//     soak STORE SWITCHES     exits 1 if resident memory grew by more than 1 MiB in the second half
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <exception>

#include "paretofuse/engine.h"
#include "paretofuse/replicas.h"

namespace pf = paretofuse;

namespace {

// In KiB, or 0 where the system has no /proc.
long resident() {
  long pages = 0;
  if (std::FILE* file = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(file, "%*d %ld", &pages) != 1) pages = 0;
    std::fclose(file);
  }
  return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

int soak(const char* store, int switches) {
  pf::Options options;
  options.threads = 2;
  pf::Engine engine = pf::Engine::open(store, options);
  const auto run = [&](int from, int to) {
    for (int i = from; i < to; ++i) {
      pf::Preference preference(engine.objectives().size(), 0.0);
      preference[0] = static_cast<double>(i) / switches;
      preference.back() += 1 - preference[0];
      engine.switch_to(preference);
      if (i % 3 == 0) engine.acquire(preference);
      if (i % 100 == 0) pf::Engine::open(store, options).switch_to(preference);
      try {
        engine.switch_to({2.0});
      } catch (const std::invalid_argument&) {
      }
    }
  };
  run(0, switches / 2);
  const long half = resident();
  run(switches / 2, switches);
  const long end = resident();
  std::printf("resident: %ld KiB after half, %ld KiB at the end\n", half, end);
  return end - half > 1024 ? 1 : 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return std::fprintf(stderr, "usage: STORE SWITCHES\n"), 2;
  try {
    return soak(arguments[1], std::atoi(arguments[2]));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
