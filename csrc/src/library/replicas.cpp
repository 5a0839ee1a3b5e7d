#include "paretofuse/replicas.h"

#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>

#include "library/replica_pool.h"

namespace paretofuse {
namespace {

// More seconds than any process lives; a clock would overflow.
constexpr double kForever = 1e9;

// How many replicas this thread has acquired that are still held, by whichever thread.
const std::shared_ptr<std::atomic<int>>& held_by_this_thread() {
  thread_local const auto count = std::make_shared<std::atomic<int>>(0);
  return count;
}

Slots::Deadline deadline_after(double timeout) {
  if (!(timeout >= 0)) {
    throw std::invalid_argument("timeout: got " + std::to_string(timeout) +
                                " seconds, expected 0 or more, or infinity to wait for ever");
  }
  if (timeout >= kForever) return std::nullopt;
  return std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                                                std::chrono::duration<double>(timeout));
}

}  // namespace

ReplicaPool::ReplicaPool(std::shared_ptr<const Model> model, int count)
    : model_(std::move(model)), slots_(count, model_->store().manifest.objectives.size()) {
  for (int replica = 0; replica < count; ++replica) {
    buffers_.emplace_back(model_->routed_bytes());
    views_.push_back(model_->views(buffers_.back().data()));
  }
}

Replica ReplicaPool::acquire(const Preference& preference, double timeout) {
  const Slots::Deadline deadline = deadline_after(timeout);
  const std::shared_ptr<std::atomic<int>>& held = held_by_this_thread();
  const bool holder = held->load() > 0;
  // A preference that some replica has was checked when that one was merged.
  const bool fits = preference.size() == model_->store().manifest.objectives.size();
  int replica = fits ? slots_.find(preference.data(), holder) : -1;
  if (replica < 0) {
    // Here, so that no replica is given up for a preference that is refused.
    const Weights weights = model_->weights(preference);
    const auto merge = [&](int slot) {
      model_->merge(weights, buffers_[static_cast<std::size_t>(slot)].data());
    };
    replica = slots_.acquire(preference.data(), merge, holder, deadline);
  }
  if (replica < 0) {
    throw TimeoutError("no replica became free within " + std::to_string(timeout) + " s, " +
                       std::to_string(buffers_.size()) +
                       " in all; open the engine with more of them, or hold them for a shorter time");
  }
  return Replica(shared_from_this(), replica, held);
}

const TensorView& ReplicaPool::tensor(int replica, std::string_view name) const {
  return views_[static_cast<std::size_t>(replica)][model_->index(name)];
}

Replica::Replica(std::shared_ptr<ReplicaPool> pool, int index, std::shared_ptr<std::atomic<int>> held)
    : pool_(std::move(pool)), index_(index), held_(std::move(held)) {
  ++*held_;
}

Replica::Replica(Replica&& other) noexcept
    : pool_(std::move(other.pool_)), index_(other.index_), held_(std::move(other.held_)) {}

Replica& Replica::operator=(Replica&& other) noexcept {
  if (this == &other) return *this;
  release();
  pool_ = std::move(other.pool_);
  index_ = other.index_;
  held_ = std::move(other.held_);
  return *this;
}

Replica::~Replica() { release(); }

void Replica::release() noexcept {
  if (pool_ == nullptr) return;
  pool_->release(index_);
  --*held_;
  pool_.reset();
}

const TensorView& Replica::tensor(std::string_view name) const { return pool_->tensor(index_, name); }

}  // namespace paretofuse
