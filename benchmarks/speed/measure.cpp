// What benchmarks/speed/cpp_replicas.py measures about libparetofuse; prints one line of JSON.
//
//     measure open STORE                       opening, the first switch, later ones, and the copy they
//     compare with measure hits|misses STORE THREADS SECONDS latency of acquire, in nanoseconds with the
//     clock's own share
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "paretofuse/engine.h"
#include "paretofuse/merge.h"
#include "paretofuse/replicas.h"

namespace pf = paretofuse;

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

pf::Preference preference(std::mt19937& random, std::size_t experts) {
  pf::Preference shares(experts);
  double total = 0;
  for (double& share : shares) total += share = std::uniform_real_distribution<>(0.1, 1)(random);
  for (double& share : shares) share /= total;
  return shares;
}

void measure_open(const std::string& store) {
  auto start = Clock::now();
  pf::Engine engine = pf::Engine::open(store);
  const double opened = seconds_since(start);
  std::mt19937 random(1);
  start = Clock::now();
  engine.switch_to(preference(random, engine.objectives().size()));
  const double first = seconds_since(start);

  double output = 0;
  for (const std::string& name : engine.tensor_names()) output += engine.tensor(name).nbytes;
  const double moved = output * (engine.objectives().size() + 2);
  std::vector<char> from(256 << 20, 1), to(256 << 20, 2);
  const int threads = std::max(1u, std::thread::hardware_concurrency());
  std::vector<double> switches, shares;
  for (int round = 0; round < 15; ++round) {
    const pf::Preference next = preference(random, engine.objectives().size());
    start = Clock::now();
    engine.switch_to(next);
    switches.push_back(seconds_since(start));
    start = Clock::now();
    pf::copy(to.data(), from.data(), static_cast<std::int64_t>(from.size()), threads);
    const double copy_rate = 2.0 * from.size() / seconds_since(start);
    shares.push_back(moved / switches.back() / copy_rate);
  }
  std::printf("{\"open\": %.9f, \"first\": %.9f, \"switch\": %.9f, \"moved\": %.0f, \"share\": %.4f}\n",
              opened, first, median(switches), moved, median(shares));
}

void measure_acquire(const std::string& store, bool hits, int threads, double seconds) {
  pf::Options options;
  options.threads = 1;
  options.replicas = hits ? 8 : threads + 1;  // a free one for every miss
  const pf::Engine engine = pf::Engine::open(store, options);
  const std::size_t experts = engine.objectives().size();
  std::mt19937 seed(3);
  std::vector<pf::Preference> known;
  for (int i = 0; i < options.replicas; ++i) {
    known.push_back(preference(seed, experts));
    engine.acquire(known.back());
  }
  std::vector<std::vector<double>> samples(static_cast<std::size_t>(threads));
  std::vector<std::thread> workers;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  for (int worker = 0; worker < threads; ++worker) {
    workers.emplace_back([&, worker] {
      std::vector<double>& own = samples[static_cast<std::size_t>(worker)];
      own.reserve(1 << 22);
      std::mt19937 random(static_cast<unsigned>(worker) + 10);
      pf::Preference fresh;
      for (;;) {
        if (!hits) fresh = preference(random, experts);
        const pf::Preference& wanted = hits ? known[random() % known.size()] : fresh;
        const auto start = Clock::now();
        const pf::Replica replica = engine.acquire(wanted);
        const auto stop = Clock::now();
        if (own.size() < own.capacity())
          own.push_back(std::chrono::duration<double, std::nano>(stop - start).count());
        if (stop >= end) break;
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  std::vector<double> all;
  for (const std::vector<double>& own : samples) all.insert(all.end(), own.begin(), own.end());
  std::sort(all.begin(), all.end());
  const auto at = [&](double share) { return all[static_cast<std::size_t>(share * (all.size() - 1))]; };
  std::printf("{\"count\": %zu, \"p50\": %.0f, \"p99\": %.0f, \"p99.9\": %.0f}\n", all.size(), at(0.5),
              at(0.99), at(0.999));
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "";
  try {
    if (mode == "open" && count == 3) return measure_open(arguments[2]), 0;
    if ((mode == "hits" || mode == "misses") && count == 5) {
      return measure_acquire(arguments[2], mode == "hits", std::atoi(arguments[3]), std::atof(arguments[4])),
             0;
    }
    std::fprintf(stderr, "usage: open STORE | hits|misses STORE THREADS SECONDS\n");
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
