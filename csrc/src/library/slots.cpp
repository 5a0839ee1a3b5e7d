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

bool Slots::pin(Slot& slot, bool passes) {
  std::uint32_t state = slot.state.load();
  while ((state & kReady) != 0 && (passes || (state & kDraining) == 0)) {
    if (slot.state.compare_exchange_weak(state, state + 1)) return true;
  }
  return false;
}

bool Slots::has(const Slot& slot, const double* key) const {
  return std::equal(key, key + key_length_, slot.key.begin());
}

int Slots::find(const double* key, bool holder) {
  const std::uint64_t hash = hash_of(key, key_length_);
  for (std::size_t i = 0; i < count_; ++i) {
    Slot& slot = slots_[i];
    if (slot.hash.load(std::memory_order_relaxed) != hash || !pin(slot, holder)) continue;
    // Pinned: from here on nobody changes the key.
    if (has(slot, key)) {
      slot.used.store(tick(), std::memory_order_relaxed);
      return static_cast<int>(i);
    }
    release(static_cast<int>(i));
  }
  return -1;
}

void Slots::release(int index) noexcept {
  // All of this is sequentially consistent: either this thread sees the one that waits, or that one, which
  // announced itself first, sees the slot without its pin.
  const std::uint32_t before = slots_[static_cast<std::size_t>(index)].state.fetch_sub(1);
  if ((before & kPins) != 1 || waiting_.load() == 0) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  serve();
}

int Slots::pin_ready(const double* key, bool passes) {
  for (std::size_t i = 0; i < count_; ++i) {
    Slot& slot = slots_[i];
    if (slot.filling || !has(slot, key) || !pin(slot, passes)) continue;
    slot.used.store(tick(), std::memory_order_relaxed);
    return static_cast<int>(i);
  }
  return -1;
}

bool Slots::filling(const double* key) const {
  return std::any_of(slots_.get(), slots_.get() + count_,
                     [&](const Slot& slot) { return slot.filling && has(slot, key); });
}

int Slots::claim(const double* key) {
  for (;;) {
    int oldest = -1;
    std::uint64_t age = 0;
    std::uint32_t state = 0;
    for (std::size_t i = 0; i < count_; ++i) {
      const std::uint32_t now = slots_[i].state.load();
      const std::uint64_t used = slots_[i].used.load(std::memory_order_relaxed);
      if (slots_[i].filling || (now & kPins) != 0 || (oldest >= 0 && used >= age)) continue;
      oldest = static_cast<int>(i);
      age = used;
      state = now;
    }
    if (oldest < 0) return -1;
    Slot& slot = slots_[static_cast<std::size_t>(oldest)];
    if (!slot.state.compare_exchange_strong(state, 0)) continue;  // somebody pinned it meanwhile
    slot.filling = true;
    std::copy(key, key + key_length_, slot.key.begin());
    slot.hash.store(hash_of(key, key_length_), std::memory_order_relaxed);
    if (oldest == draining_) draining_ = -1;
    return oldest;
  }
}

void Slots::drain(const Waiter* first) {
  if (first == nullptr) draining_ = -1;
  if (first != nullptr && draining_ < 0) {  // one that is draining goes on, whoever passes it meanwhile
    std::uint64_t age = 0;
    for (std::size_t i = 0; i < count_; ++i) {
      const std::uint64_t used = slots_[i].used.load(std::memory_order_relaxed);
      if (slots_[i].filling || (draining_ >= 0 && used >= age)) continue;
      draining_ = static_cast<int>(i);
      age = used;
    }
  }
  // A caller that holds a slot itself may hold the oldest, and must not wait for that one alone.
  const bool all = first != nullptr && first->holder;
  for (std::size_t i = 0; i < count_; ++i) {
    std::atomic<std::uint32_t>& state = slots_[i].state;
    const bool wanted = all || static_cast<int>(i) == draining_;
    if (wanted == ((state.load() & kDraining) != 0)) continue;
    if (wanted) {
      state.fetch_or(kDraining);
    } else {
      state.fetch_and(~kDraining);
    }
  }
}

void Slots::serve() {
  const Waiter* first = nullptr;  // that found every slot pinned
  bool changed = false;
  for (auto next = waiters_.begin(); next != waiters_.end();) {
    Waiter& waiter = **next;
    waiter.slot = pin_ready(waiter.key, waiter.holder || first == nullptr);
    if (waiter.slot < 0 && first == nullptr && !filling(waiter.key)) {
      waiter.slot = claim(waiter.key);
      waiter.fills = waiter.slot >= 0;
      if (!waiter.fills) first = &waiter;
    }
    if (waiter.slot < 0) {
      ++next;
      continue;
    }
    next = waiters_.erase(next);
    changed = true;
  }
  drain(first);
  if (changed) changed_.notify_all();
}

int Slots::acquire(const double* key, const std::function<void(int)>& fill, bool holder,
                   const Deadline& deadline) {
  if (const int ready = find(key, holder); ready >= 0) return ready;
  Waiter waiter{key, holder};
  std::unique_lock<std::mutex> lock(mutex_);
  waiters_.push_back(&waiter);
  ++waiting_;
  serve();
  const auto served = [&] { return waiter.slot >= 0; };
  if (!deadline) {
    changed_.wait(lock, served);
  } else if (!changed_.wait_until(lock, *deadline, served)) {
    waiters_.remove(&waiter);
    serve();  // what was drained for this one is open again
  }
  --waiting_;
  if (!waiter.fills) return waiter.slot;
  Slot& slot = slots_[static_cast<std::size_t>(waiter.slot)];
  lock.unlock();
  try {
    fill(waiter.slot);
  } catch (...) {
    lock.lock();
    slot.filling = false;
    slot.used.store(0, std::memory_order_relaxed);
    slot.hash.store(0, std::memory_order_relaxed);
    serve();
    throw;
  }
  lock.lock();
  slot.filling = false;
  slot.used.store(tick(), std::memory_order_relaxed);
  slot.state.store(kReady | 1u);
  serve();  // those that want the same key
  return waiter.slot;
}

}  // namespace paretofuse
