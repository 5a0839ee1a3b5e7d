#include "library/slots.h"

#include <algorithm>
#include <cstring>

namespace paretofuse {
namespace {

std::uint64_t hash_of(const double* key, std::size_t length) {
  std::uint64_t hash = 0x9e3779b97f4a7c15u;
  for (std::size_t i = 0; i < length; ++i) {
    std::uint64_t bits;
    std::memcpy(&bits, key + i, sizeof bits);
    hash = (hash ^ bits) * 0xff51afd7ed558ccdu;
    hash ^= hash >> 32;
  }
  return hash;
}

}  // namespace

Slots::Slots(int count, std::size_t key_length)
    : key_length_(key_length),
      count_(static_cast<std::size_t>(count)),
      slots_(std::make_unique<Slot[]>(count_)) {
  for (std::size_t i = 0; i < count_; ++i) slots_[i].key.resize(key_length);
}

int Slots::find(const double* key, bool locked) {
  const std::uint64_t hash = hash_of(key, key_length_);
  for (std::size_t i = 0; i < count_; ++i) {
    Slot& slot = slots_[i];
    if (slot.hash.load(std::memory_order_relaxed) != hash) continue;
    std::uint32_t state = slot.state.load();
    while ((state & kReady) != 0) {
      if (!slot.state.compare_exchange_weak(state, state + 1)) continue;
      // Pinned: from here on nobody changes the key.
      if (std::equal(key, key + key_length_, slot.key.begin())) {
        slot.used.store(tick(), std::memory_order_relaxed);
        return static_cast<int>(i);
      }
      if (!locked) {
        release(static_cast<int>(i));
      } else if (unpin(slot)) {
        changed_.notify_all();
      }
      break;
    }
  }
  return -1;
}

bool Slots::unpin(Slot& slot) noexcept {
  // All of this is sequentially consistent: either this thread sees the one that waits, or that one, which
  // announced itself first, sees the slot without its pin.
  return (slot.state.fetch_sub(1) & ~kReady) == 1 && waiting_.load() > 0;
}

void Slots::release(int index) noexcept {
  if (!unpin(slots_[static_cast<std::size_t>(index)])) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  changed_.notify_all();
}

bool Slots::filling(const double* key) const {
  return std::any_of(slots_.get(), slots_.get() + count_, [&](const Slot& slot) {
    return slot.filling && std::equal(key, key + key_length_, slot.key.begin());
  });
}

int Slots::claim() {
  for (;;) {
    int oldest = -1;
    std::uint64_t age = 0;
    std::uint32_t state = 0;
    for (std::size_t i = 0; i < count_; ++i) {
      const std::uint32_t now = slots_[i].state.load();
      const std::uint64_t used = slots_[i].used.load(std::memory_order_relaxed);
      if (slots_[i].filling || (now & ~kReady) != 0 || (oldest >= 0 && used >= age)) continue;
      oldest = static_cast<int>(i);
      age = used;
      state = now;
    }
    if (oldest < 0) return -1;
    if (slots_[static_cast<std::size_t>(oldest)].state.compare_exchange_strong(state, 0)) return oldest;
  }
}

int Slots::acquire(const double* key, const std::function<void(int)>& fill) {
  if (const int ready = find(key, false); ready >= 0) return ready;
  std::unique_lock<std::mutex> lock(mutex_);
  ++waiting_;
  struct Leave {
    std::atomic<int>& waiting;
    ~Leave() { --waiting; }
  } const leave{waiting_};
  int index = -1;
  for (;; changed_.wait(lock)) {
    if (const int ready = find(key, true); ready >= 0) return ready;
    if (filling(key)) continue;
    index = claim();
    if (index >= 0) break;
  }
  Slot& slot = slots_[static_cast<std::size_t>(index)];
  slot.filling = true;
  std::copy(key, key + key_length_, slot.key.begin());
  slot.hash.store(hash_of(key, key_length_), std::memory_order_relaxed);
  lock.unlock();
  try {
    fill(index);
  } catch (...) {
    lock.lock();
    slot.filling = false;
    slot.used.store(0, std::memory_order_relaxed);
    slot.hash.store(0, std::memory_order_relaxed);
    changed_.notify_all();
    throw;
  }
  lock.lock();
  slot.filling = false;
  slot.used.store(tick(), std::memory_order_relaxed);
  slot.state.store(kReady | 1u);
  changed_.notify_all();
  return index;
}

}  // namespace paretofuse
