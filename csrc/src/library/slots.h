// Slots that many threads read while others are refilled: the bookkeeping of replicas, without their content.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace paretofuse {

// A cache from keys (vectors of numbers) to slots. A slot is empty, being filled by one thread, or ready; a
// ready one is pinned by its readers and never refilled while it is.
class Slots {
 public:
  Slots(int count, std::size_t key_length);

  // Pins the slot of a key and returns it. If no slot has the key, `fill` writes the content of the least
  // recently used slot that nobody has pinned; meanwhile other keys are served, and other callers with this
  // key wait. If every slot is pinned or being filled, waits for one. What `fill` throws leaves the slot
  // empty.
  int acquire(const double* key, const std::function<void(int)>& fill);

  void release(int slot) noexcept;

 private:
  struct alignas(64) Slot {
    std::atomic<std::uint32_t> state{0};  // kReady, and the number of pins
    std::atomic<std::uint64_t> hash{0};   // of the key: a hint that saves most pins in vain
    std::atomic<std::uint64_t> used{0};   // when, on clock_
    std::vector<double> key;              // changes only while not ready, read only while pinned
    bool filling = false;                 // guarded by mutex_, as is the key while it is filled
  };
  static constexpr std::uint32_t kReady = 1u << 31;

  // Pins the slot of a key if one is ready; returns -1 otherwise. Takes no lock; `locked`: the caller has it.
  int find(const double* key, bool locked);
  // Takes a pin away; whether a thread that waits for a slot must be told.
  bool unpin(Slot& slot) noexcept;
  // The least recently used slot that is neither pinned nor being filled, made not ready; -1 if there is
  // none.
  int claim();
  bool filling(const double* key) const;
  std::uint64_t tick() { return clock_.fetch_add(1, std::memory_order_relaxed) + 1; }

  std::size_t key_length_;
  std::size_t count_;
  std::unique_ptr<Slot[]> slots_;
  std::atomic<std::uint64_t> clock_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<int> waiting_{0};  // callers of acquire that found nothing ready
};

}  // namespace paretofuse
