// Many threads acquire replicas of one engine for preferences of their own; every weight that they see must
// belong to a complete merge for their preference. Meant to run under the thread sanitizer:
// tests/csrc/test_replicas.py.
//
//     stress_replicas STORE CALLS THREADS REPLICAS PREFERENCES
//
// Each thread makes that many calls: a busy machine makes it slower, and shows no less.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "paretofuse/engine.h"
#include "paretofuse/replicas.h"

namespace pf = paretofuse;

namespace {

std::uint64_t checksum(const pf::Engine& engine, const pf::Replica& replica) {
  std::uint64_t sum = 1;
  for (const std::string& name : engine.tensor_names()) {
    const pf::TensorView& view = replica.tensor(name);
    const auto* bytes = static_cast<const unsigned char*>(view.data);
    for (std::int64_t i = 0; i < view.nbytes; ++i) sum = (sum ^ bytes[i]) * 0x100000001b3u;
  }
  return sum;
}

std::vector<pf::Preference> preferences(std::size_t experts, int count) {
  std::mt19937 random(7);
  std::vector<pf::Preference> all;
  for (int i = 0; i < count; ++i) {
    pf::Preference preference(experts);
    double total = 0;
    for (double& share : preference) total += share = std::uniform_real_distribution<>(0.1, 1)(random);
    for (double& share : preference) share /= total;
    all.push_back(preference);
  }
  return all;
}

int stress(const std::string& store, int calls, int threads, int replicas, int count) {
  pf::Options options;
  options.threads = 1;
  options.replicas = replicas;
  const pf::Engine engine = pf::Engine::open(store, options);
  const std::vector<pf::Preference> all = preferences(engine.objectives().size(), count);
  // The truth, from an engine that nobody shares.
  const pf::Engine alone = pf::Engine::open(store, options);
  std::vector<std::uint64_t> truth;
  for (const pf::Preference& preference : all) truth.push_back(checksum(alone, alone.acquire(preference)));

  std::atomic<std::int64_t> wrong{0};
  std::vector<std::thread> workers;
  for (int worker = 0; worker < threads; ++worker) {
    workers.emplace_back([&, worker] {
      std::mt19937 random(static_cast<unsigned>(worker));
      for (int call = 0; call < calls; ++call) {
        const std::size_t which = random() % all.size();
        const pf::Replica replica = engine.acquire(all[which]);
        wrong += checksum(engine, replica) != truth[which];
        if (random() % 4 == 0) std::this_thread::yield();
        wrong += checksum(engine, replica) != truth[which];
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  std::printf("%lld wrong\n", static_cast<long long>(wrong));
  return wrong == 0 ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 6) return std::fprintf(stderr, "usage: STORE CALLS THREADS REPLICAS PREFERENCES\n"), 2;
  try {
    return stress(arguments[1], std::atoi(arguments[2]), std::atoi(arguments[3]), std::atoi(arguments[4]),
                  std::atoi(arguments[5]));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
