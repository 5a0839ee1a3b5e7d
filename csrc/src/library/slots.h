// Slots that many threads read while others are refilled: the bookkeeping of replicas, without their content.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace paretofuse {

// A cache from keys (vectors of numbers) to slots. A slot is empty, being filled by one thread, or ready; a
// ready one is pinned by its readers and never refilled while it is.
//
// Callers that find nothing are served in the order in which they came. While the first of them finds every
// slot pinned, the least recently used one is drained: who comes for its key from then on waits behind it.
class Slots {
 public:
  using Deadline = std::optional<std::chrono::steady_clock::time_point>;

  Slots(int count, std::size_t key_length);

  // Pins the slot of a key if one is ready, and returns it; -1 otherwise. Takes no lock.
  //
  // holder: the caller has a slot pinned already. It passes a drain, which may be waiting for that very pin.
  int find(const double* key, bool holder);

  // As find, but if no slot has the key, `fill` writes the content of the least recently used slot that
  // nobody has pinned; meanwhile other keys are served, and other callers with this key wait. What `fill`
  // throws leaves the slot empty. -1 if none became free before the deadline; without one it waits for ever.
  int acquire(const double* key, const std::function<void(int)>& fill, bool holder, const Deadline& deadline);

  void release(int slot) noexcept;

 private:
  struct alignas(64) Slot {
    std::atomic<std::uint32_t> state{0};  // kReady, kDraining, and the number of pins
    std::atomic<std::uint64_t> hash{0};   // of the key: a hint that saves most pins in vain
    std::atomic<std::uint64_t> used{0};   // when, on clock_
    std::vector<double> key;  // changes under mutex_ while not ready; read while pinned, or under mutex_
    bool filling = false;     // guarded by mutex_
  };
  static constexpr std::uint32_t kReady = 1u << 31;
  static constexpr std::uint32_t kDraining = 1u << 30;
  static constexpr std::uint32_t kPins = kDraining - 1;

  // A caller of acquire; guarded by mutex_.
  struct Waiter {
    const double* key;
    bool holder;
    int slot = -1;       // what it was given: pinned, or
    bool fills = false;  // claimed, for it to fill
  };

  static bool pin(Slot& slot, bool passes);
  bool has(const Slot& slot, const double* key) const;
  std::uint64_t tick() { return clock_.fetch_add(1, std::memory_order_relaxed) + 1; }

  // All of these need mutex_.
  void serve();  // gives waiters, the first first, what there is
  int pin_ready(const double* key, bool passes);
  bool filling(const double* key) const;
  int claim(const double* key);     // the least recently used slot without pins, to be filled; or -1
  void drain(const Waiter* first);  // for a waiter that found every slot pinned, or nobody

  std::size_t key_length_;
  std::size_t count_;
  std::unique_ptr<Slot[]> slots_;
  std::atomic<std::uint64_t> clock_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::list<Waiter*> waiters_;   // guarded by mutex_, in the order in which they came
  int draining_ = -1;            // guarded by mutex_: the oldest slot, since when it was to drain
  std::atomic<int> waiting_{0};  // callers inside acquire that have nothing yet
};

}  // namespace paretofuse
